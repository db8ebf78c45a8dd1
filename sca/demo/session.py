"""Demo session: the regions of one image, with undo."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image
from sca_registry.contracts import Caption, Prompt

from sca.inference.engine import PredictedMask
from sca.io import masks
from sca.io.errors import InputError
from sca.io.images import open_image_header
from sca.io.prompts import MAX_POINTS, check_prompt
from sca.output.colors import get_region_color
from sca.output.contours import mask_to_svg_path

MAX_UNDO_STEPS = 100


@dataclass(frozen=True)
class SessionRegion:
    """Region of a session.

    Attributes:
        prompt: Prompt in image pixels.
        caption: Caption; None while it is generated.
        masks: Candidate masks, highest predicted IoU first.
        mask_index: Index of the selected mask.
    """

    prompt: Prompt
    caption: Caption | None = None
    masks: tuple[PredictedMask, ...] = ()
    mask_index: int = 0

    @property
    def selected_caption(self) -> Caption | None:
        """Caption with the selected mask; None while it is generated."""
        if self.caption is None or not self.masks:
            return self.caption
        rle, predicted_iou = self.masks[self.mask_index]
        box = self.prompt.box or masks.mask_to_box(rle)
        return replace(self.caption, mask=rle, predicted_iou=predicted_iou, box=box)


@dataclass
class Session:
    """Session of one image in one browser tab.

    Attributes:
        image: Image.
        name: File name of the image.
        regions: Regions in the order of their prompts.
        current_index: Index of the region that further prompts extend; None to begin a new region.
        undo_history: Previous values of `regions` and `current_index`, oldest first.
    """

    image: Image.Image
    name: str
    regions: tuple[SessionRegion, ...] = ()
    current_index: int | None = None
    undo_history: list[tuple[tuple[SessionRegion, ...], int | None]] = field(default_factory=list)

    def handle_event(self, event: Mapping[str, Any]) -> int | None:
        """Handle an event of the canvas.

        Args:
            event: Dictionary with `action`: "undo", "clear", "select_region", "select_mask", "point", "box" or "mask",
                and the arguments of the action in image pixels. A prompt with `new_region` begins a new region.

        Returns:
            Index of the region to caption; None if the event adds no prompt.

        Raises:
            InputError: The prompt does not fit the image.
        """
        action = event.get("action")
        if event.get("new_region") and action in ("point", "box", "mask"):
            self.current_index = None
        match action:
            case "undo":
                if self.undo_history:
                    self.regions, self.current_index = self.undo_history.pop()
            case "clear":
                self._record_change((), None)
            case "select_region":
                self.current_index = self._check_region_index(event.get("region_index"))
            case "select_mask":
                region_index, mask_index = self._check_region_index(event.get("region_index")), event.get("mask_index")
                if (
                    region_index is not None
                    and isinstance(mask_index, int)
                    and mask_index in range(len(self.regions[region_index].masks))
                ):
                    self._replace_region(region_index, replace(self.regions[region_index], mask_index=mask_index))
            case "point":
                label = 1 if event.get("label") else 0
                return self._add_prompt(points=((event.get("x"), event.get("y"), label),))
            case "box":
                return self._add_prompt(box=event.get("box"))
            case "mask":
                return self._add_prompt(mask=self._decode_painted_mask(event.get("image")))
        return None

    def store_caption(self, prompt: Prompt, caption: Caption, mask_candidates: tuple[PredictedMask, ...]) -> None:
        """Store the caption of a region in the current state and in the undo history. Not an undo step itself.

        Args:
            prompt: Prompt of the region, compared by identity.
            caption: Caption of the region.
            mask_candidates: Candidate masks, highest predicted IoU first.
        """

        def set_caption(regions: tuple[SessionRegion, ...]) -> tuple[SessionRegion, ...]:
            return tuple(
                SessionRegion(prompt, replace(caption, region_id=region_index), mask_candidates)
                if region.prompt is prompt
                else region
                for region_index, region in enumerate(regions)
            )

        self.regions = set_caption(self.regions)
        self.undo_history = [(set_caption(regions), current) for regions, current in self.undo_history]

    def revert_prompt(self, prompt: Prompt) -> None:
        """Undo the last step if it added this prompt, whose request failed."""
        if self.undo_history and any(region.prompt is prompt for region in self.regions):
            regions, current = self.undo_history[-1]
            if not any(region.prompt is prompt for region in regions):
                self.regions, self.current_index = regions, current
                self.undo_history.pop()

    def add_found_region(self, caption: Caption) -> None:
        """Add a region found by everything mode. Not an undo step."""
        region = SessionRegion(caption.prompt, replace(caption, region_id=len(self.regions)))
        self.regions = (*self.regions, region)

    def clear_regions(self) -> None:
        """Remove all regions, as one undo step."""
        self._record_change((), None)

    @property
    def captions(self) -> list[Caption]:
        """Captions of all captioned regions, with their selected masks."""
        captions = [region.selected_caption for region in self.regions]
        return [caption for caption in captions if caption is not None]

    def to_canvas_value(self) -> dict[str, Any]:
        """Return the JSON state of the canvas."""
        return {
            "size": list(self.image.size),
            "regions": [self._region_to_dict(index, region) for index, region in enumerate(self.regions)],
            "current_index": self.current_index,
            "is_out_of_distribution": any((caption.ood_score or 0) > 1 for caption in self.captions),
        }

    def _add_prompt(
        self, box: Any = None, points: tuple[tuple[Any, Any, int], ...] = (), mask: np.ndarray | None = None
    ) -> int:
        """Extend the current region or begin a new one; return its index."""
        previous_prompt = Prompt() if self.current_index is None else self.regions[self.current_index].prompt
        prompt = Prompt(
            previous_prompt.box if box is None else box,
            previous_prompt.points + points,
            previous_prompt.mask if mask is None else mask,
        )
        if len(prompt.points) > MAX_POINTS:
            raise InputError(f"a region can have at most {MAX_POINTS} points; start a new region")
        region = SessionRegion(check_prompt(prompt, *self.image.size))
        if self.current_index is None:
            region_index = len(self.regions)
            self._record_change((*self.regions, region), region_index)
        else:
            region_index = self.current_index
            self._replace_region(region_index, region)
        return region_index

    def _decode_painted_mask(self, data_url: Any) -> np.ndarray:
        """Decode a painted mask from a data: URL to (height, width) bool."""
        try:
            png_bytes = base64.b64decode(str(data_url).partition(",")[2], validate=True)
            max_pixels = self.image.width * self.image.height
            with open_image_header(io.BytesIO(png_bytes), "the painted mask", max_pixels) as layer:
                alpha = np.asarray(layer.convert("RGBA").getchannel("A"))
        except (binascii.Error, InputError, OSError, SyntaxError) as error:
            raise InputError("the painted mask is damaged; paint it again") from error
        if layer.size != self.image.size:
            raise InputError(
                f"the painted mask is {layer.width} x {layer.height}, but the image is {self.image.width} x "
                f"{self.image.height}; paint the mask again"
            )
        return alpha > 0

    def _check_region_index(self, value: Any) -> int | None:
        return value if isinstance(value, int) and 0 <= value < len(self.regions) else None

    def _replace_region(self, region_index: int, region: SessionRegion) -> None:
        self._record_change((*self.regions[:region_index], region, *self.regions[region_index + 1 :]), region_index)

    def _record_change(self, regions: tuple[SessionRegion, ...], current: int | None) -> None:
        self.undo_history = [*self.undo_history[1 - MAX_UNDO_STEPS :], (self.regions, self.current_index)]
        self.regions, self.current_index = regions, current

    def _region_to_dict(self, region_index: int, region: SessionRegion) -> dict[str, Any]:
        caption = region.selected_caption
        rle, box = (caption.mask, caption.box) if caption else (None, region.prompt.box)
        num_pixels = self.image.width * self.image.height
        area = masks.compute_mask_area(rle) if rle else (box[2] - box[0]) * (box[3] - box[1]) if box else 0
        return {
            "path": mask_to_svg_path(masks.decode_rle(rle)) if rle else "",
            "box": region.prompt.box and list(region.prompt.box),
            "points": [list(point) for point in region.prompt.points],
            "caption": caption.text if caption else "…",
            "score": None if caption is None or np.isnan(caption.score) else float(caption.score),
            "match_score": None if caption is None or caption.proposal_score is None else float(caption.proposal_score),
            "predicted_iou": None if caption is None or caption.predicted_iou is None else float(caption.predicted_iou),
            "confidence": None if caption is None else caption.confidence,
            "area_fraction": area / num_pixels,
            "color": f"rgb{get_region_color(region_index)}",
            "masks": [{"predicted_iou": float(mask.predicted_iou)} for mask in region.masks],
            "mask_index": region.mask_index,
        }
