"""A mistake is told in the same words wherever it is made: in Python, on a command line, over HTTP, in the demo."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sca_registry.contracts import Prompt

import sca
from sca.cli import run_command
from sca.demo.session import Session
from sca.inference.engine import Engine
from sca.io.errors import InputError

WRONG = {  # a region of a picture of 64 x 48, and what is said of it
    "reversed": ({"box": [50, 10, 20, 30]}, "the box 50,10,20,30 is reversed: x2 must be greater than x1"),
    "empty": ({"box": [5, 5, 5, 9]}, "the box 5,5,5,9 is empty: x2 must be greater than x1"),
    "outside": ({"box": [70, 10, 90, 30]}, "the box 70,10,90,30 is outside the 64 x 48 image"),
    "too few": ({"box": [1, 2, 3]}, "a box is 4 numbers x1,y1,x2,y2 in pixels, not"),
    "a point outside": ({"points": [[64, 3]]}, "the point 64,3,1 is outside the 64 x 48 image"),
    "a point above": ({"points": [[3, -1, 1]]}, "the point 3,-1,1 is outside the 64 x 48 image"),
    "a label": ({"points": [[9, 3, 5]]}, "is not 1 or 0; a point is x,y or x,y,label in pixels"),
}


@pytest.fixture(scope="module")
def model():
    return sca.load("sca-tiny")


@pytest.fixture
def picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = Image.new("RGB", (64, 48), "teal")
    image.save("a.png")
    return image


@pytest.fixture(scope="module")
def client(model):
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    from starlette.testclient import TestClient

    from sca.serve.config import ServerConfig

    app = ServerConfig("sca-tiny").create_app(Engine(model))
    with TestClient(app, base_url="http://localhost") as client:
        yield client


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.slow
def test_a_wrong_region_is_told_alike(name, model, picture, client, capfd):
    region, words = WRONG[name]
    predictor = sca.Predictor(model)
    predictor.set_image(picture)
    with pytest.raises(InputError) as raised:
        predictor.predict([Prompt(box=region.get("box"), points=region.get("points", ()))])
    assert words in str(raised.value)

    written = [f"{key.removesuffix('s')}={','.join(map(str, value))}" for key, value in plain(region)]
    assert run_command(["caption", "a.png", "--region", ";".join(written)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert words in line

    asked = {"image": base64.b64encode(Path("a.png").read_bytes()).decode(), "prompts": [region]}
    answer = client.post("/v1/captions", json=asked)
    assert answer.status_code == 422
    assert words in answer.json()["error"]["message"]

    if len(region.get("points", ((1, 2),))[0]) == 2:  # a canvas gives no label that there is not
        with pytest.raises(InputError, match=re.escape(words)):
            Session(picture, "a.png").handle_event(pointed(region))


def pointed(region):
    """What the canvas of the demo would say."""
    if "box" in region:
        return {"action": "box", "box": region["box"]}
    ((x, y),) = region["points"]
    return {"action": "point", "x": x, "y": y, "label": 1}


def plain(region):
    return [("box", region["box"])] if "box" in region else [("point", point) for point in region["points"]]


PICTURES = {
    "words": (b"no picture", "is not an image"),
    "nothing": (b"", "is empty"),
    "half": (None, "truncated"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_broken_picture_is_told_alike(name, picture, client, capfd, tmp_path):
    content, words = PICTURES[name]
    if content is None:
        whole = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
        Image.fromarray(noise).save(whole, "PNG")
        content = whole.getvalue()[: len(whole.getvalue()) // 2]
    (tmp_path / "b.png").write_bytes(content)
    with pytest.raises(sca.io.images.InputError) as raised:
        sca.open_image("b.png")
    assert run_command(["caption", "b.png", "--box", "1,1,9,9"]) == 1
    said = capfd.readouterr().err.splitlines()
    asked = {"image": base64.b64encode(content).decode(), "prompts": [{"box": [1, 1, 9, 9]}]}
    answer = client.post("/v1/captions", json=asked)
    assert answer.status_code == 422
    for told in (str(raised.value), said[0], answer.json()["error"]["message"]):
        assert words in told


@pytest.mark.parametrize("given", [np.zeros((4, 5)), np.zeros((4, 5, 4), np.uint8), "a.png", None])
def test_what_is_no_picture_is_told_in_python(given, model):
    with pytest.raises(ValueError, match="give"):
        sca.Predictor(model).set_image(given)


def test_arrays_and_tensors_are_boxes_and_points(model, picture):
    predictor = sca.Predictor(model)
    predictor.set_image(picture)
    asked = {"boxes": [(1, 2, 30, 40)], "points": [(5, 6)]}
    expected = [(caption.text, caption.box) for caption in predictor.predict(**asked)]
    for kind in (np.array, torch.tensor):
        found = predictor.predict(**{key: kind(value) for key, value in asked.items()})
        assert [(caption.text, caption.box) for caption in found] == expected
    assert json.dumps(found[0].prompt.box)


def test_a_picture_in_memory_is_seen_as_from_a_file(model, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 4), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    predictor = sca.Predictor(model)
    with Image.open(tmp_path / "turned.png") as opened:
        predictor.set_image(opened)
    assert predictor.image.size == (20, 30)
    assert np.array_equal(predictor.image, sca.open_image(tmp_path / "turned.png"))
