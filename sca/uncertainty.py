"""Calibrated confidence of captions, and OOD (out-of-distribution) scores of images.

Both are measured on data by `sca calibrate` and stored with a checkpoint; see `sca.checkpoints.uncertainty`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from sca_registry.contracts import Prompt
from torch import Tensor
from torch.nn import functional as F

MIN_PROBABILITY = 1e-6  # scores are clipped to this distance from 0 and 1
MIN_SCALE = 1e-6  # standard deviations and variances are at least this large
MIN_RELATIVE_SCALE = 1e-2  # minimum standard deviation of a feature, as a fraction of the median one
MAX_COMPONENTS = 64
VIEWS_PER_COMPONENT = 4  # images and crops that each principal component needs at least


@dataclass(frozen=True)
class Calibration:
    """Map from the score of a caption to the probability that the caption is correct: Platt scaling (Platt, 1999).

    Attributes:
        slope: Factor of the logit of the score.
        intercept: Summand.
    """

    slope: float
    intercept: float

    def compute_confidence(self, score: float) -> float | None:
        """Return the probability in [0, 1] for a score in [0, 1]; None for NaN."""
        if math.isnan(score):
            return None
        probability = min(max(score, MIN_PROBABILITY), 1 - MIN_PROBABILITY)
        logit = math.log(probability / (1 - probability))
        return 0.5 + 0.5 * math.tanh((self.slope * logit + self.intercept) / 2)  # the sigmoid, without overflow


@dataclass(frozen=True)
class Domain:
    """Distribution of the pooled features of training images: a Gaussian (probabilistic PCA, Tipping and Bishop, 1999).

    Attributes:
        mean: (F,) mean of the pooled features.
        scale: (F,) standard deviations, by which the features are divided.
        components: (K, F) orthonormal principal components of the scaled features.
        variances: (K,) variances along the components.
        residual_variance: Variance along every other direction.
        threshold: Largest Mahalanobis distance of an image that is like the training images.
    """

    mean: Tensor
    scale: Tensor
    components: Tensor
    variances: Tensor
    residual_variance: float
    threshold: float

    def compute_ood_scores(self, pooled: Tensor) -> list[float]:
        """Compute the Mahalanobis distances to the training images, divided by the threshold.

        Args:
            pooled: (B, F) result of `pool_features`.

        Returns:
            B scores; above 1, an image is unlike the training images.
        """
        return (self.compute_distances(pooled) / self.threshold).tolist()

    def compute_distances(self, pooled: Tensor) -> Tensor:
        """Return the (B,) Mahalanobis distances of (B, F) pooled features to the training images."""
        scaled = (pooled.double().cpu() - self.mean) / self.scale  # (B, F)
        projected = scaled @ self.components.T  # (B, K)
        residuals = (scaled.square().sum(1) - projected.square().sum(1)).clamp(min=0)
        return ((projected.square() / self.variances).sum(1) + residuals / self.residual_variance).sqrt()


@dataclass(frozen=True)
class Uncertainty:
    """Calibrations and training domain of a model.

    Attributes:
        calibrations: Calibrations by task and kind of prompt, see `get_prompt_kind`.
        domain: Distribution of the training images; None if it was not measured.
        weights_hash: Hash of the weights of the measurement, see `sca.checkpoints.uncertainty.hash_as_float32`.
    """

    calibrations: Mapping[tuple[str, str], Calibration]
    domain: Domain | None
    weights_hash: str

    def compute_confidence(self, task: str, prompt: Prompt, score: float) -> float | None:
        """Return the calibrated confidence of a caption; None for a task or prompt without a calibration."""
        calibration = self.calibrations.get((task, get_prompt_kind(prompt)))
        return None if calibration is None else calibration.compute_confidence(score)


def get_prompt_kind(prompt: Prompt) -> str:
    """Return the kind of a prompt, such as "box", "point", "points" or "box-and-point".

    A "point" is a single foreground point; any other points are "points".
    """
    has_single_point = [label for _, _, label in prompt.points] == [1]
    points = ("point" if has_single_point else "points") if prompt.points else None
    kinds = ("box" if prompt.box is not None else None, points, "mask" if prompt.mask is not None else None)
    return "-and-".join(kind for kind in kinds if kind)


def pool_features(features: Tensor, content_sizes: Sequence[tuple[int, int]], image_size: int) -> Tensor:
    """Compute the mean and standard deviation of each channel over the cells that an image covers.

    Args:
        features: (B, C, h, w) image features.
        content_sizes: Width and height of each image in the model input; padding fills the rest.
        image_size: Side of the square model input in pixels.

    Returns:
        (B, 2 C) pooled features, float32.
    """
    rows, columns = features.shape[2:]
    pooled = []
    for image_features, (width, height) in zip(features, content_sizes, strict=True):
        covered_rows, covered_columns = math.ceil(height / image_size * rows), math.ceil(width / image_size * columns)
        cells = image_features[:, :covered_rows, :covered_columns].flatten(1).float()
        pooled.append(torch.cat((cells.mean(1), cells.std(1, correction=0))))
    return torch.stack(pooled)


def fit_calibration(scores: Tensor, correct: Tensor) -> Calibration:
    """Fit Platt scaling by maximum likelihood, with the target values of Platt (1999).

    Args:
        scores: (N,) scores of captions.
        correct: (N,) whether each caption is correct, bool.

    Returns:
        The calibration.
    """
    logits = scores.double().clamp(MIN_PROBABILITY, 1 - MIN_PROBABILITY).logit()
    num_correct, num_wrong = int(correct.sum()), int((~correct).sum())
    targets = torch.where(correct, (num_correct + 1) / (num_correct + 2), 1 / (num_wrong + 2)).double()
    parameters = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def compute_loss() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(parameters[0] * logits + parameters[1], targets)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(compute_loss)
    slope, intercept = parameters.tolist()
    return Calibration(slope, intercept)


def fit_domain(training_features: Tensor, held_out_features: Tensor, quantile: float) -> Domain:
    """Fit the distribution of the training images.

    Args:
        training_features: (N, F) pooled features of training images.
        held_out_features: (M, F) pooled features of images of the same kind that the model was not trained on.
        quantile: Fraction of the held-out images below the threshold.

    Returns:
        The distribution.
    """
    features = training_features.double()
    mean, scale = features.mean(0), features.std(0)
    # A feature that is constant in the training images would make all other images unlike them.
    varying = scale[scale > MIN_SCALE]
    scale = scale.clamp(min=max(MIN_SCALE, MIN_RELATIVE_SCALE * float(varying.median())) if len(varying) else MIN_SCALE)
    _, singular_values, directions = torch.linalg.svd((features - mean) / scale, full_matrices=False)
    variances = singular_values.square() / len(features)
    num_features = features.shape[1]
    num_components = max(1, min(MAX_COMPONENTS, len(features) // VIEWS_PER_COMPONENT, num_features - 1))
    residual_variance = float(variances[num_components:].sum()) / (num_features - num_components)
    fitted = Domain(
        mean,
        scale,
        directions[:num_components],
        variances[:num_components].clamp(min=MIN_SCALE),
        max(residual_variance, MIN_SCALE),
        threshold=1.0,
    )
    threshold = float(fitted.compute_distances(held_out_features).quantile(quantile))
    return Domain(**{**vars(fitted), "threshold": threshold})
