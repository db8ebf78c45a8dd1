"""Processor: transforms of images and prompts to the model input and back; requests keep their order."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sca_registry.contracts import ImageFormat, Prompt
from torch.nn import functional as F
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from sca.inference.processor import Processor
from sca.nn.masks import masks_to_boxes

SIDE_LENGTHS = st.integers(1, 200)


def make_image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("width", "height"), [(90, 50), (50, 90), (64, 64), (33, 7), (301, 200), (1, 1), (63, 64)])
def test_processor_matches_pixel_values_and_frames_of_sam_image_processor(width, height):
    expected = SamImageProcessorPil(
        size={"longest_edge": 64},
        pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16},
    )(make_image(width, height), return_tensors="pt")
    processor = Processor(ImageFormat(size=64), 8)
    assert torch.equal(processor.preprocess_images([make_image(width, height)]), expected["pixel_values"])
    assert processor.compute_frame(width, height).content_size[::-1] == tuple(
        expected["reshaped_input_sizes"][0].tolist()
    )


@pytest.mark.parametrize(("width", "height"), [(90, 50), (50, 90), (64, 64), (33, 7), (301, 200), (63, 64)])
def test_processor_matches_postprocessed_masks_of_sam_image_processor(width, height):
    logits = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    processor = Processor(ImageFormat(size=64), 8)
    frame = processor.compute_frame(width, height)
    (expected,) = SamImageProcessorPil().post_process_masks(
        [logits],
        original_sizes=[(height, width)],
        reshaped_input_sizes=[frame.content_size[::-1]],
        pad_size={"height": 64, "width": 64},
        binarize=False,
    )
    assert torch.equal(processor.postprocess_masks(logits, frame), expected)


@pytest.mark.parametrize(("width", "height"), [(90, 50), (50, 90), (64, 64), (33, 7), (301, 200), (63, 64), (3, 500)])
@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_iter_binary_masks_matches_postprocessed_masks_above_zero(width, height, fit):
    processor = Processor(ImageFormat(size=64, resize_mode=fit), 8)
    frame, generator = processor.compute_frame(width, height), torch.Generator().manual_seed(1)
    for num_cells in (0, 1, 5, 100, 1024):
        logits = -torch.rand(32, 32, generator=generator) - 0.1
        logits.view(-1)[torch.randperm(1024, generator=generator)[:num_cells]] = 3.0
        expected = processor.postprocess_masks(logits[None, None], frame)[0, 0]
        (binary_mask,) = processor.iter_binary_masks(logits[None], [frame])
        assert binary_mask.shape == (height, width)
        near_zero = expected.abs() < 1e-5
        assert ((torch.from_numpy(binary_mask.copy()) == (expected > 0)) | near_zero).all()
        assert near_zero.float().mean() < 0.01
    assert len(processor._upscalings) == 1


@pytest.mark.parametrize(("width", "height"), [(90, 50), (64, 64), (33, 7), (301, 200), (3, 500)])
@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_stability_and_boxes_are_those_of_postprocessed_masks(width, height, fit):
    processor = Processor(ImageFormat(size=64, resize_mode=fit), 8)
    frame, offset = processor.compute_frame(width, height), 0.5
    logits = F.interpolate(torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(2)), 32, mode="bicubic")[
        :, 0
    ]
    logits = torch.cat((logits * 2, torch.full((1, 32, 32), -1.0)))
    pixels = processor.postprocess_masks(logits[:, None], frame)[:, 0]
    stability, boxes = processor.compute_stability_and_boxes(logits, frame, offset)
    expected = (pixels > offset).sum((1, 2)) / (pixels > -offset).sum((1, 2)).clamp(min=1)
    assert torch.allclose(stability, expected, atol=1e-4)  # a pixel can be at the threshold
    assert torch.equal(boxes, masks_to_boxes(pixels > 0))
    assert boxes[:5].any(1).all()
    assert not boxes[5].any()


def test_processor_pads_right_and_below_or_stretches_to_the_frame():
    image = Image.new("RGB", (80, 40), (200, 100, 0))
    padded_pixels = Processor(ImageFormat(size=64, resize_mode="pad"), 8).preprocess_images([image])
    assert padded_pixels[:, :, :32].all()
    assert not padded_pixels[:, :, 32:].any()
    stretch_processor = Processor(ImageFormat(size=64, resize_mode="stretch"), 8)
    assert stretch_processor.preprocess_images([image]).all()
    assert stretch_processor.compute_frame(80, 40).scale == (64 / 80, 64 / 40)


def test_processor_normalizes_channels_and_applies_their_order():
    image = Image.new("RGB", (8, 8), (255, 51, 0))
    rgb_format = ImageFormat(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1.0))
    bgr_format = ImageFormat(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1.0), channel_order="bgr")
    rgb_values = Processor(rgb_format, 1).preprocess_images([image])[0, :, 0, 0]
    assert torch.allclose(rgb_values, torch.tensor([1.0, -1.2, -0.5]))
    assert torch.equal(Processor(bgr_format, 1).preprocess_images([image])[0, :, 0, 0], rgb_values.flip(0))


def test_processor_batches_images_of_different_modes_and_sizes():
    processor = Processor(ImageFormat(size=32), 4)
    images = [make_image(40, 20), make_image(20, 40).convert("L"), make_image(5, 5).convert("P")]
    batch = processor.preprocess_images(images)
    assert batch.shape == (3, 3, 32, 32)
    assert all(torch.equal(batch[i : i + 1], processor.preprocess_images([image])) for i, image in enumerate(images))


@given(SIDE_LENGTHS, SIDE_LENGTHS, st.sampled_from(["pad", "stretch"]), st.data())
def test_processor_maps_boxes_and_points_to_the_frame_and_boxes_back(width, height, fit, data):
    processor = Processor(ImageFormat(size=64, resize_mode=fit), 8)
    frame = processor.compute_frame(width, height)
    x1, x2 = sorted(data.draw(st.lists(st.floats(0, width), min_size=2, max_size=2)))
    y1, y2 = sorted(data.draw(st.lists(st.floats(0, height), min_size=2, max_size=2)))
    prompt = Prompt(box=(x1, y1, x2, y2), points=((x1, y1, 1), (x2, y2, 0)))
    ((prompt_indices, prompt_batch),) = processor.group_prompts([[prompt]], [frame])
    assert prompt_indices == [0]
    assert (prompt_batch.boxes >= 0).all()
    assert (prompt_batch.boxes.reshape(-1, 2) <= torch.tensor(frame.content_size) + 1e-3).all()
    assert torch.equal(prompt_batch.points[0].flatten(), prompt_batch.boxes[0])
    assert prompt_batch.labels.tolist() == [[1, 0]]
    restored_box = (prompt_batch.boxes[0].reshape(2, 2) / torch.tensor(frame.scale)).flatten().tolist()
    assert restored_box == pytest.approx(prompt.box, abs=1e-3 * max(width, height))


@settings(deadline=None)
@given(st.integers(8, 200), st.integers(8, 200), st.sampled_from(["pad", "stretch"]), st.data())
def test_processor_maps_a_mask_to_the_frame_and_back(width, height, fit, data):
    """Compare with a rectangle; cells on its edge may be in or out."""
    processor = Processor(ImageFormat(size=64, resize_mode=fit), 8)
    frame = processor.compute_frame(width, height)
    x1, y1 = data.draw(st.integers(0, width - 4)), data.draw(st.integers(0, height - 4))
    x2, y2 = data.draw(st.integers(x1 + 4, width)), data.draw(st.integers(y1 + 4, height))
    mask = np.zeros((height, width), dtype=bool)
    mask[y1:y2, x1:x2] = True
    logits = processor.encode_mask_prompt(mask, frame)
    assert logits.shape == (1, 32, 32)
    restored_mask = (processor.postprocess_masks(logits[None], frame)[0, 0] > 0).numpy()
    assert restored_mask.shape == mask.shape
    tolerance_x, tolerance_y = (
        2 * width / (frame.content_size[0] / 2),
        2 * height / (frame.content_size[1] / 2),
    )  # two cells in image pixels
    y, x = np.nonzero(restored_mask != mask)
    is_near_vertical_edge = np.minimum(abs(x + 0.5 - x1), abs(x + 0.5 - x2)) <= tolerance_x
    is_near_horizontal_edge = np.minimum(abs(y + 0.5 - y1), abs(y + 0.5 - y2)) <= tolerance_y
    assert (is_near_vertical_edge | is_near_horizontal_edge).all()


def test_compute_coverage_returns_the_covered_fraction_of_each_cell():
    processor = Processor(ImageFormat(size=32, resize_mode="pad"), 2)  # 8 x 8 cells of 4 pixels
    mask = np.zeros((16, 32), dtype=bool)
    mask[0:4, 0:6] = True
    coverage = processor.compute_coverage(mask, processor.compute_frame(32, 16))
    expected = torch.zeros(8, 8)
    expected[0, 0], expected[0, 1] = 1.0, 0.5
    assert torch.allclose(coverage, expected, atol=1 / 255)
    assert torch.equal(
        processor.compute_valid_cells(processor.compute_frame(32, 16)), torch.arange(8)[:, None].expand(8, 8) < 4
    )


@given(st.lists(st.lists(st.sampled_from(["box", "point", "points", "mask", "both"]), max_size=5), max_size=4))
def test_group_prompts_builds_homogeneous_batches_of_all_prompts(kinds):
    processor = Processor(ImageFormat(size=64), 8)
    frames = [processor.compute_frame(64, 64) for _ in kinds]
    box, mask = (1.0, 2.0, 30.0, 40.0), np.ones((64, 64), dtype=bool)
    prompt_by_kind = {
        "box": Prompt(box=box),
        "point": Prompt(points=((5, 6, 1),)),
        "points": Prompt(points=((5, 6, 1), (7, 8, 0))),
        "mask": Prompt(mask=mask),
        "both": Prompt(box=box, points=((5, 6, 1),)),
    }
    buckets = processor.group_prompts([[prompt_by_kind[kind] for kind in image_kinds] for image_kinds in kinds], frames)
    image_index_and_kind = [
        (image_index, kind) for image_index, image_kinds in enumerate(kinds) for kind in image_kinds
    ]
    assert sorted(prompt_index for prompt_indices, _ in buckets for prompt_index in prompt_indices) == list(
        range(len(image_index_and_kind))
    )
    assert len(buckets) == len({kind for _, kind in image_index_and_kind})
    for prompt_indices, prompt_batch in buckets:
        assert len({image_index_and_kind[prompt_index][1] for prompt_index in prompt_indices}) == 1
        assert prompt_batch.image_index.tolist() == [
            image_index_and_kind[prompt_index][0] for prompt_index in prompt_indices
        ]
        assert prompt_batch.image_index.tolist() == sorted(prompt_batch.image_index.tolist())
        kind = image_index_and_kind[prompt_indices[0]][1]
        assert (prompt_batch.boxes is not None) == (kind in ("box", "both"))
        assert (prompt_batch.points is not None) == (kind in ("point", "points", "both"))
        assert (prompt_batch.masks is not None) == (kind == "mask")
