"""Tasks of a model in requests to the server: captions, chats and tasks that the model does not have."""

import base64

import pytest
from sca_registry.contracts import Prompt

from sca.inference.engine import Engine

BOX = [10, 12, 60, 70]
LANGUAGE_MODEL = {"name": "tiny-gpt2", "hidden_size": 32, "depth": 1, "num_heads": 2, "max_positions": 128}
PROMPTS_BY_TASK = {"caption": "describe it.", "recognition": "name it.", "explain": "what is it made of and why?"}


@pytest.fixture
def engine(build_small_model):
    """Engine of a model with a further task."""
    return Engine(build_small_model(tasks=PROMPTS_BY_TASK, task_tokens=0, language_model=LANGUAGE_MODEL))


@pytest.fixture
def client(engine):
    """Client of a server of that model."""
    from fastapi.testclient import TestClient

    from sca.serve.app import create_app
    from sca.serve.scheduler import RequestScheduler

    with TestClient(create_app(RequestScheduler(engine), "mine")) as opened:
        yield opened


def caption_locally(engine, scene, task):
    (caption,) = engine.caption(scene.image, [Prompt(box=tuple(map(float, BOX)))], task)
    return caption.text


@pytest.mark.parametrize("task", PROMPTS_BY_TASK)
def test_caption_route_accepts_the_tasks_of_the_model(client, engine, scene, make_body, task):
    response = client.post("/v1/captions", json=make_body(prompts=[{"box": BOX}], task=task))
    assert response.status_code == 200, response.text
    assert response.json()["regions"][0]["caption"] == caption_locally(engine, scene, task)


def test_chat_route_uses_the_prompt_of_the_task(client, engine, scene, png_bytes):
    url = f"data:image/png;base64,{base64.b64encode(png_bytes).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    body = {"messages": [{"role": "user", "content": parts}], "box": BOX, "task": "explain"}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    content = response.json()["choices"][0]["message"]["content"]
    assert content == caption_locally(engine, scene, "explain")
    usage = response.json()["usage"]
    assert usage["prompt_tokens"] == engine.model.count_prefix_positions("explain")


@pytest.mark.parametrize("task", ["explains", "x" * 50])
def test_caption_route_rejects_other_tasks(client, make_body, task):
    response = client.post("/v1/captions", json=make_body(prompts=[{"box": BOX}], task=task))
    assert response.status_code == 422
    assert "task" in response.json()["error"]["message"]
