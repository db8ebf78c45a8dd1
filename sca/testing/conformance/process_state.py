"""Global state of the process, which components must not change."""

from __future__ import annotations

import logging
import os
import random
import warnings
from typing import Any

import numpy
import torch

WARNING_FILTERS, ENVIRONMENT, RANDOM_STATE = "the filters of warnings", "the environment", "Python's random state"
CHANGED_BY_IMPORTS = (WARNING_FILTERS, ENVIRONMENT, RANDOM_STATE)  # changed by imports of large packages


def capture_process_state() -> dict[str, Any]:
    """Capture global settings of torch, logging, warnings, the environment and random generators."""
    numpy_state: Any = numpy.random.get_state()
    return {
        "torch's default dtype": str(torch.get_default_dtype()),
        "torch's number of threads": torch.get_num_threads(),
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's determinism": torch.are_deterministic_algorithms_enabled(),
        "torch's precision of matrix products": torch.get_float32_matmul_precision(),
        "torch's benchmark mode": torch.backends.cudnn.benchmark,
        "the root logger": (list(logging.root.handlers), logging.root.level),
        WARNING_FILTERS: list(warnings.filters),
        ENVIRONMENT: dict(os.environ),
        "the current directory": os.getcwd(),
        RANDOM_STATE: random.getstate(),
        "numpy's random state": numpy_state[1].tolist(),
    }
