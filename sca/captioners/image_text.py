"""Image-to-text models of transformers, which generate scored texts from images and optional prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from sca.captioners.region_captioner import ScoredText, check_aspect_ratio
from sca.devices import DTYPES, resolve_precision
from sca.io.dummy_processors import build_dummy_processor
from sca.io.hub import (
    compute_weights_fingerprint,
    fetch_model_folder,
    initialize_model,
    load_pretrained,
    make_config,
    silence_transformers,
)
from sca.io.processors import load_processor
from sca.language_models.causal import extract_new_tokens
from sca.language_models.token_usage import count_tokens
from sca.model import check_finite_scores
from sca.precision import describe_precision, set_precision

CAPTION_ONLY_MODELS = ("blip", "git")  # model types that continue a text but take no questions
PATCH_INDICES = "image_token_pooling"  # input of Molmo 2: indices into the patches of all images, -1 for none


class ImageTextInput(NamedTuple):
    """Image and text prompt of a model; no text requests a caption of the image."""

    image: Image.Image
    text: str | None = None


class ImageTextModel:
    """Model of transformers' AutoModelForImageTextToText with its processor.

    Images are preprocessed by Pillow, so that results do not depend on whether torchvision is installed. The processors
    of Molmo 2 and PerceptionLM exist for torchvision only.

    Args:
        weights: Hub id, or a folder in the same format.
        revision: Revision of a Hub id.
        pretrained: Load `weights`. False for random weights with a fixed seed, from `config` or from the configuration
            stored with the weights.
        config: Fields of the configuration, including `model_type`.
        device: Device of the model.
        precision: Precision, see `sca.load`. By default float32 on a CPU, and that of the stored weights elsewhere.
        batch_size: Images per forward pass. It limits memory and does not change results.

    Raises:
        InputError: The weights or the processor cannot be read.
        ValueError: An option is invalid.
    """

    def __init__(
        self,
        weights: str | None,
        revision: str | None,
        pretrained: bool,
        config: Mapping[str, Any] | None,
        device: str | torch.device,
        precision: str | None,
        batch_size: int,
    ):
        precision = resolve_precision(precision)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected an integer of at least 1")
        self.weights: str | None = weights if pretrained else None
        self.revision = revision
        self.batch_size = batch_size
        target_device = torch.device(device)
        default_dtype = "float32" if target_device.type == "cpu" else "auto"
        dtype_name = precision if precision in DTYPES else default_dtype
        if self.weights:
            model: Any = load_pretrained(
                AutoModelForImageTextToText,
                self.weights,
                revision,
                ("",),  # ignore any unused tensor, such as old buffers and other heads
                dtype=dtype_name,
            )
            self.processor: Any = load_processor(fetch_model_folder(self.weights, revision))
        else:
            model_config = make_config(weights, revision, config)
            self.processor = build_dummy_processor(model_config)  # rejects unsupported architectures
            model = initialize_model(AutoModelForImageTextToText, model_config)
            model = model if dtype_name == "auto" else model.to(getattr(torch, dtype_name))
        self.model: Any = model.to(target_device).eval()  # `PreTrainedModel` with `generate`
        set_precision(self.model, precision)
        self.tokenizer: Any = getattr(self.processor, "tokenizer", self.processor)
        self.model_type: str = model.config.model_type
        self.eos_token_ids: list[int] = self._find_eos_token_ids()

    @property
    def metadata(self) -> dict[str, Any]:
        """Fingerprint of the weights, {"weights": None} for random weights, and the precision."""
        fingerprint = compute_weights_fingerprint(self.weights, self.revision) if self.weights else {"weights": None}
        return {**fingerprint, "precision": describe_precision(self.model)}

    @torch.inference_mode()
    def generate_texts(self, inputs: Sequence[ImageTextInput], num_beams: int, max_new_tokens: int) -> list[ScoredText]:
        """Generate one text per input.

        Only inputs of equal shape share a batch, so nothing is padded and no text depends on the other inputs.

        Args:
            inputs: Images with optional text prompts.
            num_beams: Beams of the search.
            max_new_tokens: Maximum number of tokens per text.

        Returns:
            One text per input. Scores are exp of the mean token log-probability, in [0, 1].
        """
        texts = [ScoredText("", 0.0)] * len(inputs)
        for start in range(0, len(inputs), self.batch_size):
            rows_by_shape: dict[Any, list[tuple[int, dict[str, Tensor]]]] = {}
            for index, item in enumerate(inputs[start : start + self.batch_size], start):
                processed = self._process_input(item)
                shape = tuple((name, value.shape) for name, value in processed.items())
                rows_by_shape.setdefault(shape, []).append((index, processed))
            for rows in rows_by_shape.values():
                indices, processed_rows = zip(*rows, strict=True)
                batch_inputs = _concatenate_inputs(processed_rows)
                for index, text in zip(
                    indices, self._generate_batch(batch_inputs, num_beams, max_new_tokens), strict=True
                ):
                    texts[index] = text
        return texts

    def _process_input(self, item: ImageTextInput) -> dict[str, Tensor]:
        image, text = item
        if text is not None and getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": text}]
            messages = [{"role": "user", "content": content}]
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        processor_inputs = {"images": image} if text is None else {"images": image, "text": text}
        try:
            with silence_transformers():
                processed = dict(self.processor(**processor_inputs, return_tensors="pt"))
        except ValueError:
            check_aspect_ratio(image)  # the message of an image processor names neither the image nor a fix
            raise
        processed.pop("labels", None)  # those of PaliGemma's processor, for training
        return processed

    def _generate_batch(self, inputs: dict[str, Tensor], num_beams: int, max_new_tokens: int) -> list[ScoredText]:
        def move_to_model(value: Tensor) -> Tensor:
            return value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)

        with silence_transformers():
            output = self.model.generate(
                **{name: move_to_model(value) for name, value in inputs.items()},
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        pad_token_id = self.tokenizer.pad_token_id
        pad_token_id = self.eos_token_ids[0] if pad_token_id is None else pad_token_id
        sequences, scores = extract_new_tokens(output, self.eos_token_ids, pad_token_id)
        check_finite_scores(scores, f"captioner model {self.model_type!r}")
        texts = [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in sequences.tolist()]
        prompt_tokens = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        usages = [count_tokens(prompt_tokens, [row], self.eos_token_ids) for row in sequences.tolist()]
        return [ScoredText(*each) for each in zip(texts, scores.exp().tolist(), usages, strict=True)]

    def _find_eos_token_ids(self) -> list[int]:
        """Collect the EOS ids of all generating components; BLIP's text decoder stops at its separator."""
        configs = [getattr(module, "generation_config", None) for module in self.model.modules()]
        token_ids = [getattr(config, "eos_token_id", None) for config in configs]
        token_ids.append(getattr(self.model.config.get_text_config(decoder=True), "sep_token_id", None))
        eos_token_ids = [
            token_id
            for each in token_ids
            for token_id in (each if isinstance(each, list) else [each])
            if token_id is not None
        ]
        return sorted(set(eos_token_ids)) or [self.tokenizer.eos_token_id]


def _concatenate_inputs(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate processed inputs of equal shape."""
    batch_inputs = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    if PATCH_INDICES in batch_inputs:
        num_patches = rows[0]["pixel_values"].shape[:2].numel()
        indices = batch_inputs[PATCH_INDICES].unflatten(0, (len(rows), -1))
        offsets = torch.arange(len(rows))[:, None, None] * num_patches
        batch_inputs[PATCH_INDICES] = torch.where(indices >= 0, indices + offsets, indices).flatten(0, 1)
    return batch_inputs
