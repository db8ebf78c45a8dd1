"""Checkpoints in the layout of the original SCA code (arXiv 2312.00869).

A folder contains `config.json` with model_type "sca", and all tensors of SAM, the mixer and the language model in
`model.safetensors` or `pytorch_model.bin`, possibly sharded.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from sca_registry.errors import make_unknown_name_error
from sca_registry.spec import ModelSpec
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, SamVisionConfig
from transformers.initialization import no_init_weights

from sca.builder import build
from sca.checkpoints.layout import find_tokenizer_source
from sca.checkpoints.tensors import BuildSizeLimit, assign_tensors
from sca.checkpoints.trust import NO_TRUST, Trust, TrustError, confine_spec
from sca.io.errors import InputError
from sca.io.hub import fetch_model_folder
from sca.io.json import read_json
from sca.io.weight_files import find_weight_files, has_tokenizer, read_tensors, require_weight_files
from sca.language_models.causal import SPECIAL_TOKEN_FIELDS, CausalLanguageModel, TextTokenizer
from sca.language_models.hf import load_tokenizer
from sca.language_models.phi import split_fused_attention
from sca.model import SegmentCaptioner

TRAINED_OPTIONS = ("questions", "lengths")  # fields of a spec; the original implementation ignores them
MIXER_BY_ARCHITECTURE = {
    "ScaMultitaskV2Model": "query",
    "ScaMultitaskSplitMixerModel": "split",
}
FIXED_CONFIG = {  # values of all original SCA checkpoints for which the modules here have no option
    "hidden_act": "relu",
    "attention_downsample_rate": 2,
    "layer_norm_eps": 1e-6,
    "num_multimask_outputs": 3,
    "num_caption_heads": 1,
}
IGNORED_CONFIG_FIELDS = {  # fields that do not affect the model
    *("transformers_version", "_name_or_path", "architectures", "dtype", "initializer_range"),
    *("id2label", "label2id", "model_type"),
}
NAME_PREFIXES = (  # prefix of an original SCA tensor name, and of the native one
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


def load_published_checkpoint(folder: Path, trust: Trust = NO_TRUST) -> SegmentCaptioner:
    """Load the model of a folder in the original SCA layout, in eval mode.

    The tokenizer is that of the folder, else the one named in the configuration of the language model.

    Args:
        folder: Checkpoint folder.
        trust: What the caller allows.

    Returns:
        The model, in eval mode on the CPU.

    Raises:
        InputError: The folder cannot be read, tensors are missing, unexpected or of the wrong shape, or the checkpoint
            needs a permission that `trust` does not include.
    """
    spec = read_published_spec(folder, trust)
    with no_init_weights(), BuildSizeLimit(find_weight_files(folder) or [], spec):
        model = build(spec)
    tensors = {_to_native_name(name): tensor for name, tensor in read_checkpoint_tensors(folder).items()}
    causal_config: Any = cast("CausalLanguageModel", model.language_model).model.config
    if causal_config.model_type == "phi":
        try:
            tensors = split_fused_attention(tensors, causal_config)
        except ValueError as error:
            raise InputError(f"{folder}: {error}") from error
    model_tensors = model.state_dict()
    for name, model_tensor in model_tensors.items():
        if name not in tensors:  # original SCA files contain only one of several tied tensors
            tied_name = next(
                (
                    other
                    for other in tensors
                    if other in model_tensors and model_tensors[other].data_ptr() == model_tensor.data_ptr()
                ),
                None,
            )
            if tied_name:
                tensors[name] = tensors[tied_name]
    if "task_tokens" in tensors and tensors["task_tokens"].numel() == model_tensors["task_tokens"].numel():
        tensors["task_tokens"] = tensors["task_tokens"].view_as(model_tensors["task_tokens"])  # (2 K, E) -> (2, K, E)
    assign_tensors(model, tensors, set(model_tensors), folder, "config.json")
    model.language_model.tokenizer = _load_published_tokenizer(folder, trust)
    return model.eval()


def read_published_spec(folder: Path, trust: Trust = NO_TRUST) -> ModelSpec:
    """Read the spec of a folder in the original SCA layout, confined to what the caller allows.

    Args:
        folder: Checkpoint folder.
        trust: What the caller allows.

    Returns:
        The spec of the model.

    Raises:
        InputError: The configuration cannot be read, or needs a permission that `trust` does not include.
    """
    try:
        return confine_spec(parse_published_config(read_json(folder / "config.json"), folder), folder, trust)
    except TrustError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from error


def parse_published_config(config: Mapping[str, Any], folder: Path) -> ModelSpec:
    """Convert the content of an original SCA `config.json` to a spec.

    Args:
        config: Content of the file.
        folder: Checkpoint folder, for error messages and the generation config.

    Returns:
        The spec of the model.

    Raises:
        InputError: The configuration is not that of an original SCA model.
    """
    try:
        (architecture,) = config["architectures"]
        if architecture not in MIXER_BY_ARCHITECTURE:
            subject = f"unknown architecture {architecture!r}"
            raise InputError(f"{folder}: {make_unknown_name_error(subject, architecture, MIXER_BY_ARCHITECTURE)}")
        vision_config, prompt_encoder_config, decoder_config = (
            config[part] for part in ("vision_config", "prompt_encoder_config", "mask_caption_decoder_config")
        )
        for field, value in FIXED_CONFIG.items():
            if decoder_config.get(field, value) != value:
                raise InputError(f"{folder}: {field} is {decoder_config[field]!r}, but only {value!r} is supported")
        num_heads, mlp_dim = decoder_config["num_attention_heads"], decoder_config["mlp_dim"]
        return ModelSpec.from_dict(
            {
                "encoder": {
                    "name": "sam",
                    "config": {"vision_config": _select_non_defaults(SamVisionConfig(**vision_config))},
                },
                "segmenter": {
                    "name": "sam",
                    "depth": decoder_config["num_hidden_layers"],
                    "num_heads": num_heads,
                    "mlp_dim": mlp_dim,
                    "mask_input_channels": prompt_encoder_config["mask_input_channels"],
                    "iou_head_depth": decoder_config["iou_head_depth"],
                    "iou_head_hidden_size": decoder_config["iou_head_hidden_dim"],
                },
                "mixer": {
                    "name": MIXER_BY_ARCHITECTURE[architecture],
                    "num_queries": decoder_config["num_caption_tokens"],
                    "depth": decoder_config["additional_num_hidden_layers"],
                    "num_heads": num_heads,
                    "mlp_dim": mlp_dim,
                },
                "language_model": {"name": "hf", "config": read_language_model_config(config["text_config"], folder)},
                "task_tokens": config["num_task_tokens"],
                **{name: True for name in TRAINED_OPTIONS if config.get(name) is True},
            }
        )
    except InputError:
        raise
    except Exception as error:  # transformers raises various errors for unexpected values
        raise InputError(
            f"{folder / 'config.json'} is not the configuration of an original SCA model ({error!r})"
        ) from error


def read_language_model_config(text_config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Read the configuration of a language model.

    Args:
        text_config: Stored fields, including `model_type`.
        folder: Checkpoint folder, for the special tokens of the generation config.

    Returns:
        The fields that differ from their defaults, and the special tokens.
    """
    changed_fields = {
        "model_type": text_config["model_type"],
        **_select_non_defaults(AutoConfig.for_model(**text_config)),
    }
    try:
        special_tokens = read_json(folder / "generation_config.json")
    except FileNotFoundError:
        special_tokens = {}
    return changed_fields | {key: special_tokens[key] for key in SPECIAL_TOKEN_FIELDS if key in special_tokens}


def _select_non_defaults(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields that differ from the defaults, as JSON values."""
    fields, defaults = json.loads(config.to_json_string(use_diff=False)), type(config)().to_dict()
    names = fields.keys() & defaults.keys() - IGNORED_CONFIG_FIELDS
    return {key: fields[key] for key in sorted(names) if fields[key] != defaults[key]}


def _load_published_tokenizer(folder: Path, trust: Trust) -> TextTokenizer | None:
    try:
        source = find_tokenizer_source(folder, trust)
        return load_tokenizer(folder if source is None else fetch_model_folder(source, include_weights=False))
    except InputError as error:
        if has_tokenizer(folder):
            raise
        warnings.warn(
            f"{folder} has no tokenizer, so captions are lists of token ids without text ({error}); add tokenizer.json",
            stacklevel=3,
        )
        return None


def read_checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder.

    Args:
        folder: Checkpoint folder.

    Returns:
        Tensors by name.

    Raises:
        InputError: A file is missing, cannot be read, or contains more than tensors.
    """
    tensors: dict[str, Tensor] = {}
    for file in require_weight_files(folder, folder):
        try:
            tensors |= read_tensors(file)
        except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{file} cannot be read, or contains more than tensors ({reason})") from error
    return tensors


def _to_native_name(name: str) -> str:
    return next(
        (native + name.removeprefix(published) for published, native in NAME_PREFIXES if name.startswith(published)),
        name,
    )
