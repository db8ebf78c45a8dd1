"""Whether a region is called by the name of its class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sca_registry.contracts import MetricOutput

from sca.evaluation.records import Record, normalised, places, require

OVERALL = ("count", "area", "mean", "regions")


class Classes:
    """The share of regions whose name is right, letter case and spacing aside.

    `count`: every region counts as one. `area`: by its area in pixels, so that the large ones decide. `mean`: the mean
    over classes of the share within each, so that the rare ones count as much as the common. Then each class by its
    own name, with its number of regions; a class that is called like one of the words above stands in quotes.
    """

    needs = ("task=recognition", "caption", "truth.name", "truth.area")

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        answers = require(records, self.needs, "class")
        names = np.array([normalised(record["truth"]["name"]) for record in answers])
        given = np.array([normalised(record["caption"]) for record in answers])
        areas = np.array([float(record["truth"]["area"]) for record in answers])
        right = (names == given).astype(float)
        classes = {str(name): right[names == name] for name in np.unique(names)}
        total: dict[str, float] = {
            "class/count": float(right.mean()),
            "class/area": float(right @ areas / areas.sum()) if areas.any() else float("nan"),
            "class/mean": float(np.mean([values.mean() for values in classes.values()])),
            "class/regions": len(answers),
        }
        for name, values in classes.items():
            shown = f'"{name}"' if name in OVERALL else name
            total |= {f"class/{shown}": float(values.mean()), f"class/{shown}/regions": len(values)}
        return MetricOutput(total, {"class/count": right, "area": areas, "name": names} | places(answers))
