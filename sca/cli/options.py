"""Options shared by several commands, their checks, and printing to the terminal."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from sca.devices import PRECISIONS
from sca.io.json import DESCRIPTOR_PATH_PATTERN
from sca.io.terminal import DOCUMENT_WHITESPACE
from sca.io.text import UNSAFE_PATTERN, escape_terminal

if TYPE_CHECKING:
    from sca.io.terminal import Table

TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Allow checkpoints to run their own code. Use only for checkpoints from authors you trust.",
        rich_help_panel="Security",
    ),
]
AllowExternal = Annotated[
    bool,
    typer.Option(
        "--allow-external",
        help="Allow checkpoints to load files from outside their folder, from other repositories and from URLs. "
        "Does not let them run code.",
        rich_help_panel="Security",
    ),
]
ImagePrefix = Annotated[
    str,
    typer.Option(
        "--image-prefix",
        help="URL prefix for the images in Label Studio files, such as '/data/local-files/?d='.",
        rich_help_panel="Output",
    ),
]
Device = Annotated[str, typer.Option(help="Device: cpu, cuda, cuda:1 or mps.", rich_help_panel="Model")]
Seed = Annotated[int, typer.Option(help="Random seed.", min=0, max=2**32 - 1, rich_help_panel="Runtime")]
ModelName = Annotated[
    str,
    typer.Option(
        help="Model to use: a name from `sca list models`, a checkpoint folder, or a captioner written as "
        "'[ENCODER+]NAME [key=value]...', such as sam-vit-b+blip-base.",
        rich_help_panel="Model",
    ),
]
YOLO_HELP = "yolo contains boxes and class names only."
OUTPUT_FORMATS_HELP = "jsonl, coco, parquet, geojson, label-studio, labelme, cvat, fiftyone, yolo, png, html"
Out = Annotated[
    str, typer.Option(help="Output folder. Use - to write JSONL to standard output.", rich_help_panel="Output")
]
Format = Annotated[
    str | None,
    typer.Option(
        help=f"Output formats for --out, comma-separated: {OUTPUT_FORMATS_HELP}. {YOLO_HELP}  [default: jsonl]",
        show_default=False,
        rich_help_panel="Output",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the existing run in --out.", rich_help_panel="Output")
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", help="Suppress progress and notes and, with --out, the table.", rich_help_panel="Output"),
]
ImageBatchSize = Annotated[int, typer.Option(help="Images per encoder batch.", min=1, rich_help_panel="Runtime")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.", rich_help_panel="Output")]
Metrics = Annotated[
    str | None,
    typer.Option(
        help="Metrics, comma-separated. Defaults to all metrics that the data supports.", rich_help_panel="Metrics"
    ),
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(help="Additional Host header to accept; * accepts any. Repeatable.", rich_help_panel="Network"),
]
Host = Annotated[str, typer.Option(help="Address to bind. Use 0.0.0.0 for all interfaces.", rich_help_panel="Network")]
MaxPixels = Annotated[int, typer.Option(help="Maximum number of pixels per image.", min=1, rich_help_panel="Limits")]
METRIC_OPTIONS_HELP = "Metric options, such as references=first, tokenizer=plain or semantic.model=FOLDER."
STDIN_PATH = "/dev/stdin"
MIN_FILE_WIDTH = 200  # columns of a table that is not printed to a terminal
TYPE_NAMES = {"str": "TEXT", "int": "INTEGER", "float": "NUMBER", "path": "PATH"}
TYPE_PATTERN = re.compile(r"<(?:list\[)?(str|int|float|path)(?: range)?\]?>", re.IGNORECASE)


class PanelCommand(TyperCommand):
    """Command whose help lists the options of each panel in a section of its own, in plain text.

    Arguments are shown in capitals, such as `IMAGE...`, and types as TEXT, INTEGER, NUMBER or PATH.
    """

    def get_params(self, ctx: Any) -> list[Any]:
        parameters: list[Any] = super().get_params(ctx)
        defer_validation(parameters)
        return parameters

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments = [each for each in self.get_params(ctx) if each.param_type_name == "argument"]
        return [*([self.options_metavar] if self.options_metavar else []), *map(_format_argument, arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                is_argument = parameter.param_type_name == "argument"
                title = getattr(parameter, "rich_help_panel", None) or ("Arguments" if is_argument else "Options")
                name = _format_argument(parameter) if is_argument else TYPE_PATTERN.sub(_format_type, record[0])
                sections.setdefault(title, []).append((name, record[1]))
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def defer_validation(parameters: Iterable[Any]) -> None:
    """Let typer validate only values that can be invalid, because its validators import pydantic.

    Args:
        parameters: Parameters of a command.
    """
    for parameter in parameters:
        descriptor = getattr(parameter, "type_descriptor", None)  # of versions of typer that use pydantic
        parameter_info = getattr(descriptor, "parameter_info", None)
        if parameter_info is not None and not (parameter.multiple or parameter.nargs == -1):
            is_text = getattr(descriptor, "annotation", None) is str and parameter_info.parser is None
            parameter.get_runtime_param = partial(_DeferredValidator, parameter, is_text)


class _DeferredValidator:
    """Validator of a parameter: that of typer, except for a missing value and ASCII text, which are always valid.

    Args:
        parameter: Parameter of typer.
        is_text: Whether the value is a string.
    """

    def __init__(self, parameter: Any, is_text: bool):
        self.parameter = parameter
        self.is_text = is_text

    def coerce(self, value: Any, **context: Any) -> Any:
        if value is None or (self.is_text and value.isascii()):
            return value
        return type(self.parameter).get_runtime_param(self.parameter).coerce(value, **context)


def _format_argument(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    if name.endswith("..."):  # describes all its values
        return name
    return (name if argument.required else f"[{name}]") + ("..." if argument.nargs != 1 else "")


def _format_type(match: re.Match[str]) -> str:
    return TYPE_NAMES[match[1].lower()]


def parse_input_path(text: str) -> Path:
    """Parse the name of an input file; `-` is standard input."""
    return Path(STDIN_PATH if text == "-" else text)


def check_pipes(paths: Sequence[str | Path]) -> None:
    """Check that no pipe, such as standard input, would be read twice.

    Args:
        paths: All input paths of a command.

    Raises:
        ValueError: A pipe is named twice.
    """
    for path, count in Counter(str(path) for path in paths if DESCRIPTOR_PATH_PATTERN.fullmatch(str(path))).items():
        if count > 1:
            raise ValueError(f"{path} is given {count} times, but a pipe can be read only once; save it to a file")


def check_option_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Raise RegistryError, with the closest choice, unless the value is one of the choices."""
    if value not in choices:
        from sca_registry.errors import make_unknown_name_error

        raise make_unknown_name_error(f"unknown {option} {value!r}", value, choices)


def check_precision(precision: str | None) -> str | None:
    """Check and return a precision; raise RegistryError, with the closest one, if it is unknown."""
    if precision is not None:
        check_option_choice("precision", precision, PRECISIONS)
    return precision


def check_zoom_option(value: str) -> str:
    """Check and return a value of --zoom; raise ValueError unless it is auto, off or a number above 0."""
    from sca.inference.zoom_options import check_zoom

    check_zoom(value)
    return value


Precision = Annotated[
    str | None,
    typer.Option(
        help="Precision of the model: float32, bfloat16, float16, int8 (linear layers, on a CPU) or auto (the fastest "
        "on this device). Defaults to the checkpoint's.",
        callback=check_precision,
        rich_help_panel="Model",
    ),
]


Images = Annotated[
    list[str],
    typer.Argument(help="Image files, folders or quoted globs. Use - for standard input.", metavar="IMAGE"),
]
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        parser=parse_input_path,
        metavar="PATH",
        help="Prompts file: COCO, Label Studio, LabelMe or JSONL, or a folder of LabelMe files.",
        rich_help_panel="Prompts",
    ),
]
PointsPerSide = Annotated[
    int | None,
    typer.Option(help="Points per side of the prompt grid.", min=1, max=1000, rich_help_panel="Everything mode"),
]
PredIouThresh = Annotated[
    float | None,
    typer.Option(help="Minimum predicted IoU of a mask.", min=0, max=1, rich_help_panel="Everything mode"),
]
Zoom = Annotated[
    str,
    typer.Option(
        help="Predict small regions from crops of the image: auto (up to the measured size of the model), off, or the "
        "maximum area of these regions in cells of the feature grid.",
        metavar="auto|off|N",
        callback=check_zoom_option,
        rich_help_panel="Regions",
    ),
]


def parse_component_options(kind: str, name: str, assignments: Sequence[str]) -> dict[str, Any]:
    """Parse the `key=value` options of one component, by its kind and name."""
    from sca_registry import get_registry
    from sca_registry.overrides import parse_assignments

    return parse_assignments(assignments, partial(get_registry(kind).is_text_option, name))


def parse_evaluation_options(
    assignments: Sequence[str],
    dataset: str | None = None,
    proposer: str | None = None,
    table_names: Sequence[str] = ("generation", "proposer"),
) -> dict[str, Any]:
    """Parse `key=value` options and group them: dataset, metrics, or one of `table_names` (kind.key=value).

    Args:
        assignments: `key=value` options.
        dataset: Name of the dataset, to read the options that are strings without quotes.
        proposer: Name of the proposer, for the same purpose.
        table_names: Prefixes of options that form a group.

    Returns:
        Options by group: "dataset", "scores" and each of `table_names`.

    Raises:
        ValueError: An option is malformed.
    """
    from sca_registry import datasets, metrics, proposers
    from sca_registry.overrides import parse_assignment

    from sca.evaluation.scoring import SHARED_OPTIONS

    def is_text(path: tuple[str, ...]) -> bool:
        *parents, option = path
        match parents:
            case [] | ["dataset"]:
                return dataset is not None and datasets.is_text_option(dataset, option)
            case ["proposer"]:
                return proposer is not None and proposers.is_text_option(proposer, option)
            case [metric]:
                return metrics.is_text_option(metric, option)
        return False

    options_by_table: dict[str, Any] = {kind: {} for kind in ("dataset", "scores", *table_names)}
    for assignment in assignments:
        path, value = parse_assignment(assignment, is_text)
        if len(path) == 2 and path[0] in table_names:
            options_by_table[path[0]][path[1]] = value
        elif len(path) == 2 or path[0] in SHARED_OPTIONS:
            options_by_table["scores"][".".join(path)] = value
        elif len(path) == 1:
            options_by_table["dataset"][path[0]] = value
        else:
            raise ValueError(f"{assignment!r} is not an option; write option=value, or metric.option=value")
    return options_by_table


def split_names(names: str) -> list[str]:
    """Split comma-separated names."""
    return [name for each in names.split(",") if (name := each.strip())]


def print_stderr(message: str) -> None:
    """Print one line on standard error."""
    print(escape_terminal(f"sca: {' '.join(message.split())}"), file=sys.stderr, flush=True)


def print_line(text: str) -> None:
    """Print one line on standard output, safe for a terminal."""
    print(escape_terminal(text), flush=True)


def print_document(text: str) -> None:
    """Print several lines on standard output, safe for a terminal."""
    print(escape_terminal(text, DOCUMENT_WHITESPACE), flush=True)


def print_json(value: Any) -> None:
    r"""Print JSON on standard output: exact values, with \u escapes for characters that a terminal would interpret."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    print(
        re.sub(UNSAFE_PATTERN, lambda match: match[0] if match[0] == "\n" else f"\\u{ord(match[0]):04x}", text),
        flush=True,
    )


def print_table(table: Table) -> None:
    """Print a table on standard output; without a terminal, it is at least 200 columns wide for searching."""
    if not table.has_frame:
        width = shutil.get_terminal_size().columns
        width = width if sys.stdout.isatty() else max(width, MIN_FILE_WIDTH)
        print("\n".join(table.format_lines(width)), flush=True)
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, MIN_FILE_WIDTH)
    with console.capture() as captured:
        console.print(table)
    print(captured.get(), end="", flush=True)
