"""`sca train` never deletes files it did not write and never resumes a different run."""

import json

import pytest
from safetensors.torch import load_file

from sca.checkpoints.native import save
from sca.io.errors import InputError, LockedError, OutputError
from sca.io.run_folder import RunFolder
from sca.training.recipe import Recipe
from sca.training.train import train

pytestmark = pytest.mark.slow


@pytest.fixture
def make_recipe(small_model_table):
    def make(name="tiny", **options):
        table = {
            "model": small_model_table,
            "data": {"scenes": {"name": "scenes", "num_images": 2, "image_size": 64}},
            "train": {"steps": 1, "batch_size": 1, "warmup_steps": 0, "save_steps": 1, **options},
        }
        return Recipe.from_dict(name, table)

    return make


def read_weights(folder):
    return (folder / "model/weights.safetensors").read_bytes()


@pytest.mark.parametrize(
    "blocking_file", ["best.json", "checkpoint-5/weights.txt", "model/README.md", "best/notes.txt", None]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_train_deletes_no_foreign_files(make_recipe, tmp_path, blocking_file, overwrite):
    names = ["validation/photo.txt", "draft/letter.txt", "checkpoint-old/weights.txt", "notes.txt"]
    names += ["checkpoint-1-good/weights.txt", "checkpoint-1-good/more/notes.txt", "validation/step-1-good/notes.txt"]
    foreign_files = [tmp_path / name for name in (*names, *([blocking_file] if blocking_file else []))]
    for path in foreign_files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious")
    if blocking_file:
        with pytest.raises((OutputError, InputError), match=r"not written by `sca train`|it contains"):
            train(make_recipe(), tmp_path, quiet=True, overwrite=overwrite)
    else:
        for seed in (0, 1):
            train(make_recipe(seed=seed), tmp_path, quiet=True, overwrite=bool(seed))
        assert (tmp_path / "model/spec.json").is_file()
    assert all(path.read_text() == "precious" for path in foreign_files)


def test_train_rejects_folder_of_another_run(make_recipe, tmp_path):
    train(make_recipe(), tmp_path, quiet=True)
    original_weights = read_weights(tmp_path)
    with pytest.raises(
        OutputError, match=r"a different run \(train\.learning_rate: .* there, .* now\).*replace the run"
    ):
        train(make_recipe(learning_rate=1e-2), tmp_path, quiet=True)
    assert read_weights(tmp_path) == original_weights
    train(make_recipe(num_workers=0, save_steps=7), tmp_path, quiet=True)
    assert read_weights(tmp_path) == original_weights, "what changes no step may differ"
    train(make_recipe(learning_rate=1e-2), tmp_path, quiet=True, overwrite=True)
    assert read_weights(tmp_path) != original_weights


def test_train_rejects_folder_of_run_on_other_data(make_recipe, tmp_path):
    pytest.importorskip("datasets")
    from sca.data.scenes import Scenes

    (tmp_path / "data").mkdir()
    Scenes("train", num_images=1, image_size=64)[0].image.save(tmp_path / "data/a.png")
    table = {"name": "jsonl", "file": str(tmp_path / "data/a.jsonl")}

    def make_recipe_with_caption(caption):
        record = {"image": "a.png", "box": [4, 4, 40, 40], "caption": caption}
        (tmp_path / "data/a.jsonl").write_text(json.dumps(record) + "\n")
        base_recipe = make_recipe()
        return Recipe.from_dict("own", {**base_recipe.to_dict(), "data": {"own": table}})

    train(make_recipe_with_caption("a cat"), tmp_path / "out", quiet=True)
    train(make_recipe_with_caption("a cat"), tmp_path / "out", quiet=True)
    with pytest.raises(OutputError, match="a different run"):
        train(make_recipe_with_caption("a dog"), tmp_path / "out", quiet=True)


def test_train_rename_existing_moves_folder_of_another_run(make_recipe, tmp_path):
    messages, out = [], tmp_path / "out"
    train(make_recipe(), out, quiet=True, rename_existing=True, report=messages.append)
    original_weights = read_weights(out)
    train(make_recipe(seed=1), out, quiet=True, rename_existing=True, report=messages.append)
    assert messages == [f"{out} contained a different run, which is now in {out}-1"]
    assert read_weights(tmp_path / "out-1") == original_weights
    assert read_weights(out) != original_weights


def test_train_shorter_than_warmup_updates_weights(make_recipe, tmp_path):
    train(make_recipe(warmup_steps=50, learning_rate=0.0), tmp_path / "still", quiet=True)
    train(make_recipe(warmup_steps=50), tmp_path / "moved", quiet=True)
    untrained, trained = (load_file(tmp_path / each / "model/weights.safetensors") for each in ("still", "moved"))
    assert any(not untrained[name].equal(trained[name]) for name in untrained)


def test_train_rejects_locked_run_folder(make_recipe, tmp_path):
    with RunFolder(tmp_path, "train"), pytest.raises(LockedError, match="is being written by another process"):
        train(make_recipe(), tmp_path, quiet=True)


def test_train_rejects_overwriting_its_initial_model(make_recipe, build_small_model, small_model_table, tmp_path):
    from dataclasses import replace

    train(make_recipe(), tmp_path, quiet=True)
    original_weights = read_weights(tmp_path)
    for initial_model in (
        tmp_path / "model",
        save(build_small_model(trainable=small_model_table["trainable"]), tmp_path / "best"),
    ):
        recipe = replace(make_recipe(), model=str(initial_model))
        with pytest.raises(OutputError, match="is an input of this command"):
            train(recipe, tmp_path, quiet=True, overwrite=True)
    assert read_weights(tmp_path) == original_weights


def test_train_command_sets_aside_only_in_its_default_folder(make_recipe, tmp_path, monkeypatch, capfd):
    from sca.cli import run_command

    monkeypatch.chdir(tmp_path)
    lines = ['model = "sca-tiny"', "[data.scenes]", 'name = "scenes"', "num_images = 2", "image_size = 64"]
    (tmp_path / "mine.toml").write_text(
        "\n".join([*lines, "[train]", "steps = 1", "batch_size = 1", "num_processes = 1"])
    )
    for seed in (0, 1):
        assert run_command(["train", "mine.toml", f"train.seed={seed}", "--quiet"]) == 0
    assert "sca: runs/mine contained a different run, which is now in runs/mine-1" in capfd.readouterr().err
    assert read_weights(tmp_path / "runs/mine") != read_weights(tmp_path / "runs/mine-1")
    assert run_command(["train", "mine.toml", "train.seed=2", "--quiet", "--out", "runs/mine"]) == 2
    assert "contains a different run (train.seed: 1 there, 2 now)" in capfd.readouterr().err
    assert run_command(["train", "mine.toml", "train.seed=2", "--quiet", "--out", "runs/mine", "--overwrite"]) == 0
