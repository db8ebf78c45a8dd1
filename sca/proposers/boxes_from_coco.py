"""Boxes that somebody else has found: a detector's results or annotations, in COCO's format."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from sca_registry.contracts import Proposals

from sca.prompts import PromptError, check, read_prompts


class BoxesFromCoco:
    """The boxes and masks that a COCO file (or JSON lines, see `sca.prompts`) has for an image, found by its file name.

    Raises PromptError for a file that cannot be read, an image that it does not have, and a box outside the image.
    """

    def __init__(self, annotations: str):
        self.file = read_prompts(annotations)

    def __call__(self, image: Image.Image, image_id: int | str) -> Proposals:
        path = Path(str(image_id))
        keys = self.file.match([path])
        if path not in keys:
            raise PromptError(f"{self.file.path} has no regions for {image_id}")
        prompts = tuple(check(prompt, *image.size) for prompt in self.file[keys[path]])
        return Proposals(prompts, (1.0,) * len(prompts), (None,) * len(prompts))
