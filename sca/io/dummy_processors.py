"""Processors for models with random weights, which need no files; for tests."""

from __future__ import annotations

import math
import string
from importlib.resources import files
from typing import Any

import transformers
from transformers import (
    BertTokenizer,
    CLIPTokenizer,
    GroundingDinoProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RTDetrConfig,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

END_TOKEN = "<|end|>"  # of tiny_tokenizer.json
IMAGE_TOKEN = "<image>"
FLORENCE2_IMAGE_SIZE = 768  # Florence-2's configuration contains no image size
FLORENCE2_PARSERS = ("pure_text", "bboxes", "description_with_bboxes", "description_with_bboxes_or_polygons")
LONGEST_TO_SHORTEST_EDGE = 5 / 3  # of images of DETR, up to rounding
BERT_PUNCTUATION_ID = 999  # id of the first printable character in BERT's vocabulary; Grounding DINO reads "." and "?"
BERT_SPECIAL_TOKENS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}


def build_dummy_processor(config: PreTrainedConfig) -> Any:
    """Build a processor with the image size of a model and a small tokenizer.

    Args:
        config: Configuration of a BLIP, BLIP-2, GIT, Florence-2, Kosmos-2, OWLv2, Grounding DINO or SAM 3.

    Returns:
        The processor of the architecture.

    Raises:
        ValueError: The architecture is not supported.
    """
    if config.model_type in ("owlv2", "sam3"):
        return _get_processor_class(config)(build_dummy_image_processor(config), _build_clip_tokenizer(config))
    if config.model_type in ("grounding-dino", "mm-grounding-dino"):
        return GroundingDinoProcessor(build_dummy_image_processor(config), _build_bert_tokenizer())
    if config.model_type not in ("blip", "blip-2", "git", "florence2", "kosmos-2"):
        raise ValueError(
            f"random weights are not supported for {config.model_type!r}, whose processor is unknown; pass "
            "weights=FOLDER or a Hub id"
        )
    image_size = getattr(config.vision_config, "image_size", FLORENCE2_IMAGE_SIZE)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(files("sca.language_models") / "tiny_tokenizer.json"),
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END_TOKEN),
        extra_special_tokens={"image_token": IMAGE_TOKEN} if config.model_type == "florence2" else {},
    )
    size = {"height": image_size, "width": image_size}
    image_processor = _get_image_processor_class(config)(size=size, crop_size=size, do_center_crop=False)
    options: dict[str, Any] = {}
    if config.model_type == "florence2":
        tokenizer.add_tokens([f"<loc_{index}>" for index in range(1000)])
        image_processor.image_seq_length = (image_size // math.prod(config.vision_config.patch_stride)) ** 2 + 1
        options["post_processor_config"] = {name: {} for name in FLORENCE2_PARSERS}
    elif config.model_type == "blip-2":
        options["num_query_tokens"] = config.num_query_tokens
    return _get_processor_class(config)(image_processor, tokenizer, **options)


def build_dummy_image_processor(config: PreTrainedConfig) -> Any:
    """Build the image processor of a detector.

    Args:
        config: Configuration of a model with an image processor. `image_size`, if set, is the size of its input: that
            of its shorter side for models that keep the aspect ratio.

    Returns:
        The image processor of the architecture, with its default size if the configuration has none.
    """
    processor_class = _get_image_processor_class(config)
    image_size = getattr(config, "image_size", None) or getattr(
        getattr(config, "vision_config", None), "image_size", None
    )
    if image_size is None:
        return processor_class()
    if "shortest_edge" in processor_class.size:
        longest_edge = int(image_size * LONGEST_TO_SHORTEST_EDGE)
        return processor_class(size={"shortest_edge": image_size, "longest_edge": longest_edge})
    return processor_class(size={"height": image_size, "width": image_size})


def _get_image_processor_class(config: PreTrainedConfig) -> Any:
    """Return the class of an architecture; RT-DETR's for RT-DETRv2 and D-FINE, which have none of their own."""
    mapping: Any = IMAGE_PROCESSOR_MAPPING
    classes = mapping[type(config)] if type(config) in mapping else mapping[RTDetrConfig]
    return classes.get("pil") or classes["torchvision"]


def _get_processor_class(config: PreTrainedConfig) -> Any:
    return getattr(transformers, type(config).__name__.replace("Config", "Processor"))


def _build_clip_tokenizer(config: PreTrainedConfig) -> CLIPTokenizer:
    """Build CLIP's tokenizer with a vocabulary of letters; CLIP pools at the end token, the one with the largest id."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=config.get_text_config().max_position_embeddings)


def _build_bert_tokenizer() -> BertTokenizer:
    """Build BERT's tokenizer with a vocabulary of letters, in which special tokens and punctuation have BERT's ids."""
    letters = [chr(code) for code in range(ord("!"), 127) if not chr(code).isupper()]
    tokens = [*letters, *(f"##{letter}" for letter in letters)]
    unused_ids = {*range(BERT_PUNCTUATION_ID)} - {*BERT_SPECIAL_TOKENS.values()}
    vocabulary = BERT_SPECIAL_TOKENS | {token: index for index, token in enumerate(tokens, BERT_PUNCTUATION_ID)}
    return BertTokenizer(vocab=vocabulary | {f"[unused{index}]": index for index in unused_ids})
