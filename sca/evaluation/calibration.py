"""Calibrate the confidence of captions, and fit the distribution of the training images: `sca calibrate`.

Calibrations and the threshold of the OOD score are fitted on every other held-out image, and measured on the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import sca_registry
import torch
from PIL import Image
from sca_registry.contracts import TASKS, Dataset, Sample
from sca_registry.spec import ComponentSpec
from torch import Tensor

from sca.checkpoints.load import load_uncalibrated
from sca.checkpoints.native import read_spec, read_weights
from sca.checkpoints.uncertainty import (
    hash_as_float32,
    read_uncertainty,
    serialize_uncertainty,
    write_uncertainty,
)
from sca.data.scenes import Statement, parse_statement
from sca.data.summary import check_dataset_not_empty
from sca.evaluation.bootstrap import ScoreStatistics, bootstrap_scores, compute_interval, has_enough_images
from sca.evaluation.metrics.attribute_accuracy import ATTRIBUTES
from sca.evaluation.predictions import PROMPT_TYPES, PromptingOptions, predict_dataset
from sca.evaluation.records import Record, normalize_text
from sca.inference.engine import Engine
from sca.io.atomic import create_writable_folder
from sca.io.errors import InputError
from sca.io.hub import resolve_local_path
from sca.io.score_format import format_interval, format_score
from sca.io.text import format_count
from sca.io.validation import check_choice, check_list, check_range
from sca.uncertainty import Calibration, Domain, Uncertainty, fit_calibration, fit_domain

if TYPE_CHECKING:
    from sca.io.terminal import Table

DEFAULT_PROMPT_TYPES = ("box", "mask-point", "box-and-point", "mask")
POINT_PROMPT_TYPES = ("center", "random-point", "mask-point")  # prompt types with a single point
NUM_BINS = 10
MIN_REGIONS = 50  # regions that each half needs at least
MAX_ECE = 0.08  # largest expected calibration error of a calibration that is saved
DOMAIN_QUANTILE = 0.99  # fraction of held-out images that are like the training images by definition
MIN_CROP_FRACTION = 0.5  # sides of random crops as a fraction of the image
MAX_TRAINING_IMAGES = 1000
MIN_TRAINING_IMAGES = 20

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ReliabilityBin:
    """Bin of a reliability diagram.

    Attributes:
        num_regions: Regions in the bin.
        confidence: Their mean confidence.
        accuracy: Fraction with a correct caption.
    """

    num_regions: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class CalibrationResult:
    """Calibration of one task and prompt type, measured on the half of the images that did not fit it.

    Attributes:
        task: Task.
        prompt_type: Prompt type, see `sca.evaluation.predictions.PROMPT_TYPES`.
        prompt_kind: Kind of prompt, see `sca.uncertainty.get_prompt_kind`.
        calibration: Calibration.
        num_regions: Regions of the measured half.
        accuracy: Fraction of them with a correct caption.
        score_ece: ECE (expected calibration error, arXiv 1706.04599) of the scores.
        ece: ECE of the confidences.
        ece_interval: Its 95% interval by a bootstrap over images; None for few images.
        bins: Bins of equal mass of the confidences.
        reason: Why the calibration is not saved; "" if it is.
    """

    task: str
    prompt_type: str
    prompt_kind: str
    calibration: Calibration
    num_regions: int
    accuracy: float
    score_ece: float
    ece: float
    ece_interval: tuple[float, float] | None
    bins: Sequence[ReliabilityBin]
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**vars(self), "calibration": vars(self.calibration), "bins": [vars(each) for each in self.bins]}


@dataclass(frozen=True)
class DomainResult:
    """Training domain of a model.

    Attributes:
        num_training_images: Training images.
        num_images: Images of the measured half.
        flagged_fraction: Fraction of them with an OOD score above 1.
        reason: Why the domain is not saved; "" if it is.
    """

    num_training_images: int
    num_images: int
    flagged_fraction: float
    reason: str = ""


@dataclass(frozen=True)
class CalibrationReport:
    """Result of `calibrate_checkpoint`.

    Attributes:
        model: Checkpoint folder.
        dataset: Name of the dataset and its split.
        results: One per task and prompt type.
        domain: Training domain; None if it was not measured.
        uncertainty: Uncertainty that is stored with the checkpoint.
    """

    model: str
    dataset: str
    results: Sequence[CalibrationResult]
    domain: DomainResult | None
    uncertainty: Uncertainty = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        results = [each.to_dict() for each in self.results]
        domain = None if self.domain is None else vars(self.domain)
        return {"model": self.model, "dataset": self.dataset, "results": results, "domain": domain}

    def build_table(self) -> Table:
        """Build a terminal table with one row per task and prompt type, and notes below."""
        from sca.io.terminal import Table

        columns = ("task", "prompt type", "regions", "accuracy", "ECE of score", "ECE", "95% CI", "saved")
        notes = ["scores times 100; ECE: expected calibration error in 10 bins, on images that did not fit it"]
        if self.domain is not None:
            notes.append(
                f"OOD score above 1: {format_score(self.domain.flagged_fraction)}% of "
                f"{format_count(self.domain.num_images, 'held-out image')}"
            )
        if self.domain is not None and self.domain.reason:
            notes.append(f"OOD score not saved: {self.domain.reason}; use more images, or pass --no-ood")
        table = Table(columns, f"calibration of {self.model} on {self.dataset}", columns[2:7], notes)
        for each in self.results:
            scores = (each.accuracy, each.score_ece, each.ece)
            interval = format_interval(*(each.ece_interval or (None, None)))
            cells = (str(each.num_regions), *map(format_score, scores), interval, each.reason or "yes")
            table.add_row(each.task, each.prompt_type, *cells)
        return table


def calibrate_checkpoint(
    model: str | Path,
    dataset: str | Mapping[str, Any] | ComponentSpec,
    split: str = "val",
    *,
    train_split: str | None = "train",
    prompt_types: Sequence[str] = DEFAULT_PROMPT_TYPES,
    max_images: int | None = None,
    max_training_images: int = MAX_TRAINING_IMAGES,
    batch_size: int = 8,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
    allow_external: bool = False,
) -> CalibrationReport:
    """Measure the calibrations and the training domain of a checkpoint, and write them to its folder.

    Earlier calibrations of other kinds of prompts (`POINT_PROMPT_TYPES` are one kind) and, without `train_split`, the
    earlier training domain are kept if they belong to the same weights. A calibration or a domain that cannot be stored
    is reported with a `reason`.

    Args:
        model: Checkpoint folder in the native layout.
        dataset: Registered name, or a dict with a name and options.
        split: Split that the model was not trained on.
        train_split: Split with the training images, for the OOD score; None to measure only the calibrations.
        prompt_types: Prompt types to calibrate.
        max_images: Maximum number of held-out images.
        max_training_images: Maximum number of training images, evenly spaced in the split; at least
            `MIN_TRAINING_IMAGES`.
        batch_size: Images per batch.
        device: Device of the model.
        seed: Random seed of point prompts and crops.
        progress: Called with the current step, the number of images done and the total.
        trust_remote_code: See `sca.load`.
        allow_external: See `sca.load`.

    Returns:
        The report.

    Raises:
        InputError: The model is not a checkpoint folder, or the dataset has too few images or regions or no truth to
            judge captions by.
        OutputError: The folder cannot be written.
        ValueError: A prompt type is unknown, two are of the same kind, or a value is out of range.
    """
    check_range("max_training_images", max_training_images, int, MIN_TRAINING_IMAGES)
    check_range("batch_size", batch_size, int, 1)
    check_range("seed", seed, int)
    if max_images is not None:
        check_range("max_images", max_images, int, 2)
    check_list("prompt_types", prompt_types, str, minimum=1)
    for prompt_type in prompt_types:
        check_choice("prompt_types", prompt_type, PROMPT_TYPES)
    prompt_types = tuple(dict.fromkeys(prompt_types))
    _check_prompt_kinds(prompt_types)
    folder = _find_checkpoint_folder(model)
    create_writable_folder(folder)
    component = dataset if isinstance(dataset, ComponentSpec) else ComponentSpec.from_dict(dataset, "dataset")
    build_dataset = sca_registry.datasets.build
    held_out = build_dataset(component.name, split, **component.options)
    check_dataset_not_empty(held_out, f"{component.name} {split}")
    training, training_indices = None, []
    if train_split is not None:
        training = build_dataset(component.name, train_split, **component.options)
        training_indices = _space_evenly(len(training), max_training_images)
        if len(training_indices) < MIN_TRAINING_IMAGES:
            raise InputError(
                f"{component.name} {train_split} has {format_count(len(training), 'image')}; the OOD score requires at "
                f"least {MIN_TRAINING_IMAGES}; add images, or pass --no-ood"
            )
    loaded = load_uncalibrated(folder, device, trust_remote_code=trust_remote_code, allow_external=allow_external)
    engine = Engine(loaded)
    results = [
        result
        for prompt_type in prompt_types
        for result in _measure_calibrations(engine, held_out, prompt_type, max_images, batch_size, seed, progress)
    ]
    if not results:
        raise InputError(
            f"the captions of {component.name} {split} cannot be judged; calibration requires class names, or the "
            f"attributes {', '.join(ATTRIBUTES)}"
        )
    tensors = read_weights(folder)
    weights_hash = hash_as_float32(tensors)
    results = [_check_storable(each, weights_hash) for each in results]
    calibrations, domain = _read_stored_uncertainty(folder, tensors, loaded.encoder.channels)
    for each in results:
        calibrations.pop((each.task, each.prompt_kind), None)
        if not each.reason:
            calibrations[each.task, each.prompt_kind] = each.calibration
    domain_result = None
    if training is not None:
        held_out_indices = list(range(len(held_out)))[:max_images]
        pooling = _FeaturePooling(engine, batch_size, seed, progress)
        training_features = torch.cat(pooling.pool_views(training, training_indices))
        fit_images, fit_crops = pooling.pool_views(held_out, held_out_indices[::2])
        domain = fit_domain(training_features, torch.cat((fit_images, fit_crops)), DOMAIN_QUANTILE)
        measured_images, _ = pooling.pool_views(held_out, held_out_indices[1::2])
        num_flagged = sum(score > 1 for score in domain.compute_ood_scores(measured_images))
        reason = _explain_unstorable(Uncertainty(calibrations, domain, weights_hash))
        flagged_fraction = num_flagged / max(len(measured_images), 1)
        domain_result = DomainResult(len(training_indices), len(measured_images), flagged_fraction, reason)
        domain = None if reason else domain
    uncertainty = Uncertainty(calibrations, domain, weights_hash)
    write_uncertainty(uncertainty, folder)
    return CalibrationReport(str(model), f"{component.name} {split}", results, domain_result, uncertainty)


def _check_storable(result: CalibrationResult, weights_hash: str) -> CalibrationResult:
    """Return a result, with a reason if its calibration cannot be stored."""
    if result.reason:
        return result
    calibrations = {(result.task, result.prompt_kind): result.calibration}
    problem = _explain_unstorable(Uncertainty(calibrations, None, weights_hash))
    return replace(result, reason=f"no: {problem}") if problem else result


def _explain_unstorable(uncertainty: Uncertainty) -> str:
    """Return why an uncertainty cannot be stored; "" if it can."""
    try:
        serialize_uncertainty(uncertainty)
    except InputError as error:
        return str(error).partition("; ")[0]  # without the fix
    return ""


def _measure_calibrations(
    engine: Engine,
    dataset: Dataset,
    prompt_type: str,
    max_images: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[CalibrationResult]:
    """Fit and measure the calibration of each task for one prompt type.

    Args:
        engine: Engine of the model.
        dataset: Dataset that the model was not trained on.
        prompt_type: Prompt type.
        max_images: Maximum number of images.
        batch_size: Images per batch.
        seed: Random seed of point prompts.
        progress: Called with the current step, the number of images done and the total.

    Returns:
        One result per task whose captions can be judged.

    Raises:
        InputError: There are too few regions.
    """
    records: list[Record] = []
    prompting = PromptingOptions(prompt_type=prompt_type, seed=seed)
    report = None if progress is None else (lambda done, total: progress(prompt_type, done, total))
    for batch in predict_dataset(engine, _JudgedDataset(dataset), prompting, batch_size, max_images, progress=report):
        records += batch.records
    results = []
    for task in TASKS:
        judged = [(record, correct) for record in records if (correct := is_correct_caption(record, task)) is not None]
        if judged:
            results.append(_measure_task(task, prompt_type, judged))
    return results


def compute_ece(confidences: np.ndarray, correct: np.ndarray) -> tuple[float, list[ReliabilityBin]]:
    """Compute the expected calibration error (arXiv 1706.04599) in bins of equal mass.

    Args:
        confidences: (N,) confidences.
        correct: (N,) whether each caption is correct.

    Returns:
        The error and the bins, lowest confidence first.
    """
    order = np.argsort(confidences, kind="stable")
    bins = [
        ReliabilityBin(len(rows), float(confidences[rows].mean()), float(correct[rows].mean()))
        for rows in np.array_split(order, NUM_BINS)
        if len(rows)
    ]
    return sum(each.num_regions * abs(each.confidence - each.accuracy) for each in bins) / len(order), bins


def _compute_ece_interval(
    confidences: np.ndarray, correct: np.ndarray, images: np.ndarray
) -> tuple[float, float] | None:
    """Compute the 95% interval of the expected calibration error by a bootstrap over images, with fixed bins.

    Args:
        confidences: (N,) confidences.
        correct: (N,) whether each caption is correct.
        images: (N,) image of each caption.

    Returns:
        The interval; None for few images.
    """
    if not has_enough_images(images):
        return None
    bin_indices = np.empty(len(confidences), dtype=int)
    for index, rows in enumerate(np.array_split(np.argsort(confidences, kind="stable"), NUM_BINS)):
        bin_indices[rows] = index
    gaps = np.zeros((len(confidences), NUM_BINS + 1))
    gaps[np.arange(len(confidences)), bin_indices] = confidences - correct
    gaps[:, NUM_BINS] = 1  # counts the captions

    def compute_scores(sums: np.ndarray) -> np.ndarray:
        return np.abs(sums[..., :NUM_BINS]).sum(-1) / sums[..., NUM_BINS]

    return compute_interval(bootstrap_scores(ScoreStatistics(gaps, compute_scores), images))


def _check_prompt_kinds(prompt_types: Sequence[str]) -> None:
    """Raise ValueError if two prompt types have the same kind, under which their calibrations are stored."""
    types_by_kind: dict[str, str] = {}
    for prompt_type in prompt_types:
        kind = _get_prompt_kind(prompt_type)
        if types_by_kind.setdefault(kind, prompt_type) != prompt_type:
            raise ValueError(
                f"{types_by_kind[kind]} and {prompt_type} are both calibrated as {kind!r} prompts; pass one of them"
            )


def _read_stored_uncertainty(
    folder: Path, tensors: Mapping[str, Tensor], num_channels: int
) -> tuple[dict[tuple[str, str], Calibration], Domain | None]:
    """Return the calibrations and the domain in a folder; none if they are damaged or belong to other weights."""
    try:
        stored = read_uncertainty(folder, tensors, num_channels)
    except InputError:
        stored = None
    return ({}, None) if stored is None else (dict(stored.calibrations), stored.domain)


def _find_checkpoint_folder(model: str | Path) -> Path:
    folder = resolve_local_path(model)
    if folder is None or not folder.is_dir():
        raise InputError(
            f"{str(model)!r} is not a checkpoint folder; calibration writes to it, so pass a path such as ./model"
        )
    read_spec(folder)
    return folder


class _FeaturePooling:
    """Computes the pooled features of images and of one random crop each.

    Crops make the training domain as wide as that of a model that is trained with crops, and used on them.

    Args:
        engine: Engine of the model.
        batch_size: Images per batch.
        seed: Random seed of the crops.
        progress: Called with the current step, the number of images done and the total.
    """

    def __init__(self, engine: Engine, batch_size: int, seed: int, progress: Progress | None):
        self.engine = engine
        self.batch_size = batch_size
        self.seed = seed
        self.progress = progress

    def pool_views(self, dataset: Dataset, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the (N, F) pooled features of the images at N indices, and those of their crops."""
        image_features, crop_features = [], []
        for start in range(0, len(indices), self.batch_size):
            batch = indices[start : start + self.batch_size]
            images = [dataset[index].image for index in batch]
            image_features.append(self.pool_images(images))
            crop_features.append(
                self.pool_images([self._crop_randomly(*each) for each in zip(images, batch, strict=True)])
            )
            if self.progress:
                self.progress("images", start + len(batch), len(indices))
        return torch.cat(image_features), torch.cat(crop_features)

    def pool_images(self, images: Sequence[Image.Image]) -> Tensor:  # (B, F)
        """Return the (B, F) pooled features of images."""
        return self.engine.pool_features(self.engine.encode(images)).cpu()

    def _crop_randomly(self, image: Image.Image, index: int) -> Image.Image:
        """Return a random crop with the aspect ratio of the image."""
        rng = np.random.default_rng([self.seed, index])
        fraction = rng.uniform(MIN_CROP_FRACTION, 1)
        width, height = max(1, int(image.width * fraction)), max(1, int(image.height * fraction))
        x, y = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
        return image.crop((x, y, x + width, y + height))


def _space_evenly(length: int, max_count: int) -> list[int]:
    """Return at most `max_count` indices, evenly spaced."""
    return sorted({math.floor(index) for index in np.linspace(0, length, min(length, max_count), endpoint=False)})


class _JudgedDataset:
    """Dataset whose regions without phrases have their class name as a phrase, so that they are captioned."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        regions = [
            replace(each, phrases=(each.name,)) if each.name and not each.phrases else each for each in sample.regions
        ]
        return sample._replace(regions=tuple(regions))


def _get_prompt_kind(prompt_type: str) -> str:
    """Return the kind of prompt, see `sca.uncertainty.get_prompt_kind`, of a prompt type."""
    return "point" if prompt_type in POINT_PROMPT_TYPES else prompt_type


def is_correct_caption(record: Record, task: str) -> bool | None:
    """Return whether a caption is correct; None for another task, or if the ground truth does not determine it.

    If the truth has all attributes of `sca.data.scenes`, a caption is correct if it states all of them correctly, else
    if it contains the class name. A class name is correct if it is equal, ignoring case and spacing.

    Args:
        record: Prediction record.
        task: Task to judge.

    Returns:
        Whether the caption is correct, or None.
    """
    if record["task"] != task:
        return None
    truth = record["truth"]
    if task == "caption" and all(attribute in truth["attributes"] for attribute in ATTRIBUTES):
        statement = parse_statement(record["caption"]) or Statement()
        return all(getattr(statement, attribute) == truth["attributes"][attribute] for attribute in ATTRIBUTES)
    if not truth["name"]:
        return None
    name, caption = normalize_text(truth["name"]), normalize_text(record["caption"])
    return f" {name} " in f" {caption} " if task == "caption" else name == caption


def _measure_task(task: str, prompt_type: str, judged: Sequence[tuple[Record, bool]]) -> CalibrationResult:
    """Fit a calibration on every other image, and measure it on the rest."""
    scores = np.array([record["score"] for record, _ in judged], dtype=float)
    correct = np.array([each for _, each in judged])
    _, images = np.unique([record["index"] for record, _ in judged], return_inverse=True)
    is_fit = images % 2 == 0
    for name, count in (("fit", is_fit.sum()), ("measure", (~is_fit).sum())):
        if count < MIN_REGIONS:
            raise InputError(
                f"{format_count(int(count), 'region')} to {name} the calibration of {task} with {prompt_type} prompts; "
                f"at least {MIN_REGIONS} are required; use more images"
            )
    calibration = fit_calibration(torch.from_numpy(scores[is_fit]), torch.from_numpy(correct[is_fit]))
    measured_scores, measured_correct = scores[~is_fit], correct[~is_fit].astype(float)
    confidences = np.array([calibration.compute_confidence(score) for score in measured_scores])
    ece, bins = compute_ece(confidences, measured_correct)
    return CalibrationResult(
        task,
        prompt_type,
        _get_prompt_kind(prompt_type),
        calibration,
        len(measured_scores),
        float(measured_correct.mean()),
        compute_ece(measured_scores, measured_correct)[0],
        ece,
        _compute_ece_interval(confidences, measured_correct, images[~is_fit]),
        bins,
        _explain_rejection(calibration, ece),
    )


def _explain_rejection(calibration: Calibration, ece: float) -> str:
    if calibration.slope <= 0:
        return "no: higher scores are not more often correct"
    return f"no: ECE above {format_score(MAX_ECE)}" if ece > MAX_ECE else ""
