"""Errors about damaged checkpoints name the file and the fix."""

import json
import os
import shutil

import pytest


@pytest.fixture
def get_error_for_damaged_model(checkpoint, get_sca_error, write_image, working_folder):
    """`get_error_for_damaged_model(damage)` returns the error of captioning with a copy changed by `damage(folder)`."""

    def damage_and_caption(damage):
        shutil.copytree(checkpoint, working_folder / "model", dirs_exist_ok=True)
        damage(working_folder / "model")
        return get_sca_error(2, "caption", write_image("a.png"), "--box", "0,0,9,9", "--model", "./model")

    return damage_and_caption


def change_spec(**changes):
    def damage_spec(folder):
        spec_content = json.loads((folder / "spec.json").read_text())
        (folder / "spec.json").write_text(json.dumps(spec_content | changes))

    return damage_spec


def replace_spec_text(content):
    return lambda folder: (folder / "spec.json").write_text(content)


@pytest.mark.parametrize(
    ("model", "expected_message"),
    [
        ("sca-tniy", "Did you mean 'sca-tiny'?"),
        ("no/such/folder", "no model or folder named 'no/such/folder'. Choose from: "),
        ("./a.png", "./a.png is a file; pass a folder with spec.json and weights.safetensors"),
        ("a.png", "for the local path, write ./a.png"),
        (".", "has no checkpoint; expected spec.json"),
        ("./" + "x" * 300, "File name too long"),
    ],
)
def test_caption_rejects_names_and_paths_that_are_not_models(get_sca_error, write_image, model, expected_message):
    assert expected_message in get_sca_error(2, "caption", write_image("a.png"), "--box", "0,0,9,9", "--model", model)


@pytest.mark.parametrize("size", [0, 100, 100_000])
def test_caption_rejects_truncated_weights(get_error_for_damaged_model, size):
    message = get_error_for_damaged_model(lambda folder: os.truncate(folder / "weights.safetensors", size))
    assert message.startswith("model/weights.safetensors is damaged")


def test_caption_rejects_checkpoint_without_weights(get_error_for_damaged_model):
    assert "copy or download the checkpoint again" in get_error_for_damaged_model(
        lambda folder: (folder / "weights.safetensors").unlink()
    )


@pytest.mark.parametrize("content", ["", "{", "5", "[]", "null", '"text"', "\xff", "{}", '{"encoder": 5}'])
def test_caption_names_the_file_of_an_invalid_spec(get_error_for_damaged_model, content):
    assert get_error_for_damaged_model(replace_spec_text(content)).startswith("model/spec.json")


@pytest.mark.parametrize(
    ("change", "expected_message"),
    [
        ({"format": 99}, "pip install -U segment-caption-anything"),
        ({"encoder": "tiny-vti"}, "Did you mean 'tiny-vit'?"),
        ({"encoder": {"name": "tiny-vit", "image_sise": 64}}, "Did you mean 'image_size'?"),
        ({"encoder": {"name": "tiny-vit", "image_size": 128}}, "encoder.position is (1, 64, 128)"),
        (
            {"encoder": {"name": "tiny-vit", "image_size": "big"}},
            "encoder 'tiny-vit': image_size is 'big'; expected an integer",
        ),
        ({"generation": {"num_beams": "many"}}, "generation.num_beams is 'many'; expected an integer"),
        ({"everything": {"points_per_side": [4]}}, "everything.points_per_side is [4]; expected an integer"),
        ({"task_tokens": 3}, "task_tokens is (2, 2, 128)"),
        ({"segmenter": {"name": "box"}}, "use segmenter=sam"),
        ({"generation": {"num_beans": 3}}, "Did you mean 'num_beams'?"),
        ({"color": "red"}, "unknown field 'color' of a model"),
    ],
    ids=str,
)
@pytest.mark.slow
def test_caption_rejects_spec_that_does_not_match_code_or_weights(
    get_error_for_damaged_model, change, expected_message
):
    assert expected_message in get_error_for_damaged_model(change_spec(**change))


def test_caption_names_package_of_missing_plugin_as_unverified_claim(get_error_for_damaged_model):
    def replace_mixer_by_plugin(folder):
        change_spec(mixer={"name": "their-mixer"})(folder)
        origin = json.loads((folder / "origin.json").read_text())
        origin["components"]["mixer"] = {"name": "their-mixer", "distribution": "their-package", "version": "1.2"}
        (folder / "origin.json").write_text(json.dumps(origin))

    message = get_error_for_damaged_model(replace_mixer_by_plugin)
    assert "no mixers named 'their-mixer'" in message
    claim = "claims that they come from their-package==1.2; install that only if you trust its publisher."
    assert message.endswith(f"Its origin.json {claim}")


@pytest.mark.parametrize(
    "package", ["--index-url http://x", "a @ http://x", "git+http://x", "a b", "$(id)", "a;b", ["a"]]
)
def test_caption_does_not_print_invalid_plugin_package_name(get_error_for_damaged_model, package):
    def set_package_name(folder):
        change_spec(mixer={"name": "their-mixer"})(folder)
        origin = {"components": {"mixer": {"name": "their-mixer", "distribution": package, "version": "1"}}}
        (folder / "origin.json").write_text(json.dumps(origin))

    assert "claims" not in get_error_for_damaged_model(set_package_name)


def test_save_gives_checkpoint_files_default_permissions(checkpoint):
    umask = os.umask(0)
    os.umask(umask)
    for path in (checkpoint, *checkpoint.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path
