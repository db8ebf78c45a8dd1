"""Viewer for a caption file, or for two caption files of the same images: `sca view`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from sca.io.errors import InputError
from sca.io.image_names import ImageNameResolver, resolve_image_path
from sca.io.images import format_path
from sca.output.captioned_image import CaptionedImage, ImageSize, merge_images
from sca.output.html import HtmlWriter


def write_viewer(
    path: Path,
    captioned: Iterable[CaptionedImage],
    other_captioned: Iterable[CaptionedImage] | None = None,
    roots: Sequence[Path] = (Path(),),
    names: tuple[str, ...] = (),
) -> tuple[int, list[str]]:
    """Write the viewer as an HTML page.

    Args:
        path: Output file.
        captioned: Images with their captions.
        other_captioned: Captions of the same images to compare with; regions are paired by order.
        roots: Folders that image names may start from.
        names: Names of the files, for the title.

    Returns:
        The number of regions, and one message per image that could not be opened.

    Raises:
        InputError: The files record different sizes of an image.
    """
    first_images = merge_images(captioned, roots)
    second_images = None if other_captioned is None else merge_images(other_captioned, roots)
    page = HtmlWriter(path, " and ".join(names) or "Regions", second_images is not None)
    problems: list[str] = []
    num_regions = 0
    try:
        for captioned_image, counterpart in _pair_images(first_images, second_images, roots):
            other_captions = None if second_images is None else counterpart.captions if counterpart else []
            page.add(
                captioned_image.image,
                _open_image(captioned_image, roots, problems),
                captioned_image.captions,
                other_captions,
            )
            num_regions += len(captioned_image.captions) + len(other_captions or ())
    except BaseException:
        page.discard()
        raise
    page.close()
    return num_regions, problems


def _open_image(captioned: CaptionedImage, roots: Sequence[Path], problems: list[str]) -> Image.Image | ImageSize:
    """Open the image; on failure, add a problem and return its size."""
    try:
        return captioned.open(roots)
    except InputError as error:
        problems.append(str(error))
        return captioned.size


def _pair_images(
    first_images: dict[str, CaptionedImage], second_images: dict[str, CaptionedImage] | None, roots: Sequence[Path]
) -> Iterator[tuple[CaptionedImage, CaptionedImage | None]]:
    """Yield the images of the first file, each with its counterpart in the second file; then the remaining ones."""
    files = ImageNameResolver(partial(resolve_image_path, roots=roots))
    second_images = second_images and {files.unify_spelling(name): each for name, each in second_images.items()}
    for name, each in first_images.items():
        counterpart = second_images.pop(files.unify_spelling(name), None) if second_images else None
        if counterpart is not None and counterpart.size != each.size:
            sizes = [f"{size.width} x {size.height}" for size in (each.size, counterpart.size)]
            raise InputError(
                f"{format_path(each.image)} is {sizes[0]} pixels in one file and {sizes[1]} in the other; compare "
                "captions of the same images"
            )
        yield each, counterpart
    for unmatched in (second_images or {}).values():
        yield unmatched._replace(captions=[]), unmatched
