"""`sca convert` and `sca view`: captions that were made, in other formats and as a page to browse."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sca.cli.options import OUTPUTS, ImagePrefix, check_pipes, complain, input_path, settle
from sca.io.json import DESCRIPTOR
from sca.io.text import format_count

if TYPE_CHECKING:
    from sca.io.annotations.annotation import SkipCounter
    from sca.output.captioned import Captioned

SHOWN = 10  # records that cannot be read and are named
IMAGES = "Folder that image names are relative to (default: the working folder, then that of the captions)."


def convert(
    captions: Annotated[
        Path,
        typer.Argument(
            parser=input_path, help="JSON lines, COCO, Parquet, GeoJSON, Label Studio; or a folder of LabelMe files"
        ),
    ],
    out: Annotated[Path, typer.Argument(help="folder to write to")],
    format: Annotated[str, typer.Option(help=f"any of {OUTPUTS}")] = "coco",
    images: Annotated[Path | None, typer.Option(help=IMAGES)] = None,
    image_prefix: ImagePrefix = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what was converted to OUT before.")] = False,
) -> None:
    """Writes captions in other formats. Pictures are opened for png and html only."""
    from sca.io.annotations.annotation import SkipCounter
    from sca.io.errors import InputError
    from sca.io.image_names import rewrite_name
    from sca.io.images import show
    from sca.io.run_folder import RunFolder
    from sca.output import DRAWN, FORMATS, LABEL_STUDIO, Writers, output_patterns

    formats = [name.strip() for name in format.split(",")]
    for name in formats:
        settle("format", name, FORMATS)
    skip, roots, rejected = SkipCounter(), _roots(images, [captions]), Rejected()
    found = _read(captions, skip, roots, image_prefix, rejected, LABEL_STUDIO in formats)
    first = next(found, None)
    if first is None:
        raise InputError(f"{show(captions)} has no captions")
    done, bad = 0, 0
    with RunFolder(out, "convert", output_patterns(FORMATS)) as folder:
        settings = {"captions": str(captions), "images": images and str(images)}
        settings |= {"image_prefix": image_prefix} if image_prefix else {}
        folder.begin(settings, output_patterns(formats), [captions], overwrite=overwrite)
        with Writers(out, formats, first.model, image_prefix) as writers:
            for each in chain([first], found):
                picture = each.size
                if set(formats) & set(DRAWN):
                    try:
                        picture = each.open(roots)
                    except InputError as error:
                        complain(str(error))
                        bad += 1
                        continue
                writers.add(rewrite_name(each.image, roots), picture, each.captions)
                done += len(each.captions)
        folder.finish()
    for path in writers.paths.values():
        complain(f"wrote {path}")
    if summary := skip.summarize():
        complain(summary)
    complain(format_count(done, "region"))
    rejected.end()
    if bad:
        raise typer.Exit(1)


def view(
    captions: Annotated[
        Path, typer.Argument(parser=input_path, help="what `sca caption` wrote, in any format that can be read")
    ],
    other: Annotated[
        Path | None, typer.Argument(parser=input_path, help="another file of the same images, to compare")
    ] = None,
    out: Annotated[Path, typer.Option(help="the page")] = Path("view.html"),
    images: Annotated[Path | None, typer.Option(help=IMAGES)] = None,
    image_prefix: ImagePrefix = "",
) -> None:
    """Writes one page to browse regions: search captions, filter by score, compare two files side by side."""
    from sca.io.annotations.annotation import SkipCounter
    from sca.io.atomic import open_folder
    from sca.output.page import check_page
    from sca.output.view import write_view

    files = [path for path in (captions, other) if path]
    check_pipes(files)
    open_folder(out.parent)
    check_page(out, files)
    skip, roots, names, rejected = SkipCounter(), _roots(images, files), tuple(map(str, files)), Rejected()
    first, *rest = (_read(path, skip, roots, image_prefix, rejected, is_written=True) for path in files)
    regions, problems = write_view(out, first, rest[0] if rest else None, roots, names)
    for problem in problems[:10]:
        complain(problem)
    if problems:
        complain(f"{format_count(len(problems), 'image')} not shown; --images names the folder that they are in")
    if summary := skip.summarize():
        complain(summary)
    complain(f"wrote {out}, {format_count(regions, 'region')}")
    rejected.end()


class Rejected:
    """Name the first records that cannot be read, and count all."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, error: ValueError) -> None:
        self.count += 1
        if self.count <= SHOWN:
            complain(str(error))

    def end(self) -> None:
        """Say how many there are, and end with status 1 if there are any."""
        if self.count:
            complain(f"left out {format_count(self.count, 'record')} that cannot be used; correct the file")
            raise typer.Exit(1)


def _read(
    path: Path,
    skip: SkipCounter,
    roots: list[Path],
    image_prefix: str,
    rejected: Rejected,
    is_written: bool = False,
) -> Iterator[Captioned]:
    """Captions, their images named without the prefix; a prefix that is neither there nor `is_written` is a remark."""
    from sca.io.image_names import remove_image_prefix
    from sca.io.images import show
    from sca.output.read import read_captions

    is_used = not image_prefix or is_written
    for each in read_captions(path, skip, roots, rejected):
        name = remove_image_prefix(each.image, image_prefix)
        is_used |= name != each.image
        yield each._replace(image=name)
    if not is_used:
        complain(f"no image name of {show(path)} begins with --image-prefix {image_prefix}")


def _roots(images: Path | None, captions: Iterable[Path]) -> list[Path]:
    """The folders that images may be named in."""
    beside = [path if path.is_dir() else path.parent for path in captions if not DESCRIPTOR.fullmatch(str(path))]
    return [images] if images else list(dict.fromkeys([Path(), *beside]))
