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
from sca.launchers.signals import accept_interrupts

LOG_FILE, RESULT_FILE = "log.txt", "made.json"


def run_task(job: str, config: Mapping[str, Any], folder: str) -> None:
    _exit_with_parent()
    os.setsid()
    accept_interrupts()
    with open(Path(folder, LOG_FILE), "ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    module_name, _, function_name = job.partition(":")
    result = getattr(import_module(module_name), function_name)(config, folder)
    Path(folder).mkdir(parents=True, exist_ok=True)  # somebody may have tidied up meanwhile
    write_file(Path(folder, RESULT_FILE), json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # threads of a library may not let go


def _exit_with_parent() -> None:
    """The process is killed when the one that it was forked from ends, so that no task outlives its launcher."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() == 1:
            os._exit(0)
