"""Images in, captions out: many images, some at a time.

    from sca.inference.batch import BatchCaptioner, Failure
    from sca.inference.job import CaptionJob

    job = CaptionJob("sca-tiny", boxes=["370,434,448,512"])
    for result in BatchCaptioner(job, job.read_regions()).caption(paths):
        print(result.reason if isinstance(result, Failure) else result.captions)

An image that fails yields a `Failure`; the others are captioned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from sca_registry.contracts import Caption, Captioner, Prompt

from sca.inference.automatic import caption_everything, settle_search
from sca.inference.engine import MaskEngine
from sca.inference.generation import settle_generation
from sca.inference.job import CaptionJob, RegionSource, Search
from sca.inference.predictor import Predictor
from sca.io.errors import InputError
from sca.io.images import open_image, show
from sca.output.captioned import Captioned, Size, resize_to_recorded

IMAGE, PROMPTS = "image", "prompts"  # what cannot be used


class ImageCaptions(NamedTuple):
    """An image with the captions of its regions."""

    path: Path
    image: Image.Image | Size  # only the size of an image that is captioned already and not drawn on
    captions: list[Caption]


class Failure(NamedTuple):
    """Why an image, or some of its regions, has no captions."""

    path: Path
    reason: str  # one line that names the image
    kind: str  # IMAGE or PROMPTS
    is_whole: bool = True  # no region of the image is captioned


Results = Iterator[ImageCaptions | Failure]
Opened = Iterator[tuple[Path, Image.Image | Captioned] | Failure]
Piece = tuple[Path, Image.Image | Captioned, list[Prompt]]


class BatchCaptioner:
    """A captioner with the settings of a job, for any number of images.

    Args:
        job: What to caption in each image, and how; its model is loaded.
        regions: What `job.read_regions` returned, after `match` with all images of the run.

    Raises:
        ValueError: An option does not suit the captioner. See `sca.captioner` for what loading raises.
    """

    def __init__(self, job: CaptionJob, regions: RegionSource):
        self.job, self.regions, self.captioner = job, regions, job.load()
        self._generation = settle_generation(self.captioner, **job.generation)
        self._engine = _check_searches(self.captioner, job.model) if isinstance(regions, Search) else None

    def caption(
        self,
        paths: Sequence[Path],
        done: Mapping[str, Captioned] | None = None,
        keeps_images: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Results:
        """Caption images in their order; one that fails does not end the others.

        Args:
            paths: Image files.
            done: Images that are captioned already, by path. Batches are composed as without them, so that captions do
                not depend on where a run was interrupted.
            keeps_images: Also open images that are captioned already.
            progress: Called with the points looked at and the total, during a search.
        """
        opened = _open_images(paths, done or {})
        if self._engine is not None:
            return self._search(self._engine, opened, keeps_images, progress)
        return self._prompt(opened, keeps_images)

    def _prompt(self, opened: Opened, keeps_images: bool) -> Results:
        pieces: list[Piece] = []
        for each in opened:
            if isinstance(each, Failure):
                yield each
                continue
            path, image = each
            try:
                prompts, problems = self.regions.list_prompts(path, image.size)
            except InputError as error:
                yield Failure(path, f"{show(path)}: {error}", PROMPTS)
                continue
            yield from (Failure(path, f"{show(path)}: {problem}", PROMPTS, is_whole=False) for problem in problems)
            pieces.append((path, image, prompts))
            if len(pieces) == self.job.batch:
                yield from self._caption_pieces(pieces, keeps_images)
                pieces = []
        if pieces:
            yield from self._caption_pieces(pieces, keeps_images)

    def _caption_pieces(self, pieces: Sequence[Piece], keeps_images: bool) -> Iterator[ImageCaptions]:
        if all(isinstance(image, Captioned) for _, image, _ in pieces):
            yield from (_repeat(path, image, keeps_images) for path, image, _ in pieces)
            return
        paths = [path for path, _, _ in pieces]
        images = [open_image(path) if isinstance(image, Captioned) else image for path, image, _ in pieces]
        requests = [prompts for _, _, prompts in pieces]
        captions = answer_requests(self.captioner, images, requests, self.job.task, **self._generation)
        yield from map(ImageCaptions, paths, images, captions)

    def _search(
        self, engine: MaskEngine, opened: Opened, keeps_images: bool, progress: Callable[[int, int], None] | None
    ) -> Results:
        job, propose = self.job, self.regions.proposer
        options, predictor = settle_search(engine, job.search), Predictor(engine)
        limits = {"max_regions": job.max_regions, "progress": progress}
        for each in opened:
            if isinstance(each, Failure):
                yield each
                continue
            path, image = each
            if isinstance(image, Captioned):
                yield _repeat(path, image, keeps_images)
                continue
            try:
                proposals = propose(image, str(path)) if propose else None
            except InputError as error:
                yield Failure(path, f"{show(path)}: {error}", PROMPTS)
                continue
            predictor.set_image(image)
            captions = caption_everything(predictor, job.task, options, proposals, **limits, **self._generation)
            yield ImageCaptions(path, image, captions)


def answer_requests(
    captioner: Captioner,
    images: Sequence[Image.Image],
    requests: Sequence[Sequence[Prompt]],
    task: str,
    encoded: Any = None,
    **generation: Any,
) -> list[list[Caption]]:
    """Caption regions of several images: together if the captioner can, else one image after the other.

    Args:
        captioner: Any captioner.
        images: B images.
        requests: For each image its prompts, which fit it.
        task: "caption" or "recognition".
        encoded: What `captioner.encode` returned for the images, if it was called before.
        **generation: As returned by `sca.inference.generation.settle_generation`.
    """
    if hasattr(captioner, "answer"):
        return captioner.answer(captioner.encode(images) if encoded is None else encoded, requests, task, **generation)
    pairs = zip(images, requests, strict=True)
    return [captioner.caption(image, request, task, **generation) if request else [] for image, request in pairs]


def _open_images(paths: Iterable[Path], done: Mapping[str, Captioned]) -> Opened:
    """Open images, except for those that are captioned already."""
    for path in paths:
        if known := done.get(str(path)):
            yield path, known
            continue
        try:
            yield path, open_image(path, allow_pipe=True)
        except InputError as error:
            yield Failure(path, str(error), IMAGE)


def _repeat(path: Path, known: Captioned, keeps_images: bool) -> ImageCaptions:
    """Return the captions that an image has already."""
    image = resize_to_recorded(open_image(path), known.size, str(path)) if keeps_images else known.size
    return ImageCaptions(path, image, known.captions)


def _check_searches(captioner: Captioner, name: str) -> MaskEngine:
    """Return the captioner if it can search for regions. Raises ValueError."""
    if not isinstance(captioner, MaskEngine) or captioner.model is None:
        raise ValueError(
            f"{name!r} finds no regions by itself; everything mode needs a model, or encoder+captioner with an encoder "
            "that brings masks, such as sam-vit-b+blip-base"
        )
    return captioner
