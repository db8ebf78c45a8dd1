"""Conformance checks of metrics."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Any

from sca_registry.contracts import TASKS, MetricOutput

from sca.evaluation.records import describe_missing_needs
from sca.io.errors import InputError
from sca.testing.conformance.checks import DoesNotApply, register_check
from sca.testing.conformance.harnesses import ComponentHarness

RECORD_FIELDS = (
    *("index", "image_id", "region_id", "task", "control", "prompt", "caption", "score"),
    *("mask", "predicted_iou", "truth"),
    *("proposals", "judgments", "image"),  # dense captioning; stored judge results; a separate argument
)
TRUTH_FIELDS = ("name", "phrases", "attributes", "mask", "box", "area", "regions")
EMPTY_RLE = {"size": [32, 48], "counts": "`T1P1"}  # an empty mask


def make_example_records() -> list[dict[str, Any]]:
    """Return prediction records of two regions of one image for both tasks, as written by `sca evaluate`."""
    ground_truth = {
        "name": "circle",
        "phrases": ["a small striped red circle"],
        "mask": EMPTY_RLE,
        "box": [4.0, 4.0, 20.0, 20.0],
        "area": 0.0,
        "attributes": {"color": "red", "shape": "circle", "size": "small", "texture": "striped", "relations": []},
    }
    return [
        {
            "index": 0,
            "image_id": 0,
            "region_id": region,
            "task": task,
            "control": None,
            "prompt": {"box": [4.0, 4.0, 20.0, 20.0]},
            "caption": "circle" if task == "recognition" else "a small striped red circle",
            "score": 0.5,
            "mask": EMPTY_RLE,
            "predicted_iou": 0.5,
            "truth": ground_truth,
        }
        for region in (0, 1)
        for task in TASKS
    ]


@register_check("metrics")
def required_fields_are_valid(harness: ComponentHarness) -> str | None:
    """`required_fields` is a tuple of paths in a record, such as "caption", "truth.mask" or "task=caption"."""
    required_fields = harness.component.required_fields
    if not isinstance(required_fields, tuple) or not all(isinstance(each, str) for each in required_fields):
        return f"required_fields is {required_fields!r}"
    for requirement in required_fields:
        for choice in requirement.split(" or "):
            field, _, subpath = choice.partition("=")[0].partition(".")
            if field not in RECORD_FIELDS or (field == "truth" and subpath.partition(".")[0] not in TRUTH_FIELDS):
                return (
                    f"unknown field {requirement!r}; a record has {', '.join(RECORD_FIELDS)}, and its truth has "
                    f"{', '.join(TRUTH_FIELDS)}"
                )
    return None


@register_check("metrics", source="sca_registry.contracts.MetricOutput")
def returns_declared_scores(harness: ComponentHarness) -> str | None:
    """On records with the required fields it returns a `MetricOutput` of numbers with the declared names."""
    records = make_example_records()
    if "image" in harness.component.required_fields or describe_missing_needs(
        records, harness.component.required_fields
    ):
        raise DoesNotApply("the example records lack required fields")
    try:
        output = harness.component(records)
    except InputError as error:
        raise DoesNotApply(f"the example records do not contain what the metric measures: {error}") from error
    if not isinstance(output, MetricOutput):
        return f"the metric returns a {type(output).__name__}, not a MetricOutput"
    declared = harness.get_declared_value("scores")
    for key, value in output.values.items():
        if declared is not None and not any(fnmatchcase(key, name) for name in declared):
            return f"score {key!r} is not declared; declared are {', '.join(declared)}"
        if isinstance(value, bool | str) or not isinstance(float(value), float) or math.isinf(value):
            return f"score {key!r} is {value!r}"
    return None if output.values else "the metric returns no scores"
