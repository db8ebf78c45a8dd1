"""Measure zero-shot referring expressions: `python benchmarks/studies/referring_expressions.py [--out FILE]`

Repeats the zero-shot referring expression generation of SCA (arXiv 2312.00869) on generated data: a model that was
trained on captions only describes regions of `referring-scenes`, by the evaluation protocols refcocog-reg and
refcoco-reg, on files in the layout of RefCOCO. Beside its captions, the table shows four baselines on the same
regions, and the fraction of captions that are true of the region (and of no other region of the image). A second table
shows the reverse direction, by the protocol referring-scenes-comprehension. Prints Markdown tables and writes the
results as JSON. Confidence intervals are over images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from sca.io.score_format import format_interval, format_score
from study_results import write_results

if TYPE_CHECKING:
    from sca_registry.contracts import Captioner

    from sca.evaluation.protocol import EvaluationProtocol, ProtocolRun

PROTOCOLS = ("refcocog-reg", "refcoco-reg")
COMPREHENSION_PROTOCOL = "referring-scenes-comprehension"
COLLECTION_NAMES = {"refcoco": "RefCOCO", "refcoco+": "RefCOCO+", "refcocog": "RefCOCOg"}
PUBLISHED_SYSTEM = "SCA GPT2-large, VG"
SCORE_LABELS = {
    "meteor": "METEOR",
    "cider-d": "CIDEr-D",
    "referring/true": "true",
    "referring/unambiguous": "true of no other region",
}

Record = Mapping[str, Any]


def evaluate_run(model: Captioner, protocol: EvaluationProtocol, run: ProtocolRun, num_images: int) -> dict[str, Any]:
    """Evaluate a model and the baselines on the scenes of one run of a protocol.

    The model describes the regions twice: read from files in the publishers' layout, as the protocol does, and directly
    from the dataset, which has the ground truth of all regions.

    Args:
        model: Model that predicts captions.
        protocol: Evaluation protocol.
        run: One of its runs.
        num_images: Number of scenes.

    Returns:
        The collection, split, counts, published scores, and for each system its scores with intervals.
    """
    from sca_registry import datasets

    from sca.data.export import export_dataset
    from sca.data.referring_scenes import ReferringScenes
    from sca.evaluation.evaluate import evaluate
    from sca.evaluation.scoring import score_records

    collection = datasets.get_card(run.dataset).options["collection"]
    scenes = ReferringScenes(run.split, collection, num_images)
    metrics = (*protocol.metrics, "referring")
    with TemporaryDirectory() as folder:
        root = export_dataset(scenes, Path(folder, collection), "refcocog" if collection == "refcocog" else "refcoco")
        files = {"name": run.dataset, "root": str(root), **run.dataset_options}
        file_report = evaluate(model, files, run.split, prompting=run.prompting, metrics=())
    report = evaluate(model, scenes, prompting=run.prompting, metrics=())
    assert file_report is not None
    assert report is not None
    if _get_captions(file_report.records) != _get_captions(report.records):
        raise SystemExit(f"{run.name}: the captions for the exported files differ from those for the dataset")
    scores_by_system = {
        name: {
            score.name: {"value": score.value, "ci_low": score.ci_low, "ci_high": score.ci_high}
            for score in score_records(recaption(report.records), metrics, protocol.metric_options).scores
            if score.name in SCORE_LABELS
        }
        for name, recaption in SYSTEMS.items()
    }
    return {
        "collection": collection,
        "split": run.split,
        "num_images": len({record["image_id"] for record in report.records}),
        "num_regions": len(report.records),
        "num_expressions": sum(len(record["truth"]["phrases"]) for record in report.records),
        "published": dict(zip(run.scores, run.published[PUBLISHED_SYSTEM], strict=True)),
        "scores": scores_by_system,
    }


def evaluate_comprehension(
    model: Captioner, protocol: EvaluationProtocol, run: ProtocolRun, num_images: int
) -> dict[str, Any]:
    """Find the region of each expression in the scenes of one run of the protocol.

    Args:
        model: Model that predicts captions.
        protocol: Evaluation protocol.
        run: One of its runs.
        num_images: Number of scenes.

    Returns:
        The collection, split, number of expressions, and accuracy with its interval.
    """
    from sca.data.referring_scenes import ReferringScenes
    from sca.evaluation.evaluate import evaluate

    collection = run.dataset_options["collection"]
    scenes = ReferringScenes(run.split, collection, num_images)
    report = evaluate(model, scenes, prompting=run.prompting, metrics=protocol.metrics)
    assert report is not None
    (accuracy,) = (each for each in report.scoring.scores if each.name == "comprehension/accuracy")
    return {
        "collection": collection,
        "split": run.split,
        "num_expressions": accuracy.num_samples,
        "accuracy": {"value": accuracy.value, "ci_low": accuracy.ci_low, "ci_high": accuracy.ci_high},
    }


def _get_captions(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    return [(record["caption"], record["truth"]["phrases"]) for record in records]


def keep_captions(records: Sequence[Record]) -> list[Record]:
    """Return the records unchanged."""
    return list(records)


def caption_with_classes(records: Sequence[Record]) -> list[Record]:
    """Replace each caption with the true class name."""
    return [{**record, "caption": f"a {record['truth']['name']}"} for record in records]


def caption_with_distractors(records: Sequence[Record]) -> list[Record]:
    """Replace each caption with the true size, texture, color and shape of another region of the same class."""
    from sca.data.scenes import compose_phrase

    recaptioned = []
    for record in records:
        attributes = record["truth"]["attributes"]
        distractor = next(each for each in attributes["distractors"] if each["shape"] == attributes["shape"])
        recaptioned.append({**record, "caption": compose_phrase(distractor)})
    return recaptioned


def caption_with_attributes(records: Sequence[Record]) -> list[Record]:
    """Replace each caption with the true size, texture, color and shape of the region, without a relation."""
    from sca.data.scenes import compose_phrase

    return [
        {**record, "caption": compose_phrase({**record["truth"]["attributes"], "relation": None})} for record in records
    ]


def caption_with_truth(records: Sequence[Record]) -> list[Record]:
    """Replace each caption with the true one that `scenes` has for such a region."""
    from sca.data.scenes import compose_phrase

    return [{**record, "caption": compose_phrase(record["truth"]["attributes"])} for record in records]


SYSTEMS: dict[str, Callable[[Sequence[Record]], list[Record]]] = {
    "sca-tiny": keep_captions,
    "true caption": caption_with_truth,
    "true attributes, no relation": caption_with_attributes,
    "attributes of another region of the class": caption_with_distractors,
    "class name": caption_with_classes,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/studies/referring_expressions.py", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--num-images", type=int, default=100, help="Scenes per split.")
    parser.add_argument("--out", type=Path, help="JSON file for the results.")
    args = parser.parse_args(arguments)

    from sca_bench.worker import collect_environment

    from sca.evaluation.protocol import read_protocol
    from sca.inference.factory import load_captioner

    model = load_captioner("sca-tiny")
    rows = [
        evaluate_run(model, protocol, run, args.num_images)
        for protocol in map(read_protocol, PROTOCOLS)
        for run in protocol.runs
    ]
    protocol = read_protocol(COMPREHENSION_PROTOCOL)
    results = {
        "num_images": args.num_images,
        "rows": rows,
        "comprehension": [evaluate_comprehension(model, protocol, run, args.num_images) for run in protocol.runs],
        "environment": collect_environment("cpu"),
    }
    print(render_results(results), render_comprehension(results), sep="\n\n")
    write_results(results, args.out)


def render_results(results: Mapping[str, Any]) -> str:
    """Render a Markdown table of scores times 100 with their intervals, and the published scores on photographs."""
    lines = [f"| | | {' | '.join(SCORE_LABELS.values())} |", "| --- | --- |" + " ---: |" * len(SCORE_LABELS)]
    for row in results["rows"]:
        title = _format_title(row)
        for system, scores in row["scores"].items():
            cells = [_format_cell(scores[name]) for name in SCORE_LABELS]
            lines.append(f"| {title} | {system} | {' | '.join(cells)} |")
        published = [format_score(row["published"].get(name)) for name in SCORE_LABELS]
        lines.append(f"| {title}, photographs | {PUBLISHED_SYSTEM} (published) | {' | '.join(published)} |")
    return "\n".join(lines)


def render_comprehension(results: Mapping[str, Any]) -> str:
    """Render a Markdown table of the accuracy of comprehension times 100, with its intervals."""
    lines = ["| | expressions | accuracy (95% CI) |", "| --- | ---: | ---: |"]
    for row in results["comprehension"]:
        lines.append(f"| {_format_title(row)} | {row['num_expressions']} | {_format_cell(row['accuracy'])} |")
    return "\n".join(lines)


def _format_title(row: Mapping[str, Any]) -> str:
    return f"{COLLECTION_NAMES[row['collection']]} {row['split']}"


def _format_cell(score: Mapping[str, Any]) -> str:
    return f"{format_score(score['value'])} ({format_interval(score['ci_low'], score['ci_high'])})"


if __name__ == "__main__":
    main()
