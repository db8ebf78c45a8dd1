"""Weights by Hub id: downloaded once, stored complete, and one-line errors if unavailable."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import HEAD_COMMIT, Hub
from pam_tiny import GOLDEN_FOLDER

pytestmark = pytest.mark.slow

PULL_COMMAND = [sys.executable, "-m", "sca", "pull"]


@pytest.fixture
def hub(sam_folder, tmp_path):
    """A hub with a model and files that are not needed."""
    shutil.copytree(sam_folder, tmp_path / "sam")
    (tmp_path / "sam" / "README.md").write_text("A model.")
    (tmp_path / "sam" / "flax_model.msgpack").write_bytes(b"\0" * 1000)
    hub = Hub()
    hub.models["owner/sam"] = tmp_path / "sam"
    return hub


@pytest.fixture
def run_with_hub(hub, tmp_path):
    """Run a command with or without a hub on loopback; return its output, its status and its requests."""

    def run(*command, online=True, **environment):
        with hub.run_server() as address:
            process_environment = {
                **os.environ,
                "HF_HOME": str(tmp_path / "cache"),
                "SCA_CACHE": str(tmp_path / "sca-cache"),
                "HF_ENDPOINT": address,
                "HF_HUB_DISABLE_XET": "1",
            }
            process_environment |= environment
            if not online:
                process_environment["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens
            del hub.requests[:]
            process = subprocess.run(command, env=process_environment, capture_output=True, text=True, cwd=tmp_path)
        assert "Traceback" not in process.stderr, process.stderr
        return process.returncode, process.stdout, process.stderr

    return run


LOAD_PAM_PROGRAM = """
import sys, sca
print(sca.load(sys.argv[1]).spec.mixer.name)
"""


@pytest.mark.parametrize(
    "name",
    ["pam-3b", *(pytest.param(name, marks=pytest.mark.all) for name in ("Perceive-Anything/PAM-3B", "someone/PAM-3B"))],
)
def test_pam_is_loaded_from_the_folder_of_its_repository_after_its_terms(hub, run_with_hub, tmp_path, name):
    shutil.copytree(GOLDEN_FOLDER, tmp_path / "repository" / "PAM-3B")
    (tmp_path / "repository" / "README.md").write_text("A model.")
    hub.models["Perceive-Anything/PAM-3B"] = hub.models["someone/PAM-3B"] = tmp_path / "repository"
    status, out, err = run_with_hub(sys.executable, "-c", LOAD_PAM_PROGRAM, name)
    assert (status, out) == (0, "semantic-perceiver\n"), err
    assert ("Qwen Research License" in err) == (not name.startswith("someone"))
    assert not any("golden" in request for request in hub.requests if "/resolve/" in request)
    status, out, err = run_with_hub(sys.executable, "-c", LOAD_PAM_PROGRAM, name, online=False)
    assert (status, out) == (0, "semantic-perceiver\n"), err


def test_pam_repository_without_its_folder_is_rejected(hub, run_with_hub, tmp_path):
    shutil.copytree(GOLDEN_FOLDER, tmp_path / "repository")
    hub.models["Perceive-Anything/PAM-3B"] = tmp_path / "repository"
    status, _, err = run_with_hub(
        sys.executable, "-m", "sca", "export", "pam-3b", str(tmp_path / "out"), "--layout", "pam"
    )
    assert status == 2
    assert "Perceive-Anything/PAM-3B has no folder PAM-3B" in err.splitlines()[-1]


PULL_WITHOUT_TORCH_PROGRAM = """
import sys
from sca.cli import run_command
assert run_command(sys.argv[1:]) == 0
assert not {"torch", "transformers"} & set(sys.modules)
"""
LOAD_PROGRAM = """
import sys, torch
from sca.encoders.sam import SamEncoder
print(float(SamEncoder("owner/sam").vision.neck.conv1.weight.sum()))
"""


def test_pull_stores_weights_for_offline_use(run_with_hub, hub, tmp_path):
    status, out, _ = run_with_hub(*PULL_COMMAND, "owner/sam")
    assert status == 0
    assert out.startswith(f"owner/sam at {HEAD_COMMIT}: ")
    status, weight_sum, _ = run_with_hub(sys.executable, "-c", LOAD_PROGRAM, online=False)
    assert status == 0
    assert not hub.requests
    assert float(weight_sum) != 0
    assert not list((tmp_path / "cache").rglob("flax_model.msgpack"))


@pytest.mark.all
def test_encoder_downloads_weights_on_first_use(run_with_hub, hub):
    assert run_with_hub(sys.executable, "-c", LOAD_PROGRAM)[0] == 0
    assert any("model.safetensors" in request for request in hub.requests)
    assert run_with_hub(sys.executable, "-c", LOAD_PROGRAM)[0] == 0
    assert not hub.requests


def test_load_loads_a_native_checkpoint_from_the_hub(run_with_hub, hub, tmp_path):
    from sca_registry import zoo

    hub.models["owner/tiny"] = zoo.get_entry("sca-tiny").folder
    program = "import sca; print(sca.load('owner/tiny').summarize_parameters())"
    status, out, _ = run_with_hub(sys.executable, "-c", program)
    assert status == 0
    assert "total" in out


@pytest.mark.all
def test_pull_fetches_the_tokenizer_of_a_published_checkpoint_on_request(run_with_hub, hub, sam_folder, tmp_path):
    import torch

    import sca
    from sca.checkpoints.export import write_published_checkpoint
    from sca.language_models.tiny_gpt2 import TinyGpt2

    tokenizer = TinyGpt2(hidden_size=8, depth=1, num_heads=1).tokenizer
    tokenizer.save(str(tmp_path / "words"))
    (tmp_path / "words" / "model.safetensors").write_bytes(b"nobody wants these")
    torch.manual_seed(0)
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 950, "n_positions": 64}
    model = sca.compose(
        {"name": "sam", "weights": str(sam_folder)},
        {"name": "query", "num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
        {"name": "hf", "config": config},
    )
    folder = write_published_checkpoint(model, tmp_path / "published")
    published_config = json.loads((folder / "config.json").read_text())
    published_config["text_config"]["_name_or_path"] = "owner/words"
    (folder / "config.json").write_text(json.dumps(published_config))
    hub.models |= {"owner/published": folder, "owner/words": tmp_path / "words"}
    status, out, err = run_with_hub(sys.executable, "-c", PULL_WITHOUT_TORCH_PROGRAM, "pull", "owner/published")
    assert status == 0, err
    assert "the tokenizer was not downloaded: 'owner/words' is outside its folder; pass allow_external=True" in err
    assert not any("owner/words" in request for request in hub.requests)
    status, out, _ = run_with_hub(*PULL_COMMAND, "owner/published", "--allow-external")
    assert status == 0
    assert f"owner/words at {HEAD_COMMIT}: " in out
    assert not any("words/resolve" in request and "safetensors" in request for request in hub.requests)
    load_program = "import sca; print(sca.load('owner/published'{}).language_model.tokenizer and 'has a tokenizer')"
    status, out, err = run_with_hub(sys.executable, "-c", load_program.format(""), online=False)
    assert (status, out.strip()) == (0, "None")
    assert "has no tokenizer, so captions are lists of token ids" in err
    status, out, _ = run_with_hub(sys.executable, "-c", load_program.format(", allow_external=True"), online=False)
    assert (status, out.strip()) == (0, "has a tokenizer")


def test_pull_stores_the_commit_used_by_later_loads(run_with_hub, hub, tmp_path):
    from sca_registry import zoo

    hub.models["owner/tiny"] = zoo.get_entry("sca-tiny").folder
    status, out, _ = run_with_hub(*PULL_COMMAND, "owner/tiny", "--revision", HEAD_COMMIT)
    assert status == 0
    assert out.startswith(f"owner/tiny at {HEAD_COMMIT}: ")
    (pulled_file,) = tmp_path.rglob("pulled.json")
    assert json.loads(pulled_file.read_text()) == {"owner/tiny": HEAD_COMMIT}
    program = "import sca; sca.load('owner/tiny')"  # no branch is known offline, only the commit
    assert run_with_hub(sys.executable, "-c", program, online=False)[0] == 0
    program = "import sca\ntry: sca.load('owner/tiny', revision='elsewhere')\nexcept ValueError as error: print(error)"
    _, out, _ = run_with_hub(sys.executable, "-c", program)
    assert "the Hub has no 'owner/tiny' at revision 'elsewhere'" in out


@pytest.mark.all
def test_pull_completes_a_truncated_download(run_with_hub, hub):
    hub.truncated_files.add("model.safetensors")
    run_with_hub(*PULL_COMMAND, "owner/sam")
    assert run_with_hub(*PULL_COMMAND, "owner/sam")[0] == 0
    assert run_with_hub(sys.executable, "-c", LOAD_PROGRAM, online=False)[0] == 0


def test_pull_of_a_gated_model_requires_and_accepts_a_token(run_with_hub, hub):
    hub.gated_models.add("owner/sam")
    status, _, err = run_with_hub(*PULL_COMMAND, "owner/sam")
    assert status == 2
    assert "gated" in err
    assert "HF_TOKEN" in err
    assert run_with_hub(*PULL_COMMAND, "owner/sam", HF_TOKEN="secret")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "online", "message"),
    [
        (["owner/absent"], True, "neither a folder nor a model on the Hub"),
        (["owner/sam", "--revision", "nowhere"], True, "the Hub has no 'owner/sam' at revision 'nowhere'"),
        (["owner/sam"], False, "the Hub could not be reached"),
        (["gpt3"], True, "Did you mean 'gpt2'?"),
        (["sca-tiny"], True, "is included in the package"),
    ],
)
def test_pull_reports_unavailable_models_in_one_line(run_with_hub, arguments, online, message):
    status, _, err = run_with_hub(*PULL_COMMAND, *arguments, online=online)
    assert status == 2
    (line,) = err.strip().splitlines()
    assert message in line


def test_pull_fetches_only_the_required_format_of_a_repository(run_with_hub, hub, tmp_path):
    pytest.importorskip("open_clip", reason="the extra clip is not installed", exc_type=Exception)
    folder = tmp_path / "clip"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "open_clip_config.json", "open_clip_model.safetensors"):
        (folder / name).write_text("{}")
    hub.models["timm/vit_base_patch16_clip_224.openai"] = folder
    status, out, err = run_with_hub(*PULL_COMMAND, "clip-vit-b-16")
    assert status == 0, err
    pulled_files = sorted(file.name for file in Path(out.split(": ")[1].strip()).iterdir())
    assert pulled_files == ["config.json", "open_clip_config.json", "open_clip_model.safetensors"]


@pytest.mark.all
def test_pull_prints_noncommercial_license_terms(run_with_hub, hub, tmp_path):
    folder = tmp_path / "mae"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    hub.models["timm/vit_base_patch16_224.mae"] = folder
    _, _, err = run_with_hub(*PULL_COMMAND, "timm/vit_base_patch16_224.mae")
    assert "sca: timm/vit_base_patch16_224.mae (CC-BY-NC-4.0): not for commercial use" in err
    _, _, err = run_with_hub(*PULL_COMMAND, "owner/sam")
    assert "commercial" not in err
    _, _, err = run_with_hub(
        *PULL_COMMAND, "timm/vit_base_patch16_224.mae", online=False
    )  # also when nothing can be fetched
    assert "not for commercial use" in err


PUSH_COMMAND = [sys.executable, "-m", "sca", "push"]


def test_push_uploads_a_model_with_card_that_load_reads_back(run_with_hub, hub, tmp_path):
    hub.upload_folder = tmp_path / "given"
    score_rows = [
        {"name": "cider_d", "value": 1.25, "ci_low": 1.1, "ci_high": 1.4, "control": None, "protocol_id": "p-123"},
        {
            "name": "cider_d",
            "value": 0.1,
            "ci_low": None,
            "ci_high": None,
            "control": "shifted",
            "protocol_id": "p-123",
        },
        {"name": "iou", "value": None, "ci_low": None, "ci_high": None, "control": None, "protocol_id": "p-124"},
    ]
    (tmp_path / "scores.json").write_text(
        json.dumps({"dataset": "scenes", "split": "test", "score_details": score_rows})
    )
    arguments = (
        "sca-tiny",
        "me/tiny",
        "--scores",
        "scores.json",
        "--license",
        "Apache-2.0",
        "--trained-on",
        "synthetic scenes",
    )
    status, out, err = run_with_hub(*PUSH_COMMAND, *arguments, HF_TOKEN="secret")
    assert status == 0, err
    assert out.strip().endswith("/me/tiny")
    card = (hub.upload_folder / "me/tiny/README.md").read_text()
    from huggingface_hub import ModelCard

    card_data = ModelCard(card).data
    assert card_data.license == "apache-2.0"
    assert [(result.metric_type, result.metric_value) for result in card_data.eval_results] == [("cider_d", 1.25)]
    assert "| scenes | cider_d | 125.0 | 110.0 to 140.0 | p-123 |" in card
    assert "synthetic scenes" in card
    assert 'sca.load("me/tiny")' in card
    program = (
        "import sca; from sca.checkpoints.tensors import hash_weights as h; "
        "print(h(sca.load('me/tiny')) == h(sca.load('sca-tiny')))"
    )
    status, out, err = run_with_hub(sys.executable, "-c", program)
    assert status == 0, err
    assert out.split()[-1] == "True"


@pytest.mark.all
def test_push_reports_errors_in_one_line(run_with_hub, hub, tmp_path):
    hub.upload_folder = tmp_path / "given"
    for arguments, message in (
        (("sca-tiny", "me/tiny"), "set HF_TOKEN to a token with write access"),
        (("sca-tiny", "no such name!"), "'no such name!' is not a repository name; expected OWNER/NAME"),
        (("nothing", "me/tiny"), "nothing"),
        (("sca-tiny", "me/tiny", "--scores", "absent.json"), "absent.json is not a scores.json of `sca evaluate`"),
    ):
        status, out, err = run_with_hub(*PUSH_COMMAND, *arguments)
        assert status == 2, err
        assert out == ""
        assert message in err
        assert len(err.strip().splitlines()) == 1, err


def test_push_dry_run_prints_the_card(run_with_hub):
    status, out, _ = run_with_hub(*PUSH_COMMAND, "sca-tiny", "me/tiny", "--dry-run", online=False)
    assert status == 0
    assert out.startswith("---\nlibrary_name: segment-caption-anything\n")
