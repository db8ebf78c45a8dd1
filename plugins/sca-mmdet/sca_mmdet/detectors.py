"""Detectors of mmdet by the name of a config: read, built and given their weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sca_registry.messages import suggestion
from torch import nn

from sca.io.hub import local_file
from sca.io.weight_files import reading
from sca_mmdet.operators import prepare, refuse_compiled

if TYPE_CHECKING:
    from mmengine.config import Config


def read_config(name: str, parts: tuple[str, ...] = ()) -> Config:
    """A config by its name in mmdet, or by file, a path with a separator, whose code is run.

    parts: those of the model that are used, if not all.

    Raises ValueError if there is none, or what is used needs compiled operators.
    """
    prepare()
    from mmengine.config import Config

    file = local_file(name)
    if file is None:
        known = _known()
        if name not in known:
            raise ValueError(
                f"there is no config {name!r}, as a file or among the {len(known)} of mmdet.{suggestion(name, known)}"
            )
        file = known[name]
    with reading(file), silent():
        config = Config.fromfile(str(file))
        model = config.get("model")
    if not isinstance(model, dict) or "backbone" not in model:
        raise ValueError(f"{file} is no config of a detector: it has no model with a backbone")
    refuse_compiled({part: model.get(part) for part in parts} if parts else model, name)
    return config


def build_detector(config: Config, name: str, weights: str | None) -> tuple[nn.Module, dict[str, Any]]:
    """The detector, with weights from a file or a URL, or random ones; and what the weights say of themselves."""
    prepare()
    with reading(name), silent():
        from mmdet.registry import MODELS
        from mmdet.utils import register_all_modules

        register_all_modules(init_default_scope=True)
        detector = MODELS.build(config.model)
    if weights is None:
        return detector.eval(), {}
    with reading(weights), silent():
        content = _load(weights)
        own = detector.state_dict()
        found = {  # besides what only training has a use for
            key: tensor
            for key, tensor in content.get("state_dict", content).items()
            if key in own or not (key.startswith("ema_") or key.endswith("num_batches_tracked"))
        }
        missing, unexpected = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
        if missing or unexpected:
            told = f"it lacks {missing[0]!r}" if missing else f"it has no place for {unexpected[0]!r}"
            raise ValueError(f"it does not fit {name}: {told}, of {len(missing)} and {len(unexpected)} such tensors")
        detector.load_state_dict(found)
    return detector.eval(), content.get("meta") or {}


def _load(weights: str) -> dict[str, Any]:
    """Tensors, numbers and text, and nothing that could run."""
    from mmengine.logging.history_buffer import HistoryBuffer
    from numpy import dtype, dtypes, ndarray
    from numpy._core.multiarray import _reconstruct, scalar

    plain = [HistoryBuffer, ndarray, dtype, _reconstruct, scalar, dtypes.Float64DType, dtypes.Int64DType]
    with torch.serialization.safe_globals(plain):
        if weights.startswith(("https://", "http://")):
            return torch.hub.load_state_dict_from_url(weights, map_location="cpu", weights_only=True)
        return torch.load(Path(weights).expanduser(), map_location="cpu", weights_only=True)


def _known() -> dict[str, Path]:
    import mmdet

    folder = Path(mmdet.__file__).parent / ".mim" / "configs"
    return {file.stem: file for file in sorted(folder.glob("*/*.py")) if file.parent.name != "_base_"}


@contextmanager
def silent() -> Iterator[None]:
    """mmengine remarks on what it registers, and mmdet calls what torch has other names for by now."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)
