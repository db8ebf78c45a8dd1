"""Chat completions: compatibility with clients of the OpenAI API, and rejection of unsupported requests."""

import base64
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sca_registry.contracts import Prompt

from sca.captioners.region_captioner import RegionCaptioner
from sca.cli import run_command
from sca.serve.chat_completions import IGNORED_FIELDS, NEUTRAL_VALUES
from sca.serve.inference_requests import InferenceRequest, QueueEntry
from sca.serve.limits import ServerLimits
from sca.serve.root_path import check_root_path
from sca.serve.scheduler import RequestScheduler

ROOT = Path(__file__).resolve().parents[2]
BOX = (10.0, 12.0, 60.0, 70.0)
TEXT_BOX = "box=10,12,60,70"


@pytest.fixture
def openai_client(start_server):
    """Client of the package `openai` for a server in this process."""
    openai = pytest.importorskip("openai", reason="requires the package openai")
    return openai.OpenAI(base_url=f"{start_server()}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def image_url(png_bytes):
    return f"data:image/png;base64,{base64.b64encode(png_bytes).decode()}"


@pytest.fixture(scope="session")
def make_message(image_url):
    """Function that returns a user message with the image of the scene and a text."""

    def make(text=TEXT_BOX, **image):
        parts = [{"type": "image_url", "image_url": {"url": image_url}, **image}, {"type": "text", "text": text}]
        return {"role": "user", "content": parts}

    return make


@pytest.fixture
def send_chat(make_client):
    """Function that sends messages and other fields to the chat route and returns the response."""
    client = make_client()
    return lambda messages, **fields: client.post("/v1/chat/completions", json={"messages": messages, **fields})


def get_box(response):
    assert response.status_code == 200, response.text
    return tuple(response.json()["region"]["box"])


def get_error_message(response):
    assert response.status_code == 422, response.text
    return response.json()["error"]["message"]


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "status", "code", "param", "message"),
    [
        (
            {"model": "gpt-4o"},
            404,
            "model_not_found",
            "model",
            "unknown model 'gpt-4o'; this server provides 'sca-tiny'",
        ),
        ({"n": 100}, 422, "invalid_value", "n", "less than or equal to 16"),
        ({"logprobs": True}, 422, "unsupported_parameter", "logprobs", "'logprobs' is not supported; remove it"),
        (
            {"messages": [{"role": "user", "content": "hi"}]},
            422,
            "invalid_value",
            "messages",
            "no message contains an image",
        ),
        ({"messages": []}, 422, "invalid_value", "messages", "at least 1 item"),
    ],
)
@pytest.mark.slow
def test_openai_client_raises_the_error_of_the_server(
    openai_client, make_message, fields, status, code, param, message
):
    import openai

    with pytest.raises(openai.APIStatusError) as raised:
        openai_client.chat.completions.create(**{"model": "sca-tiny", "messages": [make_message()], **fields})
    error = raised.value
    assert (error.status_code, error.code, error.param) == (status, code, param)
    assert error.type == "invalid_request_error"
    assert message in str(error)


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
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
def test_client_errors_have_the_openai_error_format(make_client, method, path, options, status):
    headers = {"Authorization": "Bearer right", **options.get("headers", {})}
    response = make_client(ServerLimits(max_body_bytes=9_000), api_keys=["right"]).request(
        method, path, **{**options, "headers": headers}
    )
    assert response.status_code == status
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert "\n" not in error["message"]
    assert error["code"]


def test_server_errors_have_the_openai_error_format(make_client, make_message, captioner, monkeypatch):
    client = make_client()
    monkeypatch.setattr(captioner, "caption_batch", lambda *_, **__: 1 / 0)
    response = client.post("/v1/chat/completions", json={"messages": [make_message()]})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    client.app.state.scheduler.drain(0)
    response = client.post("/v1/chat/completions", json={"messages": [make_message()]})
    assert (response.status_code, response.json()["error"]["type"]) == (503, "server_error")


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_openai_client_receives_caption_and_usage(openai_client, make_message, captioner, scene):
    (expected,) = captioner.caption(scene.image, [Prompt(box=BOX)])
    completion = openai_client.chat.completions.create(model="sca-tiny", messages=[make_message()])
    (choice,) = completion.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", expected.text, "stop")
    tokens = len(captioner.model.language_model.tokenizer.encode(expected.text))
    assert completion.usage.completion_tokens == tokens
    assert completion.usage.prompt_tokens == expected.usage.prompt_tokens > 0
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + tokens
    assert completion.region["box"] == list(BOX)
    assert [each.id for each in openai_client.models.list()] == ["sca-tiny"]
    assert openai_client.models.retrieve("sca-tiny").id == "sca-tiny"


@pytest.mark.slow
def test_openai_client_receives_finish_reason_length_for_truncated_caption(openai_client, make_message):
    create = openai_client.chat.completions.create
    truncated = create(model="sca-tiny", messages=[make_message()], max_tokens=2)
    assert (truncated.choices[0].finish_reason, truncated.usage.completion_tokens) == ("length", 2)
    completion = create(model="sca-tiny", messages=[make_message()], max_completion_tokens=64)
    assert completion.choices[0].finish_reason == "stop"
    assert completion.choices[0].message.content.startswith(truncated.choices[0].message.content)
    chunks = list(create(model="sca-tiny", messages=[make_message()], max_tokens=2, n=2, stream=True))
    finish_reasons = {chunk.choices[0].index: chunk.choices[0].finish_reason for chunk in chunks}
    assert finish_reasons == {0: "length", 1: "length"}


@pytest.mark.slow
def test_openai_client_receives_usage_in_last_chunk(openai_client, make_message):
    create = openai_client.chat.completions.create
    completion = create(model="sca-tiny", messages=[make_message()])
    chunks = list(
        create(model="sca-tiny", messages=[make_message()], stream=True, stream_options={"include_usage": True})
    )
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == completion.choices[0].message.content
    )
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])
    assert (chunks[-1].choices, chunks[-1].usage) == ([], completion.usage)
    plain_chunks = list(create(model="sca-tiny", messages=[make_message()], stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in plain_chunks)


def test_chat_route_rejects_stream_options_without_stream(send_chat, make_message):
    assert "stream=true" in get_error_message(send_chat([make_message()], stream_options={"include_usage": True}))


@pytest.mark.slow
def test_seed_makes_sampled_captions_reproducible(send_chat, make_message):
    def sample_captions(**fields):
        choices = send_chat([make_message()], temperature=2, **fields).json()["choices"]
        return [choice["message"]["content"] for choice in choices]

    first_captions = sample_captions(seed=7, n=3)
    sample_captions()  # samples without a seed in between
    assert sample_captions(seed=7, n=3) == first_captions
    assert len({sample_captions(seed=seed)[0] for seed in range(6)}) > 1
    assert len({sample_captions(seed=-(2**63))[0], sample_captions(seed=-(2**63))[0]}) == 1
    assert len({sample_captions()[0] for _ in range(6)}) > 1


def test_small_top_p_selects_the_likeliest_tokens(send_chat, make_message):
    greedy_caption = send_chat([make_message()]).json()["choices"][0]["message"]["content"]
    for fields in ({"temperature": 2, "top_p": 1e-6}, {"top_p": 0}, {"top_p": 1}, {"temperature": 0, "top_p": 0.9}):
        assert send_chat([make_message()], **fields).json()["choices"][0]["message"]["content"] == greedy_caption
    sampled_captions = {
        send_chat([make_message()], top_p=0.99, seed=seed).json()["choices"][0]["message"]["content"]
        for seed in range(8)
    }
    assert len(sampled_captions) > 1, "top_p without temperature samples with temperature 1"


def test_stop_truncates_caption_before_the_stop_sequence(send_chat, make_message):
    full_caption = send_chat([make_message()]).json()["choices"][0]["message"]["content"]
    first, second = full_caption.split()[1:3]
    for stop, end in ((second, second), (["never there", second], second), ([second, first], first)):
        (choice,) = send_chat([make_message()], stop=stop).json()["choices"]
        assert choice["message"]["content"] == full_caption[: full_caption.index(end)]
        assert choice["finish_reason"] == "stop"
    assert send_chat([make_message()], stop=[]).json()["choices"][0]["message"]["content"] == full_caption


def test_n_sets_the_number_of_choices(send_chat, make_message):
    for fields in ({"n": 3}, {"n": 3, "temperature": 1, "seed": 1}):
        body = send_chat([make_message()], **fields).json()
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
        assert body["usage"]["completion_tokens"] > 3


def test_n_defaults_to_1_for_any_checkpoint(send_chat, make_message, captioner, monkeypatch):
    monkeypatch.setattr(
        captioner.model, "spec", captioner.model.spec.apply_overrides(["generation={num_beams=3, num_captions=3}"])
    )
    body = send_chat([make_message()]).json()
    assert len(body["choices"]) == 1
    assert body["usage"]["completion_tokens"] < 20


def test_scheduler_cost_grows_with_number_of_captions(scheduler, scene):
    def estimate_cost(**generation):
        prompt = Prompt(box=BOX)
        entry = QueueEntry(
            InferenceRequest(scene.image, [prompt], generation=generation, return_masks=False), lambda _: None
        )
        return RequestScheduler._make_cost_function(scheduler, entry)(prompt)

    assert estimate_cost(do_sample=True, num_captions=16) == 16 * estimate_cost(do_sample=True)
    assert estimate_cost(num_beams=16, num_captions=16) == 16 * estimate_cost()
    assert estimate_cost(do_sample=True, seed=1) == scheduler.max_regions_per_turn, (
        "seeded regions are captioned one at a time"
    )


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
def test_chat_route_rejects_out_of_range_values(send_chat, make_message, fields):
    (name,) = fields
    assert name in get_error_message(send_chat([make_message()], **fields))


@pytest.mark.slow
def test_openai_example_of_readme_runs(start_server, monkeypatch, capsys):
    pytest.importorskip("openai", reason="requires the package openai")
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/serving.md").read_text("utf-8")
    (example,) = re.findall(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert "http://127.0.0.1:8000/v1" in example
    exec(example.replace("http://127.0.0.1:8000", start_server()), {})
    assert capsys.readouterr().out.endswith("[370.0, 434.0, 448.0, 512.0]\n")


# --- unsupported fields ----------------------------------------------------------------------------------------------


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
@pytest.mark.slow
def test_chat_route_rejects_unsupported_field_by_name(send_chat, make_message, name, value):
    response = send_chat([make_message()], **{name: value})
    assert get_error_message(response) == f"the field {name!r} is not supported; remove it"
    assert response.json()["error"]["param"] == name


@pytest.mark.parametrize(("name", "value"), [("n", 2), ("temperature", 0.5), ("top_p", 0.5)])
def test_chat_route_rejects_field_unsupported_by_captioner(
    send_chat, make_message, captioner, monkeypatch, name, value
):
    monkeypatch.setattr(type(captioner), "generation_options", RegionCaptioner.generation_options, raising=False)
    accepted = {"n": 1, "seed": 1, "max_tokens": 5, **({"temperature": 0} if name != "top_p" else {})}
    assert send_chat([make_message()], **accepted).status_code == 200
    assert f"{name!r} is not supported by this model" in get_error_message(
        send_chat([make_message()], **{**accepted, name: value})
    )


def test_chat_route_accepts_neutral_values_and_ignored_fields(send_chat, make_message):
    neutral_fields = {name: values[0] for name, values in NEUTRAL_VALUES.items()}
    assert send_chat([make_message()], **neutral_fields).status_code == 200
    assert (
        send_chat(
            [make_message()], **dict.fromkeys((*NEUTRAL_VALUES, "n", "stop", "seed", "top_p", "stream", "unknown"))
        ).status_code
        == 200
    )
    assert send_chat([make_message()], **dict.fromkeys(IGNORED_FIELDS, "x")).status_code == 200


# --- messages --------------------------------------------------------------------------------------------------------

TOOL_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
HISTORIES = {
    "tool call": [
        {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "ok"},
    ],
    "without content": [
        {"role": "assistant", "tool_calls": [TOOL_CALL]},
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
def test_chat_route_accepts_history_of_any_content(send_chat, make_message, name):
    assert get_box(send_chat([*HISTORIES[name], make_message()])) == BOX


@pytest.mark.parametrize("name", ["tool call", "without content", "function"])
def test_region_persists_across_tool_calls(send_chat, make_message, name):
    assert get_box(send_chat([make_message(), *HISTORIES[name]])) == BOX


def test_region_persists_in_later_turns_about_its_image(send_chat, make_message, image_url, scene):
    reply = {"role": "assistant", "content": "a circle"}
    reply_with_box = {"role": "assistant", "content": "a circle, box=1,1,5,5"}
    question = {"role": "user", "content": "Are you sure?"}
    box_question = {"role": "user", "content": "And at box=1,2,30,40?"}
    full_image_box = (0, 0, *scene.image.size)
    assert get_box(send_chat([make_message(), reply_with_box, question])) == BOX
    assert get_box(send_chat([make_message(), reply, box_question])) == (1, 2, 30, 40)
    assert get_box(send_chat([make_message(), reply, box_question, reply, question])) == (1, 2, 30, 40)
    assert get_box(send_chat([make_message("What is this?"), reply, question])) == full_image_box
    assert get_box(send_chat([make_message(), reply, make_message("And this?")])) == BOX, "the same image again"
    assert (
        get_box(send_chat([make_message(), reply, make_message("And this?", image_url=f"{image_url}=")]))
        == full_image_box
    ), "another image"
    assert (
        get_box(
            send_chat(
                [
                    make_message("And this?", image_url=f"{image_url}="),
                    reply,
                    make_message(),
                    reply,
                    make_message("And this?"),
                ]
            )
        )
        == BOX
    )
    assert get_box(send_chat([{"role": "user", "content": TEXT_BOX}, make_message("Here it is")])) == BOX
    assert get_box(send_chat([{"role": "user", "content": TEXT_BOX}, reply, make_message("Here it is")])) == BOX


@pytest.mark.parametrize("role", ["system", "developer", "assistant", "tool", "function"])
def test_chat_route_rejects_coordinates_in_messages_of_other_roles_only(send_chat, make_message, role):
    message = {"role": role, "content": '{"bbox_2d": [10, 12, 60, 70]}'}
    assert f"role {role!r} contains coordinates" in get_error_message(
        send_chat([make_message("What is this?"), message])
    )
    assert get_box(send_chat([message, make_message()])) == BOX
    assert get_box(send_chat([message, make_message("What is this?")], box=[1, 2, 30, 40])) == (1, 2, 30, 40)


def test_chat_route_rejects_several_regions_or_images_per_turn(send_chat, make_message, image_url):
    assert "more than one box" in get_error_message(send_chat([make_message(f"{TEXT_BOX} or [1,2,30,40]")]))
    assert "more than one box" in get_error_message(
        send_chat([make_message(), {"role": "user", "content": "box=1,2,30,40"}])
    )
    other_image = {"type": "image_url", "image_url": {"url": f"{image_url}="}}
    two_images = {"role": "user", "content": [other_image, *make_message()["content"]]}
    assert "2 images" in get_error_message(send_chat([two_images]))
    repeated_image = {"role": "user", "content": [make_message()["content"][0], *make_message()["content"]]}
    assert get_box(send_chat([repeated_image])) == BOX


def test_chat_route_rejects_unsupported_parts_and_fields(send_chat, make_message):
    audio = {
        "role": "user",
        "content": [*make_message()["content"], {"type": "input_audio", "input_audio": {"data": ""}}],
    }
    assert "'input_audio' is not supported" in get_error_message(send_chat([audio]))
    for message in ({**make_message("What?"), "bbox": [1, 2, 3, 4]}, make_message("What?", region=[1, 2, 3, 4])):
        assert "is not supported; send the region in the field box, points or mask" in get_error_message(
            send_chat([message])
        )
    assert get_box(send_chat([make_message(cache_control={"type": "ephemeral"}, detail="low", crop=None)])) == BOX


@pytest.mark.parametrize(
    "name",
    [
        *("crop", "coordinates", "polygon", "xyxy", "rect", "area", "selection", "boundingBox", "crop_box", "cropArea"),
        *("keypoints", "bbox-2d", "segmentation"),
    ],
)
def test_chat_route_rejects_region_in_unknown_field(send_chat, make_message, name):
    message = make_message("What is this?")
    message["content"][1][name] = [1, 2, 3, 4]
    assert f"the field {name!r} of a message is not supported" in get_error_message(send_chat([message]))


def test_chat_route_accepts_long_history_without_coordinates(send_chat, make_message, scene):
    text = "Please describe what the image shows. " * 100
    messages = [make_message("What is this?"), *[{"role": "user", "content": text}] * 17]
    assert get_box(send_chat(messages)) == (0, 0, *scene.image.size)
    assert (
        "at most 1,048,576 are searched for a region"
        in send_chat([make_message("x" * (2**20 + 1))]).json()["error"]["message"]
    )


def make_fields(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"stop": ""}, "stop", "stop: String should have at least 1 character"),
        ({"stop": [""]}, "stop.0", "stop.0: String should have at least 1 character"),
        ({"stop": ["a"] * 5}, "stop", "stop: List should have at most 4 items"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "messages.0.content: Input should be"),
        (
            make_fields({"type": "image_url", "image_url": {}}),
            "messages.0.content.0.image_url.url",
            "messages.0.content.0.image_url.url: Field required",
        ),
        (
            make_fields({"type": "image_url", "image_url": 5}),
            "messages.0.content.0.image_url",
            "messages.0.content.0.image_url: Input should be",
        ),
        (
            make_fields({"type": "text", "text": 5}),
            "messages.0.content.0.text",
            "messages.0.content.0.text: Input should be a valid string",
        ),
        (make_fields({"type": "image_url", "image_url": "http://a.b"}), "messages", "image_url: image URLs are not"),
        (make_fields({"type": "image_url", "image_url": "a=b"}), "messages", "image_url: the text is not base64"),
        ({"points": [[5000, 1]]}, None, "the region: the point 5000,1,1 is outside"),
        ({"box": [1, 2, 3]}, None, "the region, 'box': cannot parse [1, 2, 3]; write a box as 4 numbers"),
    ],
)
def test_error_names_the_invalid_field(send_chat, make_message, fields, param, message):
    response = send_chat(**{"messages": [make_message()], **fields})
    assert get_error_message(response).startswith(message)
    assert response.json()["error"]["param"] == param
    assert not re.search(r"ImageUrl|Part\b|constrained|union|prompts", get_error_message(response))


def test_chat_route_accepts_image_encodings_of_clients(send_chat, png_bytes, image_url):
    data = base64.b64encode(png_bytes).decode()
    base64_lines = base64.encodebytes(png_bytes).decode()
    urlsafe_data = base64.urlsafe_b64encode(png_bytes).decode()
    encodings = {
        "string": image_url,
        "object": {"url": image_url, "detail": "high"},
        "bare": data,
        "line breaks": f"data:image/png;base64,{base64_lines}",
        "windows line breaks": base64_lines.replace("\n", "\r\n"),
        "no padding": f"data:image/png;base64,{data.rstrip('=')}",
        "more padding": f"{data}==",
        "url-safe": f"data:image/png;base64,{urlsafe_data}",
        "url-safe without padding": urlsafe_data.rstrip("="),
        "case": f"DATA:Image/PNG;BASE64,{data}",
        "parameters": f"data:image/png;charset=utf-8;base64,{data}",
        "no type": f"data:;base64,{data}",
        "space": f" data:image/png;base64, {data} ",
        "percent": f"data:image/png;base64,{data.replace('+', '%2B').replace('/', '%2f').replace('=', '%3D')}",
    }
    for name, image in encodings.items():
        content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": TEXT_BOX}]
        response = send_chat([{"role": "user", "content": content}])
        assert response.status_code == 200, (name, response.text)
        assert get_box(response) == BOX
    content = [{"type": "input_image", "image_url": image_url}, {"type": "input_text", "text": TEXT_BOX}]
    assert get_box(send_chat([{"role": "user", "content": content}])) == BOX


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("http://127.0.0.1/a.png", "image URLs are not fetched"),
        ("HTTPS://example.org/a.png", "image URLs are not fetched"),
        ("file:///etc/passwd", "image URLs are not fetched"),
        ("data:image/png,abc", "the data: URL is not base64"),
        ("data:image/png;base64", "the data: URL is not base64"),
        ("data:image/png;base64,a=bc", "the text is not base64"),
        ("data:image/png;base64,abcde", "the text is not base64"),
        ("data:image/png;base64,ab!d", "the text is not base64"),
        ("data:image/png;base64,abcé", "the text is not base64"),
        ("data:image/png;base64,", "the image is empty"),
    ],
)
def test_chat_route_rejects_invalid_image(send_chat, image, message):
    content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": TEXT_BOX}]
    assert message in get_error_message(send_chat([{"role": "user", "content": content}]))


# --- generated requests ----------------------------------------------------------------------------------------------

BOX_FORMATS = [
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
def draw_conversations(draw):
    """Generate messages without the image, and the box in the last turn; None for the entire image."""
    messages, box = [], None
    for role in draw(st.lists(st.sampled_from(["system", "developer", "assistant", "tool call", "user"]), max_size=5)):
        if role == "tool call":
            messages.append({"role": "assistant", "content": draw(PARTS), "tool_calls": [TOOL_CALL]})
            messages.append({"role": "tool", "tool_call_id": "1", "content": draw(PARTS)})
        elif role == "user":
            messages.append({"role": "user", "content": draw(SENTENCES)})
        else:
            messages.append({"role": role, "content": draw(PARTS)})
    texts = [draw(SENTENCES), draw(SENTENCES)]
    if draw(st.booleans()):
        box = draw(BOXES)
        texts.insert(1, draw(st.sampled_from(BOX_FORMATS)).format(*box))
    messages.insert(draw(st.integers(0, len(messages))), {"role": "user", "content": " ".join(texts)})
    return messages, box


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.all)])
@pytest.mark.slow
def test_chat_route_finds_region_in_generated_conversations(send_chat, image_url, scene, count):
    statuses = []

    @given(
        draw_conversations(),
        st.fixed_dictionaries({}, optional=FIELDS),
        st.booleans(),
        st.randoms(use_true_random=False),
    )
    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    def check_conversation(conversation, fields, is_string, random):
        messages, box = conversation
        index = random.choice([position for position, each in enumerate(messages) if each["role"] == "user"])
        image = {"type": "image_url", "image_url": image_url if is_string else {"url": image_url}}
        parts = [image, {"type": "text", "text": messages[index]["content"]}]
        random.shuffle(parts)
        response = send_chat([*messages[:index], {"role": "user", "content": parts}, *messages[index + 1 :]], **fields)
        statuses.append(response.status_code)
        assert get_box(response) == (box or (0, 0, *scene.image.size)), messages
        assert len(response.json()["choices"]) == fields.get("n", 1)

    check_conversation()
    assert len(statuses) >= count


# --- root path and documentation page --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path"), [("", ""), ("/", ""), ("captions", "/captions"), ("/a/b-c.d/", "/a/b-c.d"), ("/~me", "/~me")]
)
def test_check_root_path_normalizes_slashes(text, path):
    assert check_root_path(text) == path


@pytest.mark.parametrize("text", ["https://example.org/a", "/a?b", "/a/../b", "/a//b", "/a b", "/é"])
def test_check_root_path_rejects_invalid_paths(text, capsys):
    assert run_command(["serve", "--root-path", text]) == 2
    assert "is not a URL path; write it like /captions" in capsys.readouterr().err


def test_check_root_path_rejects_prefix_of_a_route(make_client):
    routes = [route.path for route in make_client().app.routes if route.path != "/"]
    assert len(routes) > 7
    for path in {*("/v1", "docs/", "/v1/chat"), *(re.sub(r"/\{.*", "", route) for route in routes)}:
        with pytest.raises(ValueError, match=r"is a prefix of a route of the server; choose another, like /captions$"):
            check_root_path(path)
    assert check_root_path("/v1x") == "/v1x"
    assert check_root_path("/a/v1") == "/a/v1"


@pytest.mark.parametrize("prefix", ["", "/captions"])
def test_docs_work_behind_a_proxy_with_root_path(make_client, make_message, prefix):
    """Cover proxies that strip the path and proxies that do not."""
    client = make_client(root_path="/captions", api_keys=["key"])
    client.headers["Authorization"] = "Bearer key"
    page = client.get(f"{prefix}/docs").text
    urls = re.findall(r"""(?:src|href)="(.+?)"|url: '(.+?)'""", page)
    assert len(urls) >= 3
    for url in map("".join, urls):
        assert url.startswith("/captions/")
        assert client.get(f"{prefix}{url.removeprefix('/captions')}").status_code == 200
    assert client.get(f"{prefix}/openapi.json").json()["servers"] == [{"url": "/captions"}]
    assert client.get(f"{prefix}/", follow_redirects=False).headers["location"] == "/captions/docs"
    assert client.post(f"{prefix}/v1/chat/completions", json={"messages": [make_message()]}).status_code == 200
    del client.headers["Authorization"]
    assert client.get(f"{prefix}/health").status_code == 200
    assert client.get(f"{prefix}/v1/models").status_code == 401
