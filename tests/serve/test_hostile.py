"""Whatever is sent, the server says what is wrong and answers the next good request."""

import base64
import io
import json
import os
import random

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

FUZZED = {"reduced": 100, "whole": 2000}


@pytest.mark.parametrize("count", ["reduced", pytest.param("whole", marks=pytest.mark.all)])
def test_requests_made_up_from_the_openapi_page_are_answered(served, asked, count):
    schemathesis = pytest.importorskip("schemathesis")
    import httpx
    from hypothesis import HealthCheck, Phase, given, settings

    url = served()
    page = schemathesis.openapi.from_url(f"{url}/openapi.json")
    statuses = []
    operations = [operation.ok() for operation in page.get_all_operations()]
    posts = [operation for operation in operations if operation.method == "post"]
    for operation in operations:
        each = FUZZED[count] // len(posts) if operation in posts else 1

        @given(case=operation.as_strategy())
        @settings(
            max_examples=each,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def ask(case):
            answer = case.call(base_url=url, timeout=60)
            statuses.append(answer.status_code)
            assert answer.status_code != 500, answer.text
            assert "Traceback" not in answer.text

        ask()
    assert len(statuses) >= FUZZED[count]
    assert httpx.post(f"{url}/v1/captions", json=asked(), timeout=60).status_code == 200


@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.all)])
def test_damaged_requests_are_answered(served, asked, png, count):
    import httpx

    url, draw = served(), random.Random(0)
    whole = json.dumps(asked()).encode()
    statuses = {}
    with httpx.Client(timeout=60) as client:
        for _ in range(count):
            kind, content, how = _damaged(draw, whole, png)
            answer = client.post(f"{url}/v1/captions", content=content, headers={"content-type": how})
            statuses.setdefault(kind, set()).add(answer.status_code)
            assert answer.status_code in (200, 400, 413, 415, 422), (kind, answer.text)
            assert "error" in answer.json() or answer.status_code == 200
        assert client.post(f"{url}/v1/captions", json=asked()).status_code == 200
    assert len(statuses) == 5, statuses


def _damaged(draw, whole, png):
    """A kind of damage, the body, and what it says it is."""
    kind = draw.choice(["cut", "flipped", "picture", "pixels", "type"])
    if kind == "cut":
        return kind, whole[: draw.randrange(len(whole))], "application/json"
    if kind == "flipped":
        content = bytearray(whole)
        for _ in range(draw.randrange(1, 5)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        return kind, bytes(content), "application/json"
    if kind == "picture":
        picture = bytearray(png)
        for _ in range(draw.randrange(1, 30)):
            picture[draw.randrange(len(picture))] = draw.randrange(256)
        return kind, _request(bytes(picture)), "application/json"
    if kind == "pixels":
        file = io.BytesIO()
        sides = draw.choice([(1, 1), (1, 3000), (3000, 1), (65_000, 20_000), (2, 2)])
        Image.new("1", sides).save(file, draw.choice(["PNG", "BMP", "TIFF"]))
        return kind, _request(file.getvalue()), "application/json"
    return (
        kind,
        draw.choice([whole, os.urandom(200)]),
        draw.choice(["text/plain", "", "multipart/form-data; boundary=a"]),
    )


def _request(picture):
    return json.dumps({"image": base64.b64encode(picture).decode(), "prompts": [{"box": [0, 0, 1, 1]}]}).encode()
