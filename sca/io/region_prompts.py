"""Prompts of a file, grouped by image, and the image files that they belong to."""

from __future__ import annotations

import math
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sca_registry.contracts import Prompt

from sca.io import masks
from sca.io.annotations.annotation import ImageSize, SkipCounter
from sca.io.coordinates import Box, compute_resize_factors, scale_box
from sca.io.errors import InputError
from sca.io.image_names import list_possible_file_names, resolve_image_path
from sca.io.images import format_path
from sca.io.prompts import Point, check_and_count_clipping, quote_value, read_mask_file
from sca.io.warnings_once import warn_once


@dataclass(frozen=True)
class RegionPromptEntry:
    """One region of a prompts file in compact form: masks are decoded on demand."""

    location: str  # file and record, for messages
    box: Box | None = None
    points: tuple[Point, ...] = ()
    mask: dict[str, Any] | Path | None = None
    recorded_size: ImageSize | None = None  # of the image, if the file records it

    def build_prompt(self) -> Prompt:
        """Build the prompt in pixels of the recorded image size; decode or read its mask.

        Returns:
            The prompt.

        Raises:
            InputError: The mask file cannot be read; the message names the record.
        """
        try:
            mask = read_mask_file(self.mask) if isinstance(self.mask, Path) else None
        except InputError as error:
            raise InputError(f"{self.location}, 'mask': {error}") from error
        return Prompt(self.box, self.points, masks.decode_rle(self.mask) if isinstance(self.mask, dict) else mask)

    def fit_prompt(self, width: int, height: int, clip_counter: SkipCounter) -> Prompt:
        """Return the prompt for an image of this size, see `check_prompt`; scale it if the file records another size.

        Args:
            width: Width of the image in pixels.
            height: Height of the image in pixels.
            clip_counter: Counts the box if it is clipped.

        Returns:
            The prompt, in pixels of the image.

        Raises:
            InputError: The prompt does not fit; the message names the record.
        """
        prompt = self.build_prompt()
        try:
            if self.recorded_size and self.recorded_size != (width, height):
                prompt = _scale_prompt(prompt, self.recorded_size, (width, height))
                recorded_width, recorded_height = self.recorded_size
                warn_once(
                    "scaled prompts",
                    f"{self.location}: the file records an image of {recorded_width} x {recorded_height}, and its "
                    f"regions are scaled to {width} x {height}",
                )
            return check_and_count_clipping(prompt, width, height, clip_counter, self.location)
        except ValueError as error:
            raise InputError(f"{self.location}: {error}") from error


def _scale_prompt(prompt: Prompt, recorded: ImageSize, actual: ImageSize) -> Prompt:
    """Scale a prompt from the recorded to the actual image size; raise ValueError if the aspect ratios differ."""
    x_scale, y_scale = compute_resize_factors(recorded, actual)
    box = prompt.box and scale_box(prompt.box, (x_scale, y_scale))
    points = tuple(
        (
            _scale_coordinate(x, x_scale, recorded[0], actual[0]),
            _scale_coordinate(y, y_scale, recorded[1], actual[1]),
            label,
        )
        for x, y, label in prompt.points
    )
    mask = prompt.mask
    if mask is not None and mask.shape == recorded[::-1]:
        mask = masks.resize_mask(mask, *actual)
    return Prompt(box, points, mask)


def _scale_coordinate(value: float, factor: float, recorded: int, actual: int) -> float:
    """Scale a coordinate; a value inside the recorded side stays inside the actual one despite rounding."""
    scaled = value * factor
    return min(scaled, math.nextafter(actual, 0)) if value < recorded else scaled


class RegionPrompts(Mapping[str, list[Prompt]]):
    """Prompts of a file by image key, which is the image's name in the file. Keys keep the order of the file.

    Args:
        path: Prompts file.
        entries: Records by image key.
        skip_counter: Counts contents of the file that cannot be prompts.
        problems: One message per record without a usable prompt.

    Attributes:
        skip_counter: Counts contents of the file that cannot be prompts.
        clip_counter: Counts boxes that `fit_prompts` clipped to their image.
        problems: One message per record without a usable prompt, with its file, record and field.
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, list[RegionPromptEntry]],
        skip_counter: SkipCounter,
        problems: Sequence[str] = (),
    ):
        self.path: Path = path
        self.skip_counter: SkipCounter = skip_counter
        self.clip_counter: SkipCounter = SkipCounter()
        self._entries = entries
        self.problems: tuple[str, ...] = tuple(problems)

    def __getitem__(self, key: str) -> list[Prompt]:
        return [entry.build_prompt() for entry in self._entries[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def fit_prompts(self, key: str, width: int, height: int) -> tuple[list[Prompt], list[str]]:
        """Return the prompts that fit an image; each is checked separately.

        Args:
            key: Image key.
            width: Width of the image in pixels.
            height: Height of the image in pixels.

        Returns:
            The prompts that fit, and one message per prompt that does not, with its record.
        """
        prompts, problems = [], []
        for entry in self._entries[key]:
            try:
                prompts.append(entry.fit_prompt(width, height, self.clip_counter))
            except InputError as error:
                problems.append(str(error))
        return prompts, problems

    def count_regions(self, key: str) -> int:
        """Return the number of regions of an image."""
        return len(self._entries[key])

    def match_images(self, images: Sequence[str | Path]) -> dict[Path, str]:
        """Match image files with keys.

        A key is a path relative to the folder of the prompts file, else to the current directory, in any spelling that
        `resolve_image_path` reads. A key that is the path of none of the images is matched by its file name.

        Args:
            images: Image files.

        Returns:
            The key of each image that has one.

        Raises:
            InputError: An image matches several keys, or a file name matches several images or keys.
        """
        paths = [Path(image) for image in images]
        key_by_image = {image: key for image in paths if (key := self._find_key_by_path(image)) is not None}
        matched_keys = set(key_by_image.values())
        keys_by_file_name: dict[str, list[str]] = {}
        for key, names in self._file_names_by_key.items():
            for name in names if key not in matched_keys else ():
                keys_by_file_name.setdefault(name, []).append(key)
        unmatched_file_names = {
            image: unicodedata.normalize("NFC", image.name) for image in paths if image not in key_by_image
        }
        file_name_counts = Counter(unmatched_file_names.values())
        for image, name in unmatched_file_names.items():
            candidate_keys = keys_by_file_name.get(name, [])
            if candidate_keys and (len(candidate_keys) > 1 or file_name_counts[name] > 1):
                raise self._make_ambiguity_error(
                    f"the file name {quote_value(image.name)}", candidate_keys, file_name_counts[name]
                )
            if candidate_keys:
                key_by_image[image] = candidate_keys[0]
        return {image: key_by_image[image] for image in paths if image in key_by_image}

    def _find_key_by_path(self, image: Path) -> str | None:
        """Return the key that is the path of an image: as written, else in another spelling or through a link."""
        key = self._key_by_absolute_path.get(os.path.abspath(image)) if ".." not in image.parts else None
        if key is not None:
            return key
        keys = self._keys_by_file.get(os.path.realpath(image), [])
        if len(keys) > 1:
            raise self._make_ambiguity_error(f"the image {format_path(image)}", keys)
        return keys[0] if keys else None

    def _make_ambiguity_error(self, subject: str, keys: Sequence[str], num_images: int = 1) -> InputError:
        candidates = f"the keys {', '.join(map(quote_value, keys))}" if len(keys) > 1 else f"{num_images} images"
        hint = "write image paths relative to the prompts file"
        return InputError(f"{format_path(self.path)}: {subject} matches {candidates}; {hint}")

    @cached_property
    def _key_by_absolute_path(self) -> dict[str, str]:
        """Map absolute paths to keys; the folder of the prompts file takes precedence over the current directory."""
        keys = [key for key in self if ".." not in Path(key).parts]
        return {os.path.abspath(root / key): key for root in (Path(), get_image_root(self.path)) for key in keys}

    @cached_property
    def _keys_by_file(self) -> dict[str, list[str]]:
        """Map the real path of each existing image to its keys."""
        keys_by_real_path: dict[str, list[str]] = {}
        root = get_image_root(self.path)
        for key in self:
            with suppress(InputError):  # a URL, or several files: match by file name only
                keys_by_real_path.setdefault(os.path.realpath(resolve_image_path(key, [root, Path()])), []).append(key)
        return keys_by_real_path

    @cached_property
    def _file_names_by_key(self) -> dict[str, set[str]]:
        return {key: list_possible_file_names(key) for key in self}


def get_image_root(path: Path) -> Path:
    """Return the folder that the image names of a prompts file or folder are relative to."""
    return path if path.is_dir() else path.parent
