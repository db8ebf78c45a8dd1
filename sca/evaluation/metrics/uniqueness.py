"""Whether a caption picks out its own region among the regions of its image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from sca_registry.contracts import MetricOutput, Prompt

from sca.evaluation.records import Record, collect_region_ids, compute_nanmean, group_by_image, require_records
from sca.inference.factory import load_captioner
from sca.inference.text_search import check_can_find, check_text, index_regions


class Uniqueness:
    """Fraction of captions whose own region has the best score of the text search among the regions of its image.

    A region that shares the best score with another one counts as wrong. Images with one region are not judged.
    `uniqueness/regions` is the number of judged captions, and `uniqueness/chance` the expected accuracy of a random
    choice. The regions are the true boxes of the records; the images are read.

    Args:
        model: Model that scores the captions: anything that `sca.load_captioner` accepts and that has a language model.
        device: A torch device.

    Raises:
        ValueError: No model is specified, or it cannot score a text.
    """

    required_fields: tuple[str, ...] = ("image", "task=caption", "caption", "truth.box")

    def __init__(self, model: str | None = None, device: str = "cpu"):
        if model is None:
            raise ValueError("needs a model that scores captions; set uniqueness.model=NAME, such as sca-tiny")
        self.engine = check_can_find(load_captioner(model, device), model)
        self.implementation: str = f"sca, scored by {model}"

    def __call__(self, records: Sequence[Record], load_image: Callable[[Record], Image.Image]) -> MetricOutput:
        scored_records = require_records(records, self.required_fields[1:], "uniqueness")
        for record in scored_records:
            if record["caption"].strip():
                location = f"region {record['region_id']} of image {record['image_id']}"
                check_text(self.engine, record["caption"], location)
        judged: list[Record] = []
        is_unique: list[bool] = []
        chances: list[float] = []
        for regions in group_by_image(scored_records).values():
            if len(regions) > 1:
                judged += regions
                is_unique += self._judge_image(load_image(regions[0]), regions)
                chances += [1 / len(regions)] * len(regions)
        per_record = {"uniqueness": np.array(is_unique, float), "uniqueness/chance": np.array(chances, float)}
        values = {name: compute_nanmean(each) for name, each in per_record.items()}
        notes = {} if judged else dict.fromkeys(per_record, "no image has several regions with captions")
        return MetricOutput(
            {**values, "uniqueness/regions": len(judged)}, {**per_record, **collect_region_ids(judged)}, notes=notes
        )

    def _judge_image(self, image: Image.Image, regions: Sequence[Record]) -> list[bool]:
        """Return whether each caption scores higher for its own region than for any other one."""
        prompts = [Prompt(box=tuple(region["truth"]["box"])) for region in regions]
        index = index_regions(self.engine, self.engine.encode([image]), [prompts])
        captions = [region["caption"] for region in regions]
        judgments = [False] * len(regions)  # an empty caption picks out nothing
        stated = [row for row, caption in enumerate(captions) if caption.strip()]
        if stated:
            scores = index.score_texts([captions[row] for row in stated]).double().cpu().numpy()  # (N, stated)
            for column, row in enumerate(stated):
                judgments[row] = bool(scores[row, column] > np.delete(scores[:, column], row).max())
        return judgments
