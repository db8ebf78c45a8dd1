"""Conformance checks of language models."""

from __future__ import annotations

import math
from typing import Any

import torch
from sca_registry.contracts import GenerationOutput
from transformers import PreTrainedModel

from sca.testing.conformance.checks import DoesNotApply, register_check
from sca.testing.conformance.comparison import describe_difference, describe_shape_mismatch, format_names
from sca.testing.conformance.harnesses import LanguageModelHarness

MAX_NEW_TOKENS = 4
EXAMPLE_TEXTS = ("a small striped red circle left of a blue square", "car", "two words")


@register_check("language_models")
@torch.no_grad()
def output_shapes(harness: LanguageModelHarness) -> str | None:
    """`embed_tokens` returns (N, L, E), `hidden_states` the shape of its input, and `lm_head` (..., V).

    `lm_head` supports any leading shape.
    """
    component, inputs = harness.component, harness.make_inputs()
    num_texts, length = inputs.input_ids.shape
    embedded = component.embed_tokens(inputs.input_ids)
    problem = describe_shape_mismatch("embed_tokens(ids)", embedded, (num_texts, length, component.hidden_size))
    hidden_states = component.hidden_states(embedded, inputs.attention_mask)
    problem = problem or describe_shape_mismatch(
        "hidden_states(embeddings, mask)", hidden_states, (num_texts, length, component.hidden_size)
    )
    problem = problem or describe_shape_mismatch(
        "lm_head(states)", component.lm_head(hidden_states), (num_texts, length, harness.vocab_size)
    )
    problem = problem or describe_shape_mismatch(
        "lm_head(states[0, 0])", component.lm_head(hidden_states[0, 0]), (harness.vocab_size,)
    )
    return problem or describe_shape_mismatch(
        "embed_tokens of no ids", component.embed_tokens(inputs.input_ids[:, :0]), (num_texts, 0, component.hidden_size)
    )


@register_check("language_models")
@torch.no_grad()
def hidden_states_are_causal(harness: LanguageModelHarness) -> str | None:
    """A hidden state depends on its own and earlier tokens, and not on later ones."""
    component, inputs = harness.component, harness.select_rows(harness.make_inputs(), [0])
    hidden_states = component.hidden_states(component.embed_tokens(inputs.input_ids), inputs.attention_mask)
    changed_ids = inputs.input_ids.clone()
    changed_ids[:, -1] = (changed_ids[:, -1] + 1) % harness.vocab_size
    changed_states = component.hidden_states(component.embed_tokens(changed_ids), inputs.attention_mask)
    if torch.equal(hidden_states[:, -1], changed_states[:, -1]):
        return "the last hidden state does not depend on its own token"
    return describe_difference(
        {"hidden states before a changed token": hidden_states[:, :-1]},
        {"hidden states before a changed token": changed_states[:, :-1]},
    )


@register_check("language_models")
@torch.no_grad()
def logits_match_transformers(harness: LanguageModelHarness) -> str | None:
    """`lm_head(hidden_states(embed_tokens(ids)))` equals the logits of the wrapped transformers model."""
    models = [each for each in harness.build_module().children() if isinstance(each, PreTrainedModel)]
    if not models:
        raise DoesNotApply("the component has no transformers model as a child module")
    component, inputs = harness.component, harness.select_rows(harness.make_inputs(), [0])
    model = next(each for each in component.children() if isinstance(each, PreTrainedModel))
    expected = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits
    hidden_states = component.hidden_states(component.embed_tokens(inputs.input_ids), inputs.attention_mask)
    return describe_difference({"logits": expected}, {"logits": component.lm_head(hidden_states)})


@register_check("language_models")
@torch.no_grad()
def generates_new_tokens_only(harness: LanguageModelHarness) -> str | None:
    """`generate` returns sequences (N, R, T) without prefix, T at most `max_new_tokens`, and scores (N, R) <= 0."""
    inputs = harness.make_inputs()
    for max_new_tokens in (1, MAX_NEW_TOKENS):
        generation_output = harness.component.generate(inputs.prefix, max_new_tokens=max_new_tokens)
        if not isinstance(generation_output, GenerationOutput):
            return f"generate returns a {type(generation_output).__name__}, not a GenerationOutput"
        num_prefixes, num_captions, length = (
            generation_output.sequences.shape if generation_output.sequences.dim() == 3 else (0, 0, 0)
        )
        if num_prefixes != len(inputs.prefix) or not num_captions or not 1 <= length <= max_new_tokens:
            shape = tuple(generation_output.sequences.shape)
            return f"sequences of shape {shape} for {len(inputs.prefix)} prefixes and max_new_tokens={max_new_tokens}"
        if generation_output.scores.shape != (num_prefixes, num_captions) or not (generation_output.scores <= 0).all():
            return f"scores are {generation_output.scores.tolist()}"
        if not ((generation_output.sequences >= 0) & (generation_output.sequences < harness.vocab_size)).all():
            return f"token ids outside 0..{harness.vocab_size - 1}"
    return None


@register_check("language_models")
@torch.no_grad()
def default_generation_is_greedy(harness: LanguageModelHarness) -> str | None:
    """By default generation is greedy, and the score is the mean log-probability of the generated tokens.

    EOS is included in the mean; tokens after it are not.
    """
    component, inputs = harness.component, harness.make_inputs()
    eos_token_id = component.tokenizer.eos_token_id if component.tokenizer is not None else None
    generation_output = component.generate(inputs.prefix, max_new_tokens=MAX_NEW_TOKENS)
    for row, prefix in enumerate(inputs.prefix):
        embeddings = prefix[None]
        expected_ids: list[int] = []
        log_probs: list[float] = []
        while len(expected_ids) < MAX_NEW_TOKENS and (not expected_ids or expected_ids[-1] != eos_token_id):
            attention_mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
            logits = component.lm_head(component.hidden_states(embeddings, attention_mask))[0, -1]
            expected_ids.append(int(logits.argmax()))
            log_probs.append(float(logits.float().log_softmax(0)[expected_ids[-1]]))
            embeddings = torch.cat((embeddings, component.embed_tokens(torch.tensor([expected_ids[-1:]]))), dim=1)
        generated_ids = generation_output.sequences[row, 0].tolist()[: len(expected_ids)]
        score = float(generation_output.scores[row, 0])
        if eos_token_id is None:  # a model without a tokenizer may still end a caption early
            num_tokens = _count_before_padding(generated_ids, expected_ids)
            generated_ids, expected_ids = generated_ids[:num_tokens], expected_ids[:num_tokens]
            log_probs = log_probs[:num_tokens]
        if generated_ids != expected_ids:
            return f"token ids {generated_ids}, while greedy search selects {expected_ids}"
        if not math.isclose(score, sum(log_probs) / len(log_probs), rel_tol=1e-3, abs_tol=1e-3):
            return f"score {score:.4f}, while the mean log-probability is {sum(log_probs) / len(log_probs):.4f}"
    return None


def _count_before_padding(generated_ids: list[int], expected_ids: list[int]) -> int:
    """Return how many tokens come before padding: equal tokens up to the end that differ from the expected ones."""
    pairs = zip(generated_ids, expected_ids, strict=False)  # generation stops when every caption has ended
    first_difference = next((index for index, (token, expected) in enumerate(pairs) if token != expected), None)
    if not first_difference or len(set(generated_ids[first_difference:])) > 1:
        return len(generated_ids)
    return first_difference


@register_check("language_models")
def lora_preserves_outputs(harness: LanguageModelHarness) -> str | None:
    """`add_lora` adds trainable parameters named lora_, leaves the outputs unchanged, and freezes nothing."""
    component: Any = harness.build_module()
    inputs = harness.make_inputs()
    with torch.no_grad():
        initial_outputs = harness.compute_outputs(component, inputs)
    trainable = {id(parameter): name for name, parameter in component.named_parameters() if parameter.requires_grad}
    initial_parameters = {id(parameter) for parameter in component.parameters()}
    try:
        component.add_lora(rank=2, alpha=4, dropout=0.0, target_modules=None)
    except ValueError as error:
        raise DoesNotApply(f"add_lora raises: {error}") from error
    added = [
        (name, parameter) for name, parameter in component.named_parameters() if id(parameter) not in initial_parameters
    ]
    if not added or not all("lora_" in name and parameter.requires_grad for name, parameter in added):
        return f"added parameters: {format_names([name for name, _ in added]) or 'none'}"
    frozen = [trainable[id(p)] for p in component.parameters() if id(p) in trainable and not p.requires_grad]
    if frozen:
        return f"frozen by add_lora: {format_names(frozen)}"
    with torch.no_grad():
        return describe_difference(initial_outputs, harness.compute_outputs(component.eval(), inputs))


@register_check("language_models", source="sca_registry.contracts.Tokenizer")
def tokenizer_adds_only_eos(harness: LanguageModelHarness) -> str | None:
    """`encode` appends `eos_token_id` once and no BOS token; a token limit includes EOS."""
    tokenizer = _require_tokenizer(harness)
    if tokenizer.encode("") != [tokenizer.eos_token_id]:
        return f"an empty text is encoded as {tokenizer.encode('')}, not as EOS ({tokenizer.eos_token_id}) only"
    for text in EXAMPLE_TEXTS:
        ids = tokenizer.encode(text)
        if ids[-1] != tokenizer.eos_token_id or ids.count(tokenizer.eos_token_id) != 1:
            return f"{text!r} is encoded as {ids}; EOS is {tokenizer.eos_token_id}"
        if not all(isinstance(token, int) and 0 <= token < harness.vocab_size for token in ids):
            return f"{text!r} is encoded as {ids}; the vocabulary has {harness.vocab_size} tokens"
        truncated_ids = tokenizer.encode(text, 2)
        if (
            len(truncated_ids) > 2
            or truncated_ids[-1] != tokenizer.eos_token_id
            or truncated_ids[:-1] != ids[: len(truncated_ids) - 1]
        ):
            return f"{text!r} with max_length=2 is encoded as {truncated_ids}"
    return None


@register_check("language_models", source="sca_registry.contracts.Tokenizer")
def tokenizer_round_trip(harness: LanguageModelHarness) -> str | None:
    """`decode` restores the encoded text and stops at the first `eos_token_id`."""
    tokenizer = _require_tokenizer(harness)
    for text in EXAMPLE_TEXTS:
        ids = tokenizer.encode(text)
        for padded_ids in (ids, [*ids, tokenizer.pad_token_id], [*ids, ids[0], tokenizer.pad_token_id]):
            if tokenizer.decode(padded_ids) != text:
                return f"{text!r} is decoded as {tokenizer.decode(padded_ids)!r}"
    return None


def _require_tokenizer(harness: LanguageModelHarness) -> Any:
    if harness.component.tokenizer is None:
        raise DoesNotApply("the component has no tokenizer")
    return harness.component.tokenizer
