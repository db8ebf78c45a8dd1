"""`sca convert` and `sca view`: captions that were made, in other formats and as a page to browse."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from sca.cli.options import OUTPUTS, check_pipes, complain, input_path, settle


def convert(
    captions: Annotated[
        Path,
        typer.Argument(
            parser=input_path, help="JSON lines, COCO, Parquet, GeoJSON, Label Studio; or a folder of LabelMe files"
        ),
    ],
    out: Annotated[Path, typer.Argument(help="folder to write to")],
    format: Annotated[str, typer.Option(help=f"any of {OUTPUTS}")] = "coco",
    images: Annotated[Path | None, typer.Option(help="for png and html: the folder that pictures are named in")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what was converted to OUT before.")] = False,
) -> None:
    """Writes captions in other formats. Pictures are opened for png and html only."""
    from sca.images import ImageError, open_image, show
    from sca.io.run_folder import RunFolder
    from sca.output import DRAWN, FORMATS, Writers, output_patterns
    from sca.output.read import ReadError, read_captions

    formats = [name.strip() for name in format.split(",")]
    for name in formats:
        settle("format", name, FORMATS)
    found = read_captions(captions)
    first = next(found, None)
    if first is None:
        raise ReadError(f"{show(captions)} has no captions")
    done, bad = 0, 0
    with RunFolder(out, "convert", output_patterns(FORMATS)) as folder:
        settings = {"captions": str(captions), "images": images and str(images)}
        folder.begin(settings, output_patterns(formats), [captions], overwrite=overwrite)
        with Writers(out, formats, first.model) as writers:
            for each in chain([first], found):
                picture = each.size
                if set(formats) & set(DRAWN):
                    try:
                        picture = open_image(images / each.image if images else each.image)
                    except ImageError as error:
                        complain(str(error))
                        bad += 1
                        continue
                    if picture.size != each.size:
                        size = f"{each.size.width} x {each.size.height}"
                        complain(f"{each.image} is {picture.width} x {picture.height}, and was {size} when captioned")
                        bad += 1
                        continue
                writers.add(each.image, picture, each.captions)
                done += len(each.captions)
        folder.finish()
    for path in writers.paths.values():
        complain(f"wrote {path}")
    complain(f"{done} regions")
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
    images: Annotated[Path | None, typer.Option(help="the folder that pictures are named in")] = None,
) -> None:
    """Writes one page to browse regions: search captions, filter by score, compare two files side by side."""
    from sca.io.atomic import open_folder
    from sca.output.page import check_page
    from sca.output.read import read_captions
    from sca.output.view import write_view

    check_pipes([path for path in (captions, other) if path])
    open_folder(out.parent)
    check_page(out, [path for path in (captions, other) if path])
    names = tuple(str(path) for path in (captions, other) if path)
    regions, problems = write_view(out, read_captions(captions), read_captions(other) if other else None, images, names)
    for problem in problems[:10]:
        complain(problem)
    if problems:
        complain(f"{len(problems)} pictures are not shown; --images names the folder that they are in")
    complain(f"wrote {out}, {regions} regions")
