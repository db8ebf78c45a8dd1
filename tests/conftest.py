"""A small whole model for tests that need one, and a cache folder that is not the user's."""

import functools
import os
import shutil
import tempfile

import pytest
import torch
from sca_registry import plugins

pytest_plugins = ["sca.testing.pytest", "slow_guard"]

CACHE = tempfile.TemporaryDirectory(prefix="sca-cache-")  # removed when the tests end
os.environ["SCA_CACHE"] = CACHE.name

INSTALLED = {origin.metadata["Name"] for origin in plugins._find_distributions()} - {plugins.BUILTIN_DISTRIBUTION}
_find_distributions = plugins._find_distributions.__wrapped__


@functools.cache
def _distributions_for_tests():
    """Leave out the plugins that happen to be installed: tests count names, and write plugins of their own."""
    return tuple(each for each in _find_distributions() if each.metadata["Name"] not in INSTALLED)


plugins._find_distributions = _distributions_for_tests
plugins.refresh_plugins()

PARTS = {
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


@pytest.fixture
def small():
    """Builds a model of 64 pixels and width 32 with random weights, always the same; fields of the spec change it."""
    from sca_registry.spec import ModelSpec

    from sca.builder import build

    def make(seed=0, **fields):
        torch.manual_seed(seed)
        return build(ModelSpec.from_dict({**PARTS, **fields}))

    return make


@pytest.fixture
def small_table():
    """The table [model] of such a model, every part of which trains."""
    trained = ["encoder", "segmenter", "mixer", "projection", "task_tokens", "language_model"]
    return {**PARTS, "trainable": trained}


@pytest.fixture(scope="session")
def scene():
    """A drawn scene of 96 pixels with several regions."""
    from sca.data.scenes import Scenes

    scenes = Scenes("test", num_images=10, image_size=96)
    return next(sample for sample in map(scenes.__getitem__, range(10)) if len(sample.regions) >= 4)


@pytest.fixture(scope="session")
def sam_folder(tmp_path_factory):
    """A tiny SAM with random weights, as transformers saves one."""
    from tiny import SAM
    from transformers import SamConfig, SamModel

    torch.manual_seed(1)
    config = SamConfig(**SAM)
    config.vision_config.initializer_range = 0.1
    folder = tmp_path_factory.mktemp("sam")
    SamModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory):
    """Tiny language models with random weights, as transformers saves them: `lm_folder("gpt2")`."""
    from tiny import tiny
    from transformers import AutoConfig, AutoModelForCausalLM

    folders = {}

    def save(family):
        if family not in folders:
            torch.manual_seed(2)
            folders[family] = tmp_path_factory.mktemp(family)
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny(family))).save_pretrained(folders[family])
        return folders[family]

    return save


@pytest.fixture(scope="module")
def browser():
    """Chromium, as playwright drives it; while it is open, nothing else in the process may use asyncio."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
