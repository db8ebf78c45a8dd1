"""Predictions for Label Studio: prompts of tasks, results, and the images that may be downloaded."""

import base64
import json
import subprocess
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from sca_registry.contracts import Prompt
from tool_environment import create_tool_environment

from sca.io import masks
from sca.io.annotations import label_studio
from sca.io.annotations.annotation import SkipCounter
from sca.io.annotations.brush_rle import encode_brush_rle
from sca.io.errors import InputError
from sca.output import label_studio as output_label_studio
from sca.serve.app import create_app
from sca.serve.label_studio import MASK_CODEC_BYTES_PER_PIXEL
from sca.serve.limits import ServerLimits
from sca.serve.limits_middleware import BODY_MEMORY_FACTOR
from sca.serve.scheduler import RequestScheduler
from sca.serve.service import ALWAYS_ALLOWED_MASK_PIXELS, DECODED_BYTES_PER_PIXEL
from sca.serve.task_images import TaskImageReader

CONFIG = """<View>
  <Image name="img" value="$photo" zoom="true"/>
  <BrushLabels name="brush" toName="img"><Label value="thing"/><Label value="cat"/></BrushLabels>
  <RectangleLabels name="rect" toName="img" smart="true"><Label value="thing"/><Label value="cat"/></RectangleLabels>
  <KeyPointLabels name="key" toName="img" smart="true"><Label value="thing"/><Label value="cat"/></KeyPointLabels>
  <TextArea name="text" toName="img" perRegion="true"/>
</View>"""
LEGACY_KEY, PERSONAL_TOKEN = "0123456789abcdef", "header.payload.signature"


@pytest.fixture
def make_backend(captioner, open_client):
    """Function that returns a client of an application with the routes of Label Studio."""

    def make(api_keys=(), limits=None, task_images=None, **options):
        app = create_app(
            RequestScheduler(captioner),
            "sca-tiny",
            limits,
            api_keys=api_keys,
            zoom="off",
            task_images=task_images or TaskImageReader(**options),
        )
        return open_client(app)

    return make


@pytest.fixture
def data_url(png_bytes):
    return f"data:image/png;base64,{base64.b64encode(png_bytes).decode()}"


def make_result(size, result_id, shape_type, value, **fields):
    width, height = size
    fields = {"original_width": width, "original_height": height, "image_rotation": 0, **fields}
    return {"id": result_id, "type": shape_type, "to_name": "img", "from_name": "x", "value": value, **fields}


def make_box_result(size, result_id, box, label="cat", **fields):
    (width, height), (x1, y1, x2, y2) = size, box
    value = {"x": 100 * x1 / width, "y": 100 * y1 / height, "rotation": 0, "rectanglelabels": [label]}
    value |= {"width": 100 * (x2 - x1) / width, "height": 100 * (y2 - y1) / height}
    return make_result(size, result_id, "rectanglelabels", value, **fields)


def make_point_result(size, point, is_positive=True):
    value = {"x": 100 * point[0] / size[0], "y": 100 * point[1] / size[1], "width": 0.3, "keypointlabels": ["cat"]}
    return make_result(size, f"p{point}", "keypointlabels", value, is_positive=is_positive)


def predict(client, *tasks, context=None, config=CONFIG):
    params = {"login": None, "password": None, "context": context}
    body = {"tasks": list(tasks), "project": "1.1700000000", "label_config": config, "params": params}
    return client.post("/predict", json=body)


def read_error(response):
    """Return the status and the message of an error response."""
    return response.status_code, response.json().get("error", {}).get("message", "")


def read_predicted_regions(prediction, size):
    """Return the regions of a prediction, as Label Studio would export them."""
    return label_studio.read_regions(prediction["result"], size, "prediction", SkipCounter())


def assert_regions_equal(regions, captions):
    for region, caption in zip(regions, captions, strict=True):
        assert region.captions == (caption.text,)
        assert region.mask == caption.mask
        if caption.mask is None:
            assert region.box == pytest.approx(caption.box)


def test_backend_predicts_the_regions_of_an_annotation(make_backend, captioner, scene, data_url):
    size, boxes = scene.image.size, [region.box for region in scene.regions]
    results = [make_box_result(size, f"r{number}", box) for number, box in enumerate(boxes)]
    mask = np.zeros(size[::-1], bool)
    mask[10:30, 20:50] = True
    value = {"format": "rle", "rle": encode_brush_rle(mask), "brushlabels": ["other"]}
    results.append(make_result(size, "brush", "brushlabels", value))
    text = {"text": ["an old caption"]}
    results.append(make_result(size, "r0", "textarea", text))
    predictions = [{"result": [make_box_result(size, "old", (1, 1, 9, 9))]}]
    task = {"id": 7, "data": {"photo": data_url}, "annotations": [{"result": results}], "predictions": predictions}
    response = predict(make_backend(), task)
    assert response.status_code == 200, response.text
    assert response.json()["model_version"] == "sca-tiny"
    (prediction,) = response.json()["results"]
    expected = captioner.caption(scene.image, [*(Prompt(box=box) for box in boxes), Prompt(mask=mask)])
    regions = read_predicted_regions(prediction, size)
    assert_regions_equal(regions, expected)
    assert [region.label for region in regions] == ["cat"] * len(boxes) + ["thing"]  # "other" is not in the interface
    assert prediction["score"] == pytest.approx(np.mean([caption.score for caption in expected]))
    assert len({result["id"] for result in prediction["result"]}) == len(expected)
    assert {result["from_name"] for result in prediction["result"]} == {"brush", "text"}


def test_backend_predicts_one_region_of_a_smart_tool(make_backend, captioner, scene, data_url):
    size, box = scene.image.size, scene.regions[0].box
    inside = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    points = [make_point_result(size, inside), make_point_result(size, (1.0, 2.0), is_positive=False)]
    task = {"data": {"photo": data_url}, "annotations": [{"result": [make_box_result(size, "r", (1, 1, 90, 90))]}]}
    client = make_backend()
    for results, prompt in (
        (points, Prompt(points=((*inside, 1), (1.0, 2.0, 0)))),
        ([make_box_result(size, "r", box), *points], Prompt(box=box, points=((*inside, 1), (1.0, 2.0, 0)))),
    ):
        (prediction,) = predict(client, task, context={"result": results}).json()["results"]
        (region,) = read_predicted_regions(prediction, size)
        assert_regions_equal([region], captioner.caption(scene.image, [prompt]))
        assert region.label == "cat"


def test_backend_finds_everything_without_shapes(make_backend, make_body, scene, data_url):
    client = make_backend()
    tasks = [{"id": number, "data": {"photo": data_url}, "annotations": []} for number in range(2)]
    response = predict(client, *tasks)
    first, second = response.json()["results"]
    expected = client.post("/v1/captions", json=make_body(everything=True)).json()["regions"]
    assert expected
    for prediction in (first, second):
        regions = read_predicted_regions(prediction, scene.image.size)
        assert [(region.captions[0], region.mask) for region in regions] == [
            (each["caption"], each["mask"]) for each in expected
        ]


def test_backend_writes_rectangles_and_metadata_without_other_controls(make_backend, captioner, scene, data_url):
    config = '<View><Image name="img" value="$photo"/><RectangleLabels name="rect" toName="img"><Label value="thing"/>'
    config += "</RectangleLabels></View>"
    task = {
        "data": {"photo": data_url},
        "drafts": [{"result": [make_box_result(scene.image.size, "r", (4, 5, 60, 70))]}],
    }
    (prediction,) = predict(make_backend(), task, config=config).json()["results"]
    (caption,) = captioner.caption(scene.image, [Prompt(box=(4, 5, 60, 70))])
    (result,) = prediction["result"]
    assert (result["type"], result["from_name"], result["meta"]) == (
        "rectanglelabels",
        "rect",
        {"text": [caption.text]},
    )
    (region,) = read_predicted_regions(prediction, scene.image.size)
    assert region.box == pytest.approx(caption.box)


def test_backend_connects_and_ignores_events(make_backend):
    client = make_backend()
    assert client.post("/setup", json={"project": "1.1", "schema": CONFIG}).json() == {"model_version": "sca-tiny"}
    assert client.get("/health").status_code == 200
    assert client.post("/webhook", json={"action": "ANNOTATION_CREATED"}).status_code == 201


def test_backend_accepts_its_key_as_password_of_basic_authentication(make_backend):
    client = make_backend(api_keys=["secret"])
    status, message = read_error(client.post("/setup", json={}))
    assert (status, message.endswith("or as the password of basic authentication")) == (401, True), message
    assert client.post("/setup", json={}, auth=("any", "wrong")).status_code == 401
    assert client.post("/setup", json={}, auth=("any", "secret")).status_code == 200


def test_application_has_no_label_studio_routes_by_default(make_client):
    assert make_client().post("/predict", json={}).status_code == 404


BOX_RESULT = make_box_result((40, 30), "r", (1, 1, 9, 9))
INVALID_REQUESTS = {
    "no image": ({"data": {}}, None, CONFIG, "task 0: data has no image 'photo'; add its URL"),
    "no interface": ({"data": {"photo": "data:,"}}, None, "<View/>", "has 0 tags <Image"),
    "not XML": ({"data": {"photo": "data:,"}}, None, "<View>", "the labeling configuration is not XML"),
    "entities": ({"data": {"photo": "data:,"}}, None, "<!DOCTYPE a []><View/>", "contains a document type; remove it"),
    "no control": (
        {"data": {"photo": "data:,"}},
        None,
        '<View><Image name="img" value="$photo"/></View>',
        "no BrushLabels or RectangleLabels",
    ),
    "a context without shape": (
        {"data": {"photo": "data:,"}},
        {"result": [{**BOX_RESULT, "to_name": "other"}]},
        CONFIG,
        "task 0: the context has no shape on the image 'img'; draw one",
    ),
    "a file": (
        {"id": 3, "data": {"photo": "file:///etc/passwd"}},
        None,
        CONFIG,
        "task 3: file:/etc/passwd is not downloaded",
    ),
    "a path": ({"data": {"photo": "/etc/passwd"}}, None, CONFIG, "is a path; start the server with --label-studio-url"),
    "a relative path": ({"data": {"photo": "../x.png"}}, None, CONFIG, "is not downloaded"),
    "another host": (
        {"data": {"photo": "http://169.254.169.254/latest"}},
        None,
        CONFIG,
        "is not downloaded; start the",
    ),
    "no image file": ({"id": 4, "data": {"photo": "data:image/png;base64,AAAA"}}, None, CONFIG, "the image of task 4"),
    "an invalid URL": (
        {"data": {"photo": "http://user:password@host:port/"}},
        None,
        CONFIG,
        "task 0: the URL of the image is invalid; use an http(s) URL",
    ),
    "an id with a newline": ({"id": "a\nsca: b", "data": {}}, None, CONFIG, r"task 'a\nsca: b': data has no image"),
}


@pytest.mark.parametrize("case_name", INVALID_REQUESTS)
def test_backend_rejects_invalid_requests_in_one_line(make_backend, case_name):
    task, context, config, message = INVALID_REQUESTS[case_name]
    response = predict(make_backend(), task, context=context, config=config)
    assert response.status_code == 422, response.text
    assert message in response.json()["error"]["message"]
    assert "\n" not in response.json()["error"]["message"]
    assert "password" not in response.text


def make_brush_of_another_size():
    value = {"format": "rle", "rle": encode_brush_rle(np.ones((30, 40), bool)), "brushlabels": ["cat"]}
    return make_result((40, 30), "b", "brushlabels", value)


def make_task(data_url, *results, **fields):
    return {"data": {"photo": data_url}, "annotations": [{"result": list(results)}], **fields}


def test_backend_rejects_a_task_without_a_valid_shape(make_backend, scene, data_url):
    client, size = make_backend(), scene.image.size
    status, message = read_error(predict(client, make_task(data_url, make_brush_of_another_size())))
    assert status == 422
    assert "task 0: no shape can be used" in message
    assert "task 0, region 'b': cannot read the brush" in message
    turned = make_box_result(size, "r", (4, 5, 60, 70), image_rotation=90)
    status, message = read_error(predict(client, make_task(data_url, turned)))
    assert (status, "region on an image that was turned in Label Studio: 1" in message) == (422, True), message


def test_backend_skips_invalid_regions_of_a_task(make_backend, scene, data_url, caplog):
    size = scene.image.size
    valid = make_box_result(size, "r", (4, 5, 60, 70), "thing")
    outside = make_box_result(size, "o", (2 * size[0], 5, 3 * size[0], 70))
    tasks = [make_task(data_url, outside, make_brush_of_another_size(), valid), make_task(data_url, valid)]
    response = predict(make_backend(), *tasks)
    assert response.status_code == 200, response.text
    for prediction in response.json()["results"]:
        (region,) = read_predicted_regions(prediction, size)
        assert region.label == "thing"
    assert "invalid region: 2 (first: task 0, region 'b': cannot read" in caplog.text


def test_backend_predicts_the_other_tasks_of_a_task_that_fails(make_backend, scene, data_url, caplog):
    size, client = scene.image.size, make_backend()
    box = make_box_result(size, "r", (4, 5, 60, 70))
    failing_tasks = {
        "data has no image 'photo'": {"id": 1, "data": {}},
        "the image of task 2": make_task("data:image/png;base64,AAAA", id=2),
        "http://other.example/a.png is not downloaded": make_task("http://other.example/a.png", id=3),
        "no shape can be used": make_task(data_url, make_brush_of_another_size(), id=4),
    }
    valid_task = make_task(data_url, box, id=5)
    response = predict(client, *failing_tasks.values(), valid_task)
    assert response.status_code == 200, response.text
    *failed, prediction = response.json()["results"]
    assert failed == [[]] * len(failing_tasks)
    assert prediction["result"]
    assert len(read_predicted_regions(prediction, size)) == 1
    messages = [record.getMessage() for record in caplog.records if "has no prediction" in record.getMessage()]
    for number, (message, expected) in enumerate(zip(messages, failing_tasks, strict=True), 1):
        assert message.startswith(f"sca: task {number} has no prediction: ")
        assert expected in message
    status, message = read_error(predict(client, *failing_tasks.values()))
    assert (status, message) == (422, "task 1: data has no image 'photo'; add its URL")


def test_backend_releases_the_memory_of_a_task_that_fails(make_backend, scene, data_url):
    leased_bytes = []

    class RecordingReader(TaskImageReader):
        async def read(self, source, location, seconds, lease):
            leased_bytes.append(lease.leased_bytes)
            return await super().read(source, location, seconds, lease)

    failing_task = make_task(data_url, make_brush_of_another_size())
    valid_task = make_task(data_url, make_box_result(scene.image.size, "r", (4, 5, 60, 70)))
    response = predict(make_backend(task_images=RecordingReader()), failing_task, valid_task)
    assert response.status_code == 200, response.text
    assert leased_bytes[0] == leased_bytes[1]


@pytest.mark.parametrize("is_point", [False, True])
def test_backend_rejects_smart_tools_on_a_rotated_image(make_backend, scene, data_url, is_point):
    size = scene.image.size
    result = make_point_result(size, (9, 9)) if is_point else make_box_result(size, "r", (4, 5, 60, 70))
    context = {"result": [{**result, "image_rotation": 90}]}
    status, message = read_error(predict(make_backend(), {"data": {"photo": data_url}}, context=context))
    assert (status, message) == (422, "task 0: the image is rotated in Label Studio; reset the rotation")


def test_backend_counts_a_context_shape_once(make_backend, scene, data_url, caplog):
    size = scene.image.size
    value = {"x": 50, "y": 50, "radiusX": 0.3, "radiusY": 0.3, "ellipselabels": ["cat"]}
    context = {"result": [make_result(size, "e", "ellipselabels", value), make_point_result(size, (50, 50))]}
    response = predict(make_backend(), {"data": {"photo": data_url}}, context=context)
    assert response.status_code == 200, response.text
    assert "shape covering no pixel, read as its box: 1 " in caplog.text


@pytest.mark.parametrize(("choice", "expected"), [("single", "cat"), ("multiple", "cat, thing")])
def test_backend_keeps_the_accepted_labels_of_a_shape(make_backend, scene, data_url, choice, expected):
    result = make_box_result(scene.image.size, "r", (4, 5, 60, 70))
    result["value"]["rectanglelabels"] = ["other", "cat", "thing"]
    config = CONFIG.replace("<BrushLabels", f'<BrushLabels choice="{choice}"')
    for context in (None, {"result": [result]}):
        response = predict(make_backend(), make_task(data_url, result), context=context, config=config)
        (region,) = read_predicted_regions(response.json()["results"][0], scene.image.size)
        assert region.label == expected


def test_backend_checks_counts_before_images_are_read(make_backend):
    box, points = make_box_result((40, 30), "r", (1, 1, 9, 9)), [make_point_result((40, 30), (1, 1))] * 4
    cases = [
        (ServerLimits(max_prompts=3), 2, [box, {**box, "id": "s"}], None, "has 4 prompts; at most 3"),
        (ServerLimits(max_prompts=3), 4, [], {"result": [box]}, "has 4 prompts; at most 3"),
        (ServerLimits(max_points=3), 1, [], {"result": points}, "a prompt has 4 points; at most 3"),
        (ServerLimits(max_points_per_request=7), 2, [], {"result": points}, "have 8 points; at most 7"),
        (ServerLimits(max_points_per_request=7), 2, points, None, "have 8 points; at most 7"),
    ]
    for limits, num_tasks, results, context, expected in cases:
        tasks = [make_task("http://other.example/a.png", *results) for _ in range(num_tasks)]
        status, message = read_error(predict(make_backend(limits=limits), *tasks, context=context))
        assert (status, expected in message) == (413, True), message


def test_backend_counts_rotated_rectangles_as_masks(make_backend, scene, data_url):
    size = scene.image.size
    num_masks = ALWAYS_ALLOWED_MASK_PIXELS // (size[0] * size[1]) + 1
    result = make_box_result(size, "r", (4, 5, 60, 70))
    result["value"]["rotation"] = 30
    task = make_task(data_url, *({**result, "id": f"r{number}"} for number in range(num_masks)))
    client = make_backend(limits=ServerLimits(max_pixels=size[0] * size[1], max_prompts=2 * num_masks))
    status, message = read_error(predict(client, task))
    assert (status, f"{num_masks} masks of {size[0]} x {size[1]} pixels for the image of task 0" in message) == (
        413,
        True,
    ), message


def test_backend_processes_masks_in_their_thread_within_the_memory_lease(make_backend, scene, data_url, monkeypatch):
    size, client, calls = scene.image.size, make_backend(), []

    def record_call(function):
        def call(*arguments):
            calls.append((threading.current_thread().name, client.app.state.budget.leased_bytes))
            return function(*arguments)

        return call

    monkeypatch.setattr(label_studio, "decode_brush_rle", record_call(label_studio.decode_brush_rle))
    monkeypatch.setattr(output_label_studio, "encode_brush_rle", record_call(encode_brush_rle))
    mask = np.zeros(size[::-1], bool)
    mask[10:30, 20:50] = True
    value = {"format": "rle", "rle": encode_brush_rle(mask), "brushlabels": ["cat"]}
    response = predict(client, make_task(data_url, make_result(size, "b", "brushlabels", value)))
    body_bytes = BODY_MEMORY_FACTOR * len(response.request.content)
    min_bytes = body_bytes + (DECODED_BYTES_PER_PIXEL + 1 + MASK_CODEC_BYTES_PER_PIXEL) * size[0] * size[1]
    assert len(calls) == 2
    for thread, leased_bytes in calls:
        assert thread.startswith("sca-masks")
        assert leased_bytes >= min_bytes
    assert client.app.state.budget.leased_bytes == 0


def test_backend_keeps_the_body_and_earlier_predictions_in_the_memory_lease(make_backend, scene, data_url):
    leased_bytes = []

    class RecordingReader(TaskImageReader):
        async def read(self, source, location, seconds, lease):
            leased_bytes.append(lease.leased_bytes)
            return await super().read(source, location, seconds, lease)

    client = make_backend(task_images=RecordingReader())
    response = predict(client, *[make_task(data_url, make_box_result(scene.image.size, "r", (4, 5, 60, 70)))] * 3)
    assert leased_bytes[0] == BODY_MEMORY_FACTOR * len(response.request.content)
    prediction_bytes = len(json.dumps(response.json()["results"][0], separators=(",", ":")))
    for before, after in pairwise(leased_bytes):
        assert after - before == pytest.approx(prediction_bytes, rel=0.05)


def test_backend_reports_the_completed_tasks_of_a_timeout(make_backend, scene, data_url, monkeypatch):
    def read_slowly(*arguments):
        time.sleep(3)
        return []

    monkeypatch.setattr(label_studio, "read_regions", read_slowly)
    task = make_task(data_url, make_box_result(scene.image.size, "r", (4, 5, 60, 70)))
    start = time.monotonic()
    status, message = read_error(predict(make_backend(limits=ServerLimits(timeout=0.5)), task, task))
    assert time.monotonic() - start < 2.5
    assert (status, message) == (
        504,
        "0 of 2 tasks completed within 0.5 s; send fewer tasks per request, or increase --timeout",
    )


def test_backend_reads_no_more_tasks_of_a_disconnected_client(make_backend, scene, data_url):
    num_read = 0

    class CountingReader(TaskImageReader):
        async def read(self, *arguments):
            nonlocal num_read
            num_read += 1
            return await super().read(*arguments)

    client = make_backend(task_images=CountingReader())
    body = {"tasks": [make_task(data_url)] * 3, "label_config": CONFIG}
    messages = [{"type": "http.request", "body": json.dumps(body).encode()}]
    statuses = []

    async def receive_message():
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send_message(message):
        statuses.append(message.get("status"))

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/predict",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"transfer-encoding", b"chunked")],
    }
    client.portal.call(client.app, scope, receive_message, send_message)
    assert (num_read, statuses[0]) == (0, 499)


@contextmanager
def run_image_server(png_bytes):
    """Run a server of images that requires a key, with redirects; `requests` lists paths and Authorization headers."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append((self.path, self.headers.get("Authorization")))
            if self.path.startswith(("/redirect?", "/no-location")):
                self.send_response(302)
                if location := self.path.partition("?")[2]:
                    self.send_header("Location", location)
                self.end_headers()
                return
            valid_headers = (f"Token {LEGACY_KEY}", f"Bearer {server.access_token}")
            is_authorized = self.headers.get("Authorization") in valid_headers
            self.send_response(200 if is_authorized or self.path.startswith("/public") else 401)
            self.end_headers()
            self.wfile.write(png_bytes)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, body))
            self.send_response(200 if body == {"refresh": PERSONAL_TOKEN} else 401)
            self.end_headers()
            self.wfile.write(json.dumps({"access": server.access_token}).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.access_token = "short-lived"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests, server
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_backend_downloads_images_of_allowed_servers_only(make_backend, png_bytes, scene):
    shape = {"annotations": [{"result": [make_box_result(scene.image.size, "r", (4, 5, 60, 70))]}]}
    with (
        run_image_server(png_bytes) as (url, requests, server),
        run_image_server(png_bytes) as (other_url, other_requests, _),
    ):

        def read_status(client, source):
            response = predict(client, {"id": 5, "data": {"photo": source}, **shape})
            assert LEGACY_KEY not in response.text
            assert "password" not in response.text
            return read_error(response)

        client = make_backend(label_studio_url=f"{url}/", api_key=LEGACY_KEY)
        for source in ("/data/upload/1/a.png", "upload/1/a.png", f"{url}/a.png", f"{url}/redirect?/b.png"):
            assert read_status(client, source)[0] == 200, source
        assert {key for _, key in requests} == {f"Token {LEGACY_KEY}"}
        assert requests[0][0] == "/data/upload/1/a.png"
        setup = {"project": "1.1", "schema": CONFIG, "hostname": other_url, "access_token": "x"}
        assert client.post("/setup", json=setup).status_code == 200
        assert read_status(client, "/a.png")[0] == 200
        for source in (f"{other_url}/public.png", f"{url}/redirect?{other_url}/public.png"):
            status, message = read_status(client, source)
            assert (status, "is not downloaded; start the server with" in message) == (422, True), message
        assert "use an http(s) or data: URL" in read_status(client, f"//{other_url[7:]}/a.png")[1]
        assert not other_requests
        for source in (url.replace("//", "//user:password@"), f"{url}/redirect?http://user:password@{url[7:]}/a.png"):
            status, message = read_status(client, source)
            assert (status, "is not downloaded; remove its user name" in message) == (422, True), message
        assert "responds with status 302; check the URL" in read_status(client, f"{url}/no-location.png")[1]
        assert "more than 3 redirects" in read_status(client, f"{url}/redirect?/redirect?/redirect?/redirect?/a.png")[1]

        client = make_backend(label_studio_url=url, image_urls=[other_url], api_key=LEGACY_KEY)
        assert read_status(client, f"{url}/redirect?{other_url}/public.png")[0] == 200
        assert other_requests == [("/public.png", None)]  # the key is not sent to other hosts

        personal = make_backend(label_studio_url=url, api_key=PERSONAL_TOKEN)
        assert read_status(personal, "/a.png")[0] == 200
        refresh = ("/api/token/refresh", {"refresh": PERSONAL_TOKEN})
        assert requests[-2:] == [refresh, ("/a.png", "Bearer short-lived")]
        requests.clear()
        assert read_status(personal, "/b.png")[0] == 200
        assert requests == [("/b.png", "Bearer short-lived")]
        requests.clear()
        server.access_token = "another"
        assert read_status(personal, "/c.png")[0] == 200
        assert requests == [("/c.png", "Bearer short-lived"), refresh, ("/c.png", "Bearer another")]
        requests.clear()
        personal = make_backend(label_studio_url=url, image_urls=[other_url], api_key=PERSONAL_TOKEN)
        assert read_status(personal, f"{other_url}/public.png")[0] == 200
        assert requests == []
        wrong_keys = {
            "wrong": "responds with status 401; set LABEL_STUDIO_API_KEY",
            "a.b.c": "rejects its access token",
        }
        for key, message in wrong_keys.items():
            assert message in read_status(make_backend(label_studio_url=url, api_key=key), "/a.png")[1]
        status, message = read_status(make_backend(label_studio_url=url, api_key=LEGACY_KEY, max_bytes=10), "/a.png")
        assert (status, "exceeds the limit of 10 bytes" in message) == (413, True)
    status, message = read_status(client, "/a.png")
    assert (status, "cannot be downloaded" in message) == (422, True)


@pytest.mark.slow
def test_backend_downloads_images_below_the_paths_of_servers_only(make_backend, png_bytes):
    with run_image_server(png_bytes) as (url, requests, _):
        client = make_backend(label_studio_url=f"{url}/studio/", image_urls=[f"{url}/public/a"], api_key=LEGACY_KEY)
        for source in ("/data/a.png", "/studio/data/a.png", f"{url}/studio/b.png", f"{url}/public/a/c.png"):
            response = predict(client, {"data": {"photo": source}})
            assert response.status_code == 200, response.text
        key = f"Token {LEGACY_KEY}"
        paths = ["/studio/data/a.png", "/studio/data/a.png", "/studio/b.png"]
        assert requests == [*((path, key) for path in paths), ("/public/a/c.png", None)]
        requests.clear()
        for source in ("/a.png", "/studios/a.png", "/public/ab.png", "/public/a/%2e%2e/b.png", "/studio/..%5cb.png"):
            status, message = read_error(predict(client, {"data": {"photo": f"{url}{source}"}}))
            assert (status, "is not downloaded; start the server with" in message) == (422, True), message
        assert "is not downloaded" in read_error(predict(client, {"data": {"photo": "/../a.png"}}))[1]
        assert requests == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8080", "the URL of --label-studio-url is invalid; write it like http://localhost:8080"),
        ("ftp://host", "is invalid"),
        ("http://", "is invalid"),
        ("http://host:99999", "is invalid"),
        ("http://host:0", "is invalid"),
        ("http://user:password@host", "contains a user name, a query or a fragment; remove it"),
        ("http://host/?a=password", "contains a user name, a query or a fragment; remove it"),
    ],
)
def test_task_image_reader_rejects_invalid_server_urls(url, message):
    with pytest.raises(InputError, match=message) as raised:
        TaskImageReader(url)
    assert "password" not in str(raised.value)


@pytest.mark.all
def test_label_studio_sdk_accepts_equal_predictions(
    make_backend, captioner, scene, data_url, tmp_path, tmp_path_factory
):
    interpreter = create_tool_environment(tmp_path_factory.mktemp("sdk"), "label-studio-sdk")
    size, rng = scene.image.size, np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, min(size), (20, 2, 2)), axis=1).reshape(20, 4)
    boxes = [(x1, y1, min(x2 + 8, size[0]), min(y2 + 8, size[1])) for x1, y1, x2, y2 in corners.tolist()]
    results = [make_box_result(size, f"r{number}", box) for number, box in enumerate(boxes)]
    task = {"id": 1, "data": {"photo": data_url}, "annotations": [{"result": results}]}
    (prediction,) = predict(make_backend(), task).json()["results"]
    (tmp_path / "prediction.json").write_text(json.dumps({"config": CONFIG, "prediction": prediction}))
    script = Path(__file__).with_name("label_studio_validation.py")
    process = subprocess.run([interpreter, script, tmp_path / "prediction.json"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    output = json.loads(process.stdout)
    assert output["errors"] == []
    expected = captioner.caption(scene.image, [Prompt(box=box) for box in boxes])
    assert output["texts"] == [[caption.text] for caption in expected]
    assert output["masks"] == [np.packbits(masks.decode_rle(caption.mask)).tobytes().hex() for caption in expected]
