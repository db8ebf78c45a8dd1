"""HTML pages from Jinja2 templates: self-contained files that load nothing and run only their own script."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from sca.io.errors import OutputError
from sca.io.images import format_path
from sca.io.run_folder import check_not_inputs
from sca.output.colors import REGION_COLORS

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_EMBEDDED_SIDE = 1024  # longest side of an embedded image in pixels; larger images are resized
MAX_PIXELATED_SIDE = 256  # longest side of images that are embedded as PNG and shown without smoothing
GENERATOR_TAG = '<meta name="generator" content="segment-caption-anything">'  # marks pages that may be replaced


def render_template(template: str, package: str = "sca.output", **values: Any) -> str:
    """Render a template of a package; every page extends `page.html` of this package.

    Strings are escaped, and control characters, which HTML does not allow, become spaces.

    Args:
        template: File name in the package's folder `templates`, which also contains its CSS and JavaScript.
        package: Import name of the package.
        **values: Variables of the template.

    Returns:
        The rendered page.
    """
    return _get_environment(package).get_template(template).render(values)


@cache
def _get_environment(package: str) -> Environment:
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("sca.output")]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: (
            value if hasattr(value, "__html__") or not isinstance(value, str) else replace_unprintable(value)
        ),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["csp_hash"] = lambda content: Markup(_compute_csp_hash(content))
    environment.globals |= {"generator": Markup(GENERATOR_TAG), "region_colors": REGION_COLORS}
    return environment


def replace_unprintable(value: str) -> str:
    """Replace characters that HTML cannot display by spaces: control characters and lone surrogates."""
    return value if value.isprintable() else "".join(c if c.isprintable() or c == "\n" else " " for c in value)


def check_page_path(path: Path, inputs: Iterable[str | Path]) -> None:
    """Check that a page does not overwrite an input, or a file that `sca` did not write.

    Args:
        path: Path of the page.
        inputs: Input files of the command.

    Raises:
        OutputError: The page must not be written; the message contains the path and the fix.
    """
    check_not_inputs([path], inputs)
    if not path.is_file():
        return
    with path.open("rb") as file:
        is_generated = GENERATOR_TAG.encode() in file.read(4096)
    if not is_generated:
        raise OutputError(f"{format_path(path)} exists and is not a page written by `sca`; choose another --out")


def encode_data_uri(image: Image.Image, max_side: int = MAX_EMBEDDED_SIDE) -> str:
    """Encode an image, resized to at most `max_side` pixels, as a data URI: PNG for a small one, else JPEG."""
    image = image.convert("RGB")
    image.thumbnail((max_side, max_side))
    content = io.BytesIO()
    file_type = "png" if max(image.size) <= MAX_PIXELATED_SIDE else "jpeg"
    image.save(content, file_type, quality=88)
    return f"data:image/{file_type};base64,{base64.b64encode(content.getvalue()).decode('ascii')}"


def _compute_csp_hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
