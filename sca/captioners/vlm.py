"""Vision-language models asked about one region of an image."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw
from sca_registry.contracts import TASKS
from sca_registry.messages import unknown
from transformers.models.kosmos2.processing_kosmos2 import coordinate_to_patch_index

from sca.captioners.image_text import ANSWERLESS, ImageTextModel, Question
from sca.captioners.regions import Box, RegionCaptioner, ScoredText, Seen, crop, generation_of, pixels_of
from sca.inference.engine import Encoded

RED = (255, 0, 0)
SHARE = 150  # a drawn box is as thick as the image's longer side divided by this
SHOWN = ("crop", "box", "region-tokens")
QUESTIONS = {  # by how the region is shown: of recognition, and of a caption
    "crop": ("What is in this picture? Answer with its name alone.", "Describe this picture in one short phrase."),
    "box": (
        "What is inside the red box? Answer with its name alone.",
        "Describe what is inside the red box in one short phrase.",
    ),
}
OWN = {  # of architectures that read no free questions
    ("florence2", "crop"): ("<CAPTION>", "<CAPTION>"),
    ("kosmos-2", "crop"): ("An image of", "An image of"),
}
TAGS = re.compile(r"</?[a-z_]+\d*/?>")  # of places and phrases, among the words of an answer


class VisionLanguageModel(RegionCaptioner):
    """Any model of transformers' AutoModelForImageTextToText that answers questions, asked about a region.

    show: how the model learns which region is meant. "crop" is the region's box alone, "box" the whole image with a red
    box drawn into it, and "region-tokens" the model's own words for places, which Florence-2 (its task
    REGION_TO_DESCRIPTION, or REGION_TO_CATEGORY for recognition; arXiv 2311.06242) and Kosmos-2 (a phrase with its
    place; arXiv 2306.14824) have. question: in place of ours, for both tasks; it goes through the chat template where
    there is one. The box is that of the prompt, or else the tight box of its mask.

    weights, revision, pretrained, config, dtype, batch: see `ImageTextModel`. encoder: what finds the masks of points,
    see `RegionCaptioner`. Raises ValueError for a way to show that the model does not know.
    """

    def __init__(
        self,
        encoder: str | Mapping[str, Any] | None = None,
        weights: str | None = None,
        revision: str | None = None,
        pretrained: bool = True,
        show: str = "crop",
        question: str | None = None,
        batch_size: int = 16,
        config: Mapping[str, Any] | None = None,
        device: str = "cpu",
        dtype: str | None = None,
    ):
        if show not in SHOWN:
            raise unknown(f"show is {show!r}", show, SHOWN)
        super().__init__(encoder, device)
        self.reader = ImageTextModel(weights, revision, pretrained, config, device, dtype, batch_size)
        kind = self.reader.kind
        if kind in ANSWERLESS:
            raise ValueError(f"a {kind!r} model answers no questions: caption crops with it, as crop-captioner does")
        if show == "region-tokens" and kind not in REGION_TOKENS:
            raise ValueError(
                f"a {kind!r} model has no words for places; {' and '.join(map(repr, REGION_TOKENS))} have. Take "
                "show=crop or show=box"
            )
        if show == "region-tokens" and question is not None:
            raise ValueError("region tokens come with a question of their own: leave out question, or take show=crop")
        self.show = show
        self.questions = (question, question) if question else OWN.get((kind, show)) or QUESTIONS.get(show)
        self.options = {"encoder": encoder, "show": show, "question": question}

    @property
    def facts(self) -> dict[str, Any]:
        return {"captioner": "vlm", **self.options, **self.reader.facts}

    def words(self, regions: Sequence[Seen], task: str, encoded: Encoded, **generation: Any) -> list[ScoredText]:
        asked = [self._question(seen, TASKS.index(task)) for seen in regions]
        told = self.reader.tell(asked, **generation_of(generation))
        return [words._replace(text=" ".join(TAGS.sub(" ", words.text).split())) for words in told]

    def _question(self, seen: Seen, task: int) -> Question:
        box = seen.prompt.box or seen.tight
        if self.show == "region-tokens":
            return Question(seen.image, REGION_TOKENS[self.reader.kind](box, seen.image.size, task))
        image = crop(seen, box) if self.show == "crop" else with_box(seen.image, box)
        return Question(image, self.questions[task])


def with_box(image: Image.Image, box: Box) -> Image.Image:
    """A copy of the image with the outline of a box in red, which begins at the box's edge and goes outwards."""
    x1, y1, x2, y2 = pixels_of(box, image.size)
    width = max(2, round(max(image.size) / SHARE))
    drawn = image.copy()
    outer = (x1 - width, y1 - width, x2 + width - 1, y2 + width - 1)
    ImageDraw.Draw(drawn).rectangle(outer, outline=RED, width=width)
    return drawn


def _florence(box: Box, size: tuple[int, int], task: int) -> str:
    """Corners in thousandths of the image's sides."""
    width, height = size
    shares = (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
    places = "".join(f"<loc_{min(max(int(share * 1000), 0), 999)}>" for share in shares)
    return ("<REGION_TO_CATEGORY>", "<REGION_TO_DESCRIPTION>")[task] + places


def _kosmos(box: Box, size: tuple[int, int], task: int) -> str:
    """The cells of a grid of 32 x 32 that the corners lie in."""
    x1, y1, x2, y2 = pixels_of(box, size)
    width, height = size
    first, last = coordinate_to_patch_index((x1 / width, y1 / height, x2 / width, y2 / height), 32)
    tokens = f"<patch_index_{first:04d}><patch_index_{last:04d}>"
    return f"<grounding><phrase> It</phrase><object>{tokens}</object> is"


REGION_TOKENS: dict[str, Callable[[Box, tuple[int, int], int], str]] = {"florence2": _florence, "kosmos-2": _kosmos}
