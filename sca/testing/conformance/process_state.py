"""What a process has one of, and a part has to leave alone."""

from __future__ import annotations

import logging
import os
import random
import warnings
from typing import Any

import numpy
import torch

WARNING_FILTERS, ENVIRONMENT, RANDOM_STATE = "the filters of warnings", "the environment", "Python's random state"
CHANGED_BY_IMPORTS = (WARNING_FILTERS, ENVIRONMENT, RANDOM_STATE)  # what large packages change when they are imported


def capture_process_state() -> dict[str, Any]:
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
        "the working folder": os.getcwd(),
        RANDOM_STATE: random.getstate(),
        "numpy's random state": numpy.random.get_state()[1].tolist(),
    }
