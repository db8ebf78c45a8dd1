"""Captioner of a chat server: requests, faults, the cache, keys and the notations of regions."""

import base64
import io
import json
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import numpy as np
import pytest
from chat_server import FAULTS, make_completion, make_text, run_chat_server
from PIL import Image
from sca_registry import RegistryError, captioners
from sca_registry.contracts import Prompt

import sca
from sca.captioners import chat_client
from sca.captioners.chat_captioner import SERVER_FORMATS
from sca.captioners.chat_client import ChatServerError, normalize_url
from sca.captioners.region_captioner import RegionView
from sca.captioners.region_formats import QUESTIONS, resize_for_coordinates
from sca.evaluation.predictions import PromptingOptions
from sca.io.errors import InputError
from sca.io.masks import encode_rle
from sca.testing.conformance import check_component

pytestmark = pytest.mark.slow  # connects to servers
KEY = "sk-planted-0123456789"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_API_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(chat_client, "FIRST_DELAY", 0.01)


@pytest.fixture
def server():
    with run_chat_server() as running:
        yield running


def read_image(body):
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def read_question(body):
    return body["messages"][0]["content"][1]["text"]


def get_texts(captions):
    return [caption.text for caption in captions]


def test_openai_captioner_sends_the_crop_with_the_question_and_returns_text_and_usage(server, image):
    captioner = sca.load_captioner(f"openai url={server.url} model=mine context=1.0")
    (caption,) = captioner.caption(image, [Prompt(box=(10, 10, 40, 30))], max_new_tokens=9)
    (body,) = server.bodies
    assert caption.text == make_text(body)
    assert (caption.usage.prompt_tokens, caption.usage.completion_tokens) == (7, (3,))
    assert np.isnan(caption.score)
    assert read_question(body) == QUESTIONS["crop"][1]
    assert np.array_equal(np.asarray(read_image(body)), np.asarray(image)[10:30, 10:40])
    assert {name: body[name] for name in ("model", "max_tokens", "temperature")} == {
        "model": "mine",
        "max_tokens": 9,
        "temperature": 0,
    }
    assert server.keys == [None]


def test_openai_captioner_finds_the_only_model_and_reads_the_url_of_the_environment(server, image, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    captioner = sca.load_captioner("openai")
    captioner.caption(image, [Prompt(box=(10, 10, 40, 30))], "recognition")
    assert server.bodies[0]["model"] == "stub"
    assert captioner.metadata["model"] == "stub"
    assert read_question(server.bodies[0]) == QUESTIONS["crop"][0]


def test_200_regions_have_one_response_each_despite_faults_and_are_cached():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8))

    def choose_fault(text, number):
        """Fail the first two attempts of most requests, with all kinds of faults."""
        kind = int(text[-4:], 16) + number
        return FAULTS[kind % len(FAULTS)] if number < 2 and kind % 4 else None

    prompts = [Prompt(box=(x, y, x + 9, y + 7)) for x in range(0, 60, 3) for y in range(0, 50, 5)]
    assert len(prompts) == 200
    with run_chat_server(choose_fault) as server:
        captioner = sca.load_captioner(f"openai url={server.url} model=mine timeout=1.0 max_concurrency=16")
        captions = captioner.caption(image, prompts)
        first_bodies = list(server.bodies)
        assert get_texts(captions) == get_texts(captioner.caption(image, prompts))
        assert len(server.bodies) == len(first_bodies)  # the second call is cached
    assert len(first_bodies) > 300
    expected = {make_text(body) for body in first_bodies}
    assert len(expected) == len(set(get_texts(captions))) == 200
    assert set(get_texts(captions)) == expected == server.answered.keys()
    assert set(server.answered.values()) == {1}
    # each text belongs to the crop of its region
    crops = {make_text(body): np.asarray(read_image(body)).tobytes() for body in first_bodies}
    for caption in captions[::20]:
        x1, y1, x2, y2 = (int(value) for value in caption.box)
        window = image.crop((max(x1 - 3, 0), max(y1 - 2, 0), min(x2 + 3, 80), min(y2 + 2, 60)))
        assert crops[caption.text] == np.asarray(window).tobytes()


def test_failed_run_resumes_with_the_missing_regions(image, prompts):
    is_down = threading.Event()

    def fail_while_down(text, number):
        return FAULTS[1] if is_down.is_set() else None

    with run_chat_server(fail_while_down) as server:
        name = f"openai url={server.url} model=mine max_retries=1 max_concurrency=1"
        sca.load_captioner(name).caption(image, prompts[:2])
        is_down.set()
        with pytest.raises(ChatServerError, match=r"status 500 after 2 attempts; check the server"):
            sca.load_captioner(name).caption(image, prompts)
        is_down.clear()
        server.bodies.clear()
        captions = sca.load_captioner(name).caption(image, prompts)
        assert len(server.bodies) == len(prompts) - 2
    assert len(captions) == len(prompts)


def test_sampled_requests_without_a_seed_are_not_cached(server, image, prompts):
    captioner = sca.load_captioner(f"openai url={server.url} model=mine")
    for number_of_requests, options in ((1, {"seed": 3}), (1, {"seed": 3}), (2, {}), (3, {})):
        captioner.caption(image, prompts[:1], do_sample=True, temperature=0.7, top_p=0.9, **options)
        assert len(server.bodies) == number_of_requests
    assert (server.bodies[0]["temperature"], server.bodies[0]["top_p"], server.bodies[0]["seed"]) == (0.7, 0.9, 3)
    uncached = sca.load_captioner(f"openai url={server.url} model=mine cache=false")
    for _ in range(2):
        uncached.caption(image, prompts[:1])
    assert len(server.bodies) == 5


def test_damaged_cache_entries_are_requested_again(server, image, prompts, tmp_path):
    captioner = sca.load_captioner(f"openai url={server.url} model=mine")
    (caption,) = captioner.caption(image, prompts[:1])
    (entry,) = (tmp_path / "cache" / "responses").glob("*/*.json")
    assert captioner.usage == {"requests": 1, "cached": 0, "empty": 0, "prompt_tokens": 7, "completion_tokens": 3}
    captioner.caption(image, prompts[:1])
    assert captioner.usage == {"requests": 1, "cached": 1, "empty": 0, "prompt_tokens": 7, "completion_tokens": 3}
    for content in ("", "[]", '{"text": 3}', '{"other": 1}'):
        entry.write_text(content)
        assert get_texts(captioner.caption(image, prompts[:1])) == [caption.text]
        assert json.loads(entry.read_text())["text"] == caption.text


def test_key_is_sent_to_the_server_and_occurs_nowhere_else(image, prompts, monkeypatch, tmp_path, caplog):
    key_file = tmp_path.parent / f"{tmp_path.name}.key"
    key_file.write_text(KEY + "\n")
    monkeypatch.setenv("OPENAI_API_KEY_FILE", str(key_file))
    caplog.set_level("DEBUG")
    with run_chat_server(lambda text, number: echo_key if number else None) as server:
        captioner = sca.load_captioner(f"openai url={server.url} model=mine cache=false")
        captions = captioner.caption(image, prompts[:1])
        with pytest.raises(ChatServerError) as raised:
            captioner.caption(image, prompts[:1])
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert "incorrect key ***" in str(raised.value)
    assert "set OPENAI_API_KEY or OPENAI_API_KEY_FILE" in str(raised.value)
    shown = [str(raised.value), repr(captions), repr(captioner.metadata), caplog.text]
    assert not any(KEY in text for text in shown)
    assert not any(KEY.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_key_that_a_server_repeats_is_in_no_caption_or_file(image, prompts, monkeypatch, tmp_path):
    def repeat_key(handler):
        handler.send_json(make_completion(f"a dog for {handler.headers['Authorization']}"))

    for key, text in (
        (KEY, "a dog for Bearer ***"),
        (KEY[:8], "a dog for Bearer ***"),
        ("dog", "a dog for Bearer dog"),  # a placeholder
    ):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with run_chat_server(lambda text, number: repeat_key) as server:
            server.model_names = [f"model {key}"]
            captioner = sca.load_captioner(f"openai url={server.url}")
            assert get_texts(captioner.caption(image, prompts[:1])) == [text]
            assert KEY not in repr(captioner.metadata)
    assert not any(KEY.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_error_contains_no_key_of_any_length(image, prompts, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k3y")
    with run_chat_server(lambda text, number: echo_key) as server, pytest.raises(ChatServerError) as raised:
        sca.load_captioner(f"openai url={server.url} model=mine cache=false").caption(image, prompts[:1])
    assert "incorrect key ***" in str(raised.value)
    assert "k3y" not in str(raised.value)


def echo_key(handler):
    key = handler.headers["Authorization"].removeprefix("Bearer ")
    handler.send_json({"error": {"message": f"incorrect key {key}"}}, 401)


def test_evaluation_with_a_key_writes_it_to_no_file(server, monkeypatch, tmp_path, capfd):
    from sca.cli import main

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    name = f"openai url={server.url} model=mine"
    command = ["evaluate", name, "scenes", "--max-images", "2", "--metrics", "cider-d", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["sca", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert f"Bearer {KEY}" in server.keys
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(file.name == "predictions.jsonl" for file in files)
    assert not any(KEY.encode() in file.read_bytes() for file in files)
    outputs = capfd.readouterr()
    assert not any(KEY in text for text in outputs)
    number = len(server.bodies)
    assert (
        f"{number:,} requests, 0 cached, 0 empty, {7 * number:,} prompt tokens, {3 * number:,} completion"
        in outputs.err
    )


def test_predictions_with_cached_responses_have_no_time(server):
    model = f"openai url={server.url} model=mine"
    prompting = PromptingOptions(tasks=("caption",))
    for has_time in (True, False):
        report = sca.evaluate(model, "scenes", prompting=prompting, metrics=["cider-d"], max_images=1)
        assert (report.prediction_seconds is not None) == has_time


def test_redirects_are_not_followed(image, prompts, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with run_chat_server() as other:

        def redirect_request(handler):
            handler.send_json({}, 307, Location=f"{other.url}/chat/completions")

        with run_chat_server(lambda text, number: redirect_request) as server:
            captioner = sca.load_captioner(f"openai url={server.url} model=mine")
            with pytest.raises(ChatServerError, match="redirects to another address, which is not followed"):
                captioner.caption(image, prompts[:1])
        assert other.keys == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "no server; set url="),
        ("localhost:8000", "URL of the server is invalid"),
        ("ftp://host/v1", "URL of the server is invalid"),
        ("http://", "URL of the server is invalid"),
        ("http://host:99999/v1", "URL of the server is invalid"),
        ("http://host:0/v1", "URL of the server is invalid"),
        (f"http://user:{KEY}@host/v1", "contains a user name, a query or a fragment"),
        (f"https://host/v1?key={KEY}", "contains a user name, a query or a fragment"),
    ],
)
def test_invalid_urls_are_rejected_without_their_secrets(url, message):
    with pytest.raises(InputError, match=message) as raised:
        normalize_url(url)
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "normalized"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1"),
        ("https://host/openai", "https://host/openai"),
    ],
)
def test_url_without_a_path_gets_the_version(url, normalized):
    assert normalize_url(url) == normalized


@pytest.mark.parametrize("content", [b"two words", "schlüssel".encode(), b"\xff\xfe"])
def test_unusable_keys_are_rejected_without_showing_them(server, monkeypatch, tmp_path, content):
    (tmp_path / "key").write_bytes(content)
    monkeypatch.setenv("OPENAI_API_KEY_FILE", str(tmp_path / "key"))
    with pytest.raises(RegistryError, match="OPENAI_API_KEY_FILE") as raised:
        sca.load_captioner(f"openai url={server.url} model=mine")
    assert "words" not in str(raised.value)
    monkeypatch.setenv("OPENAI_API_KEY_FILE", str(tmp_path / "absent"))
    with pytest.raises(RegistryError, match="absent cannot be read"):
        sca.load_captioner(f"openai url={server.url} model=mine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("region_format=circle", "region_format is 'circle'"),
        ("region_format=coordinates", "set both"),
        ("coordinate_format=qwen3_vl", "set both"),
        ("region_format=coordinates coordinate_format=yolo", "coordinate_format is 'yolo'"),
        ('question="where is {region}?"', r"contains \{region\} although region_format is not coordinates"),
        ("extra_body={stream=true}", "extra_body.stream is set by the client"),
        ("max_concurrency=0", "max_concurrency is 0"),
        ("timeout=0.0", "timeout is 0"),
        ("context=0.5", "context is 0.5"),
        ("region_format=alpha context=2.0", "context requires region_format=crop; remove it"),
        ("key=abc", "'key'"),
    ],
)
def test_invalid_options_are_rejected(server, options, message):
    with pytest.raises(RegistryError, match=message):
        sca.load_captioner(f"openai url={server.url} model=mine {options}")


@pytest.mark.parametrize("host", [None, "a..b"])
def test_unreachable_server_fails_in_one_line(image, prompts, host):
    with run_chat_server() as server:
        url = f"http://{host}/v1" if host else server.url
    captioner = sca.load_captioner(f"openai url={url} model=mine max_retries=1")
    with pytest.raises(ChatServerError, match=r"failed \(.*\) after 2 attempts; check the server") as raised:
        captioner.caption(image, prompts[:1])
    assert "\n" not in str(raised.value)


def test_region_formats_show_the_region(server, image):
    mask = np.zeros((60, 80), bool)
    mask[12:28, 15:33] = True
    view, pixels = Prompt(mask=mask), np.asarray(image)

    def show_region(options, prompt=view):
        sca.load_captioner(f"openai url={server.url} model=mine {options}").caption(image, [prompt])
        return read_image(server.bodies[-1]), read_question(server.bodies[-1])

    drawn, question = show_region("region_format=outline")
    changed = (np.asarray(drawn) != pixels).any(-1)
    assert question == "Describe what is inside the red outline in one short phrase."
    assert not changed[mask].any()
    ring = np.zeros_like(mask)
    ring[10:30, 13:35] = True
    assert (changed == (ring & ~mask)).all()
    drawn, _ = show_region("region_format=box", Prompt(box=(15, 12, 33, 28)))
    assert ((np.asarray(drawn) != pixels).any(-1) == (ring & ~mask)).all()
    empty = Prompt(box=(15, 12, 33, 28), mask=np.zeros((60, 80), bool))
    drawn, _ = show_region("region_format=outline", empty)
    assert ((np.asarray(drawn) != pixels).any(-1) == (ring & ~mask)).all()
    alpha, _ = show_region("region_format=alpha", empty)
    assert ((np.asarray(alpha)[..., 3] > 0).sum()) == 18 * 16
    alpha, question = show_region("region_format=alpha")
    assert alpha.mode == "RGBA"
    assert (np.asarray(alpha)[..., 3] == mask * 255).all()
    assert (np.asarray(alpha)[..., :3] == pixels).all()
    sent, question = show_region("region_format=coordinates coordinate_format=qwen3_vl", Prompt(box=(20, 15, 40, 30)))
    assert (np.asarray(sent) == pixels).all()
    assert question == "Describe what is in the region [250, 250, 500, 500] in one short phrase."
    sent, question = show_region(
        "region_format=coordinates coordinate_format=qwen3_vl max_side=40", Prompt(box=(20, 15, 40, 30))
    )
    assert sent.size == (40, 30)
    assert "[250, 250, 500, 500]" in question


@pytest.mark.parametrize(
    ("name", "size", "box", "sent_size", "text"),
    [
        ("qwen3_vl", (640, 480), (64, 48, 320, 480), (640, 480), "[100, 100, 500, 1000]"),
        ("qwen2_5_vl", (640, 480), (64, 48, 320, 480), (644, 476), "[64, 47, 322, 476]"),
        ("paligemma", (640, 480), (64, 48, 320, 480), (640, 480), "<loc0102><loc0102><loc1023><loc0512>"),
        ("florence2", (640, 480), (64, 48, 320, 480), (640, 480), "<loc_100><loc_100><loc_500><loc_999>"),
        (
            "kosmos-2",
            (640, 480),
            (64, 48, 320, 480),
            (640, 480),
            "<object><patch_index_0099><patch_index_1007></object>",
        ),
        ("internvl", (640, 480), (64, 48, 320, 480), (640, 480), "<box>[[100, 100, 500, 1000]]</box>"),
        ("molmo2", (640, 480), (64, 48, 320, 480), (640, 480), '<points coords="1 1 300 550">region</points>'),
        ("qwen2_vl", (640, 480), (64, 48, 320, 480), (640, 480), "<|box_start|>(100,100),(500,999)<|box_end|>"),
        ("sca", (640, 480), (64, 48.5, 320, 480), (640, 480), "box=64,48.5,320,480"),
    ],
)
def test_coordinates_have_the_notation_of_each_family(name, size, box, sent_size, text):
    view = RegionView(0, Image.new("RGB", size), Prompt(box=box), None, None)
    image, coordinates = resize_for_coordinates(view, SERVER_FORMATS[name])
    assert (image.size, coordinates) == (sent_size, text)


def test_images_that_are_sent_have_an_aspect_ratio_that_models_support(server):
    thin_image, prompts = Image.new("RGB", (2001, 12)), [Prompt(box=(0, 0, 2001, 3))]
    captioner = sca.load_captioner(f"openai url={server.url} model=mine context=1.0")
    captioner.caption(thin_image, prompts)
    assert read_image(server.bodies[0]).size == (1024, 6)
    options = "region_format=coordinates coordinate_format=qwen2_5_vl max_side=4096"
    captioner = sca.load_captioner(f"openai url={server.url} model=mine {options}")
    with pytest.raises(ValueError, match=r"^an image of 2001 x 8 pixels exceeds the aspect ratio of 200:1 .*; crop"):
        captioner.caption(thin_image.crop((0, 0, 2001, 8)), prompts)


@pytest.mark.parametrize(
    ("coordinate_format", "question"),
    [
        ("paligemma", "caption <loc0256><loc0256><loc0512><loc0512>"),
        ("florence2", "<REGION_TO_DESCRIPTION><loc_250><loc_250><loc_500><loc_500>"),
        ("internvl", "Describe what is in the region <box>[[250, 250, 500, 500]]</box> in one short phrase."),
    ],
)
def test_coordinates_are_part_of_the_prompt_of_each_family(server, image, coordinate_format, question):
    options = f"region_format=coordinates coordinate_format={coordinate_format}"
    captioner = sca.load_captioner(f"openai url={server.url} model=mine {options}")
    captioner.caption(image, [Prompt(box=(20, 15, 40, 30))])
    assert read_question(server.bodies[-1]) == question


def test_captions_of_models_with_coordinates_contain_none(image):
    def ground_text(handler):
        handler.send_json(make_completion("<ref>a red car</ref><box>[[1, 2, 3, 4]]</box>"))

    with run_chat_server(lambda text, number: ground_text) as server:
        name = f"openai url={server.url} model=mine region_format=coordinates coordinate_format=internvl"
        (caption,) = sca.load_captioner(name).caption(image, [Prompt(box=(20, 15, 40, 30))])
    assert caption.text == "a red car"


def test_questions_replace_the_built_in_ones_and_keep_the_coordinates(server, image):
    prompts = [Prompt(box=(20, 15, 40, 30))]
    captioner = sca.load_captioner(
        f"openai url={server.url} model=mine region_format=coordinates coordinate_format=qwen3_vl"
    )
    captioner.caption(image, prompts, question="what color is it?")
    captioner.caption(image, prompts, question="is {region} red?")
    options = 'region_format=coordinates coordinate_format=qwen3_vl question="name it:"'
    sca.load_captioner(f"openai url={server.url} model=mine {options}").caption(image, prompts)
    questions = [read_question(body) for body in server.bodies]
    box = "[250, 250, 500, 500]"
    assert questions == [f"what color is it? {box}", f"is {box} red?", f"name it: {box}"]
    with pytest.raises(ValueError, match="does not support region references"):
        captioner.check_question("is <region 1> red?")


def test_encoder_predicts_the_masks_of_points(server, image):
    captioner = sca.load_captioner(f"sca-tiny+openai url={server.url} model=mine region_format=outline")
    (caption,) = captioner.caption(image, [Prompt(points=((20.0, 20.0, 1),))])
    assert caption.mask is not None
    assert caption.text == make_text(server.bodies[0])
    with pytest.raises(ValueError, match="point prompts require an encoder"):
        sca.load_captioner(f"openai url={server.url} model=mine").caption(image, [Prompt(points=((20.0, 20.0, 1),))])


def test_caption_has_the_rle_of_the_mask_prompt(server, image):
    mask = np.zeros((60, 80), bool)
    mask[5:9, 5:9] = True
    (caption,) = captioners.build("openai", url=server.url, model="mine").caption(image, [Prompt(mask=mask)])
    assert caption.mask == encode_rle(mask)


def test_openai_captioner_passes_all_conformance_checks(server):
    findings = check_component("captioners", "openai", url=server.url, model="mine")
    assert len(findings) > 5
    assert [finding for finding in findings if not finding.passed] == []


def test_bench_row_contains_the_tokens_of_the_server(server, monkeypatch, tmp_path):
    from sca_bench.worker import run_row

    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    evaluate = {"dataset": {"name": "scenes", "num_images": 1}, "split": "test", "metrics": ["cider-d"]}
    config = {"captioner": {"name": "openai", "model": "mine"}, "evaluate": {**evaluate, "tasks": ["caption"]}}
    row = run_row({**config, "seed": 0, "num_threads": 0, "device": "cpu"}, str(tmp_path))
    assert row["state"] == "done", row["reason"]
    number = len(server.bodies)
    assert row["usage"] == {
        "requests": number,
        "cached": 0,
        "empty": 0,
        "prompt_tokens": 7 * number,
        "completion_tokens": 3 * number,
    }
    assert KEY not in json.dumps(row)


def test_extra_body_adds_fields_and_replaces_the_token_limit(server, image, prompts):
    options = 'extra_body={reasoning_effort="none",max_completion_tokens=9}'
    sca.load_captioner(f"openai url={server.url} model=mine {options}").caption(image, prompts[:1])
    (body,) = server.bodies
    assert (body["reasoning_effort"], body["max_completion_tokens"]) == ("none", 9)
    assert "max_tokens" not in body


@pytest.mark.parametrize(
    ("value", "delay"),
    [
        (None, 0),
        ("3", 3),
        ("-1", 0),
        ("nan", 0),
        ("soon", 0),
        ("Mon, 01 Jan 2001 00:00:00 GMT", 0),
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", 0),
    ],
)
def test_retry_after_is_read_as_seconds(value, delay):
    assert chat_client._parse_retry_after(value) == delay


def test_retry_after_can_be_a_date():
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 25 < chat_client._parse_retry_after(date) <= 30


def test_servers_that_require_a_long_wait_are_not_retried(image, prompts):
    def respond_busy(handler):
        handler.send_json({"detail": "busy\x1b[31m"}, 429, Retry_After="300")

    with run_chat_server(lambda text, number: respond_busy) as server:
        captioner = sca.load_captioner(f"openai url={server.url} model=mine")
        message = r"status 429 \(busy\?\[31m\) and requires a wait of 300 s; try again later"
        with pytest.raises(ChatServerError, match=message):
            captioner.caption(image, prompts[:1])
        assert len(server.bodies) == 1


def test_responses_have_a_size_limit(image, prompts, monkeypatch):
    monkeypatch.setattr(chat_client, "MAX_RESPONSE_BYTES", 10)
    with run_chat_server() as server:
        captioner = sca.load_captioner(f"openai url={server.url} model=mine")
        with pytest.raises(ChatServerError, match="sent more than 10 bytes; check the URL"):
            captioner.caption(image, prompts[:1])


def test_error_cancels_the_other_requests(image, prompts):
    def reject_request(handler):
        handler.send_json({"error": "no"}, 400)

    with run_chat_server(None) as server:
        server.faults = lambda text, number: reject_request if len(server.bodies) == 2 else never_respond
        start = time.monotonic()
        with pytest.raises(ChatServerError, match=r"status 400 \(no\); check url, model and options"):
            sca.load_captioner(f"openai url={server.url} model=mine").caption(image, prompts[:2])
        assert time.monotonic() - start < 10


def never_respond(handler):
    time.sleep(20)


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "has no models; set model=NAME"), (["a", "b\x1b[31m"], r"has a, b\?\[31m; set model=NAME")],
)
def test_model_must_be_named_unless_the_server_has_one(server, image, prompts, names, message):
    server.model_names = names
    with pytest.raises(ChatServerError, match=message):
        sca.load_captioner(f"openai url={server.url}").caption(image, prompts[:1])


def test_empty_texts_are_counted_and_not_cached(image, prompts):
    def refuse_request(handler):
        handler.send_json({"choices": [{"message": {"content": None}, "finish_reason": "length"}]})

    with run_chat_server(lambda text, number: refuse_request) as server:
        captioner = sca.load_captioner(f"openai url={server.url} model=mine")
        for number in (1, 2):
            (caption,) = captioner.caption(image, prompts[:1])
            assert (caption.text, caption.usage) == ("", None)
            assert captioner.usage["empty"] == len(server.bodies) == number


def test_captions_are_one_line(image, prompts):
    completion = make_completion("a dog\n\non the  grass\n")
    with run_chat_server(lambda text, number: lambda handler: handler.send_json(completion)) as server:
        texts = get_texts(captioners.build("openai", url=server.url).caption(image, prompts))
    assert texts == ["a dog on the grass"] * len(prompts)


def test_unwritable_cache_is_reported_and_not_used(server, image, prompts, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "file"))
    captioner = sca.load_captioner(f"openai url={server.url} model=mine")
    captions = captioner.caption(image, prompts)
    assert len(captions) == len(prompts) == len(server.bodies)
    assert "the response cache cannot be written" in caplog.text


@pytest.mark.parametrize(
    ("options", "generation", "message"),
    [
        ("", {"temperature": 0.5}, "temperature has no effect without sampling"),
        ("", {"max_new_tokens": -3}, "max_new_tokens is -3"),
        ("", {"num_beams": 2}, "num_beams"),
        ("extra_body={max_completion_tokens=9}", {"max_new_tokens": 3}, "are both set; omit one of them"),
    ],
)
def test_generation_options_are_checked(server, image, prompts, options, generation, message):
    captioner = sca.load_captioner(f"openai url={server.url} model=mine {options}")
    with pytest.raises(ValueError, match=message):
        captioner.caption(image, prompts[:1], **generation)
    assert server.bodies == []


def test_random_requests_of_extra_body_are_not_cached(server, image, prompts):
    captioner = sca.load_captioner(f"openai url={server.url} model=mine extra_body={{temperature=0.8}}")
    for number in (1, 2):
        captioner.caption(image, prompts[:1])
        assert len(server.bodies) == number


def test_question_records_of_captions_without_scores_are_valid_json(server, tmp_path):
    captioner = sca.load_captioner(f"openai url={server.url} model=mine")
    scenes = {"name": "scenes", "num_images": 1, "questions": True}
    sca.evaluate(captioner, scenes, "test", prompting=PromptingOptions(tasks=("question",)), folder=tmp_path)
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    records = [record for line in lines if "answers" in (record := json.loads(line, parse_constant=pytest.fail))]
    assert {answer["score"] for record in records for answer in record["answers"]} == {None}
