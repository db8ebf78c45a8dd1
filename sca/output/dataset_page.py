"""HTML page of dataset samples, before and after augmentation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from sca_registry.contracts import Caption, Prompt, Region, Sample

from sca.io.atomic import create_writable_folder
from sca.output.html import HtmlWriter


def write_samples_page(
    samples: Iterable[Sample],
    path: Path,
    title: str,
    augment: Callable[[Sample, np.random.Generator], Sample] | None = None,
    seed: int = 0,
) -> Path:
    """Write an offline HTML page of samples.

    Args:
        samples: Samples to show.
        path: Output file.
        title: Title of the page.
        augment: Augmentation; if set, each sample is also shown augmented.
        seed: Random seed of the augmentation.

    Returns:
        The path of the page.
    """
    create_writable_folder(path.parent)
    page = HtmlWriter(path, title)
    try:
        for sample in samples:
            _add_sample(page, f"image {sample.image_id}", sample)
            if augment is not None:
                _add_sample(page, f"image {sample.image_id}, augmented", augment(sample, np.random.default_rng(seed)))
                seed += 1
    except BaseException:
        page.close(finished=False)
        raise
    page.close()
    return path


def _add_sample(page: HtmlWriter, name: str, sample: Sample) -> None:
    page.add(name, sample.image, [_region_to_caption(region) for region in sample.regions])


def _region_to_caption(region: Region) -> Caption:
    phrase_text = " / ".join(region.phrases)
    label = f"{region.name}: " if region.name and phrase_text else region.name or ""
    return Caption(label + phrase_text, math.nan, region.box, region.mask, None, Prompt(box=region.box), region.id)
