"""Zoom: small regions are predicted from crops, as if each crop were an image; without zoom, nothing changes."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sca_registry.contracts import Prompt
from sca_registry.spec import ZoomOptions

from sca.inference import zoom as zoom_module
from sca.inference.automatic import caption_everything
from sca.inference.engine import Engine
from sca.inference.predictor import Predictor
from sca.inference.processor import Processor
from sca.inference.zoom import CROPS_PER_BATCH, _crop_prompt, caption_masks, caption_regions, choose_window
from sca.inference.zoom_options import check_zoom, resolve_zoom
from sca.io.masks import decode_rle, encode_rle

ZOOM = ZoomOptions(max_cells=4.0, context=3.0, max_upscale=1.0)
INPUT_SIZE = 64  # of the small model, whose grid has 8 x 8 cells


@pytest.fixture(scope="module")
def mosaic(scene):
    """An image of 4 x 4 scenes, 384 pixels wide and high: a cell has 48 pixels."""
    image = Image.new("RGB", (4 * 96, 4 * 96))
    for index in range(16):
        image.paste(scene.image, (index % 4 * 96, index // 4 * 96))
    return image


@pytest.fixture
def engine(build_small_model):
    return Engine(build_small_model())


@pytest.fixture
def crop_sizes(engine, monkeypatch):
    """Sizes of the images of each call of the encoder."""
    sizes, encode = [], engine.encode

    def record_sizes(images):
        sizes.append([image.size for image in images])
        return encode(images)

    monkeypatch.setattr(engine, "encode", record_sizes)
    return sizes


def make_mask(x1, y1, x2, y2, width=384, height=384):
    mask = np.zeros((height, width), bool)
    mask[y1:y2, x1:x2] = True
    return mask


def to_tuple(caption):
    return caption.text, caption.score, caption.mask, caption.predicted_iou, caption.box, caption.alternatives


SMALL_PROMPTS = {
    "box": Prompt(box=(100.0, 200.0, 124.0, 220.0)),
    "box-at-the-border": Prompt(box=(368.0, 0.0, 384.0, 12.0)),
    "box-and-points": Prompt(box=(100.0, 200.0, 124.0, 220.0), points=((110.0, 210.0, 1), (370.0, 5.0, 0))),
    "mask": Prompt(mask=make_mask(300, 310, 316, 330)),
    "box-and-mask": Prompt(box=(300.0, 310.0, 310.0, 320.0), mask=make_mask(304, 310, 316, 330)),
}


@pytest.mark.parametrize("prompt", SMALL_PROMPTS.values(), ids=SMALL_PROMPTS)
def test_small_region_is_predicted_from_its_crop(engine, mosaic, prompt):
    encoded = engine.encode([mosaic])
    ((caption,),) = caption_regions(engine, encoded, [[prompt]], zoom=ZOOM, num_captions=2, num_beams=2)
    box = prompt.box if prompt.mask is None else (300.0, 310.0, 316.0, 330.0)
    window = choose_window(box, encoded.frames[0], INPUT_SIZE, ZOOM)
    x1, y1, x2, y2 = window
    assert 64 <= x2 - x1 == y2 - y1 <= 96  # at least the pixels of the model input
    crop_request = [_crop_prompt(prompt, window)]
    (expected,) = engine.caption(mosaic.crop(window), crop_request, num_captions=2, num_beams=2)
    mask = np.zeros((384, 384), bool)
    mask[y1:y2, x1:x2] = expected.array
    assert (caption.array == mask).all()
    assert (caption.text, caption.score, caption.predicted_iou) == (
        expected.text,
        expected.score,
        expected.predicted_iou,
    )
    assert caption.alternatives == expected.alternatives
    assert len(caption.alternatives) == 1
    assert caption.prompt is prompt
    assert prompt.box is None or caption.box == prompt.box


def test_point_is_predicted_from_the_crop_of_its_first_mask(engine, mosaic, monkeypatch):
    first_mask = encode_rle(make_mask(150, 150, 170, 180))
    monkeypatch.setattr(engine, "predict_best_masks", lambda *_: [zoom_module.PredictedMask(first_mask, 0.5)])
    prompt = Prompt(points=((160.0, 160.0, 1), (383.0, 383.0, 0)))
    encoded = engine.encode([mosaic])
    ((caption,),) = caption_regions(engine, encoded, [[prompt]], zoom=ZOOM)
    window = choose_window((150.0, 150.0, 170.0, 180.0), encoded.frames[0], INPUT_SIZE, ZOOM)
    crop_request = _crop_prompt(prompt, window)
    assert crop_request.points == ((160.0 - window[0], 160.0 - window[1], 1),)  # the other point is outside
    assert caption.text == engine.caption(mosaic.crop(window), [crop_request])[0].text


@pytest.mark.parametrize(
    "zoom", [None, ZoomOptions(), replace(ZOOM, max_cells=1e-6)], ids=["off", "unmeasured", "tiny"]
)
def test_regions_without_a_crop_are_predicted_as_without_zoom(engine, mosaic, crop_sizes, zoom):
    encoded = engine.encode([mosaic, mosaic.resize((200, 90))])
    requests = [[*SMALL_PROMPTS.values(), Prompt(points=((9.0, 9.0, 1),))], [Prompt(box=(1.0, 2.0, 180.0, 80.0))]]
    captions = caption_regions(engine, encoded, requests, zoom=zoom)
    expected = engine.caption_batch(encoded, requests)
    assert [[to_tuple(each) for each in row] for row in captions] == [
        [to_tuple(each) for each in row] for row in expected
    ]
    assert len(crop_sizes) == 1


def test_predictor_without_zoom_equals_the_engine(engine, mosaic, crop_sizes):
    predictor = Predictor(engine)
    predictor.set_image(mosaic)
    prompts = list(SMALL_PROMPTS.values())
    for zoom in ("off", "auto"):  # the small model has no measured maximum area
        captions = predictor.predict(prompts, zoom=zoom)
        assert [to_tuple(each) for each in captions] == [
            to_tuple(each) for each in engine.caption_batch(predictor.encoded, [prompts])[0]
        ]
        assert predictor.segment(prompts, zoom=zoom) == engine.segment(predictor.encoded, [prompts])
        (batch_captions,) = predictor.predict_batch([mosaic], [prompts], zoom=zoom)
        assert [to_tuple(each) for each in batch_captions] == [to_tuple(each) for each in captions]
    assert [size for sizes in crop_sizes for size in sizes] == [mosaic.size] * 3


def test_captions_keep_the_order_of_prompts_of_several_images(engine, mosaic):
    large = Prompt(box=(0.0, 0.0, 380.0, 380.0))
    requests = [[SMALL_PROMPTS["box"], large, SMALL_PROMPTS["mask"]], [], [large, SMALL_PROMPTS["box-at-the-border"]]]
    encoded = engine.encode([mosaic, mosaic, mosaic.rotate(90)])
    captions = caption_regions(engine, encoded, requests, zoom=ZOOM)
    assert [[each.region_id for each in row] for row in captions] == [[0, 1, 2], [], [0, 1]]
    assert all(
        c.prompt is p
        for row, request in zip(captions, requests, strict=True)
        for c, p in zip(row, request, strict=True)
    )
    alone = caption_regions(engine, engine.encode([mosaic.rotate(90)]), [requests[2][1:]], zoom=ZOOM)[0][0]
    assert captions[2][1].text == alone.text
    assert captions[2][1].mask == alone.mask


def test_near_regions_share_a_crop_and_crops_are_encoded_in_batches(engine, mosaic, crop_sizes):
    encoded = engine.encode([mosaic])
    near = [Prompt(box=(100.0 + shift, 100.0, 110.0 + shift, 110.0)) for shift in range(6)]
    caption_regions(engine, encoded, [near], zoom=ZOOM)
    assert len(crop_sizes[1]) == 1
    apart = [Prompt(box=(x, y, x + 10.0, y + 10.0)) for x in range(20, 380, 48) for y in range(20, 380, 48)]
    caption_regions(engine, encoded, [apart], zoom=ZOOM)
    batch_sizes = [len(sizes) for sizes in crop_sizes[2:]]
    assert max(batch_sizes) == CROPS_PER_BATCH
    assert len(batch_sizes) > 2


def test_caption_does_not_depend_on_other_regions(engine, mosaic):
    encoded = engine.encode([mosaic])
    prompts = [Prompt(box=(x, 90.0, x + 16.0, 104.0)) for x in range(20, 360, 17)]
    together = caption_regions(engine, encoded, [prompts], zoom=ZOOM)[0]
    for prompt, caption in zip(prompts, together, strict=True):
        ((alone,),) = caption_regions(engine, encoded, [[prompt]], zoom=ZOOM)
        assert caption.text == alone.text
        assert (caption.array != alone.array).mean() < 1e-3


def test_segment_returns_candidate_masks_from_the_crop(engine, mosaic):
    predictor = Predictor(engine)
    predictor.set_image(mosaic)
    (masks,) = predictor.segment([SMALL_PROMPTS["box"]], zoom=4)
    window = choose_window(SMALL_PROMPTS["box"].box, predictor.encoded.frames[0], INPUT_SIZE, ZOOM)
    predictor.set_image(mosaic.crop(window))
    (expected,) = predictor.segment([_crop_prompt(SMALL_PROMPTS["box"], window)])
    x1, y1, x2, y2 = window
    assert [each.predicted_iou for each in masks] == [each.predicted_iou for each in expected]
    for mask, crop_mask in zip(masks, expected, strict=True):
        assert (mask.array[y1:y2, x1:x2] == crop_mask.array).all()
        assert mask.array.sum() == crop_mask.array.sum()


@pytest.mark.parametrize("resize_mode", ["pad", "stretch"])
def test_windows_lie_in_the_image_contain_the_region_and_limit_the_upscaling(engine, resize_mode):
    rng = np.random.default_rng(0)
    processor = Processor(replace(engine.processor.image_format, resize_mode=resize_mode), engine.processor.grid_size)
    num_windows = 0
    for _ in range(2000):
        width, height = (int(each) for each in rng.integers(8, 900, 2))
        frame = processor.compute_frame(width, height)
        x, y = np.sort(rng.uniform(0, width, 2)), np.sort(rng.uniform(0, height, 2))
        box = (x[0], y[0], *(low + (high - low) * rng.random() ** 2 for low, high in (x, y)))
        zoom = ZoomOptions(4.0, rng.uniform(1.5, 4), rng.choice([0.5, 1.0, 2.0]))
        window = choose_window(box, frame, INPUT_SIZE, zoom)
        if window is None:
            continue
        num_windows += 1
        x1, y1, x2, y2 = window
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        assert x1 <= box[0] + 1
        assert y1 <= box[1] + 1
        assert x2 >= box[2] - 1
        assert y2 >= box[3] - 1
        scale = processor.compute_frame(x2 - x1, y2 - y1).scale
        assert max(scale) <= zoom.max_upscale * 1.2 + 0.2  # windows and inputs have whole pixels
        assert max(scale) > max(frame.scale)
        if resize_mode == "stretch" and min(x2 - x1, y2 - y1) > 20:
            assert (x2 - x1) / (y2 - y1) == pytest.approx(width / height, rel=0.1)
    assert num_windows > 200


@pytest.mark.parametrize("size", [(40, 40), (64, 64), (80, 20), (1, 1)])
def test_images_smaller_than_a_tile_have_no_window(engine, size):
    frame = engine.processor.compute_frame(*size)
    assert choose_window((0.0, 0.0, 1.0, 1.0), frame, INPUT_SIZE, ZOOM) is None


def test_crop_prompt_clips_the_box_and_crops_the_mask():
    prompt = Prompt(
        (5.0, 15.0, 25.0, 40.0), ((12.0, 22.0, 1), (3.0, 22.0, 0), (19.9, 29.9, 0)), make_mask(4, 4, 20, 24, 50, 60)
    )
    cropped = _crop_prompt(prompt, (10, 20, 20, 30))
    assert cropped.box == (0.0, 0.0, 10.0, 10.0)
    assert cropped.points == ((2.0, 2.0, 1), (pytest.approx(9.9), pytest.approx(9.9), 0))
    assert cropped.mask.shape == (10, 10)
    assert cropped.mask.sum() == 10 * 4


def test_found_masks_of_small_regions_are_predicted_again(engine, mosaic):
    encoded = engine.encode([mosaic])
    small, large = make_mask(100, 100, 110, 110), make_mask(0, 0, 300, 300)
    masks = [zoom_module.PredictedMask(encode_rle(each), 0.25) for each in (large, small)]
    prompts = [Prompt(box=(0.0, 0.0, 300.0, 300.0)), Prompt((100.0, 100.0, 110.0, 110.0), ((105.0, 105.0, 1),))]
    captions = caption_masks(engine, encoded, masks, prompts, zoom=ZOOM)
    assert [each.region_id for each in captions] == [0, 1]
    assert captions[0].mask == masks[0].rle
    assert captions[0].predicted_iou == 0.25
    ((expected,),) = caption_regions(engine, encoded, [prompts[1:]], zoom=ZOOM)
    assert (captions[1].text, captions[1].mask, captions[1].predicted_iou) == (
        expected.text,
        expected.mask,
        expected.predicted_iou,
    )
    unzoomed = engine.caption_masks(encoded, masks, prompts)
    assert [to_tuple(each) for each in caption_masks(engine, encoded, masks, prompts)] == list(map(to_tuple, unzoomed))


def test_found_region_keeps_its_mask_if_the_mask_in_the_crop_is_empty(engine, mosaic, monkeypatch):
    encoded = engine.encode([mosaic])
    mask = zoom_module.PredictedMask(encode_rle(make_mask(100, 100, 110, 110)), 0.25)
    caption_batch = engine.caption_batch

    def caption_with_empty_masks(*arguments, **options):
        return [
            [replace(each, mask=encode_rle(np.zeros_like(decode_rle(each.mask))), box=None) for each in row]
            for row in caption_batch(*arguments, **options)
        ]

    monkeypatch.setattr(engine, "caption_batch", caption_with_empty_masks)
    (caption,) = caption_masks(engine, encoded, [mask], [Prompt(points=((105.0, 105.0, 1),))], zoom=ZOOM)
    assert (caption.mask, caption.predicted_iou, caption.box) == (mask.rle, 0.25, (100.0, 100.0, 110.0, 110.0))


def test_caption_everything_zooms_into_small_regions(engine, mosaic, crop_sizes):
    predictor = Predictor(engine)
    predictor.set_image(mosaic)
    options = {"points_per_side": 3, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
    expected = caption_everything(predictor, **options)
    assert [to_tuple(each) for each in caption_everything(predictor, zoom="off", **options)] == list(
        map(to_tuple, expected)
    )
    assert len(crop_sizes) == 1
    captions = caption_everything(predictor, zoom=64, **options)
    assert len(captions) == len(expected) > 0
    assert all(decode_rle(each.mask).shape == (384, 384) for each in captions)


def test_auto_uses_the_measured_options_of_the_model(build_small_model):
    engine = Engine(build_small_model(zoom={"max_cells": 2.5, "context": 2.0}))
    assert resolve_zoom(engine, "auto") == ZoomOptions(2.5, 2.0, 1.0)
    assert resolve_zoom(engine, 7) == resolve_zoom(engine, "7") == ZoomOptions(7.0, 2.0, 1.0)
    assert resolve_zoom(engine, "off") is None
    assert resolve_zoom(Engine(build_small_model()), "auto") is None
    assert resolve_zoom(Engine(build_small_model()), 3) == ZoomOptions(3.0)


def test_captioner_without_an_encoder_cannot_zoom():
    class TextCaptioner:
        pass

    assert resolve_zoom(TextCaptioner(), "auto") is None
    with pytest.raises(ValueError, match=r"TextCaptioner has no encoder and cannot zoom; omit zoom"):
        resolve_zoom(TextCaptioner(), 4)


@pytest.mark.parametrize("value", ["on", "", 0, -1, "nan", float("inf"), True, None, [4]])
def test_check_zoom_rejects_other_values(value):
    with pytest.raises(ValueError, match=r"zoom is .*; expected auto, off, or a number of grid cells above 0"):
        check_zoom(value)


@pytest.mark.parametrize("has_masks", [False, True])
def test_keep_best_caption_compares_the_caption_from_the_image(engine, mosaic, has_masks):
    encoded, zoom = engine.encode([mosaic]), replace(ZOOM, keep_best_caption=True)
    prompts = [Prompt(box=(x, y, x + 20.0, y + 16.0)) for x in (10.0, 130.0, 250.0) for y in (20.0, 180.0, 300.0)]
    prompts.append(Prompt(box=(0.0, 0.0, 384.0, 384.0)))
    if has_masks:
        mask = zoom_module.PredictedMask(encode_rle(make_mask(10, 20, 30, 36)), 0.5)
        arguments = (engine, encoded, [mask] * len(prompts), prompts)
        best, from_crops = caption_masks(*arguments, zoom=zoom), caption_masks(*arguments, zoom=ZOOM)
        from_image = engine.caption_masks(*arguments[1:])
    else:
        best = caption_regions(engine, encoded, [prompts], zoom=zoom)[0]
        from_crops = caption_regions(engine, encoded, [prompts], zoom=ZOOM)[0]
        from_image = engine.caption_batch(encoded, [prompts])[0]
    is_from_image = [image.score > crop.score for image, crop in zip(from_image, from_crops, strict=True)]
    assert any(is_from_image)
    assert not all(is_from_image)
    for is_image, caption, image, crop in zip(is_from_image, best, from_image, from_crops, strict=True):
        source = image if is_image else crop
        assert (caption.text, caption.score) == (source.text, pytest.approx(source.score))
        assert (caption.mask, caption.box, caption.prompt) == (crop.mask, crop.box, crop.prompt)
    assert [each.region_id for each in best] == list(range(len(prompts)))
