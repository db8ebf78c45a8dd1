"""Processors for image-to-text models with random weights, which need no files; for tests."""

from __future__ import annotations

import math
from importlib.resources import files
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from sca.language_models.tiny_gpt2 import END_TOKEN

FLORENCE2_IMAGE_SIZE = 768  # Florence-2's configuration contains no image size
IMAGE_TOKEN = "<image>"


def build_dummy_processor(config: PreTrainedConfig) -> Any:
    """Build a processor with the image size of a model and this package's small tokenizer.

    Args:
        config: Configuration of a BLIP, BLIP-2, GIT, Florence-2 or Kosmos-2.

    Returns:
        The processor of the architecture.

    Raises:
        ValueError: The architecture is not supported.
    """
    if config.model_type not in ("blip", "blip-2", "git", "florence2", "kosmos-2"):
        raise ValueError(
            f"random weights are not supported for {config.model_type!r}, whose processor is unknown; pass "
            "weights=FOLDER "
            "or a Hub id"
        )
    image_size = getattr(config.vision_config, "image_size", FLORENCE2_IMAGE_SIZE)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(files("sca.language_models") / "tiny_tokenizer.json"),
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END_TOKEN),
        extra_special_tokens={"image_token": IMAGE_TOKEN} if config.model_type == "florence2" else {},
    )
    size = {"height": image_size, "width": image_size}
    processor_classes: Any = IMAGE_PROCESSOR_MAPPING[type(config)]
    image_processor = processor_classes["pil"](size=size, crop_size=size, do_center_crop=False)
    options = {}
    if config.model_type == "florence2":
        tokenizer.add_tokens([f"<loc_{index}>" for index in range(1000)])
        image_processor.image_seq_length = (image_size // math.prod(config.vision_config.patch_stride)) ** 2 + 1
    elif config.model_type == "blip-2":
        options["num_query_tokens"] = config.num_query_tokens
    return getattr(transformers, type(config).__name__.replace("Config", "Processor"))(
        image_processor, tokenizer, **options
    )
