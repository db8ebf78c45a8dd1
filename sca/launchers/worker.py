"""Worker process of a task: writes the log and, atomically, the result to the folder of the task."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sca.io.atomic import write_file
from sca.launchers.signals import accept_interrupts

LOG_FILE, RESULT_FILE = "log.txt", "result.json"


def run_task(function: str, config: Mapping[str, Any], folder: str) -> None:
    """Run a task in this process, write its result, and exit.

    Standard output and error are redirected to the log. The process is killed when its parent ends.

    Args:
        function: "module:function".
        config: First argument of the function.
        folder: Second argument of the function: the folder of the task.
    """
    _exit_with_parent()
    os.setsid()
    accept_interrupts()
    with open(Path(folder, LOG_FILE), "ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    tqdm.set_lock(threading.RLock())  # instead of a semaphore of all processes, which `os._exit` would leak
    module_name, _, function_name = function.partition(":")
    result = getattr(import_module(module_name), function_name)(config, folder)
    Path(folder).mkdir(parents=True, exist_ok=True)  # in case it was deleted meanwhile
    write_file(Path(folder, RESULT_FILE), json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # do not wait for threads of libraries


def _exit_with_parent() -> None:
    """Kill this process when its parent ends, so that no task outlives its launcher."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() == 1:
            os._exit(0)
