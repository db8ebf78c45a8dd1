"""`sca caption`: regions of pictures, in words and masks."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from sca_registry.spec import CAPTION_FROM_CHOICES

from sca.cli.options import (
    OUTPUT_FORMATS_HELP,
    AllowExternal,
    Device,
    Dtype,
    ImagePrefix,
    ModelName,
    Seed,
    TrustRemoteCode,
    check_option_choice,
    check_pipes,
    parse_input_path,
    print_stderr,
    print_table,
)
from sca.io import terminal
from sca.io.text import format_count

if TYPE_CHECKING:
    from PIL.Image import Image
    from sca_registry.contracts import Caption, Launcher

    from sca.inference.batch import CaptionResults, Failure
    from sca.inference.job import CaptionJob, RegionSource
    from sca.inference.shards import ShardedRun

DEFAULT_MODEL = "sca-tiny"
EXIT_STATUSES = {"image": 1, "prompts": 2}  # exit status for what cannot be used
UNRECORDED_OPTIONS = (  # that change no answer
    *("images", "out", "format", "image_prefix", "batch", "resume", "overwrite", "quiet", "launcher", "shard"),
    *("trust_remote_code", "allow_external"),
)


def caption(
    context: typer.Context,
    images: Annotated[
        list[str], typer.Argument(help="files, folders, or globs in quotes; - is standard input", metavar="IMAGE...")
    ],
    box: Annotated[list[str] | None, typer.Option(help="x1,y1,x2,y2 in image pixels; one region each")] = None,
    point: Annotated[list[str] | None, typer.Option(help="x,y in image pixels; one region each")] = None,
    mask: Annotated[
        list[str] | None, typer.Option(help="an image or .npy of the image's size, not zero inside; one region each")
    ] = None,
    region: Annotated[
        list[str] | None, typer.Option(help="'box=x1,y1,x2,y2;point=x,y,1;point=x,y,0;mask=FILE': one region together")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            parser=parse_input_path,
            metavar="PATH",
            help="COCO, Label Studio or LabelMe JSON, JSONL, or a folder of LabelMe files.",
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--everything", help="find the regions, then caption them")] = False,
    task: Annotated[str, typer.Option(help="caption or recognition")] = "caption",
    model: ModelName = DEFAULT_MODEL,
    out: Annotated[str, typer.Option(help="folder to write to; - writes JSONL to standard output")] = "",
    format: Annotated[
        str | None, typer.Option(help=f"for --out, any of {OUTPUT_FORMATS_HELP}  [default: jsonl]", show_default=False)
    ] = None,
    image_prefix: ImagePrefix = "",
    beams: Annotated[int | None, typer.Option(help="beam search of this width (default: the model's)", min=1)] = None,
    captions: Annotated[int | None, typer.Option(help="so many a region, the best first (default: 1)", min=1)] = None,
    sample: Annotated[bool, typer.Option("--sample", help="draw words at random instead of the likeliest")] = False,
    temperature: Annotated[
        float | None, typer.Option(help="with --sample: how far from the likeliest; 1 is the model's own", min=0.01)
    ] = None,
    words: Annotated[int | None, typer.Option(help="at most so many tokens a caption", min=1)] = None,
    points: Annotated[
        int | None, typer.Option(help="with --everything: points along each side of the grid", min=1, max=1000)
    ] = None,
    iou: Annotated[
        float | None, typer.Option(help="with --everything: least predicted IoU of a mask", min=0, max=1)
    ] = None,
    stability: Annotated[
        float | None, typer.Option(help="with --everything: least stability of a mask", min=0, max=1)
    ] = None,
    nms: Annotated[
        float | None, typer.Option(help="with --everything: of two that overlap more, one stays", min=0, max=1)
    ] = None,
    mask_nms_thresh: Annotated[
        float | None,
        typer.Option(help="With --everything: IoU threshold for suppressing masks; 1 for none.", min=0, max=1),
    ] = None,
    area: Annotated[
        float | None, typer.Option(help="with --everything: least share of the image", min=0, max=1)
    ] = None,
    crops: Annotated[
        int | None, typer.Option(help="with --everything: layers of crops to look at, too", min=0, max=4)
    ] = None,
    max_regions: Annotated[
        int | None, typer.Option(help="With --everything: maximum regions per image, best first.", min=1)
    ] = None,
    caption_from: Annotated[
        str | None, typer.Option(help=f"with --everything: {', '.join(CAPTION_FROM_CHOICES)}")
    ] = None,
    proposer: Annotated[
        str | None, typer.Option(help="with --everything: 'NAME [key=value]...' in place of the grid of points")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    batch: Annotated[int, typer.Option(help="images encoded at a time", min=1)] = 8,
    seed: Seed = 0,
    launcher: Annotated[
        str | None,
        typer.Option(help="many images, in shards: 'local workers=2', 'ray address=auto', ...; .tar archives, too"),
    ] = None,
    shard: Annotated[int, typer.Option(help="with --launcher: images of a shard", min=1)] = 1000,
    trust_remote_code: TrustRemoteCode = False,
    allow_external: AllowExternal = False,
    resume: Annotated[bool, typer.Option("--resume", help="with --out: go on where the same command ended")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="with --out: replace an earlier run there")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no remarks, and no table if there is --out")] = False,
) -> None:
    """Captions regions of images: those you point at, or all that are found with --everything.

    Prints a table, or writes --format to --out as well. Images that cannot be used are named; the others are done.
    """
    from sca_registry.contracts import TASKS

    from sca.inference.job import CaptionJob

    formats = _parse_formats(format, out)
    images = [str(parse_input_path(name)) for name in images]
    mask = [str(parse_input_path(name)) for name in mask or ()]
    _check_pipes(images, [*mask, *([prompts] if prompts else [])], bool(launcher), resume)
    check_option_choice("task", task, TASKS)
    if caption_from:
        check_option_choice("prompt to caption from", caption_from, CAPTION_FROM_CHOICES)
    search_options = {
        "points": points,
        "iou": iou,
        "stability": stability,
        "nms": nms,
        "mask_nms_thresh": mask_nms_thresh,
    }
    search_options |= {"area": area, "crops": crops, "caption_from": caption_from}
    listed = bool(box or point or mask or region)
    _check_region_options(
        listed, bool(prompts), everything, search_options | {"proposer": proposer, "max_regions": max_regions}
    )
    if proposer and (points is not None or crops is not None):
        raise ValueError("--proposer takes the place of the grid and its crops: leave out --points and --crops")
    if temperature is not None and not sample:
        raise ValueError("--temperature can only be used with --sample")
    if resume and out in ("", "-"):
        raise ValueError("--resume goes on with what a folder has: name it with --out")
    if overwrite and (resume or out in ("", "-")):
        raise ValueError("--overwrite replaces the run of a folder; name it with --out, and leave out --resume")
    if launcher and (out in ("", "-") or formats != ("jsonl",)):
        raise ValueError("--launcher writes JSON lines, a file a shard: name a folder with --out, and no --format")
    job = CaptionJob(
        model=model,
        device=device,
        dtype=dtype,
        seed=seed,
        trust_remote_code=trust_remote_code,
        allow_external=allow_external,
        boxes=box or (),
        points=point or (),
        masks=mask,
        regions=region or (),
        prompts=str(prompts) if prompts else None,
        everything=everything,
        search_options=search_options,
        proposer=proposer,
        max_regions=max_regions,
        task=task,
        generation_options={
            "max_new_tokens": words,
            "beams": beams,
            "captions": captions,
            "sample": sample or None,
            "temperature": temperature,
        },
        batch_size=batch,
    )
    region_source = job.read_region_source()
    archives = [name for name in images if launcher and name.endswith(".tar")]
    paths, path_problems = _find_images([name for name in images if name not in archives], quiet)
    _check_image_prefix(image_prefix, formats, paths)
    failures = FailureReporter(path_problems)
    if not (paths or archives):
        raise typer.Exit(failures.status)
    _report_prompts(region_source, failures, quiet)
    region_source.match_images(paths)
    input_files = job.list_input_files()
    if launcher:
        built_launcher = _build_launcher(launcher)
        from sca.inference.shards import name_shards, open_sharded_run

        settings = {"images": context.params["images"], **_collect_settings(context.params, input_files)}
        shard_specs = name_shards(archives, paths, shard)
        inputs = [*archives, *paths, *input_files]
        with open_sharded_run(Path(out), shard_specs, settings, inputs, overwrite) as sharded_run:
            _caption_shards(sharded_run, job, built_launcher, region_source, failures, quiet)
        if not quiet:
            _report_domain(model)
        raise typer.Exit(failures.status)
    _caption_locally(job, region_source, paths, formats, context.params, input_files, failures)


def _caption_locally(
    job: CaptionJob,
    region_source: RegionSource,
    paths: Sequence[Path],
    formats: Sequence[str],
    options: Mapping[str, Any],
    input_files: Sequence[Path],
    failures: FailureReporter,
) -> None:
    """Caption images in this process, write and print their captions, and exit with the status.

    Args:
        job: What to caption in each image, and how.
        regions: The regions, matched with the images.
        paths: Image files.
        formats: What is written to `params["out"]`.
        params: The options of the command, by their names in Python.
        read: Files that the regions are read from.
        failures: Those so far.
    """
    from sca.inference.batch import BatchCaptioner, Failure
    from sca.io.images import format_path
    from sca.output import DRAWN_FORMATS, MultiFormatWriter
    from sca.output.caption_journal import open_caption_journal

    out, quiet, model = options["out"], options["quiet"], options["model"]
    captioner = BatchCaptioner(job, region_source)
    with ExitStack() as outputs:
        writers = journal = None
        if out == "-":
            writers = outputs.enter_context(MultiFormatWriter.from_stream(sys.stdout, model))
        elif out:
            settings = {"images": options["images"], **_collect_settings(options, input_files)}
            journal_options = {"resume": options["resume"], "overwrite": options["overwrite"]}
            journal = outputs.enter_context(
                open_caption_journal(Path(out), settings, formats, [*paths, *input_files], **journal_options)
            )
            writers = outputs.enter_context(MultiFormatWriter(out, formats, model, options["image_prefix"]))
        table = None if out == "-" or (quiet and out) else outputs.enter_context(CaptionTable())
        progress_bars = outputs.enter_context(ProgressBars(len(paths), quiet))  # closed before the table is printed
        needs_images = bool(set(formats) & set(DRAWN_FORMATS))
        results = captioner.caption_images(
            paths, journal.completed if journal else None, needs_images, progress_bars.show_search
        )
        num_done = 0
        for result in progress_bars.track_results(results):
            if isinstance(result, Failure):
                failures.add(result)
                continue
            for receiver in filter(None, (writers, table)):
                receiver.add(*result)
            if journal:
                journal.add(str(result.path), result.image, result.captions)
            if job.everything and not result.captions and not quiet:
                print_stderr(
                    f"nothing found in {format_path(result.path)}; lower --iou or --stability, or raise --points"
                )
            num_done += 1
        if not num_done:  # older files stay as they are
            raise typer.Exit(failures.status)
    if not quiet:
        _report_domain(model)
        if summary := region_source.clipped.summarize():
            print_stderr(summary)
        for path in writers.paths.values() if writers else ():
            print_stderr(f"wrote {path}")
        if failures.count:
            print_stderr(f"{num_done} of {num_done + failures.count} done{failures.format_failed_paths()}")
    raise typer.Exit(failures.status)


def _find_images(names: Sequence[str], quiet: bool) -> tuple[list[Path], list[str]]:
    """Find images, without those that `sca` drew; return a line for each name that leads to none."""
    from sca.io.images import find_images, format_path, is_irregular_file
    from sca.io.run_folder import OutputFilter
    from sca.output import OUTPUT_FORMATS, list_output_patterns

    output_filter = OutputFilter(list_output_patterns(OUTPUT_FORMATS))
    irregular: list[Path] = []

    def is_excluded(path: Path) -> bool:
        irregular.extend([path] if is_irregular_file(path) else [])
        return is_irregular_file(path) or output_filter(path)

    paths, problems = find_images(names, is_excluded)
    if output_filter.skipped_paths and not quiet:
        print_stderr(
            f"skipped {len(output_filter.skipped_paths)} images that `sca` wrote, such as {format_path(output_filter.skipped_paths[0])}"
        )
    for path in irregular if not quiet else ():
        print_stderr(f"skipped {format_path(path)}, which is a pipe or a device, not an image file")
    return paths, problems


def _build_launcher(text: str) -> Launcher:
    import sca_registry
    from sca_registry.spec import Part

    part = Part.parse(text, "--launcher", "launchers")
    return sca_registry.launchers.build(part.name, **part.options)


def _caption_shards(
    run: ShardedRun,
    job: CaptionJob,
    launcher: Launcher,
    region_source: RegionSource,
    failures: FailureReporter,
    quiet: bool,
) -> None:
    """Caption the missing shards of a run and report what becomes of each."""
    missing = run.missing_names
    if run.finished and not quiet:
        print_stderr(f"{len(run.finished)} of {len(run.shards)} shards are there already")
    for name, problems in run.finished.items():
        failures.report_shard(name, problems)
    if any(run.finished.values()):
        print_stderr(
            "images with problems are not captioned again; after fixing them, use another --out or --overwrite"
        )
    for index, result in enumerate(run.caption_shards(job, launcher, region_source), 1):
        failures.report_shard(result.name, result.problems)
        if result.path is None:
            failures.report(f"{result.name}: {result.reason}", status=1)
        elif not quiet:
            print_stderr(f"{index} of {len(missing)}: wrote {result.path}")
    if run.missing_names:
        print_stderr(f"{format_count(len(run.missing_names), 'shard')} missing; repeat the command to resume")


def _report_domain(model: str) -> None:
    """Say on stderr what a model with a narrow domain is trained on, and which models are for photographs."""
    from sca_registry import zoo

    if note := zoo.describe_domain(model):
        print_stderr(note)


class FailureReporter:
    """Reports what failed as soon as it does, and keeps the exit status: 1 for an image, 2 for its prompts."""

    def __init__(self, problems: Iterable[str] = ()):
        self.count = 0
        self.status = 0
        self.paths: list[Path] = []
        for problem in problems:
            self.report(problem, status=1)
            self.count += 1

    def report(self, problem: str, status: int) -> None:
        """Report a problem that leaves no image without captions."""
        print_stderr(problem)
        self.status = max(self.status, status)

    def report_shard(self, shard: str, problems: Iterable[tuple[str, str]]) -> None:
        """Report the problems of a shard's images."""
        for message, kind in problems:
            self.report(f"{shard}: {message}", EXIT_STATUSES[kind])

    def add(self, failure: Failure) -> None:
        self.report(failure.reason, EXIT_STATUSES[failure.kind])
        if failure.is_entire_image:
            self.count += 1
            self.paths.append(failure.path)

    def format_failed_paths(self, limit: int = 20) -> str:
        """Name the images that failed once more, for the end of a long run."""
        from sca.io.images import format_path

        if not self.paths:
            return ""
        suffix = f" and {len(self.paths) - limit} more" if len(self.paths) > limit else ""
        return f"; not done: {', '.join(map(format_path, self.paths[:limit]))}{suffix}"


class ProgressBars:
    """Bars on a terminal: of the images, where there are several, and of the search for regions in one image."""

    def __init__(self, num_images: int, quiet: bool):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        name_column, rate_column = TextColumn("{task.description}"), TextColumn("{task.fields[rate]}")
        self.progress = Progress(
            *(name_column, BarColumn(), MofNCompleteColumn(), rate_column, TimeRemainingColumn()),
            console=console,
            disable=quiet or not console.is_terminal,
            transient=True,
            redirect_stdout=False,
        )
        self.image_task = self.progress.add_task("images", total=num_images, visible=num_images > 1, rate="")
        self.search_task = self.progress.add_task("points", visible=False, rate="")

    def __enter__(self) -> ProgressBars:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def show_search(self, points_done: int, points_total: int) -> None:
        self.progress.update(self.search_task, completed=points_done, total=points_total, visible=True)

    def track_results(self, results: CaptionResults) -> CaptionResults:
        """Yield the results and count their images."""
        from sca.inference.batch import Failure

        start_time, num_done, num_failed = time.monotonic(), 0, 0
        for result in results:
            self.progress.reset(self.search_task, visible=False)
            yield result
            if not isinstance(result, Failure):
                num_done += 1
            elif result.is_entire_image:
                num_failed += 1
            rate = f"{num_done / max(time.monotonic() - start_time, 1e-3):.1f} images/s"
            self.progress.update(self.image_task, completed=num_done + num_failed, rate=rate)


def _report_prompts(region_source: RegionSource, failures: FailureReporter, quiet: bool) -> None:
    """Report what a prompts file contains, and the records of which no prompt can be made."""
    from sca.inference.job import ListedPrompts
    from sca.io.images import format_path

    if not isinstance(region_source, ListedPrompts):
        return
    prompts_file = region_source.region_prompts
    if not quiet:
        unusable = (
            f"; {format_count(len(prompts_file.problems), 'record')} cannot be used" if prompts_file.problems else ""
        )
        counts = f"{format_count(sum(map(prompts_file.count_regions, prompts_file)), 'region')}, {format_count(len(prompts_file), 'image')}"
        print_stderr(f"{format_path(prompts_file.path)}: {counts}{unusable}")
        if summary := prompts_file.skip_counter.summarize():
            print_stderr(f"{format_path(prompts_file.path)}: {summary}")
    for problem in prompts_file.problems:
        failures.report(problem, status=2)


class CaptionTable:
    """A line a region, printed at the end, also of a run that is interrupted."""

    def __init__(self) -> None:
        columns = ("image", "region", "caption", "score", "iou", "box")
        self.table = terminal.Table(columns, right_aligned=("region", "score", "iou"), has_frame=False)

    def __enter__(self) -> CaptionTable:
        return self

    def __exit__(self, *error: object) -> None:
        if self.table.rows:
            with suppress(BrokenPipeError):  # the files of the run are finished all the same
                print_table(self.table)

    def add(self, path: Path, image: Image, captions: Sequence[Caption]) -> None:
        from sca.io.images import format_path

        for each in captions:
            box = " ".join(f"{value:.0f}" for value in each.box) if each.box else ""
            iou = "" if each.predicted_iou is None else f"{each.predicted_iou:.2f}"
            self.table.add_row(format_path(path.name), str(each.region_id), each.text, f"{each.score:.2f}", iou, box)
            for text, score in each.alternatives:
                self.table.add_row("", "", text, f"{score:.2f}", "", "")


def _check_pipes(images: Sequence[str], other_inputs: Sequence[str | Path], is_sharded: bool, resume: bool) -> None:
    """Raises ValueError for a pipe that would have to be read twice, or by another process."""
    from sca.io.json import DESCRIPTOR_PATH_PATTERN

    check_pipes([*images, *other_inputs])
    piped = [str(path) for path in (*images, *other_inputs) if DESCRIPTOR_PATH_PATTERN.fullmatch(str(path))]
    if piped and (is_sharded or (resume and piped[0] in images)):
        option = "--launcher" if is_sharded else "--resume"
        raise ValueError(f"{option} needs files, and {piped[0]} can be read only once; save it to a file")


def _check_image_prefix(prefix: str, formats: Sequence[str], paths: Iterable[Path]) -> None:
    """Raises ValueError for a prefix that nothing is written with, and for an image that it cannot lead to."""
    from sca.io.image_names import add_image_prefix
    from sca.output import LABEL_STUDIO

    if prefix and LABEL_STUDIO not in formats:
        raise ValueError(f"--image-prefix is for Label Studio; add --format {LABEL_STUDIO}, or leave it out")
    for path in paths if prefix else ():
        add_image_prefix(str(path), prefix)


def _parse_formats(format: str | None, out: str) -> tuple[str, ...]:
    """The formats that are asked for, checked against where they shall go."""
    from sca.output import OUTPUT_FORMATS

    if format is None:
        return ("jsonl",)
    formats = tuple(name.strip() for name in format.split(","))
    for name in formats:
        check_option_choice("format", name, OUTPUT_FORMATS)
    if not out:
        raise ValueError(f"--format {format} needs --out: name a folder to write to")
    if out == "-" and formats != ("jsonl",):
        raise ValueError(f"--out - writes JSONL only: name a folder to write {format} to")
    return formats


def _check_region_options(listed: bool, prompts: bool, everything: bool, everything_flags: dict[str, Any]) -> None:
    """Raises ValueError unless regions are listed, in a prompts file, or to be found."""
    if listed and prompts:
        raise ValueError("regions come from --prompts or from --box, --point, --mask and --region, not from both")
    if everything and (listed or prompts):
        raise ValueError("--everything finds its own regions: leave out --box, --point, --mask, --region and --prompts")
    if everything:
        return
    unused = [f"--{name.replace('_', '-')}" for name, value in everything_flags.items() if value is not None]
    if unused:
        raise ValueError(f"{' and '.join(unused)} can only be used with --everything")
    if not (listed or prompts):
        raise ValueError(
            "no region to caption: point with --box, --point, --mask, --region or --prompts, or find them with "
            "--everything"
        )


def _collect_settings(command_options: Mapping[str, Any], input_files: Iterable[str | Path]) -> dict[str, Any]:
    """What determines the captions of an image: the options of a command, and the content of the files it reads."""
    from sca.io.run_folder import compute_file_hash

    recorded = {
        name: value
        for name, value in command_options.items()
        if name not in UNRECORDED_OPTIONS and value not in (None, [], ())
    }
    options = {name: str(value) for name, value in recorded.items() if value is not False}
    return {**options, "files": {str(path): compute_file_hash(path) for path in input_files}}
