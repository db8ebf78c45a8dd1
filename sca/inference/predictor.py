"""From a picture and what a user points at to masks and captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from sca_registry.contracts import TASKS, Caption, Prompt, Prompts, TokenUsage
from sca_registry.spec import Everything

from sca.inference.engine import REGIONS, Encoded, Mask, MaskPredictor, check_task, ious_of
from sca.io.masks import box_of
from sca.language_models.usage import count_tokens
from sca.nn.masks import best_masks

if TYPE_CHECKING:
    from sca.model import SegmentCaptioner


class Predictor(MaskPredictor):
    """Masks and captions of a composed model: `set_image` once, then `predict` for any number of regions.

        predictor = sca.Predictor(sca.load("sca-tiny"))
        predictor.set_image(image)
        captions = predictor.predict(boxes=[(370, 434, 448, 512)])

    Args:
        model: The model, which is set to eval mode.
        regions: Regions that are segmented and mixed at a time: limits memory, changes no result.
    """

    model: SegmentCaptioner

    def __init__(self, model: SegmentCaptioner, regions: int = REGIONS):
        super().__init__(model, regions)

    @property
    def generation(self) -> Mapping[str, Any]:
        """The model's own settings of generation."""
        return self.model.spec.generation

    @property
    def everything(self) -> Everything:
        return self.model.spec.search

    @torch.inference_mode()
    def answer(
        self,
        encoded: Encoded,
        requests: Sequence[Sequence[Prompt]],
        task: str = "caption",
        *,
        masks: bool = True,
        **generation: Any,
    ) -> list[list[Caption]]:
        check_task(task)
        flat = [(owner, prompt, region) for owner, r in enumerate(requests) for region, prompt in enumerate(r)]
        answers: list[Caption | None] = [None] * len(flat)
        for places, prompts in self.processor.prompts(requests, encoded.frames):
            told, usages, codes, ious = self._bucket(encoded, prompts, TASKS.index(task), masks, generation)
            for row, place in enumerate(places):
                _, prompt, region = flat[place]
                box = prompt.box or (codes[row] and box_of(codes[row]))
                (text, score), *others = told[row]
                answers[place] = Caption(
                    text, score, box, codes[row], ious[row], prompt, region, tuple(others), usages[row]
                )
        captions: list[list[Caption]] = [[] for _ in requests]
        for (owner, _, _), answer in zip(flat, answers, strict=True):
            captions[owner].append(answer)
        return captions

    def tell(
        self, masks: Sequence[Mask], request: Sequence[Prompt], task: str = "caption", **generation: Any
    ) -> list[Caption]:
        (captions,) = self.answer(self.encoded, [request], task, masks=False, **generation)
        told = zip(captions, masks, strict=True)
        return [replace(caption, mask=code, box=box_of(code), iou=iou) for caption, (code, iou) in told]

    def _bucket(
        self, encoded: Encoded, prompts: Prompts, task: int, masks: bool, generation: Mapping[str, Any]
    ) -> tuple[list[list[tuple[str, float]]], list[TokenUsage], list[Any], list[Any]]:
        """Texts with their scores, tokens, mask (RLE) and predicted IoU of each row of homogeneous prompts; the last
        two may be None.
        """
        prefixes, codes, ious = [], [], []
        prepared = None
        for chunk in prompts.to(self.device).chunks(self.regions):
            regions = self.model.segment(encoded.features, chunk)
            prepared = self.model.prepare(regions) if prepared is None else prepared
            tasks = torch.full((len(chunk),), task, device=self.device)
            prefixes.append(self.model.prefix(self.model.mix(regions, prepared), tasks))
            if regions.masks is not None and masks:
                best = best_masks(regions.masks, regions.scores)
                codes += self._masks(best, chunk.owner, encoded.frames)
            if regions.scores is not None:
                ious += ious_of(regions.scores.amax(1))
            del regions  # the grids of its regions are large, and words need room
        prefix = torch.cat(prefixes)  # (N, K, E)
        generated = self.model.generate_from_prefix(prefix, **generation)
        nothing = [None] * len(prompts)
        scores = generated.scores.exp().tolist()
        ids = generated.ids.tolist()
        told = [list(zip(self._texts(rows), each, strict=True)) for rows, each in zip(ids, scores, strict=True)]
        tokenizer = self.model.language_model.tokenizer
        usages = [count_tokens(prefix.shape[1], rows, [tokenizer.eos]) for rows in ids]
        return told, usages, codes or nothing, ious or nothing

    def _texts(self, ids: Sequence[Sequence[int]]) -> list[str]:
        tokenizer = self.model.language_model.tokenizer
        if tokenizer is None:
            raise ValueError(
                "the language model has no tokenizer, so it gives ids and no words: give it one with "
                "`sca import MODEL OUT --tokenizer FOLDER`, or use SegmentCaptioner.generate"
            )
        return [tokenizer.decode(row) for row in ids]
