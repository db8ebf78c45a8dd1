"""Promises of language models."""

from __future__ import annotations

import math
from typing import Any

import torch
from sca_registry.contracts import GenerationOutput
from transformers import PreTrainedModel

from sca.testing.conformance.comparison import different, listed, misshapen
from sca.testing.conformance.promises import DoesNotApply, promise
from sca.testing.conformance.trials import LanguageModelTrial

NEW_TOKENS = 4
TEXTS = ("a small striped red circle left of a blue square", "car", "two words")


@promise("language_models")
@torch.no_grad()
def states_and_logits_shape(trial: LanguageModelTrial) -> str | None:
    """`embed` gives (N, L, E), `hidden` the shape of what it is given, and `head` (..., V) for any leading shape."""
    part, text = trial.part, trial.inputs()
    count, length = text.ids.shape
    embedded = part.embed(text.ids)
    problem = misshapen("embed(ids)", embedded, (count, length, part.width))
    states = part.hidden(embedded, text.mask)
    problem = problem or misshapen("hidden(embeddings, mask)", states, (count, length, part.width))
    problem = problem or misshapen("head(states)", part.head(states), (count, length, trial.vocabulary))
    problem = problem or misshapen("head(states[0, 0])", part.head(states[0, 0]), (trial.vocabulary,))
    return problem or misshapen("embed of no ids", part.embed(text.ids[:, :0]), (count, 0, part.width))


@promise("language_models")
@torch.no_grad()
def later_words_are_unseen(trial: LanguageModelTrial) -> str | None:
    """A state depends on what stands before it and on nothing after."""
    part, text = trial.part, trial.take(trial.inputs(), [0])
    states = part.hidden(part.embed(text.ids), text.mask)
    changed = text.ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % trial.vocabulary
    again = part.hidden(part.embed(changed), text.mask)
    if torch.equal(states[:, -1], again[:, -1]):
        return "the last state does not depend on its own word"
    return different({"states before a changed word": states[:, :-1]}, {"states before a changed word": again[:, :-1]})


@promise("language_models")
@torch.no_grad()
def agrees_with_transformers(trial: LanguageModelTrial) -> str | None:
    """`head(hidden(embed(ids)))` are the logits of the transformers model inside."""
    models = [each for each in trial.module().children() if isinstance(each, PreTrainedModel)]
    if not models:
        raise DoesNotApply("there is no transformers model directly inside")
    part, text = trial.part, trial.take(trial.inputs(), [0])
    model = next(each for each in part.children() if isinstance(each, PreTrainedModel))
    expected = model(input_ids=text.ids, attention_mask=text.mask).logits
    return different({"logits": expected}, {"logits": part.head(part.hidden(part.embed(text.ids), text.mask))})


@promise("language_models")
@torch.no_grad()
def generates_new_words_only(trial: LanguageModelTrial) -> str | None:
    """`generate` gives ids (N, R, T) without the prefix, T at most `max_new_tokens`, and scores (N, R) up to 0."""
    text = trial.inputs()
    for most in (1, NEW_TOKENS):
        found = trial.part.generate(text.prefix, max_new_tokens=most)
        if not isinstance(found, GenerationOutput):
            return f"a {type(found).__name__} and not a Generated"
        count, captions, length = found.sequences.shape if found.sequences.dim() == 3 else (0, 0, 0)
        if count != len(text.prefix) or not captions or not 1 <= length <= most:
            return f"ids {tuple(found.sequences.shape)} for {len(text.prefix)} prefixes and {most} new tokens"
        if found.scores.shape != (count, captions) or not (found.scores <= 0).all():
            return f"scores {found.scores.tolist()}"
        if not ((found.sequences >= 0) & (found.sequences < trial.vocabulary)).all():
            return f"ids outside 0..{trial.vocabulary - 1}"
    return None


@promise("language_models")
@torch.no_grad()
def generates_the_likeliest_word(trial: LanguageModelTrial) -> str | None:
    """By default each word is the likeliest after the prefix and the words before; the score is their mean log-share.

    The end counts as a word, and what stands after it does not.
    """
    part, text = trial.part, trial.inputs()
    end = part.tokenizer.eos if part.tokenizer is not None else None
    found = part.generate(text.prefix, max_new_tokens=NEW_TOKENS)
    for row, prefix in enumerate(text.prefix):
        seen, words, logs = prefix[None], [], []
        while len(words) < NEW_TOKENS and (not words or words[-1] != end):
            logits = part.head(part.hidden(seen, torch.ones(seen.shape[:2], dtype=torch.long)))[0, -1]
            words.append(int(logits.argmax()))
            logs.append(float(logits.float().log_softmax(0)[words[-1]]))
            seen = torch.cat((seen, part.embed(torch.tensor([words[-1:]]))), dim=1)
        given, score = found.ids[row, 0].tolist()[: len(words)], float(found.scores[row, 0])
        if given != words:
            return f"ids {given} where {words} are the likeliest"
        if not math.isclose(score, sum(logs) / len(logs), rel_tol=1e-3, abs_tol=1e-3):
            return f"a score of {score:.4f} where the mean log-probability is {sum(logs) / len(logs):.4f}"
    return None


@promise("language_models")
def adapts_gently(trial: LanguageModelTrial) -> str | None:
    """`adapt` adds parameters named lora_ that train, changes no output at first, and freezes nothing."""
    part = trial.module()
    inputs = trial.inputs()
    with torch.no_grad():
        before = trial.outputs(part, inputs)
    trained = {id(parameter): name for name, parameter in part.named_parameters() if parameter.requires_grad}
    old = {id(parameter) for parameter in part.parameters()}
    try:
        part.adapt(rank=2, alpha=4, dropout=0.0, targets=None)
    except ValueError as error:
        raise DoesNotApply(f"it says: {error}") from error
    added = [(name, parameter) for name, parameter in part.named_parameters() if id(parameter) not in old]
    if not added or not all("lora_" in name and parameter.requires_grad for name, parameter in added):
        return f"added: {listed([name for name, _ in added])}"
    frozen = [trained[id(p)] for p in part.parameters() if id(p) in trained and not p.requires_grad]
    if frozen:
        return f"no longer trains: {listed(frozen)}"
    with torch.no_grad():
        return different(before, trial.outputs(part.eval(), inputs))


@promise("language_models", written="sca_registry.contracts.Tokenizer")
def words_end_and_do_not_begin(trial: LanguageModelTrial) -> str | None:
    """`encode` ends with `eos`, once, and adds no beginning; with a limit the end is kept and counted."""
    tokenizer = _tokenizer(trial)
    if tokenizer.encode("") != [tokenizer.eos]:
        return f"no text is {tokenizer.encode('')}, and the end is {tokenizer.eos}"
    for text in TEXTS:
        ids = tokenizer.encode(text)
        if ids[-1] != tokenizer.eos or ids.count(tokenizer.eos) != 1:
            return f"{text!r} is {ids}, and the end is {tokenizer.eos}"
        if not all(isinstance(word, int) and 0 <= word < trial.vocabulary for word in ids):
            return f"{text!r} is {ids}, in a vocabulary of {trial.vocabulary}"
        short = tokenizer.encode(text, 2)
        if len(short) > 2 or short[-1] != tokenizer.eos or short[:-1] != ids[: len(short) - 1]:
            return f"{text!r} with a limit of 2 is {short}"
    return None


@promise("language_models", written="sca_registry.contracts.Tokenizer")
def words_come_back(trial: LanguageModelTrial) -> str | None:
    """`decode` gives the text that was encoded, and ends at the first `eos` whatever follows."""
    tokenizer = _tokenizer(trial)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        for given in (ids, [*ids, tokenizer.pad], [*ids, ids[0], tokenizer.pad]):
            if tokenizer.decode(given) != text:
                return f"{text!r} comes back as {tokenizer.decode(given)!r}"
    return None


def _tokenizer(trial: LanguageModelTrial) -> Any:
    if trial.part.tokenizer is None:
        raise DoesNotApply("it has no tokenizer")
    return trial.part.tokenizer
