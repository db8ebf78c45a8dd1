"""Checkpoints: contents, exact reload, error messages, and kills at any moment."""

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


def make_pixel_values(model):
    generator = torch.Generator().manual_seed(4)
    image_size = model.encoder.image_format.size
    return torch.randn(2, 3, image_size, image_size, generator=generator)


def have_equal_tensors(first_model, second_model):
    first_state, second_state = first_model.state_dict(), second_model.state_dict()
    return first_state.keys() == second_state.keys() and all(
        torch.equal(first_state[name], second_state[name]) for name in first_state
    )


@pytest.fixture
def saved_model(build_small_model, tmp_path):
    model = build_small_model(seed=3)
    return model, save(model, tmp_path / "model")


def edit_weights(folder, change_tensors):
    tensors = load_file(folder / WEIGHTS_FILE)
    change_tensors(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.slow
def test_load_restores_identical_tensors_features_and_spec(saved_model):
    model, folder = saved_model
    reloaded = load(folder)
    assert have_equal_tensors(model, reloaded)
    assert torch.equal(model.encode(make_pixel_values(model)), reloaded.encode(make_pixel_values(model)))
    assert reloaded.spec.to_dict() == json.loads(json.dumps(resolve_spec(model).to_dict()))
    assert not reloaded.training


def make_mixer(
    segmenter, queries=3, depth=1, heads=(4,), weights="org/name", url="org/name", text=None, attn_implementation="f"
):
    return QueryMixer(segmenter, num_queries=queries, depth=depth, num_heads=heads[0], mlp_dim=64)


def test_checkpoint_stores_the_default_options_of_its_components(
    build_small_model, small_model_table, tmp_path, monkeypatch
):
    monkeypatch.setattr(catalogue, "REGISTRY", dict(catalogue.REGISTRY))  # so that the name is gone after the test
    sca_registry.mixers("changing")(make_mixer)
    torch.manual_seed(0)
    model = sca.compose(**small_model_table | {"mixer": {"name": "changing", "depth": 2}})
    folder = save(model, tmp_path / "model")
    assert is_saved(model, folder)
    spec = json.loads((folder / SPEC_FILE).read_text())
    assert spec["mixer"] == {"name": "changing", "queries": 3, "depth": 2, "heads": [4]}
    assert spec["segmenter"]["name"] == "sam"
    monkeypatch.setattr(make_mixer, "__defaults__", (5, 4, (2,), None, None, None, None))
    assert have_equal_tensors(model, load(folder))


def test_load_accepts_a_checkpoint_without_resolved_options(saved_model):
    model, folder = saved_model
    (folder / SPEC_FILE).write_text(json.dumps(model.spec.to_dict()))
    assert load(folder).spec == model.spec
    assert not is_saved(model, folder)


class MainMixer(QueryMixer):
    """Register a mixer as a script or a notebook does."""

    __module__ = "__main__"


def test_checkpoint_with_a_mixer_of_main_loads_only_where_it_is_registered(small_model_table, tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "REGISTRY", dict(catalogue.REGISTRY))  # so that the name is gone after the test
    sca_registry.mixers("of-main")(MainMixer)
    mixer = {"name": "of-main", "depth": 1, "num_heads": 4, "mlp_dim": 64}
    folder = save(sca.compose(**small_model_table | {"mixer": mixer}), tmp_path / "model")
    assert type(load(folder).mixer) is MainMixer
    monkeypatch.setattr(sca_registry.mixers, "_get_registered", dict)  # another program
    with pytest.raises(
        InputError, match=r"no mixers named 'of-main'\..* the code of the program that saved it"
    ) as error:
        load(folder)
    assert str(error.value).endswith("registered them; register them again before loading.")
    origin = json.loads((folder / "origin.json").read_text())
    origin["components"]["mixer"]["distribution"] = "run this: rm -rf /"
    (folder / "origin.json").write_text(json.dumps(origin))
    with pytest.raises(InputError) as error:
        load(folder)
    assert "rm -rf" not in str(error.value)


def test_reloaded_model_predicts_equal_captions(saved_model, scene):
    model, folder = saved_model
    boxes = [region.box for region in scene.regions]
    captions = []
    for each_model in (model, load(folder)):
        predictor = Predictor(each_model)
        predictor.set_image(scene.image)
        captions.append(predictor.predict(boxes=boxes))
    assert captions[0] == captions[1]


def test_load_restores_lora_and_its_frozen_base_model(build_small_model, tmp_path):
    model = build_small_model(trainable=["lora", "mixer"], lora=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert have_equal_tensors(model, load(save(model, tmp_path / "model")))


def test_list_stored_tensors_excludes_frozen_external_weights(build_small_model):
    model = build_small_model(trainable=["mixer", "projection", "lora"], lora=2)
    assert list_stored_tensors(model) == set(model.state_dict())
    model.encoder.checkpoint = model.language_model.checkpoint = "somewhere/else"
    names = list_stored_tensors(model)
    assert not any(name.startswith("encoder.") for name in names)
    assert {name for name in names if name.startswith("language_model.")} == {
        name for name in model.state_dict() if "lora_" in name
    }
    assert {name for name in model.state_dict() if name.startswith(("segmenter.", "mixer."))} <= names


def test_list_stored_tensors_includes_all_tensors_of_a_trainable_external_encoder(build_small_model):
    model = build_small_model(trainable=["encoder"])
    model.encoder.checkpoint = "somewhere/else"
    assert {name for name in model.state_dict() if name.startswith("encoder.")} <= list_stored_tensors(model)


def test_load_casts_half_precision_weights_to_the_requested_precision(saved_model, tmp_path):
    model, _ = saved_model
    folder = save(model, tmp_path / "half", dtype=torch.bfloat16)
    weights = load_file(folder / WEIGHTS_FILE)
    floating_tensors = [tensor for tensor in weights.values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in floating_tensors} == {torch.bfloat16}
    reloaded = load(folder, precision=torch.float32)
    assert torch.equal(reloaded.task_tokens, model.task_tokens.bfloat16().float())


# --- what does not fit is refused by name ---------------------------------------------------------------------------


def test_load_names_a_missing_tensor(saved_model):
    _, folder = saved_model
    edit_weights(folder, lambda tensors: tensors.pop("mixer.tokens.weight"))
    with pytest.raises(InputError, match=r"missing mixer\.tokens\.weight; unexpected nothing"):
        load(folder)


def test_load_names_an_unexpected_tensor(saved_model):
    _, folder = saved_model
    edit_weights(folder, lambda tensors: tensors.update({"mixer.extra": torch.zeros(2)}))
    with pytest.raises(InputError, match=r"missing nothing; unexpected mixer\.extra"):
        load(folder)


def test_load_names_a_tensor_with_a_wrong_shape(saved_model):
    _, folder = saved_model
    edit_weights(folder, lambda tensors: tensors.update({"task_tokens": torch.zeros(2, 9, 32)}))
    with pytest.raises(InputError, match=r"task_tokens is \(2, 9, 32\) and the spec\.json requires \(2, 2, 32\)"):
        load(folder)


def test_load_rejects_a_spec_that_does_not_match_the_weights(saved_model):
    _, folder = saved_model
    spec = json.loads((folder / SPEC_FILE).read_text())
    spec["mixer"]["depth"] = 2
    (folder / SPEC_FILE).write_text(json.dumps(spec))
    with pytest.raises(InputError, match=r"missing mixer\.transformer\.layers\.1"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (SPEC_FILE, None, "has no checkpoint; expected spec.json, config.json, or one sub-folder"),
        (SPEC_FILE, b"{", "not valid JSON"),
        (WEIGHTS_FILE, None, "has no weights.safetensors"),
        (WEIGHTS_FILE, b"\x10\0\0\0\0\0\0\0{", "is damaged"),
    ],
)
def test_load_names_the_missing_or_damaged_file(saved_model, file, content, message):
    _, folder = saved_model
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(folder)


def test_load_of_an_unknown_model_lists_the_zoo(tmp_path):
    with pytest.raises(InputError, match="sca-tiny"):
        load(tmp_path / "nothing")


def test_save_records_paths_and_hashes_of_pretrained_weights(sam_folder, save_language_model, tmp_path):
    model = sca.compose(
        {"name": "sam", "weights": str(sam_folder)},
        {"name": "query", "num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
        {"name": "hf", "weights": str(save_language_model("gpt2"))},
    )
    save(model, tmp_path / "model")
    origin = json.loads((tmp_path / "model" / "origin.json").read_text())["components"]
    for kind, folder in (
        ("encoder", sam_folder),
        ("segmenter", sam_folder),
        ("language_model", save_language_model("gpt2")),
    ):
        content = (folder / "model.safetensors").read_bytes()
        assert origin[kind]["weights"] == str(folder)
        assert origin[kind]["sha256"] == {"model.safetensors": hashlib.sha256(content).hexdigest()}
    assert "weights" not in origin["mixer"]


def test_save_never_overwrites_other_folders_and_files(build_small_model, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name in ("photos", "file"):
        with pytest.raises(OutputError, match="its content is unchanged"):
            save(build_small_model(), tmp_path / name)
    assert (tmp_path / "photos" / "holiday.jpg").read_text() == (tmp_path / "file").read_text() == "dear"


def test_save_stores_the_frozen_neck_of_a_pretrained_segmenter(sam_folder, tmp_path):
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
    neck_tensors = {name: value for name, value in model.state_dict().items() if name.startswith("segmenter.neck.")}
    reloaded_state = load(save(model, tmp_path / "model"), allow_external=True).state_dict()
    assert neck_tensors
    assert all(torch.equal(reloaded_state[name], value) for name, value in neck_tensors.items())


@pytest.mark.slow
def test_save_records_weights_that_are_not_a_path(build_small_model, tmp_path):
    model = build_small_model()
    model.encoder.checkpoint = "a_name_of_its_own"
    save(model, tmp_path / "model")
    origin = json.loads((tmp_path / "model" / "origin.json").read_text())
    assert origin["components"]["encoder"]["weights"] == "a_name_of_its_own"


def test_collect_origin_records_the_git_commit(build_small_model):
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    assert collect_origin(build_small_model())["commit"] == head.stdout.strip()


# --- a kill at any moment -------------------------------------------------------------------------------------------

SAVE_AND_KILL_SCRIPT = """
import os, random, signal, sys, time
import torch
from conftest import SMALL_MODEL_SPEC
from sca_registry.spec import ModelSpec
from sca.builder import build
from sca import load, save

folder, num_kills = sys.argv[1], int(sys.argv[2])
model, rng = build(ModelSpec.from_dict(SMALL_MODEL_SPEC)), random.Random(7)

def save_filled(value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    save(model, folder)

def read_value():
    "Return the value of all tensors of the checkpoint."
    (value,) = {each for p in load(folder).parameters() for each in p.detach().unique().tolist()}
    return value

start = time.perf_counter()
save_filled(0)
max_delay = 3 * (time.perf_counter() - start)
for kill in range(num_kills):
    start = read_value()
    pid = os.fork()
    if pid == 0:
        value = start
        while True:
            value += 1
            save_filled(value)
    time.sleep(rng.uniform(0, max_delay))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    assert read_value() >= start
    max_delay *= 1.5 if read_value() == start else 0.7  # about as often before the end of the first save as after it
print("complete after every kill, saves:", read_value())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is not available")
@pytest.mark.parametrize("num_kills", [5, pytest.param(300, marks=pytest.mark.all)])
@pytest.mark.slow
def test_save_killed_at_random_times_leaves_a_complete_checkpoint(tmp_path, num_kills):
    """One process saves repeatedly and is killed at random moments; another loads the checkpoint."""
    tests_folder = os.path.dirname(os.path.dirname(__file__))
    environment = {**os.environ, "PYTHONPATH": tests_folder, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SAVE_AND_KILL_SCRIPT, str(tmp_path / "model"), str(num_kills)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "complete after every kill" in result.stdout
    assert not result.stdout.rstrip().endswith(" 0.0"), "no save was completed"


def is_complete_checkpoint(folder):
    """The checkpoint loads, and all its tensors are from the same save."""
    return len({value for each in load(folder).parameters() for value in each.detach().unique().tolist()}) == 1


class Killed(BaseException):
    """Simulate a kill: no code runs afterwards, `finally` included."""


@pytest.mark.slow
def test_save_killed_before_any_file_operation_leaves_a_complete_checkpoint(build_small_model, tmp_path, monkeypatch):
    """For every n, the process is killed before its n-th file operation."""
    folder, model = tmp_path / "model", build_small_model()
    for num_operations in itertools.count():
        save(fill_parameters(model, 1.0), folder)
        operation_counter = itertools.count()

        def raise_after_limit(function, limit=num_operations, operation_counter=operation_counter):
            def guarded_function(*arguments, **options):
                if next(operation_counter) >= limit:
                    raise Killed
                return function(*arguments, **options)

            return guarded_function

        fill_parameters(model, 2.0)
        with monkeypatch.context() as patch:
            for name in ("rename", "mkdir", "fsync", "unlink", "rmdir"):
                patch.setattr(os, name, raise_after_limit(getattr(os, name)))
            try:
                save(model, folder)
                break
            except Killed:
                pass
        assert is_complete_checkpoint(folder), num_operations
    assert num_operations > 10
    assert float(load(folder).task_tokens.detach().max()) == 2.0


def fill_parameters(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def test_save_on_a_full_disk_keeps_the_previous_checkpoint(saved_model, tmp_path, monkeypatch):
    model, folder = saved_model

    def raise_disk_full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sca.io.atomic.sync_path", raise_disk_full)
        with pytest.raises(OutputError, match="No space left on device"):
            save(model, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert have_equal_tensors(model, load(folder))
