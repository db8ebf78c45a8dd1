"""Python, the command line, the server and the demo report an error in the same words."""

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

INVALID_REGIONS = {  # case: (region of a 64 x 48 image, expected message)
    "reversed box": ({"box": [50, 10, 20, 30]}, "the box 50,10,20,30 is reversed: x2 must be greater than x1"),
    "empty box": ({"box": [5, 5, 5, 9]}, "the box 5,5,5,9 is empty: x2 must be greater than x1"),
    "box outside": ({"box": [70, 10, 90, 30]}, "the box 70,10,90,30 is outside the 64 x 48 image"),
    "box with three numbers": ({"box": [1, 2, 3]}, "write a box as 4 numbers x1,y1,x2,y2 in pixels"),
    "point outside": ({"points": [[64, 3]]}, "the point 64,3,1 is outside the 64 x 48 image"),
    "point above image": ({"points": [[3, -1, 1]]}, "the point 3,-1,1 is outside the 64 x 48 image"),
    "invalid point label": ({"points": [[9, 3, 5]]}, "must be 1 or 0; write a point as x,y or x,y,label"),
}


@pytest.fixture(scope="module")
def model():
    return sca.load("sca-tiny")


@pytest.fixture
def image_in_working_folder(tmp_path, monkeypatch):
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


@pytest.mark.parametrize("case", INVALID_REGIONS)
@pytest.mark.slow
def test_invalid_region_has_same_message_in_python_cli_server_and_demo(
    case, model, image_in_working_folder, client, capfd
):
    region, expected_message = INVALID_REGIONS[case]
    predictor = sca.Predictor(model)
    predictor.set_image(image_in_working_folder)
    with pytest.raises(InputError) as raised:
        predictor.predict([Prompt(box=region.get("box"), points=region.get("points", ()))])
    assert expected_message in str(raised.value)

    region_fields = [
        f"{key.removesuffix('s')}={','.join(map(str, value))}" for key, value in list_region_fields(region)
    ]
    assert run_command(["caption", "a.png", "--region", ";".join(region_fields)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert expected_message in line

    request = {"image": base64.b64encode(Path("a.png").read_bytes()).decode(), "prompts": [region]}
    response = client.post("/v1/captions", json=request)
    assert response.status_code == 422
    assert expected_message in response.json()["error"]["message"]

    if len(region.get("points", ((1, 2),))[0]) == 2:  # the canvas sends no invalid label
        with pytest.raises(InputError, match=re.escape(expected_message)):
            Session(image_in_working_folder, "a.png").handle_event(make_canvas_event(region))


def make_canvas_event(region):
    """Return the event that the canvas of the demo sends for a region."""
    if "box" in region:
        return {"action": "box", "box": region["box"]}
    ((x, y),) = region["points"]
    return {"action": "point", "x": x, "y": y, "label": 1}


def list_region_fields(region):
    return [("box", region["box"])] if "box" in region else [("point", point) for point in region["points"]]


INVALID_IMAGES = {
    "text bytes": (b"not an image", "is not a readable image; convert it to JPEG or PNG"),
    "empty file": (b"", "is empty"),
    "truncated file": (None, "truncated"),
}


@pytest.mark.parametrize("case", INVALID_IMAGES)
def test_invalid_image_has_same_message_in_python_cli_and_server(
    case, image_in_working_folder, client, capfd, tmp_path
):
    content, expected_message = INVALID_IMAGES[case]
    if content is None:
        png_file = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
        Image.fromarray(noise).save(png_file, "PNG")
        content = png_file.getvalue()[: len(png_file.getvalue()) // 2]
    (tmp_path / "b.png").write_bytes(content)
    with pytest.raises(sca.io.images.InputError) as raised:
        sca.open_image("b.png")
    assert run_command(["caption", "b.png", "--box", "1,1,9,9"]) == 1
    error_lines = capfd.readouterr().err.splitlines()
    request = {"image": base64.b64encode(content).decode(), "prompts": [{"box": [1, 1, 9, 9]}]}
    response = client.post("/v1/captions", json=request)
    assert response.status_code == 422
    for message in (str(raised.value), error_lines[0], response.json()["error"]["message"]):
        assert expected_message in message


@pytest.mark.parametrize(
    "invalid_image",
    [np.zeros((4, 5)), np.zeros((4, 5, 4), np.uint8), "a.png", None],
    ids=["2-D array", "4-channel array", "file name", "None"],
)
def test_set_image_rejects_arrays_and_values_that_are_not_images(invalid_image, model):
    with pytest.raises(ValueError, match="expected"):
        sca.Predictor(model).set_image(invalid_image)


def test_predict_accepts_prompts_as_arrays_and_tensors(model, image_in_working_folder):
    predictor = sca.Predictor(model)
    predictor.set_image(image_in_working_folder)
    prompts = {"boxes": [(1, 2, 30, 40)], "points": [(5, 6)]}
    expected = [(caption.text, caption.box) for caption in predictor.predict(**prompts)]
    for convert in (np.array, torch.tensor):
        captions = predictor.predict(**{key: convert(value) for key, value in prompts.items()})
        assert [(caption.text, caption.box) for caption in captions] == expected
    assert json.dumps(captions[0].prompt.box)


def test_set_image_treats_pil_image_like_the_image_file(model, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 4), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    predictor = sca.Predictor(model)
    with Image.open(tmp_path / "turned.png") as pil_image:
        predictor.set_image(pil_image)
    assert predictor.image.size == (20, 30)
    assert np.array_equal(predictor.image, sca.open_image(tmp_path / "turned.png"))
