"""What is known of parts that have been used, kept between runs so that a listing can tell without importing them.

The cache is a convenience: whatever is wrong with the file or the folder, nothing fails, and this process still
remembers what it saw itself. Two processes at once may lose one another's last verdict and never damage the file.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

_seen: dict[str, Verdict] = {}


class Verdict(NamedTuple):
    """How the last use of a part ended."""

    state: str  # "ok", "broken", or "needs extra: NAME"
    reason: str = ""
    built: bool = False  # whether it was built, rather than only imported


def cache_folder() -> Path:
    """`SCA_CACHE`, else `sca` in the user's cache folder."""
    if chosen := os.environ.get("SCA_CACHE"):
        return Path(chosen)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "sca"


def read_verdicts() -> dict[str, Verdict]:
    """Every verdict by its key, what this process saw itself foremost."""
    return {**_stored(), **_seen}


def write_verdict(key: str, verdict: Verdict, keep: bool = True) -> None:
    """Remembers a verdict here and, if it is to be kept and the folder can be written, for later runs."""
    _seen[key] = verdict
    stored = _stored()
    if keep and stored.get(key) != verdict:
        with contextlib.suppress(OSError, RuntimeError):  # no home, no room, no permission: then not kept
            _replace(_file(), {**stored, key: verdict})


def _file() -> Path:
    return cache_folder() / "verdicts.json"


def _stored() -> dict[str, Verdict]:
    import json

    try:
        content = json.loads(_file().read_text("utf-8"))
        return {key: Verdict(str(state), str(reason), bool(built)) for key, (state, reason, built) in content.items()}
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError):  # absent, unreadable, or not ours
        return {}


def _replace(file: Path, verdicts: dict[str, Verdict]) -> None:
    import json
    import tempfile

    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with open(handle, "w", encoding="utf-8") as stream:
            json.dump(verdicts, stream, indent=1)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
