"""The routes of the server except for chat: captions, health and metrics."""

import base64
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image
from sca_registry.contracts import Prompt

import sca
from sca.io import masks
from sca.serve.inference_requests import QueueFullError
from sca.serve.limits import ServerLimits
from sca.serve.scheduler import RequestScheduler

BOX = [{"box": [0, 0, 9, 9]}]


def parse_events(text):
    """Return (type, data) of each server-sent event."""
    events = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            events.append((fields.get("event"), json.loads(fields["data"])))
    return events


def test_captions_route_returns_captions_of_the_engine(make_client, captioner, scene, make_body, png_bytes):
    prompts = [Prompt(box=region.box) for region in scene.regions]
    expected = captioner.caption(scene.image, prompts)
    response = make_client().post("/v1/captions", json=make_body())
    assert response.status_code == 200, response.text
    body = response.json()
    assert (body["model"], body["width"], body["height"]) == ("sca-tiny", *scene.image.size)
    for region, caption in zip(body["regions"], expected, strict=True):
        assert (region["caption"], region["mask"]) == (caption.text, caption.mask)
        assert region["box"] == list(caption.box)
        assert region["score"] == pytest.approx(caption.score, abs=1e-5)
    form = {"request": json.dumps({"prompts": [{"box": list(region.box)} for region in scene.regions]})}
    form_response = make_client().post("/v1/captions", files={"image": ("a.png", png_bytes)}, data=form)
    assert [region["caption"] for region in form_response.json()["regions"]] == [each.text for each in expected]


def test_captions_route_returns_confidence_and_ood_score(make_client, captioner, scene, make_body):
    prompts = [Prompt(box=region.box) for region in scene.regions]
    expected = captioner.caption(scene.image, prompts)
    regions = make_client().post("/v1/captions", json=make_body()).json()["regions"]
    assert all(caption.confidence is not None for caption in expected)
    assert [each["confidence"] for each in regions] == pytest.approx([each.confidence for each in expected], abs=1e-3)
    assert [each["ood_score"] for each in regions] == pytest.approx([each.ood_score for each in expected], rel=1e-3)


def test_captions_route_accepts_all_prompt_types_in_one_request(make_client, captioner, scene, make_body):
    region = next(region for region in scene.regions if region.mask)
    x, y = (region.box[0] + region.box[2]) / 2, (region.box[1] + region.box[3]) / 2
    prompt_fields = [
        {"points": [[x, y]]},
        {"mask": region.mask},
        {"box": list(region.box), "points": [[x, y, 1], [1, 1, 0]]},
    ]
    prompts = [
        Prompt(points=((x, y, 1),)),
        Prompt(mask=masks.decode_rle(region.mask)),
        Prompt(region.box, ((x, y, 1), (1, 1, 0))),
    ]
    regions = (
        make_client().post("/v1/captions", json=make_body(prompts=prompt_fields, num_captions=2)).json()["regions"]
    )
    expected = captioner.caption(scene.image, prompts, num_captions=2, num_beams=2)
    assert [each["caption"] for each in regions] == [each.text for each in expected]
    assert [[other["caption"] for other in each["alternatives"]] for each in regions] == [
        [text for text, _ in each.alternatives] for each in expected
    ]


def test_captions_route_omits_masks_without_return_masks(make_client, make_body):
    regions = make_client().post("/v1/captions", json=make_body(return_masks=False)).json()["regions"]
    assert all(each["mask"] is None and each["caption"] for each in regions)


def test_stream_sends_one_event_per_region(make_client, make_body, scene):
    response = make_client(max_regions_per_turn=2).post("/v1/captions", json=make_body(stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    events = parse_events(response.text)
    assert events[0][0] == "captioning_started"
    assert events[0][1]["num_regions"] == len(scene.regions)
    assert [data["region_id"] for event_type, data in events if event_type == "region"] == list(
        range(len(scene.regions))
    )
    assert events[-1] == ("done", {"num_regions": len(scene.regions)})


def test_everything_returns_the_best_max_regions_regions(make_client, make_body):
    all_regions, best_regions = (
        make_client().post("/v1/captions", json=make_body(everything={"points_per_side": 8, **limit})).json()["regions"]
        for limit in ({}, {"max_regions": 2})
    )
    assert len(all_regions) > 2
    assert [(each["box"], each["caption"]) for each in best_regions] == [
        (each["box"], each["caption"]) for each in all_regions[:2]
    ]
    response = make_client().post("/v1/captions", json=make_body(everything={"max_regions": 0}))
    assert response.status_code == 422


def test_everything_streams_search_progress_and_regions(make_client, make_body):
    client = make_client()
    body = make_body(everything={"points_per_side": 8})
    expected = client.post("/v1/captions", json=body).json()["regions"]
    events = parse_events(client.post("/v1/captions", json=body, headers={"accept": "text/event-stream"}).text)
    assert events[0][0] == "search_progress"
    assert [data for event_type, data in events if event_type == "region"] == expected
    assert expected


def test_chat_route_captions_the_region_of_a_message(make_client, make_body, scene, captioner):
    region = scene.regions[0]
    url = f"data:image/png;base64,{make_body()['image']}"
    image = {"type": "image_url", "image_url": {"url": url}}
    message = {"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]}
    (expected,) = captioner.caption(scene.image, [Prompt(box=region.box)])
    client = make_client()
    response = client.post(
        "/v1/chat/completions", json={"messages": [message], "box": region.box, "presence_penalty": 0}
    )
    assert response.json()["choices"][0]["message"] == {"role": "assistant", "content": expected.text}
    assert response.json()["region"]["mask"] == expected.mask
    box = ",".join(f"{value:g}" for value in region.box)
    region_message = {"role": "user", "content": [image, {"type": "text", "text": f"What is at box={box}?"}]}
    body = client.post("/v1/chat/completions", json={"model": "sca-tiny", "messages": [region_message], "n": 2}).json()
    assert len(body["choices"]) == 2
    stream_text = client.post(
        "/v1/chat/completions", json={"messages": [message], "box": region.box, "stream": True}
    ).text
    chunks = [line.removeprefix("data: ") for line in stream_text.splitlines() if line]
    assert chunks[-1] == "[DONE]"
    assert json.loads(chunks[0])["choices"][0]["delta"]["content"] == expected.text
    full_image_region = client.post("/v1/chat/completions", json={"messages": [message]}).json()["region"]
    assert full_image_region["box"] == [0, 0, *scene.image.size]
    assert client.get("/v1/models").json()["data"][0]["id"] == "sca-tiny"
    response = client.post("/v1/chat/completions", json={"model": "gpt-4o", "messages": [message]})
    assert (response.status_code, response.json()["error"]["message"]) == (
        404,
        "unknown model 'gpt-4o'; this server provides 'sca-tiny'",
    )


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        (";".join(["point=10,10,1"] * 300), 413, "a prompt has 300 points; at most 256 are allowed"),
        (
            ";".join(["point=10,10,1"] * 45_000),
            422,
            "the text contains 135,000 numbers; shorten it to at most 2,048 numbers",
        ),
        ("box=9,9,1,1", 422, "the box 9,9,1,1 is reversed"),
        ("box=1,1,9,9;box=1,1,9,9", 422, "the text contains more than one box"),
    ],
)
def test_chat_route_applies_prompt_limits_to_text_regions(make_client, make_body, text, status, message):
    url = f"data:image/png;base64,{make_body()['image']}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    response = make_client().post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]})
    assert response.status_code == status, response.text
    assert message in response.json()["error"]["message"]


def test_server_limits_bound_the_defaults_of_a_checkpoint(make_client, make_body, captioner, monkeypatch):
    spec = captioner.model.spec.apply_overrides(
        [
            "generation={num_beams=64, max_new_tokens=4096}",
            "everything={points_per_side=100, crop_n_layers=3, box_nms_thresh=0.5}",
        ]
    )
    monkeypatch.setattr(captioner.model, "spec", spec)
    inference_requests = []

    def reject_request(scheduler, inference_request, on_event):
        inference_requests.append(inference_request)
        raise QueueFullError("full")

    monkeypatch.setattr(RequestScheduler, "submit", reject_request)
    client = make_client()
    for fields in ({"everything": True}, {"prompts": BOX, "max_new_tokens": 5}):
        assert client.post("/v1/captions", json=make_body(**fields)).status_code == 503
    everything_request, prompt_request = inference_requests
    everything = everything_request.everything
    assert (everything.points_per_side, everything.crop_n_layers, everything.box_nms_thresh) == (64, 2, 0.5)
    assert everything_request.generation == {"num_beams": 16, "max_new_tokens": 512}
    assert prompt_request.generation == {"num_beams": 16, "max_new_tokens": 5}


def test_health_and_metrics_count_requests_and_regions(make_client, make_body, scene):
    client = make_client()
    client.post("/v1/captions", json=make_body())
    client.post("/v1/captions", json=make_body())
    client.get("/nowhere/at/all")
    assert client.get("/health").json() == {"status": "ok", "model": "sca-tiny", "device": "cpu", "queued_regions": 0}
    page = client.get("/metrics").text
    assert 'sca_http_requests_total{route="/v1/captions",status="200"} 2.0' in page
    assert 'sca_http_requests_total{route="other",status="404"} 1.0' in page
    assert f"sca_captioned_regions_total {2.0 * len(scene.regions)}" in page
    assert 'sca_feature_cache_lookups_total{result="hit"} 1.0' in page
    assert "sca_queued_regions 0.0" in page


INVALID_REQUESTS = {
    "no prompts": ({"prompts": []}, 422, "neither prompts nor everything"),
    "both": ({"prompts": BOX, "everything": True}, 422, "both prompts and everything"),
    "box of three": (
        {"prompts": [{"box": [1, 2, 3]}]},
        422,
        "prompts.0, 'box': cannot parse [1, 2, 3]; write a box as 4 numbers x1,y1,x2,y2",
    ),
    "reversed": ({"prompts": [{"box": [9, 9, 1, 1]}]}, 422, "the box 9,9,1,1 is reversed"),
    "outside": ({"prompts": [{"points": [[5000, 1]]}]}, 422, "prompts.0: the point 5000,1,1 is outside the 96 x 96"),
    "huge number": ({"prompts": [{"box": [0, 0, 1e308, 10**400]}]}, 422, "is not a finite number"),
    "mask of another size": (
        {"prompts": [{"mask": masks.encode_rle(np.ones((20_000, 8_000), bool))}]},
        422,
        "prompts.0, 'mask': the mask is 8000 x 20000, but the image is 96 x 96",
    ),
    "mask that is none": ({"prompts": [{"mask": {"size": [96, 96], "counts": "zz"}}]}, 422, "prompts.0, 'mask': "),
    "a file": ({"prompts": [{"mask": "/etc/passwd"}]}, 422, "must be an RLE, not a file name"),
    "empty prompt": ({"prompts": [{}]}, 422, "prompts.0: no 'box', 'points' or 'mask'"),
    "another field": ({"prompts": BOX, "boxes": 1}, 422, "boxes: Extra inputs are not permitted"),
    "another task": ({"prompts": BOX, "task": "poem"}, 422, "unknown task 'poem'. Choose from: recognition, caption."),
    "temperature": ({"prompts": BOX, "temperature": 1}, 422, "temperature can only be used with do_sample=true"),
    "captions": (
        {"prompts": BOX, "num_captions": 4, "num_beams": 2},
        422,
        "num_captions=4 requires num_beams of at least 4, not 2",
    ),
    "beams": ({"prompts": BOX, "num_beams": 10**9}, 422, "num_beams: Input should be less than or equal to 16"),
    "too many": ({"prompts": BOX * 5000}, 413, "5,000 prompts; at most 4,096 are allowed"),
    "many points": (
        {"prompts": [{"points": [[1, 1]] * 40_000}]},
        413,
        "a prompt has 40,000 points; at most 256 are allowed",
    ),
    "many points per request": (
        {"prompts": [{"points": [[1, 1]] * 256}] * 65},
        413,
        "16,640 points; at most 16,384 are allowed",
    ),
    "many values": ({"prompts": [{"points": [[]] * 2**19}]}, 413, "the limit of 1,048,576 JSON values"),
    "no image": ({"prompts": BOX, "image": ""}, 422, "the image is empty (0 bytes)"),
    "not base64": ({"prompts": BOX, "image": "?!"}, 422, "image: the text is not base64"),
    "fetched": ({"prompts": BOX, "image": "http://127.0.0.1/a.png"}, 422, "image URLs are not fetched"),
    "broken": ({"prompts": BOX, "image": "iVBORw0KGgo="}, 422, "the image"),
}


@pytest.mark.parametrize("name", INVALID_REQUESTS)
def test_captions_route_reports_invalid_request_in_one_line(make_client, make_body, name):
    fields, status, message = INVALID_REQUESTS[name]
    text = json.dumps({**make_body(prompts=[]), **fields}).replace("1" + "0" * 400, "1e400")
    response = make_client().post("/v1/captions", content=text, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    assert message in response.json()["error"]["message"]
    assert "Traceback" not in response.text


def test_captions_route_rejects_image_above_pixel_limit_before_decoding(make_client, make_body):
    large_file = io.BytesIO()
    Image.new("1", (20_000, 5_000)).save(large_file, "PNG")
    response = make_client().post(
        "/v1/captions", json=make_body(image=base64.b64encode(large_file.getvalue()).decode())
    )
    assert response.status_code == 413
    assert response.json()["error"]["message"] == (
        "the image has 100,000,000 pixels (20000 x 5000), 50,000,000 are allowed; resize the image"
    )


def test_captions_route_rejects_malformed_bodies(make_client, make_body):
    client = make_client(ServerLimits(max_body_bytes=100_000))
    for content, content_type, status, message in (
        (b"{", "application/json", 422, "Invalid JSON"),
        (b"[" * 50_000, "application/json", 422, "Invalid JSON"),
        (
            b"a=1",
            "application/x-www-form-urlencoded",
            415,
            "is not supported; send application/json or multipart/form-data",
        ),
        (b"nothing", "multipart/form-data", 400, "boundary"),
        (b"nothing", "multipart/form-data; boundary=x", 400, ""),
        (b"--x--\r\n", "multipart/form-data; boundary=x", 422, "the field 'image' is missing or not a file"),
        (b" " * 200_000, "application/json", 413, "the limit of 100,000 bytes"),
    ):
        response = client.post("/v1/captions", content=content, headers={"content-type": content_type})
        assert response.status_code == status, (content[:20], response.text)
        assert message.lower() in response.json()["error"]["message"].lower()
    assert client.get("/v1/captions").status_code == 405
    assert client.post("/v1/captions", json=make_body()).status_code == 200


def test_health_is_503_when_draining_or_crashed(make_client, make_body, captioner, monkeypatch):
    def raise_system_exit(*_, **__):
        raise SystemExit

    monkeypatch.setattr(captioner, "caption_batch", raise_system_exit)
    crashed = make_client()
    response = crashed.post("/v1/captions", json=make_body())
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "the worker thread of the model has crashed; restart the server"
    assert (crashed.get("/health").status_code, crashed.get("/health").json()["status"]) == (503, "down")
    draining = make_client()
    draining.app.state.scheduler.drain(60)
    assert (draining.get("/health").status_code, draining.get("/health").json()["status"]) == (503, "draining")


def test_requests_release_their_memory(make_client, make_body, scene):
    client = make_client()
    budget = client.app.state.budget
    for fields in ({}, {"image": "?"}, {"prompts": []}, {"stream": True}):
        client.post("/v1/captions", json=make_body(**fields))
        assert budget.leased_bytes == 0
    large_file = io.BytesIO()
    Image.new("RGB", (2000, 2000)).save(large_file, "PNG")
    mask = masks.encode_rle(np.ones((2000, 2000), bool))
    image = base64.b64encode(large_file.getvalue()).decode()
    with budget.create_lease() as other_lease:
        other_lease.resize(budget.max_request_bytes)
        assert client.post("/v1/captions", json=make_body()).status_code == 200, "small requests always have room"
    assert client.post("/v1/captions", json=make_body(image=image, prompts=[{"mask": mask}])).status_code == 200
    assert budget.leased_bytes == 0


def test_large_image_waits_for_memory_until_the_timeout(make_client, make_body):
    client = make_client(ServerLimits(timeout=1))
    large_file = io.BytesIO()
    Image.new("RGB", (2000, 2000)).save(large_file, "PNG")
    with client.app.state.budget.create_lease() as other_lease:
        other_lease.resize(client.app.state.budget.max_request_bytes)
        response = client.post("/v1/captions", json=make_body(image=base64.b64encode(large_file.getvalue()).decode()))
    assert response.status_code in (503, 504)
    assert client.app.state.budget.leased_bytes == 0


@pytest.mark.parametrize("prompt_type", ["box", "mask"])
@pytest.mark.slow
def test_concurrent_large_images_do_not_deadlock(make_client, make_body, prompt_type):
    """Images that are decoded hold memory that later images wait for, so they must be able to finish."""
    client, large_file = make_client(ServerLimits(timeout=120)), io.BytesIO()
    client.app.state.budget.max_bytes = 64 * 2**20
    Image.new("RGBA", (1000, 1000)).save(large_file, "PNG")
    prompt = (
        {"box": [1, 1, 90, 90]} if prompt_type == "box" else {"mask": masks.encode_rle(np.ones((1000, 1000), bool))}
    )
    body = make_body(image=base64.b64encode(large_file.getvalue()).decode(), prompts=[prompt], return_masks=False)
    with ThreadPoolExecutor(14) as pool:
        statuses = list(pool.map(lambda _: client.post("/v1/captions", json=body).status_code, range(14)))
    assert statuses == [200] * 14
    assert client.app.state.budget.leased_bytes == 0


def test_captions_route_reports_memory_error_as_503(make_client, make_body, monkeypatch):
    def raise_memory_error(*_):
        raise MemoryError

    monkeypatch.setattr("sca.serve.service.decode_image", raise_memory_error)
    response = make_client().post("/v1/captions", json=make_body())
    assert response.status_code == 503
    assert response.json()["error"]["message"].startswith("not enough memory")
    assert "retry-after" in response.headers


def test_long_response_has_the_format_of_a_short_one(make_client, make_body, scene):
    client, prompts = make_client(), [{"box": list(scene.regions[0].box)}] * 70
    long = client.post("/v1/captions", json=make_body(prompts=prompts)).json()
    short = client.post("/v1/captions", json=make_body(prompts=prompts[:2])).json()
    assert [each["region_id"] for each in long["regions"]] == list(range(70))
    for region in (*long["regions"], *short["regions"]):
        assert region.keys() == short["regions"][0].keys()
        assert (region["caption"], region["mask"]) == (short["regions"][0]["caption"], short["regions"][0]["mask"])
    assert {**long, "regions": []} == {**short, "regions": []}


def test_captions_route_returns_504_after_the_timeout(make_client, make_body, monkeypatch, captioner):
    caption_batch = captioner.caption_batch
    monkeypatch.setattr(
        captioner, "caption_batch", lambda *args, **kwargs: (time.sleep(1.5), caption_batch(*args, **kwargs))[1]
    )
    response = make_client(ServerLimits(timeout=0.6)).post("/v1/captions", json=make_body())
    assert response.status_code == 504
    assert "no response within 0.6 s" in response.json()["error"]["message"]


def test_full_queue_returns_503_with_retry_after(make_client, make_body):
    response = make_client(max_queue=2).post("/v1/captions", json=make_body())
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"


@pytest.mark.slow
def test_disconnected_client_stops_inference(start_server, make_body, captioner, monkeypatch):
    caption_batch, region_counts = captioner.caption_batch, []

    def caption_slowly(encoded, requests, *args, **kwargs):
        time.sleep(0.3)
        region_counts.append(sum(map(len, requests)))
        return caption_batch(encoded, requests, *args, **kwargs)

    monkeypatch.setattr(captioner, "caption_batch", caption_slowly)
    url = start_server(max_regions_per_turn=2)
    prompts = [{"box": [0, 0, 50, 50]}] * 200
    for stream in (False, True):
        region_counts.clear()
        if stream:
            with httpx.stream("POST", f"{url}/v1/captions", json=make_body(prompts=prompts, stream=True)) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/captions", json=make_body(prompts=prompts), timeout=1.0)
        time.sleep(2)
        count = sum(region_counts)
        time.sleep(1)
        assert sum(region_counts) == count
        assert count < 60
    assert httpx.get(f"{url}/health").json()["queued_regions"] == 0


@pytest.mark.slow
def test_concurrent_clients_get_the_same_captions_as_alone(start_server, make_body, scene, captioner):
    url = start_server()
    prompts = [Prompt(box=region.box) for region in scene.regions]
    expected = [each.text for each in captioner.caption(scene.image, prompts)]

    def request_captions(_):
        body = httpx.post(f"{url}/v1/captions", json=make_body(), timeout=60).json()
        return [region["caption"] for region in body["regions"]]

    with ThreadPoolExecutor(16) as pool:
        assert all(captions == expected for captions in pool.map(request_captions, range(64)))


def test_captions_route_zooms_by_request_and_by_default(make_client, make_body, scene, captioner):
    image = scene.image.resize((640, 640))
    file = io.BytesIO()
    image.save(file, "PNG")
    box = [300, 300, 330, 330]
    body = make_body(prompts=[{"box": box}]) | {"image": base64.b64encode(file.getvalue()).decode()}
    predictor = sca.Predictor(captioner)
    predictor.set_image(image)
    expected = {zoom: predictor.predict(boxes=[box], zoom=zoom)[0] for zoom in ("off", 4)}
    assert expected["off"].mask != expected[4].mask
    for client, default in ((make_client(), "off"), (make_client(zoom=4), 4)):
        for fields, zoom in (({}, default), ({"zoom": "off"}, "off"), ({"zoom": 4}, 4)):
            (region,) = client.post("/v1/captions", json=body | fields).json()["regions"]
            assert (region["caption"], region["mask"]) == (expected[zoom].text, expected[zoom].mask)
    for zoom in ("on", 0, -1, True, [4]):
        assert make_client().post("/v1/captions", json=body | {"zoom": zoom}).status_code == 422
