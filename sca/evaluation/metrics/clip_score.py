"""Reference-free agreement of a caption with the image crop of its region (CLIPScore, arXiv 2104.08718)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from PIL import Image
from sca_registry.contracts import MetricOutput

from sca.evaluation.metric_output import make_mean_output
from sca.evaluation.records import Record, require_records
from sca.io.validation import check_range

SCALE = 2.5
TEXT_PREFIX = "A photo depicts "


class ClipScore:
    """2.5 times the cosine similarity, clipped at 0, of the CLIP embeddings of the region's crop and the caption.

    The crop is that of the ground-truth box; the images are read. Published scores use ViT-B-32 with the tag "openai".

    Args:
        model: Model name of open_clip, or local-dir:FOLDER.
        pretrained: Tag of open_clip, or a file.
        batch_size: Regions per batch.
        device: A torch device.

    Raises:
        ValueError: No weights are specified, `batch_size` is below 1, or open_clip is not installed.
    """

    required_fields: tuple[str, ...] = ("image", "task=caption", "caption", "truth.box")

    def __init__(
        self, model: str = "ViT-B-32", pretrained: str | None = None, batch_size: int = 64, device: str = "cpu"
    ):
        check_range("batch_size", batch_size, int, 1)
        if pretrained is None and not model.startswith(("local-dir:", "hf-hub:")):
            raise ValueError(
                "needs weights; set clip-score.pretrained=openai (downloads them) or to a file, or "
                "clip-score.model=local-dir:FOLDER"
            )
        try:
            import open_clip
        except ImportError:
            raise ValueError("needs open_clip: pip install 'segment-caption-anything[clip]'") from None
        clip_model, _, transform = open_clip.create_model_and_transforms(model, pretrained=pretrained, device=device)
        self.model: Any = clip_model.eval()  # a CLIP of open_clip, which has no types
        self.transform: Callable[[Image.Image], torch.Tensor] = transform
        self.tokenizer: Callable[..., torch.Tensor] = open_clip.get_tokenizer(model)
        self.batch_size = batch_size
        self.device = device
        self.implementation: str = f"open_clip {version('open_clip_torch')}, {model} {pretrained or ''}".rstrip()

    @torch.inference_mode()
    def __call__(self, records: Sequence[Record], load_image: Callable[[Record], Image.Image]) -> MetricOutput:
        scored_records = require_records(records, self.required_fields[1:], "clip-score")
        values = []
        for start in range(0, len(scored_records), self.batch_size):
            chunk = scored_records[start : start + self.batch_size]
            crops = torch.stack(
                [self.transform(_crop_region(load_image(record), record["truth"]["box"])) for record in chunk]
            )
            texts = self.tokenizer([TEXT_PREFIX + " ".join(record["caption"].split()) for record in chunk])
            image_embeddings = self.model.encode_image(crops.to(self.device), normalize=True)
            text_embeddings = self.model.encode_text(texts.to(self.device), normalize=True)
            values += (SCALE * (image_embeddings * text_embeddings).sum(1).clamp(min=0)).tolist()
        return make_mean_output({"clip-score": np.array(values)}, scored_records)


def _crop_region(image: Image.Image, box: Sequence[float]) -> Image.Image:
    """Crop a box of at least one pixel."""
    x1, y1, x2, y2 = box
    left, top = min(int(x1), image.width - 1), min(int(y1), image.height - 1)
    return image.crop((left, top, max(left + 1, round(x2)), max(top + 1, round(y2))))
