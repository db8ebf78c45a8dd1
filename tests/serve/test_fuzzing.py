"""Fuzzing: the server reports invalid requests and continues to serve valid ones."""

import base64
import io
import json
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

    url = start_server()
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    statuses = []
    operations = [operation.ok() for operation in schema.get_all_operations()]
    posts = [operation for operation in operations if operation.method == "post"]
    for operation in operations:
        num_examples = NUM_REQUESTS[count] // len(posts) if operation in posts else 1

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
