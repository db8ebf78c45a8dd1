"""A model, a dataset, and how good the one is on the other."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sca_registry
from PIL import Image
from sca_registry.contracts import Captioner, Dataset, Region
from sca_registry.plugins import BUILTIN
from sca_registry.spec import Part, check_generation

from sca.checkpoints.state import hash_weights
from sca.data.summary import check_not_empty, summarize_dataset
from sca.evaluation.journal import FILES, LOOSE, Journal, Predictions, check_same_runs, read_predictions
from sca.evaluation.predictions import Proposing, Questions, predict
from sca.evaluation.records import Record
from sca.evaluation.requirements import check_needs, check_truth, describe_missing_truth
from sca.evaluation.scoring import Images, Scored, ready, regions_of, score
from sca.evaluation.soundness import check, check_against, completed
from sca.inference.automatic import SEARCH_VERSION
from sca.inference.engine import Engine
from sca.inference.factory import captioner as open_captioner
from sca.inference.predictor import Predictor
from sca.io.errors import InputError, OtherRunError
from sca.io.run_folder import RunFolder, existing_paths

if TYPE_CHECKING:
    from sca.io.terminal import Table
    from sca.model import SegmentCaptioner


SCORES = "scores.json"  # written beside the predictions by `sca evaluate`
OUTPUTS = (*FILES, SCORES)


@dataclass(frozen=True)
class Report:
    """What came out.

    run, end: what was run and what became of it, as the predictions file says; empty for one made by hand. scored: the
    scores. remarks: what is odd about the answers. seconds: for scoring, and for asking where that was done.
    records: what was asked and answered. images: where the pictures are, if that is known. path: the predictions file
    or its folder. label: name of the run among others; by default its model.
    """

    run: Mapping[str, Any]
    end: Mapping[str, Any]
    scored: Scored
    remarks: Sequence[str]
    seconds: float
    records: list[dict[str, Any]] = field(repr=False)
    images: Images | None = field(default=None, repr=False)
    path: Path | None = None
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or self.run.get("model", "predictions")

    @property
    def scores(self) -> dict[str, float]:
        """Every score of what was asked, the controls aside: shares (NaN where nothing was counted) and counts."""
        return self.scored.values()

    @property
    def notes(self) -> list[str]:
        """What scores are not a number or have no interval, and why: a line for each reason."""
        named: dict[str, list[str]] = {}
        for each in self.scored.scores:
            if each.note and each.control is None:
                named.setdefault(each.note, []).append(each.name)
        return [f"{', '.join(names)}: {note}" for note, names in named.items()]

    @property
    def left_out(self) -> dict[str, str]:
        return self.scored.left_out

    @property
    def title(self) -> str:
        run = self.run
        if not run:
            return self.label or "predictions made by hand"
        how = f"proposals of {run['proposer']}" if run.get("proposer") else f"prompted by {run['prompt']}"
        return f"{self.name} on {run['dataset']} {run['split']}, {how}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, without the records; NaN is None."""
        controls = dict.fromkeys(each.control for each in self.scored.scores if each.control)
        return {
            **{key: self.run.get(key) for key in ("model", "weights", "dataset", "split", "prompt")},
            "images": len({record["image_id"] for record in self.records}),
            "regions": regions_of(self.records),
            "scores": _plain(self.scores),
            "controls": {name: _plain(self.scored.values(name)) for name in controls},
            "notes": self.notes,
            "left_out": dict(self.left_out),
            "remarks": list(self.remarks),
            "seconds": self.seconds,
            "rows": [each.to_dict() for each in self.scored.scores],
            "run": dict(self.run),
            "end": dict(self.end),
        }

    def table(self) -> Table:
        """For a terminal: a row a score with its 95 % interval, a column a control; below it what is to be said."""
        from sca.io.terminal import Table

        images, regions = len({record["image_id"] for record in self.records}), regions_of(self.records)
        below = [f"{images} images, {regions} regions, {self.seconds:.1f} s", *self.remarks]
        below += [*self.notes, *self.scored.summarize_left_out()]
        controls = list(dict.fromkeys(each.control for each in self.scored.scores if each.control))
        figures = ("value", "95 % interval", *controls)
        table = Table(("score", *figures), self.title, figures, below)
        misled = {name: self.scored.values(name) for name in controls}
        for each in self.scored.scores:
            if each.control is None:
                between = "" if each.low is None else f"{each.low:.3f} to {each.high:.3f}"
                others = [_shown(misled[name].get(each.name)) for name in controls]
                table.add_row(each.name, _shown(each.value), between, *others)
        return table


def evaluate(
    model: str | Path | SegmentCaptioner | Captioner,
    dataset: str | Mapping[str, Any] | Part | Dataset,
    split: str = "val",
    *,
    questions: Questions | None = None,
    proposer: str | Mapping[str, Any] | None = None,
    metrics: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    batch: int = 8,
    limit: int | None = None,
    device: str = "cpu",
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    report: Callable[[str], None] | None = None,
    trust_remote_code: bool = False,
    allow_external: bool = False,
) -> Report | None:
    """Evaluate a model on a dataset.

    Works alone or as one of several processes that a launcher started (torchrun, accelerate launch): each captions its
    share of the images, and the first one scores.

    Args:
        model: What `sca.captioner` takes, a built model, or anything with `describe`.
        dataset: A registered name, a table of a name and options such as `{"name": "coco", "root": FOLDER}`, or a built
            dataset.
        split: Of a dataset given by name; a built one has its own.
        questions: Which prompts, tasks and controls the regions get, and options of generation.
        proposer: For dense captioning: finds the regions instead; a name, or a table of a name and options.
        metrics: Registered names; None for all that find what they need, see `sca.evaluation.scoring.score`.
        settings: Options of metrics, and the references and tokenizer that they share.
        batch: Images encoded at a time.
        limit: Maximum images.
        device: For a model that is loaded.
        folder: For predictions.jsonl, which is written as captions come; an interrupted run resumes. Several processes
            need one.
        overwrite: Replace the predictions of another run in the folder.
        progress: Called with the images done and the total.
        report: Called with one line on what the dataset contains and what was left out of it.
        trust_remote_code: For a model that is loaded, see `sca.load`.
        allow_external: As `trust_remote_code`.

    Returns:
        The report; None in processes other than the first.

    Raises:
        ValueError: The dataset has no region to caption, a metric of `metrics` does not find what it needs, or the
            folder contains the predictions of another run.
    """
    start = time.perf_counter()
    ready(metrics, settings)
    rank, processes, wait = _processes()
    if processes > 1 and folder is None:
        raise ValueError("several processes need a folder to merge their predictions in; give a folder")
    questions = questions or Questions()
    agreed = {"trust_remote_code": trust_remote_code, "allow_external": allow_external}
    dataset_name, split, options, built = _dataset(dataset, split)
    check_not_empty(built, f"{dataset_name} {split}".rstrip())
    if proposer is None:
        check_truth(built, dataset_name, questions.tasks, limit)
        check_needs(metrics or (), built, questions.tasks, limit)
    model_name, captioner = _captioner(model, device, agreed)
    if isinstance(captioner, Engine):
        check_generation("generation", questions.generation, captioner.model.language_model.generate)
    found = Part.from_dict(proposer, "proposer") if proposer is not None else None
    asking: Questions | Proposing = questions
    if found is not None:
        built_proposer = sca_registry.proposers.build(found.name, **found.options)
        asking = Proposing(built_proposer, questions.generation)
    run = {
        "model": model_name,
        **_identity(captioner, questions.generation),
        "dataset": dataset_name,
        "options": options,
        "split": split,
        "data": getattr(built, "hash", None),
        "images": len(built),
        "prompt": None if found else questions.prompt,
        "proposer": found and found.to_dict(),
        **({"search": SEARCH_VERSION} if found else {}),
        "tasks": ["dense"] if found else list(questions.tasks),
        "controls": list(questions.controls),
        "seed": questions.seed,
        "limit": limit,
        "batch": batch,
        "versions": {name: version(name) for name in (BUILTIN, "torch", "transformers")},
    }
    with ExitStack() as stack:
        if folder is not None and not rank:
            stack.enter_context(_begun(Path(folder), run, overwrite, [model, options, proposer, settings]))
        if report is not None and not rank:
            report(f"{dataset_name} {split}: {summarize_dataset(built)}")
        predictions = _predictions(captioner, built, asking, run, folder, (rank, processes, wait), progress)
    if predictions is None:
        return None
    if not predictions.records:
        raise ValueError(describe_missing_truth(built, dataset_name, questions.tasks))
    return _report(predictions, "the predictions", metrics, settings, _pictures(built), start)


@contextmanager
def _begun(folder: Path, run: Mapping[str, Any], overwrite: bool, inputs: Any) -> Iterator[None]:
    """Hold the folder of predictions, which contains no other run afterwards."""
    with RunFolder(folder, "evaluate", OUTPUTS) as run_folder:
        is_other = False
        try:
            check_same_runs(folder, run)
        except OtherRunError:
            if not overwrite:
                raise
            is_other = True
        run_folder.begin(run, OUTPUTS, existing_paths(inputs), overwrite=overwrite, loose=LOOSE)
        if is_other:  # also where the marker is of this run
            run_folder.delete_outputs(FILES)
        yield
        run_folder.finish()


def _predictions(
    captioner: Captioner,
    built: Dataset,
    asking: Questions | Proposing,
    run: Mapping[str, Any],
    folder: str | Path | None,
    process: tuple[int, int, Callable[[], None]],
    progress: Callable[[int, int], None] | None,
) -> Predictions | None:
    """What is predicted, or was before; None in all processes but the first."""
    rank, processes, wait = process
    batch, limit = run["batch"], run["limit"]
    wait()  # until the first holds the folder
    journal = Journal(None if folder is None else Path(folder), run, rank)
    wait()  # until every process has seen what there was
    if not journal.finished:
        others = lambda place: place // batch % processes != rank  # noqa: E731
        skip = lambda place: place in journal.done or others(place)  # noqa: E731
        for asked in predict(captioner, built, asking, batch, limit, skip, progress):
            journal.add(asked)
    journal.close()
    wait()  # until every process has synced its part
    if rank:
        wait()
        return None
    predictions = journal.finish()
    wait()
    return predictions


def score_file(
    path: str | Path,
    metrics: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    dataset: str | Mapping[str, Any] | Part | Dataset | None = None,
    split: str = "val",
) -> Report:
    """Scores a predictions file (or the folder of one) without the model. The pictures are looked for where the run had
    them, and only by metrics that need them. dataset, split: what the regions must be those of, if that is asked.

    InputError for a file whose scores would be wrong: with regions missing, doubled or unknown, boxes that are
    none, references missing, or of a run that has not ended.
    """
    start = time.perf_counter()
    predictions = read_predictions(path)
    if dataset is not None:
        built = _dataset(dataset, split)[-1]
        samples = filter(None, (getattr(built, "read", built.__getitem__)(place) for place in range(len(built))))
        truth = ((sample.image_id, region.id) for sample in samples for region in sample.regions if _told(region))
        check_against(predictions, truth, str(path))
    report = _report(predictions, str(path), metrics, settings, pictures_of(predictions.run), start)
    return replace(report, path=Path(path))


def pictures_of(run: Mapping[str, Any]) -> Images | None:
    """The picture of a record, from the dataset that a run names; opened when the first is asked for."""
    if not run or run["dataset"] not in sca_registry.datasets:
        return None
    opened: list[Images] = []

    def picture(record: Record) -> Image.Image:
        if not opened:
            built = sca_registry.datasets.build(run["dataset"], run["split"], **run["options"])
            if getattr(built, "hash", None) != run["data"]:
                raise InputError(
                    f"the dataset {run['dataset']} {run['split']} is not the one that was asked about: another content"
                )
            opened.append(_pictures(built))
        return opened[0](record)

    return picture


def _pictures(dataset: Dataset) -> Images:
    """Of records in the order of the dataset each picture is read once."""
    last: list[Any] = [None, None]

    def picture(record: Record) -> Image.Image:
        if last[0] != record["index"]:
            sample = getattr(dataset, "read", dataset.__getitem__)(record["index"])
            if sample is None or sample.image_id != record["image_id"]:
                raise InputError(f"image {record['image_id']} cannot be read where it was, at {record['index']}")
            last[:] = record["index"], sample.image
        return last[1]

    return picture


def _told(region: Region) -> bool:
    """Whether a region can be asked for."""
    return bool(region.name or region.phrases)


def _report(
    predictions: Predictions,
    where: str,
    metrics: Sequence[str] | None,
    settings: Mapping[str, Any] | None,
    images: Images | None,
    start: float,
) -> Report:
    predictions = completed(predictions, where)
    remarks = check(predictions, where)
    if predictions.end.get("unread"):
        remarks.append(f"{predictions.end['unread']} pictures could not be read and are left out")
    run = {**predictions.run, "truth": predictions.end.get("truth")} if predictions.run else {}
    scored = score(predictions.records, metrics, settings, run, images)
    seconds = time.perf_counter() - start
    return Report(predictions.run, predictions.end, scored, remarks, seconds, predictions.records, images)


def _captioner(model: Any, device: str, agreed: Mapping[str, bool]) -> tuple[str, Captioner]:
    if isinstance(model, str | Path):
        return str(model), open_captioner(model, device, **agreed)
    if isinstance(model, Predictor):
        model = model.engine
    if isinstance(model, Engine):
        return _name(model.model), model
    return (_name(model), model) if hasattr(model, "describe") else (_name(model), Engine(model))


def _identity(captioner: Captioner, generation: Mapping[str, Any]) -> dict[str, Any]:
    """The spec, weights and decoding of a captioner, which differ between captioners of the same name."""
    if isinstance(captioner, Engine):
        spec = captioner.model.spec
        return {
            "weights": hash_weights(captioner.model),
            "spec": spec.to_dict(),
            "generation": {**spec.generation, **generation},
        }
    return {"weights": None, "spec": getattr(captioner, "facts", None), "generation": dict(generation)}


def _name(model: Any) -> str:
    """The parts of a composed model, the class of anything else."""
    spec = getattr(model, "spec", None)
    return "+".join((spec.encoder.name, spec.mixer.name, spec.language_model.name)) if spec else type(model).__name__


def _dataset(dataset: Any, split: str) -> tuple[str, str, dict[str, Any], Dataset]:
    """Name, split, options and the dataset itself."""
    if not isinstance(dataset, str | Mapping | Part):
        return type(dataset).__name__, getattr(dataset, "split", ""), {}, dataset
    part = dataset if isinstance(dataset, Part) else Part.from_dict(dataset, "dataset")
    built = sca_registry.datasets.build(part.name, split, **part.options)
    return part.name, split, dict(part.options), built


def _processes() -> tuple[int, int, Callable[[], None]]:
    """Which of how many processes this is, and how to wait for the others."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1:
        return 0, 1, lambda: None
    from accelerate import PartialState

    state = PartialState(cpu=True, timeout=timedelta(days=7))  # nothing is sent: they only wait for each other
    return state.process_index, processes, state.wait_for_everyone


def _plain(scores: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in scores.items()}


def _shown(value: float | None) -> str:
    return (
        "" if value is None else str(value) if isinstance(value, int) else "-" if math.isnan(value) else f"{value:.3f}"
    )
