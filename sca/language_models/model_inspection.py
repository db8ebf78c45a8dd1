"""Capability checks of transformers' causal language models, which run a tiny model of the same configuration.

The prefix of a caption consists of embeddings. A model must therefore process embeddings like the token ids they come
from, be causal, compute its logits from the hidden states of one submodule, and generate from these logits. A model
that does not is rejected with the reason. Nothing depends on the name of the architecture.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from sca.io.errors import InputError
from sca.io.hub import silence_transformers
from sca.language_models.greedy_search import generate_greedy
from sca.language_models.kv_cache import make_buffered_cache
from sca.language_models.tiny_config import make_tiny_config

if TYPE_CHECKING:
    from transformers._typing import GenerativePreTrainedModel

PROBE_BATCH_SIZE, PROBE_LENGTH, PROBE_STEPS = 3, 7, 5
TOLERANCE_BY_DTYPE = {torch.float32: 1e-3, torch.float64: 1e-3}  # relative to the largest value
LOW_PRECISION_TOLERANCE = 0.05


class UnsupportedModelError(InputError):
    """Unsupported language model; the message continues a sentence whose subject is the model."""


@dataclass(frozen=True)
class ModelStructure:
    """Structure of a causal language model.

    Attributes:
        body_name: Name of the submodule that maps embeddings to hidden states.
        output_class: Class of the body's output.
        has_greedy_loop: Whether `generate_greedy` returns the same captions as the model's own `generate`.
    """

    body_name: str
    output_class: type[ModelOutput]
    has_greedy_loop: bool = False

    def compute_hidden_states(self, model: PreTrainedModel, embeddings: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the hidden states of the body: embeddings (N, L, E) and mask (N, L) -> (N, L, D)."""
        body = model.get_submodule(self.body_name)
        return body(inputs_embeds=embeddings, attention_mask=attention_mask, use_cache=False).last_hidden_state

    def compute_cached_states(self, model: PreTrainedModel, embeddings: Tensor, cache: Cache) -> Tensor:
        """Return the hidden states after those in a cache, which is extended: embeddings (N, L, E) -> (N, L, D)."""
        body = model.get_submodule(self.body_name)
        return body(inputs_embeds=embeddings, past_key_values=cache, use_cache=True).last_hidden_state

    def compute_logits(self, model: PreTrainedModel, states: Tensor) -> Tensor:
        """Return the logits of hidden states: (..., D) -> (..., V).

        The model's own forward runs with its body replaced by one that returns the states, so that scales, caps and
        layers before the output projection apply.
        """
        rows = states.reshape(1, states[..., 0].numel(), states.shape[-1])
        logits = type(model).forward(self.build_head(model), inputs_embeds=rows, use_cache=False).logits
        return logits.reshape(*states.shape[:-1], logits.shape[-1])

    def build_head(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return a copy of a model that shares its tensors and whose body returns `inputs_embeds` as hidden states."""
        return _replace_module(model, self.body_name.split("."), _PassThroughBody(self.output_class))


class _PassThroughBody(nn.Module):
    """Replacement of a body that returns its inputs as hidden states."""

    def __init__(self, output_class: type[ModelOutput]):
        super().__init__()
        self.output_class = output_class

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> ModelOutput:
        return self.output_class(last_hidden_state=inputs_embeds)


def _replace_module(module: Any, path: Sequence[str], replacement: nn.Module) -> Any:
    """Return a shallow copy of a module with one submodule replaced; both share all tensors."""
    if not path:
        return replacement
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    copied._modules[path[0]] = _replace_module(module.get_submodule(path[0]), path[1:], replacement)
    return copied


_structures: dict[tuple[type, str], ModelStructure] = {}


def inspect_model(model: PreTrainedModel) -> ModelStructure:
    """Check a causal language model and return its structure.

    The checks run on a tiny model of the same class and configuration with random weights (about 0.1 s, once per
    configuration). If it cannot be built or fails a check, they run on the model itself, unless it is on the meta
    device.

    Args:
        model: Model; it is not changed.

    Returns:
        The structure of the model.

    Raises:
        ValueError: The model does not accept embeddings, is not causal, or does not generate from its logits.
    """
    key = (type(model), model.config.to_json_string(use_diff=False))
    if key not in _structures:
        _structures[key] = _inspect_structure(model)
    return _structures[key]


def _inspect_structure(model: PreTrainedModel) -> ModelStructure:
    subject = f"the language model {model.config.model_type!r}"
    try:
        _check_signatures(model)
        try:
            with _preserve_random_state(), torch.device("cpu"):
                return _examine_model(_build_tiny_model(model))
        except Exception as error:  # third-party code, for sizes that the architecture does not support
            if model.device.type == "meta":
                raise UnsupportedModelError(_describe_error(error)) from error
        with _preserve_random_state():
            return _examine_model(model)
    except Exception as error:
        raise ValueError(f"{subject} {_describe_error(error)}; choose a decoder-only model") from error


def _describe_error(error: Exception) -> str:
    if isinstance(error, UnsupportedModelError):
        return str(error)
    return f"fails on embeddings ({type(error).__name__}: {' '.join(str(error).split())[:200]})"


@contextmanager
def _preserve_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), torch.no_grad(), silence_transformers():
        torch.default_generator.manual_seed(0)  # torch.manual_seed would also seed GPUs
        yield


def _check_signatures(model: PreTrainedModel) -> None:
    if "inputs_embeds" not in inspect.signature(type(model).forward).parameters:
        raise UnsupportedModelError("does not accept embeddings (inputs_embeds)")
    if not isinstance(model.get_input_embeddings(), nn.Embedding):
        raise UnsupportedModelError("has no token embeddings")
    if not model.can_generate():
        raise UnsupportedModelError("cannot generate")
    if (
        "inputs_embeds"
        not in inspect.signature(cast("GenerativePreTrainedModel", model).prepare_inputs_for_generation).parameters
    ):
        raise UnsupportedModelError("cannot generate from embeddings (inputs_embeds)")


def _build_tiny_model(model: PreTrainedModel) -> PreTrainedModel:
    """Build a tiny model of the same class and settings with random parameters large enough to affect the output."""
    tiny_model = type(model)(make_tiny_config(model.config)).float().eval()
    tiny_model.generation_config = GenerationConfig()
    for name, parameter in tiny_model.named_parameters():
        noise = torch.randn_like(parameter)
        is_scale = parameter.dim() < 2 and not name.endswith("bias")
        parameter.copy_(1 + 0.2 * noise if is_scale else 0.3 * noise)
    return tiny_model


def _examine_model(model: PreTrainedModel) -> ModelStructure:
    """Check a model in eval mode on a few tokens, and restore its mode."""
    training = model.training
    model.eval()
    try:
        return _examine_in_eval_mode(model)
    finally:
        model.train(training)


def _examine_in_eval_mode(model: PreTrainedModel) -> ModelStructure:
    tolerance = TOLERANCE_BY_DTYPE.get(model.dtype, LOW_PRECISION_TOLERANCE)
    input_ids = _sample_token_ids(model)
    input_ids[1, :-1] = input_ids[0, :-1]  # two sequences that differ in their last token
    attention_mask = torch.ones_like(input_ids)
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    if not logits.isfinite().all():
        raise UnsupportedModelError("predicts NaN or infinite logits")
    if _is_different(logits[0, :-1], logits[1, :-1], tolerance / 10):
        hint = "" if getattr(model.config, "is_decoder", True) else " (is_decoder is false in its configuration)"
        raise UnsupportedModelError(f"is not causal: its logits depend on later tokens{hint}")
    embeddings = model.get_input_embeddings()(input_ids)
    structure = _trace_body(model, embeddings, attention_mask)
    if _is_different(model(inputs_embeds=embeddings, attention_mask=attention_mask).logits, logits, tolerance):
        raise UnsupportedModelError("returns different logits for embeddings than for the same token ids")
    states = structure.compute_hidden_states(model, embeddings, attention_mask)
    if _is_different(structure.compute_logits(model, states), logits, tolerance):
        raise UnsupportedModelError(f"does not compute its logits from the states of its {structure.body_name!r} alone")
    attention_mask[2, -2:] = 0
    if _is_different(
        structure.compute_hidden_states(model, embeddings, attention_mask)[2, :-2], states[2, :-2], tolerance
    ):
        raise UnsupportedModelError("returns different hidden states when the input is right-padded")
    mixed_embeddings = (embeddings + embeddings.roll(1, 0)) / 2  # embeddings of no token
    return _examine_generation(model, structure, mixed_embeddings, tolerance)


def _examine_generation(
    model: PreTrainedModel, structure: ModelStructure, prefix: Tensor, tolerance: float
) -> ModelStructure:
    """Compare the model's own greedy `generate` with the logits without a cache, and `generate_greedy` with both."""
    generated: Any = cast("GenerativePreTrainedModel", model).generate(
        inputs_embeds=prefix,
        attention_mask=prefix.new_ones(prefix.shape[:2], dtype=torch.long),
        generation_config=GenerationConfig(
            max_new_tokens=PROBE_STEPS, pad_token_id=0, return_dict_in_generate=True, output_logits=True
        ),
    )
    sequences = generated.sequences[:, -PROBE_STEPS:]  # (N, T)
    inputs = torch.cat((prefix, model.get_input_embeddings()(sequences)), dim=1)
    states = structure.compute_hidden_states(
        model, inputs, torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
    )
    logits = structure.compute_logits(model, states[:, -PROBE_STEPS - 1 : -1])  # (N, T, V)
    if _is_different(torch.stack(generated.logits, dim=1), logits, tolerance):
        raise UnsupportedModelError("generates different logits with its cache than without")
    log_probs = logits.float().log_softmax(dim=2).gather(2, sequences[..., None])[..., 0]  # (N, T)
    return replace(
        structure, has_greedy_loop=_can_use_greedy_loop(model, structure, prefix, sequences, log_probs, tolerance)
    )


def _can_use_greedy_loop(
    model: PreTrainedModel, structure: ModelStructure, prefix: Tensor, ids: Tensor, log_probs: Tensor, tolerance: float
) -> bool:
    """Return whether `generate_greedy` reproduces ids (N, T) and log-probabilities (N, T) if a caption ends early."""
    end = _find_early_end_token(ids)
    if end is None:
        return False
    is_end = (ids == end).int()
    is_counted = is_end.cumsum(1) - is_end == 0
    try:
        sequences, scores = generate_greedy(
            partial(structure.compute_cached_states, model),
            model.get_input_embeddings(),
            partial(structure.compute_logits, model),
            make_buffered_cache(model.config, prefix.shape[1] + PROBE_STEPS),
            prefix,
            PROBE_STEPS,
            -1,
            [end],
        )
    except Exception:  # third-party code, for another kind of cache
        return False
    expected = (log_probs * is_counted).sum(1) / is_counted.sum(1)
    return torch.equal(sequences, ids.masked_fill(~is_counted, -1)) and not _is_different(
        scores, expected, 10 * tolerance
    )


def _find_early_end_token(ids: Tensor) -> int | None:
    """Find a token of ids (N, T) that ends some rows at least two steps before the others; None if none exists."""
    for step in range(PROBE_STEPS - 2):
        for token in ids[:, step].tolist():
            rows = (ids == token).any(dim=1)
            if not rows.all():
                return int(token)
    return None


def _trace_body(model: PreTrainedModel, embeddings: Tensor, attention_mask: Tensor) -> ModelStructure:
    """Find the outermost submodule that receives the embeddings, and the class of its output."""
    calls: list[tuple[str, type]] = []

    def record_call(name: str, _: nn.Module, __: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if kwargs.get("inputs_embeds") is embeddings:
            calls.append((name, type(output)))

    submodules = [(name, module) for name, module in model.named_modules() if name]
    hooks = [module.register_forward_hook(partial(record_call, name), with_kwargs=True) for name, module in submodules]
    try:
        model(inputs_embeds=embeddings, attention_mask=attention_mask)
    finally:
        for hook in hooks:
            hook.remove()
    if not calls or not hasattr(calls[-1][1], "last_hidden_state"):
        raise UnsupportedModelError("passes its embeddings to no submodule that returns hidden states")
    return ModelStructure(*calls[-1])  # the outermost returns last


def _sample_token_ids(model: PreTrainedModel) -> Tensor:
    """Sample random ids (N, L) of tokens that are not special."""
    config = model.config.get_text_config(decoder=True)
    fields = {name: value for name, value in config.to_dict().items() if name.endswith(("_token_id", "_token_index"))}
    special_ids = {token for value in fields.values() for token in (value if isinstance(value, list) else [value])}
    num_ids = min(cast("nn.Embedding", model.get_input_embeddings()).num_embeddings, 1000)
    ordinary_ids = torch.tensor([token for token in range(num_ids) if token not in special_ids], device=model.device)
    return ordinary_ids[
        torch.randint(len(ordinary_ids), (PROBE_BATCH_SIZE, PROBE_LENGTH), device="cpu").to(model.device)
    ]


def _is_different(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Return whether two tensors differ by more than `tolerance` times the largest expected value."""
    return not bool((actual - expected).abs().max() <= tolerance * expected.abs().max())
