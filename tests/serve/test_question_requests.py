"""Questions to the server: the field of a request, the text of a chat, and models and questions that are not usable."""

import json

import pytest
from sca_registry.contracts import Prompt

from sca.inference.engine import Engine

BOX = [10, 12, 60, 70]
TEXT_BOX = "box=10,12,60,70"
LANGUAGE_MODEL = {"name": "tiny-gpt2", "hidden_size": 32, "depth": 1, "num_heads": 2, "max_positions": 96}


@pytest.fixture
def engine(build_small_model):
    """Engine of a model that answers questions."""
    return Engine(build_small_model(questions=True, language_model=LANGUAGE_MODEL))


@pytest.fixture
def client(engine):
    """Client of a server of that model."""
    from fastapi.testclient import TestClient

    from sca.serve.app import create_app
    from sca.serve.scheduler import RequestScheduler

    with TestClient(create_app(RequestScheduler(engine), "mine")) as opened:
        yield opened


@pytest.fixture
def answer_locally(engine, scene):
    """Function that returns the answer of the engine without a server."""

    def answer_question(question):
        (caption,) = engine.caption(scene.image, [Prompt(box=tuple(map(float, BOX)))], question=question)
        return caption.text

    return answer_question


def test_caption_route_answers_a_question(client, make_body, answer_locally):
    body = make_body(prompts=[{"box": BOX}, {"points": [[20, 20, 1]]}], question="what color is it?")
    response = client.post("/v1/captions", json=body)
    assert response.status_code == 200, response.text
    assert response.json()["regions"][0]["caption"] == answer_locally("what color is it?")
    assert len(response.json()["regions"]) == 2


@pytest.mark.parametrize("max_regions_per_turn", [1, 64])
def test_caption_route_answers_a_question_about_several_regions(engine, make_body, scene, max_regions_per_turn):
    from fastapi.testclient import TestClient

    from sca.inference.predictor import Predictor
    from sca.serve.app import create_app
    from sca.serve.scheduler import RequestScheduler

    prompts = [{"points": [[20, 20, 1]]}, {"box": BOX}, {"points": [[50, 40, 1]]}]
    question = "is <region 2> left of <region 3>?"
    scheduler = RequestScheduler(engine, max_regions_per_turn)
    with TestClient(create_app(scheduler, "mine")) as client:
        response = client.post("/v1/captions", json=make_body(prompts=prompts, question=question))
    assert response.status_code == 200, response.text
    predictor = Predictor(engine)
    predictor.set_image(scene.image)
    regions = [Prompt(points=((20.0, 20.0, 1),)), Prompt(box=tuple(BOX)), Prompt(points=((50.0, 40.0, 1),))]
    (expected,) = predictor.predict(regions, question=question)
    (answer,) = response.json()["regions"]
    assert (answer["caption"], answer["region_id"], answer["box"]) == (expected.text, 1, BOX)
    assert scheduler.num_captioned_regions == 3


def test_caption_route_rejects_references_in_everything_mode(client, make_body):
    body = make_body(everything=True, question="is <region 1> red?")
    response = client.post("/v1/captions", json=body)
    assert response.status_code == 422
    assert "send prompts instead of everything" in response.json()["error"]["message"]


def test_stream_of_a_question_about_several_regions_has_one_region_event(client, make_body):
    prompts = [{"box": BOX}, {"points": [[20, 20, 1]]}, {"points": [[50, 40, 1]]}]
    body = make_body(prompts=prompts, question="is <region 3> left of <region 1>?", stream=True)
    lines = client.post("/v1/captions", json=body).text.splitlines()
    events = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert events == ["captioning_started", "region", "done"]
    regions = [json.loads(line.removeprefix("data: ")) for line in lines if '"region_id"' in line]
    assert [region["region_id"] for region in regions] == [2]


def test_chat_route_rejects_references_to_other_regions(client, png_bytes):
    response = send_chat(client, png_bytes, f"is <region 2> red? {TEXT_BOX}")
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "messages"
    assert "there is only 1 region; change the question" in response.json()["error"]["message"]


@pytest.mark.parametrize("text", [f"what color is {TEXT_BOX}?", f"{TEXT_BOX}\nwhat color is it?"])
def test_chat_route_answers_the_text_of_the_last_turn(client, scene, png_bytes, answer_locally, text):
    response = send_chat(client, png_bytes, text)
    assert response.status_code == 200, response.text
    content = response.json()["choices"][0]["message"]["content"]
    assert content == answer_locally("what color is it?")
    assert response.json()["region"]["box"] == BOX


@pytest.mark.parametrize("text", [TEXT_BOX, f"Describe the region {TEXT_BOX}.", f"Please caption {TEXT_BOX}"])
def test_chat_route_captions_if_a_description_is_requested(client, png_bytes, answer_locally, text):
    content = send_chat(client, png_bytes, text).json()["choices"][0]["message"]["content"]
    assert content == answer_locally(None)


def send_chat(client, png_bytes, text):
    import base64

    url = f"data:image/png;base64,{base64.b64encode(png_bytes).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}]})


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("is <region 1> left of <region 2>?", "refers to <region 2>, but there is only 1 region"),
        ("is <region 0> red?", "regions are counted from 1"),
        ("what " * 100, "shorten the question"),
        ("", "question"),
        ("x" * 2000, "question"),
    ],
)
def test_caption_route_rejects_questions(client, make_body, question, message):
    response = client.post("/v1/captions", json=make_body(prompts=[{"box": BOX}], question=question))
    assert response.status_code == 422
    assert message in response.json()["error"]["message"]


def test_chat_route_rejects_long_questions(client, png_bytes):
    for text, status in (("what " * 100, 422), ("what " * 700, 422), ("what " * 1000, 413)):
        response = send_chat(client, png_bytes, f"{text} {TEXT_BOX}")
        assert response.status_code == status
        assert "shorten" in response.json()["error"]["message"]


def test_models_without_questions_reject_the_field_and_caption_in_chats(make_client, make_body, png_bytes):
    client = make_client()
    response = client.post("/v1/captions", json=make_body(prompts=[{"box": BOX}], question="what is it?"))
    assert response.status_code == 422
    assert "does not support questions" in response.json()["error"]["message"]
    texts = [
        send_chat(client, png_bytes, text).json()["choices"][0]["message"]["content"]
        for text in (TEXT_BOX, f"what color is {TEXT_BOX}?")
    ]
    assert texts[0] == texts[1]
