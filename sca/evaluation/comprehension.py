"""Referring expression comprehension: find the region of each expression among given or proposed boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sca_registry.contracts import Prompt, Proposer, Region, Sample

from sca.evaluation.predictions import COMPREHENSION_TASK, make_truth
from sca.inference.engine import EncodedImages, Engine
from sca.inference.text_search import (
    CandidateRegion,
    check_can_find,
    check_text,
    find_candidate_regions,
    find_regions,
    index_regions,
)


@dataclass(frozen=True)
class ComprehensionOptions:
    """Options of referring expression comprehension.

    Args:
        proposer: Proposer of the boxes; None for the boxes of all regions of the image in the dataset, including those
            without phrases.
    """

    proposer: Proposer | None = None

    def predict_records(self, captioner: Any, samples: Sequence[tuple[int, Sample]]) -> list[dict[str, Any]]:
        """Predict one record per region with phrases. The images are encoded in one batch.

        Args:
            captioner: Engine of a model.
            samples: Dataset index and sample of each image.

        Returns:
            The records, in the order of `samples` and their regions. `expressions` contains the `text` of each phrase,
            and the `box` and `score` of the best match; `box` is None if no region was proposed.

        Raises:
            ValueError: The captioner cannot score a text.
            InputError: The model cannot read an expression, because it is too long.
        """
        engine = check_can_find(captioner)
        for _, sample in samples:
            for region in sample.regions:
                for phrase in region.phrases:
                    check_text(engine, phrase, f"region {region.id} of image {sample.image_id}")
        encoded = engine.encode([sample.image for _, sample in samples])
        texts_by_image = [
            list(dict.fromkeys(phrase for region in sample.regions for phrase in region.phrases))
            for _, sample in samples
        ]
        regions_by_image = [
            self._list_regions(engine, encoded.select_image(position), sample) if texts_by_image[position] else []
            for position, (_, sample) in enumerate(samples)
        ]
        requests = [[each.prompt for each in regions] for regions in regions_by_image]
        region_index = index_regions(engine, encoded, requests) if any(requests) else None
        records: list[dict[str, Any]] = []
        first_row = 0
        for position, (index, sample) in enumerate(samples):
            texts, regions = texts_by_image[position], regions_by_image[position]
            rows, first_row = range(first_row, first_row + len(regions)), first_row + len(regions)
            matches: dict[str, dict[str, Any]] = {text: {"box": None, "score": None} for text in texts}
            if region_index is not None and regions:
                image, needs_masks = encoded.select_image(position), any(map(_needs_mask, regions))
                for match in find_regions(
                    engine, image, regions, region_index, texts, top=1, rows=rows, return_masks=needs_masks
                ):
                    assert match.name is not None  # the text
                    box = None if match.box is None else [float(value) for value in match.box]
                    matches[match.name] = {"box": box, "score": match.proposal_score}
            records += [_make_record(index, sample, region, matches) for region in sample.regions if region.phrases]
        return records

    def _list_regions(self, engine: Engine, encoded: EncodedImages, sample: Sample) -> list[CandidateRegion]:
        """Return the regions of one image to choose from."""
        if self.proposer is None:
            return [CandidateRegion(Prompt(box=region.box), None, row) for row, region in enumerate(sample.regions)]
        return find_candidate_regions(engine, encoded, None, self.proposer(sample.image, sample.image_id))


def _needs_mask(region: CandidateRegion) -> bool:
    """Return whether the box of a region is only known from a predicted mask."""
    return region.mask is None and region.prompt.box is None


def _make_record(
    index: int, sample: Sample, region: Region, matches: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    return {
        "index": index,
        "image_id": sample.image_id,
        "region_id": region.id,
        "task": COMPREHENSION_TASK,
        "control": None,
        "expressions": [{"text": text, **matches[text]} for text in region.phrases],
        "truth": make_truth(region),
    }
