"""Referring expression comprehension: find the region of each expression among given or proposed boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sca_registry.contracts import Prompt, Proposer, Sample

from sca.evaluation.predictions import COMPREHENSION_TASK, make_truth
from sca.inference.text_search import (
    SearchedRegion,
    check_can_find,
    find_regions,
    index_regions,
    list_searched_regions,
)


@dataclass(frozen=True)
class ComprehensionOptions:
    """Options of referring expression comprehension.

    Args:
        proposer: Proposer of the boxes; None for the boxes of all regions of the image in the dataset.
    """

    proposer: Proposer | None = None

    def predict_records(self, captioner: Any, samples: Sequence[tuple[int, Sample]]) -> list[dict[str, Any]]:
        """Predict one record per region with phrases.

        Args:
            captioner: Engine of a model.
            samples: Dataset index and sample of each image.

        Returns:
            The records, in the order of `samples` and their regions. `expressions` contains the `text` of each phrase,
            and the `box` and `score` of the best match; `box` is None if no region was proposed.

        Raises:
            ValueError: The captioner cannot score a text.
        """
        return [record for index, sample in samples for record in self._predict_image(captioner, index, sample)]

    def _predict_image(self, captioner: Any, index: int, sample: Sample) -> list[dict[str, Any]]:
        texts = list(dict.fromkeys(phrase for region in sample.regions for phrase in region.phrases))
        matches = self._find_matches(captioner, sample, texts)
        return [
            {
                "index": index,
                "image_id": sample.image_id,
                "region_id": region.id,
                "task": COMPREHENSION_TASK,
                "control": None,
                "expressions": [{"text": text, **matches[text]} for text in region.phrases],
                "truth": make_truth(region),
            }
            for region in sample.regions
            if region.phrases
        ]

    def _find_matches(self, captioner: Any, sample: Sample, texts: Sequence[str]) -> Mapping[str, dict[str, Any]]:
        """Return the box and score of the best region for each text."""
        engine = check_can_find(captioner)
        encoded = engine.encode([sample.image])
        if self.proposer is None:
            regions = [SearchedRegion(Prompt(box=region.box), None, row) for row, region in enumerate(sample.regions)]
        else:
            proposals = self.proposer(sample.image, sample.image_id)
            regions = list_searched_regions(engine, encoded, None, proposals)
        matches: dict[str, dict[str, Any]] = {text: {"box": None, "score": None} for text in texts}
        if regions and texts:
            index = index_regions(engine, encoded, [[each.prompt for each in regions]])
            for match in find_regions(engine, encoded, regions, index, texts, top=1):
                assert match.name is not None  # the text
                box = None if match.box is None else [float(value) for value in match.box]
                matches[match.name] = {"box": box, "score": match.proposal_score}
        return matches
