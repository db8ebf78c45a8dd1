"""Label Studio from the package index connects to the server and stores its predictions."""

import base64
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from sca_registry.contracts import Prompt
from tool_environment import create_tool_environment

from sca.io.annotations import label_studio
from sca.io.annotations.annotation import SkipCounter
from sca.output.label_studio import LABELING_CONFIG
from sca.serve.task_images import TaskImageReader

pytestmark = pytest.mark.all  # installs and starts Label Studio
TOKEN = "0123456789abcdef0123456789abcdef01234567"
START_SECONDS = 300


@contextmanager
def run_label_studio(interpreter, folder):
    """Run Label Studio with an own database; yields a function that calls its API."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [
        "--no-browser",
        "--port",
        port,
        "--data-dir",
        folder,
        "--username",
        "a@example.org",
        "--password",
        "secret-1",
    ]
    options += ["--user-token", TOKEN, "--enable-legacy-api-token"]
    environment = os.environ | {
        "ML_BLOCK_LOCAL_IP": "false",
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
    }
    command = [interpreter.with_name("label-studio"), "start", *map(str, options)]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)

    def call(method, path, content=None):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/{path}",
            None if content is None else json.dumps(content).encode(),
            {"Authorization": f"Token {TOKEN}", "Content-Type": "application/json"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.loads(response.read() or b"null")

    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                call("GET", "api/projects/")
                break
            except OSError:
                assert process.poll() is None, (folder / "log.txt").read_text()[-2000:]
                assert time.monotonic() < deadline, (folder / "log.txt").read_text()[-2000:]
                time.sleep(1)
        yield call
    finally:
        process.terminate()
        process.wait()


def make_box_result(size, number, box):
    (width, height), (x1, y1, x2, y2) = size, box
    value = {"x": 100 * x1 / width, "y": 100 * y1 / height, "rotation": 0, "rectanglelabels": ["region"]}
    value |= {"width": 100 * (x2 - x1) / width, "height": 100 * (y2 - y1) / height}
    fields = {"original_width": width, "original_height": height, "image_rotation": 0}
    return {
        "id": f"r{number}",
        "type": "rectanglelabels",
        "from_name": "box",
        "to_name": "image",
        "value": value,
        **fields,
    }


def test_label_studio_stores_the_predictions_of_the_server(
    start_server, captioner, scene, png_bytes, tmp_path, tmp_path_factory
):
    interpreter = create_tool_environment(tmp_path_factory.mktemp("label-studio"), "label-studio")
    size, rng = scene.image.size, np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, min(size) - 8, (20, 2, 2)), axis=1).reshape(20, 4)
    boxes = [(x1, y1, x2 + 8, y2 + 8) for x1, y1, x2, y2 in corners.tolist()]
    data_url = f"data:image/png;base64,{base64.b64encode(png_bytes).decode()}"
    groups = [boxes[:10], boxes[10:]]
    tasks = [
        {
            "data": {"image": data_url},
            "annotations": [{"result": [make_box_result(size, *each) for each in enumerate(group)]}],
        }
        for group in groups
    ]
    tasks.insert(1, {"data": {"image": "http://other.example/a.png"}})  # this host is not allowed
    url = start_server(task_images=TaskImageReader())
    with run_label_studio(interpreter, tmp_path) as call:
        project = call("POST", "api/projects/", {"title": "regions", "label_config": LABELING_CONFIG})["id"]
        call("POST", f"api/projects/{project}/import", tasks)
        with suppress(urllib.error.HTTPError):  # Label Studio creates no webhook for a local address
            call("POST", "api/ml/", {"url": url, "project": project})
        (backend,) = call("GET", f"api/ml/?project={project}")
        assert backend["state"] == "CO", backend
        selection = {"selectedItems": {"all": True, "excluded": []}, "project": project}
        call("POST", f"api/dm/actions?id=retrieve_tasks_predictions&project={project}", selection)
        predictions = call("GET", f"api/predictions/?project={project}")
    predictions.sort(key=lambda prediction: prediction["task"])
    assert len(predictions) == len(groups)
    for prediction, group in zip(predictions, groups, strict=True):
        regions = label_studio.read_regions(prediction["result"], size, "prediction", SkipCounter())
        expected = captioner.caption(scene.image, [Prompt(box=box) for box in group])
        assert [region.captions for region in regions] == [(caption.text,) for caption in expected]
        assert [region.mask for region in regions] == [caption.mask for caption in expected]
