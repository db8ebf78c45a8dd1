"""References of parity checks: models of other libraries with random weights."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sca_registry.contracts import PromptBatch
from sca_registry.errors import make_unknown_name_error
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sca.io.errors import InputError
from sca.testing.parity.comparison import Outputs

EXTRAS = {"timm": "timm", "open_clip": "clip"}  # by library


class Reference(ABC):
    """Model of another library with random weights.

    Attributes:
        model: Torch module, in float64 and eval mode after `save_random_weights`.
    """

    model: Any

    @abstractmethod
    def save_weights(self, folder: Path) -> None:
        """Write the configuration and the weights in the format of the library."""

    def save_random_weights(self, folder: Path) -> None:
        """Initialize the weights, save them and convert the model to float64.

        Args:
            folder: Folder for the weights.
        """
        randomize_weights(self.model)
        self.save_weights(folder)
        self.model.double().eval()


class ImageReference(Reference):
    """Reference with images as inputs."""

    def preprocess_image(self, image: Image.Image, image_size: int, content_size: tuple[int, int]) -> Tensor | None:
        """Preprocess an image with the library's own image processor.

        Args:
            image: RGB image.
            image_size: Side S of the model input in pixels.
            content_size: Width and height of the resized image in the model input.

        Returns:
            (3, height, width) at `content_size`, or (3, S, S) with padding; None if the library has no image processor
            for the model.
        """
        return None


class EncoderReference(ImageReference):
    """Reference for encoders."""

    @abstractmethod
    def compute_features(self, pixel_values: Tensor) -> Tensor:
        """Encode images: (B, 3, S, S) -> (B, C, h, w)."""


class SegmenterReference(ImageReference):
    """Reference for segmenters, including the image encoder."""

    @abstractmethod
    def predict(self, pixel_values: Tensor, prompts: PromptBatch, multimask_output: bool) -> Outputs:
        """Return `masks` (N, M, 4h, 4w) and `iou_scores` (N, M) of N regions.

        Args:
            pixel_values: (B, 3, S, S) images.
            prompts: N prompts.
            multimask_output: Return all candidate masks instead of one.

        Returns:
            Outputs by name.
        """


class LanguageModelReference(Reference):
    """Reference for language models."""

    @abstractmethod
    def compute_logits(
        self, attention_mask: Tensor, input_ids: Tensor | None = None, embeddings: Tensor | None = None
    ) -> Tensor:
        """Return logits (N, L, V) of token ids or of embeddings.

        Args:
            attention_mask: (N, L).
            input_ids: (N, L).
            embeddings: (N, L, E).

        Returns:
            The logits.
        """

    @abstractmethod
    def generate(self, prefix: Tensor, max_new_tokens: int, num_beams: int) -> Tensor:
        """Return the ids (N, R, L) of R = `num_beams` captions per prefix, best first, without the prefix.

        Args:
            prefix: (N, K, E).
            max_new_tokens: Maximum tokens per caption.
            num_beams: Beams; 1 for greedy search.

        Returns:
            Token ids.
        """


def parse_reference_name(against: str, libraries: tuple[str, ...]) -> tuple[str, str]:
    """Parse the name of a reference.

    Args:
        against: "LIBRARY:MODEL".
        libraries: Supported libraries.

    Returns:
        Library and model.

    Raises:
        InputError: The name has another form, or the library is not installed.
        RegistryError: The library is not supported.
    """
    library, _, model = against.partition(":")
    if not model:
        raise InputError(f"the reference is {against!r}; write LIBRARY:MODEL, such as transformers:SamModel")
    if library not in libraries:
        raise make_unknown_name_error(f"unknown library {library!r} for components of this kind", library, libraries)
    if importlib.util.find_spec(library) is None:
        raise InputError(f"{library} is not installed; pip install 'segment-caption-anything[{EXTRAS[library]}]'")
    return library, model


@torch.no_grad()
def randomize_weights(model: nn.Module) -> None:
    """Initialize all parameters randomly, so that each affects the outputs and none equals another.

    Libraries initialize many parameters with zeros, ones or tiny values, for which mistakes have no effect.

    Args:
        model: Model; tied parameters stay tied.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn_like(parameter)
            if parameter.dim() < 2:  # norms, biases and layer scales
                parameter.add_(0.2 * noise)
            elif name == "weight" and not isinstance(module, nn.Embedding):
                parameter.copy_(noise * (len(parameter) / parameter.numel()) ** 0.5)
            else:  # embeddings and tokens
                parameter.copy_(0.5 * noise)
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)


def reshape_tokens(tokens: Tensor, grid_size: int) -> Tensor:
    """Reshape the last tokens of (B, N, C), which are those of patches, to a grid (B, C, grid_size, grid_size)."""
    return tokens[:, -(grid_size**2) :].mT.unflatten(2, (grid_size, grid_size))
