"""`sca train` deletes nothing of somebody else's, and continues no other run."""

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
def plan(small_table):
    def make(name="tiny", **options):
        table = {
            "model": small_table,
            "data": {"scenes": {"name": "scenes", "num_images": 2, "image_size": 64}},
            "train": {"steps": 1, "batch_size": 1, "warmup_steps": 0, "save_steps": 1, **options},
        }
        return Recipe.from_dict(name, table)

    return make


def weights(folder):
    return (folder / "model/weights.safetensors").read_bytes()


@pytest.mark.parametrize("blocks", ["best.json", "checkpoint-5/weights.txt", "model/README.md", "best/notes.txt", None])
@pytest.mark.parametrize("overwrite", [False, True])
def test_train_deletes_no_foreign_files(plan, tmp_path, blocks, overwrite):
    names = ["validation/photo.txt", "draft/letter.txt", "checkpoint-old/weights.txt", "notes.txt"]
    names += ["checkpoint-1-good/weights.txt", "checkpoint-1-good/more/notes.txt", "validation/step-1-good/notes.txt"]
    mine = [tmp_path / name for name in (*names, *([blocks] if blocks else []))]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious")
    if blocks:
        with pytest.raises((OutputError, InputError), match=r"not written by `sca train`|it contains"):
            train(plan(), tmp_path, quiet=True, overwrite=overwrite)
    else:
        for seed in (0, 1):
            train(plan(seed=seed), tmp_path, quiet=True, overwrite=bool(seed))
        assert (tmp_path / "model/spec.json").is_file()
    assert all(path.read_text() == "precious" for path in mine)


def test_train_refuses_a_folder_of_another_run(plan, tmp_path):
    train(plan(), tmp_path, quiet=True)
    before = weights(tmp_path)
    with pytest.raises(OutputError, match=r"another run \(train\.learning_rate: .* there, .* now\).*replace the run"):
        train(plan(learning_rate=1e-2), tmp_path, quiet=True)
    assert weights(tmp_path) == before
    train(plan(num_workers=0, save_steps=7), tmp_path, quiet=True)
    assert weights(tmp_path) == before, "what changes no step may differ"
    train(plan(learning_rate=1e-2), tmp_path, quiet=True, overwrite=True)
    assert weights(tmp_path) != before


def test_train_sees_that_the_data_is_another(plan, tmp_path):
    pytest.importorskip("datasets")
    from sca.data.scenes import Scenes

    (tmp_path / "data").mkdir()
    Scenes("train", num_images=1, image_size=64)[0].image.save(tmp_path / "data/a.png")
    table = {"name": "jsonl", "file": str(tmp_path / "data/a.jsonl")}

    def recipe(caption):
        line = {"image": "a.png", "box": [4, 4, 40, 40], "caption": caption}
        (tmp_path / "data/a.jsonl").write_text(json.dumps(line) + "\n")
        made = plan()
        return Recipe.from_dict("own", {**made.to_dict(), "data": {"own": table}})

    train(recipe("a cat"), tmp_path / "out", quiet=True)
    train(recipe("a cat"), tmp_path / "out", quiet=True)
    with pytest.raises(OutputError, match="another run"):
        train(recipe("a dog"), tmp_path / "out", quiet=True)


def test_train_sets_the_folder_of_another_run_aside_when_told(plan, tmp_path):
    told, out = [], tmp_path / "out"
    train(plan(), out, quiet=True, set_aside=True, report=told.append)
    before = weights(out)
    train(plan(seed=1), out, quiet=True, set_aside=True, report=told.append)
    assert told == [f"{out} contained another run, which is now in {out}-1"]
    assert weights(tmp_path / "out-1") == before
    assert weights(out) != before


def test_a_run_shorter_than_its_warmup_trains(plan, tmp_path):
    train(plan(warmup_steps=50, learning_rate=0.0), tmp_path / "still", quiet=True)
    train(plan(warmup_steps=50), tmp_path / "moved", quiet=True)
    still, moved = (load_file(tmp_path / each / "model/weights.safetensors") for each in ("still", "moved"))
    assert any(not still[name].equal(moved[name]) for name in still)


def test_train_is_alone_in_its_folder(plan, tmp_path):
    with RunFolder(tmp_path, "train"), pytest.raises(LockedError, match="is being written by another process"):
        train(plan(), tmp_path, quiet=True)


def test_train_does_not_overwrite_the_model_that_it_starts_from(plan, small, small_table, tmp_path):
    from dataclasses import replace

    train(plan(), tmp_path, quiet=True)
    before = weights(tmp_path)
    for start in (tmp_path / "model", save(small(trainable=small_table["trainable"]), tmp_path / "best")):
        recipe = replace(plan(), model=str(start))
        with pytest.raises(OutputError, match="is an input of this command"):
            train(recipe, tmp_path, quiet=True, overwrite=True)
    assert weights(tmp_path) == before


def test_the_command_sets_aside_only_in_its_default_folder(plan, tmp_path, monkeypatch, capfd):
    from sca.cli import run_command

    monkeypatch.chdir(tmp_path)
    lines = ['model = "sca-tiny"', "[data.scenes]", 'name = "scenes"', "num_images = 2", "image_size = 64"]
    (tmp_path / "mine.toml").write_text(
        "\n".join([*lines, "[train]", "steps = 1", "batch_size = 1", "num_processes = 1"])
    )
    for seed in (0, 1):
        assert run_command(["train", "mine.toml", f"train.seed={seed}", "--quiet"]) == 0
    assert "sca: runs/mine contained another run, which is now in runs/mine-1" in capfd.readouterr().err
    assert weights(tmp_path / "runs/mine") != weights(tmp_path / "runs/mine-1")
    assert run_command(["train", "mine.toml", "train.seed=2", "--quiet", "--out", "runs/mine"]) == 2
    assert "contains another run (train.seed: 1 there, 2 now)" in capfd.readouterr().err
    assert run_command(["train", "mine.toml", "train.seed=2", "--quiet", "--out", "runs/mine", "--overwrite"]) == 0
