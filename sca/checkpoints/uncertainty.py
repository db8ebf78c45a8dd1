"""uncertainty.json: calibrations and training domain of a checkpoint, written by `sca calibrate`.

    {"format": 1,
     "weights_hash": ...,                                               the weights that the file belongs to
     "calibrations": {TASK: {PROMPT_KIND: {"slope": ..., "intercept": ...}}},
     "domain": {"mean": [...], "scale": [...], "components": [[...], ...], "variances": [...],
                "residual_variance": ..., "threshold": ...}}            null if it was not measured

The file is untrusted: every value is checked when it is read, and a file of other weights is rejected. Values that
would be rejected are not written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sca_registry.contracts import TASKS
from torch import Tensor

from sca.checkpoints.layout import UNCERTAINTY_FILE
from sca.io.atomic import write_file
from sca.io.errors import InputError
from sca.io.json import read_json
from sca.io.validation import check_object, is_finite_number, read_field, require_key
from sca.io.weight_files import hash_tensors
from sca.uncertainty import MAX_COMPONENTS, Calibration, Domain, Uncertainty

UNCERTAINTY_FORMAT = 1
MAX_UNCERTAINTY_BYTES = 4 * 2**20
MAX_MAGNITUDE = 1e6  # limit of any number, far above those of real models
MIN_POSITIVE = 1e-12
RECALIBRATE_HINT = f"run `sca calibrate` again, or delete {UNCERTAINTY_FILE}"
SIGNIFICANT_DIGITS = 5
COMPONENT_DIGITS = 3  # of the principal components, which are most of the file
PROMPT_KINDS = (
    *("box", "point", "points", "mask"),
    *("box-and-point", "box-and-points", "box-and-mask", "point-and-mask", "points-and-mask"),
    *("box-and-point-and-mask", "box-and-points-and-mask"),
)


def hash_as_float32(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors after conversion of the floating-point ones to float32.

    The hash of weights that are stored in float16 or bfloat16 is therefore that of the loaded model.

    Args:
        tensors: Tensors by name.

    Returns:
        The hash in hexadecimal.
    """
    return hash_tensors({name: each.float() if each.is_floating_point() else each for name, each in tensors.items()})


def write_uncertainty(uncertainty: Uncertainty, folder: Path) -> None:
    """Write the uncertainty of a checkpoint to its folder.

    Args:
        uncertainty: Calibrations and domain, measured for the weights in the folder.
        folder: Checkpoint folder.

    Raises:
        InputError: `read_uncertainty` would reject the file, because a value is out of range or the file is too large.
        OutputError: The file cannot be written.
    """
    write_file(folder / UNCERTAINTY_FILE, serialize_uncertainty(uncertainty))


def serialize_uncertainty(uncertainty: Uncertainty) -> str:
    """Return the content of the file of an uncertainty.

    Args:
        uncertainty: Calibrations and domain.

    Returns:
        The content of uncertainty.json.

    Raises:
        InputError: `read_uncertainty` would reject it, because a value is out of range or the file is too large.
    """
    calibrations: dict[str, dict[str, Any]] = {}
    for (task, kind), calibration in uncertainty.calibrations.items():
        values = {name: _round_value(value) for name, value in vars(calibration).items()}
        calibrations.setdefault(task, {})[kind] = values
    table = {
        "format": UNCERTAINTY_FORMAT,
        "weights_hash": uncertainty.weights_hash,
        "calibrations": calibrations,
        "domain": None if uncertainty.domain is None else _domain_to_dict(uncertainty.domain),
    }
    content = f"{json.dumps(table, separators=(',', ':'))}\n"
    if len(content) > MAX_UNCERTAINTY_BYTES:
        raise InputError(
            f"the measured uncertainty has {len(content):,} bytes, and {UNCERTAINTY_FILE} at most "
            f"{MAX_UNCERTAINTY_BYTES:,}; pass --no-ood to `sca calibrate`"
        )
    num_features = 0 if uncertainty.domain is None else len(uncertainty.domain.mean)
    try:
        _parse_uncertainty(table, num_features, "the measured uncertainty")
    except InputError as error:
        raise InputError(f"{error}; use more images, or pass --no-ood to `sca calibrate`") from error
    return content


def read_uncertainty(folder: Path, tensors: Mapping[str, Tensor], num_channels: int) -> Uncertainty | None:
    """Read the uncertainty of a checkpoint.

    Args:
        folder: Checkpoint folder.
        tensors: Weights in the folder.
        num_channels: Channels of the features of its encoder.

    Returns:
        Calibrations and domain; None if they were not measured.

    Raises:
        InputError: The file is damaged, belongs to other weights, or does not fit the model.
    """
    path = folder / UNCERTAINTY_FILE
    try:
        table = read_json(path, MAX_UNCERTAINTY_BYTES, require_finite=True)
    except FileNotFoundError:
        return None
    except InputError as error:
        problem = str(error).removeprefix(str(path)).partition("; ")[0]  # without the fix of any JSON file
        raise InputError(f"{path}{problem}; {RECALIBRATE_HINT}") from error
    try:
        uncertainty = _parse_uncertainty(table, 2 * num_channels, str(path))
    except InputError as error:
        raise InputError(f"{error}; {RECALIBRATE_HINT}") from error
    if uncertainty.weights_hash != hash_as_float32(tensors):
        raise InputError(f"{path} was measured with other weights; {RECALIBRATE_HINT}")
    return uncertainty


def _parse_uncertainty(table: Any, num_features: int, location: str) -> Uncertainty:
    """Parse the content of the file of a model whose pooled features have `num_features` values."""
    table = check_object(table, location)
    if table.get("format") != UNCERTAINTY_FORMAT:
        raise InputError(f"{location} has the format {table.get('format')!r:.80}, expected {UNCERTAINTY_FORMAT}")
    weights_hash = read_field(table, "weights_hash", str, location)
    calibrations = _parse_calibrations(require_key(table, "calibrations", location), f"{location}, 'calibrations'")
    domain = require_key(table, "domain", location)
    if domain is not None:
        domain = _parse_domain(domain, num_features, f"{location}, 'domain'")
    return Uncertainty(calibrations, domain, weights_hash)


def _parse_calibrations(table: Any, location: str) -> dict[tuple[str, str], Calibration]:
    calibrations = {}
    for task, task_table in check_object(table, location).items():
        for kind, values in check_object(task_table, f"{location}, {task!r:.80}").items():
            if task not in TASKS or kind not in PROMPT_KINDS:
                raise InputError(f"{location} has the unknown task or prompt {task!r:.40}, {kind!r:.40}")
            subject = f"{location}, {task!r}, {kind!r}"
            slope = _read_number(values, "slope", subject, minimum=MIN_POSITIVE)
            calibrations[task, kind] = Calibration(slope, _read_number(values, "intercept", subject))
    return calibrations


def _parse_domain(table: Any, num_features: int, location: str) -> Domain:
    components = read_field(table, "components", list, location)
    if not 1 <= len(components) <= MAX_COMPONENTS:
        raise InputError(f"{location} has {len(components)} components, expected 1 to {MAX_COMPONENTS}")
    rows = [
        _parse_vector(row, num_features, f"{location}, 'components'[{index}]") for index, row in enumerate(components)
    ]
    return Domain(
        mean=_read_vector(table, "mean", num_features, location),
        scale=_read_vector(table, "scale", num_features, location, minimum=MIN_POSITIVE),
        components=torch.stack(rows),
        variances=_read_vector(table, "variances", len(rows), location, minimum=MIN_POSITIVE),
        residual_variance=_read_number(table, "residual_variance", location, minimum=MIN_POSITIVE),
        threshold=_read_number(table, "threshold", location, minimum=MIN_POSITIVE),
    )


def _read_number(record: Any, key: str, location: str, minimum: float = -MAX_MAGNITUDE) -> float:
    value = require_key(record, key, location)
    _check_number(f"{location}, {key!r}", value, minimum)
    return float(value)


def _read_vector(
    record: Any, key: str, length: int, location: str, minimum: float = -MAX_MAGNITUDE
) -> Tensor:  # (length,)
    return _parse_vector(require_key(record, key, location), length, f"{location}, {key!r}", minimum)


def _parse_vector(values: Any, length: int, subject: str, minimum: float = -MAX_MAGNITUDE) -> Tensor:  # (length,)
    if not isinstance(values, list) or len(values) != length:
        description = f"{len(values)} numbers" if isinstance(values, list) else f"{values!r:.80}"
        raise InputError(f"{subject} is {description}, expected {length} numbers for this model")
    for value in values:
        _check_number(subject, value, minimum)
    return torch.tensor(values, dtype=torch.float64)


def _check_number(subject: str, value: Any, minimum: float) -> None:
    if not is_finite_number(value) or not minimum <= value <= MAX_MAGNITUDE:
        raise InputError(f"{subject} contains {value!r:.80}, expected numbers from {minimum:g} to {MAX_MAGNITUDE:g}")


def _domain_to_dict(domain: Domain) -> dict[str, Any]:
    values = {name: each.tolist() if isinstance(each, Tensor) else each for name, each in vars(domain).items()}
    rounded = {name: _round_value(value) for name, value in values.items()}
    return rounded | {"components": _round_value(values["components"], COMPONENT_DIGITS)}


def _round_value(value: Any, digits: int = SIGNIFICANT_DIGITS) -> Any:
    """Round a number, or the numbers of nested lists, to significant digits."""
    return [_round_value(each, digits) for each in value] if isinstance(value, list) else float(f"{value:.{digits}g}")
