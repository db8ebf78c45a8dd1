"""The composed model: encode images, segment regions, mix features and generate captions.

The shape legend is that of `sca_registry.contracts`. W counts the caption tokens, EOS included, of a whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

import torch
from sca_registry import RegistryError
from sca_registry.contracts import (
    Batch,
    ConfidentMasks,
    Encoder,
    GenerationOutput,
    LanguageModel,
    Mixer,
    ModelOutput,
    PromptBatch,
    QuestionBatch,
    Segmenter,
    SegmenterOutput,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sca.hints import MODEL_ATTRIBUTE_HINTS
from sca.io.text import format_count
from sca.language_models.questions import EncodedQuestion, encode_question
from sca.nn.boxes import enclose_prompts
from sca.nn.geometry import GeometryEmbedding, compute_geometry
from sca.nn.masks import select_confident_masks
from sca.nn.projection import Projection
from sca.nn.quantized_layers import count_parameters
from sca.nn.region_batch import concat_segmenter_outputs

if TYPE_CHECKING:
    from sca_registry.spec import ModelSpec

    from sca.uncertainty import Uncertainty

CHARACTERS_PER_TOKEN = 4  # of English text, roughly
LABEL_SMOOTHING = 0.1  # SCA, arXiv 2312.00869
TOKENS_PER_LOSS_CHUNK = 512  # tokens whose logits are in memory at once
NON_FINITE_HINT = "if the model runs in float16, load it with another precision; otherwise, download the weights again"
MAX_SEQUENCES_PER_CALL = 512  # sequences per call of the language model, including beams and samples
MAX_POSITIONS_PER_CALL = 2**15  # positions of their prefixes, which limit long prefixes


class SegmentationModel(nn.Module):
    """Encoder and segmenter: the components that predict masks.

    Args:
        encoder: Image encoder.
        segmenter: Segmenter built for the encoder.
    """

    def __init__(self, encoder: Encoder, segmenter: Segmenter):
        super().__init__()
        self.encoder = encoder
        self.segmenter = segmenter

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Encode a batch of images.

        Args:
            pixel_values: (B, 3, S, S) normalized images.

        Returns:
            Features (B, C, h, w).

        Raises:
            RegistryError: The encoder returns a tensor of the wrong shape.
        """
        grid_size = pixel_values.shape[-1] // self.encoder.stride
        expected_shape = (len(pixel_values), self.encoder.channels, grid_size, grid_size)
        return self._check_shape(self.encoder(pixel_values), expected_shape, "encoder")

    def segment(self, features: Tensor, prompts: PromptBatch, multimask_output: bool = True) -> SegmenterOutput:
        """Segment the prompted regions.

        Args:
            features: (B, C, h, w) features of `encode`.
            prompts: N prompts in pixels of the model input.
            multimask_output: Return all candidate masks of each region (three for SAM) instead of one.

        Returns:
            Masks, scores and tokens of the N regions. The box of a region whose best mask is empty is that of its mask
            prompt, else of its points.
        """
        regions: SegmenterOutput = self.segmenter(features, prompts, multimask_output)
        if regions.boxes is None or prompts.boxes is not None:
            return regions
        half_cell = regions.image_size / regions.image_embeddings.shape[-1] / 2
        prompt_boxes = enclose_prompts(prompts, regions.image_size, half_cell)
        return replace(regions, boxes=torch.where(regions.boxes.any(1, keepdim=True), regions.boxes, prompt_boxes))

    def predict_confident_masks(self, features: Tensor, prompts: PromptBatch, min_iou: float) -> ConfidentMasks:
        """Predict the candidate masks of the prompted regions whose predicted IoU is above a minimum.

        Args:
            features: (B, C, h, w) features of `encode`.
            prompts: N prompts in pixels of the model input.
            min_iou: Minimum predicted IoU.

        Returns:
            The masks above it.

        Raises:
            ValueError: The segmenter predicts no masks.
        """
        predict = getattr(self.segmenter, "predict_confident_masks", None)
        if predict is not None:
            return predict(features, prompts, min_iou)
        regions = self.segment(features, prompts)
        if regions.masks is None:
            raise ValueError(
                f"everything mode requires masks, but {type(self.segmenter).__name__} predicts none; build the model "
                "with segmenter=sam"
            )
        assert regions.iou_scores is not None  # of the masks
        return select_confident_masks(regions.masks, regions.iou_scores, min_iou)

    def _get_component_name(self, kind: str) -> str:
        return type(getattr(self, kind)).__name__

    def _check_shape(self, output: Any, expected_shape: tuple[int, ...], kind: str) -> Tensor:
        """Return the output of a component if it has the shape that the component's attributes declare."""
        if getattr(output, "shape", None) == expected_shape:
            return output
        name = self._get_component_name(kind)
        actual = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise RegistryError(
            f"{kind} {name!r} returns {actual}, expected shape {expected_shape}; run `sca check {kind} {name}`"
        )


class SegmentCaptioner(SegmentationModel):
    """Promptable region captioner: encoder, segmenter, mixer and language model (SCA, arXiv 2312.00869).

    The language model reads a prefix of K positions: task tokens, then projected queries. There is no BOS token: the
    last position of the prefix predicts the first token. With `spec.geometry`, the prefix also contains the box of the
    region. With `spec.tasks`, the prompt of the task follows the prefix. Groups that are not in `spec.trainable` are
    frozen.

    Args:
        spec: Architecture and default options.
        encoder: Image encoder.
        segmenter: Segmenter built for the encoder.
        mixer: Mixer built for the segmenter.
        language_model: Language model, with LoRA adapters if the spec has them.

    Attributes:
        uncertainty: Calibrations and training domain of the checkpoint that the model was loaded from; None if they
            were not measured.
    """

    def __init__(
        self, spec: ModelSpec, encoder: Encoder, segmenter: Segmenter, mixer: Mixer, language_model: LanguageModel
    ):
        super().__init__(encoder, segmenter)
        self.spec = spec
        self.uncertainty: Uncertainty | None = None
        self.mixer = mixer
        self.language_model = language_model
        self.projection: Projection = Projection(mixer.hidden_size, language_model.hidden_size, **spec.projection)
        self.task_tokens: nn.Parameter = nn.Parameter(
            torch.randn(len(spec.task_names), spec.task_tokens, language_model.hidden_size) * 0.02
        )
        self.geometry: GeometryEmbedding | None = (
            None if spec.geometry is None else GeometryEmbedding(language_model.hidden_size)
        )
        self.freeze_parameters()

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name not in MODEL_ATTRIBUTE_HINTS:
                raise
            raise AttributeError(f"{error}; use {MODEL_ATTRIBUTE_HINTS[name]}", name=name) from None

    def _get_component_name(self, kind: str) -> str:
        return getattr(self.spec, kind).name

    def prepare_mixer(self, regions: SegmenterOutput) -> Any:
        """Precompute the mixer inputs that all regions of an image share.

        Args:
            regions: Output of `segment`.

        Returns:
            The argument `prepared` of `mix`; None if the mixer has no `prepare_images` method.
        """
        prepare_images = getattr(self.mixer, "prepare_images", None)
        return None if prepare_images is None else prepare_images(regions.image_embeddings, regions.positional_encoding)

    def mix(self, regions: SegmenterOutput, prepared: Any = None) -> Tensor:
        """Compute the query embeddings (the mixer's outputs) of each region.

        Args:
            regions: Output of `segment`.
            prepared: Output of `prepare_mixer` for the same images; None lets the mixer compute it.

        Returns:
            Query embeddings (N, Q, D).

        Raises:
            RegistryError: The mixer returns a tensor of the wrong shape.
        """
        mixer: Callable[..., Tensor] = self.mixer
        queries = mixer(regions) if prepared is None else mixer(regions, prepared)
        return self._check_shape(queries, (len(regions), self.mixer.num_queries, self.mixer.hidden_size), "mixer")

    @property
    def prefix_length(self) -> int:
        """Positions K of a prefix."""
        return self.spec.task_tokens + (self.spec.geometry == "token") + self.mixer.num_queries

    def compute_geometry(self, regions: SegmenterOutput, prompts: PromptBatch) -> Tensor | None:
        """Compute the boxes of regions relative to their images, for a model that uses them.

        Args:
            regions: Output of `segment`.
            prompts: The prompts of the same regions.

        Returns:
            (N, 5) boxes as fractions of the image, and its aspect ratio; None without `spec.geometry`.

        Raises:
            ValueError: The prompts do not have the boxes of their images.
        """
        return None if self.geometry is None else compute_geometry(regions, prompts)

    def build_prefix(self, queries: Tensor, task_ids: Tensor, geometry: Tensor | None = None) -> Tensor:
        """Build the prefixes of the language model.

        Args:
            queries: (N, Q, D) query embeddings, the output of `mix`.
            task_ids: (N,) task of each region: its index in `spec.task_names`.
            geometry: (N, 5) output of `compute_geometry`; required with `spec.geometry`.

        Returns:
            Prefixes (N, K, E) of task tokens followed by projected query embeddings. `append_task_prompt` adds the
            prompt of the task.

        Raises:
            ValueError: The model uses the geometry of regions, and there is none.
        """
        return torch.cat((self.task_tokens[task_ids], self._embed_regions(queries, geometry)), dim=1)

    def _embed_regions(self, queries: Tensor, geometry: Tensor | None) -> Tensor:
        """Return the part of the prefixes that represents the regions, (N, K - task tokens, E)."""
        embeddings = self.projection(queries)
        if self.geometry is None:
            return embeddings
        if geometry is None:
            raise ValueError(
                "the model uses the geometry of regions; pass the output of compute_geometry to build_prefix"
            )
        geometry_embeddings = self.geometry(geometry).unsqueeze(1)  # (N, 1, E)
        if self.spec.geometry == "token":
            return torch.cat((geometry_embeddings, embeddings), dim=1)
        return embeddings + geometry_embeddings

    @property
    def positions_per_region(self) -> int:
        """Positions of a region in a prefix or a question."""
        return self.prefix_length - self.spec.task_tokens

    def encode_question(self, question: str) -> EncodedQuestion:
        """Convert a question to token ids, within `spec.prompt_template` if the model has one.

        Args:
            question: Text, see `sca.language_models.questions.encode_question`.

        Returns:
            Token ids.

        Raises:
            ValueError: The question is empty or refers to region 0, or the language model has no tokenizer.
        """
        tokenizer = self.language_model.tokenizer
        if tokenizer is None:
            raise ValueError(
                "the language model has no tokenizer, so it reads no text; set `language_model.tokenizer`, or pass "
                "token ids to `append_question`"
            )
        return encode_question(tokenizer, question, self.spec.prompt_template)

    def encode_task_prompt(self, task: str) -> EncodedQuestion | None:
        """Convert the prompt of a task to token ids.

        Args:
            task: Name of the task, one of `spec.task_names`.

        Returns:
            Token ids; None for a model with learned task tokens.

        Raises:
            ValueError: The language model has no tokenizer.
        """
        return None if self.spec.tasks is None else self.encode_question(self.spec.tasks[task])

    def append_task_prompt(self, prefix: Tensor, task: str) -> Tensor:
        """Append the prompt of a task to the prefixes of regions.

        Args:
            prefix: (N, K, E) prefixes, the output of `build_prefix`.
            task: Name of the task, one of `spec.task_names`.

        Returns:
            (N, K', E) prefixes with the text before and after each region; unchanged for a model with learned task
            tokens.

        Raises:
            ValueError: The language model has no tokenizer.
        """
        prompt = self.encode_task_prompt(task)
        return prefix if prompt is None else self.append_question(prefix, prompt)

    def count_prefix_positions(self, task: str = "caption") -> int:
        """Count the positions of a prefix with the prompt of a task.

        Args:
            task: Name of the task, one of `spec.task_names`.

        Returns:
            Positions K' before the caption; estimated from the length of the text if the language model has no
            tokenizer.
        """
        if self.spec.tasks is None:
            return self.prefix_length
        if self.language_model.tokenizer is None:
            num_characters = len(self.spec.tasks[task]) + len(self.spec.prompt_template or "")
            return self.prefix_length + num_characters // CHARACTERS_PER_TOKEN
        return self.count_question_positions(self.encode_question(self.spec.tasks[task]))

    def count_question_positions(self, question: EncodedQuestion) -> int:
        """Count the positions of a prefix with a question.

        Args:
            question: Output of `encode_question`.

        Returns:
            Positions K' before the answer.
        """
        num_references = sum(token < 0 for token in question.after)
        num_tokens = len(question.before) + len(question.after) - num_references
        return num_tokens + self.prefix_length + num_references * self.positions_per_region

    def append_question(self, prefix: Tensor, question: EncodedQuestion) -> Tensor:
        """Append a question to the prefixes of regions. The generated caption is its answer.

        Args:
            prefix: (N, K, E) prefixes of the regions of one image, the output of `build_prefix`.
            question: Output of `encode_question`, or of `encode_task_prompt`.

        Returns:
            (N, K', E) prefixes with the question after each region. A question that refers to regions by number has a
            single row (1, K', E), with the prefix of the region that it names first; each reference is replaced by the
            embeddings of its region.

        Raises:
            ValueError: The question refers to a region that does not exist.
        """
        region_embeddings = prefix[:, self.spec.task_tokens :]
        if question.regions:
            if max(question.regions) > len(prefix):
                raise ValueError(
                    f"the question refers to <region {max(question.regions)}>, but the image has "
                    f"{format_count(len(prefix), 'region')}; change the number or add regions"
                )
            prefix = prefix[question.regions[0] - 1 :][:1]
        parts: list[Tensor] = []
        for is_token, ids in groupby(question.after, key=lambda token: token >= 0):
            if is_token:
                parts.append(self._embed_ids([*ids], prefix))
            else:
                parts += [region_embeddings[-number - 1] for number in ids]
        rows = [self._embed_ids(question.before, prefix), None, torch.cat(parts)]
        return torch.cat([prefix if row is None else row.expand(len(prefix), -1, -1) for row in rows], dim=1)

    def _embed_ids(self, ids: Sequence[int], prefix: Tensor) -> Tensor:
        """Return the embeddings (L, E) of token ids, with the device and dtype of the prefix."""
        return self._embed_tokens(torch.tensor([ids], dtype=torch.long, device=prefix.device), prefix.dtype)[0]

    def forward(
        self,
        batch: Batch,
        loss_weights: Mapping[str, float] | None = None,
        chunk_size: int = 0,
        label_smoothing: float = LABEL_SMOOTHING,
    ) -> ModelOutput:
        """Compute the losses of a batch.

        Args:
            batch: Images or features, prompts and, for training, captions and target masks.
            loss_weights: Weights by loss name; losses that are not listed have weight 1.
            chunk_size: Maximum number of regions or captions per chunk. The activations of a chunk are recomputed
                in the backward pass (gradient checkpointing, arXiv 1604.06174). 0 computes everything at once and
                recomputes nothing.
            label_smoothing: Label smoothing of the caption loss.

        Returns:
            A `ModelOutput` with `loss` (the weighted sum), `losses` (by name), `logits` (number of caption tokens in
            the batch, vocabulary size), `regions` (the segmenter output) and `queries` (the query embeddings).
            `logits` is None for a batch of more than `TOKENS_PER_LOSS_CHUNK` tokens. `regions.grid` and
            `regions.decoder_masks` are None if the regions are computed in chunks.
        """
        features = batch.features
        if features is None:
            assert batch.pixel_values is not None  # exactly one of them is set
            features = self.encode(batch.pixel_values)
        regions, queries = self._segment_and_mix(features, batch.prompts, chunk_size)
        geometry = self.compute_geometry(regions, batch.prompts)
        losses: dict[str, Tensor] = {}
        logits = None
        if batch.input_ids is not None:
            assert batch.attention_mask is not None  # of the tokens
            caption_queries, caption_geometry = queries, geometry  # (G, Q, D), (G, 5)
            if batch.region_index is not None:
                caption_queries = queries[batch.region_index]
                caption_geometry = None if geometry is None else geometry[batch.region_index]
            prefix = self.build_prefix(caption_queries, batch.task_ids, caption_geometry)
            if batch.questions is None:
                is_predicted = batch.attention_mask.bool()
                token_embeddings = self._embed_tokens(batch.input_ids, prefix.dtype)
                states = self._compute_token_states(
                    prefix, token_embeddings, batch.attention_mask, is_predicted, chunk_size
                )
            else:
                is_predicted = batch.questions.answer_mask.bool()
                region_embeddings = self._embed_regions(queries, geometry)
                states = self._compute_answer_states(batch, batch.questions, prefix, region_embeddings, chunk_size)
            losses["caption"], logits = compute_caption_loss(
                self.language_model, states, batch.input_ids[is_predicted], label_smoothing
            )
        if batch.targets is not None and hasattr(self.segmenter, "compute_losses"):
            losses |= self.segmenter.compute_losses(regions, batch.targets)
        weights = loss_weights or {}
        loss = cast("Tensor", sum(weights.get(name, 1.0) * value for name, value in losses.items())) if losses else None
        return ModelOutput(loss, losses, logits, regions, queries)

    def _segment_and_mix(
        self, features: Tensor, prompts: PromptBatch, chunk_size: int
    ) -> tuple[SegmenterOutput, Tensor]:
        """Return the regions and their queries; regions computed in chunks have no grid and no decoder masks."""

        def segment_and_mix(features: Tensor, prompt_chunk: PromptBatch) -> tuple[SegmenterOutput, Tensor]:
            regions = self.segment(features, prompt_chunk)
            return regions, self.mix(regions)

        def segment_and_mix_without_grid(features: Tensor, prompt_chunk: PromptBatch) -> tuple[SegmenterOutput, Tensor]:
            regions, queries = segment_and_mix(features, prompt_chunk)
            return replace(regions, grid=None, decoder_masks=None), queries

        if not 0 < chunk_size < len(prompts):
            return segment_and_mix(features, prompts)
        outputs = [
            checkpoint(segment_and_mix_without_grid, features, prompt_chunk, use_reentrant=False)
            for prompt_chunk in prompts.iter_chunks(chunk_size)
        ]
        return concat_segmenter_outputs([regions for regions, _ in outputs]), torch.cat(
            [queries for _, queries in outputs]
        )

    def _compute_token_states(
        self,
        prefix: Tensor,
        token_embeddings: Tensor,
        attention_mask: Tensor,
        is_predicted: Tensor,
        chunk_size: int,
    ) -> Tensor:
        """Return the state that predicts each selected token, (W, E), in caption order.

        Shapes: prefix (G, K, E), token embeddings (G, L, E), masks (G, L).
        """
        # tensors are arguments of the checkpointed function: `checkpoint` preserves the RNG state only of the devices
        # of its arguments

        def select_token_states(*tensors: Tensor) -> Tensor:
            return self._compute_states(*tensors[:3])[tensors[3]]

        inputs = (prefix, token_embeddings, attention_mask, is_predicted)
        if not 0 < chunk_size < len(prefix):
            return select_token_states(*inputs)
        chunks = zip(*(each.split(chunk_size) for each in inputs), strict=True)
        return torch.cat(
            [checkpoint(select_token_states, *chunk_inputs, use_reentrant=False) for chunk_inputs in chunks]
        )

    def _compute_answer_states(
        self, batch: Batch, questions: QuestionBatch, prefix: Tensor, region_embeddings: Tensor, chunk_size: int
    ) -> Tensor:
        """Return the state that predicts each token of the captions and answers of a batch with questions, (W, E).

        Captions with and without a question are computed separately, because their prefixes differ in length.
        """
        assert batch.input_ids is not None
        assert batch.attention_mask is not None  # of the tokens
        is_region = questions.region_index >= 0
        index = questions.region_index[is_region], questions.embedding_index[is_region]
        token_embeddings = self._embed_tokens(batch.input_ids, prefix.dtype)  # (G, L, E)
        token_embeddings = token_embeddings.index_put((is_region,), region_embeddings[index].to(prefix.dtype))
        before = self._embed_tokens(questions.ids_before_prefix[None], prefix.dtype)  # (1, L', E)
        flat_index = torch.arange(batch.input_ids.numel(), device=prefix.device).view_as(batch.input_ids)
        states, positions = [], []
        for has_question in (True, False):
            rows = (questions.has_question == has_question).nonzero()[:, 0]
            if not len(rows):
                continue
            length = int(batch.attention_mask[rows].sum(1).max())
            is_predicted = questions.answer_mask[rows, :length].bool()
            group_prefix = prefix[rows]
            if has_question:
                group_prefix = torch.cat((before.expand(len(rows), -1, -1), group_prefix), dim=1)
            group_inputs = token_embeddings[rows, :length], batch.attention_mask[rows, :length]
            states.append(self._compute_token_states(group_prefix, *group_inputs, is_predicted, chunk_size))
            positions.append(flat_index[rows, :length][is_predicted])
        return torch.cat(states)[torch.cat(positions).argsort()]

    def compute_caption_states(self, prefix: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute the hidden states that predict the tokens of captions.

        Args:
            prefix: (G, K, E) prefixes.
            input_ids: (G, L) caption tokens and EOS, padded on the right.
            attention_mask: (G, L) 1 for caption tokens and EOS, 0 for padding.

        Returns:
            Hidden states of shape (G, L, E). State i predicts `input_ids[:, i]`; state 0 is the state at the last
            prefix position.
        """
        return self._compute_states(prefix, self._embed_tokens(input_ids, prefix.dtype), attention_mask)

    def _compute_states(self, prefix: Tensor, token_embeddings: Tensor, attention_mask: Tensor) -> Tensor:
        token_embeddings = token_embeddings[:, :-1]  # the last token predicts nothing
        full_attention_mask = torch.cat((attention_mask.new_ones(prefix.shape[:2]), attention_mask[:, :-1]), dim=1)
        hidden_states = self.language_model.hidden_states(
            torch.cat((prefix, token_embeddings), dim=1), full_attention_mask
        )
        return hidden_states[:, prefix.shape[1] - 1 :]

    def _embed_tokens(self, input_ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.language_model.embed_tokens(input_ids).to(dtype)

    @torch.no_grad()
    def generate(self, features: Tensor, prompts: PromptBatch, task_ids: Tensor, **generation: Any) -> GenerationOutput:
        """Generate captions of the prompted regions.

        Args:
            features: (B, C, h, w) features of `encode`.
            prompts: N prompts in pixels of the model input.
            task_ids: (N,) task of each prompt: its index in `spec.task_names`.
            **generation: Options of `generate_from_prefix`.

        Returns:
            Token ids and scores of the captions.

        Raises:
            ValueError: Scores are not finite, or the prompts have several tasks whose texts differ.
        """
        regions = self.segment(features, prompts)
        prefix = self.build_prefix(self.mix(regions), task_ids, self.compute_geometry(regions, prompts))
        if self.spec.tasks is not None and len(prefix):
            task_id, *other_ids = task_ids.unique().tolist()
            if other_ids:
                raise ValueError("the prompts have several tasks, whose texts differ; generate each task separately")
            prefix = self.append_task_prompt(prefix, self.spec.task_names[task_id])
        return self.generate_from_prefix(prefix, **generation)

    @torch.no_grad()
    def generate_from_prefix(self, prefix: Tensor, **generation: Any) -> GenerationOutput:
        """Generate token ids for prefixes, in chunks; see `count_rows_per_call`.

        Args:
            prefix: (N, K, E) prefixes.
            **generation: Options of the language model's `generate`; they override those of the spec. `seed` is also
                accepted: the captions of each prefix are generated separately with this seed, so that they do not
                depend on the other prefixes; torch's global RNG state is unchanged.

        Returns:
            Token ids and scores of the captions.

        Raises:
            ValueError: Scores are not finite, because the weights are corrupt or the dtype overflows.
        """
        options = {**self.spec.generation, **generation}
        seed = options.pop("seed", None)
        sequences_per_row = max(
            1, *(count for name in ("num_beams", "num_captions") if isinstance(count := options.get(name, 1), int))
        )
        rows_per_chunk = count_rows_per_call(prefix.shape[1], sequences_per_row) if seed is None else 1
        chunks = prefix.split(rows_per_chunk) if len(prefix) else (prefix,)
        generated = _concat_generated(
            [self._generate_chunk(chunk, seed, options) for chunk in chunks], self._pad_token_id
        )
        check_finite_scores(generated.scores, f"language model {self._get_component_name('language_model')!r}")
        return generated

    def _generate_chunk(self, prefix: Tensor, seed: int | None, options: Mapping[str, Any]) -> GenerationOutput:
        if seed is None:
            return self.language_model.generate(prefix, **options)
        is_cpu = prefix.device.type == "cpu"
        device_options = {} if is_cpu else {"device_type": prefix.device.type}
        with torch.random.fork_rng([] if is_cpu else [prefix.device], **device_options):
            torch.manual_seed(seed)
            return self.language_model.generate(prefix, **options)

    @property
    def _pad_token_id(self) -> int:
        """Id that fills sequences after EOS."""
        tokenizer = self.language_model.tokenizer
        return getattr(self.language_model, "pad_token_id", 0) if tokenizer is None else tokenizer.pad_token_id

    # --- trainable parameters -----------------------------------------------------------------------------------------

    def group_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Return all parameters by group.

        Returns:
            Parameters by group name, each parameter once. The names are those accepted by `ModelSpec.trainable`.
        """
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            group = name.split(".")[0]
            if name.startswith("segmenter.neck."):
                group = "neck"
            elif group == "geometry":  # also a projection to the space of the language model
                group = "projection"
            elif "lora_" in name:
                group = "lora"
            groups.setdefault(group, []).append(parameter)
        return groups

    def freeze_parameters(self) -> None:
        """Freeze all groups that are not in `spec.trainable`.

        Parameters that are never trained, such as SAM's random frequencies, stay frozen.
        """
        for group, parameters in self.group_parameters().items():
            if group not in self.spec.trainable:
                for parameter in parameters:
                    parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> SegmentCaptioner:
        """Set the training mode; fully frozen components stay in eval mode.

        Dropout is therefore off in frozen components, and their batch-norm statistics are not updated.
        """
        super().train(mode)
        for module in self.children():
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.eval()
        return self

    def summarize_parameters(self) -> str:
        """Return a table with one line per group: the number of parameters and whether they are trainable."""
        lines = []
        for group, parameters in self.group_parameters().items():
            count, is_trainable = count_parameters(parameters), any(p.requires_grad for p in parameters)
            lines.append(f"{group:<15}{count:>15,}  {'trainable' if is_trainable else 'frozen'}")
        num_trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return "\n".join(
            [*lines, f"{'total':<15}{count_parameters(self.parameters()):>15,}  {num_trainable:,} trainable"]
        )


def count_rows_per_call(length: int, sequences_per_row: int = 1) -> int:
    """Count the prefixes that the language model reads in one call, which limits its memory.

    Args:
        length: Positions of a prefix.
        sequences_per_row: Sequences generated for each prefix: beams or samples.

    Returns:
        Number of prefixes, at least 1.
    """
    max_sequences = min(MAX_SEQUENCES_PER_CALL, MAX_POSITIONS_PER_CALL // max(1, length))
    return max(1, max_sequences // sequences_per_row)


def check_finite_scores(scores: Tensor, subject: str) -> None:
    """Check that the scores of captions are finite; the tokens are meaningless otherwise.

    Args:
        scores: Mean log-probabilities of captions.
        subject: Subject of the error message.

    Raises:
        ValueError: A score is NaN or infinite.
    """
    num_non_finite = int((~scores.isfinite()).sum())
    if num_non_finite:
        raise ValueError(
            f"{subject} returned NaN or infinite scores for {num_non_finite} of {scores.numel()} captions; "
            f"{NON_FINITE_HINT}"
        )


def _concat_generated(outputs: Sequence[GenerationOutput], pad_token_id: int) -> GenerationOutput:
    if len(outputs) == 1:
        return outputs[0]
    max_length = max(output.sequences.shape[2] for output in outputs)
    sequences = [
        F.pad(output.sequences, (0, max_length - output.sequences.shape[2]), value=pad_token_id) for output in outputs
    ]
    return GenerationOutput(torch.cat(sequences), torch.cat([output.scores for output in outputs]))


def compute_caption_loss(
    language_model: LanguageModel, states: Tensor, labels: Tensor, label_smoothing: float = LABEL_SMOOTHING
) -> tuple[Tensor, Tensor | None]:
    """Compute the mean cross-entropy with label smoothing over all caption tokens, EOS included.

    The logits of many tokens would be the largest tensor in memory. More than `TOKENS_PER_LOSS_CHUNK` tokens are
    therefore computed in chunks and recomputed in the backward pass.

    Args:
        language_model: Language model whose `lm_head` computes the logits.
        states: (W, E) states that predict the tokens.
        labels: (W,) token ids.
        label_smoothing: Fraction of the target distribution that is uniform.

    Returns:
        The loss, and the logits (W, V), or None if they were computed in chunks.
    """

    def compute_summed_loss(states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = language_model.lm_head(states).float()
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="sum"), logits

    if len(labels) <= TOKENS_PER_LOSS_CHUNK:
        loss, logits = compute_summed_loss(states, labels)
        return loss / len(labels), logits

    def compute_chunk_loss(states: Tensor, labels: Tensor) -> Tensor:
        return compute_summed_loss(states, labels)[0]

    chunks = zip(states.split(TOKENS_PER_LOSS_CHUNK), labels.split(TOKENS_PER_LOSS_CHUNK), strict=True)
    return sum(checkpoint(compute_chunk_loss, *each, use_reentrant=False) for each in chunks) / len(labels), None
