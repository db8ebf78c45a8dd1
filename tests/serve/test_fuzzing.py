"""Fuzzing: the server reports invalid requests and continues to serve valid ones."""

import base64
import io
import json
import math
import os
import random

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

NUM_REQUESTS = {"reduced": 100, "full": 2000}


@pytest.mark.parametrize("count", ["reduced", pytest.param("full", marks=pytest.mark.all)])
def test_server_responds_to_requests_generated_from_openapi(start_server, make_body, count):
    schemathesis = pytest.importorskip("schemathesis")
    import httpx
    from hypothesis import HealthCheck, Phase, given, settings

    from sca.serve.task_images import TaskImageReader

    url = start_server(task_images=TaskImageReader())
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    statuses = []
    operations = [operation.ok() for operation in schema.get_all_operations()]
    posts = [operation for operation in operations if "requestBody" in operation.definition.raw]
    assert {"/v1/captions", "/predict"} <= {operation.path for operation in posts}
    for operation in operations:
        num_examples = math.ceil(NUM_REQUESTS[count] / len(posts)) if operation in posts else 1

        @given(case=operation.as_strategy())
        @settings(
            max_examples=num_examples,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def send_case(case):
            response = case.call(base_url=url, timeout=60)
            statuses.append(response.status_code)
            assert response.status_code != 500, response.text
            assert "Traceback" not in response.text

        send_case()
    assert len(statuses) >= NUM_REQUESTS[count]
    assert httpx.post(f"{url}/v1/captions", json=make_body(), timeout=60).status_code == 200


@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.all)])
def test_server_responds_to_damaged_requests(start_server, make_body, png_bytes, count):
    import httpx

    url, generator = start_server(), random.Random(0)
    content = json.dumps(make_body()).encode()
    statuses = {}
    with httpx.Client(timeout=60) as client:
        for _ in range(count):
            damage, damaged_content, content_type = damage_request(generator, content, png_bytes)
            response = client.post(
                f"{url}/v1/captions", content=damaged_content, headers={"content-type": content_type}
            )
            statuses.setdefault(damage, set()).add(response.status_code)
            assert response.status_code in (200, 400, 413, 415, 422), (damage, response.text)
            assert "error" in response.json() or response.status_code == 200
        assert client.post(f"{url}/v1/captions", json=make_body()).status_code == 200
    assert len(statuses) == 5, statuses


@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.all)])
def test_server_responds_to_damaged_label_studio_requests(start_server, png_bytes, scene, count):
    import httpx

    from sca.serve.task_images import TaskImageReader

    url, generator = start_server(task_images=TaskImageReader()), random.Random(0)
    valid_bodies = [json.dumps(make_prediction_request(png_bytes, scene.image.size, each)) for each in (False, True)]
    statuses = set()
    with httpx.Client(timeout=60) as client:
        for number in range(count):
            body = json.loads(valid_bodies[number % 2])
            for _ in range(generator.choice([1, 1, 3])):
                replace_random_value(generator, body)
            response = client.post(f"{url}/predict", json=body)
            statuses.add(response.status_code)
            assert response.status_code in (200, 413, 422), (body, response.text)
            if response.status_code != 200:
                assert len(response.json()["error"]["message"].splitlines()) == 1, body
        assert [client.post(f"{url}/predict", json=json.loads(each)).status_code for each in valid_bodies] == [200, 200]
    assert statuses >= {200, 422}


def make_prediction_request(png_bytes, size, has_context):
    """Return a request of Label Studio for four shapes in the context of a smart tool, or else in an annotation."""
    value_by_type = {
        "rectanglelabels": {"x": 10, "y": 10, "width": 30, "height": 20, "rotation": 0, "rectanglelabels": ["cat"]},
        "polygonlabels": {"points": [[10, 10], [60, 10], [30, 70]], "polygonlabels": ["cat"]},
        "rectangle": {"x": 40, "y": 40, "width": 30, "height": 20, "rotation": 15},
        "keypointlabels": {"x": 50, "y": 50, "width": 1, "keypointlabels": ["cat"]},
    }
    fields = {"to_name": "image", "original_width": size[0], "original_height": size[1], "image_rotation": 0}
    results = [{**fields, "id": key, "type": key, "value": value} for key, value in value_by_type.items()]
    image = f"data:image/png;base64,{base64.b64encode(png_bytes).decode()}"
    tasks = [{"id": number, "data": {"image": image}, "annotations": [{"result": results}]} for number in range(2)]
    context = {"result": results} if has_context else None
    config = '<View><Image name="image" value="$image"/><BrushLabels name="mask" toName="image"><Label value="cat"/>'
    config += '</BrushLabels><TextArea name="text" toName="image" perRegion="true"/></View>'
    return {"tasks": tasks, "label_config": config, "params": {"context": context}}


def replace_random_value(generator, value):
    """Replace or remove a random value in nested lists and objects."""
    key = generator.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if isinstance(value[key], dict | list) and value[key] and generator.random() < 0.9:
        return replace_random_value(generator, value[key])
    if generator.random() < 0.1:
        del value[key]
    else:
        value[key] = generator.choice([None, True, -1, 1e300, 10**30, "x\n", "", [], {}, [[1]], {"rle": [1]}])
    return None


def damage_request(generator, content, png_bytes):
    """Return the type of damage, the damaged body, and its content type."""
    damage = generator.choice(["truncated", "flipped bytes", "image bytes", "image size", "content type"])
    if damage == "truncated":
        return damage, content[: generator.randrange(len(content))], "application/json"
    if damage == "flipped bytes":
        damaged = bytearray(content)
        for _ in range(generator.randrange(1, 5)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        return damage, bytes(damaged), "application/json"
    if damage == "image bytes":
        image_bytes = bytearray(png_bytes)
        for _ in range(generator.randrange(1, 30)):
            image_bytes[generator.randrange(len(image_bytes))] = generator.randrange(256)
        return damage, make_content(bytes(image_bytes)), "application/json"
    if damage == "image size":
        file = io.BytesIO()
        size = generator.choice([(1, 1), (1, 3000), (3000, 1), (65_000, 20_000), (2, 2)])
        Image.new("1", size).save(file, generator.choice(["PNG", "BMP", "TIFF"]))
        return damage, make_content(file.getvalue()), "application/json"
    return (
        damage,
        generator.choice([content, os.urandom(200)]),
        generator.choice(["text/plain", "", "multipart/form-data; boundary=a"]),
    )


def make_content(image_bytes):
    return json.dumps({"image": base64.b64encode(image_bytes).decode(), "prompts": [{"box": [0, 0, 1, 1]}]}).encode()
