"""A model, a dataset, and how good the one is on the other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sca_registry
from sca_registry.contracts import Captioner, Dataset, Scores
from sca_registry.spec import Part

from sca.checkpoint import load
from sca.evaluation.predictions import predict
from sca.evaluation.scoring import score
from sca.predictor import Predictor

if TYPE_CHECKING:
    from rich.table import Table

    from sca.model import SegmentCaptioner


@dataclass(frozen=True)
class Report:
    """What came out.

    scores: every total of every metric, shares in 0..1 (NaN where nothing was there to be counted) and whole numbers.
    left_out: why a metric was not computed, by its name. seconds: for predicting and scoring. metrics: the scores as
    each metric gave them, with their arrays of single judgements. records: what was asked and answered, one a region
    and task.
    """

    model: str
    dataset: str
    split: str
    prompt: str
    images: int
    regions: int
    scores: dict[str, float]
    left_out: dict[str, str]
    seconds: float
    metrics: dict[str, Scores] = field(repr=False)
    records: list[dict[str, Any]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, without the arrays and records; NaN is None."""
        plain = {name: value for name, value in vars(self).items() if name not in ("metrics", "records")}
        scores = {name: None if math.isnan(value) else value for name, value in self.scores.items()}
        return plain | {"scores": scores, "left_out": dict(self.left_out)}

    def table(self) -> Table:
        """For a terminal: a row a score, and below it what was left out."""
        from rich.table import Table
        from rich.text import Text

        below = [f"{self.images} images, {self.regions} regions, {self.seconds:.1f} s"]
        below += [f"left out {name}: {reason}" for name, reason in self.left_out.items()]
        table = Table(
            title=Text(f"{self.model} on {self.dataset} {self.split}, prompted by {self.prompt}"),
            caption=Text("\n".join(below)),
            caption_justify="left",
        )
        table.add_column("score")
        table.add_column("value", justify="right")
        for name, value in self.scores.items():
            shown = str(value) if isinstance(value, int) else "-" if math.isnan(value) else f"{value:.3f}"
            table.add_row(Text(name), shown)
        return table


def evaluate(
    model: str | Path | SegmentCaptioner | Captioner,
    dataset: str | Mapping[str, Any] | Part | Dataset,
    split: str = "val",
    *,
    prompt: str = "box",
    tasks: Sequence[str] = ("caption", "recognition"),
    metrics: Sequence[str] | None = None,
    batch: int = 8,
    seed: int = 0,
    limit: int | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Asks the model for the regions of a dataset and scores its answers.

    model: what `sca.load` takes, a built model, or anything with `describe`. dataset: a registered name, a table of a
    name and options such as `{"name": "coco", "root": FOLDER}`, or a built dataset. split: of a dataset given by name;
    a built one has its own. device: for a model that is loaded. metrics: see `sca.evaluation.scoring.score`. The rest:
    see `sca.evaluation.predictions.predict`.

    ValueError if the dataset has no region to ask for, or a metric of `metrics` does not find what it needs.
    """
    model_name, captioner = _captioner(model, device)
    dataset_name, split, built = _dataset(dataset, split)
    start = time.perf_counter()
    records = list(predict(captioner, built, prompt, tasks, batch, seed, limit, progress))
    if not records:
        raise ValueError(
            f"nothing to evaluate: no region of {dataset_name} has what {' or '.join(tasks)} asks for "
            "(phrases for captions, a name for recognition)"
        )
    scores, left_out = score(records, metrics)
    return Report(
        model=model_name,
        dataset=dataset_name,
        split=split,
        prompt=prompt,
        images=len({record["image_id"] for record in records}),
        regions=len({(record["image_id"], record["region_id"]) for record in records}),
        scores={name: _plain(value) for each in scores.values() for name, value in each.total.items()},
        left_out=left_out,
        seconds=time.perf_counter() - start,
        metrics=scores,
        records=records,
    )


def _plain(value: Any) -> float:
    """A whole number as it is, any other (numpy's, say) as a float."""
    return value if isinstance(value, int) else float(value)


def _captioner(model: Any, device: str) -> tuple[str, Captioner]:
    if isinstance(model, str | Path):
        return str(model), Predictor(load(model, device))
    if hasattr(model, "describe"):
        inner = getattr(model, "model", model)
        return _name(inner), model
    return _name(model), Predictor(model)


def _name(model: Any) -> str:
    """The parts of a composed model, the class of anything else."""
    spec = getattr(model, "spec", None)
    return "+".join((spec.encoder.name, spec.mixer.name, spec.language_model.name)) if spec else type(model).__name__


def _dataset(dataset: Any, split: str) -> tuple[str, str, Dataset]:
    """Name, split and the dataset itself."""
    if not isinstance(dataset, str | Mapping | Part):
        return type(dataset).__name__, getattr(dataset, "split", ""), dataset
    part = dataset if isinstance(dataset, Part) else Part.from_dict(dataset, "dataset")
    return part.name, split, sca_registry.datasets.build(part.name, split, **part.options)
