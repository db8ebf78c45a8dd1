"""Captioning of many images in batches.

    from sca.inference.batch import BatchCaptioner, Failure
    from sca.inference.caption_job import CaptionJob

    job = CaptionJob("sca-tiny", boxes=["370,434,448,512"])
    for result in BatchCaptioner(job, job.read_region_source()).iter_results(paths):
        print(result.reason if isinstance(result, Failure) else result.captions)

An image that fails yields a `Failure`; the run continues with the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from PIL import Image
from sca_registry.contracts import Caption, Captioner, Prompt, Proposals, Proposer, list_region_references
from sca_registry.spec import EverythingOptions, ZoomOptions

from sca.inference.automatic import caption_everything, resolve_everything_options
from sca.inference.caption_job import CaptionJob, ListedPrompts, RegionSource, SearchedRegions, SharedPrompts
from sca.inference.engine import Engine, MaskEngine
from sca.inference.generation_options import resolve_generation_options
from sca.inference.predictor import Predictor
from sca.inference.text_search import (
    check_can_find,
    check_text,
    find_candidate_regions,
    find_in_images,
    find_regions,
    index_regions,
)
from sca.inference.zoom import CropEncoder, caption_regions
from sca.inference.zoom_options import resolve_zoom
from sca.io.errors import InputError
from sca.io.images import format_path, open_image
from sca.io.text import format_count
from sca.io.validation import check_type
from sca.output.captioned_image import CaptionedImage, ImageSize, resize_to_recorded

UNUSABLE_IMAGE, UNUSABLE_PROMPTS = "image", "prompts"  # kinds of failure


class ImageCaptions(NamedTuple):
    """Image with the captions of its regions.

    Attributes:
        path: Image file.
        image: Image, or only its size if the captions are reused and images are not kept.
        captions: Captions of the regions.
    """

    path: Path
    image: Image.Image | ImageSize
    captions: list[Caption]


class Failure(NamedTuple):
    """Image or region that could not be captioned.

    Attributes:
        path: Image file.
        reason: One line with the name of the image.
        kind: `UNUSABLE_IMAGE` or `UNUSABLE_PROMPTS`.
        is_entire_image: Whether no region of the image is captioned.
    """

    path: Path
    reason: str
    kind: str
    is_entire_image: bool = True


CaptionResults = Iterator[ImageCaptions | Failure]
OpenedImages = Iterator[tuple[Path, Image.Image | CaptionedImage] | Failure]
ImagePrompts = tuple[Path, Image.Image | CaptionedImage, list[Prompt]]


class BatchCaptioner:
    """Captioner of images with the options of a job. Loads the model.

    Args:
        job: Model, regions and options.
        region_source: Result of `job.read_region_source`, after `match_images` with all images of the run.

    Raises:
        ValueError: The captioner does not support an option, or everything mode. Loading a model raises the errors of
            `sca.load_captioner`.
    """

    def __init__(self, job: CaptionJob, region_source: RegionSource):
        self.job: CaptionJob = job
        self.region_source: RegionSource = region_source
        self.captioner: Captioner = job.load_captioner()
        self._generation = resolve_generation_options(self.captioner, **job.generation_options)
        self._zoom = resolve_zoom(self.captioner, job.zoom)
        self._engine = (
            _check_can_search(self.captioner, job.model) if isinstance(region_source, SearchedRegions) else None
        )

    def iter_results(
        self,
        paths: Sequence[Path],
        captioned: Mapping[str, CaptionedImage] | None = None,
        keep_images: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> CaptionResults:
        """Caption images in order.

        Args:
            paths: Image files.
            captioned: Images with captions of an earlier run, by path. They do not change how images are batched, so
                captions do not depend on where a run was interrupted.
            keep_images: Also open the images in `captioned`.
            progress: Function called during a search with the number of processed points and the total.

        Returns:
            An iterator over captions and failures, in the order of `paths`.
        """
        opened_images, region_source = _open_images(paths, captioned or {}), self.region_source
        if isinstance(region_source, SearchedRegions):
            assert self._engine is not None  # see `__init__`
            proposer = region_source.proposer
            return self._caption_everything(self._engine, proposer, opened_images, keep_images, progress)
        return self._caption_prompted(region_source, opened_images, keep_images)

    def _caption_prompted(
        self, region_source: SharedPrompts | ListedPrompts, opened_images: OpenedImages, keep_images: bool
    ) -> CaptionResults:
        batch: list[ImagePrompts] = []
        for opened_image in opened_images:
            if isinstance(opened_image, Failure):
                yield opened_image
                continue
            path, image = opened_image
            try:
                prompts, problems = region_source.list_prompts(path, image.size)
            except InputError as error:
                yield Failure(path, f"{format_path(path)}: {error}", UNUSABLE_PROMPTS)
                continue
            if reason := self._find_reference_problem(len(prompts), problems):
                yield Failure(path, f"{format_path(path)}: {reason}", UNUSABLE_PROMPTS)
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

    def _find_reference_problem(self, num_prompts: int, problems: Sequence[str]) -> str:
        """Return why a question that refers to regions by number cannot be used for an image; "" if it can."""
        references = list_region_references(self._generation.get("question", ""))
        if references and problems:
            return f"{problems[0]}, so that the regions have other numbers than the question refers to"
        if references and max(references) > num_prompts:
            count = format_count(num_prompts, "region")
            return f"the question refers to <region {max(references)}>, but the image has {count}"
        return ""

    def _caption_batch(self, batch: Sequence[ImagePrompts], keep_images: bool) -> Iterator[ImageCaptions]:
        captioned_images = [(path, image) for path, image, _ in batch if isinstance(image, CaptionedImage)]
        if len(captioned_images) == len(batch):
            yield from (_reuse_captions(path, image, keep_images) for path, image in captioned_images)
            return
        paths = [path for path, _, _ in batch]
        images = [open_image(path) if isinstance(image, CaptionedImage) else image for path, image, _ in batch]
        requests = [prompts for _, _, prompts in batch]
        captions = caption_requests(
            self.captioner, images, requests, self.job.task, zoom=self._zoom, **self._generation
        )
        yield from map(ImageCaptions, paths, images, captions)

    def _caption_everything(
        self,
        engine: MaskEngine,
        proposer: Proposer | None,
        opened_images: OpenedImages,
        keep_images: bool,
        progress: Callable[[int, int], None] | None,
    ) -> CaptionResults:
        job = self.job
        options, predictor = resolve_everything_options(engine, job.search_options), Predictor(engine)
        limits: dict[str, Any] = {"max_regions": job.max_regions, "progress": progress}
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
            yield ImageCaptions(path, image, self._caption_searched(predictor, options, proposals, limits))

    def _caption_searched(
        self,
        predictor: Predictor,
        options: EverythingOptions,
        proposals: Proposals | None,
        limits: Mapping[str, Any],
    ) -> list[Caption]:
        return caption_everything(
            predictor, self.job.task, options, proposals, zoom=self.job.zoom, **limits, **self._generation
        )


class BatchFinder(BatchCaptioner):
    """Finder of the regions of images that match a text. Loads the model.

    `iter_results` yields the matches of each image, best first; see `sca.inference.text_search.find_regions`.

    Args:
        job: Model, regions and options.
        region_source: Result of `job.read_region_source`, after `match_images` with all images of the run.
        text: Text to find.
        top: Maximum number of regions per image.
        threshold: Minimum score.

    Raises:
        ValueError: The threshold is not finite, or the captioner cannot score a text or does not support everything
            mode. Loading a model raises the errors of `sca.load_captioner`.
    """

    def __init__(self, job: CaptionJob, region_source: RegionSource, text: str, top: int, threshold: float):
        check_type("threshold", threshold, float)
        super().__init__(job, region_source)
        self._text_engine: Engine = check_can_find(self.captioner, job.model)
        check_text(self._text_engine, text)
        self._text = text
        self._limits = top, threshold

    def _caption_batch(self, batch: Sequence[ImagePrompts], keep_images: bool) -> Iterator[ImageCaptions]:
        images = [image for _, image, _ in batch if isinstance(image, Image.Image)]
        requests = [prompts for _, _, prompts in batch]
        encoded = self._text_engine.encode(images)
        matches = find_in_images(self._text_engine, encoded, requests, self._text, *self._limits)
        yield from map(ImageCaptions, [path for path, _, _ in batch], images, matches)

    def _caption_searched(
        self,
        predictor: Predictor,
        options: EverythingOptions,
        proposals: Proposals | None,
        limits: Mapping[str, Any],
    ) -> list[Caption]:
        assert predictor.encoded is not None  # `set_image` was called
        regions = find_candidate_regions(self._text_engine, predictor.encoded, options, proposals, **limits)
        if not regions:
            return []
        index = index_regions(self._text_engine, predictor.encoded, [[each.prompt for each in regions]])
        return find_regions(self._text_engine, predictor.encoded, regions, index, [self._text], *self._limits)


def caption_requests(
    captioner: Captioner,
    images: Sequence[Image.Image],
    requests: Sequence[Sequence[Prompt]],
    task: str,
    encoded: Any = None,
    zoom: ZoomOptions | None = None,
    encode_crops: CropEncoder | None = None,
    **generation: Any,
) -> list[list[Caption]]:
    """Caption regions of several images: as one batch if the captioner has `caption_batch`, else image by image.

    Args:
        captioner: Any captioner.
        images: B images.
        requests: Prompts of each image, checked against its size.
        task: "caption" or "recognition".
        encoded: Result of `captioner.encode` for the images; None to encode them here.
        zoom: Result of `sca.inference.zoom_options.resolve_zoom` for the captioner.
        encode_crops: Function that encodes the crops of zoom; None to encode them here.
        **generation: Options returned by `sca.inference.generation_options.resolve_generation_options`.

    Returns:
        The captions of each image, in the order of its prompts.
    """
    if hasattr(captioner, "caption_batch"):
        engine = cast("MaskEngine", captioner)
        encoded = engine.encode(images) if encoded is None else encoded
        if zoom is None:
            return engine.caption_batch(encoded, requests, task, **generation)
        return caption_regions(engine, encoded, requests, task, zoom, encode_crops, **generation)
    image_requests = zip(images, requests, strict=True)
    return [
        captioner.caption(image, request, task, **generation) if request else [] for image, request in image_requests
    ]


def _open_images(paths: Iterable[Path], captioned: Mapping[str, CaptionedImage]) -> OpenedImages:
    """Open images, except for those with captions of an earlier run."""
    for path in paths:
        if recorded := captioned.get(str(path)):
            yield path, recorded
            continue
        try:
            yield path, open_image(path, allow_pipe=True)
        except InputError as error:
            yield Failure(path, str(error), UNUSABLE_IMAGE)


def _reuse_captions(path: Path, captioned: CaptionedImage, keep_images: bool) -> ImageCaptions:
    image = resize_to_recorded(open_image(path), captioned.size, str(path)) if keep_images else captioned.size
    return ImageCaptions(path, image, captioned.captions)


def _check_can_search(captioner: Captioner, name: str) -> MaskEngine:
    """Return the captioner if it can search for regions, else raise ValueError."""
    if not isinstance(captioner, MaskEngine) or captioner.model is None:
        raise ValueError(
            f"{name!r} cannot find regions; for everything mode, use a model, or encoder+captioner with an encoder "
            "whose segmenter predicts masks, such as sam-vit-b+blip-base"
        )
    return captioner
