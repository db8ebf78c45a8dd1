"""An image is encoded once, however often it is pointed at; everything mode writes captions for what is left only."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sca_registry.contracts import Prompt, Proposals
from sca_registry.spec import EverythingOptions

from sca.inference import automatic
from sca.inference.automatic import caption_everything, find_everything, search_everything
from sca.inference.engine import Engine
from sca.inference.predictor import Predictor
from sca.io.masks import decode_rle, mask_to_box
from sca.proposers.grid import PointGrid

RESAMPLER = {"name": "resampler", "num_queries": 2, "depth": 1, "num_heads": 2, "mlp_dim": 64}


@pytest.fixture
def counted(small, monkeypatch):
    """A predictor, and how often each stage was called, with how many rows."""

    def make(regions=64, **fields):
        model = small(**fields)
        calls = {}

        def watch(owner, name, rows):
            stage = getattr(owner, name)

            def called(*arguments, **options):
                calls.setdefault(name, []).append(rows(*arguments))
                return stage(*arguments, **options)

            monkeypatch.setattr(owner, name, called)

        watch(model, "encode", len)
        watch(model, "segment", lambda features, prompts, *_: len(prompts))
        watch(model, "prepare_mixer", len)
        watch(model, "mix", lambda regions, *_: len(regions))
        watch(model.language_model, "generate", lambda prefix, *_: len(prefix))
        return Predictor(model, regions), calls

    return make


def mixed(scene):
    """Prompts of every kind, in no order."""
    first, second, third, *_ = scene.regions
    (x1, y1, x2, y2), mask = third.box, decode_rle(first.mask)
    return [
        Prompt(box=first.box),
        Prompt(points=((x1 + 2, y1 + 2, 1),)),
        Prompt(box=second.box),
        Prompt(mask=mask),
        Prompt(box=third.box, points=(((x1 + x2) / 2, (y1 + y2) / 2, 1),)),
        Prompt(points=((x1 + 3, y1 + 3, 1), (1, 1, 0))),
        Prompt(points=((x2 - 2, y2 - 2, 1),)),
    ]


def alike(one, other):
    """The same answer, but for the last bits of numbers that were added in another order."""
    close = one.score == pytest.approx(other.score, rel=1e-4)
    close = close and one.predicted_iou == pytest.approx(other.predicted_iou, abs=1e-4)
    differs = (decode_rle(one.mask) != decode_rle(other.mask)).mean()
    asked = (one.prompt.box, one.prompt.points) == (other.prompt.box, other.prompt.points)
    return close and one.text == other.text and asked and differs < 0.01


def test_an_image_is_encoded_once_and_asked_as_often_as_wanted(counted, scene):
    predictor, calls = counted()
    predictor.set_image(scene.image)
    for region in scene.regions:
        predictor.predict(boxes=[region.box])
    predictor.predict(points=[(10, 10), (20, 20)])
    assert calls["encode"] == [1]
    assert calls["generate"] == [1] * len(scene.regions) + [2]


def test_mixed_requests_come_back_in_order(counted, scene):
    predictor, calls = counted()
    prompts = mixed(scene)
    together = predictor.engine.caption(scene.image, prompts)
    assert [caption.region_id for caption in together] == list(range(len(prompts)))
    assert all(caption.prompt is prompt for caption, prompt in zip(together, prompts, strict=True))
    assert sorted(calls["segment"]) == [1, 1, 1, 2, 2]
    predictor.set_image(scene.image)
    for prompt, caption in zip(prompts, together, strict=True):
        assert alike(predictor.predict([prompt])[0], caption)


def test_several_images_answer_as_each_alone(counted, scene):
    predictor, calls = counted()
    images = [scene.image, scene.image.resize((96, 60)), scene.image]
    requests = [mixed(scene)[:3], [], mixed(scene)]
    together = predictor.engine.caption_batch(predictor.engine.encode(images), requests)
    assert calls["encode"] == [3]
    assert [len(captions) for captions in together] == [3, 0, 7]
    for image, request, captions in zip(images, requests, together, strict=True):
        for caption, alone in zip(captions, predictor.engine.caption(image, request), strict=True):
            assert alike(caption, alone)
            assert caption.region_id == alone.region_id


def test_how_many_regions_go_at_a_time_changes_memory_and_not_answers(counted, scene):
    boxes = [region.box for region in scene.regions]
    many, _ = counted()
    few, calls = counted(regions=3)
    many.set_image(scene.image)
    few.set_image(scene.image)
    expected, found = many.predict(boxes=boxes), few.predict(boxes=boxes)
    assert [caption.text for caption in found] == [caption.text for caption in expected]
    assert max(calls["segment"]) <= 3
    assert sum(calls["segment"]) == len(boxes)


def test_what_regions_share_is_computed_once_for_all_chunks(counted, scene):
    predictor, calls = counted(regions=1, mixer=RESAMPLER)
    predictor.set_image(scene.image)
    found = predictor.predict(boxes=[region.box for region in scene.regions])
    assert len(calls["mix"]) == len(scene.regions) > 1
    assert len(calls["prepare_mixer"]) == 1
    together = Engine(predictor.model).caption(scene.image, [caption.prompt for caption in found])
    assert [caption.text for caption in together] == [caption.text for caption in found]


def test_all_candidates_for_a_mask_can_be_had_or_the_single_one(counted, scene):
    predictor, calls = counted(regions=2)
    predictor.set_image(scene.image)
    prompts = mixed(scene)
    three, one = predictor.segment(prompts), predictor.segment(prompts, multimask_output=False)
    assert [len(masks) for masks in three] == [3] * len(prompts)
    assert [len(masks) for masks in one] == [1] * len(prompts)
    assert "generate" not in calls
    for masks, caption in zip(three, predictor.predict(prompts), strict=True):
        ious = [mask.predicted_iou for mask in masks]
        assert ious == sorted(ious, reverse=True)
        differs = decode_rle(masks[0].rle) != decode_rle(caption.mask)
        assert differs.mean() < 0.01  # logits close to zero fall either way
        assert ious[0] == pytest.approx(caption.predicted_iou)


def test_several_captions_a_region_come_best_first(counted, scene):
    predictor, _ = counted()
    predictor.set_image(scene.image)
    boxes = [region.box for region in scene.regions]
    for caption in predictor.predict(boxes=boxes, num_beams=3, num_captions=3):
        told = [(caption.text, caption.score), *caption.alternatives]
        assert len(told) == 3
        assert all(0 <= score <= 1 for _, score in told)
    best = predictor.predict(boxes=boxes, num_beams=3)
    again = predictor.predict(boxes=boxes, num_beams=3, num_captions=2)
    assert [caption.text for caption in again] == [caption.text for caption in best]
    assert all(not caption.alternatives for caption in best)


def test_an_answer_is_in_the_images_own_pixels(counted, scene):
    predictor, _ = counted()
    predictor.set_image(scene.image)
    box = scene.regions[0].box
    by_box, by_point = predictor.predict(boxes=[box], points=[(50, 50)])
    assert by_box.box == box
    assert by_box.mask["size"] == [scene.image.height, scene.image.width]
    assert 0 < by_box.score <= 1
    assert 0 <= by_box.predicted_iou <= 1
    assert by_point.box == mask_to_box(by_point.mask)
    assert by_point.prompt == Prompt(points=((50.0, 50.0, 1),))


def test_an_array_is_taken_as_well_as_a_picture(counted, scene):
    predictor, _ = counted()
    predictor.set_image(scene.image)
    expected = predictor.predict(points=[(40, 40)])
    predictor.set_image(np.asarray(scene.image))
    assert predictor.predict(points=[(40, 40)]) == expected


def test_without_masks_there_are_captions_and_boxes(counted, scene):
    predictor, _ = counted(segmenter={"name": "box"})
    (caption,) = predictor.engine.caption(scene.image, [Prompt(box=scene.regions[0].box)])
    assert caption.mask is None
    assert caption.predicted_iou is None
    assert caption.box == scene.regions[0].box


def test_mistakes_say_what_to_do(counted, scene):
    predictor, _ = counted()
    with pytest.raises(ValueError, match="set_image"):
        predictor.predict(points=[(1, 1)])
    with pytest.raises(ValueError, match="set_image"):
        caption_everything(predictor)
    predictor.set_image(scene.image)
    with pytest.raises(ValueError, match="choose from 'recognition', 'caption'"):
        predictor.predict(points=[(1, 1)], task="poetry")
    predictor.model.language_model.tokenizer = None
    predictor.model.language_model.model.generation_config.eos_token_id = 0
    with pytest.raises(ValueError, match="no tokenizer"):
        predictor.predict(points=[(1, 1)])


def finished(search):
    """What a generator returns."""
    while True:
        try:
            next(search)
        except StopIteration as end:
            return end.value


# --- everything -----------------------------------------------------------------------------------------------------

ANY = EverythingOptions(points_per_side=6, pred_iou_thresh=-10.0, stability_score_thresh=0.0, box_nms_thresh=0.5)
ALL = EverythingOptions(
    points_per_side=3, pred_iou_thresh=-10.0, stability_score_thresh=0.0, box_nms_thresh=1.0
)  # all three masks of nine points


def test_everything_encodes_once_and_writes_captions_for_the_survivors_only(counted, scene):
    predictor, calls = counted(regions=10)
    predictor.set_image(scene.image)
    seen = []
    captions = caption_everything(predictor, options=ANY, progress=lambda done, of: seen.append((done, of)))
    assert calls["encode"] == [1]
    assert seen == [(0, 36), (10, 36), (20, 36), (30, 36), (36, 36)]
    assert 0 < len(captions) < 36
    assert calls["generate"] == [len(captions)]
    assert sum(calls["mix"]) == len(captions)
    assert sum(calls["segment"]) == 36 + len(captions)


def test_a_full_size_mask_is_made_once_for_what_is_looked_at_in_full_size(counted, scene, monkeypatch):
    predictor, _ = counted()
    predictor.set_image(scene.image)
    processor, made = predictor.engine.processor, []
    iter_masks = processor.iter_binary_masks
    monkeypatch.setattr(processor, "iter_binary_masks", lambda *args: (made.extend(args[1]), iter_masks(*args))[1])
    captions = caption_everything(predictor, options=ALL)  # no filter that looks at full size leaves anything out
    assert len(made) == len(captions) > 9


def test_what_everything_finds_is_told_with_the_mask_it_was_found_by_best_first(counted, scene):
    predictor, _ = counted()
    predictor.set_image(scene.image)
    captions = caption_everything(predictor, options=ALL)
    assert len(captions) > 9
    assert [caption.predicted_iou for caption in captions] == sorted(
        (caption.predicted_iou for caption in captions), reverse=True
    )
    for caption in captions:
        assert caption.box == caption.prompt.box == mask_to_box(caption.mask)
    asked = predictor.predict([caption.prompt for caption in captions])
    assert [caption.text for caption in captions] == [caption.text for caption in asked]


@pytest.mark.parametrize(
    "options", [{"pred_iou_thresh": 10.0}, {"stability_score_thresh": 1.1}, {"min_area": 1.1}, {"max_area": -1.0}]
)
def test_each_filter_can_leave_nothing_and_then_nothing_is_written(counted, scene, options):
    predictor, calls = counted()
    predictor.set_image(scene.image)
    assert caption_everything(predictor, options=EverythingOptions(**{**vars(ANY), **options})) == []
    assert "generate" not in calls


def test_of_two_masks_that_overlap_too_much_the_better_stays(counted, scene):
    predictor, _ = counted()
    predictor.set_image(scene.image)
    loose = caption_everything(predictor, options=ALL)
    strict = caption_everything(predictor, options=EverythingOptions(**{**vars(ALL), "box_nms_thresh": 0.0}))
    assert len(strict) < len(loose)
    assert strict[0].box == loose[0].box


def test_mask_nms_suppresses_a_region_whose_box_is_large_for_a_stray_cell(counted):
    """The second mask's box overlaps little with the first's."""
    predictor, _ = counted()
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
    found = caption_everything(predictor, options=replace(ANY, mask_nms_thresh=0.5))
    assert [round(caption.predicted_iou, 1) for caption in found] == [0.9, 0.7]
    as_in_sam = caption_everything(predictor, options=ANY)
    assert [round(caption.predicted_iou, 1) for caption in as_in_sam] == [0.9, 0.8, 0.7]


@pytest.mark.parametrize(("kind", "box", "points"), [("box", 1, 0), ("point", 0, 1), ("box-and-point", 1, 1)])
def test_what_is_found_is_captioned_from_what_one_wants(counted, scene, kind, box, points):
    predictor, _ = counted()
    predictor.set_image(scene.image)
    found = caption_everything(predictor, options=replace(ANY, caption_from=kind))
    assert found
    for caption in found:
        assert ((caption.prompt.box is not None), len(caption.prompt.points)) == (box, points)
        assert caption.box == mask_to_box(caption.mask)
        for x, y, label in caption.prompt.points:
            assert 0 <= x < scene.image.width
            assert 0 <= y < scene.image.height
            assert label == 1


@pytest.mark.slow
def test_crops_are_looked_at_too_and_speak_in_the_images_own_pixels(counted):
    """A stand-in for masks: what is bright. In a crop it is the same thing at another place of the frame."""
    predictor, calls = counted()
    pixels = np.zeros((128, 192, 3), np.uint8)
    pixels[52:60, 100:116] = 255
    pixels[4:12, 6:14] = 255
    predictor.set_image(pixels)
    segmenter = predictor.model.segmenter
    encode = predictor.model.encode
    seen = {}

    def remember(batch):
        seen["bright"] = (batch[:, 0] > 1.5).float()  # (B, S, S)
        return encode(batch)

    class Bright(torch.nn.Module):
        channels = segmenter.channels

        def forward(self, features, prompts, multimask_output=True):
            regions = segmenter(features, prompts, multimask_output)
            bright = torch.nn.functional.adaptive_avg_pool2d(seen["bright"], regions.masks.shape[-2:]) * 18 - 9
            at = (prompts.points[:, 0] * regions.masks.shape[-1] / regions.image_size).long()  # (N, 2) x y
            hit = bright[0, at[:, 1], at[:, 0]] > 0
            masks = torch.where(hit[:, None, None, None], bright[None], torch.full_like(regions.masks, -9.0))
            iou_scores = torch.full_like(regions.iou_scores, 0.9)
            return replace(regions, masks=masks.expand_as(regions.masks), iou_scores=iou_scores)

    predictor.model.encode = remember
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
    search = finished(automatic._search_windows(predictor.engine, predictor.encoded, options))
    assert calls["encode"] == [1] * 4
    small = [each for each in search if each.window != (0, 0, 192, 128)]
    assert small, "a closer look stays in place of the one from afar"
    truth = np.zeros((128, 192), bool)
    truth[52:60, 100:116] = truth[4:12, 6:14] = True
    for each in search:
        assert (decode_rle(each.mask) & truth).sum() > 0.7 * decode_rle(each.mask).sum()


@pytest.mark.parametrize("size", [(64, 64), (70, 70), (300, 9), (1, 1)])
@pytest.mark.slow
def test_crops_of_small_and_narrow_images_are_pictures(counted, size):
    predictor, _ = counted()
    predictor.set_image(Image.new("RGB", size))
    caption_everything(predictor, options=replace(ANY, points_per_side=2, crop_n_layers=4))


def test_proposals_take_the_place_of_the_grid(counted, scene):
    predictor, calls = counted()
    predictor.set_image(scene.image)
    boxes = [Prompt(box=region.box) for region in scene.regions]
    mask = Prompt(mask=decode_rle(scene.regions[0].mask))
    given = Proposals((*boxes, mask), (1.0,) * (len(boxes) + 1), (None,) * (len(boxes) + 1))
    captions = caption_everything(predictor, options=ALL, proposals=given)
    assert [caption.prompt for caption in captions] == [*boxes, mask]
    assert [caption.region_id for caption in captions] == list(range(len(boxes) + 1))
    assert sum(calls["segment"]) == len(boxes) + 1
    several = Prompt(points=((5.0, 5.0, 0), (40.0, 40.0, 1)))
    (caption,) = caption_everything(predictor, options=ALL, proposals=Proposals((several,), (1.0,), (None,)))
    assert caption.prompt is several
    points = PointGrid(points_per_side=3)(scene.image, "scene")
    by_points = caption_everything(predictor, options=ALL, proposals=points)
    assert [caption.box for caption in by_points] == [c.box for c in caption_everything(predictor, options=ALL)]


@pytest.mark.parametrize(("count", "kept"), [(1, [2]), (2, [0, 2]), (3, [0, 2, 3]), (9, [0, 1, 2, 3])])
def test_max_regions_keeps_the_proposals_with_the_best_scores_in_their_order(counted, scene, count, kept):
    predictor, _ = counted()
    predictor.set_image(scene.image)
    boxes = tuple(Prompt(box=(0.0, 0.0, 10.0 + place, 10.0)) for place in range(4))
    proposals = Proposals(boxes, (0.5, 0.1, 0.9, 0.5), (None,) * 4)
    captions = caption_everything(predictor, options=ALL, proposals=proposals, max_regions=count)
    assert [caption.prompt for caption in captions] == [boxes[place] for place in kept]


def test_a_model_says_itself_how_it_looks_for_everything(counted, scene):
    predictor, calls = counted(everything={"points_per_side": 3, "pred_iou_thresh": 10.0})
    predictor.set_image(scene.image)
    assert caption_everything(predictor) == []
    assert calls["segment"] == [9]


@pytest.mark.slow
def test_search_everything_interleaves_images(counted, scene):
    predictor, _ = counted(regions=10)
    images = [scene.image, scene.image.transpose(0)]
    alone = []
    for image in images:
        predictor.set_image(image)
        alone.append(find_everything(predictor.engine, predictor.encoded, replace(ANY, crop_n_layers=1)))
    running, together = {}, {}
    for number, image in enumerate(images):
        predictor.set_image(image)
        running[number] = search_everything(predictor.engine, predictor.encoded, replace(ANY, crop_n_layers=1))
        next(running[number])
    predictor.set_image(Image.new("RGB", (5, 5)))
    steps = 0
    while running:
        for number in list(running):
            try:
                next(running[number])
                steps += 1
            except StopIteration as end:
                together[number] = end.value
                del running[number]
    assert [together[number] for number in range(2)] == alone
    found = sum(len(masks) for masks, _ in alone)
    assert steps >= 2 * 5 * 4 + found, "a step is a chunk of points or one mask"


@pytest.mark.slow
def test_search_everything_stops_at_its_limits(counted, scene):
    predictor, calls = counted(regions=10)
    predictor.set_image(scene.image)
    with pytest.raises(ValueError, match="more than 3 regions were found; raise pred_iou_thresh or stability"):
        finished(search_everything(predictor.engine, predictor.encoded, ALL, max_found_regions=3))
    del calls["segment"][:]
    options = replace(ALL, points_per_side=32)
    with pytest.raises(ValueError, match="too many masks pass the filters"):
        finished(search_everything(predictor.engine, predictor.encoded, options, max_bytes=2**20))
    assert sum(calls["segment"]) < 32 * 32


def test_everything_without_masks_is_refused_with_the_way_out(counted):
    predictor, _ = counted(segmenter={"name": "box"})
    predictor.set_image(Image.new("RGB", (64, 64)))
    with pytest.raises(ValueError, match="segmenter=sam"):
        caption_everything(predictor)


def test_everything_needs_masks_and_not_a_segmenter_of_a_certain_make(counted, scene):
    """Only what the contract lists is asked of a segmenter."""
    predictor, _ = counted()
    predictor.set_image(scene.image)
    segmenter = predictor.model.segmenter

    class Plain(torch.nn.Module):
        channels = segmenter.channels

        def forward(self, *asked):
            return segmenter(*asked)

    expected = caption_everything(predictor, options=ANY)
    predictor.model.segmenter = Plain()
    assert caption_everything(predictor, options=ANY) == expected
