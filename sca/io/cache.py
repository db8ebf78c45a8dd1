"""Cache folder of this package."""

from __future__ import annotations

import os
from pathlib import Path


def get_cache_folder() -> Path:
    """Return `SCA_CACHE`, or `sca` in the user's cache folder by default."""
    if configured := os.environ.get("SCA_CACHE"):
        return Path(configured)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "sca"
