"""Tiny image-to-text models with random weights in the layout of transformers, and an image with prompts."""

import numpy as np
import pytest
import sca_registry
import torch
from PIL import Image
from sca_registry.contracts import Prompt

from sca.testing.tiny import get_tiny_options

CARD_NAMES = {
    "blip": "blip-base",
    "git": "git-base",
    "blip-2": "blip2-opt-2.7b",
    "florence2": "vlm",
    "kosmos-2": "kosmos-2",
}
CHAT_TEMPLATE = (  # the image, followed by the question
    "{% for turn in messages %}{% for part in turn['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def randomize_weights(model):
    """Draw large random weights, so that captions differ between images."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
    return model


@pytest.fixture(scope="session")
def weights_folder(tmp_path_factory):
    """`weights("blip")` is the folder of a model with its tokenizer and image processor."""
    folders = {}

    def save(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            if kind == "qwen2_vl":
                model, processor = build_tiny_qwen()
            else:
                options = get_tiny_options("captioner", CARD_NAMES[kind])
                image_text_model = sca_registry.captioners.build(CARD_NAMES[kind], **options).image_text_model
                model, processor = image_text_model.model, image_text_model.processor
            randomize_weights(model).save_pretrained(folders[kind])
            processor.save_pretrained(folders[kind])
        return str(folders[kind])

    return save


def build_tiny_qwen():
    """Build a model with one image token per patch and a chat template."""
    pytest.importorskip("torchvision")
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor, Qwen2VLVideoProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from sca.language_models.tiny_gpt2 import TinyGpt2

    tokenizer = TinyGpt2(hidden_size=8, depth=1).tokenizer.tokenizer
    special_tokens = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_tokens(special_tokens, special_tokens=True)
    token_id_fields = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    vision_config = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
    rope_config = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    layer_sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    special_token_ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    text_config = {
        "vocab_size": 950,
        "hidden_size": 32,
        "intermediate_size": 48,
        "rope_parameters": rope_config,
        **layer_sizes,
        **special_token_ids,
    }
    token_ids = dict(zip(token_id_fields, tokenizer.convert_tokens_to_ids(special_tokens), strict=True))
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(vision_config=vision_config, text_config=text_config, **token_ids)
    )
    image_processor = Qwen2VLImageProcessorPil(patch_size=8, min_pixels=256, max_pixels=4096)
    video_processor = Qwen2VLVideoProcessor(patch_size=8)
    return model, Qwen2VLProcessor(image_processor, tokenizer, video_processor, chat_template=CHAT_TEMPLATE)


@pytest.fixture
def image():
    pixels = np.random.default_rng(3).integers(0, 255, (60, 80, 3), np.uint8)
    pixels[10:30, 10:40] = (200, 30, 30)
    pixels[35:55, 50:70] = (20, 30, 200)
    return Image.fromarray(pixels)


@pytest.fixture
def prompts():
    """Boxes and a mask: prompts that require no encoder."""
    mask = np.zeros((60, 80), bool)
    mask[12:28, 15:33] = True
    mask[12, 15] = False
    boxes = [(10.2, 9.7, 39.5, 30.0), (50.0, 35.0, 70.0, 55.0), (0.0, 0.0, 80.0, 60.0)]
    return [*(Prompt(box=box) for box in boxes), Prompt(mask=mask)]


@pytest.fixture
def question_calls(monkeypatch):
    """Questions passed to an image-to-text model, one list per call."""
    from sca.captioners.image_text import ImageTextModel

    calls = []
    generate_texts = ImageTextModel.generate_texts

    def record_and_generate(self, questions, **settings):
        calls.append(list(questions))
        return generate_texts(self, questions, **settings)

    monkeypatch.setattr(ImageTextModel, "generate_texts", record_and_generate)
    return calls
