"""Captions in files as a page to browse, or two files of the same images to compare: `sca view`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from sca.io.errors import InputError
from sca.io.image_names import ImageFiles, find_image
from sca.io.images import show
from sca.output.captioned import Captioned, Size, merge_images
from sca.output.html import Html


def write_view(
    path: Path,
    captioned: Iterable[Captioned],
    other: Iterable[Captioned] | None = None,
    images: Sequence[Path] = (Path(),),
    names: tuple[str, ...] = (),
) -> tuple[int, list[str]]:
    """Write the viewer.

    Args:
        path: The page.
        captioned: Images with their captions.
        other: What to compare with, of the same images; regions are paired by their order.
        images: Folders that names of images may start from.
        names: Names of the files, for the title.

    Returns:
        The number of regions, and a line for each image that could not be opened.
    """
    first = merge_images(captioned, images)
    second = None if other is None else merge_images(other, images)
    page, problems, count = Html(path, " and ".join(names) or "Regions", second is not None), list[str](), 0
    try:
        for one, two in _pair(first, second, images):
            captions = None if second is None else two.captions if two else []
            page.add(one.image, _open(one, images, problems), one.captions, captions)
            count += len(one.captions) + len(captions or ())
    except BaseException:
        page.drop()
        raise
    page.close()
    return count, problems


def _open(captioned: Captioned, images: Sequence[Path], problems: list[str]) -> Image.Image | Size:
    """Open the image; its size alone, and another problem, where that fails."""
    try:
        return captioned.open(images)
    except InputError as error:
        problems.append(str(error))
        return captioned.size


def _pair(
    first: dict[str, Captioned], second: dict[str, Captioned] | None, images: Sequence[Path]
) -> Iterator[tuple[Captioned, Captioned | None]]:
    """The images of the first file, each with that of the second that is the same image file; then the others."""
    files = ImageFiles(partial(find_image, roots=images))
    second = second and {files.unify(name): each for name, each in second.items()}
    for name, each in first.items():
        pair = second.pop(files.unify(name), None) if second else None
        if pair is not None and pair.size != each.size:
            sizes = [f"{size.width} x {size.height}" for size in (each.size, pair.size)]
            raise InputError(f"{show(each.image)} is {sizes[0]} in one file and {sizes[1]} in the other")
        yield each, pair
    for left in (second or {}).values():
        yield left._replace(captions=[]), left
