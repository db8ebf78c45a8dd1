"""Search for regions by text: the likelihood of a text for each region, relative to that without an image.

    index = index_regions(engine, encoded, [prompts])
    scores = index.score_texts(["a striped circle"])  # (N, 1)

The log-likelihood of a text is the maximum over its readings. A reading splits the tokens of the text into two parts,
either of which can be empty:

- The first part is read inside the greedy caption of the region: each token is predicted from the caption up to its
  position. Up to `MAX_SKIPPED_TOKENS` tokens of the caption can be skipped before each token. Therefore "a striped
  circle" is likely for a region with the caption "a small striped red circle", although the model never generates such
  short captions.
- The second part is read as a caption: each token is predicted from the previous tokens of the text.

EOS is not part of the text, which can be the beginning of a longer caption. "No image" is a region whose query
embeddings are zero, and whose box is that of a whole square image, if the model uses boxes. The score is the log-
likelihood minus that without an image, divided by the negative of the latter: 1 for a text that is certain for the
region, 0 for one that is as likely without an image. `benchmarks/studies/find.py` compares this score with others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from sca_registry.contracts import Caption, Prompt, Proposals
from sca_registry.spec import EverythingOptions
from torch import Tensor
from torch.nn import functional as F

from sca.inference.engine import EncodedImages, Engine, MaskEngine, PredictedMask
from sca.inference.region_search import find_everything, select_region_proposals
from sca.io.errors import InputError
from sca.io.masks import mask_to_box
from sca.io.validation import check_encodable
from sca.language_models.token_usage import get_eos_token_ids
from sca.model import SegmentCaptioner, check_finite_scores, count_rows_per_call
from sca.nn.geometry import WHOLE_IMAGE

MAX_SKIPPED_TOKENS = 3  # tokens of a caption that a text may leave out in a row
MIN_TEXT_INFORMATION = 1.0  # nats: minimum of the divisor of a score, for texts that are likely without an image
LOG_PROB_BYTES_PER_CHUNK = 2**26  # log-probabilities of the vocabulary in memory at once


class RegionIndex:
    """Region embeddings and greedy captions, computed once for any number of texts.

    Args:
        model: Model, in eval mode.
        prefix: (N, K, E) prefixes of the regions.
        task: Task of the prefixes.

    Attributes:
        model: Model.
        prefix: (1 + N, K, E) prefixes; the first is that of no image.
        captions: Greedy caption of each region and its score.
    """

    @torch.inference_mode()
    def __init__(self, model: SegmentCaptioner, prefix: Tensor, task: str = "caption"):
        self.model = model
        queries = prefix.new_zeros(1, model.mixer.num_queries, model.mixer.hidden_size)
        task_ids = torch.tensor([model.spec.task_names.index(task)], device=prefix.device)
        geometry = None if model.geometry is None else WHOLE_IMAGE.to(prefix.device)
        no_image = model.append_task_prompt(model.build_prefix(queries, task_ids, geometry), task)
        self.prefix = torch.cat((no_image, prefix))  # (1 + N, K, E)
        options = {"num_beams": 1, "num_captions": 1, "do_sample": False}
        generated = model.generate_from_prefix(self.prefix, **options)
        tokenizer = self._tokenizer
        eos_token_ids = get_eos_token_ids(model.language_model)
        token_ids = [_cut_at_end(ids, eos_token_ids) for ids in generated.sequences[:, 0].tolist()]
        scores = generated.scores[:, 0].exp().tolist()
        self.captions: list[tuple[str, float]] = [
            (tokenizer.decode(ids), score) for ids, score in zip(token_ids[1:], scores[1:], strict=True)
        ]
        self._caption_lengths = torch.tensor([len(ids) for ids in token_ids], device=prefix.device)
        self._caption_states = self._compute_caption_states(token_ids)  # (1 + N, T, E)

    def __len__(self) -> int:
        return len(self.prefix) - 1

    @property
    def _tokenizer(self) -> Any:
        return self.model.language_model.tokenizer

    def score_texts(self, texts: Sequence[str], rows: range | None = None) -> Tensor:
        """Score texts for each region.

        Args:
            texts: Texts.
            rows: Regions to score; None for all N.

        Returns:
            (N, number of texts) scores: 1 for a text that is certain for the region, 0 for one that is as likely
            without an image, and less if it is less likely.

        Raises:
            InputError: A text is empty, not valid Unicode, or longer than the positions of the language model.
            ValueError: The model returns NaN or infinite values.
        """
        log_likelihoods = self.compute_log_likelihoods(texts, rows)
        check_finite_scores(log_likelihoods, "the language model")
        without_image = log_likelihoods[:1].clamp(max=-MIN_TEXT_INFORMATION)
        return (log_likelihoods[1:] - log_likelihoods[:1]) / -without_image

    @torch.inference_mode()
    def compute_log_likelihoods(self, texts: Sequence[str], rows: range | None = None) -> Tensor:
        """Compute the log-likelihood of each text without an image and for each region.

        Args:
            texts: Texts.
            rows: Regions; None for all N.

        Returns:
            (1 + N, number of texts) log-likelihoods in nats; the first row is without an image.

        Raises:
            InputError: A text is empty, not valid Unicode, or longer than the positions of the language model.
        """
        encoded_texts = [encode_text(self.model, text) for text in texts]
        longest = max(self._caption_states.shape[1], *map(len, encoded_texts))
        rows_per_chunk = self._count_rows_per_chunk(longest)
        selected = [0, *(row + 1 for row in (range(len(self)) if rows is None else rows))]
        chunks = []
        for start in range(0, len(selected), rows_per_chunk):
            chunk = selected[start : start + rows_per_chunk]
            caption_log_probs = self._compute_log_probs(self._caption_states[chunk])  # (n, T, V)
            columns = []
            for token_ids in encoded_texts:
                text_log_probs = self.compute_text_log_probs(self.prefix[chunk], token_ids)
                columns.append(
                    _sum_best_reading(text_log_probs, caption_log_probs[..., token_ids], self._caption_lengths[chunk])
                )
            chunks.append(torch.stack(columns, dim=1))
        return torch.cat(chunks)

    def compute_text_log_probs(self, prefix: Tensor, token_ids: Sequence[int]) -> Tensor:
        """Compute the log-probabilities of the tokens of a text as a caption.

        Args:
            prefix: (n, K, E) prefixes.
            token_ids: L token ids of the text.

        Returns:
            (n, L) log-probability of each token after the previous tokens of the text.
        """
        ids = torch.tensor(token_ids, device=prefix.device).expand(len(prefix), -1)
        states = self.model.compute_caption_states(prefix, ids, torch.ones_like(ids))
        return self._compute_log_probs(states).gather(-1, ids[..., None])[..., 0]

    def _compute_caption_states(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Return (1 + N, T, E) states; state j predicts token j of the caption, and the last one what follows it."""
        ids, attention_mask = _pad_tokens([[*ids, 0] for ids in token_ids], self.prefix.device)  # the 0 is not read
        rows = count_rows_per_call(self.prefix.shape[1])
        chunks = zip(*(each.split(rows) for each in (self.prefix, ids, attention_mask)), strict=True)
        return torch.cat([self.model.compute_caption_states(*chunk) for chunk in chunks])

    def _compute_log_probs(self, states: Tensor) -> Tensor:
        logits = self.model.language_model.lm_head(states)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def _count_rows_per_chunk(self, length: int) -> int:
        vocabulary_log_probs = self._compute_log_probs(self._caption_states[:1, :1])
        rows = LOG_PROB_BYTES_PER_CHUNK // (vocabulary_log_probs.nbytes * length)
        return min(max(1, rows), count_rows_per_call(self.prefix.shape[1]))


def encode_text(model: SegmentCaptioner, text: str) -> list[int]:
    """Convert a text to token ids.

    Args:
        model: Model.
        text: Text.

    Returns:
        Token ids without EOS.

    Raises:
        InputError: The text is empty, not valid Unicode, or longer than the positions of the language model.
    """
    tokenizer = model.language_model.tokenizer
    assert tokenizer is not None  # see `check_can_find`
    if not isinstance(text, str) or not text.strip():
        raise InputError("the text is empty; pass a word or a phrase, such as 'a red circle'")
    check_encodable("the text", text)
    token_ids = tokenizer.encode(" ".join(text.split()))[:-1]
    max_positions = getattr(model.language_model, "max_positions", None)
    if max_positions is None:
        return token_ids
    max_tokens = max_positions - model.count_prefix_positions() + 1
    if len(token_ids) > max_tokens:
        raise InputError(
            f"the text has {len(token_ids)} tokens, but the model reads at most {max_tokens}; shorten it, or use "
            "another model"
        )
    return token_ids


class CandidateRegion(NamedTuple):
    """Region of an image to search, before its mask is predicted.

    Attributes:
        prompt: Prompt of the region.
        mask: Mask, if it is known.
        region_id: Index of the region.
    """

    prompt: Prompt
    mask: PredictedMask | None
    region_id: int


def check_can_find(captioner: Any, name: str = "") -> Engine:
    """Check that a captioner can score a text.

    Args:
        captioner: Any captioner.
        name: Name of the captioner for the message.

    Returns:
        The captioner.

    Raises:
        ValueError: It cannot, because it has no language model that reads a text.
    """
    if not isinstance(captioner, Engine):
        subject = repr(name) if name else type(captioner).__name__
        raise ValueError(f"{subject} cannot score a text; use a model with a language model, such as sca-tiny")
    captioner.require_tokenizer()
    return captioner


def check_text(engine: Engine, text: str, location: str = "") -> None:
    """Check a text before any image is read.

    Args:
        engine: Engine of the model.
        text: Text.
        location: Location of the text in a file or dataset, for the message.

    Raises:
        InputError: The text is empty, not valid Unicode, or longer than the positions of the language model.
    """
    try:
        encode_text(engine.model, text)
    except InputError as error:
        raise InputError(f"{location}: {error}" if location else str(error)) from error


@torch.inference_mode()
def index_regions(
    engine: Engine, encoded: EncodedImages, requests: Sequence[Sequence[Prompt]], task: str = "caption"
) -> RegionIndex:
    """Compute what is needed to score texts for regions.

    Args:
        engine: Engine of the model.
        encoded: Result of `engine.encode` for B images.
        requests: Prompts of each of the B images, checked against its size. At least one prompt.
        task: One of the tasks of the model.

    Returns:
        The index of the regions in the flat order of `requests`.
    """
    model, task_id = engine.model, engine.tasks.index(task)
    prepared = None
    indices: list[int] = []
    prefixes: list[Tensor] = []
    for chunk_indices, chunk, segmenter_output in engine.iter_segmented_chunks(encoded, requests):
        prepared = model.prepare_mixer(segmenter_output) if prepared is None else prepared
        task_ids = torch.full((len(chunk_indices),), task_id, device=engine.device)
        geometry = model.compute_geometry(segmenter_output, chunk)
        prefix = model.build_prefix(model.mix(segmenter_output, prepared), task_ids, geometry)
        prefixes.append(model.append_task_prompt(prefix, task))
        indices += chunk_indices
    order = torch.tensor(indices, device=engine.device).argsort()
    return RegionIndex(model, torch.cat(prefixes)[order], task)


def find_regions(
    engine: Engine,
    encoded: EncodedImages,
    regions: Sequence[CandidateRegion],
    index: RegionIndex,
    texts: Sequence[str],
    top: int | None = None,
    threshold: float | None = None,
    *,
    rows: range | None = None,
    return_masks: bool = True,
) -> list[Caption]:
    """Find the regions of one image that match a text.

    Args:
        engine: Engine of the model.
        encoded: Result of `engine.encode` for the image.
        regions: Regions of the image.
        index: Index of the regions, and possibly of other images.
        texts: Texts.
        top: Maximum number of regions per text; None returns all.
        threshold: Minimum score; None accepts all.
        rows: Rows of the index that contain the regions; None for all rows.
        return_masks: Predict the masks of matches without one.

    Returns:
        Captions of the regions, best match first. `name` is the text and `proposal_score` its score; `text` is the
        greedy caption of the region, with its confidence and the OOD score of the image if the model is calibrated.
    """
    scores = index.score_texts(texts, rows)
    captions = index.captions if rows is None else index.captions[rows.start : rows.stop]
    minimum = -math.inf if threshold is None else threshold
    matches: list[tuple[float, int, str]] = []
    for text, text_scores in zip(texts, scores.T.tolist(), strict=True):
        ranked = sorted(range(len(regions)), key=lambda row: -text_scores[row])[:top]
        matches += [(score, row, text) for row in ranked if (score := text_scores[row]) >= minimum]
    matches.sort(key=lambda match: -match[0])
    unknown = list(dict.fromkeys(row for _, row, _ in matches if return_masks and regions[row].mask is None))
    predicted = engine.predict_best_masks(encoded, [[regions[row].prompt for row in unknown]]) if unknown else []
    masks = {row: regions[row].mask for _, row, _ in matches} | dict(zip(unknown, predicted, strict=True))
    matched_captions = [
        replace(_make_caption(regions[row], masks[row], *captions[row]), name=text, proposal_score=score)
        for score, row, text in matches
    ]
    return engine.add_confidence([matched_captions], encoded, "caption", do_sample=False)[0]


def find_in_images(
    engine: Engine,
    encoded: EncodedImages,
    requests: Sequence[Sequence[Prompt]],
    text: str,
    top: int | None = None,
    threshold: float | None = None,
    *,
    return_masks: bool = True,
) -> list[list[Caption]]:
    """Find the prompted regions of several images that match a text.

    Args:
        engine: Engine of the model.
        encoded: Result of `engine.encode` for B images.
        requests: Prompts of each of the B images, checked against its size.
        text: Text.
        top: Maximum number of regions per image; None returns all.
        threshold: Minimum score; None accepts all.
        return_masks: Predict the masks of the matches.

    Returns:
        The matches of each image, best first; see `find_regions`.
    """
    index = index_regions(engine, encoded, requests) if any(requests) else None
    matches: list[list[Caption]] = []
    first_row = 0
    for position, prompts in enumerate(requests):
        rows, first_row = range(first_row, first_row + len(prompts)), first_row + len(prompts)
        regions = [CandidateRegion(prompt, None, region_id) for region_id, prompt in enumerate(prompts)]
        image = encoded.select_image(position)
        options: dict[str, Any] = {"rows": rows, "return_masks": return_masks}
        matches.append(
            []
            if index is None or not prompts
            else find_regions(engine, image, regions, index, [text], top, threshold, **options)
        )
    return matches


def find_candidate_regions(
    engine: MaskEngine,
    encoded: EncodedImages,
    options: EverythingOptions | None = None,
    proposals: Proposals | None = None,
    max_regions: int | None = None,
    progress: Any = None,
) -> list[CandidateRegion]:
    """Find the regions of one image with everything mode or from proposals, without captions.

    Args:
        engine: Engine with an encoder and a segmenter.
        encoded: Result of `engine.encode` for one image.
        options: Options for finding regions; None uses the model's options.
        proposals: Prompts that replace the grid of points; see `sca.caption_everything`.
        max_regions: Maximum number of regions.
        progress: Function called with the number of processed points and the total.

    Returns:
        The regions, in the order of `sca.caption_everything`.
    """
    masks, prompts = find_everything(engine, encoded, options, proposals, progress)
    regions: list[tuple[Prompt, PredictedMask | None]] = [*zip(prompts[:max_regions], masks[:max_regions], strict=True)]
    if proposals:
        max_proposed = None if max_regions is None else max_regions - len(regions)
        regions += [(prompt, None) for prompt in select_region_proposals(proposals, max_proposed).prompts]
    return [CandidateRegion(prompt, mask, region_id) for region_id, (prompt, mask) in enumerate(regions)]


def _sum_best_reading(text_log_probs: Tensor, caption_log_probs: Tensor, caption_lengths: Tensor) -> Tensor:
    """Sum the log-probabilities of the tokens of a text in its best reading; see the module docstring.

    Args:
        text_log_probs: (N, L) log-probability of each token after the previous tokens of the text.
        caption_log_probs: (N, T, L) log-probability of each token at each position of the caption.
        caption_lengths: (N,) tokens of each caption. The position after its last token can also be read.

    Returns:
        (N,) log-likelihoods.
    """
    num_positions = caption_log_probs.shape[1]
    positions = torch.arange(num_positions, device=caption_log_probs.device)
    is_outside = positions > caption_lengths[:, None]  # (N, T)
    caption_log_probs = caption_log_probs.masked_fill(is_outside[..., None], -torch.inf)
    remaining = F.pad(text_log_probs.flip(1).cumsum(1).flip(1), (0, 1))  # (N, L + 1) sums of token i and those after it
    best = remaining[:, 0]
    # reachable[:, j]: best sum of the tokens before token i, if token i is read at position j
    reachable = caption_log_probs.new_zeros(is_outside.shape).masked_fill(positions > MAX_SKIPPED_TOKENS, -torch.inf)
    for i in range(text_log_probs.shape[1]):
        sums = reachable + caption_log_probs[..., i]
        best = torch.maximum(best, sums.amax(1) + remaining[:, i + 1])
        earlier = F.pad(sums, (MAX_SKIPPED_TOKENS + 1, 0), value=-torch.inf)[:, None, :-1]
        reachable = F.max_pool1d(earlier, MAX_SKIPPED_TOKENS + 1, 1)[:, 0]
    return best


def _make_caption(region: CandidateRegion, mask: PredictedMask | None, text: str, score: float) -> Caption:
    rle, predicted_iou = mask or (None, None)
    is_known = region.mask is not None
    box = mask_to_box(rle) if rle and (is_known or region.prompt.box is None) else region.prompt.box
    return Caption(text, score, box, rle, predicted_iou, region.prompt, region.region_id)


def _cut_at_end(token_ids: list[int], eos_token_ids: Sequence[int]) -> list[int]:
    return list(takewhile(lambda token_id: token_id not in eos_token_ids, token_ids))


def _pad_tokens(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (N, T) token ids, padded on the right with 0, and their attention mask."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)
    attention_mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    return ids, attention_mask
