"""The composed model: encode, segment, mix, caption, in that order and on one screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from sca_registry import RegistryError
from sca_registry.contracts import Batch, Encoder, GenerationOutput, LanguageModel, Mixer, ModelOutput, PromptBatch, SegmenterOutput, Segmenter
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sca.nn.projection import Projection
from sca.nn.regions import joined

if TYPE_CHECKING:
    from sca_registry.spec import ModelSpec

LABEL_SMOOTHING = 0.1  # SCA, arXiv 2312.00869
WORDS = 512  # whose logits are there at once when a loss is computed
NON_FINITE = "if this is float16, use dtype=float32 or bfloat16, else copy the weights again"
ROWS = 512  # texts that the language model generates at a time, beams and samples counted


class Segmenting(nn.Module):
    """An encoder and a segmenter: as much of a model as masks need."""

    def __init__(self, encoder: Encoder, segmenter: Segmenter):
        super().__init__()
        self.encoder = encoder
        self.segmenter = segmenter

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, C, h, w), once an image. RegistryError if the encoder gives another shape."""
        side = pixels.shape[-1] // self.encoder.stride
        shape = (len(pixels), self.encoder.channels, side, side)
        return self._expect(self.encoder(pixels), shape, "encoder")

    def segment(self, features: Tensor, prompts: PromptBatch, multimask_output: bool = True) -> SegmenterOutput:
        return self.segmenter(features, prompts, multimask_output)

    def _name_of(self, kind: str) -> str:
        return type(getattr(self, kind)).__name__

    def _expect(self, given: Any, shape: tuple[int, ...], kind: str) -> Tensor:
        """What a part gave, if it has the shape that its own figures promise."""
        if getattr(given, "shape", None) == shape:
            return given
        name = self._name_of(kind)
        found = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise RegistryError(
            f"{kind} {name!r} gives {found}, and its attributes promise {shape}; `sca check {kind} {name}` tells more"
        )


class SegmentCaptioner(Segmenting):
    """An encoder, a segmenter, a mixer and a language model (SCA, arXiv 2312.00869), frozen as `spec.trainable` says.

    The language model reads a prefix of K positions: task tokens, then projected queries. There is no beginning-of-text
    token: the last position of the prefix predicts the first word.
    """

    def __init__(
        self, spec: ModelSpec, encoder: Encoder, segmenter: Segmenter, mixer: Mixer, language_model: LanguageModel
    ):
        super().__init__(encoder, segmenter)
        self.spec = spec
        self.mixer = mixer
        self.language_model = language_model
        self.projection = Projection(mixer.hidden_size, language_model.hidden_size, **spec.projection)
        self.task_tokens = nn.Parameter(torch.randn(2, spec.task_tokens, language_model.hidden_size) * 0.02)
        self.freeze()

    def _name_of(self, kind: str) -> str:
        return getattr(self.spec, kind).name

    def prepare(self, regions: SegmenterOutput) -> Any:
        """What the mixer computes once an image, for all regions of the same images; None if there is nothing."""
        prepare = getattr(self.mixer, "prepare", None)
        return None if prepare is None else prepare(regions.image_embeddings, regions.positional_encoding)

    def mix(self, regions: SegmenterOutput, prepared: Any = None) -> Tensor:
        """Queries (N, Q, D). RegistryError if the mixer gives another shape."""
        queries = self.mixer(regions) if prepared is None else self.mixer(regions, prepared)
        return self._expect(queries, (len(regions), self.mixer.num_queries, self.mixer.hidden_size), "mixer")

    def prefix(self, queries: Tensor, task: Tensor) -> Tensor:
        """(N, Q, D) and (N,) task ids -> (N, K, E)."""
        return torch.cat((self.task_tokens[task], self.projection(queries)), dim=1)

    def forward(self, batch: Batch, weights: Mapping[str, float] | None = None, chunk: int = 0) -> ModelOutput:
        """Losses by name, and their sum weighted by `weights` (1 where it is silent).

        chunk: at most so many regions, and as many texts, are worked on at a time, and what a chunk computed is let go
        and computed anew for its gradients (arXiv 1604.06174); 0: all at once, and nothing twice.
        """
        features = batch.features if batch.features is not None else self.encode(batch.pixel_values)
        regions, queries = self._look(features, batch.prompts, chunk)
        losses, logits = {}, None
        if batch.input_ids is not None:
            told = queries if batch.region_index is None else queries[batch.region_index]  # (M, Q, D)
            states = self._states(self.prefix(told, batch.task_ids), batch.input_ids, batch.attention_mask, chunk)
            losses["caption"], logits = caption_loss(self.language_model, states, batch.input_ids[batch.attention_mask.bool()])
        if batch.targets is not None and hasattr(self.segmenter, "loss"):
            losses |= self.segmenter.loss(regions, batch.targets)
        loss = sum((weights or {}).get(name, 1.0) * value for name, value in losses.items()) if losses else None
        return ModelOutput(loss, losses, logits, regions, queries)

    def _look(self, features: Tensor, prompts: PromptBatch, chunk: int) -> tuple[SegmenterOutput, Tensor]:
        """Regions and their queries; those that were looked at in chunks have no grids."""

        def look(features: Tensor, part: PromptBatch) -> tuple[SegmenterOutput, Tensor]:
            regions = self.segment(features, part)
            return regions, self.mix(regions)

        def look_and_forget(features: Tensor, part: PromptBatch) -> tuple[SegmenterOutput, Tensor]:
            regions, queries = look(features, part)
            return replace(regions, grid=None), queries

        if not 0 < chunk < len(prompts):
            return look(features, prompts)
        found = [checkpoint(look_and_forget, features, part, use_reentrant=False) for part in prompts.chunks(chunk)]
        return joined([regions for regions, _ in found]), torch.cat([queries for _, queries in found])

    def _states(self, prefix: Tensor, ids: Tensor, mask: Tensor, chunk: int) -> Tensor:
        """(M, K, E) and (M, L) -> (W, E), for each word and end the state that predicts it, texts in order.

        Tensors are arguments of what is computed anew: of their devices alone `checkpoint` keeps the random numbers.
        """

        def states(*rows: Tensor) -> Tensor:
            return self.states(*rows)[rows[-1].bool()]

        if not 0 < chunk < len(ids):
            return states(prefix, ids, mask)
        parts = zip(*(each.split(chunk) for each in (prefix, ids, mask)), strict=True)
        return torch.cat([checkpoint(states, *part, use_reentrant=False) for part in parts])

    def states(self, prefix: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(M, K, E) and (M, L) -> (M, L, E): state i predicts `ids[:, i]`, the first being the prefix's last."""
        words = self.language_model.embed_tokens(ids[:, :-1])  # what follows the last word is not asked
        seen = torch.cat((mask.new_ones(prefix.shape[:2]), mask[:, :-1]), dim=1)
        states = self.language_model.hidden_states(torch.cat((prefix, words.to(prefix.dtype)), dim=1), seen)
        return states[:, prefix.shape[1] - 1 :]

    @torch.no_grad()
    def generate(self, features: Tensor, prompts: PromptBatch, task: Tensor, **generation: Any) -> GenerationOutput:
        return self.generate_from_prefix(self.prefix(self.mix(self.segment(features, prompts)), task), **generation)

    @torch.no_grad()
    def generate_from_prefix(self, prefix: Tensor, **generation: Any) -> GenerationOutput:
        """Generate token ids for prefixes, at most `ROWS` texts at a time, so that memory does not grow with regions.

        Args:
            prefix: (N, K, E).
            **generation: Options of the language model's `generate`, in place of those of the spec; and `seed`, of what
                is drawn for each row. With a seed rows are generated one at a time, so that a caption does not depend
                on its neighbors, and the state of torch's generators stays.

        Raises:
            ValueError: If scores are not finite, because of damaged weights or a number format that overflows.
        """
        options = {**self.spec.generation, **generation}
        seed = options.pop("seed", None)
        texts = max(1, *(count for name in ("beams", "captions") if isinstance(count := options.get(name, 1), int)))
        rows = max(1, ROWS // texts) if seed is None else 1
        pieces = prefix.split(rows) if len(prefix) else (prefix,)
        generated = _join_generated([self._generate_piece(piece, seed, options) for piece in pieces], self._pad)
        check_finite_scores(generated.scores, f"language model {self._name_of('language_model')!r}")
        return generated

    def _generate_piece(self, prefix: Tensor, seed: int | None, options: Mapping[str, Any]) -> GenerationOutput:
        if seed is None:
            return self.language_model.generate(prefix, **options)
        is_cpu = prefix.device.type == "cpu"
        kind = {} if is_cpu else {"device_type": prefix.device.type}
        with torch.random.fork_rng([] if is_cpu else [prefix.device], **kind):
            torch.manual_seed(seed)
            return self.language_model.generate(prefix, **options)

    @property
    def _pad(self) -> int:
        """What fills up token ids behind the end of a text."""
        tokenizer = self.language_model.tokenizer
        return getattr(self.language_model, "pad", 0) if tokenizer is None else tokenizer.pad_token_id

    # --- what trains --------------------------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter once, under the name `spec.trainable` uses for it."""
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            group = name.split(".")[0]
            if name.startswith("segmenter.neck."):
                group = "neck"
            elif "lora_" in name:
                group = "lora"
            groups.setdefault(group, []).append(parameter)
        return groups

    def freeze(self) -> None:
        """Only `spec.trainable` groups get gradients. Codes that are never trained (SAM's random frequencies) stay."""
        for group, parameters in self.groups().items():
            if group not in self.spec.trainable:
                for parameter in parameters:
                    parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> SegmentCaptioner:
        """A part with nothing to train stays in eval mode: no dropout, no statistics."""
        super().train(mode)
        for module in self.children():
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.eval()
        return self

    def freeze_report(self) -> str:
        """One line a group: parameters, and whether they train."""
        lines = []
        for group, parameters in self.groups().items():
            count, trains = sum(p.numel() for p in parameters), any(p.requires_grad for p in parameters)
            lines.append(f"{group:<15}{count:>15,}  {'trains' if trains else 'frozen'}")
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return "\n".join([*lines, f"{'in all':<15}{sum(p.numel() for p in self.parameters()):>15,}  {trained:,} train"])


def check_finite_scores(scores: Tensor, subject: str) -> None:
    """Raise ValueError if log-probabilities are NaN or infinite: then the tokens mean nothing, whatever they are."""
    wrong = int((~scores.isfinite()).sum())
    if wrong:
        raise ValueError(
            f"{subject} returned NaN or infinite scores for {wrong} of {scores.numel()} captions; {NON_FINITE}"
        )


def _join_generated(pieces: Sequence[GenerationOutput], pad: int) -> GenerationOutput:
    if len(pieces) == 1:
        return pieces[0]
    longest = max(piece.sequences.shape[2] for piece in pieces)
    ids = [F.pad(piece.sequences, (0, longest - piece.sequences.shape[2]), value=pad) for piece in pieces]
    return GenerationOutput(torch.cat(ids), torch.cat([piece.scores for piece in pieces]))


def caption_loss(language_model: LanguageModel, states: Tensor, words: Tensor) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy with label smoothing, averaged over the words and ends (W,) of all texts, and the logits (W, V).

    Of more than `WORDS`, logits would be the largest thing in memory: they are made a piece at a time, again for the
    gradients, and none are given.
    """

    def summed(states: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        logits = language_model.lm_head(states).float()
        return F.cross_entropy(logits, words, label_smoothing=LABEL_SMOOTHING, reduction="sum"), logits

    if len(words) <= WORDS:
        loss, logits = summed(states, words)
        return loss / len(words), logits

    def piece(states: Tensor, words: Tensor) -> Tensor:
        return summed(states, words)[0]

    pieces = zip(states.split(WORDS), words.split(WORDS), strict=True)
    return sum(checkpoint(piece, *each, use_reentrant=False) for each in pieces) / len(words), None
