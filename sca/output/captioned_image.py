"""Captioned images read from files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from sca_registry.contracts import Caption

from sca.io.coordinates import compute_resize_factors
from sca.io.errors import InputError, RejectCallback, raise_error
from sca.io.image_names import ImageNameResolver, resolve_image_path
from sca.io.images import format_path, open_image
from sca.io.warnings_once import warn_once


class ImageSize(NamedTuple):
    """Size of an image that is not opened."""

    width: int
    height: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, as in `PIL.Image`."""
        return self.width, self.height


ImageOrSize = Image.Image | ImageSize


class CaptionedImage(NamedTuple):
    """Image of a captions file.

    Attributes:
        image: Name of the image in the file.
        size: Recorded size.
        captions: Captions in order.
        model: Name of the model, if recorded.
        embedded: Function that opens the image embedded in the file, for an image file that does not exist.
    """

    image: str
    size: ImageSize
    captions: list[Caption]
    model: str | None
    embedded: Callable[[], Image.Image] | None = None

    def open(self, roots: Sequence[Path]) -> Image.Image:
        """Open the image, resized to `size` if its file was resized after captioning.

        Args:
            roots: Folders that the name may start from.

        Returns:
            The upright RGB image.

        Raises:
            InputError: The image cannot be opened, or its aspect ratio differs from that of `size`.
        """
        path = resolve_image_path(self.image, roots)
        image = self.embedded() if self.embedded and not path.exists() else open_image(path)
        return resize_to_recorded(image, self.size, self.image)


def resize_to_recorded(image: Image.Image, size: ImageSize, name: str) -> Image.Image:
    """Resize an image to the size that its captions record.

    Args:
        image: Image in its current size.
        size: Recorded size.
        name: Name of the image in messages.

    Returns:
        The image, resized if necessary.

    Raises:
        InputError: The aspect ratios differ; the message contains both sizes.
    """
    if image.size == size:
        return image
    try:
        compute_resize_factors(size, image.size)
    except ValueError as error:
        raise InputError(f"{format_path(name)}: {error}") from error
    actual = f"{image.width} x {image.height}"
    warn_once(
        "resized images",
        f"{format_path(name)} is {actual}, and its captions record {size.width} x {size.height}; the image is resized",
    )
    return image.resize(size)


def merge_images(
    captioned: Iterable[CaptionedImage], roots: Sequence[Path], reject: RejectCallback = raise_error
) -> dict[str, CaptionedImage]:
    """Merge the captions of each image file, across spellings and repetitions.

    Args:
        captioned: Images, in order.
        roots: Folders that image names may start from.
        reject: Called for an image with another size than before.

    Returns:
        The images by the first name of each file. Added captions are renumbered.
    """
    files = ImageNameResolver(partial(resolve_image_path, roots=roots))
    merged: dict[str, CaptionedImage] = {}
    for each in captioned:
        name = files.unify_spelling(each.image)
        first = merged.setdefault(name, each)
        if first is each:
            continue
        if first.size != each.size:
            sizes = [f"{size.width} x {size.height}" for size in (first.size, each.size)]
            reject(
                InputError(f"{format_path(each.image)} has two sizes in one file, {sizes[0]} and {sizes[1]}; keep one")
            )
            continue
        start = 1 + max((caption.region_id for caption in first.captions), default=-1)
        renumbered = [replace(caption, region_id=region_id) for region_id, caption in enumerate(each.captions, start)]
        merged[name] = first._replace(captions=[*first.captions, *renumbered])
    return merged
