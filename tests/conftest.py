"""Shared fixtures: small models, a scene, Chromium, and a cache folder that is not the user's."""

import functools
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from sca_registry import plugins

pytest_plugins = ["sca.testing.pytest", "slow_guard"]

CACHE_FOLDER = tempfile.TemporaryDirectory(prefix="sca-cache-")  # removed when the tests end
os.environ["SCA_CACHE"] = CACHE_FOLDER.name

INSTALLED_DISTRIBUTION_NAMES = {origin.metadata["Name"] for origin in plugins._find_distributions()} - {
    plugins.BUILTIN_DISTRIBUTION
}
_find_all_distributions = plugins._find_distributions.__wrapped__


@functools.cache
def _find_builtin_and_test_distributions():
    """Hide installed plugins: tests count names and write their own plugins."""
    return tuple(
        each for each in _find_all_distributions() if each.metadata["Name"] not in INSTALLED_DISTRIBUTION_NAMES
    )


plugins._find_distributions = _find_builtin_and_test_distributions
plugins.refresh_plugins()

SMALL_MODEL_SPEC = {
    "encoder": {
        "name": "tiny-vit",
        "image_size": 64,
        "hidden_size": 32,
        "depth": 1,
        "output_channels": 32,
        "stem_channels": [8, 16],
    },
    "segmenter": {"name": "sam", "depth": 1, "num_heads": 2, "mlp_dim": 64},
    "mixer": {"name": "query", "num_queries": 2, "depth": 1, "num_heads": 2, "mlp_dim": 64},
    "language_model": {"name": "tiny-gpt2", "hidden_size": 32, "depth": 1, "num_heads": 2, "max_positions": 40},
    "task_tokens": 2,
    "generation": {"max_new_tokens": 6},
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    """Fail a test that leaves another current folder to the tests after it."""
    yield
    folder = item.config.invocation_params.dir
    if Path.cwd() != folder:
        os.chdir(folder)
        pytest.fail("the test changes the current folder; use monkeypatch.chdir")


@pytest.fixture
def build_small_model():
    """Function that builds a model of 64 pixels and width 32 with fixed random weights; its options change the spec."""
    from sca_registry.spec import ModelSpec

    from sca.builder import build

    def build_with_fields(seed=0, **fields):
        torch.manual_seed(seed)
        return build(ModelSpec.from_dict({**SMALL_MODEL_SPEC, **fields}))

    return build_with_fields


@pytest.fixture
def small_model_table():
    """The table [model] of a small model whose components are all trainable."""
    trainable_groups = ["encoder", "segmenter", "mixer", "projection", "task_tokens", "language_model"]
    return {**SMALL_MODEL_SPEC, "trainable": trainable_groups}


@pytest.fixture(scope="session")
def scene():
    """A synthetic scene of 96 pixels with several regions."""
    from sca.data.scenes import Scenes

    scenes = Scenes("test", num_images=10, image_size=96)
    return next(sample for sample in map(scenes.__getitem__, range(10)) if len(sample.regions) >= 4)


@pytest.fixture(scope="session")
def sam_folder(tmp_path_factory):
    """Folder of a tiny SAM with random weights, as saved by transformers."""
    from tiny import TINY_SAM_CONFIG
    from transformers import SamConfig, SamModel

    torch.manual_seed(1)
    config = SamConfig(**TINY_SAM_CONFIG)
    config.vision_config.initializer_range = 0.1
    folder = tmp_path_factory.mktemp("sam")
    SamModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def save_language_model(tmp_path_factory):
    """`save_language_model("gpt2")` returns the folder of a tiny language model with random weights."""
    from tiny import make_tiny_config
    from transformers import AutoConfig, AutoModelForCausalLM

    folder_by_family = {}

    def save_family(family):
        if family not in folder_by_family:
            torch.manual_seed(2)
            folder_by_family[family] = tmp_path_factory.mktemp(family)
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**make_tiny_config(family))).save_pretrained(
                folder_by_family[family]
            )
        return folder_by_family[family]

    return save_family


@pytest.fixture(scope="module")
def browser():
    """Chromium, controlled by playwright; while it is open, nothing else in the process may use asyncio."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as playwright_driver:
        browser = playwright_driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def save_tiny_proposer(tmp_path_factory):
    """Function that saves a tiny proposer in transformers' format and returns its folder."""
    from sca_registry import proposers

    from sca.testing.tiny import get_tiny_options

    folders = {}

    def save(name):
        if name not in folders:
            folders[name] = str(tmp_path_factory.mktemp(name))
            proposer = proposers.build(name, **get_tiny_options("proposers", name))
            proposer.model.save_pretrained(folders[name])
            proposer.processor.save_pretrained(folders[name])
        return folders[name]

    return save
