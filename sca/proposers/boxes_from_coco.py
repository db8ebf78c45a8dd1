"""Proposals from a file: detection results or annotations in COCO format."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image
from sca_registry.contracts import Proposals

from sca.io.errors import InputError
from sca.io.paths import expand_user
from sca.io.prompt_files import read_region_prompts


class BoxesFromCoco:
    """Proposer of the boxes and masks that a file contains for an image.

    Images are matched by path. Regions that do not fit their image, and entries that cannot be prompts, are skipped
    with a warning. Boxes clipped to the image are counted in one warning per image.

    Args:
        annotations: Path of a COCO file, or of another format that `sca.io.prompt_files` reads, such as JSON Lines.

    Raises:
        InputError: The file cannot be read. Calls raise it for an image that the file does not contain or of which no
            region fits, and for a file name that already matched another image.
    """

    def __init__(self, annotations: str):
        self.prompt_file = read_region_prompts(expand_user(annotations))
        for problem in self.prompt_file.problems:
            warnings.warn(problem, stacklevel=2)
        if summary := self.prompt_file.skip_counter.summarize():
            warnings.warn(f"{self.prompt_file.path}: {summary}", stacklevel=2)
        self.path_by_key: dict[str, Path] = {}  # image that each file name matched

    def __call__(self, image: Image.Image, image_id: int | str) -> Proposals:
        """Return the prompts of an image; `image_id` is its path. All scores are 1."""
        path = Path(str(image_id))
        keys = self.prompt_file.match_images([path])
        if path not in keys:
            raise InputError(f"{self.prompt_file.path} has no regions for {image_id}")
        if self.path_by_key.setdefault(keys[path], path) != path:
            raise InputError(
                f"{self.prompt_file.path}: {keys[path]} matches {self.path_by_key[keys[path]]} and {path}; write "
                "image paths relative to the prompts file"
            )
        clipped_before = self.prompt_file.clip_counter.counts.total()
        prompts, problems = self.prompt_file.fit_prompts(keys[path], *image.size)
        if num_clipped := self.prompt_file.clip_counter.counts.total() - clipped_before:
            warnings.warn(
                f"{self.prompt_file.path}: {num_clipped} of the boxes for {image_id} are clipped to it", stacklevel=2
            )
        if problems and not prompts:
            raise InputError(problems[0])
        for problem in problems:
            warnings.warn(problem, stacklevel=2)
        return Proposals(tuple(prompts), (1.0,) * len(prompts), (None,) * len(prompts))
