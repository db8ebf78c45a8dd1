"""Images in, captions out: many images, some at a time.

    from sca.inference.batch import BatchCaptioner, Failure
    from sca.inference.job import CaptionJob

    job = CaptionJob("sca-tiny", boxes=["370,434,448,512"])
    for result in BatchCaptioner(job, job.read_region_source()).caption_images(paths):
        print(result.reason if isinstance(result, Failure) else result.captions)

An image that fails yields a `Failure`; the others are captioned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from sca_registry.contracts import Caption, Captioner, Prompt

from sca.inference.automatic import caption_everything, resolve_everything_options
from sca.inference.engine import MaskEngine
from sca.inference.generation_options import resolve_generation_options
from sca.inference.job import CaptionJob, RegionSource, SearchedRegions
from sca.inference.predictor import Predictor
from sca.io.errors import InputError
from sca.io.images import format_path, open_image
from sca.output.captioned import CaptionedImage, ImageSize, resize_to_recorded

UNUSABLE_IMAGE, UNUSABLE_PROMPTS = "image", "prompts"  # what cannot be used


class ImageCaptions(NamedTuple):
    """An image with the captions of its regions."""

    path: Path
    image: Image.Image | ImageSize  # only the size of an image that is captioned already and not drawn on
    captions: list[Caption]


class Failure(NamedTuple):
    """Why an image, or some of its regions, has no captions."""

    path: Path
    reason: str  # one line that names the image
    kind: str  # UNUSABLE_IMAGE or UNUSABLE_PROMPTS
    is_entire_image: bool = True  # no region of the image is captioned


CaptionResults = Iterator[ImageCaptions | Failure]
OpenedImages = Iterator[tuple[Path, Image.Image | CaptionedImage] | Failure]
ImagePrompts = tuple[Path, Image.Image | CaptionedImage, list[Prompt]]


class BatchCaptioner:
    """A captioner with the settings of a job, for any number of images.

    Args:
        job: What to caption in each image, and how; its model is loaded.
        region_source: Result of `job.read_region_source`, after `match_images` with all images of the run.

    Raises:
        ValueError: An option does not suit the captioner. See `sca.captioner` for what loading raises.
    """

    def __init__(self, job: CaptionJob, region_source: RegionSource):
        self.job, self.region_source, self.captioner = job, region_source, job.load_captioner()
        self._generation = resolve_generation_options(self.captioner, **job.generation_options)
        self._engine = (
            _check_can_search(self.captioner, job.model) if isinstance(region_source, SearchedRegions) else None
        )

    def caption_images(
        self,
        paths: Sequence[Path],
        captioned: Mapping[str, CaptionedImage] | None = None,
        keep_images: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> CaptionResults:
        """Caption images in their order; one that fails does not end the others.

        Args:
            paths: Image files.
            captioned: Images that are captioned already, by path. Batches are composed as without them, so that
                captions do not depend on where a run was interrupted.
            keep_images: Also open images that are captioned already.
            progress: Called with the points looked at and the total, during a search.
        """
        opened_images = _open_images(paths, captioned or {})
        if self._engine is not None:
            return self._caption_everything(self._engine, opened_images, keep_images, progress)
        return self._caption_prompted(opened_images, keep_images)

    def _caption_prompted(self, opened_images: OpenedImages, keep_images: bool) -> CaptionResults:
        batch: list[ImagePrompts] = []
        for opened_image in opened_images:
            if isinstance(opened_image, Failure):
                yield opened_image
                continue
            path, image = opened_image
            try:
                prompts, problems = self.region_source.list_prompts(path, image.size)
            except InputError as error:
                yield Failure(path, f"{format_path(path)}: {error}", UNUSABLE_PROMPTS)
                continue
            yield from (
                Failure(path, f"{format_path(path)}: {problem}", UNUSABLE_PROMPTS, is_entire_image=False)
                for problem in problems
            )
            batch.append((path, image, prompts))
            if len(batch) == self.job.batch_size:
                yield from self._caption_batch(batch, keep_images)
                batch = []
        if batch:
            yield from self._caption_batch(batch, keep_images)

    def _caption_batch(self, batch: Sequence[ImagePrompts], keep_images: bool) -> Iterator[ImageCaptions]:
        if all(isinstance(image, CaptionedImage) for _, image, _ in batch):
            yield from (_reuse_captions(path, image, keep_images) for path, image, _ in batch)
            return
        paths = [path for path, _, _ in batch]
        images = [open_image(path) if isinstance(image, CaptionedImage) else image for path, image, _ in batch]
        requests = [prompts for _, _, prompts in batch]
        captions = caption_requests(self.captioner, images, requests, self.job.task, **self._generation)
        yield from map(ImageCaptions, paths, images, captions)

    def _caption_everything(
        self,
        engine: MaskEngine,
        opened_images: OpenedImages,
        keep_images: bool,
        progress: Callable[[int, int], None] | None,
    ) -> CaptionResults:
        job, proposer = self.job, self.region_source.proposer
        options, predictor = resolve_everything_options(engine, job.search_options), Predictor(engine)
        limits = {"max_regions": job.max_regions, "progress": progress}
        for opened_image in opened_images:
            if isinstance(opened_image, Failure):
                yield opened_image
                continue
            path, image = opened_image
            if isinstance(image, CaptionedImage):
                yield _reuse_captions(path, image, keep_images)
                continue
            try:
                proposals = proposer(image, str(path)) if proposer else None
            except InputError as error:
                yield Failure(path, f"{format_path(path)}: {error}", UNUSABLE_PROMPTS)
                continue
            predictor.set_image(image)
            captions = caption_everything(predictor, job.task, options, proposals, **limits, **self._generation)
            yield ImageCaptions(path, image, captions)


def caption_requests(
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
        **generation: As returned by `sca.inference.generation_options.resolve_generation_options`.
    """
    if hasattr(captioner, "caption_batch"):
        encoded = captioner.encode(images) if encoded is None else encoded
        return captioner.caption_batch(encoded, requests, task, **generation)
    image_requests = zip(images, requests, strict=True)
    return [
        captioner.caption(image, request, task, **generation) if request else [] for image, request in image_requests
    ]


def _open_images(paths: Iterable[Path], captioned: Mapping[str, CaptionedImage]) -> OpenedImages:
    """Open images, except for those that are captioned already."""
    for path in paths:
        if recorded := captioned.get(str(path)):
            yield path, recorded
            continue
        try:
            yield path, open_image(path, allow_pipe=True)
        except InputError as error:
            yield Failure(path, str(error), UNUSABLE_IMAGE)


def _reuse_captions(path: Path, captioned: CaptionedImage, keep_images: bool) -> ImageCaptions:
    """Return the captions that an image has already."""
    image = resize_to_recorded(open_image(path), captioned.size, str(path)) if keep_images else captioned.size
    return ImageCaptions(path, image, captioned.captions)


def _check_can_search(captioner: Captioner, name: str) -> MaskEngine:
    """Return the captioner if it can search for regions. Raises ValueError."""
    if not isinstance(captioner, MaskEngine) or captioner.model is None:
        raise ValueError(
            f"{name!r} finds no regions by itself; everything mode needs a model, or encoder+captioner with an encoder "
            "that brings masks, such as sam-vit-b+blip-base"
        )
    return captioner
