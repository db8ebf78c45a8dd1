"""Plan cache: plans are cached by everything they depend on."""

import pytest
from sca_registry.spec import ModelSpec

import sca.plan
from sca.cli import run_command
from sca.plan_cache import MAX_CACHED_PLANS, compute_plan_key, hash_source_files, read_plan, write_plan

TINY_MODEL = "tiny-vit+query+tiny-gpt2"


@pytest.fixture(autouse=True)
def plan_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plans"


def test_plan_key_changes_with_the_spec_settings_and_source(monkeypatch):
    spec = ModelSpec.parse(TINY_MODEL)
    key = compute_plan_key(spec, {"batch_size": 1})
    assert key == compute_plan_key(ModelSpec.parse(TINY_MODEL), {"batch_size": 1})
    assert key != compute_plan_key(spec, {"batch_size": 2})
    assert key != compute_plan_key(spec.apply_overrides(["lora=8"]), {"batch_size": 1})
    for name in ("hash_source_files", "version"):
        with monkeypatch.context() as patch:
            patch.setattr(f"sca.plan_cache.{name}", lambda package: "changed")
            assert key != compute_plan_key(spec, {"batch_size": 1}), name


@pytest.mark.parametrize("files", [("shade.py",), ("shade/__init__.py", "shade/parts.py")])
def test_hash_source_files_changes_with_a_source_file(files, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "shade").mkdir()
    for file in files:
        (tmp_path / file).write_text("")
    original_hash = hash_source_files("shade")
    assert original_hash == hash_source_files("shade") != ""
    (tmp_path / files[-1]).write_text("changed")
    assert hash_source_files("shade") != original_hash
    assert hash_source_files("no_such_package") == ""


@pytest.mark.parametrize("spec", ["tiny-vit+query+hf weights=./folder", "tiny-vit+unknown+tiny-gpt2"])
def test_plan_key_is_none_for_files_and_unknown_components(spec):
    name, *overrides = spec.split()
    assert (
        compute_plan_key(ModelSpec.parse(name).apply_overrides([f"language_model.{each}" for each in overrides]), {})
        is None
    )


@pytest.mark.slow
def test_plan_command_reuses_the_cached_plan(capsys, monkeypatch, plan_cache_folder):
    assert run_command(["plan", TINY_MODEL, "--json"]) == 0
    first_output = capsys.readouterr().out
    monkeypatch.setattr(sca.plan, "plan_model", lambda *_, **__: pytest.fail("planned again"))
    assert run_command(["plan", TINY_MODEL, "--json"]) == 0
    assert capsys.readouterr().out == first_output
    assert run_command(["plan", TINY_MODEL, "--gpu", "abacus"]) == 2
    (file,) = plan_cache_folder.iterdir()
    file.write_text("{")
    assert read_plan(file.stem) is None


@pytest.mark.slow
def test_write_plan_keeps_only_the_latest_plans(plan_cache_folder):
    plan = sca.plan.plan_model(ModelSpec.parse(TINY_MODEL))
    for number in range(MAX_CACHED_PLANS + 3):
        write_plan(str(number), plan)
    assert len(list(plan_cache_folder.iterdir())) == MAX_CACHED_PLANS
    assert read_plan(str(MAX_CACHED_PLANS + 2)) == plan


@pytest.mark.slow
def test_write_plan_without_a_cache_folder_does_nothing(plan_cache_folder):
    plan_cache_folder.parent.write_text("a file")
    write_plan("key", sca.plan.plan_model(ModelSpec.parse(TINY_MODEL)))
    assert read_plan("key") is None
