"""Weights by hub id: fetched once, kept whole, and told in one line when they cannot be had."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub import COMMIT, Hub

pytestmark = pytest.mark.slow

PULL = [sys.executable, "-m", "sca", "pull"]


@pytest.fixture
def hub(sam_folder, tmp_path):
    """With a model beside which there are files that nobody here wants."""
    shutil.copytree(sam_folder, tmp_path / "sam")
    (tmp_path / "sam" / "README.md").write_text("A model.")
    (tmp_path / "sam" / "flax_model.msgpack").write_bytes(b"\0" * 1000)
    hub = Hub()
    hub.models["owner/sam"] = tmp_path / "sam"
    return hub


@pytest.fixture
def shell(hub, tmp_path):
    """Runs a command with the hub on loopback, or with none; what it says on both streams, its status, its requests."""

    def call(*command, online=True, **environment):
        with hub.serving() as address:
            asked = {
                **os.environ,
                "HF_HOME": str(tmp_path / "cache"),
                "SCA_CACHE": str(tmp_path / "sca-cache"),
                "HF_ENDPOINT": address,
                "HF_HUB_DISABLE_XET": "1",
            }
            asked |= environment
            if not online:
                asked["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens
            del hub.requests[:]
            done = subprocess.run(command, env=asked, capture_output=True, text=True, cwd=tmp_path)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout, done.stderr

    return call


PULL_WITHOUT_TORCH = """
import sys
from sca.cli import run
assert run(sys.argv[1:]) == 0
assert not {"torch", "transformers"} & set(sys.modules)
"""
LOAD = """
import sys, torch
from sca.encoders.sam import SamEncoder
print(float(SamEncoder("owner/sam").vision.neck.conv1.weight.sum()))
"""


def test_what_was_pulled_is_used_without_a_network(shell, hub, tmp_path):
    status, out, _ = shell(*PULL, "owner/sam")
    assert status == 0
    assert out.startswith(f"owner/sam at {COMMIT}: ")
    status, first, _ = shell(sys.executable, "-c", LOAD, online=False)
    assert status == 0
    assert not hub.requests
    assert float(first) != 0
    assert not list((tmp_path / "cache").rglob("flax_model.msgpack"))


@pytest.mark.all
def test_what_was_not_pulled_is_fetched_when_it_is_used(shell, hub):
    assert shell(sys.executable, "-c", LOAD)[0] == 0
    assert any("model.safetensors" in request for request in hub.requests)
    assert shell(sys.executable, "-c", LOAD)[0] == 0
    assert not hub.requests


def test_a_checkpoint_of_our_own_is_loaded_from_the_hub(shell, hub, tmp_path):
    from sca_registry import zoo

    hub.models["owner/tiny"] = zoo.get_entry("sca-tiny").folder
    program = "import sca; print(sca.load('owner/tiny').summarize_parameters())"
    status, out, _ = shell(sys.executable, "-c", program)
    assert status == 0
    assert "total" in out


@pytest.mark.all
def test_a_published_checkpoint_is_pulled_with_the_tokenizer_that_it_names(shell, hub, sam_folder, tmp_path):
    import torch

    import sca
    from sca.checkpoints.export import write_published_checkpoint
    from sca.language_models.tiny_gpt2 import TinyGpt2

    words = TinyGpt2(hidden_size=8, depth=1, num_heads=1).tokenizer
    words.save(str(tmp_path / "words"))
    (tmp_path / "words" / "model.safetensors").write_bytes(b"nobody wants these")
    torch.manual_seed(0)
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 800, "n_positions": 64}
    model = sca.compose(
        {"name": "sam", "weights": str(sam_folder)},
        {"name": "query", "num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
        {"name": "hf", "config": config},
    )
    folder = write_published_checkpoint(model, tmp_path / "published")
    figures = json.loads((folder / "config.json").read_text())
    figures["text_config"]["_name_or_path"] = "owner/words"
    (folder / "config.json").write_text(json.dumps(figures))
    hub.models |= {"owner/published": folder, "owner/words": tmp_path / "words"}
    status, out, err = shell(sys.executable, "-c", PULL_WITHOUT_TORCH, "pull", "owner/published")
    assert status == 0, err
    assert "its tokenizer was not fetched: 'owner/words' is outside its folder; pass allow_external=True" in err
    assert not any("owner/words" in request for request in hub.requests)
    status, out, _ = shell(*PULL, "owner/published", "--allow-external")
    assert status == 0
    assert f"owner/words at {COMMIT}: " in out
    assert not any("words/resolve" in request and "safetensors" in request for request in hub.requests)
    load = "import sca; print(sca.load('owner/published'{}).language_model.tokenizer and 'has a tokenizer')"
    status, out, err = shell(sys.executable, "-c", load.format(""), online=False)
    assert (status, out.strip()) == (0, "None")
    assert "captions of" in err
    status, out, _ = shell(sys.executable, "-c", load.format(", allow_external=True"), online=False)
    assert (status, out.strip()) == (0, "has a tokenizer")


def test_pull_stores_the_commit_that_later_loads_take(shell, hub, tmp_path):
    from sca_registry import zoo

    hub.models["owner/tiny"] = zoo.get_entry("sca-tiny").folder
    status, out, _ = shell(*PULL, "owner/tiny", "--revision", COMMIT)
    assert status == 0
    assert out.startswith(f"owner/tiny at {COMMIT}: ")
    (pins,) = tmp_path.rglob("pulled.json")
    assert json.loads(pins.read_text()) == {"owner/tiny": COMMIT}
    program = "import sca; sca.load('owner/tiny')"  # no branch is known offline, only the commit
    assert shell(sys.executable, "-c", program, online=False)[0] == 0
    program = "import sca\ntry: sca.load('owner/tiny', revision='elsewhere')\nexcept ValueError as error: print(error)"
    _, out, _ = shell(sys.executable, "-c", program)
    assert "the hub has no 'owner/tiny' at revision 'elsewhere'" in out


@pytest.mark.all
def test_a_download_that_was_cut_off_is_not_taken_for_whole(shell, hub):
    hub.cut.add("model.safetensors")
    shell(*PULL, "owner/sam")
    assert shell(*PULL, "owner/sam")[0] == 0
    assert shell(sys.executable, "-c", LOAD, online=False)[0] == 0


def test_a_gated_model_asks_for_a_token_and_takes_it(shell, hub):
    hub.gated.add("owner/sam")
    status, _, told = shell(*PULL, "owner/sam")
    assert status == 2
    assert "gated" in told
    assert "HF_TOKEN" in told
    assert shell(*PULL, "owner/sam", HF_TOKEN="secret")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "online", "told"),
    [
        (["owner/absent"], True, "neither a folder nor a model on the hub"),
        (["owner/sam", "--revision", "nowhere"], True, "the hub has no 'owner/sam' at revision 'nowhere'"),
        (["owner/sam"], False, "the hub could not be reached"),
        (["gpt3"], True, "Did you mean 'gpt2'?"),
        (["sca-tiny"], True, "is included in the package"),
    ],
)
def test_what_cannot_be_had_is_told_in_one_line(shell, arguments, online, told):
    status, _, said = shell(*PULL, *arguments, online=online)
    assert status == 2
    (line,) = said.strip().splitlines()
    assert told in line


def test_of_a_repository_with_several_formats_only_the_wanted_one_is_pulled(shell, hub, tmp_path):
    pytest.importorskip("open_clip", reason="the extra clip is not installed", exc_type=Exception)
    folder = tmp_path / "clip"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "open_clip_config.json", "open_clip_model.safetensors"):
        (folder / name).write_text("{}")
    hub.models["timm/vit_base_patch16_clip_224.openai"] = folder
    status, out, err = shell(*PULL, "clip-vit-b-16")
    assert status == 0, err
    here = sorted(file.name for file in Path(out.split(": ")[1].strip()).iterdir())
    assert here == ["config.json", "open_clip_config.json", "open_clip_model.safetensors"]


@pytest.mark.all
def test_terms_of_a_source_are_said_before_it_is_fetched(shell, hub, tmp_path):
    folder = tmp_path / "mae"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    hub.models["timm/vit_base_patch16_224.mae"] = folder
    _, _, err = shell(*PULL, "timm/vit_base_patch16_224.mae")
    assert "sca: timm/vit_base_patch16_224.mae (CC-BY-NC-4.0): not for commercial use" in err
    _, _, err = shell(*PULL, "owner/sam")
    assert "commercial" not in err
    _, _, err = shell(*PULL, "timm/vit_base_patch16_224.mae", online=False)  # also when nothing can be fetched
    assert "not for commercial use" in err


PUSH = [sys.executable, "-m", "sca", "push"]


def test_a_model_is_pushed_with_a_card_and_read_back_by_its_name(shell, hub, tmp_path):
    hub.given = tmp_path / "given"
    rows = [
        {"name": "cider_d", "value": 1.25, "low": 1.1, "high": 1.4, "control": None, "protocol": "p-123"},
        {"name": "cider_d", "value": 0.1, "low": None, "high": None, "control": "shifted", "protocol": "p-123"},
        {"name": "iou", "value": None, "low": None, "high": None, "control": None, "protocol": "p-124"},
    ]
    (tmp_path / "scores.json").write_text(json.dumps({"dataset": "scenes", "split": "test", "rows": rows}))
    asked = (
        "sca-tiny",
        "me/tiny",
        "--scores",
        "scores.json",
        "--license",
        "Apache-2.0",
        "--trained-on",
        "drawn scenes",
    )
    status, out, err = shell(*PUSH, *asked, HF_TOKEN="secret")
    assert status == 0, err
    assert out.strip().endswith("/me/tiny")
    card = (hub.given / "me/tiny/README.md").read_text()
    from huggingface_hub import ModelCard

    data = ModelCard(card).data
    assert data.license == "apache-2.0"
    assert [(result.metric_type, result.metric_value) for result in data.eval_results] == [("cider_d", 1.25)]
    assert "| scenes | cider_d | 1.250 | 1.100 to 1.400 | p-123 |" in card
    assert "drawn scenes" in card
    assert 'sca.load("me/tiny")' in card
    program = (
        "import sca; from sca.checkpoints.tensors import hash_weights as h; "
        "print(h(sca.load('me/tiny')) == h(sca.load('sca-tiny')))"
    )
    status, out, err = shell(sys.executable, "-c", program)
    assert status == 0, err
    assert out.split()[-1] == "True"


@pytest.mark.all
def test_what_the_hub_refuses_is_one_line(shell, hub, tmp_path):
    hub.given = tmp_path / "given"
    for asked, words in (
        (("sca-tiny", "me/tiny"), "set HF_TOKEN to a token with write access"),
        (("sca-tiny", "no such name!"), "'no such name!' is not a repository name; give OWNER/NAME"),
        (("nothing", "me/tiny"), "nothing"),
        (("sca-tiny", "me/tiny", "--scores", "absent.json"), "absent.json is no scores.json of `sca evaluate`"),
    ):
        status, out, err = shell(*PUSH, *asked)
        assert status == 2, err
        assert out == ""
        assert words in err
        assert len(err.strip().splitlines()) == 1, err


def test_the_card_can_be_seen_first(shell):
    status, out, _ = shell(*PUSH, "sca-tiny", "me/tiny", "--dry-run", online=False)
    assert status == 0
    assert out.startswith("---\nlibrary_name: segment-caption-anything\n")
