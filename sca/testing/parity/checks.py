"""Comparisons of each kind of component with a reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sca_registry.contracts import PromptBatch
from torch import Tensor, nn

from sca.inference.processor import Processor
from sca.testing.conformance.harnesses import NUM_IMAGES, make_prompts
from sca.testing.parity.comparison import (
    TOLERANCE,
    DifferenceLocation,
    Outputs,
    ParityResult,
    compare_outputs,
    compute_row_differences,
)
from sca.testing.parity.components import (
    Component,
    build_module,
    build_part,
    collect_options,
    find_segmenter_parts,
    get_default_options,
    require_weights_option,
)
from sca.testing.parity.image_towers import OpenClipReference, TimmReference
from sca.testing.parity.precision import compute_in_float64
from sca.testing.parity.references import EncoderReference, ImageReference, parse_reference_name
from sca.testing.parity.tracing import DifferenceLocator
from sca.testing.parity.transformers_models import (
    TransformersEncoder,
    TransformersLanguageModel,
    TransformersSegmenter,
    find_model_class,
)
from sca.torchvision_fix import find_torchvision_error

EXAMPLE_IMAGE_SIZE = (160, 80)  # width, height
GRAY_LEVEL_TOLERANCE = 2.0  # of 255: implementations of resizing differ
TEXT_LENGTHS = (6, 3, 1)
PREFIX_LENGTH, MAX_NEW_TOKENS, NUM_BEAMS = 3, 12, 3


def check_encoder(component: Component, against: str, options: Mapping[str, Any], folder: Path) -> list[ParityResult]:
    """Compare the features and the preprocessing of an encoder with a reference.

    Args:
        component: Registered name, or factory.
        against: Reference, "LIBRARY:MODEL".
        options: Options of the component.
        folder: Empty folder for the weights.

    Returns:
        One result per comparison.
    """
    library, name = parse_reference_name(against, ("transformers", "timm", "open_clip"))
    require_weights_option("encoders", component)
    options = collect_options("encoders", component, options)
    all_options = {**get_default_options("encoders", component), **options}
    reference: EncoderReference
    if library == "timm":
        reference = TimmReference(name, all_options)
    elif library == "open_clip":
        reference = OpenClipReference(name, all_options, folder)
    else:
        reference = TransformersEncoder(find_model_class(name, "encoders"), options.get("config"))
    reference.save_random_weights(folder)
    encoder: Any = build_part("encoders", component, options, folder)
    locator, pixel_values = DifferenceLocator(reference.model, encoder), make_pixel_values(encoder, num_images=2)

    def run_reference(images: Tensor) -> Outputs:
        return {"features": reference.compute_features(images)}

    def run_component(images: Tensor) -> Outputs:
        return {"features": encoder(images)}

    def locate_row(row: int) -> DifferenceLocation | None:
        image = pixel_values[row : row + 1]
        return locator.find_difference(lambda: run_reference(image), lambda: run_component(image))

    results = [compare_preprocessing(encoder, reference)]
    with compute_in_float64():
        expected, actual = run_reference(pixel_values), run_component(pixel_values)
        results.append(compare_outputs("features", expected, actual, locate_row))
    return results


def check_segmenter(component: Component, against: str, options: Mapping[str, Any], folder: Path) -> list[ParityResult]:
    """Compare the masks and scores of a segmenter, and the preprocessing of its encoder, with a reference.

    Args:
        component: Registered name or factory of a segmenter, or of an encoder that brings its segmenter.
        against: Reference, "transformers:MODEL".
        options: Options of the component.
        folder: Empty folder for the weights.

    Returns:
        One result per comparison: preprocessing, and each kind of prompt with three masks and with one.
    """
    _, name = parse_reference_name(against, ("transformers",))
    model_class = find_model_class(name, "segmenters")
    config_class: Any = model_class.config_class
    parts = find_segmenter_parts(component, config_class.model_type)
    for kind, part in zip(("encoders", "segmenters"), parts, strict=True):
        if part is not None:
            require_weights_option(kind, part)
    encoder_options = collect_options("encoders", parts.encoder, {} if parts.segmenter else options)
    reference = TransformersSegmenter(model_class, encoder_options.get("config"))
    reference.save_random_weights(folder)
    encoder: Any = build_part("encoders", parts.encoder, encoder_options, folder)
    segmenter: Any = _build_segmenter(encoder, parts.segmenter, options, folder)
    modules = nn.ModuleDict({"encoder": encoder, "segmenter": segmenter})
    locator, pixel_values = DifferenceLocator(reference.model, modules), make_pixel_values(encoder, NUM_IMAGES)

    def run_reference(images: Tensor, prompts: PromptBatch, multimask_output: bool) -> Outputs:
        return reference.predict(images, prompts, multimask_output)

    def run_component(images: Tensor, prompts: PromptBatch, multimask_output: bool) -> Outputs:
        output = segmenter(encoder(images), prompts, multimask_output)
        if output.masks is None:
            raise ValueError("the segmenter predicts no masks")
        outputs = {"masks": output.masks, "iou_scores": output.iou_scores}
        return _sort_masks(outputs) if reference.has_sorted_masks else outputs

    def compare_masks(prompt_type: str, prompts: PromptBatch, multimask_output: bool) -> ParityResult:
        def locate_row(row: int) -> DifferenceLocation | None:
            image_index = int(prompts.image_index[row])
            region = replace(prompts[row : row + 1], image_index=torch.tensor([0]))
            inputs = (pixel_values[image_index : image_index + 1], region, multimask_output)
            return locator.find_difference(lambda: run_reference(*inputs), lambda: run_component(*inputs))

        inputs = (pixel_values, prompts, multimask_output)
        title = f"{prompt_type}, {'three masks' if multimask_output else 'one mask'}"
        try:
            outputs = run_component(*inputs)
        except ValueError as error:
            if prompt_type == "box":
                raise
            return ParityResult.skip(title, str(error))
        return compare_outputs(title, run_reference(*inputs), outputs, locate_row)

    image_size = encoder.image_format.size
    mask_size = 4 * image_size // encoder.stride
    prompts_by_type = make_prompts(image_size, mask_size, torch.Generator().manual_seed(1))
    results = [compare_preprocessing(encoder, reference)]
    with compute_in_float64():
        for multimask_output in (True, False):
            for prompt_type, prompts in prompts_by_type.items():
                results.append(compare_masks(prompt_type, prompts.to(torch.float64), multimask_output))
    return results


def check_language_model(
    component: Component, against: str, options: Mapping[str, Any], folder: Path
) -> list[ParityResult]:
    """Compare the logits and the captions of a language model with a reference.

    Args:
        component: Registered name, or factory.
        against: Reference, "transformers:MODEL".
        options: Options of the component.
        folder: Empty folder for the weights.

    Returns:
        One result per comparison: logits of token ids and of embeddings, greedy search and beam search.
    """
    _, name = parse_reference_name(against, ("transformers",))
    require_weights_option("language_models", component)
    options = collect_options("language_models", component, options)
    reference = TransformersLanguageModel(find_model_class(name, "language_models"), options.get("config"))
    reference.save_random_weights(folder)
    language_model: Any = build_part("language_models", component, options, folder)
    locator, generator = DifferenceLocator(reference.model, language_model), torch.Generator().manual_seed(1)
    num_texts, max_length = len(TEXT_LENGTHS), max(TEXT_LENGTHS)
    attention_mask = (torch.arange(max_length) < torch.tensor(TEXT_LENGTHS)[:, None]).long()
    vocab_size = reference.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocab_size, (num_texts, max_length), generator=generator)
    embeddings = language_model.embed_tokens(ids)
    prefix = embeddings.std() * torch.randn(
        num_texts, max_length, language_model.hidden_size, dtype=torch.float64, generator=generator
    )

    def mask_padding(values: Tensor, mask: Tensor) -> Tensor:
        return values.masked_fill(mask[..., None] == 0, 0.0)

    def compare_logits(title: str, reference_inputs: Mapping[str, Tensor], embeddings: Tensor) -> ParityResult:
        def run_reference(rows: slice, length: int) -> Outputs:
            inputs = {name: value[rows, :length] for name, value in reference_inputs.items()}
            mask = attention_mask[rows, :length]
            return {"logits": mask_padding(reference.compute_logits(mask, **inputs), mask)}

        def run_component(rows: slice, length: int) -> Outputs:
            mask = attention_mask[rows, :length]
            states = language_model.hidden_states(embeddings[rows, :length], mask)
            return {"logits": mask_padding(language_model.lm_head(states), mask)}

        def locate_row(row: int) -> DifferenceLocation | None:
            text = slice(row, row + 1), TEXT_LENGTHS[row]
            return locator.find_difference(lambda: run_reference(*text), lambda: run_component(*text))

        texts = slice(None), max_length
        return compare_outputs(title, run_reference(*texts), run_component(*texts), locate_row)

    with compute_in_float64():
        return [
            compare_logits("logits of token ids", {"input_ids": ids}, embeddings),
            compare_logits("logits of embeddings", {"embeddings": prefix}, prefix),
            *(
                compare_generation(language_model, reference, prefix[:, :PREFIX_LENGTH], num_beams)
                for num_beams in (1, NUM_BEAMS)
            ),
        ]


PARITY_CHECKS: dict[str, Callable[[Component, str, Mapping[str, Any], Path], list[ParityResult]]] = {
    "encoders": check_encoder,
    "segmenters": check_segmenter,
    "language_models": check_language_model,
}


def make_pixel_values(encoder: Any, num_images: int) -> Tensor:
    """Return normalized noise images (B, 3, S, S) in float64."""
    size = encoder.image_format.size
    return torch.randn(num_images, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def make_color_image() -> Image.Image:
    """Return an image that is not square, with another gradient in each channel."""
    width, height = EXAMPLE_IMAGE_SIZE
    y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    return Image.fromarray((255 * np.stack((x, y, (1 - x) / 2 + y / 4), axis=-1)).astype(np.uint8))


def compare_preprocessing(encoder: Any, reference: ImageReference) -> ParityResult:
    """Compare the preprocessing of an image, its normalization included.

    Args:
        encoder: Encoder.
        reference: Reference.

    Returns:
        The result in gray levels; skipped if the library's image processor is not available.
    """
    image, processor = make_color_image(), Processor.from_encoder(encoder)
    size, content_size = encoder.image_format.size, processor.compute_frame(*image.size).content_size
    try:
        expected = reference.preprocess_image(image, size, content_size)
    except Exception as error:  # image processors import torchvision
        if not (isinstance(error, ImportError) or find_torchvision_error(error)):
            raise
        return ParityResult.skip("preprocessing", str(error))
    if expected is None:
        return ParityResult.skip("preprocessing", "the library has no image processor for the model")
    actual = processor.preprocess_images([image])[0]
    if expected.shape != actual.shape:
        actual = actual[:, : content_size[1], : content_size[0]]
    levels = _compute_gray_level_differences(expected, actual, encoder.image_format.std)
    difference, details = float(levels.max()), ""
    if difference > GRAY_LEVEL_TOLERANCE:
        details = f"by channel: {', '.join(f'{float(level):.0f}' for level in levels)}"
        reversed_levels = _compute_gray_level_differences(expected.flip(0), actual, encoder.image_format.std[::-1])
        if reversed_levels.max() <= GRAY_LEVEL_TOLERANCE:
            details = "the channels are in reverse order: RGB and BGR are exchanged"
    return ParityResult("preprocessing", difference, GRAY_LEVEL_TOLERANCE, "gray levels", details)


def _compute_gray_level_differences(expected: Tensor, actual: Tensor, std: Sequence[float]) -> Tensor:
    """Return the largest difference of each channel of normalized images in gray levels; infinite for other shapes."""
    if expected.shape != actual.shape:
        return torch.full((3,), torch.inf)
    return 255 * (expected - actual).abs().amax((1, 2)) * torch.tensor(std)


def compare_generation(
    language_model: Any, reference: TransformersLanguageModel, prefix: Tensor, num_beams: int
) -> ParityResult:
    """Compare captions, and their scores with those that the logits of the reference imply.

    Args:
        language_model: Language model.
        reference: Reference.
        prefix: (N, K, E) prefixes.
        num_beams: Beams, and captions per prefix; 1 for greedy search.

    Returns:
        The result, with the relative difference of the scores; infinite if a token differs.
    """
    name = "greedy search" if num_beams == 1 else f"{num_beams} beams"
    output = language_model.generate(prefix, MAX_NEW_TOKENS, num_beams=num_beams, num_captions=num_beams)
    expected_ids = reference.generate(prefix, MAX_NEW_TOKENS, num_beams)
    expected_captions, captions = (_cut_captions(ids, reference) for ids in (expected_ids, output.sequences))
    for index, (expected, caption) in enumerate(zip(expected_captions, captions, strict=True)):
        if caption != expected:
            details = f"caption {index} is {caption}, not {expected}"
            return ParityResult(name, torch.inf, details=details)
    expected_scores = _compute_scores(reference, prefix, expected_ids)
    difference = float(compute_row_differences(expected_scores, output.scores).max())
    return ParityResult(name, difference, details="" if difference <= TOLERANCE else "scores")


def _find_counted_tokens(ids: Tensor, reference: TransformersLanguageModel) -> Tensor:
    """Return which tokens of captions (..., L) are not after EOS."""
    eos_token_id = reference.model.config.eos_token_id
    is_end = torch.isin(ids, torch.tensor([] if eos_token_id is None else eos_token_id)).int()
    return is_end.cumsum(-1) - is_end == 0


def _cut_captions(ids: Tensor, reference: TransformersLanguageModel) -> list[list[int]]:
    """Return the ids of each caption up to and including EOS."""
    rows = ids.flatten(0, 1)
    return [
        row[is_counted].tolist() for row, is_counted in zip(rows, _find_counted_tokens(rows, reference), strict=True)
    ]


def _compute_scores(reference: TransformersLanguageModel, prefix: Tensor, ids: Tensor) -> Tensor:
    """Return the mean log-probability (N, R) of the tokens of captions (N, R, L) up to and including EOS."""
    num_captions, length = ids.shape[1:]
    rows = ids.flatten(0, 1)
    embeddings = reference.model.get_input_embeddings()(rows)
    inputs = torch.cat((prefix.repeat_interleave(num_captions, dim=0), embeddings), dim=1)
    logits = reference.compute_logits(inputs.new_ones(inputs.shape[:2], dtype=torch.long), embeddings=inputs)
    log_probabilities = logits[:, -length - 1 : -1].log_softmax(2).gather(2, rows[..., None]).squeeze(2)
    is_counted = _find_counted_tokens(rows, reference)
    return ((log_probabilities * is_counted).sum(1) / is_counted.sum(1)).unflatten(0, (-1, num_captions))


def _build_segmenter(encoder: Any, segmenter: Component | None, options: Mapping[str, Any], folder: Path) -> nn.Module:
    """Build the segmenter that the encoder brings with its weights, or another one from the folder."""
    if segmenter is not None:
        return build_part("segmenters", segmenter, options, folder, (encoder,))
    return build_module("segmenters", encoder.default_segmenter, {}, (encoder,))


def _sort_masks(outputs: Outputs) -> Outputs:
    """Sort the masks of each region by their predicted IoU, highest first."""
    scores, order = outputs["iou_scores"].sort(dim=1, descending=True)
    masks = outputs["masks"]
    return {"masks": masks.gather(1, order[..., None, None].expand_as(masks)), "iou_scores": scores}
