"""Results of the studies as JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sca.io.atomic import write_file


def write_results(results: Mapping[str, Any], out: Path | None) -> None:
    """Write results to a JSON file in a folder, which is created; None writes nothing."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, json.dumps(results, indent=1))
