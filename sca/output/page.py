"""What pages of results share: one file, offline, in which nothing runs or loads but what is written here."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable
from html import escape
from pathlib import Path

from PIL import Image

from sca.io.errors import OutputError
from sca.io.images import show
from sca.io.run_folder import check_not_inputs

SIDE = 2048  # a larger picture is shown at this many pixels on its longest side
SHARP = 256  # up to this side a picture is kept as PNG and shown in plain pixels
GENERATOR = '<meta name="generator" content="segment-caption-anything">'  # what we wrote, we may replace
FOOT = "</body>\n</html>\n"


def head(title: str, style: str, script: str = "") -> str:
    """The page up to its body. Its policy allows this style, this script and embedded pictures: whatever a caption
    says, nothing else runs or loads.
    """
    scripts = f"; script-src {_hash(script)}" if script else ""
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}{scripts}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{GENERATOR}
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{style}</style>
</head>
<body>
"""


def check_page(path: Path, inputs: Iterable[str | Path]) -> None:
    """Refuse to write a page over an input, or over a file that is not a page of ours.

    Raises:
        OutputError: One line with the path and what to do.
    """
    check_not_inputs([path], inputs)
    if not path.is_file():
        return
    with path.open("rb") as file:
        is_ours = GENERATOR.encode() in file.read(4096)
    if not is_ours:
        raise OutputError(f"{show(path)} exists and is not a page that `sca` wrote; choose another --out")


def data_uri(image: Image.Image, side: int = SIDE) -> str:
    """The picture, at most `side` pixels wide and high: PNG for a small one, else JPEG."""
    image = image.convert("RGB")
    image.thumbnail((side, side))
    content = io.BytesIO()
    kind = "png" if max(image.size) <= SHARP else "jpeg"
    image.save(content, kind, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode('ascii')}"


def text(value: str) -> str:
    """Text for an element or a quoted attribute; control characters, which HTML does not have, become spaces."""
    return escape("".join(c if c.isprintable() or c == "\n" else " " for c in value))


def _hash(content: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() + "'"
