"""Load the configs of mmdet, and build detectors with their weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sca_registry.errors import suggest_name
from torch import nn

from sca.io.hub import find_local_file
from sca.io.weight_files import translate_load_errors
from sca_mmdet.operators import check_operators, install_operators

if TYPE_CHECKING:
    from mmengine.config import Config

UNUSED_TENSORS = ("num_batches_tracked", "embeddings.position_ids")  # the second of older versions of transformers


def load_mmdet_config(name: str, components: tuple[str, ...] = ()) -> Config:
    """Load a detector config.

    Args:
        name: Name of a config in mmdet, or path of a file, with a separator. The code of a file is executed.
        components: Used components of the model, such as "backbone"; all by default.

    Raises:
        ValueError: The config does not exist, is not that of a detector, or a used component needs compiled operators.
    """
    install_operators()
    from mmengine.config import Config

    path = find_local_file(name)
    if path is None:
        config_files = _list_configs()
        if name not in config_files:
            raise ValueError(
                f"no config {name!r}, neither a file nor one of the {len(config_files)} configs of mmdet."
                f"{suggest_name(name, config_files)}"
            )
        path = config_files[name]
    with translate_load_errors(path), silence_mmdet():
        config = Config.fromfile(str(path))
        model = config.get("model")
    if not isinstance(model, dict) or "backbone" not in model:
        raise ValueError(f"{path} is not the config of a detector; its model has no backbone")
    check_operators({component: model.get(component) for component in components} if components else model, name)
    return config


def build_detector(config: Config, name: str, weights: str | None) -> tuple[nn.Module, dict[str, Any]]:
    """Build the detector of a config in eval mode.

    Args:
        config: Config of the detector.
        name: Name of the config, for error messages.
        weights: File or URL in the format of mmdet; None for random weights.

    Returns:
        The detector, and the metadata stored with the weights.

    Raises:
        ValueError: The detector cannot be built, or the weights cannot be read or do not fit it.
    """
    install_operators()
    with translate_load_errors(name), silence_mmdet():
        from mmdet.registry import MODELS
        from mmdet.utils import register_all_modules

        register_all_modules(init_default_scope=True)
        detector = MODELS.build(config.model)
    if hasattr(detector, "language_model"):
        _adapt_language_model(detector.language_model)
    if weights is None:
        return detector.eval(), {}
    with translate_load_errors(weights), silence_mmdet():
        content = _load_weights(weights)
        detector_tensors = detector.state_dict()
        tensors = {  # without those used only in training
            key: tensor
            for key, tensor in content.get("state_dict", content).items()
            if key in detector_tensors or not (key.startswith("ema_") or key.endswith(UNUSED_TENSORS))
        }
        missing, unexpected = (
            sorted(detector_tensors.keys() - tensors.keys()),
            sorted(tensors.keys() - detector_tensors.keys()),
        )
        if missing or unexpected:
            problem = f"missing {missing[0]!r}" if missing else f"unexpected {unexpected[0]!r}"
            raise ValueError(
                f"it does not fit {name}: {problem} ({len(missing)} missing and {len(unexpected)} unexpected tensors)"
            )
        detector.load_state_dict(tensors)
    return detector.eval(), content.get("meta") or {}


def _adapt_language_model(language_model: Any) -> None:
    """Adapt mmdet's BERT to transformers 5, whose tokenizers and attention masks differ from those of version 4."""
    language_model.tokenizer.batch_encode_plus = language_model.tokenizer
    language_model.language_backbone.body.model.register_forward_pre_hook(_add_head_dimension, with_kwargs=True)


def _add_head_dimension(_: nn.Module, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Convert an attention mask between tokens, (B, L, L), to (B, 1, L, L)."""
    mask = options["attention_mask"]
    return args, {**options, "attention_mask": mask.bool()[:, None] if mask.dim() == 3 else mask}


def _load_weights(weights: str) -> dict[str, Any]:
    """Load a weights file without running code: only tensors, numbers and text."""
    from mmengine.logging.history_buffer import HistoryBuffer
    from numpy import dtype, dtypes, ndarray
    from numpy._core.multiarray import _reconstruct, scalar

    safe_types = [HistoryBuffer, ndarray, dtype, _reconstruct, scalar, dtypes.Float64DType, dtypes.Int64DType]
    with torch.serialization.safe_globals(safe_types):
        if weights.startswith(("https://", "http://")):
            return torch.hub.load_state_dict_from_url(weights, map_location="cpu", weights_only=True)
        return torch.load(Path(weights).expanduser(), map_location="cpu", weights_only=True)


def _list_configs() -> dict[str, Path]:
    import mmdet

    folder = Path(mmdet.__file__).parent / ".mim" / "configs"
    return {file.stem: file for file in sorted(folder.glob("*/*.py")) if file.parent.name != "_base_"}


@contextmanager
def silence_mmdet() -> Iterator[None]:
    """Silence registration messages of mmengine, and deprecation warnings of torch about mmdet."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)
