"""What clients send and get."""

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

from sca.io import masks
from sca.serve.limits import ServerLimits
from sca.serve.scheduler import RequestScheduler
from sca.serve.tickets import QueueFullError

BOX = [{"box": [0, 0, 9, 9]}]


def events(text):
    """(name, data) of each server-sent event."""
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append((fields.get("event"), json.loads(fields["data"])))
    return found


def test_captions_are_those_of_the_predictor(client, tiny, scene, asked, png):
    prompts = [Prompt(box=region.box) for region in scene.regions]
    expected = tiny.caption(scene.image, prompts)
    answer = client().post("/v1/captions", json=asked())
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert (told["model"], told["width"], told["height"]) == ("sca-tiny", *scene.image.size)
    for region, caption in zip(told["regions"], expected, strict=True):
        assert (region["caption"], region["mask"]) == (caption.text, caption.mask)
        assert region["box"] == list(caption.box)
        assert region["score"] == pytest.approx(caption.score, abs=1e-5)
    form = {"request": json.dumps({"prompts": [{"box": list(region.box)} for region in scene.regions]})}
    again = client().post("/v1/captions", files={"image": ("a.png", png)}, data=form)
    assert [region["caption"] for region in again.json()["regions"]] == [each.text for each in expected]


def test_all_kinds_of_prompt_in_one_request(client, tiny, scene, asked):
    region = next(region for region in scene.regions if region.mask)
    x, y = (region.box[0] + region.box[2]) / 2, (region.box[1] + region.box[3]) / 2
    plain = [{"points": [[x, y]]}, {"mask": region.mask}, {"box": list(region.box), "points": [[x, y, 1], [1, 1, 0]]}]
    prompts = [
        Prompt(points=((x, y, 1),)),
        Prompt(mask=masks.decode_rle(region.mask)),
        Prompt(region.box, ((x, y, 1), (1, 1, 0))),
    ]
    told = client().post("/v1/captions", json=asked(prompts=plain, num_captions=2)).json()["regions"]
    expected = tiny.caption(scene.image, prompts, num_captions=2, num_beams=2)
    assert [each["caption"] for each in told] == [each.text for each in expected]
    assert [[other["caption"] for other in each["alternatives"]] for each in told] == [
        [text for text, _ in each.alternatives] for each in expected
    ]


def test_masks_are_left_out_where_they_are_not_wanted(client, asked):
    told = client().post("/v1/captions", json=asked(masks=False)).json()["regions"]
    assert all(each["mask"] is None and each["caption"] for each in told)


def test_a_stream_has_each_region_as_it_is_there(client, asked, scene):
    answer = client(max_regions_per_turn=2).post("/v1/captions", json=asked(stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    told = events(answer.text)
    assert told[0][0] == "found"
    assert told[0][1]["regions"] == len(scene.regions)
    assert [data["region_id"] for name, data in told if name == "region"] == list(range(len(scene.regions)))
    assert told[-1] == ("done", {"regions": len(scene.regions)})


def test_everything_returns_the_best_regions_up_to_max_regions(client, asked):
    every, best = (
        client().post("/v1/captions", json=asked(everything={"points_per_side": 8, **limit})).json()["regions"]
        for limit in ({}, {"max_regions": 2})
    )
    assert len(every) > 2
    assert [(each["box"], each["caption"]) for each in best] == [(each["box"], each["caption"]) for each in every[:2]]
    refused = client().post("/v1/captions", json=asked(everything={"max_regions": 0}))
    assert refused.status_code == 422


def test_everything_streams_its_search_and_its_regions(client, asked):
    same = client()
    body = asked(everything={"points_per_side": 8})
    whole = same.post("/v1/captions", json=body).json()["regions"]
    told = events(same.post("/v1/captions", json=body, headers={"accept": "text/event-stream"}).text)
    assert told[0][0] == "searched"
    assert [data for name, data in told if name == "region"] == whole
    assert whole


def test_the_chat_route_answers_openai_clients(client, asked, scene, tiny):
    region = scene.regions[0]
    url = f"data:image/png;base64,{asked()['image']}"
    image = {"type": "image_url", "image_url": {"url": url}}
    message = {"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]}
    (expected,) = tiny.caption(scene.image, [Prompt(box=region.box)])
    same = client()
    told = same.post("/v1/chat/completions", json={"messages": [message], "box": region.box, "presence_penalty": 0})
    assert told.json()["choices"][0]["message"] == {"role": "assistant", "content": expected.text}
    assert told.json()["region"]["mask"] == expected.mask
    box = ",".join(f"{value:g}" for value in region.box)
    spoken = {"role": "user", "content": [image, {"type": "text", "text": f"What is at box={box}?"}]}
    told = same.post("/v1/chat/completions", json={"model": "sca-tiny", "messages": [spoken], "n": 2}).json()
    assert len(told["choices"]) == 2
    streamed = same.post("/v1/chat/completions", json={"messages": [message], "box": region.box, "stream": True}).text
    chunks = [line.removeprefix("data: ") for line in streamed.splitlines() if line]
    assert chunks[-1] == "[DONE]"
    assert json.loads(chunks[0])["choices"][0]["delta"]["content"] == expected.text
    whole = same.post("/v1/chat/completions", json={"messages": [message]}).json()["region"]
    assert whole["box"] == [0, 0, *scene.image.size]
    assert same.get("/v1/models").json()["data"][0]["id"] == "sca-tiny"
    wrong = same.post("/v1/chat/completions", json={"model": "gpt-4o", "messages": [message]})
    assert (wrong.status_code, wrong.json()["error"]["message"]) == (404, "no model 'gpt-4o' here: there is 'sca-tiny'")


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        (";".join(["point=10,10,1"] * 300), 413, "a prompt of 300 points, and 256 are allowed"),
        (";".join(["point=10,10,1"] * 45_000), 422, "the text has 135,000 numbers, and 2,048 are searched"),
        ("box=9,9,1,1", 422, "the box 9,9,1,1 is reversed"),
        ("box=1,1,9,9;box=1,1,9,9", 422, "the text contains more than one box"),
    ],
)
def test_chat_text_has_the_limits_of_other_prompts(client, asked, text, status, message):
    url = f"data:image/png;base64,{asked()['image']}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    answer = client().post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]})
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]["message"]


def test_defaults_of_a_checkpoint_are_bounded_by_the_limits_of_the_server(client, asked, tiny, monkeypatch):
    spec = tiny.model.spec.apply_overrides(
        [
            "generation={num_beams=64, max_new_tokens=4096}",
            "everything={points_per_side=100, crop_n_layers=3, box_nms_thresh=0.5}",
        ]
    )
    monkeypatch.setattr(tiny.model, "spec", spec)
    questions = []

    def refuse(scheduler, question, on_event):
        questions.append(question)
        raise QueueFullError("full")

    monkeypatch.setattr(RequestScheduler, "submit", refuse)
    same = client()
    for fields in ({"everything": True}, {"prompts": BOX, "max_new_tokens": 5}):
        assert same.post("/v1/captions", json=asked(**fields)).status_code == 503
    searched, prompted = questions
    everything = searched.everything
    assert (everything.points_per_side, everything.crop_n_layers, everything.box_nms_thresh) == (64, 2, 0.5)
    assert searched.generation == {"num_beams": 16, "max_new_tokens": 128}
    assert prompted.generation == {"num_beams": 16, "max_new_tokens": 5}


def test_health_and_metrics(client, asked, scene):
    same = client()
    same.post("/v1/captions", json=asked())
    same.post("/v1/captions", json=asked())
    same.get("/nowhere/at/all")
    assert same.get("/health").json() == {"status": "ok", "model": "sca-tiny", "device": "cpu", "waiting": 0}
    page = same.get("/metrics").text
    assert 'sca_requests_total{route="/v1/captions",status="200"} 2.0' in page
    assert 'sca_requests_total{route="other",status="404"} 1.0' in page
    assert f"sca_regions_total {2.0 * len(scene.regions)}" in page
    assert 'sca_feature_lookups_total{found="yes"} 1.0' in page
    assert "sca_waiting_regions 0.0" in page


WRONG = {
    "no region": ({"prompts": []}, 422, "neither prompts nor everything"),
    "both": ({"prompts": BOX, "everything": True}, 422, "both prompts and everything"),
    "box of three": ({"prompts": [{"box": [1, 2, 3]}]}, 422, "prompts.0, 'box': a box is 4 numbers x1,y1,x2,y2"),
    "reversed": ({"prompts": [{"box": [9, 9, 1, 1]}]}, 422, "the box 9,9,1,1 is reversed"),
    "outside": ({"prompts": [{"points": [[5000, 1]]}]}, 422, "prompts.0: the point 5000,1,1 is outside the 96 x 96"),
    "huge number": ({"prompts": [{"box": [0, 0, 1e308, 10**400]}]}, 422, "is not a finite number"),
    "mask of another size": (
        {"prompts": [{"mask": masks.encode_rle(np.ones((20_000, 8_000), bool))}]},
        422,
        "prompts.0, 'mask': the mask is 8000 x 20000, the image 96 x 96",
    ),
    "mask that is none": ({"prompts": [{"mask": {"size": [96, 96], "counts": "zz"}}]}, 422, "prompts.0, 'mask': "),
    "a file": ({"prompts": [{"mask": "/etc/passwd"}]}, 422, "an RLE, not a file's name"),
    "empty prompt": ({"prompts": [{}]}, 422, "prompts.0: no 'box', 'points' or 'mask'"),
    "another field": ({"prompts": BOX, "boxes": 1}, 422, "boxes: Extra inputs are not permitted"),
    "another task": ({"prompts": BOX, "task": "poem"}, 422, "task: Input should be 'caption' or 'recognition'"),
    "temperature": ({"prompts": BOX, "temperature": 1}, 422, "temperature can only be used with do_sample=true"),
    "captions": (
        {"prompts": BOX, "num_captions": 4, "num_beams": 2},
        422,
        "num_captions=4 needs num_beams=4 or more, not 2",
    ),
    "beams": ({"prompts": BOX, "num_beams": 10**9}, 422, "num_beams: Input should be less than or equal to 16"),
    "too many": ({"prompts": BOX * 5000}, 413, "5,000 prompts, and 4,096 are allowed"),
    "many points": (
        {"prompts": [{"points": [[1, 1]] * 40_000}]},
        413,
        "a prompt of 40,000 points, and 256 are allowed",
    ),
    "many points in all": (
        {"prompts": [{"points": [[1, 1]] * 256}] * 65},
        413,
        "16,640 points, and 16,384 are allowed",
    ),
    "many values": ({"prompts": [{"points": [[]] * 2**19}]}, 413, "more than the 1,048,576 values that are allowed"),
    "no image": ({"prompts": BOX, "image": ""}, 422, "the image is empty (0 bytes)"),
    "not base64": ({"prompts": BOX, "image": "?!"}, 422, "image: not base64"),
    "fetched": ({"prompts": BOX, "image": "http://127.0.0.1/a.png"}, 422, "pictures are not fetched from elsewhere"),
    "broken": ({"prompts": BOX, "image": "iVBORw0KGgo="}, 422, "the image"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_line_with_its_status(client, asked, name):
    fields, status, message = WRONG[name]
    text = json.dumps({**asked(prompts=[]), **fields}).replace("1" + "0" * 400, "1e400")
    answer = client().post("/v1/captions", content=text, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]["message"]
    assert "Traceback" not in answer.text


def test_a_picture_is_turned_away_for_its_pixels_before_it_is_decoded(client, asked):
    bomb = io.BytesIO()
    Image.new("1", (20_000, 5_000)).save(bomb, "PNG")
    answer = client().post("/v1/captions", json=asked(image=base64.b64encode(bomb.getvalue()).decode()))
    assert answer.status_code == 413
    assert answer.json()["error"]["message"] == (
        "the image has 100,000,000 pixels (20000 x 5000), 50,000,000 are allowed; scale it down"
    )


def test_what_is_no_request_is_said(client, asked):
    same = client(ServerLimits(max_body_bytes=100_000))
    for content, kind, status, message in (
        (b"{", "application/json", 422, "Invalid JSON"),
        (b"[" * 50_000, "application/json", 422, "Invalid JSON"),
        (b"a=1", "application/x-www-form-urlencoded", 415, "send application/json or multipart/form-data"),
        (b"nothing", "multipart/form-data", 400, "boundary"),
        (b"nothing", "multipart/form-data; boundary=x", 400, ""),
        (b"--x--\r\n", "multipart/form-data; boundary=x", 422, "no file in the field 'image'"),
        (b" " * 200_000, "application/json", 413, "more than the 100,000 bytes that are allowed"),
    ):
        answer = same.post("/v1/captions", content=content, headers={"content-type": kind})
        assert answer.status_code == status, (content[:20], answer.text)
        assert message.lower() in answer.json()["error"]["message"].lower()
    assert same.get("/v1/captions").status_code == 405
    assert same.post("/v1/captions", json=asked()).status_code == 200


def test_health_is_503_once_the_server_ends_or_the_model_has_stopped(client, asked, tiny, monkeypatch):
    def answer(*_, **__):
        raise SystemExit

    monkeypatch.setattr(tiny, "caption_batch", answer)
    dead = client()
    told = dead.post("/v1/captions", json=asked())
    assert told.status_code == 503
    assert told.json()["error"]["message"] == "the model has stopped working; restart the server"
    assert (dead.get("/health").status_code, dead.get("/health").json()["status"]) == (503, "down")
    draining = client()
    draining.app.state.scheduler.drain(60)
    assert (draining.get("/health").status_code, draining.get("/health").json()["status"]) == (503, "draining")


def test_what_requests_hold_is_given_back(client, asked, scene):
    same = client()
    budget = same.app.state.budget
    for fields in ({}, {"image": "?"}, {"prompts": []}, {"stream": True}):
        same.post("/v1/captions", json=asked(**fields))
        assert budget.leased_bytes == 0
    large = io.BytesIO()
    Image.new("RGB", (2000, 2000)).save(large, "PNG")
    mask = masks.encode_rle(np.ones((2000, 2000), bool))
    image = base64.b64encode(large.getvalue()).decode()
    with budget.create_lease() as other:
        other.resize(budget.max_request_bytes)
        assert same.post("/v1/captions", json=asked()).status_code == 200, "small requests always have room"
    assert same.post("/v1/captions", json=asked(image=image, prompts=[{"mask": mask}])).status_code == 200
    assert budget.leased_bytes == 0


def test_a_large_image_waits_for_memory_no_longer_than_allowed(client, asked):
    same = client(ServerLimits(timeout=1))
    large = io.BytesIO()
    Image.new("RGB", (2000, 2000)).save(large, "PNG")
    with same.app.state.budget.create_lease() as other:
        other.resize(same.app.state.budget.max_request_bytes)
        told = same.post("/v1/captions", json=asked(image=base64.b64encode(large.getvalue()).decode()))
    assert told.status_code in (503, 504)
    assert same.app.state.budget.leased_bytes == 0


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_large_images_together_wait_for_memory_and_not_for_each_other(client, asked, kind):
    """Those that are decoded hold memory for which the next one waits; they must go on meanwhile."""
    same, large = client(ServerLimits(timeout=120)), io.BytesIO()
    same.app.state.budget.max_bytes = 64 * 2**20
    Image.new("RGBA", (1000, 1000)).save(large, "PNG")
    prompt = {"box": [1, 1, 90, 90]} if kind == "box" else {"mask": masks.encode_rle(np.ones((1000, 1000), bool))}
    body = asked(image=base64.b64encode(large.getvalue()).decode(), prompts=[prompt], masks=False)
    with ThreadPoolExecutor(14) as pool:
        statuses = list(pool.map(lambda _: same.post("/v1/captions", json=body).status_code, range(14)))
    assert statuses == [200] * 14
    assert same.app.state.budget.leased_bytes == 0


def test_a_request_without_memory_is_told_so(client, asked, monkeypatch):
    def decode(*_):
        raise MemoryError

    monkeypatch.setattr("sca.serve.service.decode_image", decode)
    told = client().post("/v1/captions", json=asked())
    assert told.status_code == 503
    assert told.json()["error"]["message"].startswith("not enough memory")
    assert "retry-after" in told.headers


def test_a_long_answer_has_the_form_of_a_short_one(client, asked, scene):
    same, prompts = client(), [{"box": list(scene.regions[0].box)}] * 70
    long = same.post("/v1/captions", json=asked(prompts=prompts)).json()
    short = same.post("/v1/captions", json=asked(prompts=prompts[:2])).json()
    assert [each["region_id"] for each in long["regions"]] == list(range(70))
    for region in (*long["regions"], *short["regions"]):
        assert region.keys() == short["regions"][0].keys()
        assert (region["caption"], region["mask"]) == (short["regions"][0]["caption"], short["regions"][0]["mask"])
    assert {**long, "regions": []} == {**short, "regions": []}


def test_who_waits_too_long_is_told(client, asked, monkeypatch, tiny):
    usual = tiny.caption_batch
    monkeypatch.setattr(tiny, "caption_batch", lambda *a, **b: (time.sleep(1.5), usual(*a, **b))[1])
    told = client(ServerLimits(timeout=0.6)).post("/v1/captions", json=asked())
    assert told.status_code == 504
    assert "no answer in 0.6 s" in told.json()["error"]["message"]


def test_a_full_queue_says_when_to_come_again(client, asked):
    told = client(max_queue=2).post("/v1/captions", json=asked())
    assert told.status_code == 503
    assert told.headers["retry-after"] == "1"


@pytest.mark.slow
def test_a_client_that_leaves_is_not_computed_for(served, asked, tiny, monkeypatch):
    usual, regions = tiny.caption_batch, []

    def slow(encoded, requests, *rest, **more):
        time.sleep(0.3)
        regions.append(sum(map(len, requests)))
        return usual(encoded, requests, *rest, **more)

    monkeypatch.setattr(tiny, "caption_batch", slow)
    url = served(max_regions_per_turn=2)
    prompts = [{"box": [0, 0, 50, 50]}] * 200
    for stream in (False, True):
        regions.clear()
        if stream:
            with httpx.stream("POST", f"{url}/v1/captions", json=asked(prompts=prompts, stream=True)) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/captions", json=asked(prompts=prompts), timeout=1.0)
        time.sleep(2)
        seen = sum(regions)
        time.sleep(1)
        assert sum(regions) == seen
        assert seen < 60
    assert httpx.get(f"{url}/health").json()["waiting"] == 0


@pytest.mark.slow
def test_many_clients_get_what_each_would_get_alone(served, asked, scene, tiny):
    url = served()
    prompts = [Prompt(box=region.box) for region in scene.regions]
    expected = [each.text for each in tiny.caption(scene.image, prompts)]

    def ask(_):
        told = httpx.post(f"{url}/v1/captions", json=asked(), timeout=60).json()
        return [region["caption"] for region in told["regions"]]

    with ThreadPoolExecutor(16) as pool:
        assert all(captions == expected for captions in pool.map(ask, range(64)))
