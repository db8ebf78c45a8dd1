"""The chat route behaves as clients of the OpenAI API expect, and says so where it cannot."""

import base64
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sca_registry.contracts import Prompt

from sca.captioners.region_captioner import RegionCaptioner
from sca.cli import run_command
from sca.serve.chat import IGNORED_FIELDS, NEUTRAL_VALUES
from sca.serve.limits import ServerLimits
from sca.serve.root_path import check_root_path
from sca.serve.scheduler import RequestScheduler
from sca.serve.tickets import InferenceRequest, Ticket

ROOT = Path(__file__).resolve().parents[2]
BOX = (10.0, 12.0, 60.0, 70.0)
TEXT_BOX = "box=10,12,60,70"


@pytest.fixture
def openai_client(served):
    """A client of the package `openai`, of a server in this process."""
    openai = pytest.importorskip("openai", reason="needs the package openai")
    return openai.OpenAI(base_url=f"{served()}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def url(png):
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


@pytest.fixture(scope="session")
def user(url):
    """`user(text)`: a message with the image of the scene and a text."""

    def make(text=TEXT_BOX, **image):
        parts = [{"type": "image_url", "image_url": {"url": url}, **image}, {"type": "text", "text": text}]
        return {"role": "user", "content": parts}

    return make


@pytest.fixture
def ask(client):
    """`ask(messages, field=value, ...)`: the response to a request of the chat route."""
    same = client()
    return lambda messages, **fields: same.post("/v1/chat/completions", json={"messages": messages, **fields})


def box_of(response):
    assert response.status_code == 200, response.text
    return tuple(response.json()["region"]["box"])


def message_of(response):
    assert response.status_code == 422, response.text
    return response.json()["error"]["message"]


# --- errors


@pytest.mark.parametrize(
    ("fields", "status", "code", "param", "message"),
    [
        ({"model": "gpt-4o"}, 404, "model_not_found", "model", "no model 'gpt-4o' here: there is 'sca-tiny'"),
        ({"n": 100}, 422, "invalid_value", "n", "less than or equal to 16"),
        ({"logprobs": True}, 422, "unsupported_parameter", "logprobs", "'logprobs' is not supported; leave it out"),
        (
            {"messages": [{"role": "user", "content": "hi"}]},
            422,
            "invalid_value",
            "messages",
            "no message has an image",
        ),
        ({"messages": []}, 422, "invalid_value", "messages", "at least 1 item"),
    ],
)
def test_openai_client_shows_the_reason_of_an_error(openai_client, user, fields, status, code, param, message):
    import openai

    with pytest.raises(openai.APIStatusError) as raised:
        openai_client.chat.completions.create(**{"model": "sca-tiny", "messages": [user()], **fields})
    error = raised.value
    assert (error.status_code, error.code, error.param) == (status, code, param)
    assert error.type == "invalid_request_error"
    assert message in str(error)


@pytest.mark.parametrize(
    ("method", "path", "sent", "status"),
    [
        ("GET", "/v1/nothing", {}, 404),
        ("GET", "/v1/models/other", {}, 404),
        ("GET", "/v1/models/", {}, 404),
        ("GET", "/v1/chat/completions", {}, 405),
        ("POST", "/v1/models", {}, 405),
        ("POST", "/v1/chat/completions", {"content": b"{"}, 415),
        ("POST", "/v1/chat/completions", {"content": b"{", "headers": {"Content-Type": "application/json"}}, 422),
        ("POST", "/v1/chat/completions", {"json": ["x" * 10_000]}, 413),
        ("POST", "/v1/captions", {"json": {}}, 422),
        ("POST", "/v1/captions", {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400),
        ("POST", "/v1/chat/completions", {"headers": {"Authorization": "Bearer wrong"}}, 401),
    ],
)
def test_every_error_of_the_api_is_an_error_object(client, method, path, sent, status):
    headers = {"Authorization": "Bearer right", **sent.get("headers", {})}
    response = client(ServerLimits(max_body_bytes=9_000), keys=["right"]).request(
        method, path, **{**sent, "headers": headers}
    )
    assert response.status_code == status
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert "\n" not in error["message"]
    assert error["code"]


def test_an_error_of_the_server_is_an_error_object(client, user, tiny, monkeypatch):
    same = client()
    monkeypatch.setattr(tiny, "caption_batch", lambda *_, **__: 1 / 0)
    response = same.post("/v1/chat/completions", json={"messages": [user()]})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    same.app.state.scheduler.drain(0)
    response = same.post("/v1/chat/completions", json={"messages": [user()]})
    assert (response.status_code, response.json()["error"]["type"]) == (503, "server_error")


# --- generation


def test_openai_client_gets_a_caption_with_its_usage(openai_client, user, tiny, scene):
    (expected,) = tiny.caption(scene.image, [Prompt(box=BOX)])
    told = openai_client.chat.completions.create(model="sca-tiny", messages=[user()])
    (choice,) = told.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", expected.text, "stop")
    tokens = len(tiny.model.language_model.tokenizer.encode(expected.text))
    assert told.usage.completion_tokens == tokens
    assert told.usage.prompt_tokens == expected.usage.prompt_tokens > 0
    assert told.usage.total_tokens == told.usage.prompt_tokens + tokens
    assert told.region["box"] == list(BOX)
    assert [each.id for each in openai_client.models.list()] == ["sca-tiny"]
    assert openai_client.models.retrieve("sca-tiny").id == "sca-tiny"


def test_openai_client_sees_that_a_caption_was_cut(openai_client, user):
    create = openai_client.chat.completions.create
    cut = create(model="sca-tiny", messages=[user()], max_tokens=2)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 2)
    whole = create(model="sca-tiny", messages=[user()], max_completion_tokens=64)
    assert whole.choices[0].finish_reason == "stop"
    assert whole.choices[0].message.content.startswith(cut.choices[0].message.content)
    streamed = list(create(model="sca-tiny", messages=[user()], max_tokens=2, n=2, stream=True))
    ends = {chunk.choices[0].index: chunk.choices[0].finish_reason for chunk in streamed}
    assert ends == {0: "length", 1: "length"}


def test_openai_client_gets_usage_at_the_end_of_a_stream(openai_client, user):
    create = openai_client.chat.completions.create
    whole = create(model="sca-tiny", messages=[user()])
    chunks = list(create(model="sca-tiny", messages=[user()], stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    plain = list(create(model="sca-tiny", messages=[user()], stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in plain)


def test_stream_options_without_a_stream_are_refused(ask, user):
    assert "stream=true" in message_of(ask([user()], stream_options={"include_usage": True}))


def test_a_seed_gives_the_same_captions_whatever_else_is_asked(ask, user):
    def captions(**fields):
        told = ask([user()], temperature=2, **fields).json()["choices"]
        return [choice["message"]["content"] for choice in told]

    first = captions(seed=7, n=3)
    captions()  # draws without a seed
    assert captions(seed=7, n=3) == first
    assert len({captions(seed=seed)[0] for seed in range(6)}) > 1
    assert len({captions(seed=-(2**63))[0], captions(seed=-(2**63))[0]}) == 1
    assert len({captions()[0] for _ in range(6)}) > 1


def test_a_small_top_p_leaves_the_likeliest_tokens(ask, user):
    likeliest = ask([user()]).json()["choices"][0]["message"]["content"]
    for fields in ({"temperature": 2, "top_p": 1e-6}, {"top_p": 0}, {"top_p": 1}, {"temperature": 0, "top_p": 0.9}):
        assert ask([user()], **fields).json()["choices"][0]["message"]["content"] == likeliest
    drawn = {ask([user()], top_p=0.99, seed=seed).json()["choices"][0]["message"]["content"] for seed in range(8)}
    assert len(drawn) > 1, "top_p alone draws with temperature 1"


def test_stop_ends_a_caption_before_its_text(ask, user):
    whole = ask([user()]).json()["choices"][0]["message"]["content"]
    first, second = whole.split()[1:3]
    for stop, end in ((second, second), (["never there", second], second), ([second, first], first)):
        (choice,) = ask([user()], stop=stop).json()["choices"]
        assert choice["message"]["content"] == whole[: whole.index(end)]
        assert choice["finish_reason"] == "stop"
    assert ask([user()], stop=[]).json()["choices"][0]["message"]["content"] == whole


def test_n_gives_as_many_choices(ask, user):
    for fields in ({"n": 3}, {"n": 3, "temperature": 1, "seed": 1}):
        told = ask([user()], **fields).json()
        assert [choice["index"] for choice in told["choices"]] == [0, 1, 2]
        assert told["usage"]["completion_tokens"] > 3


def test_n_is_1_whatever_the_checkpoint_has_as_default(ask, user, tiny, monkeypatch):
    monkeypatch.setattr(
        tiny.model, "spec", tiny.model.spec.apply_overrides(["generation={num_beams=3, num_captions=3}"])
    )
    told = ask([user()]).json()
    assert len(told["choices"]) == 1
    assert told["usage"]["completion_tokens"] < 20


def test_captions_of_a_region_count_in_what_a_turn_may_cost(scheduler, scene):
    def cost(**generation):
        prompt = Prompt(box=BOX)
        ticket = Ticket(
            InferenceRequest(scene.image, [prompt], generation=generation, return_masks=False), lambda _: None
        )
        return RequestScheduler._make_cost_function(scheduler, ticket)(prompt)

    assert cost(do_sample=True, num_captions=16) == 16 * cost(do_sample=True)
    assert cost(num_beams=16, num_captions=16) == 16 * cost()
    assert cost(do_sample=True, seed=1) == scheduler.max_regions_per_turn, "seeded regions are captioned one at a time"


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 0},
        {"n": 17},
        {"n": True},
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"seed": 2**63},
        {"seed": -(2**63) - 1},
        {"seed": 1.5},
        {"stop": ""},
        {"stop": ["a"] * 5},
        {"stop": "a" * 257},
        {"stop": [""]},
        {"temperature": 2.1},
        {"max_tokens": 0},
    ],
)
def test_fields_of_a_chat_have_limits(ask, user, fields):
    (name,) = fields
    assert name in message_of(ask([user()], **fields))


def test_client_example_of_the_manual_runs(served, monkeypatch, capsys):
    pytest.importorskip("openai", reason="needs the package openai")
    monkeypatch.chdir(ROOT)
    (example,) = re.findall(
        r"^```py\n(.*?)^```", (ROOT / "docs/serving.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    assert "http://127.0.0.1:8000/v1" in example
    exec(example.replace("http://127.0.0.1:8000", served()), {})
    assert capsys.readouterr().out.endswith("[370.0, 434.0, 448.0, 512.0]\n")


# --- fields that cannot be honored


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f", "parameters": {}}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("logprobs", True),
        ("logprobs", 1),
        ("top_logprobs", 3),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("logit_bias", {"1": 5}),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "a"}),
        ("web_search_options", {}),
        ("top_k", 5),
        ("guided_choice", ["a"]),
        ("bbox", [1, 2, 3, 4]),
    ],
)
def test_a_field_that_cannot_be_honored_is_refused_by_its_name(ask, user, name, value):
    response = ask([user()], **{name: value})
    assert message_of(response) == f"the field {name!r} is not supported; leave it out"
    assert response.json()["error"]["param"] == name


@pytest.mark.parametrize(("name", "value"), [("n", 2), ("temperature", 0.5), ("top_p", 0.5)])
def test_a_field_that_a_captioner_does_not_take_is_refused_by_its_name(ask, user, tiny, monkeypatch, name, value):
    monkeypatch.setattr(type(tiny), "generation_options", RegionCaptioner.generation_options, raising=False)
    accepted = {"n": 1, "seed": 1, "max_tokens": 5, **({"temperature": 0} if name != "top_p" else {})}
    assert ask([user()], **accepted).status_code == 200
    assert f"{name!r} is not supported by this model" in message_of(ask([user()], **{**accepted, name: value}))


def test_fields_that_ask_for_nothing_are_accepted(ask, user):
    neutral = {name: values[0] for name, values in NEUTRAL_VALUES.items()}
    assert ask([user()], **neutral).status_code == 200
    assert (
        ask([user()], **dict.fromkeys((*NEUTRAL_VALUES, "n", "stop", "seed", "top_p", "stream", "unknown"))).status_code
        == 200
    )
    assert ask([user()], **dict.fromkeys(IGNORED_FIELDS, "x")).status_code == 200


# --- messages

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
HISTORIES = {
    "tool call": [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "ok"},
    ],
    "without content": [
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": [], "tool_call_id": "1"},
    ],
    "function": [
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": '{"temperature": 21}'},
    ],
    "refusal": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "refusal": None}],
    "names": [{"role": "system", "name": "a", "content": "Be brief."}, {"role": "developer", "content": "In English."}],
    "file": [
        {"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]},
        {"role": "assistant", "content": "a"},
    ],
    "tool parts": [{"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "ok"}]}],
    "thinking": [{"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}], "reasoning_content": "hm"}],
    "null": [{"role": "user", "content": None}, {"role": "assistant", "content": None}],
}


@pytest.mark.parametrize("name", HISTORIES)
def test_a_history_is_accepted_in_any_shape(ask, user, name):
    assert box_of(ask([*HISTORIES[name], user()])) == BOX


@pytest.mark.parametrize("name", ["tool call", "without content", "function"])
def test_a_region_holds_while_tools_are_called(ask, user, name):
    assert box_of(ask([user(), *HISTORIES[name]])) == BOX


def test_a_region_holds_for_further_questions_on_its_image(ask, user, url, scene):
    answer = {"role": "assistant", "content": "a circle"}
    coordinates = {"role": "assistant", "content": "a circle, box=1,1,5,5"}
    more = {"role": "user", "content": "Are you sure?"}
    other = {"role": "user", "content": "And at box=1,2,30,40?"}
    whole = (0, 0, *scene.image.size)
    assert box_of(ask([user(), coordinates, more])) == BOX
    assert box_of(ask([user(), answer, other])) == (1, 2, 30, 40)
    assert box_of(ask([user(), answer, other, answer, more])) == (1, 2, 30, 40)
    assert box_of(ask([user("What is this?"), answer, more])) == whole
    assert box_of(ask([user(), answer, user("And this?")])) == BOX, "the same image again"
    assert box_of(ask([user(), answer, user("And this?", image_url=f"{url}=")])) == whole, "another image"
    assert box_of(ask([user("And this?", image_url=f"{url}="), answer, user(), answer, user("And this?")])) == BOX
    assert box_of(ask([{"role": "user", "content": TEXT_BOX}, user("Here it is")])) == BOX
    assert box_of(ask([{"role": "user", "content": TEXT_BOX}, answer, user("Here it is")])) == BOX


@pytest.mark.parametrize("role", ["system", "developer", "assistant", "tool", "function"])
def test_coordinates_in_a_message_of_another_role_are_not_overlooked(ask, user, role):
    message = {"role": role, "content": '{"bbox_2d": [10, 12, 60, 70]}'}
    assert f"role {role!r} has coordinates" in message_of(ask([user("What is this?"), message]))
    assert box_of(ask([message, user()])) == BOX
    assert box_of(ask([message, user("What is this?")], box=[1, 2, 30, 40])) == (1, 2, 30, 40)


def test_several_regions_or_images_for_one_answer_are_refused(ask, user, url):
    assert "more than one box" in message_of(ask([user(f"{TEXT_BOX} or [1,2,30,40]")]))
    assert "more than one box" in message_of(ask([user(), {"role": "user", "content": "box=1,2,30,40"}]))
    other = {"type": "image_url", "image_url": {"url": f"{url}="}}
    two = {"role": "user", "content": [other, *user()["content"]]}
    assert "2 images" in message_of(ask([two]))
    same = {"role": "user", "content": [user()["content"][0], *user()["content"]]}
    assert box_of(ask([same])) == BOX


def test_parts_and_fields_that_are_not_read_are_refused(ask, user):
    audio = {"role": "user", "content": [*user()["content"], {"type": "input_audio", "input_audio": {"data": ""}}]}
    assert "'input_audio' cannot be answered" in message_of(ask([audio]))
    for message in ({**user("What?"), "bbox": [1, 2, 3, 4]}, user("What?", region=[1, 2, 3, 4])):
        assert "is not read; give box, points or mask" in message_of(ask([message]))
    assert box_of(ask([user(cache_control={"type": "ephemeral"}, detail="low", crop=None)])) == BOX


@pytest.mark.parametrize(
    "name",
    [
        *("crop", "coordinates", "polygon", "xyxy", "rect", "area", "selection", "boundingBox", "crop_box", "cropArea"),
        *("keypoints", "bbox-2d", "segmentation"),
    ],
)
def test_a_region_in_an_unknown_field_is_refused(ask, user, name):
    message = user("What is this?")
    message["content"][1][name] = [1, 2, 3, 4]
    assert f"the field {name!r} of a message is not read" in message_of(ask([message]))


def test_a_long_history_without_coordinates_is_accepted(ask, user, scene):
    text = "Please describe what the picture shows. " * 100
    messages = [user("What is this?"), *[{"role": "user", "content": text}] * 17]
    assert box_of(ask(messages)) == (0, 0, *scene.image.size)
    assert "1,048,576 are allowed" in ask([user("x" * (2**20 + 1))]).json()["error"]["message"]


def _with_content(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    ("fields", "param", "start"),
    [
        ({"stop": ""}, "stop", "stop: String should have at least 1 character"),
        ({"stop": [""]}, "stop.0", "stop.0: String should have at least 1 character"),
        ({"stop": ["a"] * 5}, "stop", "stop: List should have at most 4 items"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "messages.0.content: Input should be"),
        (
            _with_content({"type": "image_url", "image_url": {}}),
            "messages.0.content.0.image_url.url",
            "messages.0.content.0.image_url.url: Field required",
        ),
        (
            _with_content({"type": "image_url", "image_url": 5}),
            "messages.0.content.0.image_url",
            "messages.0.content.0.image_url: Input should be",
        ),
        (
            _with_content({"type": "text", "text": 5}),
            "messages.0.content.0.text",
            "messages.0.content.0.text: Input should be a valid string",
        ),
        (_with_content({"type": "image_url", "image_url": "http://a.b"}), "messages", "image_url: pictures are not"),
        (_with_content({"type": "image_url", "image_url": "a=b"}), "messages", "image_url: not base64"),
        ({"points": [[5000, 1]]}, None, "the region: the point 5000,1,1 is outside"),
        ({"box": [1, 2, 3]}, None, "the region, 'box': a box is 4 numbers"),
    ],
)
def test_an_error_names_the_field_that_was_sent(ask, user, fields, param, start):
    response = ask(**{"messages": [user()], **fields})
    assert message_of(response).startswith(start)
    assert response.json()["error"]["param"] == param
    assert not re.search(r"ImageUrl|Part\b|constrained|union|prompts", message_of(response))


def test_an_image_is_read_as_clients_send_it(ask, png, url):
    data = base64.b64encode(png).decode()
    lines = base64.encodebytes(png).decode()
    web = base64.urlsafe_b64encode(png).decode()
    spellings = {
        "string": url,
        "object": {"url": url, "detail": "high"},
        "bare": data,
        "line breaks": f"data:image/png;base64,{lines}",
        "windows line breaks": lines.replace("\n", "\r\n"),
        "no padding": f"data:image/png;base64,{data.rstrip('=')}",
        "more padding": f"{data}==",
        "url-safe": f"data:image/png;base64,{web}",
        "url-safe without padding": web.rstrip("="),
        "case": f"DATA:Image/PNG;BASE64,{data}",
        "parameters": f"data:image/png;charset=utf-8;base64,{data}",
        "no type": f"data:;base64,{data}",
        "space": f" data:image/png;base64, {data} ",
        "percent": f"data:image/png;base64,{data.replace('+', '%2B').replace('/', '%2f').replace('=', '%3D')}",
    }
    for name, image in spellings.items():
        content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": TEXT_BOX}]
        response = ask([{"role": "user", "content": content}])
        assert response.status_code == 200, (name, response.text)
        assert box_of(response) == BOX
    content = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": TEXT_BOX}]
    assert box_of(ask([{"role": "user", "content": content}])) == BOX


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("http://127.0.0.1/a.png", "pictures are not fetched from elsewhere"),
        ("HTTPS://example.org/a.png", "pictures are not fetched from elsewhere"),
        ("file:///etc/passwd", "pictures are not fetched from elsewhere"),
        ("data:image/png,abc", "a data: URL in base64"),
        ("data:image/png;base64", "a data: URL in base64"),
        ("data:image/png;base64,a=bc", "not base64"),
        ("data:image/png;base64,abcde", "not base64"),
        ("data:image/png;base64,ab!d", "not base64"),
        ("data:image/png;base64,abcé", "not base64"),
        ("data:image/png;base64,", "the image is empty"),
    ],
)
def test_an_image_that_cannot_be_read_is_refused(ask, image, message):
    content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": TEXT_BOX}]
    assert message in message_of(ask([{"role": "user", "content": content}]))


# --- generated requests

SPELLINGS = [
    "box={0},{1},{2},{3}",
    "Box: {0}, {1}, {2}, {3}",
    "box=[{0},{1},{2},{3}]",
    '{{"bbox_2d": [{0}, {1}, {2}, {3}]}}',
    "<box>({0},{1}),({2},{3})</box>",
    "<|box_start|>({0},{1}),({2},{3})<|box_end|>",
    "[{0}, {1}, {2}, {3}]",
    "({0} {1} {2} {3})",
    "x1={0} y1={1} x2={2} y2={3}",
    "bounding box {0} {1} {2} {3}",
]
SENTENCES = st.sampled_from(
    ["", "What is this?", "Use 2 or 3 words.", "It was seen at 10:30.", "Please caption:", "\n"]
)
BOXES = st.tuples(*[st.integers(0, 40)] * 2, *[st.integers(50, 96)] * 2)
PARTS = st.sampled_from([None, "", [], "ok", [{"type": "text", "text": "ok"}], [{"type": "refusal", "refusal": "no"}]])
FIELDS = {
    "n": st.integers(1, 3),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "max_tokens": st.integers(1, 6),
    "stop": st.one_of(st.text(min_size=1, max_size=5), st.lists(st.text(min_size=1, max_size=5), max_size=4)),
    "stream": st.sampled_from([False, None]),
    "user": st.text(max_size=5),
    "tools": st.just([]),
}


@st.composite
def conversations(draw):
    """Messages without the image, and the box that the last turn is about, None for the whole image."""
    messages, box = [], None
    for role in draw(st.lists(st.sampled_from(["system", "developer", "assistant", "tool call", "user"]), max_size=5)):
        if role == "tool call":
            messages.append({"role": "assistant", "content": draw(PARTS), "tool_calls": [CALL]})
            messages.append({"role": "tool", "tool_call_id": "1", "content": draw(PARTS)})
        elif role == "user":
            messages.append({"role": "user", "content": draw(SENTENCES)})
        else:
            messages.append({"role": role, "content": draw(PARTS)})
    texts = [draw(SENTENCES), draw(SENTENCES)]
    if draw(st.booleans()):
        box = draw(BOXES)
        texts.insert(1, draw(st.sampled_from(SPELLINGS)).format(*box))
    messages.insert(draw(st.integers(0, len(messages))), {"role": "user", "content": " ".join(texts)})
    return messages, box


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.all)])
def test_generated_conversations_never_lose_their_region(ask, url, scene, count):
    statuses = []

    @given(
        conversations(), st.fixed_dictionaries({}, optional=FIELDS), st.booleans(), st.randoms(use_true_random=False)
    )
    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    def try_one(conversation, fields, is_string, draw):
        messages, box = conversation
        place = draw.choice([number for number, each in enumerate(messages) if each["role"] == "user"])
        image = {"type": "image_url", "image_url": url if is_string else {"url": url}}
        parts = [image, {"type": "text", "text": messages[place]["content"]}]
        draw.shuffle(parts)
        response = ask([*messages[:place], {"role": "user", "content": parts}, *messages[place + 1 :]], **fields)
        statuses.append(response.status_code)
        assert box_of(response) == (box or (0, 0, *scene.image.size)), messages
        assert len(response.json()["choices"]) == fields.get("n", 1)

    try_one()
    assert len(statuses) >= count


# --- the page


@pytest.mark.parametrize(
    ("text", "path"), [("", ""), ("/", ""), ("captions", "/captions"), ("/a/b-c.d/", "/a/b-c.d"), ("/~me", "/~me")]
)
def test_check_root_path_begins_with_a_slash_and_ends_with_none(text, path):
    assert check_root_path(text) == path


@pytest.mark.parametrize("text", ["https://example.org/a", "/a?b", "/a/../b", "/a//b", "/a b", "/é"])
def test_check_root_path_refuses_what_is_no_path(text, capsys):
    assert run_command(["serve", "--root-path", text]) == 2
    assert "is not a path; write it as /captions" in capsys.readouterr().err


def test_check_root_path_refuses_the_start_of_a_route(client):
    routes = [route.path for route in client().app.routes if route.path != "/"]
    assert len(routes) > 7
    for path in {*("/v1", "docs/", "/v1/chat"), *(re.sub(r"/\{.*", "", route) for route in routes)}:
        with pytest.raises(ValueError, match=r"is the start of a route of the server; choose another, like /captions$"):
            check_root_path(path)
    assert check_root_path("/v1x") == "/v1x"
    assert check_root_path("/a/v1") == "/a/v1"


@pytest.mark.parametrize("prefix", ["", "/captions"])
def test_docs_work_below_a_path(client, user, prefix):
    """The proxy may remove the path or leave it."""
    below = client(root_path="/captions", keys=["key"])
    below.headers["Authorization"] = "Bearer key"
    page = below.get(f"{prefix}/docs").text
    addresses = re.findall(r"""(?:src|href)="(.+?)"|url: '(.+?)'""", page)
    assert len(addresses) >= 3
    for address in map("".join, addresses):
        assert address.startswith("/captions/")
        assert below.get(f"{prefix}{address.removeprefix('/captions')}").status_code == 200
    assert below.get(f"{prefix}/openapi.json").json()["servers"] == [{"url": "/captions"}]
    assert below.get(f"{prefix}/", follow_redirects=False).headers["location"] == "/captions/docs"
    assert below.post(f"{prefix}/v1/chat/completions", json={"messages": [user()]}).status_code == 200
    del below.headers["Authorization"]
    assert below.get(f"{prefix}/health").status_code == 200
    assert below.get(f"{prefix}/v1/models").status_code == 401
