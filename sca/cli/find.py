"""`sca find`: find regions of images by text."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from sca.cli.image_runs import (
    DEFAULT_MODEL,
    FailureReporter,
    OutOfDistributionImages,
    ProgressBars,
    collect_run_settings,
    find_input_images,
    parse_formats,
    report_domain,
    report_precision,
    report_prompts,
)
from sca.cli.options import (
    AllowExternal,
    Device,
    Format,
    ImageBatchSize,
    Images,
    ModelName,
    Out,
    Overwrite,
    PointsPerSide,
    Precision,
    PredIouThresh,
    PromptsFile,
    Quiet,
    TrustRemoteCode,
    check_pipes,
    parse_input_path,
    print_stderr,
    print_table,
)
from sca.inference.find_options import DEFAULT_THRESHOLD
from sca.io import terminal

if TYPE_CHECKING:
    from sca_registry.contracts import Caption

    from sca.output.captioned_image import ImageOrSize


def find(
    context: typer.Context,
    text: Annotated[str, typer.Argument(help="Word or phrase to find, such as 'a red circle'.")],
    images: Images,
    everything: Annotated[
        bool,
        typer.Option(
            "--everything",
            help="Search the regions of everything mode. The default without --proposer and --prompts.",
            rich_help_panel="Everything mode",
        ),
    ] = False,
    proposer: Annotated[
        str | None,
        typer.Option(
            help="Region proposer to use instead of the point grid: 'NAME [key=value]...'. A proposer that takes text, "
            "such as owlv2-base, finds TEXT unless its options set another one.",
            rich_help_panel="Everything mode",
        ),
    ] = None,
    prompts: PromptsFile = None,
    points_per_side: PointsPerSide = None,
    pred_iou_thresh: PredIouThresh = None,
    top: Annotated[
        int, typer.Option(help="Maximum number of regions over all images.", min=1, rich_help_panel="Matches")
    ] = 10,
    threshold: Annotated[
        float,
        typer.Option(
            help="Minimum score: 1 if the text is certain for a region, 0 if it is as likely without an image.",
            rich_help_panel="Matches",
        ),
    ] = DEFAULT_THRESHOLD,
    model: ModelName = DEFAULT_MODEL,
    device: Device = "cpu",
    precision: Precision = None,
    out: Out = "",
    format: Format = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    batch_size: ImageBatchSize = 8,
    trust_remote_code: TrustRemoteCode = False,
    allow_external: AllowExternal = False,
) -> None:
    """Find the regions of images that match a text.

    Prints the best matches of all images. With --out, also writes them in the formats of --format. The exit status is 0
    even if no region matches.
    """
    from sca_registry.spec import ComponentSpec

    from sca.inference.caption_job import CaptionJob
    from sca.inference.proposer import lacks_text

    formats = parse_formats(format, out)
    images = [str(parse_input_path(name)) for name in images]
    check_pipes([*images, *([prompts] if prompts else [])])
    search_options = {"points_per_side": points_per_side, "pred_iou_thresh": pred_iou_thresh}
    if prompts:
        _check_no_search_options({"everything": everything or None, "proposer": proposer, **search_options})
    if proposer and points_per_side is not None:
        raise ValueError("--proposer replaces the point grid; omit --points-per-side")
    if overwrite and out in ("", "-"):
        raise ValueError("--overwrite requires --out; add it, or omit --overwrite")
    job = CaptionJob(
        model=model,
        device=device,
        precision=precision,
        trust_remote_code=trust_remote_code,
        allow_external=allow_external,
        prompts=str(prompts) if prompts else None,
        everything=not prompts,
        search_options=search_options,
        proposer=proposer,
        text=[text] if proposer and lacks_text(ComponentSpec.parse(proposer, "proposer", "proposers")) else (),
        batch_size=batch_size,
    )
    region_source = job.read_region_source()
    paths, problems = find_input_images(images, quiet)
    failures = FailureReporter(problems)
    if not paths:
        raise typer.Exit(failures.status)
    report_prompts(region_source, failures, quiet)
    region_source.match_images(paths)

    from sca.inference.batch import BatchFinder, Failure
    from sca.output.captioned_image import ImageSize
    from sca.output.formats import PIXEL_FORMATS

    finder = BatchFinder(job, region_source, text, top, threshold)
    if not quiet:
        report_precision(job.precision, finder.captioner)
    keeps_images = bool(out and set(formats) & set(PIXEL_FORMATS))
    matches: list[Match] = []
    num_done = 0
    with ProgressBars(len(paths), quiet) as progress_bars:
        for result in progress_bars.track_results(finder.iter_results(paths, progress=progress_bars.show_search)):
            if isinstance(result, Failure):
                failures.add(result)
                continue
            path, image, captions = result
            image = image if keeps_images else ImageSize(*image.size)
            candidates = [*matches, *(Match(path, image, caption) for caption in captions)]
            matches = sorted(candidates, key=lambda match: -match.score)[:top]
            num_done += 1
    if not num_done:  # keep the older files
        raise typer.Exit(failures.status)
    if out:
        input_files = job.list_input_files()
        settings = collect_run_settings(context.params, input_files)
        _write_matches(matches, out, formats, settings, [*paths, *input_files], overwrite, model, quiet)
    if out != "-" and not (quiet and out) and matches:
        print_table(_build_table(matches))
    if not matches and not quiet:
        print_stderr(f"no region matches {text!r} with a score of at least {threshold:g}; lower --threshold")
    if not quiet:
        report_domain(model)
        ood_images = OutOfDistributionImages("matches")
        for path, caption in {match.path: match.caption for match in matches}.items():
            ood_images.add(str(path), [caption])
        if summary := ood_images.summarize():
            print_stderr(summary)
        if failures.count:
            print_stderr(f"{num_done} of {num_done + failures.count} images searched")
    raise typer.Exit(failures.status)


class Match(NamedTuple):
    """Region of an image that matches the text.

    Attributes:
        path: Image file.
        image: Image, or only its size if no output format draws it.
        caption: Caption of the region, with the score of the text.
    """

    path: Path
    image: ImageOrSize
    caption: Caption

    @property
    def score(self) -> float:
        """Score of the text."""
        assert self.caption.proposal_score is not None  # of `find_regions`
        return self.caption.proposal_score


def _check_no_search_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError if options of a search are combined with a prompts file."""
    used = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if used:
        raise ValueError(f"{' and '.join(used)} cannot be combined with --prompts; omit one of them")


def _write_matches(
    matches: Sequence[Match],
    out: str,
    formats: Sequence[str],
    settings: Mapping[str, Any],
    inputs: Sequence[Path],
    overwrite: bool,
    model: str,
    quiet: bool,
) -> None:
    """Write the matches, grouped by image; the image with the best match comes first."""
    from sca.io.run_folder import RunFolder
    from sca.output.formats import OUTPUT_FORMATS, MultiFormatWriter, list_output_patterns

    with ExitStack() as outputs:
        if out == "-":
            writers = outputs.enter_context(MultiFormatWriter.from_stream(sys.stdout, model))
        else:
            folder = outputs.enter_context(RunFolder(out, "find", list_output_patterns(OUTPUT_FORMATS)))
            folder.begin_run(settings, list_output_patterns(formats), inputs, overwrite=overwrite)
            outputs.callback(folder.finish)
            writers = outputs.enter_context(MultiFormatWriter(out, formats, model))
        matches_by_image: dict[Path, list[Match]] = {}
        for match in matches:
            matches_by_image.setdefault(match.path, []).append(match)
        for path, image_matches in matches_by_image.items():
            writers.add(path, image_matches[0].image, [match.caption for match in image_matches])
        output_paths = writers.paths.values()
    for path in output_paths if not quiet else ():
        print_stderr(f"wrote {path}")


def _build_table(matches: Sequence[Match]) -> terminal.Table:
    """Build a table with one line per match, best first."""
    from sca.io.images import format_path

    columns = ("image", "region", "text score", "caption", "iou", "box")
    table = terminal.Table(columns, right_aligned=("region", "text score", "iou"), has_frame=False)
    for match in matches:
        path, _, caption = match
        box = " ".join(f"{value:.0f}" for value in caption.box) if caption.box else ""
        iou = "" if caption.predicted_iou is None else f"{caption.predicted_iou:.2f}"
        score = f"{match.score:.2f}"
        table.add_row(format_path(path.name), str(caption.region_id), score, caption.text, iou, box)
    return table
