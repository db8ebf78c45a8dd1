"""Judges of captions: language models and servers that choose an option of a question by its letter.

A language model of the registry scores every letter by its likelihood after the question, so that its judgment depends
on nothing random. A server returns a text that contains a letter.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import takewhile
from string import ascii_uppercase, punctuation, whitespace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from sca_registry import language_models
from sca_registry.contracts import LanguageModel
from sca_registry.options import check_options
from sca_registry.spec import ComponentSpec
from torch import Tensor

from sca.captioners.chat_captioner import MAX_COMPLETION_TOKENS, check_extra_body
from sca.captioners.chat_client import ChatClient, ChatCompletion, ChatServerError, get_response_cache_folder
from sca.devices import resolve_device
from sca.evaluation.records import normalize_text
from sca.io.errors import InputError
from sca.io.validation import check_range
from sca.io.weight_files import hash_tensors
from sca.model import check_finite_scores

SERVER_NAME = "openai"  # name of the judge on a server, as of the captioner
ANSWER_MARK = "Answer:"  # last line of a question for a language model without a chat template
MAX_ANSWER_TOKENS = 16
PUNCTUATION = punctuation.replace("\\", "") + whitespace
MAX_UNANSWERED_FRACTION = 0.5  # of the responses of a server, beyond which a judge is unusable
START_OF_REASONING, END_OF_REASONING = "<think>", "</think>"
LETTER = r"(?:\\(?:boxed\{|text\{|[(\[])|[^\w\\])*\b([A-Za-z])"  # "B", "(B", "**B" or "\boxed{B"
END_OF_LETTER = (  # the word "A" continues with another word instead
    r"(?!\W+(?:(?:and|or)\b\W*)[A-Za-z]\b)(?!\s*[,/]\s*[A-Za-z]\b)"  # several letters are no answer
    r"(?:[\W_]*$|[ \t]*[\r\n]|[*`\"\])}]|[,:;]|\.(?![A-Za-z]\.)|\s+[-\u2013\u2014]\s|\s+(?=(?:The|This|It|There)\b)"
    r"|\s+is\s+(?:the\s+)?(?:correct|right|best)\b)"
)
ANSWER_PREFIX = r"(?i:(?:the\s+)?(?:correct\s+|final\s+|best\s+)?(?:answer|option)(?:\s+is)?\b)"
FIRST_LETTER_PATTERN = re.compile(rf"(?:{ANSWER_PREFIX})?{LETTER}{END_OF_LETTER}")
FINAL_LETTER_PATTERN = re.compile(rf"\b{ANSWER_PREFIX}{LETTER}[\W_]*$")
STATED_LETTER_PATTERN = re.compile(rf"\b(?i:answer(?:\s+is)?\b){LETTER}{END_OF_LETTER}")


class JudgePrompt(NamedTuple):
    """Question for a judge.

    Attributes:
        text: Instruction, caption, question and options.
        options: Texts of the options in the order of their letters.
    """

    text: str
    options: Sequence[str]


class Judge(Protocol):
    """Judge that chooses options.

    Attributes:
        description: Name and version for evaluation results: scores are comparable if it is the same.
        details: Further facts for evaluation results, such as the URL of a server.
    """

    description: str
    details: Mapping[str, Any]

    def compute_probabilities(self, prompts: Sequence[JudgePrompt]) -> list[np.ndarray]:
        """Return the (K,) probabilities of the K options of each prompt: all 0 if the judge chose none."""


def build_judge(text: str, device: str = "cpu", batch_size: int = 8) -> Judge:
    """Build a judge by name.

    Args:
        text: "NAME [key=value]...": a language model of the registry and its options, or "openai" and those of
            `ServerJudge`.
        device: Device of a language model.
        batch_size: Sequences per batch of a language model.

    Returns:
        The judge.

    Raises:
        RegistryError: The name or an option is unknown, or `batch_size` is below 1.
        InputError: A language model has no tokenizer or no pretrained weights, or a server has no URL.
    """
    check_range("batch_size", batch_size, int, 1)
    component = ComponentSpec.parse(text, "the judge", "language_models")
    if component.name != SERVER_NAME:
        return LanguageModelJudge(component, device, batch_size)
    component = ComponentSpec.parse(text, "the judge", "captioners")
    check_options(f"the judge {SERVER_NAME!r}", ServerJudge, 0, component.options)
    return ServerJudge(**component.options)


class LanguageModelJudge:
    """Language model that judges by the likelihood of the letters of the options.

    The log-probabilities of the tokens of a letter are summed, and the sums are normalized over the options. The
    letters are encoded together with the prompt, because a tokenizer can merge characters across the boundary. With a
    chat template, the prompt is a turn of the user.

    Args:
        component: Name and options of a registered language model.
        device: A torch device.
        batch_size: Sequences per batch.

    Raises:
        InputError: The language model has no tokenizer, or no pretrained weights.
    """

    def __init__(self, component: ComponentSpec, device: str = "cpu", batch_size: int = 8):
        self.name: str = component.name
        self.device: torch.device = resolve_device(device)
        self.batch_size = batch_size
        self.language_model: LanguageModel = language_models.build(component.name, **component.options)
        if self.language_model.tokenizer is None:
            raise InputError(f"the judge {self.name!r} has no tokenizer; set tokenizer=FOLDER, or use another one")
        if not getattr(self.language_model, "checkpoint", None):
            raise InputError(f"the judge {self.name!r} has random weights; use a pretrained one, such as phi-4-mini")
        self._module.eval().to(self.device)
        self.description: str = f"{self.name} with weights {hash_tensors(self._module.state_dict())[:12]}"
        self.details: Mapping[str, Any] = {}

    @property
    def _module(self) -> torch.nn.Module:
        assert isinstance(self.language_model, torch.nn.Module)
        return self.language_model

    @torch.inference_mode()
    def compute_probabilities(self, prompts: Sequence[JudgePrompt]) -> list[np.ndarray]:
        """Compute the probabilities of the options of each prompt, see `Judge`.

        Args:
            prompts: Prompts.

        Returns:
            The (K,) probabilities of the K options of each prompt.

        Raises:
            InputError: A prompt is longer than the positions of the language model.
            ValueError: The language model returns NaN or infinite values.
        """
        continuations = [self._encode_options(prompt) for prompt in prompts]
        rows: dict[tuple[int, ...], None] = {}  # inputs of the language model, each once
        for sequences, _ in continuations:
            rows |= dict.fromkeys(sequence[:-1] for sequence in sequences)
        targets: dict[tuple[int, ...], set[tuple[int, int]]] = {row: set() for row in rows}  # (position, token id)
        for sequences, start in continuations:
            for sequence in sequences:
                targets[sequence[:-1]] |= {(index - 1, sequence[index]) for index in range(start, len(sequence))}
        log_probs = self._compute_log_probs({row: sorted(each) for row, each in targets.items()})
        probabilities = []
        for sequences, start in continuations:
            sums = [
                torch.stack([log_probs[each[:-1]][index - 1, each[index]] for index in range(start, len(each))]).sum()
                for each in sequences
            ]
            probabilities.append(torch.stack(sums).softmax(0).numpy())
        return probabilities

    def _encode_options(self, prompt: JudgePrompt) -> tuple[list[tuple[int, ...]], int]:
        """Return the token ids of the prompt with each letter, and the number of tokens before the letters differ."""
        tokenizer = self.language_model.tokenizer
        assert tokenizer is not None
        format_question = getattr(tokenizer, "format_question", None)
        text = "".join(("", prompt.text) if format_question is None else format_question(prompt.text))
        text += f"\n{ANSWER_MARK} " if text == prompt.text else ""
        letters = ascii_uppercase[: len(prompt.options)]
        sequences = [tuple(tokenizer.encode(text + letter)[:-1]) for letter in letters]  # without EOS
        num_equal = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*sequences, strict=False)))
        start = min(num_equal, *(len(each) - 1 for each in sequences))
        max_positions = getattr(self.language_model, "max_positions", None)
        longest = max(map(len, sequences))
        if max_positions is not None and longest > max_positions + 1:
            raise InputError(
                f"the judge {self.name!r} reads at most {max_positions:,} tokens, and a question has {longest:,}; use "
                "a judge with a longer context"
            )
        return sequences, start

    def _compute_log_probs(
        self, targets: Mapping[tuple[int, ...], Sequence[tuple[int, int]]]
    ) -> dict[tuple[int, ...], dict[tuple[int, int], Tensor]]:
        """Compute log-probabilities of tokens.

        Args:
            targets: Inputs -> positions whose states predict the tokens, and the token ids.

        Returns:
            Inputs -> (position, token id) -> log-probability in float64.
        """
        ordered = sorted(targets, key=lambda row: (len(row), row))
        log_probs: dict[tuple[int, ...], dict[tuple[int, int], Tensor]] = {}
        for begin in range(0, len(ordered), self.batch_size):
            batch = ordered[begin : begin + self.batch_size]
            length = max(map(len, batch))
            ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in batch], device=self.device)
            mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in batch], device=self.device)
            states = self.language_model.hidden_states(self.language_model.embed_tokens(ids), mask)  # (n, L, E)
            for row, row_states in zip(batch, states, strict=True):
                positions = sorted({position for position, _ in targets[row]})
                logits = self.language_model.lm_head(row_states[positions])  # (positions, V)
                check_finite_scores(logits, f"the judge {self.name!r}")
                row_log_probs = logits.double().log_softmax(-1).cpu()
                index = {position: number for number, position in enumerate(positions)}
                log_probs[row] = {
                    (position, token): row_log_probs[index[position], token] for position, token in targets[row]
                }
        return log_probs


class ServerJudge:
    """Judge on an OpenAI-compatible server, which returns the letter of an option.

    Only the arguments of a process and its environment set the URL and the key, see `sca.captioners.chat_client`. The
    temperature is 0; responses are cached by the server, the model and the request.

    Args:
        url: Base URL, such as "http://localhost:8000/v1". Defaults to the environment variable `OPENAI_BASE_URL`.
        model: Name of the model on the server; None for its only one.
        max_concurrency: Maximum number of concurrent requests.
        timeout: Maximum seconds per attempt.
        max_retries: Maximum retries after failures that may be temporary.
        cache: Use the cache.
        extra_body: Further fields of the request. `max_completion_tokens` replaces the field `max_tokens`.

    Raises:
        InputError: There is no URL, it is invalid, or the server does not return its only model.
        RegistryError: An option is out of range.
    """

    def __init__(
        self,
        url: str | None = None,
        model: str | None = None,
        max_concurrency: int = 8,
        timeout: float = 60.0,
        max_retries: int = 5,
        cache: bool = True,
        extra_body: Mapping[str, Any] | None = None,
    ):
        self.extra_body: dict[str, Any] = check_extra_body(extra_body)
        self.client: ChatClient = ChatClient(
            url, timeout, max_retries, max_concurrency, get_response_cache_folder() if cache else None
        )
        try:
            self.model_name: str = model or self.client.find_model()
        except ChatServerError as error:
            raise InputError(str(error)) from error
        fields = json.dumps(self.extra_body, sort_keys=True)
        digest = f" with extra_body {hashlib.sha256(fields.encode()).hexdigest()[:12]}" if self.extra_body else ""
        self.description: str = f"{self.model_name} on a server{digest}"
        self.details: Mapping[str, Any] = {"url": self.client.url, "extra_body": self.extra_body}

    def compute_probabilities(self, prompts: Sequence[JudgePrompt]) -> list[np.ndarray]:
        """Request the answers to all prompts, several at a time, see `Judge`.

        Args:
            prompts: Prompts.

        Returns:
            The (K,) probabilities of the K options of each prompt: 1 for the chosen one, and 0 for the others.

        Raises:
            InputError: The server rejects a request, all attempts failed, or most responses choose no option, as those
                of a model that reasons longer than the token limit.
        """
        is_random = bool(self.extra_body.get("temperature", 0))
        try:
            completions = self.client.request_completions(
                [partial(self._make_body, prompt.text) for prompt in prompts], use_cache=not is_random
            )
        except ChatServerError as error:
            raise InputError(str(error)) from error
        choices = [
            parse_answer(completion.text, prompt.options, completion.is_truncated)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        self._check_choices(choices, completions)
        return [
            np.array([float(index == choice) for index in range(len(prompt.options))])
            for prompt, choice in zip(prompts, choices, strict=True)
        ]

    def _check_choices(self, choices: Sequence[int | None], completions: Sequence[ChatCompletion]) -> None:
        """Raise InputError if most completions choose no option."""
        unanswered = [completion for choice, completion in zip(choices, completions, strict=True) if choice is None]
        if len(unanswered) <= MAX_UNANSWERED_FRACTION * len(choices):
            return
        fix = "use a model that responds with the letter of an option"
        if any(each.is_truncated or START_OF_REASONING in each.text for each in unanswered):
            fix = (
                f'set extra_body={{reasoning_effort="none"}}, or extra_body={{{MAX_COMPLETION_TOKENS}=N}} with enough '
                "tokens for the reasoning"
            )
        raise InputError(
            f"the judge {self.model_name!r} chose no option in {len(unanswered)} of {len(choices)} responses, such as "
            f"{' '.join(unanswered[0].text.split())!r:.60}; {fix}"
        )

    def _make_body(self, text: str) -> dict[str, Any]:
        fields: dict[str, Any] = {"model": self.model_name, "temperature": 0}
        if MAX_COMPLETION_TOKENS not in self.extra_body:
            fields["max_tokens"] = MAX_ANSWER_TOKENS
        return {**fields, **self.extra_body, "messages": [{"role": "user", "content": text}]}


def parse_answer(text: str, options: Sequence[str], is_truncated: bool = False) -> int | None:
    """Return the index of the option that a text chooses.

    A letter alone, before punctuation or a line break, or after "answer" or "option" is a choice, and so is the text of
    an option if the text contains that of no other option.

    Args:
        text: Such as "B", "(b)", "B. The color is not mentioned.", "The answer is B.", or the text of an option.
        options: Texts of the options in the order of their letters.
        is_truncated: Whether the text ended at the token limit. Only a letter at its start is then a choice.

    Returns:
        The index; None if the text chooses no option, or if it ends within its reasoning.
    """
    answer = text.rpartition(END_OF_REASONING)[2].strip()
    if START_OF_REASONING in answer:
        return None
    match = FIRST_LETTER_PATTERN.match(answer.lstrip(PUNCTUATION))
    if match is None and is_truncated:
        return None
    match = match or FINAL_LETTER_PATTERN.search(answer)
    letters = [match[1]] if match is not None else STATED_LETTER_PATTERN.findall(answer)
    indices = {ascii_uppercase.index(letter.upper()) for letter in letters}
    indices = indices or _find_options(answer, options)
    index = indices.pop() if len(indices) == 1 else None
    return index if index is not None and index < len(options) else None


def _find_options(text: str, options: Sequence[str]) -> set[int]:
    """Return the indices of the options whose text a text contains, except within that of a longer option."""
    remaining = normalize_text(text)
    matches = set()
    normalized = {index: normalize_text(option).strip(" .") for index, option in enumerate(options)}
    for index in sorted(normalized, key=lambda index: -len(normalized[index])):
        pattern = rf"(?<!\w){re.escape(normalized[index])}(?!\w)"
        if normalized[index] and re.search(pattern, remaining):
            matches.add(index)
            remaining = re.sub(pattern, "\0", remaining)
    return matches
