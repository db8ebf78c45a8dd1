"""Boxes that somebody else has found: a detector's results or annotations, in COCO's format."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from sca_registry.contracts import Proposals

from sca.io.paths import expand_user
from sca.prompts import PromptError, check, read_prompts


class BoxesFromCoco:
    """The boxes and masks that a COCO file (or JSON lines, see `sca.prompts`) has for an image, found by its path.

    Raises PromptError for a file that cannot be read, an image that it does not have, a file name that has stood for
    another image, and a box outside the image.
    """

    def __init__(self, annotations: str):
        self.file = read_prompts(expand_user(annotations))
        self.images: dict[str, Path] = {}  # whose each key has been

    def __call__(self, image: Image.Image, image_id: int | str) -> Proposals:
        path = Path(str(image_id))
        keys = self.file.match([path])
        if path not in keys:
            raise PromptError(f"{self.file.path} has no regions for {image_id}")
        if self.images.setdefault(keys[path], path) != path:
            raise PromptError(
                f"{self.file.path}: {keys[path]} could mean {self.images[keys[path]]} or {path}; write image paths "
                "relative to the prompts file"
            )
        prompts = tuple(check(prompt, *image.size) for prompt in self.file[keys[path]])
        return Proposals(prompts, (1.0,) * len(prompts), (None,) * len(prompts))
