"""Accuracy of predicted class names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sca_registry.contracts import MetricOutput

from sca.evaluation.records import Record, collect_region_ids, normalize_text, require_records

SUMMARY_NAMES = ("accuracy", "area-accuracy", "mean-accuracy", "regions")


class ClassAccuracy:
    """Fraction of regions with the correct class name, ignoring case and spacing.

    `accuracy` weights all regions equally, `area-accuracy` weights them by their area in pixels, and `mean-accuracy` is
    the mean over classes of the accuracy within each class. Each class also has its own score and number of regions; a
    class named like one of `SUMMARY_NAMES` is quoted.
    """

    required_fields: tuple[str, ...] = ("task=recognition", "caption", "truth.name", "truth.area")

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        scored_records = require_records(records, self.required_fields, "class")
        true_names = np.array([normalize_text(record["truth"]["name"]) for record in scored_records])
        predicted_names = np.array([normalize_text(record["caption"]) for record in scored_records])
        areas = np.array([float(record["truth"]["area"]) for record in scored_records])
        correct = (true_names == predicted_names).astype(float)
        correct_by_class = {str(name): correct[true_names == name] for name in np.unique(true_names)}
        total: dict[str, float] = {
            "class/accuracy": float(correct.mean()),
            "class/area-accuracy": float(correct @ areas / areas.sum()) if areas.any() else float("nan"),
            "class/mean-accuracy": float(np.mean([values.mean() for values in correct_by_class.values()])),
            "class/regions": len(scored_records),
        }
        for name, values in correct_by_class.items():
            label = f'"{name}"' if name in SUMMARY_NAMES else name
            total |= {f"class/{label}": float(values.mean()), f"class/{label}/regions": len(values)}
        return MetricOutput(
            total, {"class/accuracy": correct, "area": areas, "name": true_names} | collect_region_ids(scored_records)
        )
