"""Test harnesses of each kind of component: upstream stand-ins and small inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, Self

import torch
from sca_registry import get_registry
from sca_registry.contracts import DecoderMasks, ImageFormat, PromptBatch, Region, SegmenterOutput
from sca_registry.options import get_factory_options
from torch import Tensor, nn

from sca.testing.conformance.checks import DoesNotApply
from sca.testing.conformance.process_state import capture_process_state

NUM_IMAGES, IMAGE_INDEX = 3, (0, 0, 0, 2, 2)  # the second image has no region
IMAGE_SIZE, STRIDE, HIDDEN_SIZE, NUM_MASKS = 64, 8, 32, 3
GRID_SIZE, MASK_SIZE = IMAGE_SIZE // STRIDE, 4 * IMAGE_SIZE // STRIDE
MAX_SAMPLES = 8  # samples to read of a dataset


class StandInEncoder:
    """Minimal encoder with only the attributes that a segmenter may use."""

    image_format: ImageFormat = ImageFormat(size=IMAGE_SIZE)
    channels = HIDDEN_SIZE
    stride = STRIDE
    default_segmenter = "box"
    checkpoint = None

    def __call__(self, pixel_values: Tensor) -> Tensor:
        return pixel_values.new_zeros(len(pixel_values), HIDDEN_SIZE, GRID_SIZE, GRID_SIZE)


class StandInSegmenter:
    """Minimal segmenter with only the attributes that a mixer may use."""

    channels = HIDDEN_SIZE
    grid_size = GRID_SIZE

    def __call__(self, features: Tensor, prompts: PromptBatch, multimask_output: bool = True) -> SegmenterOutput:
        return make_random_regions(prompts.image_index, len(features))


def make_random_regions(image_index: Tensor, num_images: int) -> SegmenterOutput:
    """Return random segmenter output with every optional field.

    Args:
        image_index: (N,) image of each region.
        num_images: Number of images.

    Returns:
        The output, on the CPU.
    """
    num_regions, tokens = len(image_index), torch.randn(len(image_index), 3 + NUM_MASKS, HIDDEN_SIZE)
    corner = torch.rand(num_regions, 2) * IMAGE_SIZE / 2
    output = SegmenterOutput(
        image_index=image_index,
        image_embeddings=torch.randn(num_images, HIDDEN_SIZE, GRID_SIZE, GRID_SIZE),
        image_size=IMAGE_SIZE,
        dense_embeddings=torch.randn(num_regions, HIDDEN_SIZE, GRID_SIZE, GRID_SIZE),
        positional_encoding=torch.randn(HIDDEN_SIZE, GRID_SIZE, GRID_SIZE),
        prompt_tokens=tokens[:, NUM_MASKS:],
        tokens=tokens,
        mask_tokens=tokens[:, :NUM_MASKS],
        grid=torch.randn(num_regions, HIDDEN_SIZE, GRID_SIZE, GRID_SIZE),
        masks=(masks := torch.randn(num_regions, NUM_MASKS, MASK_SIZE, MASK_SIZE)),
        iou_scores=(iou_scores := torch.rand(num_regions, NUM_MASKS)),
        boxes=torch.cat((corner, corner + IMAGE_SIZE / 4), dim=1),
    )
    single = torch.randn(num_regions, 1, MASK_SIZE, MASK_SIZE), torch.rand(num_regions, 1), tokens[:, -1:]
    pairs = zip(single, (masks, iou_scores, tokens[:, :NUM_MASKS]), strict=True)
    output.decoder_masks = DecoderMasks(*(torch.cat(pair, dim=1) for pair in pairs))
    return output


class ComponentHarness:
    """Component under test, and its factory.

    Args:
        kind: Kind of the component (plural).
        component: Registered name, or factory.
        options: Options of the factory.
    """

    upstream: tuple[Any, ...] = ()

    def __init__(self, kind: str, component: str | Callable[..., Any], options: Mapping[str, Any]):
        self.kind = kind
        self.name: str | None = component if isinstance(component, str) else None
        self.factory: Callable[..., Any] = (
            partial(get_registry(kind).build, component) if isinstance(component, str) else component
        )
        self.options: dict[str, Any] = dict(options)
        # Captured before the component is imported, unless this process has already used it.
        self.initial_state: dict[str, Any] = capture_process_state()

    def build(self, seed: int = 0) -> Any:
        """Build the component in eval mode with seeded random weights."""
        torch.manual_seed(seed)
        component = self.factory(*self.upstream, **self.options)
        return component.eval() if isinstance(component, nn.Module) else component

    @cached_property
    def component(self) -> Any:
        """Component, built once with seed 0."""
        return self.build()

    def build_module(self, seed: int = 0) -> nn.Module:
        """Build a new instance for checks that modify it. Raises DoesNotApply if it is not a torch module."""
        component = self.build(seed)
        if not isinstance(component, nn.Module):
            raise DoesNotApply(f"{type(component).__name__} is not a torch.nn.Module")
        return component

    def get_declared_value(self, field: str) -> Any:
        """Return the value of a field, such as `provides` or `requires`, of the card or class."""
        return (
            get_registry(self.kind).get_declared(self.name, field) if self.name else getattr(self.factory, field, None)
        )

    @property
    def default_options(self) -> Mapping[str, Any]:
        """Options of the factory with their defaults, `REQUIRED` for an option without one."""
        if self.name:
            return get_registry(self.kind).load_entry(self.name).options
        return get_factory_options(self.factory, len(self.upstream))

    def collect_integer_options(self) -> dict[str, int]:
        """Return the integer options with their present values."""
        options = {**self.default_options, **self.options}
        return {
            name: value for name, value in options.items() if isinstance(value, int) and not isinstance(value, bool)
        }

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """Return a harness of the same component with other options."""
        return type(self)(self.kind, self.name or self.factory, {**self.options, **options})


class TensorHarness(ComponentHarness, ABC):
    """Harness of components that compute tensors. Subclasses define the inputs and outputs of a kind."""

    @abstractmethod
    def make_inputs(self) -> Any:
        """Return the inputs of a forward pass, equal on every call."""

    def count_rows(self, inputs: Any) -> int:
        """Return the number of input rows."""
        return len(inputs)

    def select_rows(self, inputs: Any, rows: Sequence[int]) -> Any:
        """Select rows of the inputs."""
        return inputs[rows]

    def cast_inputs(self, inputs: Any, dtype: torch.dtype) -> Any:
        """Cast the inputs to a dtype, except coordinates."""
        return inputs.to(dtype)

    def list_upstream_tensors(self, inputs: Any) -> list[Tensor]:
        """Return the floating-point tensors that upstream components produce."""
        return [inputs]

    @abstractmethod
    def compute_outputs(self, component: Any, inputs: Any) -> dict[str, Tensor]:
        """Run a component and return its output tensors by name, with one row per input row."""


class EncoderHarness(TensorHarness):
    """Harness of encoders."""

    def make_inputs(self) -> Tensor:
        size = self.component.image_format.size
        return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))

    def compute_outputs(self, component: Any, inputs: Tensor) -> dict[str, Tensor]:
        return {"features": component(inputs)}


def make_prompts(image_size: int, mask_size: int, generator: torch.Generator) -> dict[str, PromptBatch]:
    """Return a batch with varying regions per image, `IMAGE_INDEX`, for every kind of prompt.

    Args:
        image_size: Side of the model input in pixels.
        mask_size: Side of mask prompts.
        generator: Random generator.

    Returns:
        Prompts by the name of their kind.
    """
    image_index, num_regions = torch.tensor(IMAGE_INDEX), len(IMAGE_INDEX)
    corner = torch.rand(num_regions, 2, generator=generator) * image_size / 2
    extent = image_size / 8 + torch.rand(num_regions, 2, generator=generator) * image_size / 4
    boxes = torch.cat((corner, corner + extent), dim=1)
    points = torch.rand(num_regions, 2, 2, generator=generator) * image_size
    positive_labels = torch.ones(num_regions, 1, dtype=torch.long)
    mixed_labels = torch.tensor([[1, 0]]).expand(num_regions, 2)
    masks = torch.randn(num_regions, 1, mask_size, mask_size, generator=generator) * 5
    return {
        "box": PromptBatch(image_index, boxes=boxes),
        "point": PromptBatch(image_index, points=points[:, :1], labels=positive_labels),
        "two points": PromptBatch(image_index, points=points, labels=mixed_labels),
        "box and points": PromptBatch(image_index, boxes=boxes, points=points, labels=mixed_labels),
        "mask": PromptBatch(image_index, masks=masks),
        "box and mask": PromptBatch(image_index, boxes=boxes, masks=masks),
    }


@dataclass
class SegmenterInputs:
    """Inputs of a segmenter: features, and the same regions as each kind of prompt."""

    features: Tensor
    prompts: dict[str, PromptBatch]


class SegmenterHarness(TensorHarness):
    """Harness of segmenters."""

    upstream: tuple[Any, ...] = (StandInEncoder(),)
    OUTPUT_FIELDS = ("prompt_tokens", "tokens", "mask_tokens", "grid", "masks", "iou_scores", "boxes")

    def make_all_inputs(self) -> SegmenterInputs:
        """Return features of images, and their regions as every kind of prompt."""
        generator = torch.Generator().manual_seed(1)
        prompts = make_prompts(IMAGE_SIZE, MASK_SIZE, generator)
        return SegmenterInputs(torch.randn(NUM_IMAGES, HIDDEN_SIZE, GRID_SIZE, GRID_SIZE, generator=generator), prompts)

    @cached_property
    def accepted_prompt_types(self) -> tuple[str, ...]:
        """Kinds of prompt that the segmenter accepts without a ValueError; always includes boxes."""
        all_inputs, accepted = self.make_all_inputs(), ["box"]
        for prompt_type, prompts in all_inputs.prompts.items():
            if prompt_type != "box":
                try:
                    self.component(all_inputs.features, prompts)
                    accepted.append(prompt_type)
                except ValueError:
                    continue
        return tuple(accepted)

    def make_inputs(self) -> SegmenterInputs:
        all_inputs = self.make_all_inputs()
        return SegmenterInputs(
            all_inputs.features, {kind: all_inputs.prompts[kind] for kind in self.accepted_prompt_types}
        )

    def count_rows(self, inputs: SegmenterInputs) -> int:
        return len(IMAGE_INDEX)

    def select_rows(self, inputs: SegmenterInputs, rows: Sequence[int]) -> SegmenterInputs:
        image_index = torch.tensor(IMAGE_INDEX)[rows]
        kept_images = image_index.unique()
        prompts = {kind: each[rows] for kind, each in inputs.prompts.items()}
        prompts = {
            kind: replace(each, image_index=torch.searchsorted(kept_images, each.image_index))
            for kind, each in prompts.items()
        }
        return SegmenterInputs(inputs.features[kept_images], prompts)

    def cast_inputs(self, inputs: SegmenterInputs, dtype: torch.dtype) -> SegmenterInputs:
        return SegmenterInputs(inputs.features.to(dtype), inputs.prompts)  # prompts are coordinates and stay exact

    def list_upstream_tensors(self, inputs: SegmenterInputs) -> list[Tensor]:
        return [inputs.features]

    def compute_outputs(self, component: Any, inputs: SegmenterInputs) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        runs = [(prompt_type, prompt_type, True) for prompt_type in inputs.prompts]
        for name, prompt_type, multimask in [*runs, ("box, one mask", "box", False)]:
            segmenter_output = component(inputs.features, inputs.prompts[prompt_type], multimask)
            values = {field: getattr(segmenter_output, field) for field in self.OUTPUT_FIELDS}
            values["image_embeddings"] = segmenter_output.image_embeddings[segmenter_output.image_index]
            dense_embeddings = segmenter_output.dense_embeddings
            values["dense_embeddings"] = (
                dense_embeddings
                if dense_embeddings.dim() == 4
                else dense_embeddings.expand(len(segmenter_output), *dense_embeddings.shape)
            )
            outputs |= {f"{field} by {name}": value for field, value in values.items() if value is not None}
        return outputs


SHARED_FIELDS = ("image_index", "image_embeddings", "image_size", "positional_encoding")  # no row per region


class MixerHarness(TensorHarness):
    """Harness of mixers."""

    upstream: tuple[Any, ...] = (StandInSegmenter(),)
    REGION_FIELDS = tuple(each.name for each in fields(SegmenterOutput) if each.name not in SHARED_FIELDS)

    def make_inputs(self) -> SegmenterOutput:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return make_random_regions(torch.tensor(IMAGE_INDEX), NUM_IMAGES)

    def select_rows(self, inputs: SegmenterOutput, rows: Sequence[int]) -> SegmenterOutput:
        kept_images = inputs.image_index[rows].unique()
        fields_of_rows = {name: getattr(inputs, name)[rows] for name in self.REGION_FIELDS}
        image_index = torch.searchsorted(kept_images, inputs.image_index[rows])
        image_embeddings = inputs.image_embeddings[kept_images]
        return replace(inputs, image_index=image_index, image_embeddings=image_embeddings, **fields_of_rows)

    def cast_inputs(self, inputs: SegmenterOutput, dtype: torch.dtype) -> SegmenterOutput:
        exact_fields = ("image_index", "image_size", "boxes")
        field_names = [each.name for each in fields(SegmenterOutput) if each.name not in exact_fields]
        return replace(inputs, **{name: getattr(inputs, name).to(dtype) for name in field_names})

    def list_upstream_tensors(self, inputs: SegmenterOutput) -> list[Tensor]:
        names = ("image_embeddings", "tokens", "grid", "prompt_tokens", "mask_tokens", "masks")
        return [getattr(inputs, name) for name in names]

    def compute_outputs(self, component: Any, inputs: SegmenterOutput) -> dict[str, Tensor]:
        return {"queries": component(inputs)}

    def collect_needs(self) -> set[str]:
        """Return which of masks, boxes and grid the mixer requires with its present options."""
        required = set(self.get_declared_value("requires") or ())
        if self.name:
            card = get_registry(self.kind).get_card(self.name)
            options = {**card.options, **self.options}
            required.update(
                output for option, outputs in card.option_requires.items() if options.get(option) for output in outputs
            )
        return required


@dataclass
class LanguageModelInputs:
    """Inputs of a language model: token ids padded on the right, their mask, and prefixes."""

    input_ids: Tensor  # (N, L)
    attention_mask: Tensor  # (N, L)
    prefix: Tensor  # (N, K, E)


class LanguageModelHarness(TensorHarness):
    """Harness of language models."""

    LENGTHS = (6, 3, 1)

    def make_inputs(self) -> LanguageModelInputs:
        generator = torch.Generator().manual_seed(1)
        num_texts, max_length = len(self.LENGTHS), max(self.LENGTHS)
        tokenizer = self.component.tokenizer
        vocab_size = self.vocab_size
        input_ids = torch.randint(vocab_size, (num_texts, max_length), generator=generator)
        attention_mask = (torch.arange(max_length) < torch.tensor(self.LENGTHS)[:, None]).long()
        input_ids = input_ids.masked_fill(attention_mask == 0, tokenizer.pad_token_id if tokenizer is not None else 0)
        embedding_std = self.component.embed_tokens(torch.arange(min(vocab_size, 64))[None]).float().std().item()
        return LanguageModelInputs(
            input_ids,
            attention_mask,
            torch.randn(num_texts, 3, self.component.hidden_size, generator=generator) * embedding_std,
        )

    @cached_property
    def vocab_size(self) -> int:
        """Size of the last dimension of the logits."""
        return self.component.lm_head(torch.zeros(1, self.component.hidden_size)).shape[-1]

    def count_rows(self, inputs: LanguageModelInputs) -> int:
        return len(inputs.input_ids)

    def select_rows(self, inputs: LanguageModelInputs, rows: Sequence[int]) -> LanguageModelInputs:
        max_length = int(inputs.attention_mask[rows].sum(1).max())
        return LanguageModelInputs(
            inputs.input_ids[rows][:, :max_length], inputs.attention_mask[rows][:, :max_length], inputs.prefix[rows]
        )

    def cast_inputs(self, inputs: LanguageModelInputs, dtype: torch.dtype) -> LanguageModelInputs:
        return replace(inputs, prefix=inputs.prefix.to(dtype))

    def list_upstream_tensors(self, inputs: LanguageModelInputs) -> list[Tensor]:
        return [inputs.prefix]

    def compute_outputs(self, component: Any, inputs: LanguageModelInputs) -> dict[str, Tensor]:
        embeddings = component.embed_tokens(inputs.input_ids)
        attention_mask = torch.cat(
            (inputs.attention_mask.new_ones(inputs.prefix.shape[:2]), inputs.attention_mask), dim=1
        )
        hidden_states = component.hidden_states(
            torch.cat((inputs.prefix, embeddings.to(inputs.prefix.dtype)), dim=1), attention_mask
        )
        outputs = {
            "embeddings": embeddings * inputs.attention_mask[..., None],
            "states": hidden_states * attention_mask[..., None],
        }
        outputs["logits"] = component.lm_head(hidden_states) * attention_mask[..., None]
        padding = max(self.LENGTHS) - inputs.input_ids.shape[1]
        return {name: nn.functional.pad(value, (0, 0, 0, padding)) for name, value in outputs.items()}


class DatasetHarness(ComponentHarness):
    """Harness of datasets."""

    def __init__(self, kind: str, component: str | Callable[..., Any], options: Mapping[str, Any]):
        super().__init__(kind, component, {name: value for name, value in options.items() if name != "split"})
        self.upstream: tuple[Any, ...] = (options.get("split", "val"),)

    def read_samples(self) -> list[Any]:
        """Return the first `MAX_SAMPLES` samples."""
        return [self.component[index] for index in range(min(MAX_SAMPLES, len(self.component)))]

    def iter_regions(self) -> Iterator[tuple[Any, Region]]:
        """Iterate over the regions of the first samples, each with its sample."""
        return ((sample, region) for sample in self.read_samples() for region in sample.regions)


HARNESSES: dict[str, type[ComponentHarness]] = {
    "encoders": EncoderHarness,
    "segmenters": SegmenterHarness,
    "mixers": MixerHarness,
    "language_models": LanguageModelHarness,
    "datasets": DatasetHarness,
}
TENSOR_KINDS = ("encoders", "segmenters", "mixers", "language_models")
