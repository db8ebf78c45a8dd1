"""Sessions, models and sliders of the demo."""

import base64
import io
import zlib

import pytest
from pam_tiny import copy_pam_checkpoint
from PIL import Image
from sca_registry import zoo
from sca_registry.contracts import Caption
from sca_registry.spec import EverythingOptions

pytest.importorskip("gradio", reason="requires the extra demo")

import gradio as gr

from sca.data.scenes import Scenes
from sca.demo.app import (
    MAX_LOADED_MODELS,
    ModelPool,
    SliderValues,
    _caption_everything,
    _caption_prompted_region,
    _refresh_options,
    _select_model,
    _start_session,
    build_page,
)
from sca.demo.session import Session
from sca.inference.automatic import caption_everything, resolve_everything_options
from sca.inference.factory import load_captioner
from sca.inference.predictor import Predictor
from sca.io.errors import InputError
from sca.io.prompts import MAX_POINTS
from sca.serve.inference_requests import InferenceRequest, RequestDone, SchedulerClosedError


@pytest.fixture
def session():
    return Session(Image.new("RGB", (64, 48)), "a.png")


def add_point(session, x):
    """Begin a new region with a point; return its prompt."""
    region_index = session.handle_event({"action": "point", "x": x, "y": 5, "label": 1, "new_region": True})
    return session.regions[region_index].prompt


def store_caption(session, prompt, text):
    session.store_caption(prompt, Caption(text, 0.5, None, None, None, prompt, 0), ())


def get_captions(session):
    return [caption.text for caption in session.captions]


def test_session_stores_captions_in_any_order(session):
    first, second = add_point(session, 1), add_point(session, 2)
    store_caption(session, second, "two")
    store_caption(session, first, "one")
    assert get_captions(session) == ["one", "two"]
    assert [caption.region_id for caption in session.captions] == [0, 1]


@pytest.mark.parametrize(("ood_score", "is_flagged"), [(None, False), (0.5, False), (1.5, True)])
def test_canvas_shows_confidence_and_images_unlike_the_training_images(session, ood_score, is_flagged):
    session.handle_event({"action": "box", "box": [1, 1, 9, 9]})
    prompt = session.regions[0].prompt
    caption = Caption("a", 0.5, prompt.box, None, None, prompt, 0, confidence=0.25, ood_score=ood_score)
    session.store_caption(prompt, caption, ())
    canvas = session.to_canvas_value()
    assert canvas["regions"][0]["confidence"] == 0.25
    assert canvas["is_out_of_distribution"] is is_flagged


def test_undo_keeps_captions_that_arrive_later(session):
    first, second = add_point(session, 1), add_point(session, 2)
    session.handle_event({"action": "undo"})
    store_caption(session, second, "two")
    assert get_captions(session) == []
    store_caption(session, first, "one")
    third = add_point(session, 3)
    session.handle_event({"action": "clear"})
    store_caption(session, third, "three")
    session.handle_event({"action": "undo"})
    assert get_captions(session) == ["one", "three"]


def test_revert_prompt_removes_only_the_failed_prompt(session):
    first, second = add_point(session, 1), add_point(session, 2)
    store_caption(session, first, "one")
    session.revert_prompt(first)
    assert len(session.regions) == 2
    session.revert_prompt(second)
    assert get_captions(session) == ["one"]
    assert len(session.regions) == 1


@pytest.fixture
def pool_and_names(tmp_path):
    """Model pool without loaded models, and the names of four models."""
    for name in "abcd":
        (tmp_path / name).symlink_to(zoo.get_entry("sca-tiny").folder)
    pool = ModelPool("cpu", None, (), allow_any_model=True)
    yield pool, [str(tmp_path / name) for name in "abcd"]
    pool.close()


@pytest.mark.slow
def test_model_pool_keeps_models_in_use(pool_and_names, session):
    pool, (first, *others) = pool_and_names
    inference_request = InferenceRequest(session.image, [], generation={})
    with pool.acquire_scheduler(first) as scheduler:
        for name in others:
            with pool.acquire_scheduler(name) as other:
                assert isinstance(list(other.iter_events(inference_request))[-1], RequestDone)
        assert scheduler.accepts_requests
        assert isinstance(list(scheduler.iter_events(inference_request))[-1], RequestDone)
    for name in others[:MAX_LOADED_MODELS]:
        with pool.acquire_scheduler(name):
            pass
    assert not scheduler.accepts_requests
    with pytest.raises(SchedulerClosedError):
        list(scheduler.iter_events(inference_request))


def test_model_pool_rejects_unlisted_models(tmp_path):
    (tmp_path / "a").symlink_to(zoo.get_entry("sca-tiny").folder)
    pool = ModelPool("cpu", None, ["sca-tiny"])
    with (
        pytest.raises(ValueError, match=r"the model .* is not available; choose from sca-tiny"),
        pool.acquire_scheduler(str(tmp_path / "a")),
    ):
        pass
    pool.close()


def test_model_pool_rejects_options_of_entered_names(tmp_path, monkeypatch):
    from sca.demo import app

    loaded_names = []
    monkeypatch.setattr(app, "load_captioner", lambda name, device, **options: loaded_names.append(name))
    monkeypatch.setattr(app, "RequestScheduler", lambda captioner: type("Idle", (), {"close": lambda self: None})())
    listed_name = "crop-captioner encoder=sam-vit-b"
    (tmp_path / "my model=1").symlink_to(zoo.get_entry("sca-tiny").folder)
    pool = ModelPool("cpu", None, [listed_name], allow_any_model=True)
    untrusted_name = "crop-captioner encoder={name='./evil',trust_remote_code=true}"
    for name in (untrusted_name, "sca-tiny precision=float16", "./evil trust_remote_code=true"):
        with pytest.raises(ValueError, match="has options; enter the name only"), pool.acquire_scheduler(name):
            pass
    for name in (listed_name, "sca-tiny", "sam-vit-b+blip-base", str(tmp_path / "my model=1")):
        with pool.acquire_scheduler(name):
            pass
        assert loaded_names.pop() == name


@pytest.mark.parametrize("size", [(64, 50), (4096, 4096), (30_000, 30_000)])
def test_session_rejects_painted_mask_of_another_size(session, size):
    png = io.BytesIO()
    Image.new("1", (8, 8)).save(png, "PNG")
    content = bytearray(png.getvalue())
    content[16:24] = b"".join(side.to_bytes(4, "big") for side in size)
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    with pytest.raises(InputError, match="the painted mask"):
        session.handle_event({"action": "mask", "image": f"data:image/png;base64,{base64.b64encode(content).decode()}"})


def test_page_decodes_one_image_at_a_time_and_expires_sessions():
    page = build_page(ModelPool("cpu", None, ["sca-tiny"]), ["sca-tiny"], [])
    open_events = [fn for fn in page.fns.values() if {each[1] for each in fn.targets} & {"upload", "select"}]
    assert [(fn.concurrency_limit, fn.concurrency_id) for fn in open_events] == [(1, "decode")] * 2
    assert all(each.time_to_live for each in page.blocks.values() if isinstance(each, gr.State))


def test_session_limits_points_of_a_region(session):
    for number in range(MAX_POINTS):
        session.handle_event({"action": "point", "x": number % 60, "y": 5, "label": 1})
    with pytest.raises(InputError, match=f"at most {MAX_POINTS} points"):
        session.handle_event({"action": "point", "x": 9, "y": 5, "label": 1})


def test_start_session_rejects_image_above_pixel_limit(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    session, *_ = _start_session(str(tmp_path / "a.png"), "a.png", 600)
    assert session.image.size == (30, 20)
    with pytest.raises(gr.Error, match=r"a\.png has 600 pixels"):
        _start_session(str(tmp_path / "a.png"), "a.png", 599)


def test_model_pool_does_not_reload_loaded_models(pool_and_names):
    pool, (first, second, *_) = pool_and_names
    with pool.acquire_scheduler(first) as first_scheduler, pool.acquire_scheduler(second):
        pass
    with pool.acquire_scheduler(first) as reused_scheduler:
        assert reused_scheduler is first_scheduler


def test_model_pool_trusts_only_models_of_the_command_line(monkeypatch):
    from sca.demo import app

    loaded_models = []
    monkeypatch.setattr(
        app, "load_captioner", lambda name, device, **options: loaded_models.append((name, options)) or object()
    )
    monkeypatch.setattr(app, "RequestScheduler", lambda captioner: type("Idle", (), {"close": lambda self: None})())
    pool = ModelPool("cpu", None, ["./mine"], allow_any_model=True, trust_options={"./mine": {"allow_external": True}})
    for name in ("./mine", "./untrusted"):
        with pool.acquire_scheduler(name):
            pass
    assert loaded_models == [("./mine", {"allow_external": True}), ("./untrusted", {})]


def get_page_sliders(page):
    return {each.elem_id: each.value for each in page.blocks.values() if isinstance(each, gr.Slider)}


@pytest.mark.parametrize("name", [name for name in zoo.list_names() if zoo.get_entry(name).folder])
@pytest.mark.slow
def test_sliders_start_at_the_defaults_of_the_model(name):
    pool = ModelPool("cpu", None, [name])
    unloaded_values, tasks = pool.get_defaults(name)
    model = load_captioner(name)
    options = resolve_everything_options(model, {})
    assert options != EverythingOptions()
    assert unloaded_values == (model.generation["num_beams"], options.points_per_side, options.pred_iou_thresh)
    with pool.acquire_scheduler(name):
        assert pool.get_defaults(name) == (unloaded_values, tasks) == (unloaded_values, model.tasks)
    pool.close()
    assert get_page_sliders(build_page(pool, [name], [])) == unloaded_values._asdict()


def test_select_model_updates_sliders_and_note():
    pool = ModelPool("cpu", None, ["sca-tiny", "sca-street", "sca-gpt2-large-vg"])
    for name in pool.model_names:
        note, task, values, *sliders = _select_model(pool, name, "recognition")
        assert task == gr.update(choices=["recognition", "caption"], value="recognition")
        assert [slider["value"] for slider in sliders] == [*pool.get_defaults(name).slider_values]
        assert values == pool.get_defaults(name).slider_values
        assert bool(note) == ("large" not in name)
    with pytest.raises(gr.Error, match="choose from"):
        _select_model(pool, "nothing", "caption")
    page = build_page(pool, pool.model_names, [])
    (change,) = [fn for fn in page.fns.values() if "change" in {event for _, event in fn.targets}]
    output_ids = {each.elem_id for each in change.outputs}
    assert output_ids >= {"model-note", "task", "num_beams", "points_per_side", "pred_iou_thresh"}


def test_page_lists_the_tasks_of_the_selected_model(tmp_path):
    name = str(copy_pam_checkpoint(tmp_path / "pam", with_tokenizer=True))
    pool = ModelPool("cpu", None, ["sca-tiny", name])
    pam_tasks = ("recognition", "caption", "explain", "detail")
    _, task, *_ = _select_model(pool, name, "recognition")
    assert (task["choices"][:4], task["value"]) == ([*pam_tasks], "recognition")
    _, task, *_ = _select_model(pool, "sca-tiny", "explain")
    assert (task["choices"], task["value"]) == (["recognition", "caption"], "caption")
    (dropdown,) = [each for each in build_page(pool, [name], []).blocks.values() if each.elem_id == "task"]
    assert [value for _, value in dropdown.choices][:4] == [*pam_tasks]


@pytest.mark.slow
def test_unmoved_sliders_use_the_defaults_of_the_model(pool_and_names):
    pool, (name, *_) = pool_and_names
    scene = Scenes("test", num_images=1, image_size=128, seed=29)[0].image
    # The model was not loaded when it was selected, so the sliders do not have its defaults.
    initial_values = SliderValues(points_per_side=7, pred_iou_thresh=0.99)
    session = Session(scene, "a.png")
    *_, status = list(_caption_everything(pool, session, name, initial_values, "caption", *initial_values))[-1]
    predictor = Predictor(load_captioner(name))
    predictor.set_image(scene)
    assert get_captions(session) == [each.text for each in caption_everything(predictor)]
    assert status == f"{len(session.regions)} regions"
    assert len(session.regions) > 1
    *_, status = list(_caption_everything(pool, session, name, initial_values, "caption", 1, 7, 1.0))[-1]
    assert "no regions found" in status
    task, values, *sliders = _refresh_options(pool, name, initial_values, (1, 7, 0.5))
    assert task == gr.update(choices=["recognition", "caption"])
    assert values == pool.get_defaults(name).slider_values
    assert [slider.get("value") for slider in sliders] == [1, values.points_per_side, None]


def test_unmoved_beam_slider_uses_the_default_of_the_model(pool_and_names, monkeypatch):
    pool, (name, *_) = pool_and_names
    generations = []
    with pool.acquire_scheduler(name) as scheduler:
        monkeypatch.setattr(
            scheduler, "iter_events", lambda request: generations.append(dict(request.generation)) or iter(())
        )
        for num_beams in (1, 3):
            session = Session(Image.new("RGB", (64, 48)), "a.png")
            event = {"action": "point", "x": 5, "y": 5, "label": 1}
            list(_caption_prompted_region(pool, event, session, name, SliderValues(), "caption", num_beams))
    assert generations == [{}, {"num_beams": 3}]


def test_zoom_checkbox_selects_the_measured_options_of_the_model(pool_and_names, monkeypatch):
    pool, (name, *_) = pool_and_names
    zooms = []
    with pool.acquire_scheduler(name) as scheduler:
        monkeypatch.setattr(scheduler, "iter_events", lambda request: zooms.append(request.zoom) or iter(()))
        for has_zoom in (False, True):
            session = Session(Image.new("RGB", (64, 48)), "a.png")
            event = {"action": "point", "x": 5, "y": 5, "label": 1}
            list(_caption_prompted_region(pool, event, session, name, SliderValues(), "caption", 1, has_zoom))
            list(_caption_everything(pool, session, name, SliderValues(), "caption", *SliderValues(), has_zoom))
        measured = scheduler.captioner.zoom
    assert measured.max_cells is not None
    assert zooms == [None, None, measured, measured]
