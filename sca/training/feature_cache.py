"""Disk cache of the features of a frozen encoder, for later epochs and for other mixers and language models.

Usable without image augmentation, as in SCA's weak supervision (arXiv 2312.00869). SAM's features take 2 MiB per image.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sca.inference.processor import Processor
from sca.io.atomic import remove_drafts, translate_output_errors, write_file
from sca.io.paths import expand_user
from sca.io.weight_files import hash_tensors
from sca.model import SegmentCaptioner


class FeatureCache:
    """Folder with one memory-mapped file of features per image, (C, h, w) in float16.

    Files are stored under a hash of the encoder's spec and weights and named by a hash of the image, so that models,
    datasets and processes can share one folder. Files are written atomically.

    Args:
        folder: Folder of the cache.
        model: Model with the encoder.
    """

    def __init__(self, folder: str | Path, model: SegmentCaptioner):
        encoder_identity = json.dumps(model.spec.to_dict()["encoder"], sort_keys=True) + hash_tensors(
            model.get_submodule("encoder").state_dict()
        )
        self.folder: Path = expand_user(folder) / hashlib.sha256(encoder_identity.encode()).hexdigest()[:24]

    def get_path(self, image: Image.Image) -> Path:
        """Return the path of an image's features, which may not exist yet."""
        digest = hashlib.sha256(f"{image.size}".encode())
        digest.update(np.ascontiguousarray(image.convert("RGB")).data)
        name = digest.hexdigest()[:40]
        return self.folder / name[:2] / f"{name}.npy"

    def __getitem__(self, image: Image.Image) -> Tensor:
        """Read the features of an image, (C, h, w) in float32.

        Args:
            image: RGB image, as `encode_missing` received it.

        Returns:
            (C, h, w) float32 features.

        Raises:
            KeyError: `encode_missing` did not encode the image.
            ValueError: The file is damaged.
        """
        try:
            return torch.from_numpy(np.load(self.get_path(image), mmap_mode="r").astype(np.float32))
        except FileNotFoundError as error:
            raise KeyError(f"no cached features of an image of size {image.size} in {self.folder}") from error
        except ValueError as error:
            raise ValueError(
                f"{self.get_path(image)} is damaged ({error}); delete the file to recompute the features"
            ) from error

    @torch.no_grad()
    def encode_missing(
        self, model: SegmentCaptioner, images: Iterable[Image.Image], progress: Callable[[], None], batch_size: int = 4
    ) -> None:
        """Encode the images that are missing in the cache.

        Args:
            model: Model with the encoder.
            images: Images, cached or not.
            progress: Called once per image.
            batch_size: Images per forward pass.

        Raises:
            ValueError: Features exceed the range of float16.
            OutputError: Features cannot be written.
        """
        processor, pending = Processor.from_encoder(model.encoder), dict[Path, Image.Image]()
        for folder in self.folder.glob("*"):
            remove_drafts(folder)

        def encode_pending() -> None:
            pixels = processor.preprocess_images(list(pending.values())).to(model.task_tokens.device)
            for path, features in zip(pending, model.encode(pixels), strict=True):
                _write_features(path, features)
            pending.clear()

        for image in images:
            path = self.get_path(image)
            if not path.exists():
                pending[path] = image
            if len(pending) == batch_size:
                encode_pending()
            progress()
        if pending:
            encode_pending()


def _write_features(path: Path, features: Tensor) -> None:
    array = features.half().cpu()
    if not array.isfinite().all():
        raise ValueError("the features exceed the range of float16; train without train.feature_cache_dir")
    content = io.BytesIO()
    np.save(content, array.numpy())
    with translate_output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content.getbuffer())
