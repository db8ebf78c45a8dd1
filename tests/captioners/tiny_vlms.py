"""Tiny vision-language models with random weights, each with the processor and the special tokens of its family."""

import pytest
import transformers
from transformers import PreTrainedTokenizerFast

from sca.language_models.tiny_gpt2 import TinyGpt2

IMAGE_SIZE, PATCH_SIZE = 32, 8  # of models with a fixed image size
VISION_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
QWEN_TOKENS = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|box_start|>", "<|box_end|>"]
QWEN_ID_FIELDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SMOLVLM_TOKENS = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<video>"]
MOLMO2_TOKENS = [
    *("<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>", "<im_end>", "<frame_end>"),
    *("<im_low>", "<|image|>", "<|video|>"),
]
CHAT_TEMPLATE = (  # a turn of an image and a question
    "{{% for turn in messages %}}user:{{% for part in turn['content'] %}}{{% if part['type'] == 'image' %}}"
    "{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}} assistant:{{% endfor %}}"
)


def build_tiny_vlm(family):
    """Build a model and its processor by the model type of the family; skip the test if a package is missing."""
    for package in PACKAGES.get(family, ["torchvision"]):
        pytest.importorskip(package)
    return BUILDERS[family]()


def build_tokenizer(tokens=(), named_tokens=None):
    """Build the tokenizer of tiny-gpt2 with special tokens; `named_tokens` are attributes of the tokenizer."""
    named_tokens = named_tokens or {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=TinyGpt2(hidden_size=8, depth=1).tokenizer.tokenizer,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|end|>"),
        extra_special_tokens=named_tokens,
    )
    tokenizer.add_tokens([*tokens, *named_tokens.values()], special_tokens=True)
    return tokenizer


def make_text_config(tokenizer, **fields):
    """Return the fields that configurations of language models share."""
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {"vocab_size": len(tokenizer) + 6, **sizes, "num_key_value_heads": 2, "head_dim": 16, **ids, **fields}


def get_special_ids(tokenizer, fields, tokens):
    return dict(zip(fields, tokenizer.convert_tokens_to_ids(list(tokens)), strict=True))


def build_qwen2_vl():
    tokenizer = build_tokenizer(QWEN_TOKENS)
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
    text = make_text_config(tokenizer, rope_parameters=MROPE)
    del text["head_dim"]
    config = transformers.Qwen2VLConfig(
        vision_config=vision, text_config=text, **get_special_ids(tokenizer, QWEN_ID_FIELDS, QWEN_TOKENS[:4])
    )
    return build_qwen_model(transformers.Qwen2VLForConditionalGeneration(config), tokenizer, "Qwen2VL", "Qwen2VL")


def build_qwen2_5_vl():
    tokenizer = build_tokenizer(QWEN_TOKENS)
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8}
    vision |= {"out_hidden_size": 32, "window_size": 32, "fullatt_block_indexes": [1]}
    text = make_text_config(tokenizer, rope_parameters=MROPE)
    del text["head_dim"]
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, **get_special_ids(tokenizer, QWEN_ID_FIELDS, QWEN_TOKENS[:4])
    )
    return build_qwen_model(transformers.Qwen2_5_VLForConditionalGeneration(config), tokenizer, "Qwen2_5_VL", "Qwen2VL")


def build_qwen3_vl(class_prefix="Qwen3VL", **text_fields):
    tokenizer = build_tokenizer(QWEN_TOKENS)
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8}
    vision |= {"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    text = make_text_config(tokenizer, rope_parameters={**MROPE, "mrope_interleaved": True}, **text_fields)
    config = getattr(transformers, f"{class_prefix}Config")(
        vision_config=vision, text_config=text, **get_special_ids(tokenizer, QWEN_ID_FIELDS, QWEN_TOKENS[:4])
    )
    model = getattr(transformers, f"{class_prefix}ForConditionalGeneration")(config)
    return build_qwen_model(model, tokenizer, "Qwen3VL", "Qwen3VL")


def build_qwen3_vl_moe():
    return build_qwen3_vl("Qwen3VLMoe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


def build_qwen_model(model, tokenizer, processor_prefix, video_prefix):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    image_processor = Qwen2VLImageProcessorPil(patch_size=8, min_pixels=256, max_pixels=8192)
    video_processor = getattr(transformers, f"{video_prefix}VideoProcessor")(patch_size=8)
    template = CHAT_TEMPLATE.format(image="<|vision_start|><|image_pad|><|vision_end|>")
    processor_class = getattr(transformers, f"{processor_prefix}Processor")
    return model, processor_class(image_processor, tokenizer, video_processor, chat_template=template)


def build_paligemma():
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokenizer = build_tokenizer([f"<loc{index:04d}>" for index in range(1024)], {"image_token": "<image>"})
    config = transformers.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION_SIZES, "vision_use_head": False},
        text_config={"model_type": "gemma2", **make_text_config(tokenizer), "sliding_window": 64},
        image_token_index=tokenizer.image_token_id,
        projection_dim=32,
        hidden_size=32,
        tie_word_embeddings=False,
    )
    image_processor = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    image_processor.image_seq_length = (IMAGE_SIZE // PATCH_SIZE) ** 2
    processor = transformers.PaliGemmaProcessor(image_processor, tokenizer)
    return transformers.PaliGemmaForConditionalGeneration(config), processor


def build_gemma3():
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = build_tokenizer(named_tokens=names)
    config = transformers.Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **VISION_SIZES, "vision_use_head": False},
        text_config=make_text_config(tokenizer, sliding_window=64),
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        tie_word_embeddings=False,
    )
    image_processor = Gemma3ImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    template = CHAT_TEMPLATE.format(image="<start_of_image>")
    processor = transformers.Gemma3Processor(image_processor, tokenizer, chat_template=template, image_seq_length=4)
    return transformers.Gemma3ForConditionalGeneration(config), processor


def build_internvl():
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    tokenizer = build_tokenizer(["<box>", "</box>"], INTERNVL_TOKENS)
    text = make_text_config(tokenizer)
    del text["head_dim"]
    config = transformers.InternVLConfig(
        vision_config={**VISION_SIZES, "image_size": [IMAGE_SIZE] * 2, "patch_size": [PATCH_SIZE] * 2},
        text_config={"model_type": "qwen2", **text},
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = transformers.InternVLProcessor(
        GotOcr2ImageProcessorPil(size=size, max_patches=6),
        tokenizer,
        transformers.InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=CHAT_TEMPLATE.format(image="<IMG_CONTEXT>\n"),
    )
    return transformers.InternVLForConditionalGeneration(config), processor


def build_smolvlm():
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer = build_tokenizer([*SMOLVLM_TOKENS, *tiles])
    config = transformers.SmolVLMConfig(
        vision_config=VISION_SIZES,
        text_config={"model_type": "llama", **make_text_config(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    processor = transformers.SmolVLMProcessor(
        SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": IMAGE_SIZE}),
        tokenizer,
        transformers.SmolVLMVideoProcessor(
            size={"longest_edge": IMAGE_SIZE}, max_image_size={"longest_edge": IMAGE_SIZE}
        ),
        image_seq_len=4,
        chat_template=CHAT_TEMPLATE.format(image="<image>"),
    )
    return transformers.SmolVLMForConditionalGeneration(config), processor


def build_perception_lm():
    tokenizer = build_tokenizer(named_tokens={"image_token": "<|image|>", "video_token": "<|video|>"})
    sizes = {"img_size": [IMAGE_SIZE] * 2, "patch_size": PATCH_SIZE, "embed_dim": 32, "depth": 1, "num_heads": 2}
    config = transformers.PerceptionLMConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_tiny_patch16_384",
            "model_args": {**sizes, "ref_feat_shape": [IMAGE_SIZE // PATCH_SIZE] * 2, "global_pool": ""},
            "num_labels": 0,
        },
        text_config={"model_type": "llama", **make_text_config(tokenizer)},
        vision_use_cls_token=True,
        projector_pooling_ratio=2,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
    )
    image_processor = transformers.PerceptionLMImageProcessor(
        tile_size=IMAGE_SIZE, max_num_tiles=2, vision_input_type="thumb+tile"
    )
    processor = transformers.PerceptionLMProcessor(
        transformers.PerceptionLMVideoProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        image_processor,
        tokenizer,
        patch_size=PATCH_SIZE,
        pooling_ratio=2,
        chat_template=CHAT_TEMPLATE.format(image="<|image|>"),
    )
    return transformers.PerceptionLMForConditionalGeneration(config), processor


def build_fast_vlm():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = build_tokenizer(named_tokens={"image_token": "<image>"})
    stages = {"layers": [1, 1, 1, 1, 1], "embed_dims": [8, 16, 32, 32, 32], "mlp_ratios": [2, 2, 2, 2, 2]}
    text = make_text_config(tokenizer)
    del text["head_dim"]
    config = transformers.FastVlmConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "global_pool": "avg",
            "hidden_size": 64,
            "model_args": {"inference_mode": True, **stages},
        },
        text_config={"model_type": "qwen2", **text},
        image_token_index=tokenizer.image_token_id,
        image_seq_length=1,
    )
    size = {"height": 64, "width": 64}
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=size)
    tokenizer.chat_template = CHAT_TEMPLATE.format(image="<image>")  # as in the published conversion
    processor = transformers.LlavaProcessor(
        image_processor, tokenizer, patch_size=64, vision_feature_select_strategy="full"
    )
    return transformers.FastVlmForConditionalGeneration(config), processor


def build_molmo2():
    tokenizer = build_tokenizer(MOLMO2_TOKENS)
    text = make_text_config(tokenizer, additional_vocab_size=4)
    fields = ("image_start_token_id", "low_res_image_start_token_id", "image_end_token_id", "image_patch_id")
    fields += ("frame_start_token_id", "frame_end_token_id")
    tokens = ("<im_start>", "<low_res_im_start>", "<im_end>", "<im_patch>", "<frame_start>", "<frame_end>")
    attention = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = transformers.Molmo2Config(
        vision_config={**VISION_SIZES, **attention, "image_size": [IMAGE_SIZE] * 2},
        adapter_config={"vision_feature_layer": [1, 0], "hidden_size": 32, **attention}
        | {"intermediate_size": 48, "text_hidden_size": 32},
        text_config=text,
        **get_special_ids(tokenizer, fields, tokens),
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = transformers.Molmo2Processor(
        transformers.Molmo2ImageProcessor(size=size, patch_size=PATCH_SIZE, max_crops=2, overlap_margins=[1, 1]),
        transformers.Molmo2VideoProcessor(size=size, patch_size=PATCH_SIZE),
        tokenizer,
        chat_template=CHAT_TEMPLATE.format(image="<|image|>"),
    )
    return transformers.Molmo2ForConditionalGeneration(config), processor


BUILDERS = {
    "fast_vlm": build_fast_vlm,
    "gemma3": build_gemma3,
    "internvl": build_internvl,
    "molmo2": build_molmo2,
    "paligemma": build_paligemma,
    "perception_lm": build_perception_lm,
    "qwen2_vl": build_qwen2_vl,
    "qwen2_5_vl": build_qwen2_5_vl,
    "qwen3_vl": build_qwen3_vl,
    "qwen3_vl_moe": build_qwen3_vl_moe,
    "smolvlm": build_smolvlm,
}
PACKAGES = {  # that a family requires; by default torchvision, for its videos
    "fast_vlm": ["timm"],
    "gemma3": [],
    "paligemma": [],
    "perception_lm": ["torchvision", "timm"],
    "smolvlm": ["torchvision", "num2words"],
}
