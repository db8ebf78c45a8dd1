"""Portable checkpoints: they load without permissions after everything that the original refers to is gone."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import TINY_VIT_OPTIONS, TRAINING_FACTS

import sca
from pretrained_folder import save_encoder
from sca.checkpoints.export import write_language_model
from sca.checkpoints.portable import write_portable_checkpoint
from sca.encoders.tiny_vit import TinyVit
from sca.io.errors import InputError
from sca.segmenters.sam import SamSegmenter


@pytest.fixture
def model_of_folders(build_small_model, tmp_path):
    """Model whose encoder, segmenter and language model have weights in folders below `sources`."""
    sources = tmp_path / "sources"
    sources.mkdir()
    encoder = TinyVit(**TINY_VIT_OPTIONS)
    save_encoder(
        sources / "vit", TINY_VIT_OPTIONS, encoder, SamSegmenter(encoder, num_heads=2, mlp_dim=48), TRAINING_FACTS
    )
    write_language_model(build_small_model(), sources / "lm")
    (sources / "lm" / "LICENSE").write_text("MIT")
    (sources / "lm" / "training_args.bin").write_bytes(b"not a weight file")
    return sca.compose(
        {"name": "tiny-vit", "weights": str(sources / "vit")},
        {"name": "query", "num_queries": 2, "depth": 1, "num_heads": 2, "mlp_dim": 64},
        {"name": "hf", "weights": str(sources / "lm")},
        task_tokens=2,
    )


def test_portable_checkpoint_loads_without_permissions_and_without_its_sources(model_of_folders, tmp_path):
    sca.save(model_of_folders, tmp_path / "native")
    with pytest.raises(InputError, match="outside its folder"):
        sca.load(tmp_path / "native")
    folder = write_portable_checkpoint(model_of_folders, tmp_path / "portable")
    shutil.rmtree(tmp_path / "sources")
    shutil.move(folder, tmp_path / "moved")
    loaded = sca.load(tmp_path / "moved")
    expected = model_of_folders.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.language_model.tokenizer.decode([5, 6, 7]) == model_of_folders.language_model.tokenizer.decode(
        [5, 6, 7]
    )


def test_portable_checkpoint_has_each_source_once_and_no_path_of_this_machine(model_of_folders, tmp_path):
    folder = write_portable_checkpoint(model_of_folders, tmp_path / "portable")
    spec = json.loads((folder / "spec.json").read_text())
    assert spec["encoder"]["weights"] == "encoder"
    assert "weights" not in spec["segmenter"]
    assert spec["language_model"]["weights"] == "language_model"
    for name in ("spec.json", "origin.json"):
        assert str(tmp_path) not in (folder / name).read_text()
    origin = json.loads((folder / "origin.json").read_text())["components"]
    assert (origin["segmenter"]["weights"], origin["language_model"]["weights"]) == ("encoder", "language_model")
    assert {path.name for path in folder.iterdir()} == {
        "spec.json",
        "origin.json",
        "weights.safetensors",
        "encoder",
        "language_model",
    }
    assert (folder / "language_model" / "LICENSE").read_text() == "MIT"
    assert not (folder / "language_model" / "training_args.bin").exists()
    assert not any(
        name.startswith(("encoder.", "language_model.")) for name in load_file(folder / "weights.safetensors")
    )


def test_portable_checkpoint_of_a_model_without_sources_is_the_native_one(build_small_model, tmp_path):
    model = build_small_model()
    sca.save(model, tmp_path / "native")
    write_portable_checkpoint(model, tmp_path / "portable")
    for file in ("spec.json", "weights.safetensors", "origin.json"):
        assert (tmp_path / "portable" / file).read_bytes() == (tmp_path / "native" / file).read_bytes()


def test_portable_checkpoint_names_a_source_that_is_gone_and_writes_nothing(model_of_folders, tmp_path):
    shutil.rmtree(tmp_path / "sources" / "lm")
    with pytest.raises(InputError, match="sources/lm"):
        write_portable_checkpoint(model_of_folders, tmp_path / "portable")
    assert not (tmp_path / "portable").exists()
