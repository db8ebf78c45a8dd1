"""A checkpoint holds what was trained, loads to the last bit or says why not, and survives a kill at any moment."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import catalogue
import pytest
import sca_registry
import torch
from safetensors.torch import load_file, save_file

import sca
from sca.checkpoints.layout import SPEC_FILE, WEIGHTS_FILE
from sca.checkpoints.load import load
from sca.checkpoints.native import collect_origin, is_saved, resolve_spec, save
from sca.checkpoints.tensors import list_stored_tensors
from sca.inference.predictor import Predictor
from sca.io.errors import InputError, OutputError
from sca.mixers.query import QueryMixer


def batch_of(model):
    draw = torch.Generator().manual_seed(4)
    side = model.encoder.image_format.size
    return torch.randn(2, 3, side, side, generator=draw)


def same_tensors(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def saved(small, tmp_path):
    model = small(seed=3)
    return model, save(model, tmp_path / "model")


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.slow
def test_a_reloaded_model_gives_the_same_answers_to_the_last_bit(saved):
    model, folder = saved
    again = load(folder)
    assert same_tensors(model, again)
    assert torch.equal(model.encode(batch_of(model)), again.encode(batch_of(model)))
    assert again.spec.to_dict() == json.loads(json.dumps(resolve_spec(model).to_dict()))
    assert not again.training


def make_mixer(
    segmenter, queries=3, depth=1, heads=(4,), weights="org/name", url="org/name", text=None, attn_implementation="f"
):
    return QueryMixer(segmenter, num_queries=queries, depth=depth, num_heads=heads[0], mlp_dim=64)


def test_checkpoint_keeps_the_defaults_of_its_parts(small, small_table, tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "REGISTRY", dict(catalogue.REGISTRY))  # so that the name is gone after the test
    sca_registry.mixers("changing")(make_mixer)
    torch.manual_seed(0)
    model = sca.compose(**small_table | {"mixer": {"name": "changing", "depth": 2}})
    folder = save(model, tmp_path / "model")
    assert is_saved(model, folder)
    written = json.loads((folder / SPEC_FILE).read_text())
    assert written["mixer"] == {"name": "changing", "queries": 3, "depth": 2, "heads": [4]}
    assert written["segmenter"]["name"] == "sam"
    monkeypatch.setattr(make_mixer, "__defaults__", (5, 4, (2,), None, None, None, None))
    assert same_tensors(model, load(folder))


def test_checkpoint_without_resolved_options_loads(saved):
    model, folder = saved
    (folder / SPEC_FILE).write_text(json.dumps(model.spec.to_dict()))
    assert load(folder).spec == model.spec
    assert not is_saved(model, folder)


class MainMixer(QueryMixer):
    """As a script or a notebook defines it."""

    __module__ = "__main__"


def test_checkpoint_with_a_part_of_main_loads_where_it_is_registered(small_table, tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "REGISTRY", dict(catalogue.REGISTRY))  # so that the name is gone after the test
    sca_registry.mixers("of-main")(MainMixer)
    mixer = {"name": "of-main", "depth": 1, "num_heads": 4, "mlp_dim": 64}
    folder = save(sca.compose(**small_table | {"mixer": mixer}), tmp_path / "model")
    assert type(load(folder).mixer) is MainMixer
    monkeypatch.setattr(sca_registry.mixers, "_get_registered", dict)  # another program
    with pytest.raises(InputError, match=r"no mixers named 'of-main'\..* the code of the program that saved it") as e:
        load(folder)
    assert str(e.value).endswith("registered them; register them again before loading.")
    origin = json.loads((folder / "origin.json").read_text())
    origin["components"]["mixer"]["distribution"] = "run this: rm -rf /"
    (folder / "origin.json").write_text(json.dumps(origin))
    with pytest.raises(InputError) as e:
        load(folder)
    assert "rm -rf" not in str(e.value)


def test_captions_of_a_reloaded_model_are_equal(saved, scene):
    model, folder = saved
    boxes = [region.box for region in scene.regions]
    answers = []
    for each in (model, load(folder)):
        predictor = Predictor(each)
        predictor.set_image(scene.image)
        answers.append(predictor.predict(boxes=boxes))
    assert answers[0] == answers[1]


def test_lora_and_its_frozen_base_are_reloaded(small, tmp_path):
    model = small(trainable=["lora", "mixer"], lora=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert same_tensors(model, load(save(model, tmp_path / "model")))


def test_a_part_with_weights_of_its_own_is_not_stored_but_for_what_trains(small):
    model = small(trainable=["mixer", "projection", "lora"], lora=2)
    assert list_stored_tensors(model) == set(model.state_dict())
    model.encoder.checkpoint = model.language_model.checkpoint = "somewhere/else"
    names = list_stored_tensors(model)
    assert not any(name.startswith("encoder.") for name in names)
    assert {name for name in names if name.startswith("language_model.")} == {
        name for name in model.state_dict() if "lora_" in name
    }
    assert {name for name in model.state_dict() if name.startswith(("segmenter.", "mixer."))} <= names


def test_statistics_of_a_trained_part_are_stored_though_its_weights_came_from_elsewhere(small):
    model = small(trainable=["encoder"])
    model.encoder.checkpoint = "somewhere/else"
    assert {name for name in model.state_dict() if name.startswith("encoder.")} <= list_stored_tensors(model)


def test_half_precision_on_disk_loads_as_what_was_asked_for(saved, tmp_path):
    model, _ = saved
    folder = save(model, tmp_path / "half", dtype=torch.bfloat16)
    weights = load_file(folder / WEIGHTS_FILE)
    floating = [tensor for tensor in weights.values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in floating} == {torch.bfloat16}
    again = load(folder, dtype=torch.float32)
    assert torch.equal(again.task_tokens, model.task_tokens.bfloat16().float())


# --- what does not fit is refused by name ---------------------------------------------------------------------------


def test_a_missing_tensor_is_named(saved):
    _, folder = saved
    edit(folder, lambda tensors: tensors.pop("mixer.tokens.weight"))
    with pytest.raises(InputError, match=r"missing mixer\.tokens\.weight; unexpected nothing"):
        load(folder)


def test_an_unexpected_tensor_is_named(saved):
    _, folder = saved
    edit(folder, lambda tensors: tensors.update({"mixer.extra": torch.zeros(2)}))
    with pytest.raises(InputError, match=r"missing nothing; unexpected mixer\.extra"):
        load(folder)


def test_a_tensor_of_another_shape_is_named(saved):
    _, folder = saved
    edit(folder, lambda tensors: tensors.update({"task_tokens": torch.zeros(2, 9, 32)}))
    with pytest.raises(InputError, match=r"task_tokens is \(2, 9, 32\) and the spec\.json requires \(2, 2, 32\)"):
        load(folder)


def test_another_spec_than_the_weights_were_written_with_is_refused(saved):
    _, folder = saved
    spec = json.loads((folder / SPEC_FILE).read_text())
    spec["mixer"]["depth"] = 2
    (folder / SPEC_FILE).write_text(json.dumps(spec))
    with pytest.raises(InputError, match=r"missing mixer\.transformer\.layers\.1"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (SPEC_FILE, None, "has no spec.json"),
        (SPEC_FILE, b"{", "not valid JSON"),
        (WEIGHTS_FILE, None, "has no weights.safetensors"),
        (WEIGHTS_FILE, b"\x10\0\0\0\0\0\0\0{", "is damaged"),
    ],
)
def test_a_damaged_folder_is_refused_with_the_file_that_is_wrong(saved, file, content, message):
    _, folder = saved
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(folder)


def test_no_such_model_names_the_zoo(tmp_path):
    with pytest.raises(InputError, match="sca-tiny"):
        load(tmp_path / "nothing")


def test_a_checkpoint_says_which_weights_it_was_trained_on(sam_folder, lm_folder, tmp_path):
    model = sca.compose(
        {"name": "sam", "weights": str(sam_folder)},
        {"name": "query", "num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
        {"name": "hf", "weights": str(lm_folder("gpt2"))},
    )
    save(model, tmp_path / "model")
    origin = json.loads((tmp_path / "model" / "origin.json").read_text())["components"]
    for kind, folder in (("encoder", sam_folder), ("segmenter", sam_folder), ("language_model", lm_folder("gpt2"))):
        content = (folder / "model.safetensors").read_bytes()
        assert origin[kind]["weights"] == str(folder)
        assert origin[kind]["sha256"] == {"model.safetensors": hashlib.sha256(content).hexdigest()}
    assert "weights" not in origin["mixer"]


def test_a_folder_of_something_else_is_left_alone(small, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name in ("photos", "file"):
        with pytest.raises(OutputError, match="its content is unchanged"):
            save(small(), tmp_path / name)
    assert (tmp_path / "photos" / "holiday.jpg").read_text() == (tmp_path / "file").read_text() == "dear"


def test_what_was_added_to_pretrained_weights_is_held_even_if_it_is_frozen(sam_folder, tmp_path):
    model = sca.compose(
        {
            "name": "tiny-vit",
            "image_size": 64,
            "hidden_size": 32,
            "depth": 1,
            "output_channels": 48,
            "stem_channels": [8, 16],
        },
        {"name": "query", "num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
        {"name": "tiny-gpt2", "hidden_size": 32, "depth": 1},
        segmenter={"name": "sam", "weights": str(sam_folder)},
        trainable=["mixer"],
    )
    own = {name: value for name, value in model.state_dict().items() if name.startswith("segmenter.neck.")}
    again = load(save(model, tmp_path / "model"), allow_external=True).state_dict()
    assert own
    assert all(torch.equal(again[name], value) for name, value in own.items())


@pytest.mark.slow
def test_weights_that_a_part_finds_in_its_own_way_are_named(small, tmp_path):
    model = small()
    model.encoder.checkpoint = "a_name_of_its_own"
    save(model, tmp_path / "model")
    written = json.loads((tmp_path / "model" / "origin.json").read_text())
    assert written["components"]["encoder"]["weights"] == "a_name_of_its_own"


def test_origin_names_the_commit_of_the_checkout(small):
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    assert collect_origin(small())["commit"] == head.stdout.strip()


# --- a kill at any moment -------------------------------------------------------------------------------------------

SAVING_AND_DYING = """
import os, random, signal, sys, time
import torch
from conftest import PARTS
from sca_registry.spec import ModelSpec
from sca.builder import build
from sca import load, save

folder, kills = sys.argv[1], int(sys.argv[2])
model, draw = build(ModelSpec.from_dict(PARTS)), random.Random(7)

def saved(number):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(number)
    save(model, folder)

def found():
    "The number of the checkpoint, every tensor of which holds the same."
    (number,) = {value for each in load(folder).parameters() for value in each.detach().unique().tolist()}
    return number

start = time.perf_counter()
saved(0)
longest = 3 * (time.perf_counter() - start)
for kill in range(kills):
    start = found()
    pid = os.fork()
    if pid == 0:
        number = start
        while True:
            number += 1
            saved(number)
    time.sleep(draw.uniform(0, longest))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    assert found() >= start
    longest *= 1.5 if found() == start else 0.7  # about as often before the end of the first save as after it
print("whole after every kill, saves:", found())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("kills", [5, pytest.param(300, marks=pytest.mark.all)])
@pytest.mark.slow
def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path, kills):
    """One process saves over and over and is killed at random moments, and another loads what is left."""
    tests = os.path.dirname(os.path.dirname(__file__))
    environment = {**os.environ, "PYTHONPATH": tests, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SAVING_AND_DYING, str(tmp_path / "model"), str(kills)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "whole after every kill" in ended.stdout
    assert not ended.stdout.rstrip().endswith(" 0.0"), "no save ever came to its end"


def whole(folder):
    """A checkpoint that loads, with all its numbers from one and the same save."""
    return len({value for each in load(folder).parameters() for value in each.detach().unique().tolist()}) == 1


class Killed(BaseException):
    """Nothing runs after a kill: no `finally` may help."""


@pytest.mark.slow
def test_a_kill_before_any_step_of_a_save_leaves_a_whole_checkpoint_that_can_be_saved_over(
    small, tmp_path, monkeypatch
):
    """The n-th change of the disk, and all that would come after it, do not happen: for every n there is."""
    folder, model = tmp_path / "model", small()
    for moment in itertools.count():
        save(filled(model, 1.0), folder)
        changes = itertools.count()

        def dies(function, left=moment, changes=changes):
            def change(*arguments, **options):
                if next(changes) >= left:
                    raise Killed
                return function(*arguments, **options)

            return change

        filled(model, 2.0)
        with monkeypatch.context() as patch:
            for name in ("rename", "mkdir", "fsync", "unlink", "rmdir"):
                patch.setattr(os, name, dies(getattr(os, name)))
            try:
                save(model, folder)
                break
            except Killed:
                pass
        assert whole(folder), moment
    assert moment > 10
    assert float(load(folder).task_tokens.detach().max()) == 2.0


def filled(model, number):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(number)
    return model


def test_a_save_that_fails_leaves_the_old_checkpoint_and_nothing_half_written(saved, tmp_path, monkeypatch):
    model, folder = saved

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sca.io.atomic.sync_path", full)
        with pytest.raises(OutputError, match="No space left on device"):
            save(model, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert same_tensors(model, load(folder))
