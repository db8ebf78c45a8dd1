"""`sca convert` and `sca view`: convert captions to other formats and to an HTML viewer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sca.cli.options import (
    OUTPUT_FORMATS_HELP,
    YOLO_HELP,
    ImagePrefix,
    check_option_choice,
    check_pipes,
    parse_input_path,
    print_stderr,
)
from sca.io.json import DESCRIPTOR_PATH_PATTERN
from sca.io.text import format_count

if TYPE_CHECKING:
    from sca.io.annotations.annotation import SkipCounter
    from sca.output.captioned_image import CaptionedImage, ImageOrSize

MAX_PRINTED_ERRORS = 10  # maximum number of unreadable records to print
ImageRoot = Annotated[
    Path | None,
    typer.Option(
        help="Folder that relative image paths start from. By default, the current directory is searched first, then "
        "the folder of the captions file.",
        rich_help_panel="Data",
    ),
]


def convert(
    captions: Annotated[
        Path,
        typer.Argument(
            parser=parse_input_path,
            help="Captions in JSON Lines, COCO, Parquet, GeoJSON or Label Studio, or a folder of LabelMe files.",
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Output folder.")],
    format: Annotated[
        str,
        typer.Option(
            help=f"Output formats, comma-separated: {OUTPUT_FORMATS_HELP}. {YOLO_HELP}", rich_help_panel="Output"
        ),
    ] = "coco",
    image_root: ImageRoot = None,
    image_prefix: ImagePrefix = "",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing conversion in OUT.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Convert captions to other formats. Only png, html and yolo need the image files."""
    from sca.io.annotations.annotation import SkipCounter
    from sca.io.errors import InputError
    from sca.io.image_names import make_relative_image_name
    from sca.io.images import format_path
    from sca.io.run_folder import RunFolder
    from sca.output.formats import LABEL_STUDIO, OUTPUT_FORMATS, PIXEL_FORMATS, MultiFormatWriter, list_output_patterns

    formats = [name.strip() for name in format.split(",")]
    for name in formats:
        check_option_choice("format", name, OUTPUT_FORMATS)
    skip, roots, rejections = SkipCounter(), _list_image_roots(image_root, [captions]), RejectionReporter()
    captioned_images = _read_captioned_images(captions, skip, roots, image_prefix, rejections, LABEL_STUDIO in formats)
    first = next(captioned_images, None)
    if first is None:
        raise InputError(f"{format_path(captions)} has no captions")
    num_regions, num_failed = 0, 0
    with RunFolder(out, "convert", list_output_patterns(OUTPUT_FORMATS)) as folder:
        settings = {"captions": str(captions), "image_root": image_root and str(image_root)}
        settings |= {"image_prefix": image_prefix} if image_prefix else {}
        folder.begin_run(settings, list_output_patterns(formats), [captions], overwrite=overwrite)
        with MultiFormatWriter(out, formats, first.model, image_prefix) as writers:
            for captioned in chain([first], captioned_images):
                image: ImageOrSize = captioned.size
                if set(formats) & set(PIXEL_FORMATS):
                    try:
                        image = captioned.open(roots)
                    except InputError as error:
                        print_stderr(str(error))
                        num_failed += 1
                        continue
                writers.add(make_relative_image_name(captioned.image, roots), image, captioned.captions)
                num_regions += len(captioned.captions)
        folder.finish()
    for path in writers.paths.values():
        print_stderr(f"wrote {path}")
    if summary := skip.summarize():
        print_stderr(summary)
    print_stderr(format_count(num_regions, "region"))
    rejections.finish()
    if num_failed:
        raise typer.Exit(1)


def view(
    captions: Annotated[Path, typer.Argument(parser=parse_input_path, help="Captions in any supported format.")],
    other: Annotated[
        Path | None,
        typer.Argument(parser=parse_input_path, help="Second captions file for the same images, shown side by side."),
    ] = None,
    out: Annotated[Path, typer.Option(help="HTML page to write.", rich_help_panel="Output")] = Path("view.html"),
    image_root: ImageRoot = None,
    image_prefix: ImagePrefix = "",
) -> None:
    """Write an HTML viewer for one or two captions files."""
    from sca.io.annotations.annotation import SkipCounter
    from sca.io.atomic import create_writable_folder
    from sca.output.html_page import check_page_path
    from sca.output.viewer import write_viewer

    files = [path for path in (captions, other) if path]
    check_pipes(files)
    create_writable_folder(out.parent)
    check_page_path(out, files)
    skip, roots, names, rejections = (
        SkipCounter(),
        _list_image_roots(image_root, files),
        tuple(map(str, files)),
        RejectionReporter(),
    )
    first_images, *other_images = (
        _read_captioned_images(path, skip, roots, image_prefix, rejections, is_written=True) for path in files
    )
    num_regions, problems = write_viewer(out, first_images, other_images[0] if other_images else None, roots, names)
    for problem in problems[:10]:
        print_stderr(problem)
    if problems:
        print_stderr(f"{format_count(len(problems), 'image')} not shown; pass their folder with --image-root")
    if summary := skip.summarize():
        print_stderr(summary)
    print_stderr(f"wrote {out}, {format_count(num_regions, 'region')}")
    rejections.finish()


class RejectionReporter:
    """Prints the first unreadable records, and counts all."""

    def __init__(self) -> None:
        self.count: int = 0

    def __call__(self, error: ValueError) -> None:
        self.count += 1
        if self.count <= MAX_PRINTED_ERRORS:
            print_stderr(str(error))

    def finish(self) -> None:
        """Print the total, and exit with status 1 if it is not 0."""
        if self.count:
            print_stderr(f"skipped {format_count(self.count, 'record')} that cannot be used; correct the file")
            raise typer.Exit(1)


def _read_captioned_images(
    path: Path,
    skip: SkipCounter,
    roots: list[Path],
    image_prefix: str,
    rejections: RejectionReporter,
    is_written: bool = False,
) -> Iterator[CaptionedImage]:
    """Yield captioned images named without the prefix; warn if it is neither found nor `is_written`."""
    from sca.io.image_names import remove_image_prefix
    from sca.io.images import format_path
    from sca.output.reader import read_captions

    is_used = not image_prefix or is_written
    for captioned in read_captions(path, skip, roots, rejections):
        name = remove_image_prefix(captioned.image, image_prefix)
        is_used |= name != captioned.image
        yield captioned._replace(image=name)
    if not is_used:
        print_stderr(f"no image name of {format_path(path)} begins with --image-prefix {image_prefix}")


def _list_image_roots(image_root: Path | None, captions: Iterable[Path]) -> list[Path]:
    """List the folders that image names may be relative to."""
    caption_folders = [
        path if path.is_dir() else path.parent for path in captions if not DESCRIPTOR_PATH_PATTERN.fullmatch(str(path))
    ]
    return [image_root] if image_root else list(dict.fromkeys([Path(), *caption_folders]))
