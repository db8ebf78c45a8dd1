"""What the demo keeps: steps that cross answers, and models that are in use."""

import base64
import io
import zlib

import pytest
from PIL import Image
from sca_registry import zoo
from sca_registry.contracts import Caption
from sca_registry.spec import EverythingOptions

pytest.importorskip("gradio", reason="needs the extra demo")

import gradio as gr

from sca.data.scenes import Scenes
from sca.demo.app import (
    MAX_LOADED_MODELS,
    ModelPool,
    SliderValues,
    _caption_everything,
    _caption_prompted_region,
    _refresh_sliders,
    _select_model,
    _start_session,
    build_page,
)
from sca.demo.session import Session
from sca.inference.automatic import caption_everything, resolve_everything_options
from sca.inference.factory import captioner
from sca.inference.predictor import Predictor
from sca.io.errors import InputError
from sca.io.prompts import MAX_POINTS
from sca.serve.tickets import InferenceRequest, RequestDone, SchedulerClosedError


@pytest.fixture
def session():
    return Session(Image.new("RGB", (64, 48)), "a.png")


def click(session, x):
    """A new region, and what it is asked by."""
    number = session.handle_event({"action": "point", "x": x, "y": 5, "label": 1, "new_region": True})
    return session.regions[number].prompt


def answer(session, prompt, words):
    session.add_response(prompt, Caption(words, 0.5, None, None, None, prompt, 0), ())


def words(session):
    return [caption.text for caption in session.captions]


def test_answers_that_come_in_another_order_find_their_regions(session):
    first, second = click(session, 1), click(session, 2)
    answer(session, second, "two")
    answer(session, first, "one")
    assert words(session) == ["one", "two"]
    assert [caption.region_id for caption in session.captions] == [0, 1]


def test_a_step_back_neither_breaks_on_an_answer_nor_loses_it(session):
    first, second = click(session, 1), click(session, 2)
    session.handle_event({"action": "undo"})
    answer(session, second, "two")
    assert words(session) == []
    answer(session, first, "one")
    third = click(session, 3)
    session.handle_event({"action": "clear"})
    answer(session, third, "three")
    session.handle_event({"action": "undo"})
    assert words(session) == ["one", "three"]


def test_what_has_no_answer_is_taken_back_and_nothing_else(session):
    first, second = click(session, 1), click(session, 2)
    answer(session, first, "one")
    session.revert_prompt(first)
    assert len(session.regions) == 2
    session.revert_prompt(second)
    assert words(session) == ["one"]
    assert len(session.regions) == 1


@pytest.fixture
def models(tmp_path):
    """One for each of a few names of the same model."""
    for name in "abcd":
        (tmp_path / name).symlink_to(zoo.get_entry("sca-tiny").folder)
    models = ModelPool("cpu", None, (), allow_any_model=True)
    yield models, [str(tmp_path / name) for name in "abcd"]
    models.close()


def test_a_model_in_use_stays_until_it_is_done(models, session):
    models, (first, *others) = models
    question = InferenceRequest(session.image, [], generation={})
    with models.scheduler(first) as scheduler:
        for name in others:
            with models.scheduler(name) as other:
                assert isinstance(list(other.iter_events(question))[-1], RequestDone)
        assert scheduler.accepts_requests
        assert isinstance(list(scheduler.iter_events(question))[-1], RequestDone)
    for name in others[:MAX_LOADED_MODELS]:
        with models.scheduler(name):
            pass
    assert not scheduler.accepts_requests
    with pytest.raises(SchedulerClosedError):
        list(scheduler.iter_events(question))


def test_models_refuse_names_that_may_not_be_chosen(tmp_path):
    (tmp_path / "a").symlink_to(zoo.get_entry("sca-tiny").folder)
    models = ModelPool("cpu", None, ["sca-tiny"])
    with pytest.raises(ValueError, match=r"no model .*; choose from sca-tiny"), models.scheduler(str(tmp_path / "a")):
        pass
    models.close()


def test_models_refuse_options_of_names_that_are_not_of_the_command_line(tmp_path, monkeypatch):
    from sca.demo import app

    loaded = []
    monkeypatch.setattr(app, "captioner", lambda name, device, **options: loaded.append(name))
    monkeypatch.setattr(app, "RequestScheduler", lambda captioner: type("Idle", (), {"close": lambda self: None})())
    named = "crop-captioner encoder=sam-vit-b"
    (tmp_path / "my model=1").symlink_to(zoo.get_entry("sca-tiny").folder)
    models = ModelPool("cpu", None, [named], allow_any_model=True)
    trusting = "crop-captioner encoder={name='./evil',trust_remote_code=true}"
    for name in (trusting, "sca-tiny dtype=float16", "./evil trust_remote_code=true"):
        with pytest.raises(ValueError, match="has options; enter its name only"), models.scheduler(name):
            pass
    for name in (named, "sca-tiny", "sam-vit-b+blip-base", str(tmp_path / "my model=1")):
        with models.scheduler(name):
            pass
        assert loaded.pop() == name


@pytest.mark.parametrize("size", [(64, 50), (4096, 4096), (30_000, 30_000)])
def test_session_refuses_paint_of_another_size(session, size):
    png = io.BytesIO()
    Image.new("1", (8, 8)).save(png, "PNG")
    content = bytearray(png.getvalue())
    content[16:24] = b"".join(side.to_bytes(4, "big") for side in size)
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    with pytest.raises(InputError, match="paint"):
        session.handle_event({"action": "mask", "png": f"data:image/png;base64,{base64.b64encode(content).decode()}"})


def test_page_opens_one_image_at_a_time_and_forgets_sessions():
    demo = build_page(ModelPool("cpu", None, ["sca-tiny"]), ["sca-tiny"], [])
    opening = [fn for fn in demo.fns.values() if {each[1] for each in fn.targets} & {"upload", "select"}]
    assert [(fn.concurrency_limit, fn.concurrency_id) for fn in opening] == [(1, "decode")] * 2
    assert all(each.time_to_live for each in demo.blocks.values() if isinstance(each, gr.State))


def test_session_limits_points_of_a_region(session):
    for number in range(MAX_POINTS):
        session.handle_event({"action": "point", "x": number % 60, "y": 5, "label": 1})
    with pytest.raises(InputError, match=f"at most {MAX_POINTS} points"):
        session.handle_event({"action": "point", "x": 9, "y": 5, "label": 1})


def test_opened_image_keeps_to_the_pixel_limit(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    session, *_ = _start_session(str(tmp_path / "a.png"), "a.png", 600)
    assert session.image.size == (30, 20)
    with pytest.raises(gr.Error, match=r"a\.png has 600 pixels"):
        _start_session(str(tmp_path / "a.png"), "a.png", 599)


def test_a_model_that_is_there_is_not_loaded_again(models):
    models, (first, second, *_) = models
    with models.scheduler(first) as one, models.scheduler(second):
        pass
    with models.scheduler(first) as again:
        assert again is one


def test_models_named_on_the_command_line_alone_may_do_what_was_agreed(monkeypatch):
    from sca.demo import app

    asked = []
    monkeypatch.setattr(app, "captioner", lambda name, device, **options: asked.append((name, options)) or object())
    monkeypatch.setattr(app, "RequestScheduler", lambda captioner: type("Idle", (), {"close": lambda self: None})())
    models = ModelPool(
        "cpu", None, ["./mine"], allow_any_model=True, trust_options={"./mine": {"allow_external": True}}
    )
    for name in ("./mine", "./of-a-stranger"):
        with models.scheduler(name):
            pass
    assert asked == [("./mine", {"allow_external": True}), ("./of-a-stranger", {})]


def slider_values(demo):
    return {each.elem_id: each.value for each in demo.blocks.values() if isinstance(each, gr.Slider)}


@pytest.mark.parametrize("name", [name for name in zoo.list_names() if zoo.get_entry(name).folder])
def test_sliders_start_at_the_values_that_the_command_line_uses(name):
    models = ModelPool("cpu", None, [name])
    before = models.get_slider_values(name)  # of what is not loaded
    own = captioner(name)
    search = resolve_everything_options(own, {})
    assert search != EverythingOptions()
    assert before == (own.generation["num_beams"], search.points_per_side, search.pred_iou_thresh)
    with models.scheduler(name):
        assert models.get_slider_values(name) == before
    models.close()
    assert slider_values(build_page(models, [name], [])) == before._asdict()


def test_sliders_and_note_follow_the_model():
    models = ModelPool("cpu", None, ["sca-tiny", "sca-street", "sca-gpt2-large-vg"])
    for name in models.model_names:
        note, controls, *sliders = _select_model(models, name)
        assert [slider["value"] for slider in sliders] == [*models.get_slider_values(name)]
        assert controls == models.get_slider_values(name)
        assert bool(note) == ("large" not in name)
    with pytest.raises(gr.Error, match="choose from"):
        _select_model(models, "nothing")
    demo = build_page(models, models.model_names, [])
    (change,) = [fn for fn in demo.fns.values() if "change" in {event for _, event in fn.targets}]
    assert {each.elem_id for each in change.outputs} >= {"note", "num_beams", "points_per_side", "pred_iou_thresh"}


@pytest.mark.slow
def test_a_slider_that_nobody_moved_leaves_its_value_to_the_model(models):
    models, (name, *_) = models
    scene = Scenes("test", count=1, size=128, seed=29)[0].image
    shown = SliderValues(
        points_per_side=7, pred_iou_thresh=0.99
    )  # as of a model whose values were not known when it was chosen
    session = Session(scene, "a.png")
    *_, status = list(_caption_everything(models, session, name, shown, "caption", *shown))[-1]
    own = Predictor(captioner(name))
    own.set_image(scene)
    assert words(session) == [each.text for each in caption_everything(own)]
    assert status == f"{len(session.regions)} regions"
    assert len(session.regions) > 1
    *_, status = list(_caption_everything(models, session, name, shown, "caption", 1, 7, 1.0))[-1]
    assert "nothing found" in status
    controls, *sliders = _refresh_sliders(models, name, shown, (1, 7, 0.5))
    assert controls == models.get_slider_values(name)
    assert [slider.get("value") for slider in sliders] == [1, controls.points_per_side, None]


def test_beams_that_nobody_moved_are_the_model_s(models, monkeypatch):
    models, (name, *_) = models
    asked = []
    with models.scheduler(name) as scheduler:
        monkeypatch.setattr(scheduler, "iter_events", lambda each: asked.append(dict(each.generation)) or iter(()))
        for beams in (1, 3):
            session = Session(Image.new("RGB", (64, 48)), "a.png")
            event = {"action": "point", "x": 5, "y": 5, "label": 1}
            list(_caption_prompted_region(models, event, session, name, SliderValues(), "caption", beams))
    assert asked == [{}, {"num_beams": 3}]
