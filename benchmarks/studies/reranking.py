"""Test whether reranking helps: `python benchmarks/studies/reranking.py MODEL [--max-images N] [--out FILE]`

Generates several captions per region and selects the one with the highest sum of its log-likelihood per token and the
weighted log-probability of its own region among all regions of the image. The latter prefers captions that match
their own region best. Both come from the model itself. Weight 0 selects the best beam per token.

Evaluates captions of synthetic scenes with box prompts for several weights, and greedy captions. Prints a Markdown
table; differences to greedy captions have 95% confidence intervals over images.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sca_registry.contracts import Caption, Prompt

from sca.inference.engine import EncodedImages, Engine
from sca.inference.text_search import encode_text, index_regions
from score_table import compute_differences, render_table
from study_results import write_results

NUM_CAPTIONS = 6
WEIGHTS = (0.0, 0.1, 0.3, 1.0)
GREEDY = "greedy"
SCORE_LABELS = {
    "cider-d": "CIDEr-D",
    "attributes/all": "all four attributes correct",
    "relations/stated": "relation stated",
    "relations/correct": "relations correct",
    "referring/unambiguous": "true of no other region",
}
METRICS = {  # by dataset and split
    ("scenes", "test"): ("cider-d", "attributes", "relations"),
    ("referring-scenes", "val"): ("referring",),
}


class RerankingEngine(Engine):
    """Engine that generates several captions per region and selects the best one for its region.

    Args:
        model: Model.
        weight: Weight of the log-probability of the region.
    """

    def __init__(self, model: Any, weight: float):
        super().__init__(model)
        self.weight = weight

    @property
    def metadata(self) -> dict[str, Any]:
        """Options that identify the engine in evaluation runs."""
        return {"reranking_weight": self.weight}

    @torch.inference_mode()
    def caption_batch(
        self,
        encoded: EncodedImages,
        requests: Sequence[Sequence[Prompt]],
        task: str = "caption",
        *,
        return_masks: bool = True,
        **generation: Any,
    ) -> list[list[Caption]]:
        options = {**generation, "num_beams": NUM_CAPTIONS, "num_captions": NUM_CAPTIONS}
        captions = super().caption_batch(encoded, requests, task, return_masks=return_masks, **options)
        if not any(requests):
            return captions
        index, first_row, results = index_regions(self, encoded, requests, task), 1, []  # row 0 is no image
        for image_captions in captions:
            prefix = index.prefix[first_row : first_row + len(image_captions)]
            first_row += len(image_captions)
            results.append([self._select_text(index, prefix, row, each) for row, each in enumerate(image_captions)])
        return results

    def _select_text(self, index: Any, prefix: torch.Tensor, row: int, caption: Caption) -> Caption:
        """Return a caption with the best of its texts for the region of a row of the prefixes of an image."""
        texts = list(dict.fromkeys(text for text, _ in ((caption.text, 0.0), *caption.alternatives) if text))
        scores = []
        for text in texts:
            log_probs = index.compute_text_log_probs(prefix, encode_text(self.model, text))  # (regions, tokens)
            posterior = log_probs.sum(1).log_softmax(0)[row]
            scores.append(float(log_probs[row].mean() + self.weight * posterior))
        if not texts:
            return caption
        best = max(range(len(texts)), key=scores.__getitem__)
        return replace(caption, text=texts[best], score=math.nan, alternatives=(), usage=None)


def measure_reranking(model: str, max_images: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Evaluate greedy and reranked captions.

    Args:
        model: Model name or folder.
        max_images: Number of scenes.
        folder: Folder for the predictions.

    Returns:
        By method: `scores`, and `differences` to greedy captions with `mean`, `ci_low` and `ci_high`.
    """
    import sca
    from sca.evaluation.predictions import PromptingOptions

    loaded = sca.load(model)
    engines = {GREEDY: Engine(loaded), **{f"weight {weight:g}": RerankingEngine(loaded, weight) for weight in WEIGHTS}}
    prompting = PromptingOptions(tasks=("caption",))
    reports: dict[tuple[str, str], Any] = {}
    for name, engine in engines.items():
        for (dataset, split), metrics in METRICS.items():
            out = folder / name / dataset
            reports[name, dataset] = sca.evaluate(
                engine, dataset, split, prompting=prompting, metrics=metrics, max_images=max_images, folder=out
            )
    results: dict[str, dict[str, Any]] = {name: {"scores": {}, "differences": {}} for name in engines}
    for name, dataset in reports:
        report, greedy_report = reports[name, dataset], reports[GREEDY, dataset]
        names = [each for each in SCORE_LABELS if each in report.scores]
        results[name]["scores"] |= {each: report.scores[each] for each in names}
        results[name]["differences"] |= compute_differences([report], [greedy_report], names)
    return results


def render_results(results: Mapping[str, Any]) -> str:
    """Render a Markdown table of scores, times 100, and of the differences to greedy captions."""
    methods = results["methods"]
    differences = {f"{name}: difference": each["differences"] for name, each in methods.items() if name != GREEDY}
    return render_table(SCORE_LABELS, {name: each["scores"] for name, each in methods.items()}, differences)


def main(arguments: Sequence[str] | None = None) -> None:
    from tempfile import TemporaryDirectory

    parser = argparse.ArgumentParser(prog="python benchmarks/studies/reranking.py", description=__doc__.split("\n")[0])
    parser.add_argument("model", help="Model that generates and scores the captions.")
    parser.add_argument("--max-images", type=int, default=300, help="Number of scenes.")
    parser.add_argument("--out", type=Path, help="JSON file for the results.")
    args = parser.parse_args(arguments)

    from sca_bench.worker import collect_environment

    with TemporaryDirectory() as folder:
        results = {
            "model": args.model,
            "max_images": args.max_images,
            "num_captions": NUM_CAPTIONS,
            "methods": measure_reranking(args.model, args.max_images, Path(folder)),
            "environment": collect_environment("cpu"),
        }
    print(render_results(results))
    write_results(results, args.out)


if __name__ == "__main__":
    main()
