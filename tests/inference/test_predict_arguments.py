"""Arguments of `predict`, `predict_batch` and `caption_everything`: used, or rejected before any computation."""

import inspect
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sca_registry.contracts import Prompt
from sca_registry.spec import EverythingOptions

import sca
from sca.inference.generation_options import GENERATION_OPTIONS
from sca.io.errors import InputError
from sca.io.masks import encode_rle
from sca.language_models.token_usage import count_tokens

BOX = (4, 4, 40, 40)


@pytest.fixture(scope="module")
def model():
    return sca.load("sca-tiny")


@pytest.fixture
def predictor(model, scene):
    predictor = sca.Predictor(model)
    predictor.set_image(scene.image)
    return predictor


@pytest.fixture
def idle_predictor(predictor, monkeypatch):
    """A predictor that fails on any computation."""
    monkeypatch.setattr(predictor.engine, "caption_batch", lambda *_, **__: pytest.fail("computed"))
    return predictor


def test_predict_accepts_masks_as_arrays_and_rles_after_boxes_and_points(predictor, scene):
    mask = np.zeros((scene.image.height, scene.image.width), bool)
    mask[10:40, 20:60] = True
    captions = predictor.predict(masks=[mask, encode_rle(mask)], boxes=np.array([BOX]), points=[(9, 9)])
    assert [caption.region_id for caption in captions] == [0, 1, 2, 3]
    assert captions[0].prompt.box == BOX
    assert captions[1].prompt.points == ((9, 9, 1),)
    assert captions[2].text == captions[3].text
    assert (captions[2].prompt.mask == mask).all()
    assert len(predictor.segment(masks=[mask])[0]) == 3


def test_caption_array_returns_the_mask_as_a_boolean_array(predictor, scene):
    (caption,) = predictor.predict(boxes=[BOX])
    assert caption.array.shape == (scene.image.height, scene.image.width)
    assert caption.array.dtype == bool
    assert encode_rle(caption.array) == caption.mask


def test_predicted_mask_array_returns_the_mask_as_a_boolean_array(predictor, scene):
    for mask in predictor.segment(boxes=[BOX])[0]:
        assert mask.array.shape == (scene.image.height, scene.image.width)
        assert mask.array.dtype == bool
        assert encode_rle(mask.array) == mask.rle


def test_predict_points_to_the_method_or_prompt_for_arguments_of_sam(idle_predictor):
    with pytest.raises(TypeError, match=r"predict\(\) has no argument 'multimask_output'\. .* segment\(\)"):
        idle_predictor.predict(boxes=[BOX], multimask_output=True)
    with pytest.raises(TypeError, match=r"segment\(\) has no argument 'point_labels'\. .* sca\.Prompt\(points="):
        idle_predictor.segment(points=[(1, 2)], point_labels=[1])


SAM_ARGUMENTS = {"point_coords": [[9, 9]], "point_labels": [1], "multimask_output": True}
LABELED_POINTS_HINT = "Give the points of one region with labels: sca.Prompt(points=((x, y, label), ...))."


def test_predict_reports_all_unknown_arguments_in_one_error(idle_predictor):
    with pytest.raises(TypeError) as caught:
        idle_predictor.predict(**SAM_ARGUMENTS, bboxes=[BOX], angle=3)
    assert str(caught.value) == (
        "predict() has no arguments 'angle', 'bboxes', 'multimask_output', 'point_coords' and 'point_labels'."
        " For 'bboxes': Did you mean 'boxes'?"
        " For 'multimask_output': Masks without captions come from segment(), which has this argument."
        f" For 'point_coords' and 'point_labels': {LABELED_POINTS_HINT}"
    )
    with pytest.raises(TypeError) as caught:
        idle_predictor.segment(**SAM_ARGUMENTS)
    assert str(caught.value) == (
        f"segment() has no arguments 'point_coords' and 'point_labels'. For 'point_coords' and 'point_labels': "
        f"{LABELED_POINTS_HINT}"
    )
    with pytest.raises(TypeError, match=r"has no arguments 'points_per_batch' and 'xs'\. For 'points_per_batch': The"):
        sca.caption_everything(idle_predictor, points_per_batch=64, xs=1)


@pytest.mark.parametrize(
    ("keyword", "closest_name"),
    [
        ("bboxes", "boxes"),
        ("box", "boxes"),
        ("mask", "masks"),
        ("beams", "num_beams"),
        ("num_return_sequences", "num_captions"),
        ("max_tokens", "max_new_tokens"),
    ],
)
def test_predict_unknown_keyword_raises_type_error_with_the_closest_name(idle_predictor, keyword, closest_name):
    for predict in (idle_predictor.predict, lambda **arguments: idle_predictor.predict_batch([], [], **arguments)):
        with pytest.raises(TypeError, match=rf"has no argument '{keyword}'"):
            predict(**{keyword: [BOX]})
    with pytest.raises(TypeError, match=rf"predict\(\) has no argument '{keyword}'. Did you mean '{closest_name}'\?"):
        idle_predictor.predict(**{keyword: [BOX]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": "3"}, "num_beams is '3'"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"num_captions": True}, "num_captions is True"),
        ({"do_sample": "yes"}, "do_sample is 'yes'"),
        ({"do_sample": True, "temperature": 0}, "temperature is 0"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature is nan"),
        ({"do_sample": True, "top_p": 1.5}, "top_p is 1.5"),
        ({"do_sample": True, "seed": "a"}, "seed is 'a'"),
        ({"temperature": 0.5}, "temperature has no effect without sampling"),
        ({"top_p": 0.5, "do_sample": False}, "top_p has no effect without sampling"),
        ({"task": "describe"}, "unknown task 'describe'"),
    ],
)
def test_predict_rejects_invalid_generation_options(predictor, options, message, monkeypatch):
    monkeypatch.setattr(predictor.engine, "_iter_embedded_regions", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(ValueError, match=message):
        predictor.predict(boxes=[BOX], **options)


def test_predict_rejects_empty_requests(idle_predictor):
    with pytest.raises(InputError, match="no regions; pass prompts, boxes, points or masks"):
        idle_predictor.predict()
    with pytest.raises(InputError, match="no region"):
        idle_predictor.predict(boxes=np.zeros((0, 4)))
    with pytest.raises(InputError, match="no region"):
        idle_predictor.predict_batch([Image.new("RGB", (9, 9))], [[]])


def test_predict_names_an_invalid_prompt_by_index(idle_predictor):
    with pytest.raises(InputError, match=r"prompt 1: tuple is not a prompt; pass sca.Prompt"):
        idle_predictor.predict([Prompt(box=BOX), BOX])
    with pytest.raises(InputError, match=r"prompt 0: the mask is 5 x 5"):
        idle_predictor.predict(masks=[np.ones((5, 5), bool)])
    with pytest.raises(InputError, match=r"prompt 1: invalid mask: the runs in 'counts'"):
        idle_predictor.predict(boxes=[BOX], masks=[{"size": [9, 9], "counts": "0"}])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": Prompt(box=BOX)}, "prompts is of type Prompt; expected a list of prompts"),
        (
            {"boxes": [1, 2, 30, 40]},
            r"boxes is a list of numbers; expected a list of boxes: boxes=\[\[1, 2, 30, 40\]\]",
        ),
        ({"points": np.array([5, 6])}, r"points=\[\[5, 6\]\]"),
        ({"masks": {"size": [9, 9], "counts": "0"}}, "masks is of type dict; expected a list of masks"),
        ({"boxes": None, "points": None}, "no region"),
    ],
)
def test_predict_rejects_a_single_region_instead_of_a_list(idle_predictor, arguments, message):
    with pytest.raises(InputError, match=message):
        idle_predictor.predict(**arguments)
    with pytest.raises(InputError, match=message):
        idle_predictor.segment(**arguments)


def test_predict_accepts_none_for_no_regions(predictor):
    assert len(predictor.predict(boxes=None, points=[(9, 9)])) == 1


def test_predict_num_captions_uses_as_many_beams_or_samples(predictor, monkeypatch):
    (caption,) = predictor.predict(boxes=[BOX], num_captions=3)
    assert len(caption.alternatives) == 2
    monkeypatch.setattr(type(predictor.engine), "generation", {"max_new_tokens": 5, "num_beams": 2})
    (caption,) = predictor.predict(boxes=[BOX], num_captions=3, do_sample=True, temperature=2.0, seed=1)
    assert len(caption.alternatives) == 2
    for do_sample in (None, True):
        with pytest.raises(ValueError, match="num_captions=3 requires num_beams of at least 3, not 2"):
            predictor.predict(boxes=[BOX], num_captions=3, num_beams=2, do_sample=do_sample)


def test_predict_uses_the_seed_of_the_spec(model, scene):
    spec = replace(model.spec, generation={"do_sample": True, "temperature": 3.0, "seed": 3})
    predictor = sca.Predictor(model)
    predictor.set_image(scene.image)
    expected = predictor.predict(boxes=[BOX], do_sample=True, temperature=3.0, seed=3)
    original_spec, model.spec = model.spec, spec
    try:
        assert predictor.predict(boxes=[BOX])[0].text == expected[0].text
    finally:
        model.spec = original_spec


def test_count_tokens_stops_at_the_first_eos_and_counts_ids_equal_to_padding():
    assert count_tokens(3, [[5, 0, 7, 2], [5, 0, 7, 9], [2, 0, 0, 0]], [2]) == (3, (4, 4, 1), (False, True, False))


def test_predict_batch_matches_predict_and_keeps_the_current_image(predictor, scene):
    rotated_image = np.asarray(scene.image.rotate(90))
    prompts = [[Prompt(box=BOX), Prompt(points=((9, 9, 1),))], [], [Prompt(box=BOX)]]
    current_image = predictor.image
    batch_captions = predictor.predict_batch([scene.image, scene.image, rotated_image], prompts, max_new_tokens=5)
    assert predictor.image is current_image
    assert [len(captions) for captions in batch_captions] == [2, 0, 1]
    for image, request, captions in zip(
        [scene.image, scene.image, rotated_image], prompts, batch_captions, strict=True
    ):
        if request:
            predictor.set_image(image)
            expected = predictor.predict(request, max_new_tokens=5)
            assert [each.text for each in captions] == [each.text for each in expected]
            assert [each.region_id for each in captions] == [each.region_id for each in expected]


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (2, [[Prompt(box=BOX)]], "2 images, but 1 list of prompts"),
        (1, [[BOX]], "image 0: prompt 0: tuple is not a prompt"),
        (2, [[Prompt(box=BOX)], [Prompt(box=(5000, 0, 5010, 9))]], "image 1: prompt 0: the box"),
        (None, [[Prompt(box=BOX)]], "images and prompts must be lists"),
        ("text", [[Prompt(box=BOX)]], "image 0: str is not an image"),
    ],
)
def test_predict_batch_checks_lengths_ranges_and_types(idle_predictor, scene, images, prompts, message):
    image_list = {None: scene.image, "text": ["a.png"]}.get(images) or [scene.image] * images
    with pytest.raises(ValueError, match=message):
        idle_predictor.predict_batch(image_list, prompts)


def test_predict_batch_checks_its_task_before_encoding(idle_predictor, scene, monkeypatch):
    monkeypatch.setattr(idle_predictor.engine, "encode", lambda *_: pytest.fail("encoded"))
    with pytest.raises(ValueError, match="unknown task 'describe'"):
        idle_predictor.predict_batch([scene.image], [[Prompt(box=BOX)]], task="describe")


def test_caption_everything_options_override_those_of_the_model(predictor):
    captions = sca.caption_everything(predictor, points_per_side=2, max_new_tokens=3)
    options = EverythingOptions(**{**vars(predictor.engine.everything), "points_per_side": 2})
    assert captions == sca.caption_everything(predictor, options=options, max_new_tokens=3)
    message = r"caption_everything\(\) has no argument 'point_per_side'. Did you mean 'points_per_side'\?"
    with pytest.raises(TypeError, match=message):
        sca.caption_everything(predictor, point_per_side=2)
    with pytest.raises(TypeError, match=r"no argument 'min_mask_region_area'. Did you mean 'min_area'\?"):
        sca.caption_everything(predictor, min_mask_region_area=0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points_per_side": "many"}, r"everything\.points_per_side is 'many'"),
        ({"task": "name"}, "unknown task 'name'"),
        ({"max_regions": 2.5}, r"max_regions is 2\.5; expected an integer"),
        ({"max_regions": "3"}, "max_regions is '3'"),
        ({"options": {"points_per_side": 4}}, "options is of type dict"),
        ({"num_beams": 0}, "num_beams is 0"),
    ],
)
def test_caption_everything_checks_arguments_before_searching(idle_predictor, arguments, message, monkeypatch):
    monkeypatch.setattr(idle_predictor.model, "segment", lambda *_: pytest.fail("searched"))
    with pytest.raises(ValueError, match=message):
        sca.caption_everything(idle_predictor, **arguments)


def test_caption_everything_points_to_the_batch_size_of_the_predictor(idle_predictor):
    with pytest.raises(TypeError, match=r"'points_per_batch'\. The batch size .* region_batch_size=64\)"):
        sca.caption_everything(idle_predictor, points_per_batch=64)


def test_caption_everything_requires_a_predictor_before_other_arguments(model, scene):
    message = r"is of type SegmentCaptioner; pass sca\.Predictor\(model\) after its set_image\(image\)"
    with pytest.raises(ValueError, match=message):
        sca.caption_everything(model, scene.image)


def test_predictor_rejects_a_model_name_and_suggests_load():
    with pytest.raises(ValueError, match=r"pass a model, such as sca.load\('sca-tiny'\)"):
        sca.Predictor("sca-tiny")


@pytest.mark.parametrize("method", ["predict", "predict_batch"])
def test_predict_methods_list_generation_options_as_keywords(method):
    assert set(GENERATION_OPTIONS) < set(inspect.signature(getattr(sca.Predictor, method)).parameters)
