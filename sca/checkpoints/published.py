"""Checkpoints in the layout of the published system (SCA, arXiv 2312.00869): read as they are, and written back.

A folder holds `config.json` with model_type "sca" and all tensors of SAM, the mixer and the language model, in
`model.safetensors` or `pytorch_model.bin`, in one piece or in shards.
"""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from sca_registry import registry
from sca_registry.messages import unknown
from sca_registry.spec import ModelSpec, Part
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, SamVisionConfig
from transformers.initialization import no_init_weights

from sca.checkpoints.layout import CheckpointError, has_tokenizer, tokenizer_source
from sca.checkpoints.native import BoundedBuild, assign, stored
from sca.checkpoints.trust import NO_TRUST, Trust, TrustError, confine_spec
from sca.composition import build
from sca.io.atomic import new_folder
from sca.io.hub import SAFE, HubError, fetch, quiet, read_tensors, require_weight_files, some, weight_files
from sca.io.json import read_json
from sca.language_models.causal import TextTokenizer
from sca.language_models.hf import read_tokenizer
from sca.language_models.phi import split_fused_attention

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
NOTES = {  # what a configuration says that makes no difference to the model
    *("transformers_version", "_name_or_path", "architectures", "dtype", "initializer_range"),
    *("id2label", "label2id", "model_type"),
}
USES = {"segmenter": ("drawn",), "language_model": ("dtype", "eos", "tokenizer", "checkpointing")}
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
    """The model of a published folder. Every tensor has its place and every place its tensor, or CheckpointError names
    them. Its language model has the tokenizer that lies in the folder, or else that of the name in its configuration.
    """
    try:
        spec = confine_spec(read_spec(read_json(folder / "config.json"), folder), folder, trust)
    except TrustError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    with no_init_weights(), BoundedBuild(weight_files(folder) or [], spec):
        model = build(spec)
    tensors = {_ours(name): tensor for name, tensor in _tensors(folder).items()}
    causal = model.language_model.model.config
    if causal.model_type == "phi":
        try:
            tensors = split_fused_attention(tensors, causal)
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from error
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
            if decoder.get(figure, value) != value:
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
    except CheckpointError:
        raise
    except Exception as error:  # whatever transformers raises over figures that it does not expect
        raise CheckpointError(f"{folder / 'config.json'} is not that of a published model ({error!r})") from error


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
    except (HubError, TrustError) as error:
        if has_tokenizer(folder):
            raise
        warnings.warn(f"captions of {folder} are ids only: it has no tokenizer, and {error}", stacklevel=3)
        return None


def _tensors(folder: Path) -> dict[str, Tensor]:
    try:
        files = require_weight_files(folder, folder)
    except HubError as error:
        raise CheckpointError(str(error)) from error
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= read_tensors(file)
        except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{file} cannot be read, or holds more than tensors ({reason})") from error
    return tensors


def _ours(name: str) -> str:
    return next((ours + name.removeprefix(theirs) for theirs, ours in PLACES if name.startswith(theirs)), name)


# --- written back -----------------------------------------------------------------------------------------------------


def write_published(model: SegmentCaptioner, folder: Path) -> Path:
    """A folder in the published layout, with the tensors of the model bit by bit; it must not be there, or be empty.

    Raises CheckpointError for a model that this layout has no place for, and for a folder that cannot be written.
    """
    problem = _unpublishable(model)
    if problem:
        raise CheckpointError(f"the published layout has no place for {problem}")
    tensors: dict[str, Tensor] = {}
    written = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in written:  # of tied tensors one is enough
            written.add(tensor.data_ptr())
            tensors[_theirs(name)] = (tensor.flatten(0, 1) if name == "task_tokens" else tensor).contiguous()
    causal = model.language_model.model
    with new_folder(folder) as draft:
        save_file(tensors, draft / SAFE, metadata={"format": "pt"})
        (draft / "config.json").write_text(json.dumps(_config(model), indent=2) + "\n", "utf-8")
        ends = {key: getattr(causal.generation_config, key) for key in ENDS}
        (draft / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n", "utf-8")
        if model.language_model.tokenizer is not None:
            model.language_model.tokenizer.save(str(draft))
    return folder


def write_language_model(model: SegmentCaptioner, folder: Path) -> Path:
    """The language model by itself, with its LoRA merged into the weights, as transformers saves one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    causal = copy.deepcopy(model.language_model.model)
    adapted = [(name, module) for name, module in causal.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapted:
        module.merge()
        parent, _, last = name.rpartition(".")
        setattr(causal.get_submodule(parent), last, module.get_base_layer())
    with new_folder(folder) as draft, quiet():
        causal.save_pretrained(draft)
        if model.language_model.tokenizer is not None:
            model.language_model.tokenizer.save(str(draft))
    return folder


def with_sources(model: SegmentCaptioner, **parts: Part) -> SegmentCaptioner:
    """The same model with parts that have a source of their own, which a checkpoint then refers to by name: `encoder`
    (SAM's heads come with it) and `language_model`.

    Raises CheckpointError if the source's weights are not those of the model, naming the first that differ.
    """
    changes = {kind: Part(part.name, _kept(model.spec, kind) | dict(part.options)) for kind, part in parts.items()}
    if "encoder" in parts:
        changes["segmenter"] = Part("sam", _kept(model.spec, "segmenter"))
    other = build(replace(model.spec, **changes))
    mine, theirs = model.state_dict(), other.state_dict()
    sourced = theirs.keys() - stored(other)
    differing = sorted(name for name in sourced if name not in mine or not torch.equal(mine[name], theirs[name]))
    if differing:
        raise CheckpointError(
            f"the weights of {' and '.join(part.name for part in parts.values())} are others than the model's: "
            f"{some(differing)}"
        )
    other.load_state_dict(mine)
    other.language_model.tokenizer = other.language_model.tokenizer or model.language_model.tokenizer
    return other.eval()


def _kept(spec: ModelSpec, kind: str) -> dict[str, Any]:
    """The options of a part that say how it is used rather than what it is made of."""
    part = getattr(spec, kind)
    return {name: part.options[name] for name in USES.get(kind, ()) if part is not None and name in part.options}


def _unpublishable(model: SegmentCaptioner) -> str | None:
    spec = model.spec
    if spec.mixer.name not in MIXERS.values():
        return f"the mixer {spec.mixer.name!r}: it knows {' and '.join(MIXERS.values())}"
    if spec.projection != {"kind": "linear", "norm": "none"}:
        return f"a projection {dict(spec.projection)}: it knows linear, without a norm"
    if spec.lora:
        return "LoRA: write the language model by itself (layout lm), which merges it"
    foreign = [name for name in model.state_dict() if _theirs(name) == name and name != "task_tokens"]
    if foreign:
        return f"tensors such as {foreign[0]}: it knows SAM, the mixer and the language model"
    if model.segmenter.drawn:
        return "prompts that are drawn into the image (segmenter.drawn)"
    sam, layer = model.segmenter.decoder.config, model.mixer.transformer.layers[0]
    shared = {"heads": (layer.self_attn.num_attention_heads, sam.num_attention_heads)}
    shared["mlp"] = (layer.mlp.lin1.out_features, sam.mlp_dim)
    for figure, (mine, theirs) in shared.items():
        if mine != theirs:
            return f"a mixer with {figure}={mine} beside a segmenter with {figure}={theirs}: it has one figure for both"
    return None


def _config(model: SegmentCaptioner) -> dict[str, Any]:
    decoder, prompts = model.segmenter.decoder.config, model.segmenter.prompt_encoder
    size, grid, mixer = model.segmenter.size, model.segmenter.grid, model.mixer
    return {
        "architectures": [next(name for name, ours in MIXERS.items() if ours == model.spec.mixer.name)],
        "model_type": "sca",
        "num_task_tokens": model.task_tokens.shape[1],
        "use_decoder_only_language_model": True,
        "vl_projector_type": "linear",
        "vl_projector_norm_type": "none",
        "vision_config": model.encoder.vision.config.to_dict(),
        "prompt_encoder_config": {
            "hidden_size": model.segmenter.channels,
            "image_size": size,
            "patch_size": size // grid,
            "image_embedding_size": grid,
            "mask_input_channels": prompts.mask_embed.conv2.out_channels,
            "num_point_embeddings": len(prompts.point_embed),
        },
        "mask_caption_decoder_config": FIXED
        | {
            "hidden_size": decoder.hidden_size,
            "num_hidden_layers": decoder.num_hidden_layers,
            "num_attention_heads": decoder.num_attention_heads,
            "mlp_dim": decoder.mlp_dim,
            "iou_head_depth": decoder.iou_head_depth,
            "iou_head_hidden_dim": decoder.iou_head_hidden_dim,
            "additional_num_hidden_layers": len(mixer.transformer.layers),
            "num_caption_tokens": mixer.queries,
        },
        "text_config": {"_name_or_path": _source(model), **model.language_model.model.config.to_dict()},
    }


def _source(model: SegmentCaptioner) -> str:
    return model.spec.language_model.options.get("weights") or registry("language_model").card(
        model.spec.language_model.name
    ).options.get("weights", "")


def _theirs(name: str) -> str:
    places = sorted(PLACES, key=lambda place: -len(place[1]))  # the most particular first
    return next((theirs + name.removeprefix(ours) for theirs, ours in places if name.startswith(ours)), name)
