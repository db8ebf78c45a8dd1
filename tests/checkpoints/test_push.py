"""What `sca push` uploads: the checkpoint and nothing beside it, with a card in which a file's text stays text."""

import json
import os
import shutil
from pathlib import Path

import pytest
from sca_registry import zoo

import sca.checkpoints.push
from sca.checkpoints.push import push_checkpoint, render_card
from sca.io.errors import InputError

HOSTILE = "x | y\n# Head\n<script>alert(1)</script> [link](javascript:x) ![](http://evil/a.png) `\x1b[31m` @all"


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(zoo.get_entry("sca-tiny").folder, tmp_path / "model"))


@pytest.fixture
def uploaded(monkeypatch):
    """The files that were uploaded, by name."""
    files = {}

    class Api:
        def create_repo(self, name, **_):
            return type("Repository", (), {"repo_id": name})()

        def upload_folder(self, folder_path, **_):
            root = Path(folder_path)
            files.update({str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()})

    monkeypatch.setattr(sca.checkpoints.push, "HfApi", Api)
    return files


def test_push_uploads_the_checkpoint_and_nothing_else(model, uploaded):
    (model / "notes.txt").write_text("mine")
    push_checkpoint(model, "me/model")
    kept = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()} - {"notes.txt", "README.md"}
    assert set(uploaded) == kept | {"README.md"}
    assert uploaded["weights.safetensors"] == (model / "weights.safetensors").read_bytes()


def test_push_refuses_torn_weights(model, uploaded):
    weights = (model / "weights.safetensors").read_bytes()
    (model / "weights.safetensors").write_bytes(weights[:-1])
    with pytest.raises(InputError, match=r"weights\.safetensors is damaged .*; copy it again"):
        push_checkpoint(model, "me/model")
    assert not uploaded


@pytest.mark.parametrize("place", ["tokenizer", "tokenizer/merges", "origin.json"])
def test_push_refuses_links_out_of_the_checkpoint(model, uploaded, tmp_path, place):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "id_rsa").write_text("PRIVATE")
    link = model / place
    if link.is_dir():
        shutil.rmtree(link)
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    if place == "origin.json":
        shutil.copyfile(zoo.get_entry("sca-tiny").folder / place, secret / "id_rsa")
        link.symlink_to(secret / "id_rsa")
    else:
        link.symlink_to(secret)
    with pytest.raises(InputError, match=f"{place} is a link to outside the checkpoint; replace it"):
        push_checkpoint(model, "me/model")
    assert not uploaded


@pytest.mark.parametrize("name", ["spec.json", "weights.safetensors"])
def test_push_refuses_a_checkpoint_that_is_not_whole(model, uploaded, name):
    (model / name).unlink()
    with pytest.raises(InputError, match=f"has no {name}"):
        push_checkpoint(model, "me/model")
    assert not uploaded


@pytest.mark.parametrize("name", ["origin.json", "spec.json"])
def test_card_of_reads_no_links_out_of_the_checkpoint(model, tmp_path, name):
    (model / name).rename(tmp_path / "secret")
    (model / name).symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=f"{name} is a link to outside the checkpoint"):
        render_card(model, "me/model")


def test_push_refuses_what_is_no_file(model, uploaded):
    (model / "tokenizer").mkdir(exist_ok=True)
    os.mkfifo(model / "tokenizer/pipe")
    with pytest.raises(InputError, match="pipe is not a regular file"):
        push_checkpoint(model, "me/model")
    assert not uploaded


def test_push_follows_links_within_a_repository_of_the_hub_cache(model, uploaded, tmp_path):
    blobs, snapshot = tmp_path / "models--me--model/blobs", tmp_path / "models--me--model/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(path for path in sorted(model.iterdir()) if path.is_file()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    push_checkpoint(snapshot, "me/other")
    assert {"spec.json", "weights.safetensors"} <= set(uploaded)


def test_card_shows_the_text_of_a_stranger_as_text(model, tmp_path):
    part = {"name": HOSTILE, "weights": HOSTILE, "license": HOSTILE}
    origin = {"written_by": HOSTILE, "components": {"encoder": part, "mixer": HOSTILE}}
    (model / "origin.json").write_text(json.dumps(origin))
    row = {"name": HOSTILE, "value": 0.5, "control": None, "protocol_id": HOSTILE}
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"dataset": HOSTILE, "split": HOSTILE, "score_details": [row]}))
    body = render_card(model, "me/model", [scores]).split("\n---\n", 1)[1]
    assert "<" not in body
    assert "\x1b" not in body
    assert "[link](" not in body
    assert "http://evil" not in body
    assert not any(line.startswith("# Head") for line in body.splitlines())
    unescaped = body.replace("\\|", "").replace("\\`", "")
    assert {line.count("|") for line in unescaped.splitlines() if line.startswith("| encoder")} == {5}
    assert unescaped.count("`") == 6, "the fence of the example and nothing else"


@pytest.mark.parametrize("content", ["[1]", "[" * 100_000, "{"])
def test_card_of_a_damaged_origin_is_one_line(model, content):
    (model / "origin.json").write_text(content)
    with pytest.raises(ValueError, match=r"origin\.json is not") as caught:
        render_card(model, "me/model")
    assert "\n" not in str(caught.value)
