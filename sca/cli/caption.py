"""`sca caption`: caption regions of images."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from sca_registry.spec import CAPTION_FROM_CHOICES

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
    ImagePrefix,
    Images,
    ModelName,
    Out,
    Overwrite,
    PointsPerSide,
    Precision,
    PredIouThresh,
    PromptsFile,
    Quiet,
    Seed,
    TrustRemoteCode,
    Zoom,
    check_option_choice,
    check_pipes,
    parse_input_path,
    print_stderr,
    print_table,
)
from sca.inference.zoom_options import DEFAULT_ZOOM
from sca.io import terminal
from sca.io.text import format_count

if TYPE_CHECKING:
    from sca_registry.contracts import Caption, Launcher

    from sca.inference.caption_job import CaptionJob, RegionSource
    from sca.inference.shards import ShardedRun
    from sca.output.captioned_image import ImageOrSize


def caption(
    context: typer.Context,
    images: Images,
    box: Annotated[
        list[str] | None,
        typer.Option(
            help="Box as x1,y1,x2,y2 in image pixels. Each box is one region; repeatable.", rich_help_panel="Prompts"
        ),
    ] = None,
    point: Annotated[
        list[str] | None,
        typer.Option(
            help="Point as x,y in image pixels. Each point is one region; repeatable.", rich_help_panel="Prompts"
        ),
    ] = None,
    mask: Annotated[
        list[str] | None,
        typer.Option(
            help="Mask file (an image or .npy array) of the same size as the input image: a binary mask (0 for "
            "background, one nonzero value for the region), probabilities or logits. Each mask is one region; "
            "repeatable.",
            rich_help_panel="Prompts",
        ),
    ] = None,
    region: Annotated[
        list[str] | None,
        typer.Option(
            help="One region defined by several prompts: 'box=x1,y1,x2,y2;point=x,y,1;point=x,y,0;mask=FILE'. The "
            "label of a point is 1 for foreground or 0 for background. Repeatable.",
            rich_help_panel="Prompts",
        ),
    ] = None,
    prompts: PromptsFile = None,
    zoom: Zoom = DEFAULT_ZOOM,
    task: Annotated[
        str,
        typer.Option(
            help="Task: caption, recognition (predicts a class name), or a further task of the model, which `sca show "
            "model` lists.",
            rich_help_panel="Generation",
        ),
    ] = "caption",
    question: Annotated[
        str | None,
        typer.Option(
            help="Question to answer about each region, such as 'what color is it?'. '<region 1>' refers to the first "
            "region, '<region 2>' to the second; such a question has one answer. Requires a model that supports "
            "questions.",
            rich_help_panel="Generation",
        ),
    ] = None,
    length: Annotated[
        str | None,
        typer.Option(
            help="Length of the captions: short (up to 3 words), phrase (4 to 8 words) or full. Requires a model that "
            "is trained with lengths.",
            rich_help_panel="Generation",
        ),
    ] = None,
    num_captions: Annotated[
        int | None, typer.Option(help="Captions per region, best first.", min=1, rich_help_panel="Generation")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Maximum number of tokens per caption.", min=1, rich_help_panel="Generation")
    ] = None,
    num_beams: Annotated[
        int | None,
        typer.Option(
            help="Number of beams for beam search. Defaults to the model's setting.",
            min=1,
            rich_help_panel="Generation",
        ),
    ] = None,
    do_sample: Annotated[
        bool,
        typer.Option("--do-sample", help="Sample tokens instead of decoding greedily.", rich_help_panel="Generation"),
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sampling temperature; requires --do-sample.", min=0.01, rich_help_panel="Generation"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Probability mass for nucleus sampling; requires --do-sample.",
            min=0,
            max=1,
            rich_help_panel="Generation",
        ),
    ] = None,
    everything: Annotated[
        bool,
        typer.Option(
            "--everything",
            help="Find regions automatically and caption each of them.",
            rich_help_panel="Everything mode",
        ),
    ] = False,
    points_per_side: PointsPerSide = None,
    pred_iou_thresh: PredIouThresh = None,
    stability_score_thresh: Annotated[
        float | None,
        typer.Option(help="Minimum stability score of a mask.", min=0, max=1, rich_help_panel="Everything mode"),
    ] = None,
    box_nms_thresh: Annotated[
        float | None,
        typer.Option(
            help="IoU threshold for non-maximum suppression of boxes.",
            min=0,
            max=1,
            rich_help_panel="Everything mode",
        ),
    ] = None,
    mask_nms_thresh: Annotated[
        float | None,
        typer.Option(
            help="IoU threshold for non-maximum suppression of masks; 1 disables it.",
            min=0,
            max=1,
            rich_help_panel="Everything mode",
        ),
    ] = None,
    min_area: Annotated[
        float | None,
        typer.Option(
            help="Minimum region area as a fraction of the image.", min=0, max=1, rich_help_panel="Everything mode"
        ),
    ] = None,
    max_area: Annotated[
        float | None,
        typer.Option(
            help="Maximum region area as a fraction of the image.", min=0, max=1, rich_help_panel="Everything mode"
        ),
    ] = None,
    crop_n_layers: Annotated[
        int | None,
        typer.Option(
            help="Number of image crop layers to search in addition to the full image.",
            min=0,
            max=4,
            rich_help_panel="Everything mode",
        ),
    ] = None,
    max_regions: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of regions per image; the best are kept.", min=1, rich_help_panel="Everything mode"
        ),
    ] = None,
    caption_from: Annotated[
        str | None,
        typer.Option(
            help="Prompt used to caption each found region: box-and-point, box or point.",
            rich_help_panel="Everything mode",
        ),
    ] = None,
    proposer: Annotated[
        str | None,
        typer.Option(
            help="Region proposer to use instead of the point grid: 'NAME [key=value]...'. Implies --everything.",
            rich_help_panel="Everything mode",
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Word or phrase to find; requires a --proposer that takes text, such as owlv2-base. Repeatable.",
            rich_help_panel="Everything mode",
        ),
    ] = None,
    model: ModelName = DEFAULT_MODEL,
    device: Device = "cpu",
    precision: Precision = None,
    out: Out = "",
    format: Format = None,
    image_prefix: ImagePrefix = "",
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the interrupted run in --out.", rich_help_panel="Output")
    ] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    batch_size: ImageBatchSize = 8,
    seed: Seed = 0,
    launcher: Annotated[
        str | None,
        typer.Option(
            help="Launcher for captioning many images in shards, such as 'local num_workers=2' or 'ray address=auto'. "
            "With a launcher, IMAGE can also be a .tar archive.",
            rich_help_panel="Runtime",
        ),
    ] = None,
    shard_size: Annotated[
        int, typer.Option(help="Images per shard; requires --launcher.", min=1, rich_help_panel="Runtime")
    ] = 1000,
    trust_remote_code: TrustRemoteCode = False,
    allow_external: AllowExternal = False,
) -> None:
    """Caption prompted regions, or all regions with --everything.

    Prints a table. With --out, also writes the captions in the formats of --format. Images that cannot be read are
    reported; the others are captioned.
    """
    from sca.inference.caption_job import CaptionJob

    formats = parse_formats(format, out)
    images = [str(parse_input_path(name)) for name in images]
    mask = [str(parse_input_path(name)) for name in mask or ()]
    _check_pipes(images, [*mask, *([prompts] if prompts else [])], bool(launcher), resume)
    if caption_from:
        check_option_choice("--caption-from", caption_from, CAPTION_FROM_CHOICES)
    search_options = {
        "points_per_side": points_per_side,
        "pred_iou_thresh": pred_iou_thresh,
        "stability_score_thresh": stability_score_thresh,
        "box_nms_thresh": box_nms_thresh,
        "mask_nms_thresh": mask_nms_thresh,
        "min_area": min_area,
        "max_area": max_area,
        "crop_n_layers": crop_n_layers,
        "caption_from": caption_from,
    }
    listed = bool(box or point or mask or region)
    if text and not proposer:
        raise ValueError("--text requires --proposer with a proposer that takes text, such as owlv2-base")
    everything = everything or bool(proposer and not (listed or prompts))
    _check_region_options(
        listed, bool(prompts), everything, search_options | {"proposer": proposer, "max_regions": max_regions}
    )
    if proposer and (points_per_side is not None or crop_n_layers is not None):
        raise ValueError("--proposer replaces the point grid and its crops; omit --points-per-side and --crop-n-layers")
    for flag, value in (("--temperature", temperature), ("--top-p", top_p)):
        if value is not None and not do_sample:
            raise ValueError(f"{flag} can only be used with --do-sample")
    if resume and out in ("", "-"):
        raise ValueError("--resume requires --out, the folder of the interrupted run")
    if overwrite and (resume or out in ("", "-")):
        raise ValueError("--overwrite requires --out and cannot be combined with --resume; omit one of them")
    if launcher and (out in ("", "-") or formats != ("jsonl",)):
        raise ValueError(
            "--launcher writes one JSONL file per shard; pass an output folder with --out, and omit --format"
        )
    job = CaptionJob(
        model=model,
        device=device,
        precision=precision,
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
        text=text or (),
        max_regions=max_regions,
        task=task,
        generation_options={
            "max_new_tokens": max_new_tokens,
            "num_beams": num_beams,
            "num_captions": num_captions,
            "do_sample": do_sample or None,
            "temperature": temperature,
            "top_p": top_p,
            "question": question,
            "length": length,
        },
        zoom=zoom,
        batch_size=batch_size,
    )
    region_source = job.read_region_source()
    archives = [name for name in images if launcher and name.endswith(".tar")]
    paths, path_problems = find_input_images([name for name in images if name not in archives], quiet)
    _check_image_prefix(image_prefix, formats, paths)
    failures = FailureReporter(path_problems)
    if not (paths or archives):
        raise typer.Exit(failures.status)
    report_prompts(region_source, failures, quiet)
    region_source.match_images(paths)
    input_files = job.list_input_files()
    if launcher:
        built_launcher = _build_launcher(launcher)
        from sca.inference.shards import name_shards, open_sharded_run

        settings = collect_run_settings(context.params, input_files)
        shard_specs = name_shards(archives, paths, shard_size)
        inputs: list[str | Path] = [*archives, *paths, *input_files]
        with open_sharded_run(Path(out), shard_specs, settings, inputs, overwrite) as sharded_run:
            _caption_shards(sharded_run, job, built_launcher, region_source, failures, quiet)
        if not quiet:
            report_domain(model)
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
    """Caption images in this process, write and print their captions, and exit with the status."""
    from sca.inference.batch import BatchCaptioner, Failure
    from sca.io.images import format_path
    from sca.output.caption_journal import open_caption_journal
    from sca.output.formats import PIXEL_FORMATS, MultiFormatWriter

    out, quiet, model = options["out"], options["quiet"], options["model"]
    captioner = BatchCaptioner(job, region_source)
    if not quiet:
        report_precision(job.precision, captioner.captioner)
    with ExitStack() as outputs:
        writers = journal = None
        if out == "-":
            writers = outputs.enter_context(MultiFormatWriter.from_stream(sys.stdout, model))
        elif out:
            settings = collect_run_settings(options, input_files)
            journal_options = {"resume": options["resume"], "overwrite": options["overwrite"]}
            journal = outputs.enter_context(
                open_caption_journal(Path(out), settings, formats, [*paths, *input_files], **journal_options)
            )
            writers = outputs.enter_context(MultiFormatWriter(out, formats, model, options["image_prefix"]))
        has_table = out != "-" and not (quiet and out)
        table = outputs.enter_context(CaptionTable(job.proposer is not None)) if has_table else None
        progress_bars = outputs.enter_context(ProgressBars(len(paths), quiet))  # closed before the table is printed
        needs_images = bool(set(formats) & set(PIXEL_FORMATS))
        results = captioner.iter_results(
            paths, journal.completed if journal else None, needs_images, progress_bars.show_search
        )
        num_done, ood_images = 0, OutOfDistributionImages()
        for result in progress_bars.track_results(results):
            if isinstance(result, Failure):
                failures.add(result)
                continue
            if writers:
                writers.add(*result)
            if table:
                table.add(*result)
            if journal:
                journal.add(str(result.path), result.image, result.captions)
            ood_images.add(str(result.path), result.captions)
            if job.everything and not result.captions and not quiet:
                hint = (
                    "lower the score threshold of the proposer, or for points --pred-iou-thresh"
                    if job.proposer
                    else "lower --pred-iou-thresh or --stability-score-thresh, or raise --points-per-side"
                )
                print_stderr(f"no region found in {format_path(result.path)}; {hint}")
            num_done += 1
        if not num_done:  # keep the older files
            raise typer.Exit(failures.status)
    if not quiet:
        report_domain(model)
        if summary := ood_images.summarize():
            print_stderr(summary)
        if summary := region_source.clipped.summarize():
            print_stderr(summary)
        for path in writers.paths.values() if writers else ():
            print_stderr(f"wrote {path}")
        if failures.count:
            print_stderr(f"{num_done} of {num_done + failures.count} images captioned{failures.format_failed_paths()}")
    raise typer.Exit(failures.status)


def _build_launcher(text: str) -> Launcher:
    import sca_registry
    from sca_registry.spec import ComponentSpec

    component = ComponentSpec.parse(text, "--launcher", "launchers")
    return sca_registry.launchers.build(component.name, **component.options)


def _caption_shards(
    run: ShardedRun,
    job: CaptionJob,
    launcher: Launcher,
    region_source: RegionSource,
    failures: FailureReporter,
    quiet: bool,
) -> None:
    """Caption the missing shards of a run and report the outcome of each."""
    missing = run.missing_names
    if run.finished and not quiet:
        print_stderr(f"{len(run.finished)} of {len(run.shards)} shards are already captioned")
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


class CaptionTable:
    """Table with one line per region, printed at the end, even after an interrupt.

    Args:
        has_names: Whether the table has a column for the names of proposed regions.
    """

    def __init__(self, has_names: bool):
        self.has_names = has_names
        names = ("name",) if has_names else ()
        columns = ("image", "region", *names, "caption", "score", "confidence", "iou", "box")
        self.table: terminal.Table = terminal.Table(
            columns, right_aligned=("region", "score", "confidence", "iou"), has_frame=False
        )

    def __enter__(self) -> CaptionTable:
        return self

    def __exit__(self, *error: object) -> None:
        if self.table.rows:
            self._drop_empty_confidence()
            with suppress(BrokenPipeError):  # the files of the run are finished regardless
                print_table(self.table)

    def _drop_empty_confidence(self) -> None:
        """Drop the column of confidences if the model has none."""
        index = list(self.table.columns).index("confidence")
        if not any(row[index] for row in self.table.rows):
            self.table.columns = (*self.table.columns[:index], *self.table.columns[index + 1 :])
            self.table.rows = [(*row[:index], *row[index + 1 :]) for row in self.table.rows]

    def add(self, path: Path, image: ImageOrSize, captions: Sequence[Caption]) -> None:
        from sca.io.images import format_path

        for each in captions:
            box = " ".join(f"{value:.0f}" for value in each.box) if each.box else ""
            iou = "" if each.predicted_iou is None else f"{each.predicted_iou:.2f}"
            names = (each.name or "",) if self.has_names else ()
            score_text = "" if math.isnan(each.score) else f"{each.score:.2f}"
            scores = (score_text, "" if each.confidence is None else f"{each.confidence:.2f}", iou)
            self.table.add_row(format_path(path.name), str(each.region_id), *names, each.text, *scores, box)
            for text, score in each.alternatives:
                self.table.add_row("", "", *([""] * len(names)), text, f"{score:.2f}", "", "", "")


def _check_pipes(images: Sequence[str], other_inputs: Sequence[str | Path], is_sharded: bool, resume: bool) -> None:
    """Raise ValueError for a pipe that would have to be read twice, or by another process."""
    from sca.io.json import DESCRIPTOR_PATH_PATTERN

    check_pipes([*images, *other_inputs])
    piped = [str(path) for path in (*images, *other_inputs) if DESCRIPTOR_PATH_PATTERN.fullmatch(str(path))]
    if piped and (is_sharded or (resume and piped[0] in images)):
        option = "--launcher" if is_sharded else "--resume"
        raise ValueError(f"{option} requires files, but {piped[0]} can be read only once; save it to a file")


def _check_image_prefix(prefix: str, formats: Sequence[str], paths: Iterable[Path]) -> None:
    """Raise ValueError for a prefix that no format uses, and for an image that it cannot lead to."""
    from sca.io.image_names import add_image_prefix
    from sca.output.formats import LABEL_STUDIO

    if prefix and LABEL_STUDIO not in formats:
        raise ValueError(f"--image-prefix requires --format {LABEL_STUDIO}; add it, or omit --image-prefix")
    for path in paths if prefix else ():
        add_image_prefix(str(path), prefix)


def _check_region_options(listed: bool, prompts: bool, everything: bool, everything_flags: dict[str, Any]) -> None:
    """Raise ValueError unless regions are listed, in a prompts file, or to be found."""
    if listed and prompts:
        raise ValueError(
            "--prompts cannot be combined with --box, --point, --mask or --region; omit --prompts or the other options"
        )
    if everything and (listed or prompts):
        raise ValueError(
            "--everything cannot be combined with --box, --point, --mask, --region or --prompts; omit --everything "
            "or them"
        )
    if everything:
        return
    unused = [f"--{name.replace('_', '-')}" for name, value in everything_flags.items() if value is not None]
    if unused:
        raise ValueError(f"{' and '.join(unused)} can only be used with --everything")
    if not (listed or prompts):
        raise ValueError(
            "no regions to caption; pass --box, --point, --mask, --region or --prompts, or find regions with "
            "--everything"
        )
