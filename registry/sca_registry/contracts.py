"""Contracts: the inputs and outputs of each kind of component.

The shapes in this module are the complete agreement between encoders, segmenters, mixers, language models, datasets and
metrics. The module does not import torch: the dataclasses call tensor methods, and the protocols are for readers and
type checkers.

Shape legend:
    B: images in a batch.
    N: regions over the whole batch.
    P: points per region.
    P': prompt tokens per region.
    T: output tokens of the mask decoder per region.
    M: candidate masks per region.
    C: channels of the encoder's features.
    D: hidden size of the segmenter.
    Q: queries per region.
    K: prefix length of the language model (task tokens and queries).
    E: hidden size of the language model.
    G: ground-truth captions in a batch.
    R: generated captions per region.
    L: tokens of the longest caption.
    V: vocabulary size.
    F: summands per row of a metric.
    S: side of the square model input in pixels.
    h, w: height and width of the feature grid (S divided by the encoder's stride).

Regions are flat: N counts regions over the whole batch, and a sorted `image_index` maps each region to its image.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Self, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

REGION_PATTERN = re.compile(r"<region\s*(\d{1,9})\s*>", re.IGNORECASE)  # reference to a region in a question
JUDGE_QUESTIONS = "judge_questions"  # attribute of a region: a list of dicts with the fields of `JudgeQuestion`
OPTION_SCORES = (-1, 0, 0.5, 1)  # scores of the options of a judge's question
RECOGNITION_TASK_ID, CAPTION_TASK_ID = 0, 1
TASKS = ("recognition", "caption")  # tasks of all models; a spec can name further ones


@dataclass(frozen=True)
class ImageFormat:
    """Input format of an image encoder.

    Attributes:
        size: Side S of the square model input in pixels.
        mean: Channel means for values in [0, 1].
        std: Channel standard deviations for values in [0, 1].
        channel_order: Channel order.
        resample: Interpolation used for resizing.
        resize_mode: "pad" scales the longest side to `size` and pads right and bottom with zeros after normalization;
            "stretch" scales both sides to `size`.
    """

    size: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    channel_order: Literal["rgb", "bgr"] = "rgb"
    resample: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    resize_mode: Literal["pad", "stretch"] = "pad"


@dataclass
class _TensorRows:
    """Row-wise operations for dataclasses whose tensors all have N rows."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def __getitem__(self, rows: Any) -> Self:
        """Select rows of every field by a slice, an index tensor or a boolean tensor."""
        return self._map_tensors(lambda value: value[rows])

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move every tensor like `Tensor.to`; a dtype applies to floating-point fields only."""
        return self._map_tensors(lambda value: _move_tensor(value, args, kwargs))

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if hasattr(value, "shape")})


def _move_tensor(value: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    result = value.to(*args, **kwargs)
    return result if value.is_floating_point() else result.to(value.dtype)


@dataclass
class PromptBatch(_TensorRows):
    """Prompts of N regions in pixels of the S x S model input.

    A batch is homogeneous: every row has the same kinds of prompt and the same number of points. Mixed prompts are
    grouped, never padded, because SAM has no attention mask and treats label -1 as a learned token.
    """

    image_index: Tensor  # (N,) long, sorted: the image of each region
    boxes: Tensor | None = None  # (N, 4) x1 y1 x2 y2
    points: Tensor | None = None  # (N, P, 2) x y
    labels: Tensor | None = None  # (N, P) 1 inside, 0 outside, -1 SAM's "not a point"
    masks: Tensor | None = None  # (N, 1, 4h, 4w) logits
    image_boxes: Tensor | None = None  # (N, 4) x1 y1 x2 y2 of the whole image; that of a crop is larger than the crop
    aspect_ratios: Tensor | None = None  # (N,) width of the whole image divided by its height

    def iter_chunks(self, chunk_size: int) -> Iterator[PromptBatch]:
        """Yield consecutive batches of at most `chunk_size` regions."""
        for start in range(0, len(self), chunk_size):
            yield self[start : start + chunk_size]


@dataclass
class DecoderMasks(_TensorRows):
    """All masks of a mask decoder: the single mask, then the M candidate masks.

    They do not depend on `multimask_output`. The tensors are those of the decoder, without copies.
    """

    masks: Tensor  # (N, M + 1, 4h, 4w) logits
    iou_scores: Tensor  # (N, M + 1) predicted IoU
    tokens: Tensor  # (N, M + 1, D) output tokens of the masks


class ConfidentMasks(NamedTuple):
    """Candidate masks of a segmenter whose predicted IoU is above a minimum."""

    masks: Tensor  # (K, 4h, 4w) float32 logits
    iou_scores: Tensor  # (K,) float32 predicted IoU
    region_index: Tensor  # (K,) region of each mask, sorted


@dataclass
class SegmenterOutput:
    """Masks, scores, tokens and features of N prompted regions."""

    image_index: Tensor  # (N,)
    image_embeddings: Tensor  # (B, D, h, w) image features before any prompt
    image_size: int  # S
    dense_embeddings: Tensor  # (D, 1, 1) or (N, D, h, w) dense prompt embeddings
    positional_encoding: Tensor  # (D, h, w) positional encoding of the grid
    prompt_tokens: Tensor  # (N, P', D) prompt tokens before the mask decoder
    tokens: Tensor  # (N, T, D) output tokens of the mask decoder
    mask_tokens: Tensor | None = None  # (N, M, D) output tokens of the masks, aligned with `masks`
    grid: Tensor | None = None  # (N, D, h, w) image features of the mask decoder, per region
    masks: Tensor | None = None  # (N, M, 4h, 4w) logits
    iou_scores: Tensor | None = None  # (N, M) predicted IoU
    boxes: Tensor | None = None  # (N, 4) x1 y1 x2 y2 in the model input: the box prompt, else the box of the best mask
    decoder_masks: DecoderMasks | None = None  # None for a segmenter without masks, or without a single mask

    def __len__(self) -> int:
        return len(self.image_index)


class GenerationOutput(NamedTuple):
    """Generated token ids without the prefix, and their scores."""

    sequences: Tensor  # (N, R, L) R captions per region, best first, filled with EOS or padding after their end
    scores: Tensor  # (N, R) mean log-probability per token, EOS included


@dataclass
class MaskTargets(_TensorRows):
    """Ground-truth masks to train a segmenter on."""

    masks: Tensor  # (N, 4h, 4w) in [0, 1]: fraction of each cell that the region covers
    valid_pixels: Tensor  # (N, 4h, 4w) bool: cells inside the image, not its padding
    has_mask: Tensor  # (N,) bool: regions with a ground-truth mask


@dataclass
class QuestionBatch:
    """Positions of questions in `Batch.input_ids`. The caption that follows a question is its answer."""

    has_question: Tensor  # (G,) bool
    answer_mask: Tensor  # (G, L) 1 for the tokens of captions and answers, which are predicted; 0 for questions
    region_index: Tensor  # (G, L) prompt whose embedding replaces the token, -1 for tokens
    embedding_index: Tensor  # (G, L) index of that embedding among those of the region
    ids_before_prefix: Tensor  # (L',) tokens before the prefix of captions with a question

    def to(self, *args: Any, **kwargs: Any) -> QuestionBatch:
        """Move every tensor like `Tensor.to`."""
        return replace(self, **{each.name: getattr(self, each.name).to(*args, **kwargs) for each in fields(self)})


@dataclass
class Batch:
    """Images, N prompts and, for training, G captions. Exactly one of `pixel_values` and `features` is set."""

    prompts: PromptBatch
    task_ids: Tensor  # (G,) index in `ModelSpec.task_names`: 0 recognition, 1 caption
    pixel_values: Tensor | None = None  # (B, 3, S, S)
    features: Tensor | None = None  # (B, C, h, w)
    input_ids: Tensor | None = None  # (G, L) caption tokens and EOS, padded on the right
    attention_mask: Tensor | None = None  # (G, L) 1 for caption tokens and EOS, 0 for padding
    region_index: Tensor | None = None  # (G,) prompt of each caption; None: one caption per prompt, in order
    questions: QuestionBatch | None = None  # questions that precede some of the captions
    targets: MaskTargets | None = None
    auxiliary_targets: dict[str, Tensor] = field(default_factory=dict)  # (N, ...) targets of auxiliary losses

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        """Move every tensor like `Tensor.to`."""

        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: move(inner) for name, inner in value.items()}
            return value if value is None else value.to(*args, **kwargs)

        return replace(self, **{each.name: move(getattr(self, each.name)) for each in fields(self)})


@dataclass
class ModelOutput:
    """Output of a forward pass. `loss` is the weighted sum of `losses`."""

    loss: Tensor | None
    losses: dict[str, Tensor]
    logits: Tensor | None  # (tokens, V) of all captions in order, EOS included; None for large batches
    regions: SegmenterOutput
    queries: Tensor  # (N, Q, D)


@dataclass(frozen=True)
class Prompt:
    """Prompt for one region.

    Coordinates are pixels of the image after its EXIF orientation is applied.
    """

    box: tuple[float, float, float, float] | None = None  # x1 y1 x2 y2
    points: tuple[tuple[float, float, int], ...] = ()  # x, y, label: 1 foreground, 0 background
    mask: np.ndarray | None = None  # (height, width) bool

    def __bool__(self) -> bool:
        return self.box is not None or bool(self.points) or self.mask is not None


class TokenUsage(NamedTuple):
    """Tokens of one region's captions."""

    prompt_tokens: int  # prefix length
    completion_tokens: tuple[int, ...]  # tokens of the caption and of each alternative, EOS included
    is_truncated: tuple[bool, ...]  # whether each reached the token limit before EOS


@dataclass(frozen=True)
class Caption:
    """Caption of one region, with its box and mask in image pixels."""

    text: str
    score: float  # exp of the mean token log-probability, in [0, 1]; NaN if unknown, as for a human-written one
    box: tuple[float, float, float, float] | None  # x1 y1 x2 y2: the box prompt, or else the bounding box of the mask
    mask: dict[str, Any] | None  # COCO RLE {"size": [height, width], "counts": str}
    predicted_iou: float | None  # mask quality predicted by the segmenter
    prompt: Prompt
    region_id: int  # index of the prompt in the list of prompts of its image
    alternatives: tuple[tuple[str, float], ...] = ()  # further captions and their scores, best first
    usage: TokenUsage | None = None  # None if no language model generated the captions
    name: str | None = None  # class name or phrase of the proposer, or the text that was searched for
    proposal_score: float | None = None  # score of the region for the proposer, or for that text
    confidence: float | None = None  # probability that the caption is correct; None if the model is not calibrated
    ood_score: float | None = None  # distance of the image to the training images; above 1, it is unlike them
    question: str | None = None  # question, or request for a length, that the text responds to

    @property
    def array(self) -> np.ndarray | None:
        """The mask, decoded to a (height, width) bool array in image pixels; None without a mask."""
        if self.mask is None:
            return None
        from pycocotools import mask as coco

        return coco.decode(self.mask).astype(bool)


@dataclass(frozen=True)
class Region:
    """One annotated region of a dataset."""

    id: int
    box: tuple[float, float, float, float]  # x1 y1 x2 y2, image pixels
    mask: dict[str, Any] | None = None  # COCO RLE
    name: str | None = None  # class name, the target of the task `recognition`
    phrases: tuple[str, ...] = ()  # true captions, the most specific last, the targets of the task `caption`
    attributes: dict[str, Any] = field(default_factory=dict)  # exact attributes, and questions for a judge, if any


@dataclass(frozen=True)
class Question:
    """Question about regions of an image, with its answer.

    Attributes:
        text: Question. "<region 1>" refers to the first of `region_ids`, "<region 2>" to the second, and so on. Without
            such references, the question is about the first one.
        answer: Correct answer.
        region_ids: Ids of the regions of the sample that the question is about.
        kind: Kind of question, such as "color".
        is_about_image: The answer also depends on other regions of the image, as for counts. Augmentation that removes
            a region then removes the question.

    Raises:
        ValueError: The text, the answer or the regions are empty, or the text refers to a region that does not exist.
    """

    text: str
    answer: str
    region_ids: tuple[int, ...]
    kind: str = "question"
    is_about_image: bool = False

    def __post_init__(self) -> None:
        if not self.text.strip() or not self.answer.strip():
            raise ValueError("a question or its answer is empty; set both")
        if not self.region_ids:
            raise ValueError(f"the question {self.text!r:.60} has no regions; list their ids")
        for number in list_region_references(self.text):
            if not 1 <= number <= len(self.region_ids):
                raise ValueError(
                    f"the question {self.text!r:.60} refers to <region {number}>, but the number of its regions is "
                    f"{len(self.region_ids)}"
                )


@dataclass(frozen=True)
class JudgeQuestion:
    """Multiple-choice question about the caption of a region, for a judge that reads the caption.

    The attribute `JUDGE_QUESTIONS` of a region is a list of such questions as dicts.

    Attributes:
        text: Question.
        options: Texts of the options, of which the judge chooses one.
        scores: Score of each option, one of `OPTION_SCORES`.
        kind: "positive" for a question about what the region shows, "negative" for what it does not show.

    Raises:
        ValueError: A field has another type, the text or an option is empty, the number of options is not between 2 and
            26 or not that of the scores, or a score or the kind is not one of those above.
    """

    text: str
    options: tuple[str, ...]
    scores: tuple[float, ...]
    kind: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise ValueError(f"the text of a question for the judge is {self.text!r:.60}; expected a string")
        if not self.text.strip():
            raise ValueError("a question for the judge is empty; set its text")
        subject = f"the question {self.text!r:.60}"
        if not isinstance(self.options, tuple | list) or not all(isinstance(each, str) for each in self.options):
            raise ValueError(f"{subject} has the options {self.options!r:.60}; expected a list of strings")
        if not isinstance(self.scores, tuple | list):
            raise ValueError(f"{subject} has the scores {self.scores!r:.60}; expected a list of numbers")
        if not all(option.strip() for option in self.options):
            raise ValueError(f"{subject} has an empty option; set its text")
        if not 2 <= len(self.options) <= 26 or len(self.scores) != len(self.options):
            raise ValueError(
                f"{subject} has {len(self.options)} options and {len(self.scores)} scores; expected 2 to 26 options "
                "with a score each"
            )
        for score in self.scores:
            if isinstance(score, bool) or score not in OPTION_SCORES:
                raise ValueError(f"{subject} has the score {score!r}; choose from {', '.join(map(str, OPTION_SCORES))}")
        if self.kind not in ("positive", "negative"):
            raise ValueError(f"{subject} is of kind {self.kind!r}; choose from positive, negative")


def list_region_references(question: str) -> list[int]:
    """Return the numbers of the regions that a question refers to, in order, without duplicates.

    Args:
        question: Text with references such as "<region 1>".

    Returns:
        Numbers from 1; empty for a question about a single region.
    """
    return [*dict.fromkeys(int(number) for number in REGION_PATTERN.findall(question))]


class Sample(NamedTuple):
    """One image of a dataset with its annotated regions, and questions about them."""

    image: Image.Image
    image_id: int
    regions: tuple[Region, ...]
    questions: tuple[Question, ...] = ()


class Proposals(NamedTuple):
    """Proposed regions: prompts in image pixels, a score for each, and class names or phrases where available."""

    prompts: tuple[Prompt, ...]
    scores: tuple[float, ...]
    names: tuple[str | None, ...]


class MetricOutput(NamedTuple):
    """Scores of a metric.

    Attributes:
        values: Scores by name. Floats are fractions in [0, 1], or on that scale as CIDEr-D is, NaN if nothing could be
            scored; tables print them times 100. Counts are integers.
        per_record: Arrays with one row per judged unit (a record, a region or a pair), with `image_id` and `region_id`
            to identify it. An array named like a score has that score as its mean over the rows that are not NaN,
            unless `statistics` contains the score.
        statistics: For a score that is not a mean: (summands per row of shape (rows, F), function from summed summands
            (..., F) to the score (...)). The bootstrap resamples rows with it.
        notes: Reasons why a score is NaN, by the name of the score.
    """

    values: dict[str, float]
    per_record: dict[str, np.ndarray] | None = None
    statistics: dict[str, tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]] | None = None
    notes: dict[str, str] | None = None


# --- protocols ------------------------------------------------------------------------------------------------------


@runtime_checkable
class Encoder(Protocol):
    """Image encoder, built by `factory(**options)`.

    Attributes:
        image_format: Input format.
        channels: Feature channels C.
        stride: Input pixels per feature cell.
        default_segmenter: Segmenter used if a spec names none.
        checkpoint: Hub id or folder of the pretrained weights; None for random weights.
    """

    image_format: ImageFormat
    channels: int
    stride: int
    default_segmenter: str
    checkpoint: str | None

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """Encode images: (B, 3, S, S) -> (B, C, S / stride, S / stride)."""


@runtime_checkable
class Segmenter(Protocol):
    """Promptable segmenter, built by `factory(encoder, **options)`.

    A trainable segmenter has a method `compute_losses(regions: SegmenterOutput, targets: MaskTargets)` that returns
    named scalar losses. An optional method `predict_confident_masks(features, prompts, min_iou)` returns the
    `ConfidentMasks` of the regions without computing their other masks. An optional attribute `grid_size` is the side
    h = w of the grid in cells; mixers whose number of queries depends on it require it.

    Attributes:
        channels: Hidden size D.
    """

    channels: int

    def __call__(self, features: Tensor, prompts: PromptBatch, multimask_output: bool = True) -> SegmenterOutput:
        """Segment regions.

        Args:
            features: (B, C, h, w) features of the encoder.
            prompts: N prompts.
            multimask_output: Return all candidate masks of each region (three for SAM) instead of one.

        Returns:
            Masks, scores and tokens of the N regions.
        """


@runtime_checkable
class Mixer(Protocol):
    """Feature mixer, built by `factory(segmenter, **options)`: it turns regions into queries for the language model.

    A mixer may have a method `prepare_images(image_embeddings, positional_encoding)` that computes tensors that all
    regions of an image share, from (B, D, h, w) and (D, h, w). Its result is then passed to the mixer as a second
    argument.

    A mixer may have an option `hidden_size`. With the projection "none", it is set to the hidden size E of the language
    model, whose embeddings the queries then are.

    Attributes:
        hidden_size: Width D of the queries.
        num_queries: Queries Q per region.
        uses_grid: Whether the mixer reads `SegmenterOutput.grid`.
    """

    hidden_size: int
    num_queries: int
    uses_grid: bool

    def __call__(self, regions: SegmenterOutput) -> Tensor:
        """Return the query embeddings of each region, (N, Q, D)."""


@runtime_checkable
class Tokenizer(Protocol):
    """Converts text to token ids and back.

    Attributes:
        pad_token_id: Id of the padding token.
        eos_token_id: Id of the end-of-sequence token.
    """

    pad_token_id: int
    eos_token_id: int

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Return at most `max_length` ids that end with EOS; no BOS, because the visual prefix takes its place."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text up to EOS."""


@runtime_checkable
class LanguageModel(Protocol):
    """Causal language model with embedding inputs, built by `factory(**options)`.

    Attributes:
        hidden_size: Width E of the embeddings.
        tokenizer: Its tokenizer; None if the checkpoint has none.
    """

    hidden_size: int
    tokenizer: Tokenizer | None

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """Embed token ids: (N, L) -> (N, L, E)."""

    def hidden_states(self, embeddings: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the hidden states of the last layer: (N, L, E) and (N, L) -> (N, L, E)."""

    def lm_head(self, hidden_states: Tensor) -> Tensor:
        """Return the logits of hidden states: (..., E) -> (..., V)."""

    def generate(self, prefix: Tensor, max_new_tokens: int, **generation: Any) -> GenerationOutput:
        """Generate captions of at most `max_new_tokens` tokens from prefixes (N, K, E)."""

    def add_lora(self, rank: int, alpha: float, dropout: float, target_modules: Sequence[str] | None) -> None:
        """Add LoRA adapters to the named linear layers, by default to those that suit the architecture."""


@runtime_checkable
class Dataset(Protocol):
    """Dataset of images with annotated regions, built by `factory(split, **options)`.

    A dataset may also have:

    - `iter_annotations()`: yields the regions of each image, in order, without opening images;
    - `iter_questions()`: yields the questions about each image, in the same order;
    - `read_sample(index)`: returns a sample, or None if its image cannot be read;
    - `content_hash`: identifies the content, so that results on other content are not mixed;
    - `metadata`: dict of counts, such as `regions` and `captioned`;
    - `skipped` and `examples`: counts and first locations of skipped entries, by reason;
    - `attribute_values`: possible values of each attribute of its regions, for auxiliary losses;
    - `relation_attributes`: names of the attributes that relate a region to another one.
    """

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, index: int) -> Sample:
        """Return one image with its regions."""


@runtime_checkable
class Metric(Protocol):
    """Metric over prediction records, built by `factory(**options)`.

    A metric that needs "image" is called with a second argument, a function from a record to its image. Options named
    `references` and `tokenizer` are set by the evaluation protocol. A metric may also have:

    - `implementation`: the package that computes it, with its version: scores of different ones are not comparable;
    - `details`: further facts for the results in JSON, such as the URL of a server;
    - `includes_controls = True`: the metric is called once with all records, those of controls (adversarial prompts)
      included, instead of once per control;
    - `scores`, in its class or card: the names of its scores, `class/*` for all with a prefix;
    - `check_truth`, a static method: raises ValueError for a record with invalid ground truth. Before the predictions,
      it is called with each record that has the required ground truth, without an image id.

    Attributes:
        required_fields: Required fields of a record, such as "mask", "truth.mask" or "task=caption".
    """

    required_fields: tuple[str, ...]

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> MetricOutput:
        """Score records."""


@runtime_checkable
class Proposer(Protocol):
    """Region proposer, built by `factory(**options)`.

    A proposer that finds what the user describes has the option `text`, a sequence of phrases. `sca caption --text`
    sets it. The option `device`, if it exists, is set to the device of the captioner. An optional attribute
    `weights_hash`, a hash of its weights, identifies it in evaluation runs.
    """

    def __call__(self, image: Image.Image, image_id: int | str) -> Proposals:
        """Propose regions of an image."""


@runtime_checkable
class Captioner(Protocol):
    """Captioner of regions, built by `factory(**options)`: a composed model or a baseline.

    Optional attributes identify it in evaluation runs: `weights_hash`, a hash of its weights, and `metadata`, a dict of
    plain values, such as its options. An optional attribute `tasks` names its tasks; without it, they are `TASKS`. An
    optional attribute `usage` contains counts that evaluations print, such as requests and tokens. `has_scores = False`
    declares that the scores of captions are unknown (NaN).
    """

    def caption(
        self, image: Image.Image, prompts: Sequence[Prompt], task: str = "caption", **generation: Any
    ) -> list[Caption]:
        """Return one caption per prompt, in order."""


@runtime_checkable
class Launcher(Protocol):
    """Launcher of tasks, built by `factory(**options)`. See `sca.launchers.task`."""

    def run_tasks(self, tasks: Sequence[Any]) -> Iterator[Any]:
        """Run tasks and yield their outcomes in the order in which they finish."""


class ComponentKind(NamedTuple):
    """Kind of component.

    Attributes:
        plural: Name of its registry, such as "encoders".
        singular: Name of one component, such as "encoder".
        protocol: Protocol that a component implements.
        upstream_kind: Kind of the component that the factory receives as its first argument.
        first_argument: Name of another required first argument of the factory.
    """

    plural: str
    singular: str
    protocol: type
    upstream_kind: str | None = None
    first_argument: str | None = None

    @property
    def entry_point_group(self) -> str:
        """Entry-point group of plugins."""
        return f"sca_{self.plural}"


COMPONENT_KINDS = {
    kind.plural: kind
    for kind in (
        ComponentKind("encoders", "encoder", Encoder),
        ComponentKind("segmenters", "segmenter", Segmenter, upstream_kind="encoders"),
        ComponentKind("mixers", "mixer", Mixer, upstream_kind="segmenters"),
        ComponentKind("language_models", "language_model", LanguageModel),
        ComponentKind("datasets", "dataset", Dataset, first_argument="split"),
        ComponentKind("metrics", "metric", Metric),
        ComponentKind("proposers", "proposer", Proposer),
        ComponentKind("captioners", "captioner", Captioner),
        ComponentKind("launchers", "launcher", Launcher),
    )
}
