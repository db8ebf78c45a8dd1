"""The captioner of chat servers and `sca serve`: as client of its chat route, and behind it as a gateway."""

import pytest
from chat_server import FAULTS, make_text, run_chat_server
from sca_registry.contracts import Prompt

import sca

pytestmark = pytest.mark.slow  # connects to servers


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_API_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("task", ["caption", "recognition"])
def test_openai_captioner_returns_the_captions_of_sca_serve(start_server, captioner, scene, task):
    prompts = [Prompt(box=region.box) for region in scene.regions]
    name = f"openai url={start_server()} region_format=coordinates coordinate_format=sca"
    captions = sca.load_captioner(name).caption(scene.image, prompts, task)
    expected = captioner.caption(scene.image, prompts, task)
    assert [(caption.text, caption.usage) for caption in captions] == [(each.text, each.usage) for each in expected]


def test_server_forwards_regions_to_a_chat_server_and_hides_its_errors(make_body, scene, monkeypatch):
    from fastapi.testclient import TestClient

    from sca.serve.app import create_app
    from sca.serve.scheduler import RequestScheduler

    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-0123456789")
    is_failing = False
    with run_chat_server(lambda text, number: FAULTS[1] if is_failing else None) as upstream:
        gateway = sca.load_captioner(f"openai url={upstream.url} model=mine max_retries=0 cache=false")
        with TestClient(create_app(RequestScheduler(gateway), "gateway")) as client:
            response = client.post("/v1/captions", json=make_body())
            assert response.status_code == 200, response.text
            texts = [region["caption"] for region in response.json()["regions"]]
            assert sorted(texts) == sorted(map(make_text, upstream.bodies))
            assert len(texts) == len(scene.regions)
            is_failing = True
            response = client.post("/v1/captions", json=make_body())
    assert response.status_code == 500
    assert "see the server log" in response.text
    assert upstream.url not in response.text
    assert "sk-planted" not in response.text
