"""Pictures and prompts go into the input frame and come back; requests of any mix keep their order."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sca_registry.contracts import ImageFormat, Prompt
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from sca.inference.processor import Processor

SIDES = st.integers(1, 200)


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("width", "height"), [(90, 50), (50, 90), (64, 64), (33, 7), (301, 200), (1, 1), (63, 64)])
def test_pixels_and_frames_are_those_of_the_published_processor_of_sam(width, height):
    theirs = SamImageProcessorPil(
        size={"longest_edge": 64},
        pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16},
    )(picture(width, height), return_tensors="pt")
    processor = Processor(ImageFormat(size=64), 8)
    assert torch.equal(processor.preprocess_images([picture(width, height)]), theirs["pixel_values"])
    assert processor.compute_frame(width, height).content_size[::-1] == tuple(
        theirs["reshaped_input_sizes"][0].tolist()
    )


@pytest.mark.parametrize(("width", "height"), [(90, 50), (50, 90), (64, 64), (33, 7), (301, 200), (63, 64)])
def test_masks_come_back_as_the_published_processor_brings_them(width, height):
    logits = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    processor = Processor(ImageFormat(size=64), 8)
    frame = processor.compute_frame(width, height)
    (theirs,) = SamImageProcessorPil().post_process_masks(
        [logits],
        original_sizes=[(height, width)],
        reshaped_input_sizes=[frame.content_size[::-1]],
        pad_size={"height": 64, "width": 64},
        binarize=False,
    )
    assert torch.equal(processor.postprocess_masks(logits, frame), theirs)


@pytest.mark.parametrize(("width", "height"), [(90, 50), (50, 90), (64, 64), (33, 7), (301, 200), (63, 64), (3, 500)])
@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_what_is_inside_is_what_is_above_zero_of_the_masks(width, height, fit):
    processor = Processor(ImageFormat(size=64, resize_mode=fit), 8)
    frame, draw = processor.compute_frame(width, height), torch.Generator().manual_seed(1)
    for cells in (0, 1, 5, 100, 1024):
        logits = -torch.rand(32, 32, generator=draw) - 0.1
        logits.view(-1)[torch.randperm(1024, generator=draw)[:cells]] = 3.0
        expected = processor.postprocess_masks(logits[None, None], frame)[0, 0]
        (found,) = processor.iter_binary_masks(logits[None], [frame])
        assert found.shape == (height, width)
        unsure = expected.abs() < 1e-5
        assert ((torch.from_numpy(found.copy()) == (expected > 0)) | unsure).all()
        assert unsure.float().mean() < 0.01
    assert len(processor._upscalings) == 1


def test_a_padded_picture_is_zero_right_and_below_and_a_stretched_one_fills_the_frame():
    wide = Image.new("RGB", (80, 40), (200, 100, 0))
    padded = Processor(ImageFormat(size=64, resize_mode="pad"), 8).preprocess_images([wide])
    assert padded[:, :, :32].all()
    assert not padded[:, :, 32:].any()
    stretched = Processor(ImageFormat(size=64, resize_mode="stretch"), 8)
    assert stretched.preprocess_images([wide]).all()
    assert stretched.compute_frame(80, 40).scale == (64 / 80, 64 / 40)


def test_channels_are_normalized_and_come_in_the_order_that_is_asked_for():
    image = Image.new("RGB", (8, 8), (255, 51, 0))
    rgb = ImageFormat(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1.0))
    bgr = ImageFormat(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1.0), channel_order="bgr")
    values = Processor(rgb, 1).preprocess_images([image])[0, :, 0, 0]
    assert torch.allclose(values, torch.tensor([1.0, -1.2, -0.5]))
    assert torch.equal(Processor(bgr, 1).preprocess_images([image])[0, :, 0, 0], values.flip(0))


def test_pictures_of_other_modes_and_sizes_share_a_batch():
    processor = Processor(ImageFormat(size=32), 4)
    images = [picture(40, 20), picture(20, 40).convert("L"), picture(5, 5).convert("P")]
    batch = processor.preprocess_images(images)
    assert batch.shape == (3, 3, 32, 32)
    assert all(torch.equal(batch[i : i + 1], processor.preprocess_images([image])) for i, image in enumerate(images))


@given(SIDES, SIDES, st.sampled_from(["pad", "stretch"]), st.data())
def test_boxes_and_points_go_into_the_frame_and_boxes_come_back(width, height, fit, data):
    processor = Processor(ImageFormat(size=64, resize_mode=fit), 8)
    frame = processor.compute_frame(width, height)
    x1, x2 = sorted(data.draw(st.lists(st.floats(0, width), min_size=2, max_size=2)))
    y1, y2 = sorted(data.draw(st.lists(st.floats(0, height), min_size=2, max_size=2)))
    prompt = Prompt(box=(x1, y1, x2, y2), points=((x1, y1, 1), (x2, y2, 0)))
    ((places, prompts),) = processor.group_prompts([[prompt]], [frame])
    assert places == [0]
    assert (prompts.boxes >= 0).all()
    assert (prompts.boxes.reshape(-1, 2) <= torch.tensor(frame.content_size) + 1e-3).all()
    assert torch.equal(prompts.points[0].flatten(), prompts.boxes[0])
    assert prompts.labels.tolist() == [[1, 0]]
    back = (prompts.boxes[0].reshape(2, 2) / torch.tensor(frame.scale)).flatten().tolist()
    assert back == pytest.approx(prompt.box, abs=1e-3 * max(width, height))


@settings(deadline=None)
@given(st.integers(8, 200), st.integers(8, 200), st.sampled_from(["pad", "stretch"]), st.data())
def test_a_mask_goes_into_the_frame_and_comes_back(width, height, fit, data):
    """A rectangle, at the resolution of the mask's cells: a cell on its edge may go either way."""
    processor = Processor(ImageFormat(size=64, resize_mode=fit), 8)
    frame = processor.compute_frame(width, height)
    x1, y1 = data.draw(st.integers(0, width - 4)), data.draw(st.integers(0, height - 4))
    x2, y2 = data.draw(st.integers(x1 + 4, width)), data.draw(st.integers(y1 + 4, height))
    mask = np.zeros((height, width), dtype=bool)
    mask[y1:y2, x1:x2] = True
    logits = processor.encode_mask_prompt(mask, frame)
    assert logits.shape == (1, 32, 32)
    back = (processor.postprocess_masks(logits[None], frame)[0, 0] > 0).numpy()
    assert back.shape == mask.shape
    across, down = (
        2 * width / (frame.content_size[0] / 2),
        2 * height / (frame.content_size[1] / 2),
    )  # two cells in image pixels
    y, x = np.nonzero(back != mask)
    on_column = np.minimum(abs(x + 0.5 - x1), abs(x + 0.5 - x2)) <= across
    on_row = np.minimum(abs(y + 0.5 - y1), abs(y + 0.5 - y2)) <= down
    assert (on_column | on_row).all()


def test_coverage_is_the_share_of_each_cell_that_the_mask_covers():
    processor = Processor(ImageFormat(size=32, resize_mode="pad"), 2)  # 8 x 8 cells of 4 pixels
    mask = np.zeros((16, 32), dtype=bool)
    mask[0:4, 0:6] = True
    covered = processor.compute_coverage(mask, processor.compute_frame(32, 16))
    expected = torch.zeros(8, 8)
    expected[0, 0], expected[0, 1] = 1.0, 0.5
    assert torch.allclose(covered, expected, atol=1 / 255)
    assert torch.equal(
        processor.compute_valid_cells(processor.compute_frame(32, 16)), torch.arange(8)[:, None].expand(8, 8) < 4
    )


@given(st.lists(st.lists(st.sampled_from(["box", "point", "points", "mask", "both"]), max_size=5), max_size=4))
def test_a_mixed_request_falls_into_even_buckets_and_every_prompt_keeps_its_place(kinds):
    processor = Processor(ImageFormat(size=64), 8)
    frames = [processor.compute_frame(64, 64) for _ in kinds]
    box, mask = (1.0, 2.0, 30.0, 40.0), np.ones((64, 64), dtype=bool)
    made = {
        "box": Prompt(box=box),
        "point": Prompt(points=((5, 6, 1),)),
        "points": Prompt(points=((5, 6, 1), (7, 8, 0))),
        "mask": Prompt(mask=mask),
        "both": Prompt(box=box, points=((5, 6, 1),)),
    }
    buckets = processor.group_prompts([[made[kind] for kind in request] for request in kinds], frames)
    flat = [(owner, kind) for owner, request in enumerate(kinds) for kind in request]
    assert sorted(place for places, _ in buckets for place in places) == list(range(len(flat)))
    assert len(buckets) == len({kind for _, kind in flat})
    for places, prompts in buckets:
        assert len({flat[place][1] for place in places}) == 1
        assert prompts.image_index.tolist() == [flat[place][0] for place in places]
        assert prompts.image_index.tolist() == sorted(prompts.image_index.tolist())
        kind = flat[places[0]][1]
        assert (prompts.boxes is not None) == (kind in ("box", "both"))
        assert (prompts.points is not None) == (kind in ("point", "points", "both"))
        assert (prompts.masks is not None) == (kind == "mask")
