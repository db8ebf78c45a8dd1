"""What each kind of part takes and gives.

The shapes on this page are the whole agreement between encoders, segmenters, mixers, language models, data and metrics.
Nothing here imports torch: the dataclasses call methods of the tensors they are given, and the protocols are for
readers and type checkers. Letters: B images, N regions over the whole batch, P points a region, M candidate masks, D
the segmenter's width, Q queries, E the language model's width, L words of the longest caption, V vocabulary, S side of
the square input frame in pixels, h and w the feature grid (S divided by the encoder's stride).

Regions are flat: N counts regions over the whole batch, and a sorted `owner` says which image each belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

RECOGNITION_TASK_ID, CAPTION_TASK_ID = 0, 1
TASKS = ("recognition", "caption")


@dataclass(frozen=True)
class ImageFormat:
    """How an encoder wants its pictures.

    `mean` and `std` are for channel values in 0..1. `fit="pad"` scales the longest side to `size` and fills right and
    below with zeros after normalizing; `fit="stretch"` scales both sides to `size`.
    """

    size: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    order: Literal["rgb", "bgr"] = "rgb"
    resample: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    fit: Literal["pad", "stretch"] = "pad"


@dataclass
class _TensorRows:
    """Row-wise operations for dataclasses whose tensors all have N rows."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def __getitem__(self, rows: Any):
        """The chosen rows (a slice, an index tensor or a boolean tensor), all fields together."""
        return self._map_tensors(lambda value: value[rows])

    def to(self, *args: Any, **kwargs: Any):
        """Moved like `Tensor.to`; a dtype is given to the floating fields only."""
        return self._map_tensors(lambda value: _move_tensor(value, args, kwargs))

    def _map_tensors(self, function: Callable[[Tensor], Tensor]):
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if hasattr(value, "shape")})


def _move_tensor(value: Tensor, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    result = value.to(*args, **kwargs)
    return result if value.is_floating_point() else result.to(value.dtype)


@dataclass
class PromptBatch(_TensorRows):
    """What a user points at, in pixels of the SxS input frame. Homogeneous: every row has the same kinds of prompt.

    A mixed request is bucketed by the Processor, so that nothing is ever padded: SAM's attention is unmasked and its
    label -1 is a learned token, not filler.
    """

    image_index: Tensor  # (N,) long, sorted: the image each region belongs to
    boxes: Tensor | None = None  # (N, 4) x1 y1 x2 y2
    points: Tensor | None = None  # (N, P, 2) x y
    labels: Tensor | None = None  # (N, P) 1 inside, 0 outside, -1 SAM's "not a point"
    masks: Tensor | None = None  # (N, 1, 4h, 4w) logits

    def iter_chunks(self, chunk_size: int) -> Iterator[PromptBatch]:
        """At most `size` regions at a time, in order."""
        for start in range(0, len(self), chunk_size):
            yield self[start : start + chunk_size]


@dataclass
class SegmenterOutput:
    """What a segmenter knows of each prompted region, before a caption is thought of."""

    image_index: Tensor  # (N,)
    image_embeddings: Tensor  # (B, D, h, w) the encoder's features at the segmenter's width, before any prompt
    image_size: int  # S
    dense_embeddings: Tensor  # (D, 1, 1) or (N, D, h, w) the dense prompt
    positional_encoding: Tensor  # (D, h, w) the position code of the grid
    prompt_tokens: Tensor  # (N, P', D) the prompt as raw tokens
    tokens: Tensor  # (N, T, D) tokens after they have looked at the image
    mask_tokens: Tensor | None = None  # (N, M, D) the fused tokens of the masks, aligned with `masks`
    grid: Tensor | None = None  # (N, D, h, w) the image as each region sees it
    masks: Tensor | None = None  # (N, M, 4h, 4w) logits
    iou_scores: Tensor | None = None  # (N, M) predicted IoU
    boxes: Tensor | None = None  # (N, 4) the given box, else the tight box of the best mask; input frame

    def __len__(self) -> int:
        return len(self.image_index)


class GenerationOutput(NamedTuple):
    """Word ids without the prefix, and how sure the model was."""

    sequences: Tensor  # (N, R, T) R captions a region, best first; after the end only `tokenizer.eos` or pad
    scores: Tensor  # (N, R) mean log-probability a token, the end counted


@dataclass
class Targets(_TensorRows):
    """The truth a segmenter learns from."""

    masks: Tensor  # (N, 4h, 4w) in 0..1: the share of each cell that the region covers
    valid_pixels: Tensor  # (N, 4h, 4w) bool: cells that show the image and not its padding
    has_mask: Tensor  # (N,) bool: regions whose truth has a mask


@dataclass
class Batch:
    """Images, N prompts and, when there is something to learn, M texts. Pixels or features, never both."""

    prompts: PromptBatch
    task_ids: Tensor  # (M,) 0 recognition, 1 caption
    pixel_values: Tensor | None = None  # (B, 3, S, S)
    features: Tensor | None = None  # (B, C, h, w)
    input_ids: Tensor | None = None  # (M, L) words and the end, padded right
    attention_mask: Tensor | None = None  # (M, L) 1 where `ids` is a word or the end
    region_index: Tensor | None = None  # (M,) the prompt that each text is of; None: one text for each, in order
    targets: Targets | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)  # what auxiliary losses of the recipe ask for, (N, ...)

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        """Every tensor moved like `Tensor.to`."""

        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: move(inner) for name, inner in value.items()}
            return value if value is None else value.to(*args, **kwargs)

        return replace(self, **{each.name: move(getattr(self, each.name)) for each in fields(self)})


@dataclass
class ModelOutput:
    """What one forward pass gives: `loss` is the weighted sum of `losses`."""

    loss: Tensor | None
    losses: dict[str, Tensor]
    logits: Tensor | None  # (W, V) of the words and ends of all texts, in order; None if they are too many
    regions: SegmenterOutput
    queries: Tensor  # (N, Q, D)


@dataclass(frozen=True)
class Prompt:
    """What was asked about one region, in pixels of the image as its viewer sees it (EXIF rotation applied)."""

    box: tuple[float, float, float, float] | None = None  # x1 y1 x2 y2
    points: tuple[tuple[float, float, int], ...] = ()  # x, y, label 1 inside or 0 outside
    mask: np.ndarray | None = None  # (height, width) bool

    def __bool__(self) -> bool:
        return self.box is not None or bool(self.points) or self.mask is not None


class TokenUsage(NamedTuple):
    """Tokens of one region's captions."""

    prompt_tokens: int  # positions of the prefix that the language model reads
    completion_tokens: tuple[int, ...]  # tokens of the caption and each of `others`, the end counted
    is_truncated: tuple[bool, ...]  # whether each was cut at the token limit before it ended


@dataclass(frozen=True)
class Caption:
    """The answer for one region, in the image's own pixels."""

    text: str
    score: float  # exp of the mean token log-probability, 0..1; NaN of what a person said
    box: tuple[float, float, float, float] | None  # x1 y1 x2 y2: the given box, else the tight box of the mask
    mask: dict[str, Any] | None  # COCO RLE {"size": [height, width], "counts": str}
    predicted_iou: float | None  # predicted by the segmenter for this mask
    prompt: Prompt
    region_id: int  # the prompt's place in the request
    alternatives: tuple[
        tuple[str, float], ...
    ] = ()  # further captions that were asked for, and their scores, best first
    usage: TokenUsage | None = None  # None where no language model wrote the captions, or its tokens are not counted

    @property
    def array(self) -> np.ndarray | None:
        """The mask as (height, width) bool, in the image's own pixels; None without a mask."""
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
    name: str | None = None  # the class name: what the task `recognition` learns
    phrases: tuple[str, ...] = ()  # true sentences, the most telling last: what the task `caption` learns
    attributes: dict[str, Any] = field(default_factory=dict)  # exact facts, where a dataset has them


class Sample(NamedTuple):
    image: Image.Image
    image_id: int
    regions: tuple[Region, ...]


class Proposals(NamedTuple):
    """Regions that nobody asked for by hand: prompts in image pixels, how good each is, and names where known."""

    prompts: tuple[Prompt, ...]
    scores: tuple[float, ...]
    names: tuple[str | None, ...]


class MetricOutput(NamedTuple):
    """What a metric found.

    total: shares in 0..1 (or what else the metric says) as floats, NaN where nothing was there to be counted, and
    counts as whole numbers. each: arrays with one row a thing that was judged (a record, a region, a pair), with
    `image_id` and `region_id` to say which; an array named like a share of `total` has that share as its mean over the
    rows that are not NaN, unless `sums` has the name, too. sums: of a score that is no mean, what each row adds (R, F),
    and the function that gives the score (...) of summed rows (..., F): with it the score of any choice of rows can be
    told. notes: by the name of a score, why it is not a number.
    """

    values: dict[str, float]
    per_record: dict[str, np.ndarray] | None = None
    statistics: dict[str, tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]] | None = None
    notes: dict[str, str] | None = None


# --- what a part of each kind must do -------------------------------------------------------------------------------


@runtime_checkable
class Encoder(Protocol):
    """factory(**options). Called with (B, 3, S, S) pixels, gives (B, C, S/stride, S/stride) features."""

    image_format: ImageFormat
    channels: int
    stride: int
    default_segmenter: str
    checkpoint: str | None

    def __call__(self, pixel_values: Tensor) -> Tensor: ...


@runtime_checkable
class Segmenter(Protocol):
    """factory(encoder, **options). May have `loss(regions, targets) -> dict` when it can be trained."""

    channels: int

    def __call__(self, features: Tensor, prompts: PromptBatch, multimask_output: bool = True) -> SegmenterOutput: ...


@runtime_checkable
class Mixer(Protocol):
    """factory(segmenter, **options). Gives (N, Q, D).

    May have `prepare(image, position)`, of the whole images' features (B, D, h, w) and the position code (D, h, w):
    what is computed once an image. What it gives may then be a second argument, for any regions of the same images.
    """

    hidden_size: int
    num_queries: int
    uses_grid: bool

    def __call__(self, regions: SegmenterOutput) -> Tensor: ...


@runtime_checkable
class Tokenizer(Protocol):
    """Words to ids and back. `encode` ends with `eos` and adds no beginning: the visual prefix stands in its place."""

    pad_token_id: int
    eos_token_id: int

    def encode(self, text: str, max_length: int | None = None) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@runtime_checkable
class LanguageModel(Protocol):
    """factory(**options). A causal language model fed with embeddings."""

    hidden_size: int
    tokenizer: Tokenizer | None

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """(N, L) ids -> (N, L, E)."""

    def hidden_states(self, embeddings: Tensor, attention_mask: Tensor) -> Tensor:
        """(N, S, E), (N, S) -> (N, S, E): the last layer's states."""

    def lm_head(self, hidden_states: Tensor) -> Tensor:
        """(..., E) -> (..., V)."""

    def generate(self, prefix: Tensor, max_new_tokens: int, **generation: Any) -> GenerationOutput:
        """(N, K, E) -> at most `max_new_tokens` ids a caption, the prefix not counted."""

    def add_lora(self, rank: int, alpha: float, dropout: float, targets: Sequence[str] | None) -> None:
        """Adds LoRA to the named linear layers (or those that suit the architecture)."""


@runtime_checkable
class Dataset(Protocol):
    """factory(split, **options).

    May have `attributes`, the values that each attribute of its regions can have, for auxiliary losses to name; and
    `between`, those of them that are about a region and another one, and so not to be seen in the region itself.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@runtime_checkable
class Metric(Protocol):
    """factory(**options). `needs`: what must be in a record, such as "mask", "truth.mask" or "task=caption".

    One that needs "image" is called with a second argument, which gives the picture of a record: (records, images).
    Options that are called `references` and `tokenizer` are the protocol's. May have `implementation`, whose code it is
    with its version; `whole = True` to be given the answers to misleading prompts (controls) with the others, and not
    by themselves; and, in its class or its card, `scores`, the names of its scores (`class/*` for any that begin so),
    by which a score is known before it is computed.
    """

    needs: tuple[str, ...]

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> MetricOutput: ...


@runtime_checkable
class Proposer(Protocol):
    """factory(**options)."""

    def __call__(self, image: Image.Image, image_id: int | str) -> Proposals: ...


@runtime_checkable
class Captioner(Protocol):
    """factory(**options). What evaluate, demo and serve use: a composed model is one, so are the baselines."""

    def caption(
        self, image: Image.Image, prompts: Sequence[Prompt], task: str = "caption", **generation: Any
    ) -> list[Caption]: ...


@runtime_checkable
class Launcher(Protocol):
    """factory(**options). Runs tasks, see `sca.launchers.task`, and yields their outcomes as they end."""

    def map(self, tasks: Sequence[Any]) -> Iterator[Any]: ...


class ComponentKind(NamedTuple):
    """One kind of part: how people name it, where plugins offer it, and what a built one must be."""

    plural: str
    singular: str
    protocol: type
    upstream_kind: str | None = None  # the kind whose built part is the factory's first argument
    first_argument: str | None = None  # another required first argument

    @property
    def entry_point_group(self) -> str:
        """The entry-point group that plugins use."""
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
