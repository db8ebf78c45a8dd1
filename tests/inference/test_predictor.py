"""Predictor: an image is encoded once for all prompts; everything mode captions only the regions that remain."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sca_registry.contracts import Prompt, Proposals
from sca_registry.spec import EverythingOptions

from sca.inference import region_search
from sca.inference.automatic import caption_everything
from sca.inference.engine import Engine
from sca.inference.predictor import Predictor
from sca.inference.region_search import find_everything, search_everything
from sca.io.masks import decode_rle, mask_to_box
from sca.proposers.grid import PointGrid

RESAMPLER_MIXER = {"name": "resampler", "num_queries": 2, "depth": 1, "num_heads": 2, "mlp_dim": 64}


@pytest.fixture
def build_counting_predictor(build_small_model, monkeypatch):
    """A predictor, and the batch sizes of the calls of each stage."""

    def build_predictor(regions=64, **fields):
        model = build_small_model(**fields)
        calls = {}

        def count_calls(module, name, count_rows):
            stage = getattr(module, name)

            def run_and_count(*arguments, **options):
                calls.setdefault(name, []).append(count_rows(*arguments))
                return stage(*arguments, **options)

            monkeypatch.setattr(module, name, run_and_count)

        count_calls(model, "encode", len)
        count_calls(model, "segment", lambda features, prompts, *_: len(prompts))
        count_calls(model, "predict_confident_masks", lambda features, prompts, _: len(prompts))
        count_calls(model, "prepare_mixer", len)
        count_calls(model, "mix", lambda regions, *_: len(regions))
        count_calls(model.language_model, "generate", lambda prefix, *_: len(prefix))
        return Predictor(model, regions), calls

    return build_predictor


def make_mixed_prompts(scene):
    """Prompts of every type in mixed order."""
    first_region, second_region, third_region, *_ = scene.regions
    (x1, y1, x2, y2), mask = third_region.box, decode_rle(first_region.mask)
    return [
        Prompt(box=first_region.box),
        Prompt(points=((x1 + 2, y1 + 2, 1),)),
        Prompt(box=second_region.box),
        Prompt(mask=mask),
        Prompt(box=third_region.box, points=(((x1 + x2) / 2, (y1 + y2) / 2, 1),)),
        Prompt(points=((x1 + 3, y1 + 3, 1), (1, 1, 0))),
        Prompt(points=((x2 - 2, y2 - 2, 1),)),
    ]


def are_captions_close(caption, expected):
    """Assert equal captions; floats may differ by the order of summation."""
    scores_close = caption.score == pytest.approx(expected.score, rel=1e-4)
    scores_close = scores_close and caption.predicted_iou == pytest.approx(expected.predicted_iou, abs=1e-4)
    mask_difference = (decode_rle(caption.mask) != decode_rle(expected.mask)).mean()
    same_prompt = (caption.prompt.box, caption.prompt.points) == (expected.prompt.box, expected.prompt.points)
    return scores_close and caption.text == expected.text and same_prompt and mask_difference < 0.01


def test_predictor_encodes_an_image_once_for_many_predictions(build_counting_predictor, scene):
    predictor, calls = build_counting_predictor()
    predictor.set_image(scene.image)
    for region in scene.regions:
        predictor.predict(boxes=[region.box])
    predictor.predict(points=[(10, 10), (20, 20)])
    assert calls["encode"] == [1]
    assert calls["generate"] == [1] * len(scene.regions) + [2]


def test_engine_caption_keeps_the_order_of_mixed_prompts(build_counting_predictor, scene):
    predictor, calls = build_counting_predictor()
    prompts = make_mixed_prompts(scene)
    captions = predictor.engine.caption(scene.image, prompts)
    assert [caption.region_id for caption in captions] == list(range(len(prompts)))
    assert all(caption.prompt is prompt for caption, prompt in zip(captions, prompts, strict=True))
    assert sorted(calls["segment"]) == [1, 1, 1, 2, 2]
    predictor.set_image(scene.image)
    for prompt, caption in zip(prompts, captions, strict=True):
        assert are_captions_close(predictor.predict([prompt])[0], caption)


def test_engine_caption_batch_matches_each_image_captioned_alone(build_counting_predictor, scene):
    predictor, calls = build_counting_predictor()
    images = [scene.image, scene.image.resize((96, 60)), scene.image]
    requests = [make_mixed_prompts(scene)[:3], [], make_mixed_prompts(scene)]
    batch_captions = predictor.engine.caption_batch(predictor.engine.encode(images), requests)
    assert calls["encode"] == [3]
    assert [len(captions) for captions in batch_captions] == [3, 0, 7]
    for image, request, captions in zip(images, requests, batch_captions, strict=True):
        for caption, expected in zip(captions, predictor.engine.caption(image, request), strict=True):
            assert are_captions_close(caption, expected)
            assert caption.region_id == expected.region_id


def test_predictor_regions_per_chunk_does_not_change_captions(build_counting_predictor, scene):
    boxes = [region.box for region in scene.regions]
    predictor, _ = build_counting_predictor()
    chunked_predictor, calls = build_counting_predictor(regions=3)
    predictor.set_image(scene.image)
    chunked_predictor.set_image(scene.image)
    expected, captions = predictor.predict(boxes=boxes), chunked_predictor.predict(boxes=boxes)
    assert [caption.text for caption in captions] == [caption.text for caption in expected]
    assert max(calls["segment"]) <= 3
    assert sum(calls["segment"]) == len(boxes)


def test_predictor_prepares_the_mixer_once_for_all_chunks(build_counting_predictor, scene):
    predictor, calls = build_counting_predictor(regions=1, mixer=RESAMPLER_MIXER)
    predictor.set_image(scene.image)
    captions = predictor.predict(boxes=[region.box for region in scene.regions])
    assert len(calls["mix"]) == len(scene.regions) > 1
    assert len(calls["prepare_mixer"]) == 1
    unchunked_captions = Engine(predictor.model).caption(scene.image, [caption.prompt for caption in captions])
    assert [caption.text for caption in unchunked_captions] == [caption.text for caption in captions]


def test_predictor_segment_returns_three_masks_or_one_per_prompt(build_counting_predictor, scene):
    predictor, calls = build_counting_predictor(regions=2)
    predictor.set_image(scene.image)
    prompts = make_mixed_prompts(scene)
    candidates, single_masks = predictor.segment(prompts), predictor.segment(prompts, multimask_output=False)
    assert [len(masks) for masks in candidates] == [3] * len(prompts)
    assert [len(masks) for masks in single_masks] == [1] * len(prompts)
    assert "generate" not in calls
    for masks, caption in zip(candidates, predictor.predict(prompts), strict=True):
        ious = [mask.predicted_iou for mask in masks]
        assert ious == sorted(ious, reverse=True)
        mask_difference = decode_rle(masks[0].rle) != decode_rle(caption.mask)
        assert mask_difference.mean() < 0.01  # logits close to zero fall either way
        assert ious[0] == pytest.approx(caption.predicted_iou)


def test_predictor_returns_alternative_captions_on_request(build_counting_predictor, scene):
    predictor, _ = build_counting_predictor()
    predictor.set_image(scene.image)
    boxes = [region.box for region in scene.regions]
    for caption in predictor.predict(boxes=boxes, num_beams=3, num_captions=3):
        ranked_captions = [(caption.text, caption.score), *caption.alternatives]
        assert len(ranked_captions) == 3
        assert all(0 <= score <= 1 for _, score in ranked_captions)
    single_captions = predictor.predict(boxes=boxes, num_beams=3)
    captions_of_two = predictor.predict(boxes=boxes, num_beams=3, num_captions=2)
    assert [caption.text for caption in captions_of_two] == [caption.text for caption in single_captions]
    assert all(not caption.alternatives for caption in single_captions)


def test_predictor_returns_boxes_and_masks_in_image_pixels(build_counting_predictor, scene):
    predictor, _ = build_counting_predictor()
    predictor.set_image(scene.image)
    box = scene.regions[0].box
    by_box, by_point = predictor.predict(boxes=[box], points=[(50, 50)])
    assert by_box.box == box
    assert by_box.mask["size"] == [scene.image.height, scene.image.width]
    assert 0 < by_box.score <= 1
    assert 0 <= by_box.predicted_iou <= 1
    assert by_point.box == mask_to_box(by_point.mask)
    assert by_point.prompt == Prompt(points=((50.0, 50.0, 1),))


def test_predictor_set_image_accepts_arrays_and_pil_images(build_counting_predictor, scene):
    predictor, _ = build_counting_predictor()
    predictor.set_image(scene.image)
    expected = predictor.predict(points=[(40, 40)])
    predictor.set_image(np.asarray(scene.image))
    assert predictor.predict(points=[(40, 40)]) == expected


def test_engine_without_masks_returns_captions_and_boxes(build_counting_predictor, scene):
    predictor, _ = build_counting_predictor(segmenter={"name": "box"})
    (caption,) = predictor.engine.caption(scene.image, [Prompt(box=scene.regions[0].box)])
    assert caption.mask is None
    assert caption.predicted_iou is None
    assert caption.box == scene.regions[0].box


def test_predictor_errors_suggest_a_fix(build_counting_predictor, scene):
    predictor, _ = build_counting_predictor()
    with pytest.raises(ValueError, match="set_image"):
        predictor.predict(points=[(1, 1)])
    with pytest.raises(ValueError, match="set_image"):
        caption_everything(predictor)
    predictor.set_image(scene.image)
    with pytest.raises(ValueError, match="Choose from: recognition, caption"):
        predictor.predict(points=[(1, 1)], task="poetry")
    predictor.model.language_model.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        predictor.predict(points=[(1, 1)])


def run_to_end(generator):
    """Exhaust a generator; return its return value."""
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            return stop.value


# --- everything -----------------------------------------------------------------------------------------------------

LENIENT_OPTIONS = EverythingOptions(
    points_per_side=6, pred_iou_thresh=-10.0, stability_score_thresh=0.0, box_nms_thresh=0.5
)
KEEP_ALL_OPTIONS = EverythingOptions(
    points_per_side=3, pred_iou_thresh=-10.0, stability_score_thresh=0.0, box_nms_thresh=1.0
)  # all three masks of nine points


def test_caption_everything_encodes_once_and_captions_only_kept_regions(build_counting_predictor, scene):
    predictor, calls = build_counting_predictor(regions=10)
    predictor.set_image(scene.image)
    progress_calls = []
    captions = caption_everything(
        predictor, options=LENIENT_OPTIONS, progress=lambda done, of: progress_calls.append((done, of))
    )
    assert calls["encode"] == [1]
    assert progress_calls == [(0, 36), (10, 36), (20, 36), (30, 36), (36, 36)]
    assert 0 < len(captions) < 36
    assert calls["generate"] == [len(captions)]
    assert sum(calls["mix"]) == len(captions)
    assert calls["predict_confident_masks"] == [10, 10, 10, 6]
    assert sum(calls["segment"]) == len(captions)


def test_caption_everything_computes_each_full_size_mask_once(build_counting_predictor, scene, monkeypatch):
    predictor, _ = build_counting_predictor()
    predictor.set_image(scene.image)
    processor, full_size_masks = predictor.engine.processor, []
    iter_masks = processor.iter_binary_masks
    monkeypatch.setattr(
        processor, "iter_binary_masks", lambda *args: (full_size_masks.extend(args[1]), iter_masks(*args))[1]
    )
    captions = caption_everything(
        predictor, options=KEEP_ALL_OPTIONS
    )  # no filter that looks at full size leaves anything out
    assert len(full_size_masks) == len(captions) > 9


def test_caption_everything_sorts_by_predicted_iou_and_keeps_masks_of_the_search(build_counting_predictor, scene):
    predictor, _ = build_counting_predictor()
    predictor.set_image(scene.image)
    captions = caption_everything(predictor, options=KEEP_ALL_OPTIONS)
    assert len(captions) > 9
    assert [caption.predicted_iou for caption in captions] == sorted(
        (caption.predicted_iou for caption in captions), reverse=True
    )
    for caption in captions:
        assert caption.box == caption.prompt.box == mask_to_box(caption.mask)
    predicted = predictor.predict([caption.prompt for caption in captions])
    assert [caption.text for caption in captions] == [caption.text for caption in predicted]


@pytest.mark.parametrize(
    "options", [{"pred_iou_thresh": 10.0}, {"stability_score_thresh": 1.1}, {"min_area": 1.1}, {"max_area": -1.0}]
)
def test_caption_everything_generates_nothing_if_a_filter_removes_all_masks(build_counting_predictor, scene, options):
    predictor, calls = build_counting_predictor()
    predictor.set_image(scene.image)
    assert caption_everything(predictor, options=EverythingOptions(**{**vars(LENIENT_OPTIONS), **options})) == []
    assert "generate" not in calls


def test_caption_everything_box_nms_keeps_the_better_of_overlapping_masks(build_counting_predictor, scene):
    predictor, _ = build_counting_predictor()
    predictor.set_image(scene.image)
    all_captions = caption_everything(predictor, options=KEEP_ALL_OPTIONS)
    suppressed_captions = caption_everything(
        predictor, options=EverythingOptions(**{**vars(KEEP_ALL_OPTIONS), "box_nms_thresh": 0.0})
    )
    assert len(suppressed_captions) < len(all_captions)
    assert suppressed_captions[0].box == all_captions[0].box


def test_caption_everything_mask_nms_suppresses_a_mask_with_a_stray_cell(build_counting_predictor):
    """The boxes of the masks overlap little."""
    predictor, _ = build_counting_predictor()
    predictor.set_image(Image.new("RGB", (64, 64)))
    segmenter = predictor.model.segmenter

    class Fixed(torch.nn.Module):
        channels = segmenter.channels

        def forward(self, features, prompts, multimask_output=True):
            regions = segmenter(features, prompts, multimask_output)
            masks = torch.full_like(regions.masks, -9.0)
            masks[:, :2, 4:16, 4:16] = masks[:, 1, 31, 31] = 9.0
            masks[:, 2, 20:28, 20:28] = 9.0
            return replace(regions, masks=masks, iou_scores=torch.tensor([[0.8, 0.9, 0.7]]).expand(len(prompts), -1))

    predictor.model.segmenter = Fixed()
    captions = caption_everything(predictor, options=replace(LENIENT_OPTIONS, mask_nms_thresh=0.5))
    assert [round(caption.predicted_iou, 1) for caption in captions] == [0.9, 0.7]
    box_nms_captions = caption_everything(predictor, options=LENIENT_OPTIONS)
    assert [round(caption.predicted_iou, 1) for caption in box_nms_captions] == [0.9, 0.8, 0.7]


@pytest.mark.parametrize(
    ("caption_from", "num_boxes", "num_points"), [("box", 1, 0), ("point", 0, 1), ("box-and-point", 1, 1)]
)
def test_caption_everything_captions_from_the_prompt_kind_of_caption_from(
    build_counting_predictor, scene, caption_from, num_boxes, num_points
):
    predictor, _ = build_counting_predictor()
    predictor.set_image(scene.image)
    captions = caption_everything(predictor, options=replace(LENIENT_OPTIONS, caption_from=caption_from))
    assert captions
    for caption in captions:
        assert ((caption.prompt.box is not None), len(caption.prompt.points)) == (num_boxes, num_points)
        assert caption.box == mask_to_box(caption.mask)
        for x, y, label in caption.prompt.points:
            assert 0 <= x < scene.image.width
            assert 0 <= y < scene.image.height
            assert label == 1


@pytest.mark.slow
def test_everything_search_of_crops_returns_masks_in_image_pixels(build_counting_predictor):
    """Segmenter stub: masks are the bright pixels, in crops too."""
    predictor, calls = build_counting_predictor()
    pixels = np.zeros((128, 192, 3), np.uint8)
    pixels[52:60, 100:116] = 255
    pixels[4:12, 6:14] = 255
    predictor.set_image(pixels)
    segmenter = predictor.model.segmenter
    encode = predictor.model.encode
    latest = {}

    def encode_and_store(batch):
        latest["bright"] = (batch[:, 0] > 1.5).float()  # (B, S, S)
        return encode(batch)

    class Bright(torch.nn.Module):
        channels = segmenter.channels

        def forward(self, features, prompts, multimask_output=True):
            regions = segmenter(features, prompts, multimask_output)
            bright = torch.nn.functional.adaptive_avg_pool2d(latest["bright"], regions.masks.shape[-2:]) * 18 - 9
            cells = (prompts.points[:, 0] * regions.masks.shape[-1] / regions.image_size).long()  # (N, 2) x y
            is_on_bright = bright[0, cells[:, 1], cells[:, 0]] > 0
            masks = torch.where(is_on_bright[:, None, None, None], bright[None], torch.full_like(regions.masks, -9.0))
            iou_scores = torch.full_like(regions.iou_scores, 0.9)
            return replace(regions, masks=masks.expand_as(regions.masks), iou_scores=iou_scores)

    predictor.model.encode = encode_and_store
    predictor.model.segmenter = Bright()
    predictor.set_image(pixels)
    del calls["encode"][:]
    options = EverythingOptions(
        points_per_side=24,
        pred_iou_thresh=0.0,
        stability_score_thresh=0.0,
        box_nms_thresh=0.5,
        crop_n_layers=1,
        crop_overlap_ratio=0.34,
        caption_from="box",
    )
    found_regions = run_to_end(region_search._search_windows(predictor.engine, predictor.encoded, options))
    assert calls["encode"] == [1] * 4
    crop_regions = [found_region for found_region in found_regions if found_region.window != (0, 0, 192, 128)]
    assert crop_regions, "a closer look stays in place of the one from afar"
    bright_mask = np.zeros((128, 192), bool)
    bright_mask[52:60, 100:116] = bright_mask[4:12, 6:14] = True
    for found_region in found_regions:
        assert (decode_rle(found_region.mask) & bright_mask).sum() > 0.7 * decode_rle(found_region.mask).sum()


@pytest.mark.parametrize("image_size", [(64, 64), (70, 70), (300, 9), (1, 1)])
@pytest.mark.slow
def test_caption_everything_with_crop_layers_accepts_small_and_narrow_images(build_counting_predictor, image_size):
    predictor, _ = build_counting_predictor()
    predictor.set_image(Image.new("RGB", image_size))
    caption_everything(predictor, options=replace(LENIENT_OPTIONS, points_per_side=2, crop_n_layers=4))


def test_caption_everything_uses_proposals_instead_of_the_grid(build_counting_predictor, scene):
    predictor, calls = build_counting_predictor()
    predictor.set_image(scene.image)
    box_prompts = [Prompt(box=region.box) for region in scene.regions]
    mask_prompt = Prompt(mask=decode_rle(scene.regions[0].mask))
    proposals = Proposals(
        (*box_prompts, mask_prompt), (1.0,) * (len(box_prompts) + 1), (None,) * (len(box_prompts) + 1)
    )
    captions = caption_everything(predictor, options=KEEP_ALL_OPTIONS, proposals=proposals)
    assert [caption.prompt for caption in captions] == [*box_prompts, mask_prompt]
    assert [caption.region_id for caption in captions] == list(range(len(box_prompts) + 1))
    assert sum(calls["segment"]) == len(box_prompts) + 1
    point_prompt = Prompt(points=((5.0, 5.0, 0), (40.0, 40.0, 1)))
    (caption,) = caption_everything(
        predictor, options=KEEP_ALL_OPTIONS, proposals=Proposals((point_prompt,), (1.0,), (None,))
    )
    assert caption.prompt is point_prompt
    grid_proposals = PointGrid(points_per_side=3)(scene.image, "scene")
    grid_captions = caption_everything(predictor, options=KEEP_ALL_OPTIONS, proposals=grid_proposals)
    assert [caption.box for caption in grid_captions] == [
        c.box for c in caption_everything(predictor, options=KEEP_ALL_OPTIONS)
    ]


@pytest.mark.parametrize(("max_regions", "kept_indices"), [(1, [2]), (2, [0, 2]), (3, [0, 2, 3]), (9, [0, 1, 2, 3])])
def test_caption_everything_max_regions_keeps_best_proposals_in_order(
    build_counting_predictor, scene, max_regions, kept_indices
):
    predictor, _ = build_counting_predictor()
    predictor.set_image(scene.image)
    box_prompts = tuple(Prompt(box=(0.0, 0.0, 10.0 + index, 10.0)) for index in range(4))
    proposals = Proposals(box_prompts, (0.5, 0.1, 0.9, 0.5), ("a", "b", None, "d"))
    captions = caption_everything(predictor, options=KEEP_ALL_OPTIONS, proposals=proposals, max_regions=max_regions)
    assert [caption.prompt for caption in captions] == [box_prompts[index] for index in kept_indices]
    assert [caption.name for caption in captions] == [proposals.names[index] for index in kept_indices]
    assert [caption.proposal_score for caption in captions] == [proposals.scores[index] for index in kept_indices]


def test_caption_everything_uses_the_everything_options_of_the_model(build_counting_predictor, scene):
    predictor, calls = build_counting_predictor(everything={"points_per_side": 3, "pred_iou_thresh": 10.0})
    predictor.set_image(scene.image)
    assert caption_everything(predictor) == []
    assert calls["predict_confident_masks"] == [9]


@pytest.mark.slow
def test_search_everything_gives_equal_results_if_images_are_interleaved(build_counting_predictor, scene):
    predictor, _ = build_counting_predictor(regions=10)
    images = [scene.image, scene.image.transpose(0)]
    expected = []
    for image in images:
        predictor.set_image(image)
        expected.append(find_everything(predictor.engine, predictor.encoded, replace(LENIENT_OPTIONS, crop_n_layers=1)))
    searches, results = {}, {}
    for index, image in enumerate(images):
        predictor.set_image(image)
        searches[index] = search_everything(
            predictor.engine, predictor.encoded, replace(LENIENT_OPTIONS, crop_n_layers=1)
        )
        next(searches[index])
    predictor.set_image(Image.new("RGB", (5, 5)))
    num_steps = 0
    while searches:
        for index in list(searches):
            try:
                next(searches[index])
                num_steps += 1
            except StopIteration as stop:
                results[index] = stop.value
                del searches[index]
    assert [results[index] for index in range(2)] == expected
    num_masks = sum(len(masks) for masks, _ in expected)
    assert num_steps >= 2 * 5 * 4 + num_masks, "a step is a chunk of points or one mask"


@pytest.mark.slow
def test_search_everything_raises_at_its_region_and_memory_limits(build_counting_predictor, scene):
    predictor, calls = build_counting_predictor(regions=10)
    predictor.set_image(scene.image)
    with pytest.raises(ValueError, match="more than 3 regions were found; raise pred_iou_thresh or stability"):
        run_to_end(search_everything(predictor.engine, predictor.encoded, KEEP_ALL_OPTIONS, max_found_regions=3))
    calls.clear()
    options = replace(KEEP_ALL_OPTIONS, points_per_side=32)
    with pytest.raises(ValueError, match="too many masks pass the filters"):
        run_to_end(search_everything(predictor.engine, predictor.encoded, options, max_bytes=2**20))
    assert sum(calls["predict_confident_masks"]) < 32 * 32


def test_caption_everything_without_masks_suggests_a_segmenter(build_counting_predictor):
    predictor, _ = build_counting_predictor(segmenter={"name": "box"})
    predictor.set_image(Image.new("RGB", (64, 64)))
    with pytest.raises(ValueError, match="segmenter=sam"):
        caption_everything(predictor)


def test_caption_everything_needs_only_the_segmenter_contract(build_counting_predictor, scene):
    """Only attributes of the contract are required of a segmenter."""
    predictor, _ = build_counting_predictor()
    predictor.set_image(scene.image)
    segmenter = predictor.model.segmenter

    class Plain(torch.nn.Module):
        channels = segmenter.channels

        def forward(self, *arguments):
            return segmenter(*arguments)

    expected = caption_everything(predictor, options=LENIENT_OPTIONS)
    predictor.model.segmenter = Plain()
    assert caption_everything(predictor, options=LENIENT_OPTIONS) == expected
