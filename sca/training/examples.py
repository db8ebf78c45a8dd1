"""Training examples: sampling from annotated images, and collation into batches.

All random draws are functions of the seed and the position in the stream, never of global state. A resumed run
therefore gets exactly the examples that the interrupted one would have had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from sca_registry.contracts import (
    CAPTION_TASK_ID,
    RECOGNITION_TASK_ID,
    Batch,
    Dataset,
    MaskTargets,
    PromptBatch,
    Question,
    QuestionBatch,
    Region,
    Sample,
    Tokenizer,
    list_region_references,
)
from torch import Tensor

from sca.data.point_prompts import sample_point
from sca.inference.processor import MASK_PROMPT_LOGIT, Processor
from sca.io.masks import decode_rle
from sca.language_models.questions import (
    LENGTH_REQUESTS,
    EncodedQuestion,
    classify_length,
    encode_question,
    expand_references,
)
from sca.nn.boxes import rasterize_boxes
from sca.training.auxiliary_losses import UNKNOWN_LABEL
from sca.training.recipe import SamplingOptions
from sca.training.template_phrases import add_template_phrases

if TYPE_CHECKING:
    from sca.training.augmentation import Augmentation, Box
    from sca.training.feature_cache import FeatureCache


class ExampleQuestion(NamedTuple):
    """Question about regions of an example.

    Attributes:
        question: Question.
        region_indices: Index of each of its regions in the example.
    """

    question: Question
    region_indices: tuple[int, ...]


# fields of an example with one row per region
REGION_FIELDS = ("boxes", "points", "masks", "has_mask", "image_boxes", "aspect_ratios")


@dataclass
class Example:
    """One image with R regions and T texts; boxes and points are in pixels of the S x S model input.

    Masks contain the fraction of each of the (4h, 4w) cells that the region covers.
    """

    pixel_values: Tensor | None  # (3, S, S)
    features: Tensor | None  # (C, h, w), None unless cached
    boxes: Tensor  # (R, 4)
    points: Tensor  # (R, 1, 2)
    masks: Tensor  # (R, 4h, 4w)
    valid_pixels: Tensor  # (4h, 4w)
    has_mask: Tensor  # (R,)
    input_ids: list[list[int]]  # T texts
    questions: list[
        EncodedQuestion | None
    ]  # T questions that the texts answer, or prompts of tasks; the id -n is region n - 1 of this image
    task_ids: Tensor  # (T,)
    region_index: Tensor  # (T,) region of each text, in 0..R-1
    image_boxes: Tensor  # (R, 4) whole image that the phrases of the region refer to; larger than a crop
    aspect_ratios: Tensor  # (R,) width of that image divided by its height
    labels: dict[str, Tensor]  # (R,) index of the value by attribute, or `UNKNOWN_LABEL`
    image_size: int  # S
    prompt_kind: str = "box"  # kind of the whole step

    def select_first_regions(self, count: int) -> Example:
        """Select the first `count` regions, whose order is random, and the texts about them only."""
        last_regions = [max(question.regions, default=0) if question else 0 for question in self.questions]
        is_kept = (self.region_index < count) & (torch.tensor(last_regions) <= count)
        return replace(
            self,
            **{name: getattr(self, name)[:count] for name in REGION_FIELDS},
            input_ids=[*compress(self.input_ids, is_kept.tolist())],
            questions=[*compress(self.questions, is_kept.tolist())],
            task_ids=self.task_ids[is_kept],
            region_index=self.region_index[is_kept],
            labels={name: labels[:count] for name, labels in self.labels.items()},
        )


class ExampleStream(torch.utils.data.Dataset[Example]):
    """Examples of one dataset, over as many epochs as needed, each in its own random order.

    Args:
        dataset: Dataset.
        processor: Processor of the encoder.
        tokenizer: Tokenizer of the language model.
        sampling_options: Sampling options for regions and texts.
        length: Number of examples.
        seed: Random seed.
        attributes: Possible values by attribute, for `Example.labels`.
        augment: Random augmentation of samples.
        phrase_mode: "dataset" or "template", see `DataSource`.
        class_name_task: Task of class names, see `DataSource`.
        cache: Cached features to return instead of pixel values.
        prompt_template: Text around questions, see `ModelSpec.prompt_template`.
        task_prompts: Prompt by task id; empty for a model with learned task tokens.
        has_geometry: Whether the model receives the boxes of regions, see `ModelSpec.geometry`.
    """

    def __init__(
        self,
        dataset: Dataset,
        processor: Processor,
        tokenizer: Tokenizer,
        sampling_options: SamplingOptions,
        length: int,
        seed: int = 0,
        attributes: Mapping[str, Sequence[str]] | None = None,
        augment: Augmentation | None = None,
        phrase_mode: str = "dataset",
        class_name_task: str = "recognition",
        cache: FeatureCache | None = None,
        prompt_template: str | None = None,
        task_prompts: Sequence[EncodedQuestion] = (),
        has_geometry: bool = False,
    ):
        self.dataset = dataset
        self.processor = processor
        self.tokenizer = tokenizer
        self.sampling_options = sampling_options
        self.length = length
        self.seed = seed
        self.attributes: Mapping[str, Sequence[str]] = attributes or {}
        self.augment: Augmentation | None = augment
        self.phrase_mode = phrase_mode
        self.class_name_task = class_name_task
        self.cache = cache
        self.prompt_template = prompt_template
        self.task_prompts = task_prompts
        self.has_geometry = has_geometry
        self._epoch_order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=int))

    def __len__(self) -> int:
        return self.length

    def get_sample_index(self, position: int) -> int:
        """Return the dataset index of the sample at a position of the stream."""
        epoch, offset = divmod(position, len(self.dataset))
        if self._epoch_order[0] != epoch:
            self._epoch_order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset)))
        return int(self._epoch_order[1][offset])

    def get_sample_indices(self, count: int) -> set[int]:
        """Return the dataset indices of the samples at the first `count` positions."""
        return (
            set(range(len(self.dataset)))
            if count >= len(self.dataset)
            else set(map(self.get_sample_index, range(count)))
        )

    def __getitem__(self, position: int) -> Example:
        rng = np.random.default_rng([self.seed, 1, position])
        sample = original = self.dataset[self.get_sample_index(position)]
        whole_image = None
        if self.augment:
            augmented, box = self.augment.augment_with_box(original, rng)
            # a crop may remove all regions or texts
            if augmented.regions and (self._has_texts(augmented) or not self._has_texts(original)):
                sample, whole_image = augmented, box
        # places in the phrases and questions of the dataset refer to the whole image, those in template phrases only if
        # the model receives boxes, and to the crop otherwise
        question_region_ids = self._list_question_region_ids(sample)
        whole_images = {
            region.id: whole_image
            for region in sample.regions
            if self.has_geometry or region.phrases or region.id in question_region_ids
        }
        if self.phrase_mode == "template":
            sample = add_template_phrases(sample, original, whole_image if self.has_geometry else None)
        return self._build_example(sample, whole_images, rng, position / self.length)

    def _has_texts(self, sample: Sample) -> bool:
        return any(region.name or region.phrases for region in sample.regions) or bool(self._list_questions(sample))

    def _list_question_region_ids(self, sample: Sample) -> set[int]:
        return {region_id for question in self._list_questions(sample) for region_id in question.region_ids}

    def _list_questions(self, sample: Sample) -> tuple[Question, ...]:
        """Return the questions of a sample; none if no text is to be an answer."""
        return sample.questions if self.sampling_options.question_prob else ()

    def _group_questions(self, sample: Sample, regions: Sequence[Region]) -> dict[int, list[ExampleQuestion]]:
        """Return the questions about the given regions only, by the index of the region whose prefix they follow."""
        index_by_id = {region.id: index for index, region in enumerate(regions)}
        questions: dict[int, list[ExampleQuestion]] = {}
        for question in self._list_questions(sample):
            indices = [index_by_id.get(region_id) for region_id in question.region_ids]
            known = [index for index in indices if index is not None]
            if len(known) == len(indices):
                references = list_region_references(question.text)
                main_region = known[references[0] - 1 if references else 0]
                questions.setdefault(main_region, []).append(ExampleQuestion(question, tuple(known)))
        return questions

    def _build_example(
        self, sample: Sample, whole_images: Mapping[int, Box | None], rng: np.random.Generator, progress: float
    ) -> Example:
        frame = self.processor.compute_frame(*sample.image.size)
        question_region_ids = self._list_question_region_ids(sample)
        regions = [r for r in sample.regions if r.name or r.phrases or r.id in question_region_ids]
        regions = [regions[i] for i in rng.permutation(len(regions))[: self.sampling_options.max_regions]]
        questions = self._group_questions(sample, regions)
        mask_size, image_size = 4 * self.processor.grid_size, self.processor.image_format.size
        texts, boxes, points, masks = [], [], [], []
        for index, region in enumerate(regions):
            has_text = region.name or region.phrases or index in questions
            samples = (
                self._sample_text(region, questions.get(index, ()), rng, progress)
                for _ in range(self.sampling_options.captions_per_region if has_text else 0)
            )
            texts += [(index, *sampled) for sampled in dict.fromkeys(samples)]
            boxes.append(_jitter_box(region.box, self.sampling_options.box_jitter, rng))
            mask = None if region.mask is None else decode_rle(region.mask)
            points.append(sample_point(region, mask, rng))
            masks.append(
                torch.zeros(mask_size, mask_size) if mask is None else self.processor.compute_coverage(mask, frame)
            )
        scale = torch.tensor(frame.scale)
        region_frames = [frame._replace(whole_image=whole_images.get(region.id)) for region in regions]
        labels = {
            name: torch.tensor([_get_label(values, _get_attribute(r, name)) for r in regions], dtype=torch.long)
            for name, values in self.attributes.items()
        }
        return Example(
            pixel_values=self.processor.preprocess_images([sample.image])[0] if self.cache is None else None,
            features=None if self.cache is None else self.cache[sample.image],
            boxes=(torch.tensor(boxes).reshape(-1, 2, 2) * scale).flatten(1).clamp(0, image_size),
            points=torch.tensor(points).reshape(-1, 1, 2) * scale,
            masks=torch.stack(masks) if masks else torch.zeros(0, mask_size, mask_size),
            valid_pixels=self.processor.compute_valid_cells(frame),
            has_mask=torch.tensor([r.mask is not None for r in regions], dtype=torch.bool),
            input_ids=[self.tokenizer.encode(text, self.sampling_options.max_tokens) for _, _, text, _ in texts],
            questions=[self._encode_question(question, task) for _, task, _, question in texts],
            task_ids=torch.tensor([task for _, task, _, _ in texts], dtype=torch.long),
            region_index=torch.tensor([index for index, *_ in texts], dtype=torch.long),
            image_boxes=torch.tensor([each.whole_image_box for each in region_frames]).reshape(-1, 4),
            aspect_ratios=torch.tensor([each.aspect_ratio for each in region_frames]),
            labels=labels,
            image_size=image_size,
        )

    def _encode_question(self, question: ExampleQuestion | None, task: int) -> EncodedQuestion | None:
        """Return the token ids of a question, with references to the regions of the example, or of the task's prompt.

        None for a caption of a model with learned task tokens.
        """
        if question is None:
            return self.task_prompts[task] if self.task_prompts else None
        encoded = encode_question(self.tokenizer, question.question.text, self.prompt_template)
        after = [token if token >= 0 else -1 - question.region_indices[-token - 1] for token in encoded.after]
        return EncodedQuestion(encoded.before, after)

    def _sample_text(
        self, region: Region, questions: Sequence[ExampleQuestion], rng: np.random.Generator, progress: float
    ) -> tuple[int, str, ExampleQuestion | None]:
        """Sample the task and text of a region, and the question that the text answers, if any.

        `progress` is the fraction of the stream, 0..1.
        """
        options = self.sampling_options
        has_caption = bool(region.name or region.phrases)
        use_question = bool(questions) and progress >= options.class_name_warmup
        use_question = use_question and rng.random() < options.question_prob
        if use_question or not has_caption:
            kinds = [*dict.fromkeys(each.question.kind for each in questions)]
            kind = kinds[rng.integers(len(kinds))]  # kinds with few questions are as frequent as others
            candidates = [each for each in questions if each.question.kind == kind]
            selected = candidates[rng.integers(len(candidates))]
            return CAPTION_TASK_ID, selected.question.answer, selected
        task, text = self._sample_caption(region, rng, progress)
        if options.length_prob and rng.random() < options.length_prob:
            length = Question(LENGTH_REQUESTS[classify_length(text)], text, (region.id,))
            return CAPTION_TASK_ID, text, ExampleQuestion(length, ())
        return task, text, None

    def _sample_caption(self, region: Region, rng: np.random.Generator, progress: float) -> tuple[int, str]:
        """Sample the task and text of a region."""
        options = self.sampling_options
        use_class_name = progress < options.class_name_warmup or rng.random() < options.class_name_prob
        if region.name and (use_class_name or not region.phrases):
            as_caption = self.class_name_task == "caption" or (
                self.class_name_task == "both" and not region.phrases and rng.random() < 0.5
            )
            return CAPTION_TASK_ID if as_caption else RECOGNITION_TASK_ID, region.name
        if progress < options.class_name_warmup + options.short_caption_warmup:
            return CAPTION_TASK_ID, region.phrases[0]
        use_longest = rng.random() < options.longest_caption_prob
        return CAPTION_TASK_ID, region.phrases[-1 if use_longest else rng.integers(len(region.phrases))]


class ExampleMixture(torch.utils.data.Dataset[Example]):
    """Random mixture of streams in proportion to their weights.

    The prompt kind is drawn once per step, so that it is the same in all processes.

    Args:
        streams: Streams.
        weights: Sampling weights of the streams.
        length: Number of examples.
        seed: Random seed.
        prompt_weights: Sampling weights of the prompt kinds; only boxes by default.
        examples_per_step: Examples per step, over all processes.
    """

    def __init__(
        self,
        streams: Sequence[ExampleStream],
        weights: Sequence[float],
        length: int,
        seed: int = 0,
        prompt_weights: Mapping[str, float] | None = None,
        examples_per_step: int = 1,
    ):
        self.streams = streams
        self.examples_per_step = examples_per_step
        rng = np.random.default_rng([seed, 2])
        self._stream_indices = rng.choice(len(streams), size=length, p=np.asarray(weights) / sum(weights))
        self._stream_positions = np.zeros(length, dtype=int)  # position in the stream
        for index in range(len(streams)):
            is_selected = self._stream_indices == index
            self._stream_positions[is_selected] = np.arange(is_selected.sum())
        kinds, probabilities = zip(*(prompt_weights or {"box": 1.0}).items(), strict=True)
        rng = np.random.default_rng([seed, 3])
        self._prompt_kinds = rng.choice(
            kinds, size=-(-length // examples_per_step), p=np.asarray(probabilities) / sum(probabilities)
        )

    def list_samples(self) -> list[tuple[Dataset, int]]:
        """Return each sample of the mixture once, as a dataset and an index."""
        lengths = np.bincount(self._stream_indices, minlength=len(self.streams))
        sampled = [
            (s, index)
            for s, n in zip(self.streams, lengths, strict=True)
            for index in sorted(s.get_sample_indices(int(n)))
        ]
        return [(stream.dataset, index) for stream, index in sampled]

    def __len__(self) -> int:
        return len(self._stream_indices)

    def __getitem__(self, position: int) -> Example:
        example = self.streams[self._stream_indices[position]][int(self._stream_positions[position])]
        return replace(example, prompt_kind=str(self._prompt_kinds[position // self.examples_per_step]))


def collate_examples(
    examples: Sequence[Example], pad_token_id: int, max_regions: int = 0, embeddings_per_region: int = 0
) -> Batch:
    """Collate examples with any number of regions into one flat batch.

    Args:
        examples: Examples, all with the prompt kind of the first.
        pad_token_id: Id of the padding token.
        max_regions: Maximum number of regions of the batch; 0 for no limit.
        embeddings_per_region: Positions of a region in a question; required if a question refers to regions.

    Returns:
        The batch, on the CPU. Without any text, it has no `input_ids`.

    Raises:
        ValueError: A question refers to regions, and `embeddings_per_region` is 0.
    """
    examples = _limit_regions(examples, max_regions)
    counts = torch.tensor([len(example.boxes) for example in examples])
    region_offsets = counts.cumsum(0) - counts  # regions of earlier examples
    image_index = torch.repeat_interleave(torch.arange(len(examples)), counts)
    texts = [
        _TextTokens.from_example(tokens, question, offset, embeddings_per_region)
        for example, offset in zip(examples, region_offsets.tolist(), strict=True)
        for tokens, question in zip(example.input_ids, example.questions, strict=True)
    ]
    input_ids = attention_mask = None
    if texts:
        input_ids = _pad_rows([text.ids for text in texts], pad_token_id)
        lengths = torch.tensor([len(text.ids) for text in texts])
        attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    targets = MaskTargets(
        masks=torch.cat([example.masks for example in examples]),
        valid_pixels=torch.stack([example.valid_pixels for example in examples])[image_index],
        has_mask=torch.cat([example.has_mask for example in examples]),
    )
    is_cached = examples[0].features is not None
    return Batch(
        pixel_values=None if is_cached else _stack_tensors([example.pixel_values for example in examples]),
        features=_stack_tensors([example.features for example in examples]) if is_cached else None,
        prompts=_build_prompts(examples, image_index, targets),
        task_ids=torch.cat([example.task_ids for example in examples]),
        input_ids=input_ids,
        attention_mask=attention_mask,
        region_index=torch.cat(
            [example.region_index + first for example, first in zip(examples, region_offsets, strict=True)]
        ),
        questions=None if attention_mask is None else _collate_questions(texts, attention_mask),
        targets=targets,
        auxiliary_targets={
            name: torch.cat([example.labels[name] for example in examples]) for name in examples[0].labels
        },
    )


class _TextTokens(NamedTuple):
    """Token ids of a question and its answer, or of a caption.

    Attributes:
        ids: Token ids.
        question: Question; None for a caption.
        num_question_ids: Ids of the question.
        region_index: For each id, the row of the region whose embedding replaces it, or -1.
        embedding_index: For each id, the index of that embedding.
    """

    ids: list[int]
    question: EncodedQuestion | None
    num_question_ids: int
    region_index: list[int]
    embedding_index: list[int]

    @classmethod
    def from_example(
        cls, ids: Sequence[int], question: EncodedQuestion | None, region_offset: int, embeddings_per_region: int
    ) -> _TextTokens:
        """Return the ids of a text after those of its question, whose regions are counted over the whole batch."""
        if question is not None and question.regions and not embeddings_per_region:
            raise ValueError("a question refers to regions; set embeddings_per_region")
        question_ids, slots = expand_references([] if question is None else question.after, embeddings_per_region)
        slots = [*slots, *([None] * len(ids))]
        return cls(
            [*question_ids, *ids],
            question,
            len(question_ids),
            [-1 if slot is None else region_offset + slot[0] - 1 for slot in slots],
            [0 if slot is None else slot[1] for slot in slots],
        )


def _pad_rows(rows: Sequence[Sequence[int]], padding_value: int) -> Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=padding_value)


def _collate_questions(texts: Sequence[_TextTokens], attention_mask: Tensor) -> QuestionBatch | None:
    """Return the questions of a batch; None without any."""
    questions = [text.question for text in texts]
    first_question = next((question for question in questions if question is not None), None)
    if first_question is None:
        return None
    is_answer = torch.arange(attention_mask.shape[1]) >= torch.tensor([[text.num_question_ids] for text in texts])
    return QuestionBatch(
        has_question=torch.tensor([question is not None for question in questions]),
        answer_mask=attention_mask * is_answer,
        region_index=_pad_rows([text.region_index for text in texts], -1),
        embedding_index=_pad_rows([text.embedding_index for text in texts], 0),
        ids_before_prefix=torch.tensor(first_question.before, dtype=torch.long),
    )


def _stack_tensors(tensors: Sequence[Tensor | None]) -> Tensor:
    """Stack the pixel values or features of examples, either of which all examples have."""
    return torch.stack([tensor for tensor in tensors if tensor is not None])


def _limit_regions(examples: Sequence[Example], max_regions: int) -> Sequence[Example]:
    """Limit the total number of regions: examples with few keep all of theirs, the others share the remainder."""
    counts = [len(example.boxes) for example in examples]
    if not 0 < max_regions < sum(counts):
        return examples
    kept_counts, remaining = dict(enumerate(counts)), max_regions
    for rank, index in enumerate(sorted(kept_counts, key=kept_counts.__getitem__)):  # fewest regions first
        kept_counts[index] = min(counts[index], remaining // (len(counts) - rank))
        remaining -= kept_counts[index]
    return [example.select_first_regions(kept_counts[index]) for index, example in enumerate(examples)]


def _build_prompts(examples: Sequence[Example], image_index: Tensor, targets: MaskTargets) -> PromptBatch:
    kind = examples[0].prompt_kind
    boxes, points, image_boxes, aspect_ratios = (
        torch.cat([getattr(example, name) for example in examples])
        for name in ("boxes", "points", "image_boxes", "aspect_ratios")
    )
    masks = None
    if "mask" in kind:
        mask_size = targets.masks.shape[-1]
        rasterized = rasterize_boxes(boxes, mask_size, examples[0].image_size)
        coverage = torch.where(targets.has_mask[:, None, None], targets.masks, rasterized)
        masks = ((coverage * 2 - 1) * MASK_PROMPT_LOGIT).unsqueeze(1)
    return PromptBatch(
        image_index,
        boxes=boxes if "box" in kind else None,
        points=points if "point" in kind else None,
        labels=torch.ones(points.shape[:2], dtype=torch.long) if "point" in kind else None,
        masks=masks,
        image_boxes=image_boxes,
        aspect_ratios=aspect_ratios,
    )


def _jitter_box(box: Sequence[float], jitter: float, rng: np.random.Generator) -> list[float]:
    x1, y1, x2, y2 = box
    sides = np.array([x2 - x1, y2 - y1, x2 - x1, y2 - y1])
    return (np.array(box) + rng.normal(size=4).clip(-2, 2) * jitter * sides).tolist()


def _get_attribute(region: Region, name: str) -> str | None:
    """Return an attribute of a region; the attribute "name" is its class name."""
    return region.name if name == "name" else region.attributes.get(name)


def _get_label(values: Sequence[str], value: str | None) -> int:
    return values.index(value) if value in values else UNKNOWN_LABEL
