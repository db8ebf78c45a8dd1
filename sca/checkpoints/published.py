"""Checkpoints in the layout of the published system (SCA, arXiv 2312.00869), read unchanged.

A folder holds `config.json` with model_type "sca" and all tensors of SAM, the mixer and the language model, in
`model.safetensors` or `pytorch_model.bin`, in one piece or in shards.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from sca_registry.messages import unknown
from sca_registry.spec import ModelSpec
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, SamVisionConfig
from transformers.initialization import no_init_weights

from sca.checkpoints.layout import tokenizer_source
from sca.checkpoints.state import BoundedBuild, assign
from sca.checkpoints.trust import NO_TRUST, Trust, TrustError, confine_spec
from sca.composition import build
from sca.io.errors import InputError
from sca.io.hub import fetch
from sca.io.json import read_json
from sca.io.weight_files import has_tokenizer, read_tensors, require_weight_files, weight_files
from sca.language_models.causal import TextTokenizer
from sca.language_models.hf import read_tokenizer
from sca.language_models.phi import split_fused_attention
from sca.model import SegmentCaptioner

MIXERS = {"ScaMultitaskV2Model": "query", "ScaMultitaskSplitMixerModel": "split"}  # by the published architecture
FIXED = {  # figures that the published checkpoints share and our modules have no option for
    "hidden_act": "relu",
    "attention_downsample_rate": 2,
    "layer_norm_eps": 1e-6,
    "num_multimask_outputs": 3,
    "num_caption_heads": 1,
}
NOTES = {  # what a configuration says that makes no difference to the model
    *("transformers_version", "_name_or_path", "architectures", "dtype", "initializer_range"),
    *("id2label", "label2id", "model_type"),
}
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
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


def load_published(folder: Path, trust: Trust = NO_TRUST) -> SegmentCaptioner:
    """The model of a published folder. Every tensor has its place and every place its tensor, or InputError names
    them. Its language model has the tokenizer that lies in the folder, or else that of the name in its configuration.
    """
    spec = open_published(folder, trust)
    with no_init_weights(), BoundedBuild(weight_files(folder) or [], spec):
        model = build(spec)
    tensors = {_ours(name): tensor for name, tensor in _tensors(folder).items()}
    causal = model.language_model.model.config
    if causal.model_type == "phi":
        try:
            tensors = split_fused_attention(tensors, causal)
        except ValueError as error:
            raise InputError(f"{folder}: {error}") from error
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
    model.language_model.tokenizer = _tokenizer(folder, trust)
    return model.eval()


def open_published(folder: Path, trust: Trust = NO_TRUST) -> ModelSpec:
    """Read the spec of a published folder, confined to what the caller agreed to. Raises InputError."""
    try:
        return confine_spec(read_published_spec(read_json(folder / "config.json"), folder), folder, trust)
    except TrustError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from error


def read_published_spec(config: Mapping[str, Any], folder: Path) -> ModelSpec:
    """The spec of a published `config.json`. Raises InputError for a model of another kind."""
    try:
        (architecture,) = config["architectures"]
        if architecture not in MIXERS:
            raise InputError(f"{folder}: {unknown(f'no model is called {architecture!r}', architecture, MIXERS)}")
        vision, prompts, decoder = (
            config[part] for part in ("vision_config", "prompt_encoder_config", "mask_caption_decoder_config")
        )
        for figure, value in FIXED.items():
            if decoder.get(figure, value) != value:
                raise InputError(f"{folder}: {figure} is {decoder[figure]!r}, and only {value!r} is known")
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
    except InputError:
        raise
    except Exception as error:  # whatever transformers raises over figures that it does not expect
        raise InputError(f"{folder / 'config.json'} is not that of a published model ({error!r})") from error


def _language_model(written: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration, with the ends that generation used."""
    plain = {"model_type": written["model_type"], **_plain(AutoConfig.for_model(**written))}
    try:
        ends = read_json(folder / "generation_config.json")
    except FileNotFoundError:
        ends = {}
    return plain | {key: ends[key] for key in ENDS if key in ends}


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    """The figures that differ from the defaults, as JSON has them."""
    fields, defaults = json.loads(config.to_json_string(use_diff=False)), type(config)().to_dict()
    known = fields.keys() & defaults.keys() - NOTES
    return {key: fields[key] for key in sorted(known) if fields[key] != defaults[key]}


def _tokenizer(folder: Path, trust: Trust) -> TextTokenizer | None:
    try:
        source = tokenizer_source(folder, trust)
        return read_tokenizer(folder if source is None else fetch(source, weights=False))
    except InputError as error:
        if has_tokenizer(folder):
            raise
        warnings.warn(f"captions of {folder} are ids only: it has no tokenizer, and {error}", stacklevel=3)
        return None


def _tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in require_weight_files(folder, folder):
        try:
            tensors |= read_tensors(file)
        except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{file} cannot be read, or holds more than tensors ({reason})") from error
    return tensors


def _ours(name: str) -> str:
    return next((ours + name.removeprefix(theirs) for theirs, ours in PLACES if name.startswith(theirs)), name)
