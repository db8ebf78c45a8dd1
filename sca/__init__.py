"""Segment and caption any region of any image, with components selected by name.

Example:
    >>> import sca
    >>> model = sca.load("sca-tiny")
    >>> predictor = sca.Predictor(model)

Importing this module is cheap. torch is imported with the first name that needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sca_registry.contracts import Caption as Caption
    from sca_registry.contracts import Prompt as Prompt
    from sca_registry.spec import EverythingOptions as EverythingOptions
    from sca_registry.spec import ModelSpec as ModelSpec

    from sca.builder import build as build
    from sca.builder import compose as compose
    from sca.checkpoints.load import load as load
    from sca.checkpoints.native import save as save
    from sca.evaluation.evaluate import evaluate as evaluate
    from sca.inference.automatic import caption_everything as caption_everything
    from sca.inference.factory import load_captioner as load_captioner
    from sca.inference.predictor import Predictor as Predictor
    from sca.inference.processor import Processor as Processor
    from sca.io.images import open_image as open_image
    from sca.model import SegmentCaptioner as SegmentCaptioner
    from sca.training.train import train as train

_LAZY_IMPORTS = {
    "Caption": "sca_registry.contracts",
    "EverythingOptions": "sca_registry.spec",
    "ModelSpec": "sca_registry.spec",
    "Predictor": "sca.inference.predictor",
    "Processor": "sca.inference.processor",
    "Prompt": "sca_registry.contracts",
    "SegmentCaptioner": "sca.model",
    "build": "sca.builder",
    "caption_everything": "sca.inference.automatic",
    "compose": "sca.builder",
    "evaluate": "sca.evaluation.evaluate",
    "load": "sca.checkpoints.load",
    "load_captioner": "sca.inference.factory",
    "open_image": "sca.io.images",
    "save": "sca.checkpoints.native",
    "train": "sca.training.train",
}
__all__ = sorted(_LAZY_IMPORTS)


def __getattr__(name: str) -> Any:
    if name not in _LAZY_IMPORTS:
        from sca.hints import make_attribute_error

        raise make_attribute_error(name, __all__)
    return getattr(import_module(_LAZY_IMPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
