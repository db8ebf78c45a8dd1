"""`predict`, `predict_batch` and `caption_everything` use every argument or refuse it before anything is computed."""

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
def idle(predictor, monkeypatch):
    """A predictor that must not compute anything."""
    monkeypatch.setattr(predictor.engine, "caption_batch", lambda *_, **__: pytest.fail("computed"))
    return predictor


def test_predict_takes_masks_as_arrays_and_rles_after_boxes_and_points(predictor, scene):
    inside = np.zeros((scene.image.height, scene.image.width), bool)
    inside[10:40, 20:60] = True
    captions = predictor.predict(masks=[inside, encode_rle(inside)], boxes=np.array([BOX]), points=[(9, 9)])
    assert [caption.region_id for caption in captions] == [0, 1, 2, 3]
    assert captions[0].prompt.box == BOX
    assert captions[1].prompt.points == ((9, 9, 1),)
    assert captions[2].text == captions[3].text
    assert (captions[2].prompt.mask == inside).all()
    assert len(predictor.segment(masks=[inside])[0]) == 3


def test_caption_array_is_the_mask(predictor, scene):
    (caption,) = predictor.predict(boxes=[BOX])
    assert caption.array.shape == (scene.image.height, scene.image.width)
    assert caption.array.dtype == bool
    assert encode_rle(caption.array) == caption.mask


@pytest.mark.parametrize(
    ("keyword", "closest"),
    [
        ("bboxes", "boxes"),
        ("box", "boxes"),
        ("mask", "masks"),
        ("beams", "num_beams"),
        ("num_return_sequences", "num_captions"),
        ("max_tokens", "max_new_tokens"),
    ],
)
def test_unknown_keyword_is_a_type_error_with_the_closest_name(idle, keyword, closest):
    for call in (idle.predict, lambda **given: idle.predict_batch([], [], **given)):
        with pytest.raises(TypeError, match=rf"has no argument '{keyword}'"):
            call(**{keyword: [BOX]})
    with pytest.raises(TypeError, match=rf"predict\(\) has no argument '{keyword}'. Did you mean '{closest}'\?"):
        idle.predict(**{keyword: [BOX]})


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
def test_predict_refuses_options_that_cannot_be_meant(predictor, options, message, monkeypatch):
    monkeypatch.setattr(predictor.engine, "_caption_prompt_batch", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(ValueError, match=message):
        predictor.predict(boxes=[BOX], **options)


def test_empty_requests_are_an_error(idle):
    with pytest.raises(InputError, match="no regions; give prompts, boxes, points or masks"):
        idle.predict()
    with pytest.raises(InputError, match="no region"):
        idle.predict(boxes=np.zeros((0, 4)))
    with pytest.raises(InputError, match="no region"):
        idle.predict_batch([Image.new("RGB", (9, 9))], [[]])


def test_prompts_of_another_type_are_named_by_index(idle):
    with pytest.raises(InputError, match=r"prompt 1: tuple is not a prompt; give sca.Prompt"):
        idle.predict([Prompt(box=BOX), BOX])
    with pytest.raises(InputError, match=r"prompt 0: the mask is 5 x 5"):
        idle.predict(masks=[np.ones((5, 5), bool)])
    with pytest.raises(InputError, match=r"prompt 1: invalid mask: the runs in 'counts'"):
        idle.predict(boxes=[BOX], masks=[{"size": [9, 9], "counts": "0"}])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompts": Prompt(box=BOX)}, "prompts is of type Prompt; give a list of prompts"),
        ({"boxes": [1, 2, 30, 40]}, r"boxes is a list of numbers; give a list of boxes: boxes=\[\[1, 2, 30, 40\]\]"),
        ({"points": np.array([5, 6])}, r"points=\[\[5, 6\]\]"),
        ({"masks": {"size": [9, 9], "counts": "0"}}, "masks is of type dict; give a list of masks"),
        ({"boxes": None, "points": None}, "no region"),
    ],
)
def test_one_region_in_place_of_a_list_is_refused(idle, request_, message):
    with pytest.raises(InputError, match=message):
        idle.predict(**request_)
    with pytest.raises(InputError, match=message):
        idle.segment(**request_)


def test_predict_takes_none_for_no_regions(predictor):
    assert len(predictor.predict(boxes=None, points=[(9, 9)])) == 1


def test_several_captions_are_found_by_as_many_beams_or_drawn_one_by_one(predictor, monkeypatch):
    (caption,) = predictor.predict(boxes=[BOX], num_captions=3)
    assert len(caption.alternatives) == 2
    monkeypatch.setattr(type(predictor.engine), "generation", {"max_new_tokens": 5, "num_beams": 2})
    (caption,) = predictor.predict(boxes=[BOX], num_captions=3, do_sample=True, temperature=2.0, seed=1)
    assert len(caption.alternatives) == 2
    for do_sample in (None, True):
        with pytest.raises(ValueError, match="num_captions=3 requires num_beams of at least 3, not 2"):
            predictor.predict(boxes=[BOX], num_captions=3, num_beams=2, do_sample=do_sample)


def test_seed_of_the_spec_is_used(model, scene):
    spec = replace(model.spec, generation={"do_sample": True, "temperature": 3.0, "seed": 3})
    predictor = sca.Predictor(model)
    predictor.set_image(scene.image)
    expected = predictor.predict(boxes=[BOX], do_sample=True, temperature=3.0, seed=3)
    before, model.spec = model.spec, spec
    try:
        assert predictor.predict(boxes=[BOX])[0].text == expected[0].text
    finally:
        model.spec = before


def test_usage_ends_at_the_first_end_and_counts_ordinary_padding_ids():
    assert count_tokens(3, [[5, 0, 7, 2], [5, 0, 7, 9], [2, 0, 0, 0]], [2]) == (3, (4, 4, 1), (False, True, False))


def test_predict_batch_equals_predict_and_keeps_the_image(predictor, scene):
    other = np.asarray(scene.image.rotate(90))
    requests = [[Prompt(box=BOX), Prompt(points=((9, 9, 1),))], [], [Prompt(box=BOX)]]
    before = predictor.image
    found = predictor.predict_batch([scene.image, scene.image, other], requests, max_new_tokens=5)
    assert predictor.image is before
    assert [len(captions) for captions in found] == [2, 0, 1]
    for image, request, captions in zip([scene.image, scene.image, other], requests, found, strict=True):
        if request:
            predictor.set_image(image)
            alone = predictor.predict(request, max_new_tokens=5)
            assert [each.text for each in captions] == [each.text for each in alone]
            assert [each.region_id for each in captions] == [each.region_id for each in alone]


@pytest.mark.parametrize(
    ("images", "requests", "message"),
    [
        (2, [[Prompt(box=BOX)]], "2 images, but 1 requests"),
        (1, [[BOX]], "image 0: prompt 0: tuple is not a prompt"),
        (2, [[Prompt(box=BOX)], [Prompt(box=(5000, 0, 5010, 9))]], "image 1: prompt 0: the box"),
        (None, [[Prompt(box=BOX)]], "images and requests must be lists"),
        ("text", [[Prompt(box=BOX)]], "image 0: str is not an image"),
    ],
)
def test_predict_batch_checks_lengths_ranges_and_types(idle, scene, images, requests, message):
    given = {None: scene.image, "text": ["a.png"]}.get(images) or [scene.image] * images
    with pytest.raises(ValueError, match=message):
        idle.predict_batch(given, requests)


def test_predict_batch_checks_its_task_before_it_encodes(idle, scene, monkeypatch):
    monkeypatch.setattr(idle.engine, "encode", lambda *_: pytest.fail("encoded"))
    with pytest.raises(ValueError, match="unknown task 'describe'"):
        idle.predict_batch([scene.image], [[Prompt(box=BOX)]], task="describe")


def test_caption_everything_takes_search_and_generation_options_over_the_models_own(predictor):
    few = sca.caption_everything(predictor, points_per_side=2, max_new_tokens=3)
    options = EverythingOptions(**{**vars(predictor.engine.everything), "points_per_side": 2})
    assert few == sca.caption_everything(predictor, options=options, max_new_tokens=3)
    message = r"caption_everything\(\) has no argument 'point_per_side'. Did you mean 'points_per_side'\?"
    with pytest.raises(TypeError, match=message):
        sca.caption_everything(predictor, point_per_side=2)
    with pytest.raises(TypeError, match=r"no argument 'min_mask_region_area'. Did you mean 'min_area'\?"):
        sca.caption_everything(predictor, min_mask_region_area=0.9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"points_per_side": "many"}, r"everything\.points_per_side is 'many'"),
        ({"task": "name"}, "unknown task 'name'"),
        ({"max_regions": 2.5}, r"max_regions is 2\.5; give an integer"),
        ({"max_regions": "3"}, "max_regions is '3'"),
        ({"options": {"points_per_side": 4}}, "options is of type dict"),
        ({"num_beams": 0}, "num_beams is 0"),
    ],
)
def test_caption_everything_checks_arguments_before_it_searches(idle, given, message, monkeypatch):
    monkeypatch.setattr(idle.model, "segment", lambda *_: pytest.fail("searched"))
    with pytest.raises(ValueError, match=message):
        sca.caption_everything(idle, **given)


def test_predictor_refuses_a_name_in_place_of_a_model():
    with pytest.raises(ValueError, match=r"give a model, such as sca.load\('sca-tiny'\)"):
        sca.Predictor("sca-tiny")


@pytest.mark.parametrize("method", ["predict", "predict_batch"])
def test_generation_options_are_explicit_keywords(method):
    assert set(GENERATION_OPTIONS) < set(inspect.signature(getattr(sca.Predictor, method)).parameters)
