"""Conformance checks of datasets."""

from __future__ import annotations

from PIL import Image

from sca.io.masks import decode_rle, mask_to_box
from sca.testing.conformance.checks import DoesNotApply, register_check
from sca.testing.conformance.harnesses import DatasetHarness


@register_check("datasets", source="sca_registry.contracts.Sample")
def samples_have_valid_types(harness: DatasetHarness) -> str | None:
    """A sample has an RGB image, a unique integer image id, and a tuple of regions."""
    dataset_samples = harness.read_samples()
    if not dataset_samples:
        return "the dataset is empty"
    for sample in dataset_samples:
        image = sample.image
        if not isinstance(image, Image.Image) or image.mode != "RGB":
            return f"image {sample.image_id} is {getattr(image, 'mode', type(image).__name__)}, not RGB"
        if not isinstance(sample.image_id, int) or not isinstance(sample.regions, tuple):
            return f"image id {sample.image_id!r}, regions of type {type(sample.regions).__name__}"
    ids = [sample.image_id for sample in dataset_samples]
    return None if len(set(ids)) == len(ids) else f"duplicate image ids: {ids}"


@register_check("datasets")
def samples_are_deterministic(harness: DatasetHarness) -> str | None:
    """An index always returns the same sample, also from a new instance of the dataset."""
    rebuilt_dataset = harness.build(seed=1)
    for index, sample in enumerate(harness.read_samples()):
        for repeated_sample in (harness.component[index], rebuilt_dataset[index]):
            if repeated_sample.image.tobytes() != sample.image.tobytes() or repeated_sample[1:] != sample[1:]:
                return f"sample {index} changed between two reads"
    return None


@register_check("datasets")
def raises_index_error_past_end(harness: DatasetHarness) -> str | None:
    """An index past the end raises IndexError, which ends iteration."""
    try:
        harness.component[len(harness.component)]
    except IndexError:
        return None
    return f"index {len(harness.component)} of {len(harness.component)} samples returns a sample"


@register_check("datasets", source="sca_registry.contracts.Region")
def boxes_are_inside_image(harness: DatasetHarness) -> str | None:
    """A region's box is x1 y1 x2 y2 with x1 < x2 and y1 < y2, inside the image."""
    for sample, region in harness.iter_regions():
        x1, y1, x2, y2 = region.box
        if not (0 <= x1 < x2 <= sample.image.width and 0 <= y1 < y2 <= sample.image.height):
            return f"region {region.id} has the box {region.box} in an image of size {sample.image.size}"
    return None


@register_check("datasets", source="sca_registry.contracts.Region")
def boxes_contain_masks(harness: DatasetHarness) -> str | None:
    """A region's mask is a nonempty RLE of the image's size, inside the box up to one pixel."""
    num_masks = 0
    for sample, region in harness.iter_regions():
        if region.mask is not None:
            num_masks += 1
            height, width = decode_rle(region.mask).shape
            if (width, height) != sample.image.size:
                return (
                    f"region {region.id} has a mask of size {(width, height)} in an image of size {sample.image.size}"
                )
            tight_box = mask_to_box(region.mask)
            if tight_box is None:
                return f"region {region.id} has an empty mask"
            overhang = max(region.box[0] - tight_box[0], region.box[1] - tight_box[1], tight_box[2] - region.box[2])
            if max(overhang, tight_box[3] - region.box[3]) > 1:
                return f"region {region.id}: the mask extends over {tight_box}, outside the box {region.box}"
    if not num_masks:
        raise DoesNotApply("no region has a mask")
    return None


@register_check("datasets", source="sca_registry.contracts.Region")
def regions_have_text(harness: DatasetHarness) -> str | None:
    """A region has a name or phrases, none of them blank, and a unique id."""
    ids = []
    for _, region in harness.iter_regions():
        ids.append(region.id)
        texts = [*region.phrases, *([] if region.name is None else [region.name])]
        if not isinstance(region.phrases, tuple) or not all(isinstance(text, str) and text.strip() for text in texts):
            return f"region {region.id}: name {region.name!r}, phrases {region.phrases!r}"
        if not texts:
            return f"region {region.id} has neither a name nor a phrase"
    return None if len(set(ids)) == len(ids) else "duplicate region ids"
