"""`sca push`: uploads the files of the checkpoint only, with a model card in which text is escaped."""

import json
import os
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
from huggingface_hub.errors import HfHubHTTPError
from sca_registry import zoo

import sca
import sca.checkpoints.push
from sca.checkpoints.push import push_checkpoint, render_card
from sca.io.errors import InputError, OutputError

HOSTILE_TEXT = "x | y\n# Head\n<script>alert(1)</script> [link](javascript:x) ![](http://evil/a.png) `\x1b[31m` @all"


@pytest.fixture
def model_folder(tmp_path):
    return Path(shutil.copytree(zoo.get_entry("sca-tiny").folder, tmp_path / "model"))


@pytest.fixture
def uploaded_files(monkeypatch):
    """The uploaded files by name."""
    files = {}

    class FakeHfApi:
        def create_repo(self, name, **_):
            return type("Repository", (), {"repo_id": name})()

        def upload_folder(self, folder_path, **_):
            root = Path(folder_path)
            files.update({str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()})

    monkeypatch.setattr(sca.checkpoints.push, "HfApi", FakeHfApi)
    return files


def test_push_uploads_only_the_checkpoint(model_folder, uploaded_files):
    (model_folder / "notes.txt").write_text("mine")
    push_checkpoint(model_folder, "me/model")
    checkpoint_files = {str(path.relative_to(model_folder)) for path in model_folder.rglob("*") if path.is_file()} - {
        "notes.txt",
        "README.md",
    }
    assert set(uploaded_files) == checkpoint_files | {"README.md"}
    assert uploaded_files["weights.safetensors"] == (model_folder / "weights.safetensors").read_bytes()


def test_push_rejects_truncated_weights(model_folder, uploaded_files):
    weights = (model_folder / "weights.safetensors").read_bytes()
    (model_folder / "weights.safetensors").write_bytes(weights[:-1])
    with pytest.raises(InputError, match=r"weights\.safetensors is damaged .*; copy it again"):
        push_checkpoint(model_folder, "me/model")
    assert not uploaded_files


@pytest.mark.parametrize("link_path", ["tokenizer", "tokenizer/merges", "origin.json"])
def test_push_rejects_links_out_of_the_checkpoint(model_folder, uploaded_files, tmp_path, link_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "id_rsa").write_text("PRIVATE")
    link = model_folder / link_path
    if link.is_dir():
        shutil.rmtree(link)
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    if link_path == "origin.json":
        shutil.copyfile(zoo.get_entry("sca-tiny").folder / link_path, secret / "id_rsa")
        link.symlink_to(secret / "id_rsa")
    else:
        link.symlink_to(secret)
    with pytest.raises(InputError, match=f"{link_path} is a link to outside the checkpoint; replace it"):
        push_checkpoint(model_folder, "me/model")
    assert not uploaded_files


@pytest.mark.parametrize("name", ["spec.json", "weights.safetensors"])
def test_push_rejects_an_incomplete_checkpoint(model_folder, uploaded_files, name):
    (model_folder / name).unlink()
    with pytest.raises(InputError, match=f"has no {name}"):
        push_checkpoint(model_folder, "me/model")
    assert not uploaded_files


@pytest.fixture
def run_folder(model_folder, tmp_path):
    """The folder of a training run."""
    (tmp_path / "run").mkdir()
    model_folder.rename(tmp_path / "run/model")
    return tmp_path / "run"


def test_push_and_load_point_to_the_checkpoint_of_a_run_folder(run_folder, uploaded_files, monkeypatch):
    message = f"{run_folder} is a run folder of `sca train`; the checkpoint is in {run_folder / 'model'}"
    functions = [lambda folder: push_checkpoint(folder, "me/model"), lambda folder: render_card(folder, "me/model")]
    for function in (*functions, sca.load, sca.load_captioner):
        with pytest.raises(InputError) as caught:
            function(run_folder)
        assert str(caught.value) == message
    monkeypatch.chdir(run_folder.parent)
    for function in (sca.load, sca.load_captioner):
        with pytest.raises(ValueError, match=r"; for the model of the training run, write \./run/model"):
            function("run")


class FakeResponse:
    headers: ClassVar = {}
    request = None

    def __init__(self, status_code):
        self.status_code = status_code


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (HfHubHTTPError("Unauthorized", response=FakeResponse(401)), "set HF_TOKEN to a token with write access"),
        (HfHubHTTPError("Forbidden", response=FakeResponse(403)), "set HF_TOKEN to a token with write access"),
        (HfHubHTTPError("Bad Gateway", response=FakeResponse(502)), "try again"),
        (ConnectionRefusedError(111, "Connection refused"), "check the network and HF_ENDPOINT"),
    ],
)
def test_push_suggests_a_token_only_if_access_is_denied(model_folder, uploaded_files, monkeypatch, error, fix):
    def raise_error(*_, **__):
        raise error

    monkeypatch.setattr(sca.checkpoints.push.HfApi, "create_repo", raise_error)
    with pytest.raises(OutputError, match=rf"^cannot upload to me/model \(.*\); {fix}$"):
        push_checkpoint(model_folder, "me/model")


@pytest.mark.parametrize("name", ["origin.json", "spec.json"])
def test_render_card_rejects_links_out_of_the_checkpoint(model_folder, tmp_path, name):
    (model_folder / name).rename(tmp_path / "secret")
    (model_folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=f"{name} is a link to outside the checkpoint"):
        render_card(model_folder, "me/model")


def test_push_rejects_fifos(model_folder, uploaded_files):
    (model_folder / "tokenizer").mkdir(exist_ok=True)
    os.mkfifo(model_folder / "tokenizer/pipe")
    with pytest.raises(InputError, match="pipe is not a regular file"):
        push_checkpoint(model_folder, "me/model")
    assert not uploaded_files


def test_push_follows_links_inside_a_hub_cache_repository(model_folder, uploaded_files, tmp_path):
    blobs, snapshot = tmp_path / "models--me--model/blobs", tmp_path / "models--me--model/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(path for path in sorted(model_folder.iterdir()) if path.is_file()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    push_checkpoint(snapshot, "me/other")
    assert {"spec.json", "weights.safetensors"} <= set(uploaded_files)


def test_render_card_escapes_untrusted_text(model_folder, tmp_path):
    part = {"name": HOSTILE_TEXT, "weights": HOSTILE_TEXT, "license": HOSTILE_TEXT}
    origin = {"written_by": HOSTILE_TEXT, "components": {"encoder": part, "mixer": HOSTILE_TEXT}}
    (model_folder / "origin.json").write_text(json.dumps(origin))
    row = {"name": HOSTILE_TEXT, "value": 0.5, "control": None, "protocol_id": HOSTILE_TEXT}
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"dataset": HOSTILE_TEXT, "split": HOSTILE_TEXT, "score_details": [row]}))
    body = render_card(model_folder, "me/model", [scores]).split("\n---\n", 1)[1]
    assert "<" not in body
    assert "\x1b" not in body
    assert "[link](" not in body
    assert "http://evil" not in body
    assert not any(line.startswith("# Head") for line in body.splitlines())
    unescaped = body.replace("\\|", "").replace("\\`", "")
    assert {line.count("|") for line in unescaped.splitlines() if line.startswith("| encoder")} == {5}
    assert unescaped.count("`") == 6, "the fence of the example and nothing else"


@pytest.mark.parametrize("content", ["[1]", "[" * 100_000, "{"])
def test_render_card_reports_a_damaged_origin_in_one_line(model_folder, content):
    (model_folder / "origin.json").write_text(content)
    with pytest.raises(ValueError, match=r"origin\.json (does not contain a JSON object|is not valid JSON)") as caught:
        render_card(model_folder, "me/model")
    assert "\n" not in str(caught.value)
