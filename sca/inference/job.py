"""What to caption in many images, as plain options that any process can receive; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sca_registry import proposers
from sca_registry.contracts import Captioner, Prompt, Proposer
from sca_registry.spec import Part

from sca.devices import resolve_device
from sca.inference.prompt_arguments import check_task
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
from sca.io.validation import check_range


class SearchedRegions:
    """The regions that everything mode finds, from the prompts of a proposer if there is one."""

    def __init__(self, proposer: Proposer | None):
        self.proposer, self.clipped = proposer, SkipCounter()

    def match_images(self, paths: Sequence[Path]) -> None:
        """Do nothing: a search needs no names of images."""


class SharedPrompts:
    """The same prompts for every image; `clipped` counts the boxes that were clipped to one."""

    def __init__(self, prompts: Sequence[Prompt]):
        self.prompts, self.clipped = prompts, SkipCounter()

    def match_images(self, paths: Sequence[Path]) -> None:
        """Do nothing: every image has the prompts."""

    def list_prompts(self, path: Path, size: tuple[int, int]) -> tuple[list[Prompt], list[str]]:
        """Return what `ListedPrompts.list_prompts` returns."""
        return [check_and_count_clipping(prompt, *size, self.clipped, format_path(path)) for prompt in self.prompts], []


class ListedPrompts:
    """The prompts that a file lists for each image."""

    def __init__(self, region_prompts: RegionPrompts):
        self.region_prompts, self.clipped = region_prompts, region_prompts.clip_counter
        self.image_keys: Mapping[Path, str] = {}

    def match_images(self, paths: Sequence[Path]) -> None:
        """Match all images of a run to the image names in the file.

        Raises:
            InputError: A name could mean several images.
        """
        self.image_keys = self.region_prompts.match_images(paths)

    def list_prompts(self, path: Path, size: tuple[int, int]) -> tuple[list[Prompt], list[str]]:
        """Return the prompts that fit an image of (width, height), and a line for each that does not.

        Raises:
            InputError: None fits; one line without the image's name.
        """
        if path not in self.image_keys:
            raise InputError(f"{self.region_prompts.path} has no regions for it; name it there, or leave the image out")
        prompts, problems = self.region_prompts.fit_prompts(self.image_keys[path], *size)
        if problems and not prompts:
            remaining_count = f" (and {len(problems) - 1} more regions)" if len(problems) > 1 else ""
            raise InputError(f"{problems[0]}{remaining_count}")
        return prompts, problems


RegionSource = SearchedRegions | SharedPrompts | ListedPrompts
SOURCES = ("boxes", "points", "masks", "regions", "prompts", "everything")  # fields of a job that state its regions


@dataclass(frozen=True)
class CaptionJob:
    """What to caption in each image, and how: plain values, which any process can receive.

    Args:
        model: What `sca.captioner` takes, as text.
        device: Where the model runs.
        dtype: Of its floating-point tensors; None for the model's own.
        seed: Random seed.
        trust_remote_code: As for `sca.load`, like allow_external.
        boxes: x1,y1,x2,y2; one region each, in every image.
        points: x,y.
        masks: Image or .npy files.
        regions: Several parts of one region, see `sca.io.prompts.parse_region`.
        prompts: A prompts file or folder, in place of these regions.
        everything: Search for the regions instead.
        search_options: Fields of `sca.EverythingOptions`; None keeps the model's value.
        proposer: 'NAME [key=value]...', in place of the grid of points.
        max_regions: Maximum regions per image of a search, best first.
        task: "caption" or "recognition".
        generation_options: Generation options; None keeps the model's value.
        batch_size: Images per encoder batch.

    Raises:
        ValueError: A value is out of range, or the regions come from none or from more than one of a list of regions,
            `prompts` and `everything`.
    """

    model: str
    device: str = "cpu"
    dtype: str | None = None
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
    max_regions: int | None = None
    task: str = "caption"
    generation_options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_task(self.task)
        check_range("batch_size", self.batch_size, int, 1)
        sources = [name for name in SOURCES if getattr(self, name)]
        if not sources:
            raise ValueError(f"no regions to caption; give {', '.join(SOURCES[:-1])} or {SOURCES[-1]}")
        if len(sources) > 1 and {"prompts", "everything"} & set(sources):
            raise ValueError(
                f"{' and '.join(sources)} exclude each other; give boxes, points, masks and regions, or prompts, or "
                "everything"
            )

    def read_region_source(self) -> RegionSource:
        """Read the prompts, or build the proposer of a search.

        Raises:
            InputError: A prompt cannot be read.
            RegistryError: The proposer is unknown, or cannot be built.
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
        """List the files that the regions are read from."""
        prompts = [] if self.prompts is None else [Path(self.prompts)]
        prompt_files = [file for path in prompts for file in (list_labelme_files(path) if path.is_dir() else [path])]
        part = self._parse_proposer()
        proposals = iter_existing_paths(part.options) if part else ()
        return [*prompt_files, *map(Path, self.masks), *map(Path, list_mask_files(self.regions)), *proposals]

    def load_captioner(self) -> Captioner:
        """Load the captioner; see `sca.captioner` for what it raises."""
        import torch

        from sca.inference.factory import captioner

        torch.manual_seed(self.seed)
        trust_options = {"trust_remote_code": self.trust_remote_code, "allow_external": self.allow_external}
        options = {"dtype": self.dtype} if self.dtype else {}
        return captioner(self.model, resolve_device(self.device), **trust_options, **options)

    def _parse_proposer(self) -> Part | None:
        return Part.parse(self.proposer, "proposer", "proposers") if self.proposer else None

    def _build_proposer(self) -> Proposer | None:
        part = self._parse_proposer()
        return proposers.build(part.name, **part.options) if part else None
