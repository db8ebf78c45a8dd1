"""The model `sca` of lmms-eval."""

from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

import sca
from sca.inference.batch import caption_requests
from sca.inference.generation_options import resolve_generation_options
from sca.inference.zoom_options import DEFAULT_ZOOM, ZoomValue, resolve_zoom
from sca_lmms_eval.arguments import parse_batch_size, parse_stop_strings
from sca_lmms_eval.regions import PROMPT_TYPES, read_region


class SegmentCaptionAnything(lmms):
    """Captioner of the region of each document; the instruction and the drawn image of the task are not used.

    Args:
        model: Model or captioner, see `sca.load_captioner`.
        device: Device of the model. Defaults to that of the process.
        batch_size: Regions per batch.
        max_batch_size: Ignored.
        prompt_type: "box" for the field `bbox` of the documents, "mask" for `segmentation`.
        zoom: "auto", "off", or the area of the largest region to zoom into, in grid cells.
        precision: Precision of the model, see `sca.load`.
        num_beams: Number of beams.
        max_new_tokens: Maximum number of tokens per caption.
        trust_remote_code: Allow a checkpoint to run its own code.
        allow_external: Allow a checkpoint to refer to files outside its folder.
    """

    def __init__(
        self,
        model: str = "sca-tiny",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: Any = None,
        prompt_type: str = "box",
        zoom: ZoomValue = DEFAULT_ZOOM,
        precision: str | None = None,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        trust_remote_code: bool = False,
        allow_external: bool = False,
    ):
        super().__init__()
        if prompt_type not in PROMPT_TYPES:
            raise ValueError(f"unknown prompt_type {prompt_type!r}; choose from {', '.join(PROMPT_TYPES)}")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.prompt_type = prompt_type
        self.batch_size = parse_batch_size(batch_size)
        self.captioner = sca.load_captioner(
            model,
            device or str(self.accelerator.device),
            trust_remote_code=trust_remote_code,
            allow_external=allow_external,
            **({"precision": precision} if precision else {}),
        )
        self.generation = resolve_generation_options(self.captioner, num_beams=num_beams, max_new_tokens=max_new_tokens)
        self.zoom = resolve_zoom(self.captioner, zoom)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the caption of the region of each request, up to the first stop string of the task."""
        captions: list[str] = []
        for start in tqdm(range(0, len(requests), self.batch_size), disable=self.rank != 0, desc="Captioning regions"):
            batch = [request.args for request in requests[start : start + self.batch_size]]
            regions = [
                read_region(self.task_dict[task][split][doc_id], self.prompt_type, f"{task}, document {doc_id}")
                for *_, doc_id, task, split in batch
            ]
            images, prompts = [image for image, _ in regions], [[prompt] for _, prompt in regions]
            outputs = caption_requests(self.captioner, images, prompts, "caption", zoom=self.zoom, **self.generation)
            for (context, options, *_, task, _), (caption,) in zip(batch, outputs, strict=True):
                text = caption.text
                for stop in parse_stop_strings(options.get("until"), task):
                    text = text.split(stop)[0]
                self.cache_hook.add_partial("generate_until", (context, options), text)
                captions.append(text)
        return captions

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Raise NotImplementedError: the model only generates captions."""
        raise NotImplementedError("the model sca generates captions; choose a task with output_type generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raise NotImplementedError: the model only generates captions."""
        raise NotImplementedError("the model sca has no rounds; choose a task with output_type generate_until")
