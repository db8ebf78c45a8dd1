"""Checkpoints in the layout of the published system (SCA, arXiv 2312.00869): read as they are, and written back.

A folder holds `config.json` with model_type "sca" and all tensors of SAM, the mixer and the language model, in
`model.safetensors` or `pytorch_model.bin`, in one piece or in shards.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from sca_registry.messages import unknown
from sca_registry.spec import ModelSpec
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, SamVisionConfig
from transformers.initialization import no_init_weights

from sca.checkpoint import CheckpointError, assign
from sca.composition import build
from sca.hub import HubError, absent, fetch, weight_files
from sca.language_models.causal import TextTokenizer
from sca.language_models.hf import read_tokenizer

if TYPE_CHECKING:
    from sca.model import SegmentCaptioner

MIXERS = {"ScaMultitaskV2Model": "query", "ScaMultitaskSplitMixerModel": "split"}  # by the published architecture
FIXED = {  # figures that the published checkpoints share and our modules have no option for
    "hidden_act": "relu",
    "attention_downsample_rate": 2,
    "layer_norm_eps": 1e-6,
    "num_multimask_outputs": 3,
    "num_caption_heads": 1,
}
PLACES = (  # beginning of a published name, and of ours
    ("vision_encoder.", "encoder.vision."),
    ("shared_image_embedding.", "segmenter.prompt_encoder.shared_embedding."),
    ("prompt_encoder.", "segmenter.prompt_encoder."),
    ("mask_decoder.additional_transformer.", "mixer.transformer."),
    ("mask_decoder.caption_tokens.", "mixer.tokens."),
    ("mask_decoder.", "segmenter.decoder."),
    ("language_project.", "projection.0."),
    ("language_model.", "language_model.model."),
    ("task_tokens.weight", "task_tokens"),
)


def load_published(folder: Path) -> SegmentCaptioner:
    """The model of a published folder. Every tensor has its place and every place its tensor, or CheckpointError names
    them. Its language model has the tokenizer that lies in the folder, or else that of the name in its configuration.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    spec = read_spec(config, folder)
    with no_init_weights():
        model = build(spec)
    tensors = {_ours(name): tensor for name, tensor in _tensors(folder).items()}
    own = model.state_dict()
    for name, place in own.items():
        if name not in tensors:  # of tensors that are one, the published files hold one
            twin = next(
                (other for other in tensors if other in own and own[other].data_ptr() == place.data_ptr()), None
            )
            if twin:
                tensors[name] = tensors[twin]
    if "task_tokens" in tensors and tensors["task_tokens"].numel() == own["task_tokens"].numel():
        tensors["task_tokens"] = tensors["task_tokens"].view_as(own["task_tokens"])  # (2 K, E) -> (2, K, E)
    assign(model, tensors, set(own), folder, "config.json")
    model.language_model.tokenizer = _tokenizer(folder, config)
    return model.eval()


def read_spec(config: Mapping[str, Any], folder: Path) -> ModelSpec:
    """The spec of a published `config.json`. Raises CheckpointError for a model of another kind."""
    try:
        (architecture,) = config["architectures"]
        if architecture not in MIXERS:
            raise CheckpointError(f"{folder}: {unknown(f'no model is called {architecture!r}', architecture, MIXERS)}")
        vision, prompts, decoder = (
            config[part] for part in ("vision_config", "prompt_encoder_config", "mask_caption_decoder_config")
        )
        for figure, value in FIXED.items():
            if decoder[figure] != value:
                raise CheckpointError(f"{folder}: {figure} is {decoder[figure]!r}, and only {value!r} is known")
        heads, mlp = decoder["num_attention_heads"], decoder["mlp_dim"]
        return ModelSpec.from_dict(
            {
                "encoder": {"name": "sam", "config": {"vision_config": _plain(SamVisionConfig(**vision))}},
                "segmenter": {
                    "name": "sam",
                    "depth": decoder["num_hidden_layers"],
                    "heads": heads,
                    "mlp": mlp,
                    "mask_channels": prompts["mask_input_channels"],
                    "iou_depth": decoder["iou_head_depth"],
                    "iou_width": decoder["iou_head_hidden_dim"],
                },
                "mixer": {
                    "name": MIXERS[architecture],
                    "queries": decoder["num_caption_tokens"],
                    "depth": decoder["additional_num_hidden_layers"],
                    "heads": heads,
                    "mlp": mlp,
                },
                "language_model": {"name": "hf", "config": _language_model(config["text_config"], folder)},
                "task_tokens": config["num_task_tokens"],
            }
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / 'config.json'} is not that of a published model ({error!r})") from error


def _language_model(written: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration, with the ends that generation used."""
    plain = _plain(AutoConfig.for_model(**written))
    try:
        ends = json.loads((folder / "generation_config.json").read_text("utf-8"))
    except FileNotFoundError:
        ends = {}
    return plain | {key: ends[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in ends}


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    """What differs from the defaults, as JSON has it."""
    fields = json.loads(config.to_json_string(use_diff=True))
    return {key: value for key, value in fields.items() if key not in ("transformers_version", "_name_or_path")}


def _tokenizer(folder: Path, config: Mapping[str, Any]) -> TextTokenizer | None:
    found = read_tokenizer(folder)
    name = config["text_config"].get("_name_or_path")
    if found is None and name:
        try:
            return read_tokenizer(fetch(name))
        except HubError as error:
            warnings.warn(f"captions of {folder} are ids only: it has no tokenizer, and {error}", stacklevel=3)
    return found


def _tensors(folder: Path) -> dict[str, Tensor]:
    files = weight_files(folder)
    if files is None:
        raise CheckpointError(f"{folder} has no whole weights: {absent(folder)}. Copy or download it again")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{file} cannot be read, or holds more than tensors ({reason})") from error
    return tensors


def _ours(name: str) -> str:
    return next((ours + name.removeprefix(theirs) for theirs, ours in PLACES if name.startswith(theirs)), name)
