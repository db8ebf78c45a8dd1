"""Predictions for Label Studio: prompts of tasks, results, and the images that may be downloaded."""

import base64
import json
import subprocess
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from sca_registry.contracts import Prompt
from tool_environment import create_tool_environment

from sca.io import masks
from sca.io.annotations import label_studio
from sca.io.annotations.annotation import SkipCounter
from sca.io.annotations.brush_rle import encode_brush_rle
from sca.io.errors import InputError
from sca.serve.app import create_app
from sca.serve.scheduler import RequestScheduler
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
def make_backend(captioner):
    """Function that returns a client of an application with the routes of Label Studio."""
    open_clients = []

    def make(api_keys=(), **options):
        app = create_app(
            RequestScheduler(captioner),
            "sca-tiny",
            api_keys=api_keys,
            zoom="off",
            task_images=TaskImageReader(**options),
        )
        client = TestClient(app, raise_server_exceptions=False)
        client.__enter__()
        open_clients.append(client)
        return client

    yield make
    for client in open_clients:
        client.__exit__(None, None, None)


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


def test_backend_connects_and_ignores_events_and_foreign_addresses(make_backend):
    client = make_backend()
    setup = {"project": "1.1", "schema": CONFIG, "hostname": "http://evil.example", "access_token": "x"}
    assert client.post("/setup", json=setup).json() == {"model_version": "sca-tiny"}
    assert client.get("/health").status_code == 200
    assert client.post("/webhook", json={"action": "ANNOTATION_CREATED"}).status_code == 201


def test_backend_accepts_its_key_as_password_of_basic_authentication(make_backend):
    client = make_backend(api_keys=["secret"])
    assert client.post("/setup", json={}).status_code == 401
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
    "a file": ({"id": 3, "data": {"photo": "file:///etc/passwd"}}, None, CONFIG, "task 3: file:/etc/passwd is not"),
    "a path": ({"data": {"photo": "/etc/passwd"}}, None, CONFIG, "is a path; start the server with --label-studio-url"),
    "a relative path": ({"data": {"photo": "../x.png"}}, None, CONFIG, "is not downloaded"),
    "another host": (
        {"data": {"photo": "http://169.254.169.254/latest"}},
        None,
        CONFIG,
        "is not downloaded; start the",
    ),
    "no image file": ({"data": {"photo": "data:image/png;base64,AAAA"}}, None, CONFIG, "the image"),
}


@pytest.mark.parametrize("case_name", INVALID_REQUESTS)
def test_backend_rejects_invalid_requests_in_one_line(make_backend, case_name):
    task, context, config, message = INVALID_REQUESTS[case_name]
    response = predict(make_backend(), task, context=context, config=config)
    assert response.status_code == 422, response.text
    assert message in response.json()["error"]["message"]
    assert "\n" not in response.json()["error"]["message"]


def test_backend_rejects_a_shape_of_another_image_size(make_backend, data_url):
    value = {"format": "rle", "rle": encode_brush_rle(np.ones((30, 40), bool)), "brushlabels": ["cat"]}
    result = make_result((40, 30), "b", "brushlabels", value)
    response = predict(make_backend(), {"data": {"photo": data_url}, "annotations": [{"result": [result]}]})
    assert response.status_code == 422
    assert "task 0, region 'b': cannot read the brush" in response.json()["error"]["message"]


@contextmanager
def run_image_server(png_bytes):
    """Run a server of images that requires a key, with redirects; `requests` lists paths and Authorization headers."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append((self.path, self.headers.get("Authorization")))
            if self.path.startswith("/redirect?"):
                self.send_response(302)
                self.send_header("Location", self.path.partition("?")[2])
                self.end_headers()
                return
            is_authorized = self.headers.get("Authorization") in (f"Token {LEGACY_KEY}", "Bearer short-lived")
            self.send_response(200 if is_authorized or self.path.startswith("/public") else 401)
            self.end_headers()
            self.wfile.write(png_bytes)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, body))
            self.send_response(200 if body == {"refresh": PERSONAL_TOKEN} else 401)
            self.end_headers()
            self.wfile.write(b'{"access": "short-lived"}')

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_backend_downloads_images_of_allowed_servers_only(make_backend, png_bytes, scene):
    shape = {"annotations": [{"result": [make_box_result(scene.image.size, "r", (4, 5, 60, 70))]}]}
    with run_image_server(png_bytes) as (url, requests), run_image_server(png_bytes) as (other_url, other_requests):

        def read_status(client, source):
            response = predict(client, {"id": 5, "data": {"photo": source}, **shape})
            assert LEGACY_KEY not in response.text
            return response.status_code, response.json().get("error", {}).get("message", "")

        client = make_backend(label_studio_url=f"{url}/", api_key=LEGACY_KEY)
        for source in ("/data/upload/1/a.png", "upload/1/a.png", f"{url}/a.png", f"{url}/redirect?/b.png"):
            assert read_status(client, source)[0] == 200, source
        assert {key for _, key in requests} == {f"Token {LEGACY_KEY}"}
        assert requests[0][0] == "/data/upload/1/a.png"
        for source in (f"{other_url}/public.png", f"{url}/redirect?{other_url}/public.png", f"//{other_url[7:]}/a.png"):
            status, message = read_status(client, source)
            assert (status, "is not downloaded" in message) == (422, True), message
        assert not other_requests
        assert "more than 3 redirects" in read_status(client, f"{url}/redirect?/redirect?/redirect?/redirect?/a.png")[1]
        assert read_status(client, url.replace("http://", "http://user:password@"))[0] == 422

        client = make_backend(label_studio_url=url, image_urls=[other_url], api_key=LEGACY_KEY)
        assert read_status(client, f"{url}/redirect?{other_url}/public.png")[0] == 200
        assert other_requests == [("/public.png", None)]  # the key is not sent to other hosts

        personal = make_backend(label_studio_url=url, api_key=PERSONAL_TOKEN)
        assert read_status(personal, "/a.png")[0] == 200
        assert requests[-2:] == [("/api/token/refresh", {"refresh": PERSONAL_TOKEN}), ("/a.png", "Bearer short-lived")]
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


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://host", "http://", "http://user@host", "http://host/?a=b"])
def test_task_image_reader_rejects_invalid_server_urls(url):
    with pytest.raises(InputError, match="is not the URL of a server; write it like http://localhost:8080"):
        TaskImageReader(url)


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
