"""The parity kit: built-in components equal other libraries, and seeded mistakes are found and located."""

from dataclasses import replace

import pytest
import torch
from tiny_segmenters import correct_sam_hq_decoder

from sca.cli import run_command
from sca.encoders.sam import SamEncoder
from sca.encoders.sam2 import Sam2Encoder
from sca.encoders.sam_hq import SamHqEncoder
from sca.language_models.hf import HfLanguageModel
from sca.nn.feature_packing import pack_feature_maps
from sca.segmenters.sam import SamSegmenter
from sca.segmenters.sam2 import Sam2Segmenter
from sca.testing.parity import check_parity, format_results
from sca.testing.parity.comparison import compute_difference_up_to_order
from sca.testing.parity.precision import compute_in_float64
from sca.testing.tiny import get_tiny_options

NUM_PROMPT_TYPES = 6


def get_failures(results):
    return [result for result in results if not result.passed]


@pytest.mark.parametrize(
    ("name", "against"),
    [
        ("sam", "transformers:SamModel"),
        ("sam2.1-hiera-tiny", "transformers:Sam2Model"),
        ("edgetam", "transformers:EdgeTamModel"),
        ("sam3-tracker", "transformers:Sam3TrackerModel"),
    ],
)
def test_segmenter_equals_reference_for_all_prompts_and_preprocessing(name, against):
    results = check_parity("segmenter", name, against)
    assert get_failures(results) == []
    assert [result.name for result in results[:2]] == ["preprocessing", "box, three masks"]
    assert len(results) == 1 + 2 * NUM_PROMPT_TYPES
    assert all(0 < result.difference < 1e-12 for result in results[1:])


@pytest.mark.parametrize(
    ("name", "against"),
    [
        ("siglip-b-16", "timm:vit_base_patch16_siglip_224"),
        ("dinov2-vit-s-14", "timm:vit_small_patch14_reg4_dinov2"),
        ("convnext-b", "timm:convnext_base"),
        ("clip-vit-b-32", "open_clip:ViT-B-32"),
        ("eva02-b-16", "open_clip:EVA02-B-16"),
        ("sam", "transformers:SamVisionModel"),
    ],
)
def test_encoder_equals_reference(name, against):
    if not against.startswith("transformers"):
        pytest.importorskip("open_clip", reason="the extra clip is not installed", exc_type=Exception)
    results = check_parity("encoder", name, against)
    assert get_failures(results) == []
    assert [result.name for result in results] == ["preprocessing", "features"]


@pytest.mark.parametrize(
    ("name", "model_class"),
    [
        ("gpt2", "GPT2LMHeadModel"),
        ("smollm2-135m", "LlamaForCausalLM"),
        ("phi-2", "PhiForCausalLM"),
        ("hf", "CohereForCausalLM"),  # scaled logits, another architecture than the tiny one of hf
        ("hf", "GPTJForCausalLM"),  # attention in float32
        ("hf", "BartForCausalLM"),  # a generation config that forces the last token
    ],
)
def test_language_model_equals_reference(name, model_class):
    results = check_parity("language-model", name, f"transformers:{model_class}")
    assert get_failures(results) == []
    assert [result.name for result in results] == [
        "logits of token ids",
        "logits of embeddings",
        "greedy search",
        "3 beams",
    ]


def test_segmenter_is_combined_with_the_encoder_of_the_reference():
    assert get_failures(check_parity("segmenter", SamSegmenter, "transformers:SamModel")) == []


# --- mistakes


def test_mistake_of_transformers_in_sam_hq_is_located():
    results = check_parity("segmenter", "sam-hq", "transformers:SamHQModel")
    assert len(get_failures(results)) == 2 * NUM_PROMPT_TYPES
    for result in get_failures(results):
        assert result.location.tensor == "input of mask_decoder.upscale_conv1"
        assert result.location.reference_module == "mask_decoder (SamHQMaskDecoder)"
        assert result.location.module == "segmenter (SamHqSegmenter), before segmenter.decoder.upscale_conv1"
    (summary,) = format_results(results)[len(results) :]
    assert summary.startswith("first difference of box, three masks and 11 more: input of mask_decoder.upscale_conv1")


def test_sam_hq_equals_corrected_transformers(monkeypatch):
    correct_sam_hq_decoder(monkeypatch)
    assert get_failures(check_parity("segmenter", "sam-hq", "transformers:SamHQModel")) == []


class OtherEpsilon(Sam2Segmenter):
    def load_modules(self, weights, revision):
        prompt_encoder, decoder = super().load_modules(weights, revision)
        decoder.transformer.layers[1].layer_norm3.eps = 1e-6
        return prompt_encoder, decoder


class MissingSigmoid(Sam2Segmenter):
    def load_modules(self, weights, revision):
        prompt_encoder, decoder = super().load_modules(weights, revision)
        decoder.iou_prediction_head.sigmoid_output = False
        return prompt_encoder, decoder


class SwappedAxes(SamSegmenter):
    def upscale_grid(self, grid, image_index, high_res_features):
        return super().upscale_grid(grid.mT, image_index, high_res_features)


class SwappedPositions(SamSegmenter):
    def compute_positional_encoding(self):
        return super().compute_positional_encoding().mT


class UnloadedWeights(SamSegmenter):
    def load_modules(self, weights, revision):
        prompt_encoder, decoder = super().load_modules(weights, revision)
        decoder.upscale_conv2.reset_parameters()
        return prompt_encoder, decoder


class SquaredScores(SamSegmenter):
    def decode_masks(self, *arguments):
        masks, iou_scores = super().decode_masks(*arguments)
        return masks, iou_scores.square()


class NoMaskPrompts(SamSegmenter):
    def forward(self, features, prompts, multimask_output=True):
        if prompts.masks is not None:
            raise ValueError("mask prompts are not supported")
        return super().forward(features, prompts, multimask_output)


class NoMasks(SamSegmenter):
    def forward(self, features, prompts, multimask_output=True):
        return replace(super().forward(features, prompts, multimask_output), masks=None, iou_scores=None)


class SwappedLevels(SamHqEncoder):
    def forward(self, pixel_values):
        output = self.vision(pixel_values)
        features = output.intermediate_embeddings[1].permute(0, 3, 1, 2).contiguous()
        return pack_feature_maps(output.last_hidden_state, [self.high_res_projection(features)])


class MissingMemoryEmbedding(Sam2Encoder):
    def forward(self, pixel_values):
        features = super().forward(pixel_values)
        features[:, : self.image_channels] -= self.no_memory_embedding.reshape(1, -1, 1, 1)
        return features


MISTAKES_OF_SEGMENTERS = {  # model class, first tensor, and the modules of the reference and the component
    OtherEpsilon: (
        "Sam2Model",
        "output of mask_decoder.transformer.layers.1.layer_norm3",
        "mask_decoder.transformer.layers.1.layer_norm3 (LayerNorm)",
        "segmenter.decoder.transformer.layers.1.layer_norm3 (LayerNorm)",
    ),
    MissingSigmoid: (
        "Sam2Model",
        "output of mask_decoder.iou_prediction_head",
        "mask_decoder.iou_prediction_head (Sam2FeedForward)",
        "segmenter.decoder.iou_prediction_head (Sam2FeedForward)",
    ),
    SwappedAxes: (
        "SamModel",
        "input of mask_decoder.upscale_conv1",
        "mask_decoder (SamMaskDecoder)",
        "segmenter (SwappedAxes), before segmenter.decoder.upscale_conv1",
    ),
    SwappedPositions: (
        "SamModel",
        "input of mask_decoder.transformer",
        "mask_decoder (SamMaskDecoder)",
        "segmenter (SwappedPositions), before segmenter.decoder.transformer",
    ),
    UnloadedWeights: (
        "SamModel",
        "output of mask_decoder.upscale_conv2",
        "mask_decoder.upscale_conv2 (ConvTranspose2d)",
        "no module, because none has these weights",
    ),
    SquaredScores: (
        "SamModel",
        "iou_scores",
        "SamModel",
        "segmenter (SquaredScores)",
    ),
}


@pytest.mark.parametrize("component", MISTAKES_OF_SEGMENTERS)
def test_mistake_of_a_segmenter_is_located(component):
    model_class, *expected_location = MISTAKES_OF_SEGMENTERS[component]
    failures = get_failures(check_parity("segmenter", component, f"transformers:{model_class}"))
    assert failures
    for failure in failures:
        location = failure.location
        assert [location.tensor, location.reference_module, location.module] == expected_location
        assert location.difference > 1e-12


def test_swapped_levels_of_an_encoder_are_located(monkeypatch):
    correct_sam_hq_decoder(monkeypatch)
    config = get_tiny_options("encoder", "sam-hq")["config"]
    failures = get_failures(check_parity("segmenter", SwappedLevels, "transformers:SamHQModel", config=config))
    assert len(failures) == 2 * NUM_PROMPT_TYPES
    assert {failure.location.tensor for failure in failures} == {"input of mask_decoder.compress_vit_conv1"}
    (module,) = {failure.location.module for failure in failures}
    assert module == "encoder (SwappedLevels), before encoder.high_res_projection.0"


def test_missing_addition_in_an_encoder_is_located():
    config = get_tiny_options("encoder", "sam2")["config"]
    failures = get_failures(check_parity("segmenter", MissingMemoryEmbedding, "transformers:Sam2Model", config=config))
    assert {failure.location.tensor for failure in failures} == {"input of mask_decoder.transformer"}


class BgrEncoder(SamEncoder):
    def __init__(self, weights=None, config=None):
        super().__init__(weights, config=config)
        self.image_format = replace(self.image_format, channel_order="bgr")


class OtherMeanEncoder(SamEncoder):
    def __init__(self, weights=None, config=None):
        super().__init__(weights, config=config)
        self.image_format = replace(self.image_format, mean=(0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("component", "problem"), [(BgrEncoder, "RGB and BGR are exchanged"), (OtherMeanEncoder, "by channel: 4, 11, 24")]
)
def test_mistake_of_preprocessing_is_described(component, problem):
    config = get_tiny_options("encoder", "sam")["config"]
    (failure,) = get_failures(check_parity("encoder", component, "transformers:SamVisionModel", config=config))
    assert failure.name == "preprocessing"
    assert problem in failure.details


class BatchedEncoder(SamEncoder):
    def forward(self, pixel_values):
        return super().forward(pixel_values).flip(0)


def test_mistake_of_a_batch_has_no_location():
    config = get_tiny_options("encoder", "sam")["config"]
    (failure,) = get_failures(check_parity("encoder", BatchedEncoder, "transformers:SamVisionModel", config=config))
    assert failure.location is None
    assert "not for a single region, image or text" in failure.details


def test_rejected_prompts_are_skipped():
    results = check_parity("segmenter", NoMaskPrompts, "transformers:SamModel")
    assert get_failures(results) == []
    skipped = [result.name for result in results if "skipped: mask prompts are not supported" in str(result)]
    assert skipped == [
        f"{prompts}, {masks}" for masks in ("three masks", "one mask") for prompts in ("mask", "box and mask")
    ]


class ScaledLogits(HfLanguageModel):
    def lm_head(self, hidden_states):
        return super().lm_head(hidden_states) * 1.01


class ScaledEmbeddings(HfLanguageModel):
    def embed_tokens(self, input_ids):
        return super().embed_tokens(input_ids) * 1.01


@pytest.mark.parametrize(
    ("component", "names", "tensor", "module"),
    [
        (ScaledLogits, ["logits of token ids", "logits of embeddings"], "logits", "ScaledLogits"),
        (
            ScaledEmbeddings,
            ["logits of token ids"],
            "input of transformer.h.0",
            "model.transformer (GPT2Model), before model.transformer.h.0",
        ),
    ],
)
def test_mistake_of_a_language_model_is_located(component, names, tensor, module):
    config = get_tiny_options("language_model", "gpt2")["config"]
    failures = get_failures(check_parity("language_model", component, "transformers:GPT2LMHeadModel", config=config))
    assert [failure.name for failure in failures if failure.location] == names
    assert (failures[0].location.tensor, failures[0].location.module) == (tensor, module)


# --- command and invalid input


@pytest.mark.parametrize(
    ("arguments", "status", "last_line"),
    [
        ("encoder sam --against transformers:SamVisionModel", 0, "2 of 2 comparisons passed"),
        ("segmenter sam-hq --quiet --against transformers:SamHQModel", 1, "1 of 13 comparisons passed"),
    ],
)
def test_check_command_prints_a_line_per_comparison(arguments, status, last_line, capsys):
    assert run_command(["check", *arguments.split()]) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == last_line
    if status:
        assert len(lines) == 12 + 1 + 1
        assert lines[-2].startswith("first difference of box, three masks and 11 more: input of mask_decoder.upscale")
    else:
        assert lines[0] == "ok      preprocessing: 0 gray levels"
        assert lines[1].startswith("ok      features: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("encoder sam --against SamModel", "the reference is 'SamModel'; write LIBRARY:MODEL"),
        (
            "encoder sam --against tim:resnet50",
            "unknown library 'tim' for components of this kind. Did you mean 'timm'?",
        ),
        ("segmenter sam --against timm:resnet50", "unknown library 'timm' for components of this kind."),
        ("segmenter sam --against transformers:SamModell", "no model class 'SamModell'. Did you mean 'SamModel'?"),
        ("encoder sam --against transformers:SamModel", "does not fit encoders; run `sca check segmenter`"),
        ("language-model gpt2 --against transformers:GPT2Model", "GPT2Model does not fit language models"),
        ("encoder timm --against timm:resnet51", "timm has no model 'resnet51'"),
        ("encoder open-clip --against open_clip:ViT-B-33", "open_clip has no model 'ViT-B-33'"),
        ("encoder timm --against timm:resnet50", "timm's resnet50 does not accept embed_dim, depth, num_heads"),
        ("segmenter box --against transformers:SamModel", "segmenter 'box' has no option weights"),
        ("segmenter sam --against transformers:Sam2Model", "has the model type 'sam2'; this component requires 'sam'"),
        ("segmenter sam3 --against transformers:SamModel", "no segmenters named 'sam3'"),
        ("language-model hf --against transformers:MixtralForCausalLM", "cannot be computed in float64"),
        ("mixer query --against transformers:SamModel", "components of kind 'mixer' cannot be compared"),
        ("encoder sam sice=3 --against transformers:SamModel", "does not fit encoders"),
        ("encoder sam sice=3 --against transformers:SamVisionModel", "encoder 'sam' has no option 'sice'"),
    ],
)
def test_check_command_rejects_invalid_input_in_one_line(arguments, message, capsys):
    if "timm" in arguments or "open_clip" in arguments:
        pytest.importorskip("open_clip", reason="the extra clip is not installed", exc_type=Exception)
    assert run_command(["check", *arguments.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_parity_fixture_fails_with_the_first_difference(parity):
    with pytest.raises(pytest.fail.Exception, match=r"(?s)FAILED  box, three masks.*first difference of .*SwappedAxes"):
        parity("segmenter", SwappedAxes, "transformers:SamModel")
    assert len(parity("encoder", "sam", "transformers:SamVisionModel")) == 2


def test_segmenter_without_masks_is_rejected():
    with pytest.raises(ValueError, match="the segmenter predicts no masks"):
        check_parity("segmenter", NoMasks, "transformers:SamModel")


def test_preprocessing_is_skipped_without_the_image_processor(monkeypatch):
    def raise_import_error(*_):
        raise ImportError("torchvision is not installed")

    monkeypatch.setattr(
        "sca.testing.parity.transformers_models.TransformersEncoder.preprocess_image", raise_import_error
    )
    first_result, _ = check_parity("encoder", "sam", "transformers:SamVisionModel")
    assert str(first_result) == "ok      preprocessing: skipped: torchvision is not installed"


def test_missing_library_names_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"timm is not installed; pip install 'segment-caption-anything\[timm\]'"):
        check_parity("encoder", "timm", "timm:resnet50")


def test_computation_in_float64_ignores_conversions_to_float32():
    values = torch.randn(3, dtype=torch.float64)
    with compute_in_float64():
        converted = [values.float(), values.to(torch.float32), values.softmax(0, dtype=torch.float32), torch.zeros(3)]
    assert {each.dtype for each in converted} == {torch.float64}
    assert (values.float().dtype, torch.zeros(3).dtype) == (torch.float32, torch.float32)


def test_differences_ignore_the_order_of_tokens_but_not_of_axes():
    tokens, grid = torch.randn(1, 5, 8), torch.randn(1, 8, 4, 4)
    assert compute_difference_up_to_order(tokens, tokens[:, [1, 0, 2, 4, 3]]) == 0
    assert compute_difference_up_to_order(grid, grid.flatten(2).mT) == 0
    assert compute_difference_up_to_order(grid, grid.mT) > 0.1
    assert compute_difference_up_to_order(grid, grid[:, :4]) == float("inf")
    assert compute_difference_up_to_order(grid, grid * float("nan")) == float("inf")
