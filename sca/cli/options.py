"""What commands share: choices that are checked, and words for the terminal."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sca.devices import DEVICE_EXAMPLES, DTYPES
from sca.io.json import DESCRIPTOR_PATH_PATTERN
from sca.io.terminal import DOCUMENT_WHITESPACE
from sca.io.text import UNSAFE_PATTERN, escape_terminal

if TYPE_CHECKING:
    from sca.io.terminal import Table

TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Allow a checkpoint to run code; only for authors that you trust."),
]
AllowExternal = Annotated[
    bool,
    typer.Option(
        "--allow-external",
        help="Allow a checkpoint to refer to files outside its folder, other repositories and URLs; not to run code.",
    ),
]
ImagePrefix = Annotated[
    str,
    typer.Option(
        "--image-prefix",
        help="Prefix of Label Studio's image URLs, such as '/data/local-files/?d='.",
    ),
]
Device = Annotated[str, typer.Option(help=DEVICE_EXAMPLES)]
Seed = Annotated[int, typer.Option(help="for whatever is drawn at random", min=0, max=2**32 - 1)]
ModelName = Annotated[
    str, typer.Option(help="a zoo name, a checkpoint, or a captioner: '[ENCODER+]NAME [key=value]...'")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of a table")]
Metrics = Annotated[
    str | None, typer.Option(help="names with commas between them (default: all that find what they need)")
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(help="Name accepted in the Host header, besides this machine's own and IP addresses; * for all."),
]
STDIN_PATH = "/dev/stdin"
OUTPUT_FORMATS_HELP = "jsonl,coco,parquet,geojson,label-studio,labelme,png,html"


def parse_input_path(text: str) -> Path:
    """Parse the name of a file to read; `-` is standard input."""
    return Path(STDIN_PATH if text == "-" else text)


def check_pipes(paths: Sequence[str | Path]) -> None:
    """Refuse to read a pipe, such as standard input, twice.

    Raises:
        ValueError: If a pipe is named twice.
    """
    for path, count in Counter(str(path) for path in paths if DESCRIPTOR_PATH_PATTERN.fullmatch(str(path))).items():
        if count > 1:
            raise ValueError(f"{path} is named {count} times, and a pipe can be read once; save it to a file")


def check_option_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Raises RegistryError, with the closest choice, unless the value is one of them."""
    if value not in choices:
        from sca_registry.errors import make_unknown_name_error

        raise make_unknown_name_error(f"no {option} {value!r}", value, choices)


def check_dtype(dtype: str | None) -> str | None:
    """Return a data type of weights; raises RegistryError, with the closest, for another one."""
    if dtype:
        check_option_choice("dtype", dtype, DTYPES)
    return dtype


Dtype = Annotated[str | None, typer.Option(help=f"{' or '.join(DTYPES)} (default: the model's)", callback=check_dtype)]


def parse_part_options(kind: str, name: str, assignments: Sequence[str]) -> dict[str, Any]:
    """The `key=value` options of one part, by its kind and name."""
    from sca_registry import get_registry
    from sca_registry.overrides import parse_assignments

    return parse_assignments(assignments, partial(get_registry(kind).is_text_option, name))


def print_stderr(message: str) -> None:
    """One line on standard error."""
    print(escape_terminal(f"sca: {' '.join(message.split())}"), file=sys.stderr, flush=True)


def print_line(text: str) -> None:
    """Print one line on standard output, safe for a terminal."""
    print(escape_terminal(text), flush=True)


def print_document(text: str) -> None:
    """Print several lines on standard output, safe for a terminal."""
    print(escape_terminal(text, DOCUMENT_WHITESPACE), flush=True)


def print_json(value: Any) -> None:
    r"""Print JSON on standard output: the exact value, with \u escapes for what a terminal would act on."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    print(
        re.sub(UNSAFE_PATTERN, lambda match: match[0] if match[0] == "\n" else f"\\u{ord(match[0]):04x}", text),
        flush=True,
    )


def print_table(table: Table) -> None:
    """Print a table on standard output; where that is no terminal, lines are wide enough to be searched."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 200)
    with console.capture() as captured:
        console.print(table)
    print(captured.get(), end="", flush=True)
