"""The process that does a task: it logs to the task's folder and leaves what the job gave, whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from sca.io.atomic import write_file
from sca.launchers.interrupts import accept_interrupts

LOG, MADE = "log.txt", "made.json"


def child(job: str, config: Mapping[str, Any], folder: str) -> None:
    _end_with_parent()
    os.setsid()
    accept_interrupts()
    with open(Path(folder, LOG), "ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    module, _, function = job.partition(":")
    made = getattr(import_module(module), function)(config, folder)
    Path(folder).mkdir(parents=True, exist_ok=True)  # somebody may have tidied up meanwhile
    write_file(Path(folder, MADE), json.dumps(made))
    sys.stdout.flush()
    os._exit(0)  # threads of a library may not let go


def _end_with_parent() -> None:
    """The process is killed when the one that it was forked from ends, so that no task outlives its launcher."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() == 1:
            os._exit(0)
