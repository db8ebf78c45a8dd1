"""A model that cannot be loaded says which file is wrong and what to do."""

import json
import os
import shutil

import pytest


@pytest.fixture
def broken(checkpoint, refused, picture, here):
    """`broken(damage)` captions with a copy of the checkpoint that `damage(folder)` has spoilt; the line it says."""

    def call(damage):
        shutil.copytree(checkpoint, here / "model", dirs_exist_ok=True)
        damage(here / "model")
        return refused(2, "caption", picture("a.png"), "--box", "0,0,9,9", "--model", "./model")

    return call


def spec(**changes):
    def damage(folder):
        table = json.loads((folder / "spec.json").read_text())
        (folder / "spec.json").write_text(json.dumps(table | changes))

    return damage


def text(content):
    return lambda folder: (folder / "spec.json").write_text(content)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("sca-tniy", "Did you mean 'sca-tiny'?"),
        ("no/such/folder", "no model named 'no/such/folder', and no folder there"),
        ("./a.png", "a.png is a file, and a model is a folder"),
        ("a.png", "for the local path, write ./a.png"),
        (".", "has no spec.json"),
        ("./" + "x" * 300, "File name too long"),
    ],
)
def test_what_is_no_model_is_refused(refused, picture, model, said):
    assert said in refused(2, "caption", picture("a.png"), "--box", "0,0,9,9", "--model", model)


@pytest.mark.parametrize("size", [0, 100, 100_000])
def test_truncated_weights_are_refused(broken, size):
    said = broken(lambda folder: os.truncate(folder / "weights.safetensors", size))
    assert said.startswith("model/weights.safetensors is broken")


def test_absent_weights_are_refused(broken):
    assert "copy the checkpoint again" in broken(lambda folder: (folder / "weights.safetensors").unlink())


@pytest.mark.parametrize("content", ["", "{", "5", "[]", "null", '"text"', "\xff", "{}", '{"encoder": 5}'])
def test_a_spec_that_is_none_is_refused_with_its_file(broken, content):
    assert broken(text(content)).startswith("model/spec.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 99}, "pip install -U segment-caption-anything"),
        ({"encoder": "tiny-vti"}, "Did you mean 'tiny-vit'?"),
        ({"encoder": {"name": "tiny-vit", "image_sise": 64}}, "Did you mean 'image_size'?"),
        ({"encoder": {"name": "tiny-vit", "image_size": 128}}, "encoder.position is (1, 64, 128)"),
        (
            {"encoder": {"name": "tiny-vit", "image_size": "big"}},
            "encoder 'tiny-vit': image_size is 'big'; give an integer",
        ),
        ({"generation": {"num_beams": "many"}}, "generation.num_beams is 'many'; give an integer"),
        ({"everything": {"points_per_side": [4]}}, "everything.points_per_side is [4]; give an integer"),
        ({"task_tokens": 3}, "task_tokens is (2, 2, 128)"),
        ({"segmenter": {"name": "box"}}, "use segmenter=sam"),
        ({"generation": {"num_beans": 3}}, "Did you mean 'num_beams'?"),
        ({"color": "red"}, "a model has no 'color'"),
    ],
    ids=str,
)
@pytest.mark.slow
def test_a_spec_that_does_not_fit_is_refused(broken, change, said):
    assert said in broken(spec(**change))


def test_a_missing_plugin_is_named_with_the_line_that_brings_it(broken):
    def damage(folder):
        spec(mixer={"name": "their-mixer"})(folder)
        origin = json.loads((folder / "origin.json").read_text())
        origin["parts"]["mixer"] = {"name": "their-mixer", "distribution": "their-package", "version": "1.2"}
        (folder / "origin.json").write_text(json.dumps(origin))

    said = broken(damage)
    assert "no mixers named 'their-mixer'" in said
    claim = "claims that they come from their-package==1.2; install that only if you trust its publisher."
    assert said.endswith(f"Its origin.json {claim}")


@pytest.mark.parametrize(
    "package", ["--index-url http://x", "a @ http://x", "git+http://x", "a b", "$(id)", "a;b", ["a"]]
)
def test_a_package_name_that_is_none_is_not_repeated(broken, package):
    def damage(folder):
        spec(mixer={"name": "their-mixer"})(folder)
        origin = {"parts": {"mixer": {"name": "their-mixer", "distribution": package, "version": "1"}}}
        (folder / "origin.json").write_text(json.dumps(origin))

    assert "claims" not in broken(damage)


def test_a_checkpoint_can_be_read_by_others(checkpoint):
    umask = os.umask(0)
    os.umask(umask)
    for path in (checkpoint, *checkpoint.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path
