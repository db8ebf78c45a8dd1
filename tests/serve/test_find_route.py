"""`POST /v1/find`: the matches of a text, best first, and errors in one line."""

import json

import pytest
from sca_registry.contracts import Prompt

from sca.inference.predictor import Predictor
from sca.serve.limits import ServerLimits


@pytest.fixture
def predictor(captioner, scene):
    predictor = Predictor(captioner)
    predictor.set_image(scene.image)
    return predictor


def test_find_route_returns_the_matches_of_the_predictor(make_client, make_body, predictor, scene, png_bytes):
    text = scene.regions[1].phrases[0]
    expected = predictor.find(text, [Prompt(box=region.box) for region in scene.regions], top=2)
    response = make_client().post("/v1/find", json=make_body(text=text, top=2, threshold=-100))
    assert response.status_code == 200, response.text
    body = response.json()
    assert (body["model"], body["num_regions"]) == ("sca-tiny", len(scene.regions))
    for region, match in zip(body["regions"], expected, strict=True):
        assert (region["region_id"], region["name"], region["caption"]) == (match.region_id, text, match.text)
        assert region["mask"] == match.mask
        assert region["proposal_score"] == pytest.approx(match.proposal_score, abs=1e-5)
    assert body["regions"][0]["region_id"] == 1
    prompts = [{"box": list(region.box)} for region in scene.regions]
    form = {"request": json.dumps({"text": text, "prompts": prompts, "return_masks": False})}
    (region,) = make_client().post("/v1/find", files={"image": ("a.png", png_bytes)}, data=form).json()["regions"]
    assert (region["region_id"], region["mask"]) == (1, None)


def test_find_route_searches_everything_by_default_and_rejects_other_texts(make_client, make_body, scene):
    client, region = make_client(), scene.regions[0]
    everything = {"everything": {"points_per_side": 12}}
    (match,) = client.post("/v1/find", json=make_body(text=region.phrases[0], **everything)).json()["regions"]
    assert match["box"] == pytest.approx(region.box, abs=4)
    assert match["mask"]
    body = make_body(text=region.phrases[0], everything=False)
    assert client.post("/v1/find", json=body).json()["regions"][0]["box"] == pytest.approx(region.box, abs=4)
    response = client.post("/v1/find", json=make_body(text="umbrella"))
    assert (response.status_code, response.json()["regions"]) == (200, [])


def test_find_route_does_not_change_captions_in_the_same_scheduler(make_client, make_body):
    client = make_client()
    expected = client.post("/v1/captions", json=make_body()).json()
    client.post("/v1/find", json=make_body(text="a red circle"))
    assert client.post("/v1/captions", json=make_body()).json() == expected
    page = client.get("/metrics").text
    assert 'sca_http_requests_total{route="/v1/find",status="200"} 1.0' in page


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"text": ""}, 422, "the text is empty; pass a word or a phrase"),
        ({"text": "a star " * 60}, 422, "the text has 120 tokens, but the model reads at most 91; shorten it"),
        ({}, 422, "text"),
        ({"text": "a" * 1001}, 422, "text"),
        ({"text": "a", "top": 0}, 422, "top"),
        ({"text": "a", "top": 4097}, 422, "top"),
        ({"text": "a", "num_beams": 2}, 422, "num_beams"),
        ({"text": "a", "prompts": [{"box": [0, 0, 9, 9]}], "everything": True}, 422, "both prompts and everything"),
        ({"text": "a", "prompts": [{"box": [0, 0, 9, 9]}] * 9}, 413, "the request has 9 prompts; at most 8"),
        ({"text": "a", "prompts": [{"box": [900, 0, 990, 9]}]}, 422, "prompts.0"),
    ],
)
def test_find_route_rejects_invalid_requests(make_client, make_body, fields, status, message):
    response = make_client(ServerLimits(max_prompts=8)).post("/v1/find", json=make_body(**fields))
    assert response.status_code == status
    assert message in response.json()["error"]["message"]
    assert "\n" not in response.json()["error"]["message"]


def test_find_route_reports_a_captioner_without_language_model(make_body):
    from fastapi.testclient import TestClient

    from sca.inference.factory import load_captioner
    from sca.serve.app import create_app
    from sca.serve.scheduler import RequestScheduler

    scheduler = RequestScheduler(load_captioner("sca-tiny+none"))
    with TestClient(create_app(scheduler, "sca-tiny+none")) as client:
        response = client.post("/v1/find", json=make_body(text="a star"))
    assert response.status_code == 422
    assert "'sca-tiny+none' cannot score a text; use a model" in response.json()["error"]["message"]


def test_openapi_describes_the_find_route(make_client):
    document = make_client().get("/openapi.json").json()
    content = document["paths"]["/v1/find"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "multipart/form-data"}
    assert {"text", "top", "threshold"} <= set(content["application/json"]["schema"]["properties"])


def test_find_route_predicts_masks_of_matches_only(make_client, make_body, captioner, scene, monkeypatch):
    num_masks, predict_best_masks = [], captioner.predict_best_masks

    def count_masks(encoded, requests):
        num_masks.append(sum(map(len, requests)))
        return predict_best_masks(encoded, requests)

    monkeypatch.setattr(captioner, "predict_best_masks", count_masks)
    client, text = make_client(), scene.regions[1].phrases[0]
    body = client.post("/v1/find", json=make_body(text=text, top=1, threshold=-100)).json()
    assert (len(body["regions"]), body["num_regions"], num_masks) == (1, len(scene.regions), [1])
    body = client.post("/v1/find", json=make_body(text="umbrella")).json()
    assert (body["regions"], body["num_regions"], num_masks) == ([], len(scene.regions), [1])


def test_find_route_returns_the_best_matches_of_several_turns(make_client, make_body, scene):
    prompts = [{"box": list(region.box)} for region in scene.regions] * 20
    client = make_client(max_regions_per_turn=16)
    fields = {"text": scene.regions[1].phrases[0], "prompts": prompts, "threshold": -100, "return_masks": False}
    body = client.post("/v1/find", json=make_body(**fields, top=4096)).json()  # a response in chunks
    assert body["num_regions"] == len(body["regions"]) == len(prompts) > 64
    assert sorted(region["region_id"] for region in body["regions"]) == list(range(len(prompts)))
    scores = [region["proposal_score"] for region in body["regions"]]
    assert scores == sorted(scores, reverse=True)
    best = client.post("/v1/find", json=make_body(**fields, top=7)).json()["regions"]
    assert len(best) == 7
    assert all(region["region_id"] % len(scene.regions) == 1 for region in best)


def test_scheduler_batches_only_requests_with_the_same_text(scene):
    from sca.serve.inference_requests import InferenceRequest, QueueEntry

    keys = {QueueEntry(InferenceRequest(scene.image, text=text), print).batch_key for text in (None, "a", "b", "b")}
    assert len(keys) == 3
    options = ({"top": 1}, {"top": 2}, {"threshold": 0.5})
    keys |= {QueueEntry(InferenceRequest(scene.image, text="a", **each), print).batch_key for each in options}
    assert len(keys) == 6
