"""Disk cache of the features of a frozen encoder, for later epochs and for other mixers and language models.

Usable without image augmentation, as in SCA's weak supervision (arXiv 2312.00869). SAM's features take 2 MiB per image.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from sca_registry import RegistryError
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Trainer

from sca.inference.processor import Processor
from sca.io.atomic import remove_drafts, translate_output_errors, write_file
from sca.io.cache import get_cache_folder
from sca.io.paths import expand_user
from sca.io.text import format_bytes
from sca.io.weight_files import hash_tensors
from sca.model import SegmentCaptioner
from sca.training.examples import ExampleMixture
from sca.training.recipe import FEATURE_CACHE_MODES, Recipe

MIN_USES_OF_CACHED_IMAGE = 2  # on average, of an automatic cache
MAX_FRACTION_OF_FREE_SPACE = 0.25  # that an automatic cache may take


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
            return torch.from_numpy(_map_features(self.get_path(image)).astype(np.float32))
        except FileNotFoundError as error:
            raise KeyError(f"no cached features of an image of size {image.size} in {self.folder}") from error

    def count_missing(self, images: Iterable[Image.Image]) -> int:
        """Count the images whose features are not in the cache.

        Args:
            images: Images.

        Returns:
            Their number.
        """
        return sum(not _has_features(self.get_path(image)) for image in images)

    @torch.no_grad()
    def encode_missing(
        self, model: SegmentCaptioner, images: Iterable[Image.Image], progress: Callable[[], None], batch_size: int = 4
    ) -> None:
        """Encode the images that are missing in the cache, or whose files are damaged.

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
            if not _has_features(path):
                pending[path] = image
            if len(pending) == batch_size:
                encode_pending()
            progress()
        if pending:
            encode_pending()


def check_cacheable(recipe: Recipe, model: SegmentCaptioner) -> None:
    """Check that the features of images stay the same during training, if the recipe names a folder to cache them in.

    Args:
        recipe: Recipe of the training run.
        model: Model to train.

    Raises:
        RegistryError: The encoder is trainable, or a data source has augmentation.
    """
    obstacle = _find_cache_obstacle(recipe, model)
    if obstacle and recipe.train.feature_cache_dir not in FEATURE_CACHE_MODES:
        raise RegistryError(f"train.feature_cache_dir requires {obstacle}")


def _find_cache_obstacle(recipe: Recipe, model: SegmentCaptioner) -> str:
    """Return what a feature cache requires, and how to get it; "" if nothing is missing."""
    if any(parameter.requires_grad for parameter in model.get_submodule("encoder").parameters()):
        return "a frozen encoder; remove it, or remove 'encoder' from trainable"
    for name, source in recipe.data.items():
        if source.augment is not None:
            return f"images without augmentation; remove it, or data.{name}.augment"
    return ""


def open_feature_cache(
    recipe: Recipe, model: SegmentCaptioner, mixture: ExampleMixture, trainer: Trainer, report: Callable[[str], None]
) -> FeatureCache | None:
    """Open the feature cache of a recipe; of `feature_cache_dir = "auto"`, only if it saves time and disk space allows.

    All processes must call it, and get the same answer.

    Args:
        recipe: Recipe of the training run.
        model: Model with the encoder.
        mixture: Examples to train on.
        trainer: Trainer, for the processes.
        report: Called in the first process with the size and the folder of an automatic cache.

    Returns:
        The cache, or None.
    """
    mode = recipe.train.feature_cache_dir
    if mode not in FEATURE_CACHE_MODES:
        return FeatureCache(mode, model)
    world_size = trainer.args.world_size
    has_one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) == world_size
    if mode == "none" or not has_one_machine or _find_cache_obstacle(recipe, model):
        return None
    samples = mixture.list_samples()
    if len(mixture) < MIN_USES_OF_CACHED_IMAGE * len(samples):
        return None
    folder = get_cache_folder() / "features"
    cache = FeatureCache(folder, model)
    dataset, index = samples[0]
    bytes_per_image = _count_feature_bytes(model, dataset[index].image)
    max_images = int(_count_free_bytes(folder) * MAX_FRACTION_OF_FREE_SPACE) // bytes_per_image
    num_missing = len(samples)
    if num_missing > max_images and cache.folder.is_dir():  # an earlier run may have cached them
        num_missing = cache.count_missing(dataset[index].image for dataset, index in samples)
    decisions = [num_missing <= max_images]
    broadcast_object_list(decisions)  # disk space may change between the calls of two processes
    if not decisions[0]:
        return None
    if trainer.is_world_process_zero():
        size = format_bytes(len(samples) * bytes_per_image)
        report(
            f"caching the features of {len(samples):,} images ({size}) in {folder}; "
            "set train.feature_cache_dir=none to disable this"
        )
    return cache


def use_feature_cache(
    recipe: Recipe,
    model: SegmentCaptioner,
    mixture: ExampleMixture,
    trainer: Trainer,
    report: Callable[[str], None],
    quiet: bool,
) -> None:
    """Encode all training images that are missing in the feature cache of a recipe, and train on the cached features.

    The images are split over the processes. If an automatic cache cannot be filled, the images of every step are
    encoded.

    Args:
        recipe: Recipe of the training run.
        model: Model with the encoder.
        mixture: Examples to train on; they contain cached features from now on.
        trainer: Trainer, for the processes.
        report: Called in the first process with lines about an automatic cache.
        quiet: Show no progress bar.
    """
    cache = open_feature_cache(recipe, model, mixture, trainer, report)
    if cache is None:
        return
    problem = ""
    try:
        _fill_feature_cache(cache, model, mixture, trainer, quiet)
    except (OSError, ValueError) as error:  # no space, no permission, or features that float16 cannot represent
        if recipe.train.feature_cache_dir not in FEATURE_CACHE_MODES:
            raise
        problem = str(error)
    problems = [each for each in gather_object([problem]) if each]  # waits for the other processes
    if not problems:
        for stream in mixture.streams:
            stream.cache = cache
    elif trainer.is_world_process_zero():
        report(f"not caching features, because they cannot be stored: {problems[0]}")


def _fill_feature_cache(
    cache: FeatureCache, model: SegmentCaptioner, mixture: ExampleMixture, trainer: Trainer, quiet: bool
) -> None:
    """Encode the images of this process that are missing in the feature cache."""
    samples = mixture.list_samples()
    process_samples = samples[trainer.args.process_index :: trainer.args.world_size]
    bar = tqdm(
        total=len(process_samples), desc="features", disable=quiet or not trainer.is_world_process_zero() or None
    )
    with bar:
        cache.encode_missing(model, (dataset[index].image for dataset, index in process_samples), bar.update)


def _count_feature_bytes(model: SegmentCaptioner, image: Image.Image) -> int:
    """Return the bytes of the cached features of an image."""
    pixels = Processor.from_encoder(model.encoder).preprocess_images([image])
    with torch.no_grad():
        return 2 * model.encode(pixels.to(model.task_tokens.device)).numel()


def _count_free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk of a folder that may not exist yet; 0 if it cannot be read."""
    try:
        return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
    except OSError:
        return 0


def _map_features(path: Path) -> np.ndarray:
    """Map a file of features into memory. Raises ValueError for a damaged file."""
    try:
        features: np.ndarray = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete the file to recompute the features") from error
    return features


def _has_features(path: Path) -> bool:
    """Return whether a file of features exists and is complete."""
    try:
        return _map_features(path).size > 0
    except (OSError, ValueError):
        return False


def _write_features(path: Path, features: Tensor) -> None:
    array = features.half().cpu()
    if not array.isfinite().all():
        raise ValueError("the features exceed the range of float16; set train.feature_cache_dir=none")
    content = io.BytesIO()
    np.save(content, array.numpy())
    with translate_output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content.getbuffer())
