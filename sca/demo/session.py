"""What a person has pointed at in a picture, and what was answered; every change can be undone."""

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

from sca.inference.engine import Mask
from sca.io import masks
from sca.io.errors import InputError
from sca.io.images import inspect_image
from sca.io.prompts import MAX_POINTS, check
from sca.output.colours import colour
from sca.output.outline import outline

STEPS = 100  # that can be undone


@dataclass(frozen=True)
class Shown:
    """A region: what is pointed at, and the answer once it is there; the masks it may have, and the one chosen."""

    prompt: Prompt
    caption: Caption | None = None
    masks: tuple[Mask, ...] = ()
    chosen: int = 0

    @property
    def answer(self) -> Caption:
        """The caption, with the mask that was chosen."""
        if not self.masks:
            return self.caption
        code, iou = self.masks[self.chosen]
        box = self.prompt.box or masks.box_of(code)
        return replace(self.caption, mask=code, iou=iou, box=box)


@dataclass
class Session:
    """One picture in one tab. `current` is the region that a further point belongs to."""

    image: Image.Image
    name: str
    regions: tuple[Shown, ...] = ()
    current: int | None = None
    history: list[tuple[tuple[Shown, ...], int | None]] = field(default_factory=list)

    def point_at(self, told: Mapping[str, Any]) -> int | None:
        """Takes what the canvas tells: the number of the region that is to be answered, if there is one.

        InputError for what does not fit the picture.
        """
        match told.get("action"):
            case "undo":
                if self.history:
                    self.regions, self.current = self.history.pop()
            case "new":
                self.current = None
            case "clear":
                self._change((), None)
            case "select":
                self.current = self._number(told.get("region"))
            case "choose":
                number, mask = self._number(told.get("region")), told.get("mask")
                if number is not None and mask in range(len(self.regions[number].masks)):
                    self._replace(number, replace(self.regions[number], chosen=mask))
            case "point":
                label = 1 if told.get("label") else 0
                return self._prompt(points=((told.get("x"), told.get("y"), label),))
            case "box":
                return self._prompt(box=told.get("box"))
            case "mask":
                return self._prompt(mask=self._painted(told.get("png")))
        return None

    def answered(self, prompt: Prompt, caption: Caption, found: tuple[Mask, ...]) -> None:
        """The answer for a region, wherever it is by now: a step back does not lose it. Not a step of its own."""

        def told(regions: tuple[Shown, ...]) -> tuple[Shown, ...]:
            return tuple(
                Shown(prompt, replace(caption, region=number), found) if shown.prompt is prompt else shown
                for number, shown in enumerate(regions)
            )

        self.regions = told(self.regions)
        self.history = [(told(regions), current) for regions, current in self.history]

    def failed(self, prompt: Prompt) -> None:
        """Takes back the last step if that asked for what has no answer."""
        if self.history and any(shown.prompt is prompt for shown in self.regions):
            regions, current = self.history[-1]
            if not any(shown.prompt is prompt for shown in regions):
                self.regions, self.current = regions, current
                self.history.pop()

    def add(self, caption: Caption) -> None:
        """A region that was found."""
        shown = Shown(caption.prompt, replace(caption, region=len(self.regions)))
        self.regions = (*self.regions, shown)

    def begin(self) -> None:
        """Away with all regions, which `undo` brings back."""
        self._change((), None)

    @property
    def captions(self) -> list[Caption]:
        return [shown.answer for shown in self.regions if shown.caption is not None]

    def plain(self) -> dict[str, Any]:
        """For the canvas."""
        return {
            "size": list(self.image.size),
            "regions": [self._region(number, shown) for number, shown in enumerate(self.regions)],
            "current": self.current,
        }

    def _prompt(
        self, box: Any = None, points: tuple[tuple[Any, Any, int], ...] = (), mask: np.ndarray | None = None
    ) -> int:
        """Adds to the current region, or begins one."""
        before = Prompt() if self.current is None else self.regions[self.current].prompt
        prompt = Prompt(
            before.box if box is None else box, before.points + points, before.mask if mask is None else mask
        )
        if len(prompt.points) > MAX_POINTS:
            raise InputError(f"a region has at most {MAX_POINTS} points; begin a new one")
        shown = Shown(check(prompt, *self.image.size))
        if self.current is None:
            self._change((*self.regions, shown), len(self.regions))
        else:
            self._replace(self.current, shown)
        return self.current

    def _painted(self, png: Any) -> np.ndarray:
        """(height, width) bool of what was painted, which comes as a data: URL."""
        try:
            content = base64.b64decode(str(png).partition(",")[2], validate=True)
            pixels = self.image.width * self.image.height
            with inspect_image(io.BytesIO(content), "what was painted", pixels) as layer:
                alpha = np.asarray(layer.convert("RGBA").getchannel("A"))
        except (binascii.Error, InputError, OSError, SyntaxError) as error:
            raise InputError("what was painted did not arrive whole; paint it again") from error
        if layer.size != self.image.size:
            raise InputError(f"what was painted is {layer.size}, the picture {self.image.size}; try again")
        return alpha > 0

    def _number(self, value: Any) -> int | None:
        return value if isinstance(value, int) and 0 <= value < len(self.regions) else None

    def _replace(self, number: int, shown: Shown) -> None:
        self._change((*self.regions[:number], shown, *self.regions[number + 1 :]), number)

    def _change(self, regions: tuple[Shown, ...], current: int | None) -> None:
        self.history = [*self.history[1 - STEPS :], (self.regions, self.current)]
        self.regions, self.current = regions, current

    def _region(self, number: int, shown: Shown) -> dict[str, Any]:
        answer = shown.answer if shown.caption is not None else None
        code, box = (answer.mask, answer.box) if answer else (None, shown.prompt.box)
        pixels = self.image.width * self.image.height
        area = masks.area(code) if code else (box[2] - box[0]) * (box[3] - box[1]) if box else 0
        return {
            "path": outline(masks.decode(code)) if code else "",
            "box": shown.prompt.box and list(shown.prompt.box),
            "points": [list(point) for point in shown.prompt.points],
            "caption": answer.text if answer else "…",
            "score": None if answer is None or np.isnan(answer.score) else float(answer.score),
            "iou": None if answer is None or answer.predicted_iou is None else float(answer.predicted_iou),
            "share": area / pixels,
            "colour": f"rgb{colour(number)}",
            "masks": [{"iou": float(mask.iou)} for mask in shown.masks],
            "chosen": shown.chosen,
        }
