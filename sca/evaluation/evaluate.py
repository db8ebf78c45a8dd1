"""Evaluate a model on a dataset."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sca_registry
from PIL import Image
from sca_registry.contracts import TASKS, Captioner, Dataset, Region
from sca_registry.plugins import BUILTIN_DISTRIBUTION
from sca_registry.spec import ComponentSpec, check_generation

from sca.data.summary import check_dataset_not_empty, summarize_dataset
from sca.evaluation.comprehension import ComprehensionOptions
from sca.evaluation.predictions import (
    COMPREHENSION_TASK,
    QUESTION_TASK,
    DenseCaptioningOptions,
    PromptingOptions,
    RecordPredictor,
    has_truth_for_task,
    predict_dataset,
)
from sca.evaluation.predictions_file import (
    PREDICTIONS_PATTERNS,
    RESUMABLE_KEYS,
    Predictions,
    PredictionsJournal,
    check_same_runs,
    read_predictions,
)
from sca.evaluation.question_answering import (
    QuestionAnsweringOptions,
    check_can_answer,
    check_has_questions,
    supports_references,
)
from sca.evaluation.records import Record
from sca.evaluation.requirements import (
    check_has_truth,
    check_metric_needs,
    describe_missing_truth,
    select_dense_tasks,
)
from sca.evaluation.scoring import BuiltMetrics, ImageLoader, ScoringResult, check_metrics, count_regions, score_records
from sca.evaluation.validation import check_dataset_regions, check_predictions, fill_defaults
from sca.hints import check_argument_names
from sca.inference.engine import Engine
from sca.inference.factory import check_local_task, load_captioner
from sca.inference.generation_options import resolve_generation_options
from sca.inference.predictor import Predictor
from sca.inference.prompt_arguments import check_task, get_tasks
from sca.inference.proposer import build_proposer
from sca.inference.region_search import SEARCH_VERSION
from sca.inference.text_search import check_can_find
from sca.inference.zoom_options import resolve_zoom
from sca.io.errors import DifferentRunError, InputError
from sca.io.run_folder import RunFolder, iter_existing_paths
from sca.io.score_format import PRINT_NOTE, format_interval, format_score

if TYPE_CHECKING:
    from sca.io.terminal import Table
    from sca.model import SegmentCaptioner


SCORES_NAME = "scores.json"  # `sca evaluate` writes it next to the predictions
OUTPUT_PATTERNS = (*PREDICTIONS_PATTERNS, SCORES_NAME)


@dataclass(frozen=True)
class EvaluationReport:
    """The result of an evaluation.

    Attributes:
        run: The run header of the predictions file; empty for a file made by hand.
        summary: The last line of the predictions file; empty for a file made by hand.
        scoring: The scores.
        warnings: Anomalies of the predictions.
        seconds: Time for scoring, plus prediction if this call predicted.
        prediction_seconds: Time of the predictions without the reading of images; None unless this process predicted
            all of them in this call, without cached responses of a server.
        records: The prediction records.
        load_image: Returns the image of a record, if the images are available.
        path: The predictions file or its folder.
        label: Name of the run among others. Defaults to its model.
    """

    run: Mapping[str, Any]
    summary: Mapping[str, Any]
    scoring: ScoringResult
    warnings: Sequence[str]
    seconds: float
    records: list[dict[str, Any]] = field(repr=False)
    load_image: ImageLoader | None = field(default=None, repr=False)
    path: Path | None = None
    label: str = ""
    prediction_seconds: float | None = None

    @property
    def name(self) -> str:
        """Label of the run, else its model."""
        return self.label or self.run.get("model", "predictions")

    @property
    def scores(self) -> dict[str, float]:
        """Scores by name, without controls: fractions (NaN if nothing could be scored) and integer counts."""
        return self.scoring.get_values()

    @property
    def notes(self) -> list[str]:
        """One line per reason why scores are NaN or have no interval."""
        score_names: dict[str, list[str]] = {}
        for each in self.scoring.scores:
            if each.note and each.control is None:
                score_names.setdefault(each.note, []).append(each.name)
        return [f"{', '.join(names)}: {note}" for note, names in score_names.items()]

    @property
    def skipped_metrics(self) -> dict[str, str]:
        """Metrics that were not computed -> the reason."""
        return self.scoring.skipped_metrics

    @property
    def title(self) -> str:
        """Model, dataset, split and prompt, for headings."""
        run = self.run
        if not run:
            return self.label or "hand-written predictions"
        prompting = _format_proposer(run["proposer"]) if run.get("proposer") else f"prompted by {run['prompt_type']}"
        return f"{self.name} on {run['dataset']} {run['split']}, {prompting}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values without the records. Scores are raw, not times 100, and NaN becomes None."""
        controls = dict.fromkeys(each.control for each in self.scoring.scores if each.control)
        return {
            **{key: self.run.get(key) for key in ("model", "weights_hash", "dataset", "split", "prompt_type")},
            "num_images": len({record["image_id"] for record in self.records}),
            "num_regions": count_regions(self.records),
            "scores": _replace_nan(self.scores),
            "controls": {name: _replace_nan(self.scoring.get_values(name)) for name in controls},
            "notes": self.notes,
            "skipped_metrics": dict(self.skipped_metrics),
            "warnings": list(self.warnings),
            "seconds": self.seconds,
            "prediction_seconds": self.prediction_seconds,
            "score_details": [each.to_dict() for each in self.scoring.scores],
            **({"metric_details": self.scoring.details} if self.scoring.details else {}),
            "run": dict(self.run),
            "summary": dict(self.summary),
        }

    def build_table(self) -> Table:
        """Build a terminal table with scores times 100: one row per score, one column per control, and notes below."""
        from sca.io.terminal import Table

        num_images, num_regions = len({record["image_id"] for record in self.records}), count_regions(self.records)
        notes = [f"{num_images} images, {num_regions} regions, {self.seconds:.1f} s", PRINT_NOTE, *self.warnings]
        if self.prediction_seconds:
            speed = len(self.records) / self.prediction_seconds
            notes.insert(
                1, f"{len(self.records)} predictions in {self.prediction_seconds:.1f} s, {speed:.1f} per second"
            )
        notes += [*self.notes, *self.scoring.summarize_skipped_metrics()]
        controls = list(dict.fromkeys(each.control for each in self.scoring.scores if each.control))
        numeric_columns = ("value", "95% CI", *controls)
        table = Table(("score", *numeric_columns), self.title, numeric_columns, notes)
        control_values = {name: self.scoring.get_values(name) for name in controls}
        for each in self.scoring.scores:
            if each.control is None:
                control_cells = [format_score(control_values[name].get(each.name)) for name in controls]
                interval = format_interval(each.ci_low, each.ci_high)
                table.add_row(each.name, format_score(each.value), interval, *control_cells)
        return table


@check_argument_names()
def evaluate(
    model: str | Path | SegmentCaptioner | Captioner,
    dataset: str | Mapping[str, Any] | ComponentSpec | Dataset,
    split: str = "val",
    *,
    prompting: PromptingOptions | None = None,
    proposer: str | Mapping[str, Any] | None = None,
    metrics: Sequence[str] | None = None,
    metric_options: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    max_images: int | None = None,
    device: str = "cpu",
    folder: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    report: Callable[[str], None] | None = None,
    trust_remote_code: bool = False,
    allow_external: bool = False,
) -> EvaluationReport | None:
    """Evaluate a model on a dataset.

    Runs as a single process, or under torchrun or accelerate launch. Each process captions its share of the images;
    rank 0 computes the scores.

    Args:
        model: Anything that `sca.load_captioner` accepts, a model object, or an object with a `caption` method.
        dataset: A registered name, a dict with a name and options such as `{"name": "coco", "root": FOLDER}`, or a
            dataset object.
        split: Split of a dataset passed by name; ignored for a dataset object.
        prompting: Prompt type, tasks, controls and generation options. Defaults to box prompts.
        proposer: For dense captioning and comprehension: the proposer of the regions, as a name or a dict with a name
            and options, such as `{"name": "grounding-dino-tiny", "text": ["car", "person"]}`. In dense captioning,
            proposals receive captions if regions have phrases, and class names if regions have names.
        metrics: Registered names. Defaults to all metrics that the data supports; see
            `sca.evaluation.scoring.score_records`.
        metric_options: Options of metrics, and the shared options `references` and `tokenizer`.
        batch_size: Images per encoder batch.
        max_images: Maximum number of images.
        device: Device to load the model on; ignored for a model object.
        folder: Folder for predictions.jsonl, which is written during the run; an interrupted run resumes. Required with
            several processes.
        overwrite: Replace the predictions of a different run in the folder.
        progress: Called with the number of images done and the total.
        report: Called with one line that summarizes the dataset and states how many regions were skipped.
        trust_remote_code: Used only if the model is loaded; see `sca.load`.
        allow_external: Used only if the model is loaded; see `sca.load`.

    Returns:
        The report; None on ranks other than 0.

    Raises:
        TypeError: Unknown keyword argument; the message suggests the closest one.
        ValueError: The dataset has no region to caption, a metric in `metrics` needs an input that the dataset does not
            have, the folder contains the predictions of a different run, `folder` is None with several processes, or
            `prompting` has controls or `caption_all`, which need the regions of the dataset, and a proposer is set.
    """
    start = time.perf_counter()
    built_metrics = check_metrics(metrics, metric_options)
    rank, num_processes, wait = _get_process_group()
    if num_processes > 1 and folder is None:
        raise ValueError("folder is required when several processes evaluate; pass folder=PATH")
    prompting = prompting or PromptingOptions()
    trust_options = {"trust_remote_code": trust_remote_code, "allow_external": allow_external}
    dataset_name, split, dataset_options, built_dataset = _resolve_dataset(dataset, split)
    check_dataset_not_empty(built_dataset, f"{dataset_name} {split}".rstrip())
    proposer_component = ComponentSpec.from_dict(proposer, "proposer") if proposer is not None else None
    tasks: Sequence[str] = prompting.tasks
    is_comprehension = prompting.tasks == (COMPREHENSION_TASK,)
    if proposer_component is not None:
        if prompting.tasks == (QUESTION_TASK,):
            raise ValueError("questions are about the regions of the dataset; omit the proposer")
        if prompting.controls:
            raise ValueError("controls change the prompts of the dataset's regions; omit them, or the proposer")
        if prompting.caption_all:
            raise ValueError("caption_all refers to the regions of the dataset; omit it, or the proposer")
        tasks = tasks if is_comprehension else select_dense_tasks(built_dataset, tasks, max_images)
    check_has_truth(built_dataset, dataset_name, tasks, max_images, prompting.caption_all)
    check_metric_needs(metrics or (), built_dataset, tasks, max_images, prompting.caption_all)
    built_proposer = None if proposer_component is None else build_proposer(proposer_component, device)
    model_name, captioner = _resolve_captioner(model, device, trust_options, prompting.caption_task)
    if isinstance(captioner, Engine):
        requests = {name: value for name, value in prompting.generation.items() if name in ("question", "length")}
        resolve_generation_options(captioner, **requests)
        decoding = {name: value for name, value in prompting.generation.items() if name not in requests}
        check_generation("generation", decoding, captioner.model.language_model.generate)
    check_task(prompting.caption_task, get_tasks(captioner))
    prompting_options: RecordPredictor = prompting
    if is_comprehension:
        check_can_find(captioner, model_name)
        prompting_options = ComprehensionOptions(built_proposer)
    elif prompting.tasks == (QUESTION_TASK,):
        check_can_answer(captioner)
        check_has_questions(built_dataset, dataset_name)
        prompting_options = QuestionAnsweringOptions(prompting)
    elif built_proposer is not None:
        prompting_options = DenseCaptioningOptions(
            built_proposer, tuple(tasks), prompting.generation, prompting.zoom, prompting.caption_task
        )
    zoom = None if is_comprehension else resolve_zoom(captioner, prompting.zoom)
    proposer_hash = getattr(built_proposer, "weights_hash", None)
    run = {
        "model": model_name,
        **_get_captioner_identity(captioner, prompting.generation),
        "dataset": dataset_name,
        "dataset_options": dataset_options,
        "split": split,
        "dataset_hash": getattr(built_dataset, "content_hash", None),
        "num_images": len(built_dataset),
        "prompt_type": None if proposer_component else prompting.prompt_type,
        "proposer": proposer_component and proposer_component.to_dict(),
        **({"search_version": SEARCH_VERSION} if proposer_component else {}),
        **({"proposer_hash": proposer_hash} if proposer_hash else {}),
        "tasks": list(tasks),
        **({"caption_task": prompting.caption_task} if prompting.caption_task != "caption" else {}),
        **({"caption_all": True} if prompting.caption_all else {}),
        "controls": list(prompting.controls),
        "seed": prompting.seed,
        **({"zoom": asdict(zoom)} if zoom else {}),
        "max_images": max_images,
        "batch_size": batch_size,
        "versions": {name: version(name) for name in (BUILTIN_DISTRIBUTION, "torch", "transformers")},
    }
    usage_before = _get_usage(captioner)
    with ExitStack() as stack:
        if folder is not None and not rank:
            stack.enter_context(
                _hold_predictions_folder(
                    Path(folder), run, overwrite, [model, dataset_options, proposer, metric_options]
                )
            )
        if report is not None and not rank:
            report(f"{dataset_name} {split}: {summarize_dataset(built_dataset)}")
            if prompting.tasks == (QUESTION_TASK,) and not supports_references(captioner):
                report(f"{model_name} describes one region at a time; questions with region references are skipped")
        predictions, prediction_seconds = _collect_predictions(
            captioner, built_dataset, prompting_options, run, folder, (rank, num_processes, wait), progress
        )
    if predictions is None:
        return None
    usage = {name: count - usage_before.get(name, 0) for name, count in _get_usage(captioner).items()}
    if report is not None and usage:
        counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in usage.items())
        report(f"{model_name}{' on rank 0' if num_processes > 1 else ''}: {counts}")
    if not predictions.records:
        raise ValueError(describe_missing_truth(built_dataset, dataset_name, tasks))
    evaluation_report = _build_report(
        predictions,
        "the predictions",
        metrics,
        metric_options,
        _make_image_loader(built_dataset),
        start,
        built_metrics,
    )
    return replace(evaluation_report, prediction_seconds=None if usage.get("cached") else prediction_seconds)


def _get_usage(captioner: Captioner) -> dict[str, int]:
    """Return the counts of a captioner, such as requests to a server; empty for most."""
    return dict(getattr(captioner, "usage", {}))


@contextmanager
def _hold_predictions_folder(folder: Path, run: Mapping[str, Any], overwrite: bool, inputs: Any) -> Iterator[None]:
    """Lock the predictions folder and make sure that it contains no other run."""
    with RunFolder(folder, "evaluate", OUTPUT_PATTERNS) as run_folder:
        is_different_run = False
        try:
            check_same_runs(folder, run)
        except DifferentRunError:
            if not overwrite:
                raise
            is_different_run = True
        run_folder.begin_run(
            run, OUTPUT_PATTERNS, iter_existing_paths(inputs), overwrite=overwrite, ignored_settings=RESUMABLE_KEYS
        )
        if is_different_run:  # even if the marker is from this run
            run_folder.delete_outputs(PREDICTIONS_PATTERNS)
        yield
        run_folder.finish()


def _collect_predictions(
    captioner: Captioner,
    dataset: Dataset,
    prompting: RecordPredictor,
    run: Mapping[str, Any],
    folder: str | Path | None,
    process: tuple[int, int, Callable[[], None]],
    progress: Callable[[int, int], None] | None,
) -> tuple[Predictions | None, float | None]:
    """Predict what is missing, and return all predictions and the time of this process.

    The predictions are None in all processes but the first. The time is None if an earlier run or another process
    predicted a part.
    """
    rank, num_processes, wait = process
    batch_size, max_images = run["batch_size"], run["max_images"]
    wait()  # until the first process has locked the folder
    journal = PredictionsJournal(None if folder is None else Path(folder), run, rank)
    wait()  # until every process has read the earlier predictions
    predicts_all = num_processes == 1 and not journal.done_indices and not journal.is_finished
    seconds = 0.0
    if not journal.is_finished:
        is_of_other_process = lambda index: index // batch_size % num_processes != rank  # noqa: E731
        is_skipped = lambda index: index in journal.done_indices or is_of_other_process(index)  # noqa: E731
        for predicted_batch in predict_dataset(
            captioner, dataset, prompting, batch_size, max_images, is_skipped, progress
        ):
            journal.add(predicted_batch)
            seconds += predicted_batch.seconds
    journal.close()
    wait()  # until every process has synced its predictions
    if rank:
        wait()
        return None, None
    predictions = journal.finish()
    wait()
    return predictions, seconds if predicts_all else None


def score_file(
    path: str | Path,
    metrics: Sequence[str] | None = None,
    metric_options: Mapping[str, Any] | None = None,
    dataset: str | Mapping[str, Any] | ComponentSpec | Dataset | None = None,
    split: str = "val",
) -> EvaluationReport:
    """Score a predictions file, or the folder of one, without the model.

    Images are read from their location in the run, and only for metrics that need them.

    Args:
        path: Predictions file or its folder.
        metrics: See `sca.evaluation.scoring.score_records`.
        metric_options: See `sca.evaluation.scoring.score_records`.
        dataset: Dataset whose regions the file must contain, as in `evaluate`; None skips this check.
        split: Split of a dataset passed by name.

    Returns:
        The scores of the predictions and of each control.

    Raises:
        InputError: The scores would be wrong: regions are missing, duplicated or unknown, boxes are invalid, references
            are missing, or the run has not ended.
    """
    start = time.perf_counter()
    predictions = read_predictions(path)
    if dataset is not None:
        built_dataset = _resolve_dataset(dataset, split)[-1]
        samples = filter(
            None,
            (
                getattr(built_dataset, "read_sample", built_dataset.__getitem__)(index)
                for index in range(len(built_dataset))
            ),
        )
        caption_all = predictions.run.get("caption_all", False)
        region_keys = (
            (sample.image_id, region.id)
            for sample in samples
            for region in sample.regions
            if caption_all or _has_any_truth(region)
        )
        check_dataset_regions(predictions, region_keys, str(path))
    report = _build_report(
        predictions, str(path), metrics, metric_options, make_run_image_loader(predictions.run), start
    )
    return replace(report, path=Path(path))


def score_stored_records(
    records: Sequence[dict[str, Any]],
    metrics: Sequence[str],
    metric_options: Mapping[str, Any] | None = None,
) -> EvaluationReport:
    """Score complete records that belong to no run.

    Args:
        records: Prediction records.
        metrics: Registered names.
        metric_options: See `sca.evaluation.scoring.score_records`.

    Returns:
        The scores.
    """
    start = time.perf_counter()
    scoring = score_records(records, metrics, metric_options)
    return EvaluationReport({}, {}, scoring, [], time.perf_counter() - start, list(records))


def make_run_image_loader(run: Mapping[str, Any]) -> ImageLoader | None:
    """Return a function that loads the image of a record from the dataset of a run, or None if that is unknown.

    The dataset is built on the first call. The function raises InputError if its contents have changed.
    """
    if not run or run["dataset"] not in sca_registry.datasets:
        return None
    loaders: list[ImageLoader] = []

    def load_image(record: Record) -> Image.Image:
        if not loaders:
            dataset = sca_registry.datasets.build(run["dataset"], run["split"], **run["dataset_options"])
            if getattr(dataset, "content_hash", None) != run["dataset_hash"]:
                raise InputError(
                    f"the contents of the dataset {run['dataset']} {run['split']} have changed since the run; restore "
                    "them, or evaluate again"
                )
            loaders.append(_make_image_loader(dataset))
        return loaders[0](record)

    return load_image


def _make_image_loader(dataset: Dataset) -> ImageLoader:
    """Return an image loader that reads each image once if the records are in dataset order."""
    cached: list[Any] = [None, None]

    def load_image(record: Record) -> Image.Image:
        if cached[0] != record["index"]:
            sample = getattr(dataset, "read_sample", dataset.__getitem__)(record["index"])
            if sample is None or sample.image_id != record["image_id"]:
                raise InputError(
                    f"image {record['image_id']} is not at index {record['index']} of the dataset, or cannot be read"
                )
            cached[:] = record["index"], sample.image
        return cached[1]

    return load_image


def _has_any_truth(region: Region) -> bool:
    return any(has_truth_for_task(region, task) for task in TASKS)


def _build_report(
    predictions: Predictions,
    location: str,
    metrics: Sequence[str] | None,
    metric_options: Mapping[str, Any] | None,
    load_image: ImageLoader | None,
    start: float,
    built_metrics: BuiltMetrics | None = None,
) -> EvaluationReport:
    predictions = fill_defaults(predictions, location)
    warnings = check_predictions(predictions, location)
    if predictions.summary.get("num_unreadable"):
        warnings.append(f"{predictions.summary['num_unreadable']} unreadable images skipped")
    run = (
        {**predictions.run, "ground_truth_hash": predictions.summary.get("ground_truth_hash")}
        if predictions.run
        else {}
    )
    scoring = score_records(predictions.records, metrics, metric_options, run, load_image, built_metrics)
    seconds = time.perf_counter() - start
    return EvaluationReport(
        predictions.run, predictions.summary, scoring, warnings, seconds, predictions.records, load_image
    )


def _resolve_captioner(model: Any, device: str, trust_options: Mapping[str, bool], task: str) -> tuple[str, Captioner]:
    if isinstance(model, str | Path):
        trust: dict[str, Any] = {name: trust_options[name] for name in ("trust_remote_code", "allow_external")}
        check_local_task(model, task, **trust)
        return str(model), load_captioner(model, device, **trust)
    if isinstance(model, Predictor):
        model = model.engine
    if isinstance(model, Engine):
        return _get_model_name(model.model), model
    return (_get_model_name(model), model) if hasattr(model, "caption") else (_get_model_name(model), Engine(model))


def _get_captioner_identity(captioner: Captioner, generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the spec, weights, precision and generation options, which distinguish captioners of the same name."""
    weights_hash = getattr(captioner, "weights_hash", None)
    if isinstance(captioner, Engine):
        spec = captioner.model.spec
        return {
            "weights_hash": weights_hash,
            "precision": captioner.precision,
            "spec": spec.to_dict(),
            "generation": {**spec.generation, **generation},
        }
    return {"weights_hash": weights_hash, "spec": getattr(captioner, "metadata", None), "generation": dict(generation)}


def _format_proposer(proposer: Mapping[str, Any]) -> str:
    """Return the name of a proposer and the phrases that it finds, for headings."""
    text = proposer.get("text") or []
    phrases = ", ".join([text] if isinstance(text, str) else text)
    return f"proposals of {proposer['name']}" + (f" for {phrases}" if phrases else "")


def _get_model_name(model: Any) -> str:
    """Return the component names of a composed model, else the class name."""
    spec = getattr(model, "spec", None)
    return "+".join((spec.encoder.name, spec.mixer.name, spec.language_model.name)) if spec else type(model).__name__


def _resolve_dataset(dataset: Any, split: str) -> tuple[str, str, dict[str, Any], Dataset]:
    """Return the name, split, options and the dataset itself."""
    if not isinstance(dataset, str | Mapping | ComponentSpec):
        return type(dataset).__name__, getattr(dataset, "split", ""), {}, dataset
    component = dataset if isinstance(dataset, ComponentSpec) else ComponentSpec.from_dict(dataset, "dataset")
    built_dataset = sca_registry.datasets.build(component.name, split, **component.options)
    return component.name, split, dict(component.options), built_dataset


def _get_process_group() -> tuple[int, int, Callable[[], None]]:
    """Return the rank, the number of processes and a barrier function."""
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    if num_processes == 1:
        return 0, 1, lambda: None
    from accelerate import PartialState

    state = PartialState(cpu=True, timeout=timedelta(days=7))  # only used as a barrier
    return state.process_index, num_processes, state.wait_for_everyone


def _replace_nan(scores: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in scores.items()}
