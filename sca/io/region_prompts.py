"""Prompts of a file by image, and the image files that they are for."""

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
from sca.io.annotations.annotation import Size, SkipCounter
from sca.io.coordinates import Box, compare_sizes, scale_box
from sca.io.errors import InputError
from sca.io.image_names import find_image, possible_file_names
from sca.io.images import show
from sca.io.notices import notice_once
from sca.io.prompts import Point, check_and_count, quote, read_mask


@dataclass(frozen=True)
class Entry:
    """One region of a prompts file as small as it was written: masks are decoded when they are asked for."""

    where: str  # the file and the record, for messages
    box: Box | None = None
    points: tuple[Point, ...] = ()
    mask: dict[str, Any] | Path | None = None
    size: Size | None = None  # of the image, where the file records it

    def prompt(self) -> Prompt:
        try:
            mask = read_mask(self.mask) if isinstance(self.mask, Path) else None
        except InputError as error:
            raise InputError(f"{self.where}, 'mask': {error}") from error
        return Prompt(self.box, self.points, masks.decode(self.mask) if isinstance(self.mask, dict) else mask)

    def fitting(self, width: int, height: int, clipped: SkipCounter) -> Prompt:
        """The prompt for an image of this size, see `check`; it is scaled if the file records another size.

        Counts a box that `check` clips. Raises InputError, which names the record.
        """
        prompt = self.prompt()
        try:
            if self.size and self.size != (width, height):
                prompt = _scale(prompt, self.size, (width, height))
                notice_once(
                    "scaled prompts",
                    f"{self.where}: the file records an image of {self.size[0]} x {self.size[1]}, and its regions are "
                    f"scaled to {width} x {height}",
                )
            return check_and_count(prompt, width, height, clipped, self.where)
        except ValueError as error:
            raise InputError(f"{self.where}: {error}") from error


def _scale(prompt: Prompt, recorded: Size, actual: Size) -> Prompt:
    """Turn a prompt for an image of the recorded size into one for the same image in its actual size.

    Raises ValueError if the aspect ratios differ.
    """
    across, down = compare_sizes(recorded, actual)
    box = prompt.box and scale_box(prompt.box, (across, down))
    points = tuple(
        (_scale_inside(x, across, recorded[0], actual[0]), _scale_inside(y, down, recorded[1], actual[1]), label)
        for x, y, label in prompt.points
    )
    mask = prompt.mask
    if mask is not None and mask.shape == recorded[::-1]:
        mask = masks.resize(mask, *actual)
    return Prompt(box, points, mask)


def _scale_inside(value: float, factor: float, recorded: int, actual: int) -> float:
    """Scale a coordinate; one inside the recorded side stays inside the actual one, however it is rounded."""
    scaled = value * factor
    return min(scaled, math.nextafter(actual, 0)) if value < recorded else scaled


class RegionPrompts(Mapping[str, list[Prompt]]):
    """The prompts of a file, by image key: what the file calls the image. Keys keep the file's order.

    skip: the count of what the file contains and a prompt cannot be.
    clipped: the count of boxes that `fitting` clipped to their image.
    problems: a line for each record of which no prompt could be made; it names file, record and field.
    """

    def __init__(self, path: Path, entries: Mapping[str, list[Entry]], skip: SkipCounter, problems: Sequence[str] = ()):
        self.path, self.skip, self.clipped = path, skip, SkipCounter()
        self._entries = entries
        self.problems = tuple(problems)

    def __getitem__(self, key: str) -> list[Prompt]:
        return [entry.prompt() for entry in self._entries[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def fitting(self, key: str, width: int, height: int) -> tuple[list[Prompt], list[str]]:
        """The prompts of an image that fit it, each checked by itself.

        Args:
            key: What the file calls the image.
            width: Of the image in pixels.
            height: Of the image in pixels.

        Returns:
            The prompts that fit, and a line for each that does not, which names its record.
        """
        prompts, problems = [], []
        for entry in self._entries[key]:
            try:
                prompts.append(entry.fitting(width, height, self.clipped))
            except InputError as error:
                problems.append(str(error))
        return prompts, problems

    def count(self, key: str) -> int:
        """How many regions an image has."""
        return len(self._entries[key])

    def match(self, images: Sequence[str | Path]) -> dict[Path, str]:
        """The key of each image that has one.

        A key is a path, relative to the prompts file's folder or else to the working folder, in any spelling that
        `find_image` reads; a key that is the path of no image given counts by its file name. `InputError` if an image
        could mean several keys, or a file name several images or keys.
        """
        paths = [Path(image) for image in images]
        found = {image: key for image in paths if (key := self._key_of_path(image)) is not None}
        taken = set(found.values())
        by_name: dict[str, list[str]] = {}
        for key, names in self._file_names.items():
            for name in names if key not in taken else ():
                by_name.setdefault(name, []).append(key)
        rest = {image: unicodedata.normalize("NFC", image.name) for image in paths if image not in found}
        sharing = Counter(rest.values())
        for image, name in rest.items():
            named = by_name.get(name, [])
            if named and (len(named) > 1 or sharing[name] > 1):
                raise self._ambiguous(f"the file name {quote(image.name)}", named, sharing[name])
            if named:
                found[image] = named[0]
        return {image: found[image] for image in paths if image in found}

    def _key_of_path(self, image: Path) -> str | None:
        """The key that is the path of an image: as written, else in another spelling or by a link."""
        key = self._paths.get(os.path.abspath(image)) if ".." not in image.parts else None
        if key is not None:
            return key
        keys = self._files.get(os.path.realpath(image), [])
        if len(keys) > 1:
            raise self._ambiguous(f"the image {show(image)}", keys)
        return keys[0] if keys else None

    def _ambiguous(self, what: str, keys: Sequence[str], images: int = 1) -> InputError:
        several = f"the keys {', '.join(map(quote, keys))}" if len(keys) > 1 else f"{images} images"
        return InputError(
            f"{show(self.path)}: {what} could mean {several}; write image paths relative to the prompts file"
        )

    @cached_property
    def _paths(self) -> dict[str, str]:
        """Absolute path -> key; one relative to the prompts file counts before one relative to the working folder."""
        keys = [key for key in self if ".." not in Path(key).parts]
        return {os.path.abspath(root / key): key for root in (Path(), find_root(self.path)) for key in keys}

    @cached_property
    def _files(self) -> dict[str, list[str]]:
        """The real path of an existing image -> its keys."""
        files: dict[str, list[str]] = {}
        root = find_root(self.path)
        for key in self:
            with suppress(InputError):  # a URL, or several files: only the file name counts
                files.setdefault(os.path.realpath(find_image(key, [root, Path()])), []).append(key)
        return files

    @cached_property
    def _file_names(self) -> dict[str, set[str]]:
        return {key: possible_file_names(key) for key in self}


def find_root(path: Path) -> Path:
    """Return the folder that the image names of a prompts file or folder are relative to."""
    return path if path.is_dir() else path.parent
