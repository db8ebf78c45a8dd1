"""Measure the search for regions by text: `python benchmarks/studies/find.py [--out FILE]`

Texts are drawn from all true descriptions of the shapes of unseen synthetic scenes, complete and partial ones ("a
striped circle"), that fit exactly one shape of the scene. Measures how often the right region is first, with true boxes
and with the regions of everything mode, and how well the best score of an image separates these texts from texts that
fit none of its shapes. Several scores are compared, and the CPU time of search with that of captioning. Intervals are
95% bootstrap intervals over scenes.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from sca_registry.contracts import Prompt, Region

from sca.data.scenes import Scenes, is_relation_true, parse_statement
from sca.evaluation.bootstrap import bootstrap_scores, compute_interval, make_mean_statistics
from sca.inference.engine import EncodedImages, Engine
from sca.inference.find_options import DEFAULT_THRESHOLD
from sca.inference.text_search import RegionIndex, encode_text, find_candidate_regions, index_regions
from sca.io.masks import mask_to_box
from sca.io.score_format import format_interval, format_score
from study_results import write_results

SEED = 11  # of scenes on which nothing was selected
TEXTS_PER_SCENE = 10
NUM_RESAMPLES = 1000
METHODS = {  # label -> score of (log-likelihoods of regions, of no image, number of tokens)
    "as a caption": lambda whole, *_: whole.regions,
    "as a caption, minus no image (zero queries)": lambda whole, *_: whole.regions - whole.no_image,
    "as a caption, minus no image (mean region)": lambda whole, *_: whole.regions - whole.mean_region,
    "as a caption, minus no image (gray image)": lambda whole, *_: whole.regions - whole.gray_image,
    "best reading": lambda _, best, __: best.regions,
    "best reading, per token": lambda _, best, length: best.regions / length,
    "best reading, minus no image (zero queries)": lambda _, best, __: best.regions - best.no_image,
    "best reading, minus no image (mean region)": lambda _, best, __: best.regions - best.mean_region,
    "best reading, minus no image (gray image)": lambda _, best, __: best.regions - best.gray_image,
    "relative gain over no image (mean region)": lambda _, best, __: 1 + best.regions / max(-best.mean_region, 1),
    "relative gain over no image (gray image)": lambda _, best, __: 1 + best.regions / max(-best.gray_image, 1),
    "relative gain over no image (zero queries), used": lambda _, best, __: (
        (best.regions - best.no_image) / max(-best.no_image, 1)
    ),
}
USED_METHOD = list(METHODS)[-1]


class LogLikelihoods(NamedTuple):
    """Log-likelihoods of a text: of (N,) regions, and of three kinds of "no image"."""

    regions: np.ndarray
    no_image: float
    mean_region: float
    gray_image: float


class SearchText(NamedTuple):
    """Text to search in a scene; `target` is the index of the only region that it fits, None if it fits none."""

    scene: int
    text: str
    target: int | None


def list_true_descriptions(regions: Sequence[Region]) -> dict[str, list[int]]:
    """Return all descriptions of the regions of a scene, and the indices of the regions that each fits.

    A description names the shape, any of size, texture and color, and possibly one of the relations in the phrases of
    the region.
    """
    texts = {
        describe_region(region, is_named, relation)
        for region in regions
        for is_named in product((True, False), repeat=3)
        for relation in ("", *(phrase[len(region.phrases[0]) :] for phrase in region.phrases[1:]))
    }
    return {text: list_matches(text, regions) for text in sorted(texts)}


def describe_region(region: Region, is_named: Sequence[bool], relation: str) -> str:
    names = (region.attributes[fact] for fact in ("size", "texture", "color"))
    terms = [name for name, keep in zip(names, is_named, strict=True) if keep]
    terms.append(region.attributes["shape"])
    return f"{'an' if terms[0][0] in 'aeiou' else 'a'} {' '.join(terms)}{relation}"


def list_matches(text: str, regions: Sequence[Region]) -> list[int]:
    """Return the indices of the regions that a description fits."""
    statement = parse_statement(text)
    assert statement is not None  # it names a shape
    stated = {fact: getattr(statement, fact) for fact in ("size", "texture", "color", "shape")}
    return [
        index
        for index, region in enumerate(regions)
        if all(value is None or region.attributes[fact] == value for fact, value in stated.items())
        and (statement.relation is None or is_relation_true(statement, region, regions))
    ]


def draw_texts(scenes: Sequence[Any]) -> list[SearchText]:
    """Draw texts that fit exactly one region of their scene, and as many that fit none."""
    rng = random.Random(SEED)
    matching = []
    for index, scene in enumerate(scenes):
        unique = [(text, fits[0]) for text, fits in list_true_descriptions(scene.regions).items() if len(fits) == 1]
        drawn = rng.sample(unique, min(TEXTS_PER_SCENE, len(unique)))
        matching += [SearchText(index, text, target) for text, target in drawn]
    false = []
    for index, scene in enumerate(scenes):
        others = [each.text for each in matching if each.scene != index]
        rng.shuffle(others)
        wrong = (text for text in others if not list_matches(text, scene.regions))
        false += [SearchText(index, next(wrong), None) for each in matching if each.scene == index]
    return matching + false


class ReferenceRows:
    """Rows for the kinds of "no image" that are compared."""

    def __init__(self, engine: Engine):
        scenes = Scenes("val", num_images=20)
        prefixes = [index_true_boxes(engine, scenes[i]).prefix[1:] for i in range(len(scenes))]
        size = engine.model.encoder.image_format.size
        gray_level = tuple(round(255 * mean) for mean in engine.model.encoder.image_format.mean)
        gray_image = Image.new("RGB", (size, size), gray_level)
        gray = index_regions(engine, engine.encode([gray_image]), [[Prompt(box=(0, 0, size, size))]])
        mean_region = torch.cat(prefixes).mean(0, keepdim=True)
        self.index = RegionIndex(engine.model, torch.cat((mean_region, gray.prefix[1:])))

    def compute_readings(
        self, index: RegionIndex, texts: Sequence[str]
    ) -> tuple[list[LogLikelihoods], list[LogLikelihoods]]:
        """Return the log-likelihoods of texts as captions, and in the best reading."""
        readings = []
        for compute in (compute_as_captions, RegionIndex.compute_log_likelihoods):
            rows, references = compute(index, texts).double().numpy(), compute(self.index, texts).double().numpy()
            readings.append(
                [
                    LogLikelihoods(rows[1:, column], rows[0, column], references[1, column], references[2, column])
                    for column in range(len(texts))
                ]
            )
        return readings[0], readings[1]


@torch.inference_mode()
def compute_as_captions(index: RegionIndex, texts: Sequence[str]) -> torch.Tensor:
    """Return (1 + N, number of texts) log-likelihoods of texts as captions, without the best reading."""
    columns = [index.compute_text_log_probs(index.prefix, encode_text(index.model, text)).sum(1) for text in texts]
    return torch.stack(columns, dim=1)


def index_true_boxes(engine: Engine, scene: Any) -> RegionIndex:
    return index_regions(engine, engine.encode([scene.image]), [[Prompt(box=region.box) for region in scene.regions]])


def index_found_boxes(engine: Engine, scene: Any) -> tuple[RegionIndex | None, list[int | None]]:
    """Return the index of the regions of everything mode, and the true region of each (IoU of boxes above 0.5)."""
    encoded = engine.encode([scene.image])
    regions = find_candidate_regions(engine, encoded)
    if not regions:
        return None, []
    boxes = [mask_to_box(each.mask.rle) for each in regions if each.mask]
    ious = compute_box_ious(boxes, [region.box for region in scene.regions])
    true_regions = [int(row.argmax()) if row.max() > 0.5 else None for row in ious]
    return index_regions(engine, encoded, [[each.prompt for each in regions]]), true_regions


def compute_box_ious(boxes: Sequence[Any], others: Sequence[Any]) -> np.ndarray:
    from sca.nn.boxes import compute_box_iou

    return compute_box_iou(torch.tensor(boxes, dtype=torch.float32), torch.tensor(others)).numpy()


def measure_scores(
    engine: Engine, scenes: Sequence[Any], texts: Sequence[SearchText], index_scene: Callable[..., Any]
) -> dict[str, dict[str, Any]]:
    """Return top-1 accuracy and rejection AUC of each method."""
    references = ReferenceRows(engine)
    rows: dict[str, list[tuple[SearchText, bool, float]]] = {name: [] for name in METHODS}
    for scene_index, scene in enumerate(scenes):
        scene_texts = [each for each in texts if each.scene == scene_index]
        indexed = index_scene(engine, scene)
        index, true_regions = indexed if isinstance(indexed, tuple) else (indexed, range(len(scene.regions)))
        if index is None:
            for name in METHODS:
                rows[name] += [(each, False, -np.inf) for each in scene_texts]
            continue
        whole, best = references.compute_readings(index, [each.text for each in scene_texts])
        for each, *likelihoods in zip(scene_texts, whole, best, strict=True):
            num_tokens = len(encode_text(index.model, each.text))
            for name, method in METHODS.items():
                scores = method(*likelihoods, num_tokens)
                is_right = each.target is not None and true_regions[int(scores.argmax())] == each.target
                rows[name].append((each, is_right, float(scores.max())))
    return {name: summarize_rows(each) for name, each in rows.items()}


def summarize_rows(rows: Sequence[tuple[SearchText, bool, float]]) -> dict[str, Any]:
    matching = [row for row in rows if row[0].target is not None]
    is_right = np.array([right for _, right, _ in matching], float)
    groups = np.array([text.scene for text, _, _ in matching])
    low, high = compute_interval(bootstrap_scores(make_mean_statistics(is_right), groups)) or (np.nan, np.nan)
    return {
        "top1": float(is_right.mean()),
        "top1_interval": [low, high],
        **compute_auc(rows),
        "num_texts": len(matching),
        "accepted": float(np.mean([score >= DEFAULT_THRESHOLD for _, _, score in matching])),
        "rejected": float(np.mean([score < DEFAULT_THRESHOLD for text, _, score in rows if text.target is None])),
    }


def compute_auc(rows: Sequence[tuple[SearchText, bool, float]]) -> dict[str, Any]:
    """Return the area under the ROC curve of true against false texts, with an interval over scenes."""
    true = [(text.scene, score) for text, _, score in rows if text.target is not None]
    false = [(text.scene, score) for text, _, score in rows if text.target is None]
    num_scenes = 1 + max(scene for scene, _ in true + false)
    true_scores, false_scores = (np.array([score for _, score in each]) for each in (true, false))
    wins = (true_scores[:, None] > false_scores) + 0.5 * (true_scores[:, None] == false_scores)
    true_scenes, false_scenes = (np.eye(num_scenes)[[scene for scene, _ in each]] for each in (true, false))
    wins_by_scene = true_scenes.T @ wins @ false_scenes  # (S, S)
    pairs_by_scene = np.outer(true_scenes.sum(0), false_scenes.sum(0))
    counts = np.random.default_rng(0).multinomial(num_scenes, np.full(num_scenes, 1 / num_scenes), NUM_RESAMPLES)
    resampled = [(each @ wins_by_scene @ each) / (each @ pairs_by_scene @ each) for each in counts]
    low, high = compute_interval(np.array(resampled)) or (np.nan, np.nan)
    return {"auc": float(wins.mean()), "auc_interval": [low, high]}


def measure_speed(engine: Engine, num_images: int) -> dict[str, Any]:
    """Return the CPU seconds of captioning and of searching images with true boxes, image features cached for both."""
    scenes = [Scenes("test", num_images=num_images, seed=SEED)[i] for i in range(num_images)]
    requests = [[Prompt(box=region.box) for region in scene.regions] for scene in scenes]
    batches = [slice(start, start + 8) for start in range(0, num_images, 8)]  # as in `sca caption`
    encoded_batches = [engine.encode([scene.image for scene in scenes[batch]]) for batch in batches]
    encoded = EncodedImages(
        [scene.image for scene in scenes],
        torch.cat([each.require_features() for each in encoded_batches]),
        [frame for each in encoded_batches for frame in each.frames],
    )

    def caption_images() -> None:
        for batch, encoded_batch in zip(batches, encoded_batches, strict=True):
            engine.caption_batch(encoded_batch, requests[batch])

    caption_images()  # warm up
    index = index_regions(engine, encoded, requests)
    return {
        "num_images": num_images,
        "num_regions": len(index),
        "caption_seconds": measure_cpu_seconds(caption_images),
        "generation_seconds": measure_cpu_seconds(lambda: engine.model.generate_from_prefix(index.prefix[1:])),
        "index_seconds": measure_cpu_seconds(lambda: index_regions(engine, encoded, requests)),
        "search_seconds": measure_cpu_seconds(lambda: index.score_texts(["a striped circle"])),
    }


def measure_cpu_seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def iter_result_lines(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of Markdown tables of the results."""
    yield "| score | top-1, true boxes (95% CI) | rejection AUC (95% CI) | top-1, found boxes (95% CI) |"
    yield "| --- | ---: | ---: | ---: |"
    for name in METHODS:
        true_boxes, found_boxes = (results[kind][name] for kind in ("true_boxes", "found_boxes"))
        cells = (
            f"{format_score(each[key])} ({format_interval(*each[f'{key}_interval'])})"
            for each, key in ((true_boxes, "top1"), (true_boxes, "auc"), (found_boxes, "top1"))
        )
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    speed = results["speed"]
    yield "| CPU time | seconds | captioning / search (x) |"
    yield "| --- | ---: | ---: |"
    search = speed["search_seconds"]
    first_search = speed["index_seconds"] + search
    for label, seconds, ratio in (
        ("captioning", speed["caption_seconds"], None),
        ("generation of the captions only, from cached region embeddings", speed["generation_seconds"], None),
        ("first search", first_search, speed["caption_seconds"] / first_search),
        ("each further search", search, speed["caption_seconds"] / search),
        ("each further search, compared with generation only", search, speed["generation_seconds"] / search),
    ):
        yield f"| {label} | {seconds:.3g} | {'' if ratio is None else f'{ratio:.1f}'} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/studies/find.py", description=__doc__.split("\n")[0])
    parser.add_argument("--num-scenes", type=int, default=100, help="Scenes with true boxes.")
    parser.add_argument("--num-searched-scenes", type=int, default=50, help="Scenes searched with everything mode.")
    parser.add_argument("--num-timed-images", type=int, default=200, help="Images for the timing.")
    parser.add_argument("--out", type=Path, help="JSON file for the results.")
    args = parser.parse_args(arguments)

    from sca_bench.worker import collect_environment

    import sca

    torch.set_num_threads(1)
    engine = Engine(sca.load("sca-tiny"))
    all_scenes = Scenes("test", num_images=args.num_scenes, seed=SEED)
    scenes = [all_scenes[i] for i in range(args.num_scenes)]
    texts = draw_texts(scenes)
    searched = scenes[: args.num_searched_scenes]
    results = {
        "model": "sca-tiny",
        "num_scenes": len(scenes),
        "num_searched_scenes": len(searched),
        "true_boxes": measure_scores(engine, scenes, texts, index_true_boxes),
        "found_boxes": measure_scores(
            engine, searched, [each for each in texts if each.scene < len(searched)], index_found_boxes
        ),
        "speed": measure_speed(engine, args.num_timed_images),
        "environment": collect_environment("cpu"),
    }
    print("\n".join(iter_result_lines(results)))
    write_results(results, args.out)


if __name__ == "__main__":
    main()
