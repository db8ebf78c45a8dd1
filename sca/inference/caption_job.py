"""Caption jobs: model, regions and options as plain values that can be sent to any process.

Importing the module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sca_registry.contracts import Captioner, Prompt, Proposer
from sca_registry.spec import ComponentSpec

from sca.devices import resolve_device
from sca.inference.prompt_arguments import check_question_task, check_task, get_tasks
from sca.inference.proposer import add_text, build_proposer
from sca.inference.zoom_options import DEFAULT_ZOOM, ZoomValue, check_zoom
from sca.io.annotations.annotation import SkipCounter
from sca.io.annotations.labelme import list_labelme_files
from sca.io.errors import InputError
from sca.io.images import format_path
from sca.io.prompt_files import read_region_prompts
from sca.io.prompts import (
    check_and_count_clipping,
    list_mask_files,
    parse_box,
    parse_point,
    parse_region,
    read_mask_file,
)
from sca.io.region_prompts import RegionPrompts
from sca.io.run_folder import iter_existing_paths
from sca.io.text import format_count
from sca.io.validation import check_range


class SearchedRegions:
    """Regions found by everything mode.

    Args:
        proposer: Proposer of prompts; None for the grid of points.
    """

    def __init__(self, proposer: Proposer | None):
        self.proposer: Proposer | None = proposer
        self.clipped: SkipCounter = SkipCounter()

    def match_images(self, paths: Sequence[Path]) -> None:
        """Do nothing: a search does not depend on image names."""


class SharedPrompts:
    """Prompts shared by all images.

    Args:
        prompts: Prompts in image pixels.

    Attributes:
        clipped: Counter of boxes that were clipped to their image.
    """

    def __init__(self, prompts: Sequence[Prompt]):
        self.prompts: Sequence[Prompt] = prompts
        self.clipped: SkipCounter = SkipCounter()

    def match_images(self, paths: Sequence[Path]) -> None:
        """Do nothing: every image has the same prompts."""

    def list_prompts(self, path: Path, size: tuple[int, int]) -> tuple[list[Prompt], list[str]]:
        """Return the prompts of an image; see `ListedPrompts.list_prompts`.

        Args:
            path: Image file.
            size: Width and height of the upright image.

        Returns:
            The prompts in image pixels, and remarks about clipped boxes.

        Raises:
            InputError: A prompt does not fit the image.
        """
        return [check_and_count_clipping(prompt, *size, self.clipped, format_path(path)) for prompt in self.prompts], []


class ListedPrompts:
    """Prompts of each image, read from a file.

    Args:
        region_prompts: Prompts by image name.

    Attributes:
        clipped: Counter of boxes that were clipped to their image.
        image_keys: Name in the prompts file of each image.
    """

    def __init__(self, region_prompts: RegionPrompts):
        self.region_prompts: RegionPrompts = region_prompts
        self.clipped: SkipCounter = region_prompts.clip_counter
        self.image_keys: Mapping[Path, str] = {}

    def match_images(self, paths: Sequence[Path]) -> None:
        """Match all images of a run to the image names in the file.

        Args:
            paths: All image files of the run.

        Raises:
            InputError: A name in the file matches several images.
        """
        self.image_keys = self.region_prompts.match_images(paths)

    def list_prompts(self, path: Path, size: tuple[int, int]) -> tuple[list[Prompt], list[str]]:
        """Return the prompts of an image and the problems with its other prompts.

        Args:
            path: Image file.
            size: Width and height of the image.

        Returns:
            The prompts that fit the image, and a line for each prompt that does not.

        Raises:
            InputError: The file has no prompts for the image, or none fits. The message does not contain the path of
                the image.
        """
        if path not in self.image_keys:
            raise InputError(f"{self.region_prompts.path} has no regions for it; add them, or omit the image")
        prompts, problems = self.region_prompts.fit_prompts(self.image_keys[path], *size)
        if problems and not prompts:
            remaining_count = f" (and {format_count(len(problems) - 1, 'more problem')})" if len(problems) > 1 else ""
            raise InputError(f"{problems[0]}{remaining_count}")
        return prompts, problems


RegionSource = SearchedRegions | SharedPrompts | ListedPrompts
SOURCES = ("boxes", "points", "masks", "regions", "prompts", "everything")  # fields of a job that define its regions


@dataclass(frozen=True)
class CaptionJob:
    """Model, regions and options of a captioning run, as plain values that can be sent to any process.

    The regions are either the same in every image (`boxes`, `points`, `masks` and `regions`), or read from `prompts`,
    or found by `everything`.

    Args:
        model: Source of the captioner; see `sca.load_captioner`.
        device: Device of the model.
        precision: Precision of the model, see `sca.load`; None for that of the checkpoint.
        seed: Random seed.
        trust_remote_code: Allow a checkpoint to run its own code; see `sca.load`.
        allow_external: Allow a checkpoint to refer to files outside its folder; see `sca.load`.
        boxes: Boxes "x1,y1,x2,y2" in image pixels; one region each.
        points: Points "x,y" in image pixels; one region each.
        masks: Mask files, images or .npy; one region each.
        regions: Regions of several prompts; see `sca.io.prompts.parse_region`.
        prompts: Prompts file or folder.
        everything: Search for regions.
        search_options: Fields of `sca.EverythingOptions`; None keeps the value of the model.
        proposer: Proposer "NAME [key=value]..." that replaces the grid of points.
        text: Phrases that the proposer finds.
        max_regions: Maximum number of regions per image of a search; the best are kept.
        task: "caption", "recognition" or a further task of the model.
        generation_options: Options of `Predictor.predict`; None keeps the value of the model.
        zoom: Predict small regions from crops: "auto", "off" or the area of the largest in grid cells.
        batch_size: Images per encoder batch.

    Raises:
        ValueError: A value is out of range, or there are none or several sources of regions.
    """

    model: str
    device: str = "cpu"
    precision: str | None = None
    seed: int = 0
    trust_remote_code: bool = False
    allow_external: bool = False
    boxes: Sequence[str] = ()
    points: Sequence[str] = ()
    masks: Sequence[str] = ()
    regions: Sequence[str] = ()
    prompts: str | None = None
    everything: bool = False
    search_options: Mapping[str, Any] = field(default_factory=dict)
    proposer: str | None = None
    text: Sequence[str] = ()
    max_regions: int | None = None
    task: str = "caption"
    generation_options: Mapping[str, Any] = field(default_factory=dict)
    zoom: ZoomValue = DEFAULT_ZOOM
    batch_size: int = 8

    def __post_init__(self) -> None:
        if any(self.generation_options.get(name) is not None for name in ("question", "length")):
            check_question_task(self.task)
        check_range("batch_size", self.batch_size, int, 1)
        check_zoom(self.zoom)
        sources = [name for name in SOURCES if getattr(self, name)]
        if not sources:
            raise ValueError(f"no regions to caption; pass {', '.join(SOURCES[:-1])} or {SOURCES[-1]}")
        if len(sources) > 1 and {"prompts", "everything"} & set(sources):
            raise ValueError(
                f"{' and '.join(sources)} are mutually exclusive; pass boxes, points, masks and regions, or prompts, "
                "or everything"
            )
        if self.text and not self.proposer:
            raise ValueError("text requires a proposer that takes text, such as owlv2-base; pass one, or omit text")

    def read_region_source(self) -> RegionSource:
        """Read the prompts, or build the proposer of a search.

        Returns:
            The source of the regions of each image.

        Raises:
            InputError: A prompt cannot be read.
            RegistryError: The proposer is unknown or cannot be built.
            ValueError: The proposer takes no text.
        """
        if self.everything:
            return SearchedRegions(self._build_proposer())
        if self.prompts:
            return ListedPrompts(read_region_prompts(self.prompts))
        shared_prompts = [Prompt(box=parse_box(text)) for text in self.boxes]
        shared_prompts += [Prompt(points=(parse_point(text),)) for text in self.points]
        shared_prompts += [Prompt(mask=read_mask_file(path, allow_pipe=True)) for path in self.masks]
        shared_prompts += [parse_region(text, allow_pipe=True) for text in self.regions]
        return SharedPrompts(shared_prompts)

    def list_input_files(self) -> list[Path]:
        """List the files from which the regions are read."""
        prompts = [] if self.prompts is None else [Path(self.prompts)]
        prompt_files = [file for path in prompts for file in (list_labelme_files(path) if path.is_dir() else [path])]
        component = self._parse_proposer()
        proposals = iter_existing_paths(component.options) if component else ()
        return [*prompt_files, *map(Path, self.masks), *map(Path, list_mask_files(self.regions)), *proposals]

    def load_captioner(self) -> Captioner:
        """Set the random seed, load the captioner and check its task; `sca.load_captioner` lists further errors."""
        import torch

        from sca.inference.factory import check_local_task, load_captioner

        torch.manual_seed(self.seed)
        trust: dict[str, Any] = {"trust_remote_code": self.trust_remote_code, "allow_external": self.allow_external}
        check_local_task(self.model, self.task, **trust)
        options: dict[str, Any] = {"precision": self.precision} if self.precision else {}
        captioner = load_captioner(self.model, resolve_device(self.device), **trust, **options)
        check_task(self.task, get_tasks(captioner))
        return captioner

    def _parse_proposer(self) -> ComponentSpec | None:
        return ComponentSpec.parse(self.proposer, "proposer", "proposers") if self.proposer else None

    def _build_proposer(self) -> Proposer | None:
        component = self._parse_proposer()
        return build_proposer(add_text(component, self.text), self.device) if component else None
