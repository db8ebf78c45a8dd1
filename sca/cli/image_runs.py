"""Commands that process many images: their images, formats, settings, failures and progress."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sca.cli.options import check_option_choice, print_stderr
from sca.devices import DTYPES
from sca.io.text import format_count

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from sca_registry.contracts import Caption, Captioner

    from sca.inference.batch import CaptionResults, Failure
    from sca.inference.caption_job import RegionSource

DEFAULT_MODEL = "sca-tiny"
EXIT_STATUSES = {"image": 1, "prompts": 2}  # exit status by the kind of failure
MAX_OOD_IMAGES = 3  # images that the warning about unlike images names
UNRECORDED_OPTIONS = (  # options that do not change the results
    *("images", "out", "format", "image_prefix", "resume", "overwrite", "quiet", "batch_size", "launcher"),
    *("shard_size", "trust_remote_code", "allow_external"),
)


def parse_formats(format: str | None, out: str) -> tuple[str, ...]:
    """Return the requested formats, checked against the output."""
    from sca.output.formats import OUTPUT_FORMATS

    if format is None:
        return ("jsonl",)
    formats = tuple(name.strip() for name in format.split(","))
    for name in formats:
        check_option_choice("format", name, OUTPUT_FORMATS)
    if not out:
        raise ValueError(f"--format {format} requires --out; pass an output folder")
    if out == "-" and formats != ("jsonl",):
        raise ValueError(f"--out - writes JSONL only; pass an output folder for {format}")
    return formats


def find_input_images(names: Sequence[str], quiet: bool) -> tuple[list[Path], list[str]]:
    """Find images, except those that `sca` drew.

    Args:
        names: Image files, folders and globs.
        quiet: Print no notes about skipped files.

    Returns:
        The image files, and one message per name without images.
    """
    from sca.io.images import find_images, format_path, is_irregular_file
    from sca.io.run_folder import OutputFilter
    from sca.output.formats import OUTPUT_FORMATS, list_output_patterns

    output_filter = OutputFilter(list_output_patterns(OUTPUT_FORMATS))
    irregular: list[Path] = []

    def is_excluded(path: Path) -> bool:
        irregular.extend([path] if is_irregular_file(path) else [])
        return is_irregular_file(path) or output_filter(path)

    paths, problems = find_images(names, is_excluded)
    if output_filter.skipped_paths and not quiet:
        example = format_path(output_filter.skipped_paths[0])
        print_stderr(f"skipped {len(output_filter.skipped_paths)} images that `sca` wrote, such as {example}")
    for path in irregular if not quiet else ():
        print_stderr(f"skipped {format_path(path)}, which is a pipe or a device, not an image file")
    return paths, problems


def collect_run_settings(command_options: Mapping[str, Any], input_files: Iterable[str | Path]) -> dict[str, Any]:
    """Return the settings that determine the results of a command.

    Args:
        command_options: Arguments and options of the command by name.
        input_files: Files that the command reads, except images.

    Returns:
        The names of the images, the options that change the results, and the hashes of the input files.
    """
    from sca.io.run_folder import compute_file_hash

    options = {
        name: str(value)
        for name, value in command_options.items()
        if name not in UNRECORDED_OPTIONS and value is not False and value not in (None, [], ())
    }
    hashes = {str(path): compute_file_hash(path) for path in input_files}
    return {"images": command_options["images"], **options, "files": hashes}


def report_precision(precision: str | None, captioner: Captioner) -> None:
    """Report on stderr the layers that a precision other than a data type applies to."""
    if precision not in (None, *DTYPES) and (description := getattr(captioner, "precision", None)):
        print_stderr(f"precision {precision}: {description}")


def report_domain(model: str) -> None:
    """Report on stderr the training domain of a model with a narrow one, and the models for photographs."""
    from sca_registry import zoo

    if note := zoo.describe_domain(model):
        print_stderr(note)


def report_prompts(region_source: RegionSource, failures: FailureReporter, quiet: bool) -> None:
    """Report the contents of a prompts file, and its records without a usable prompt."""
    from sca.inference.caption_job import ListedPrompts
    from sca.io.images import format_path

    if not isinstance(region_source, ListedPrompts):
        return
    prompts_file = region_source.region_prompts
    if not quiet:
        unusable = (
            f"; {format_count(len(prompts_file.problems), 'record')} cannot be used" if prompts_file.problems else ""
        )
        num_regions = sum(map(prompts_file.count_regions, prompts_file))
        counts = f"{format_count(num_regions, 'region')}, {format_count(len(prompts_file), 'image')}"
        print_stderr(f"{format_path(prompts_file.path)}: {counts}{unusable}")
        if summary := prompts_file.skip_counter.summarize():
            print_stderr(f"{format_path(prompts_file.path)}: {summary}")
    for problem in prompts_file.problems:
        failures.report(problem, status=2)


class OutOfDistributionImages:
    """Images that are unlike the training images of the model.

    Args:
        results: What is predicted for the images, for the message.
    """

    def __init__(self, results: str = "captions"):
        self.results: str = results
        self.num_scored: int = 0
        self.paths: list[str] = []

    def add(self, path: str, captions: Sequence[Caption]) -> None:
        """Add an image with its captions."""
        if captions and (ood_score := captions[0].ood_score) is not None:
            self.num_scored += 1
            self.paths += [path] if ood_score > 1 else []

    def summarize(self) -> str:
        """Return one line with the first images; "" if there are none."""
        from sca.io.images import format_path

        if not self.paths:
            return ""
        names = ", ".join(map(format_path, self.paths[:MAX_OOD_IMAGES]))
        remaining = f" and {len(self.paths) - MAX_OOD_IMAGES} more" if len(self.paths) > MAX_OOD_IMAGES else ""
        if self.num_scored == 1:
            return f"{names} is unlike the training images, so its {self.results} may be wrong"
        return (
            f"{len(self.paths)} of {self.num_scored:,} images are unlike the training images, so their "
            f"{self.results} may be wrong: {names}{remaining}"
        )


class FailureReporter:
    """Reports failures immediately, and keeps the exit status: 1 for an image, 2 for its prompts."""

    def __init__(self, problems: Iterable[str] = ()):
        self.count: int = 0
        self.status: int = 0
        self.paths: list[Path] = []
        for problem in problems:
            self.report(problem, status=1)
            self.count += 1

    def report(self, problem: str, status: int) -> None:
        """Report a problem that is not the failure of an entire image."""
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
        """Format the paths of images that failed, for the end of a long run."""
        from sca.io.images import format_path

        if not self.paths:
            return ""
        suffix = f" and {len(self.paths) - limit} more" if len(self.paths) > limit else ""
        return f"; not captioned: {', '.join(map(format_path, self.paths[:limit]))}{suffix}"


class ProgressBars:
    """Progress bars on a terminal: for several images, and for the search for regions in one image."""

    def __init__(self, num_images: int, quiet: bool):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        name_column, rate_column = TextColumn("{task.description}"), TextColumn("{task.fields[rate]}")
        self.progress: Progress = Progress(
            *(name_column, BarColumn(), MofNCompleteColumn(), rate_column, TimeRemainingColumn()),
            console=console,
            disable=quiet or not console.is_terminal,
            transient=True,
            redirect_stdout=False,
        )
        self.image_task: TaskID = self.progress.add_task("images", total=num_images, visible=num_images > 1, rate="")
        self.search_task: TaskID = self.progress.add_task("points", visible=False, rate="")

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
