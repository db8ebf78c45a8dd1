"""Other automatic mask generators with the weights of our models.

These are `SamAutomaticMaskGenerator` of the original code (github.com/facebookresearch/segment-anything) and the
pipeline `mask-generation` of transformers. Both use the parameters of a model of ours, which are not copied.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from sca_registry.spec import EverythingOptions
from torch import Tensor, nn

from sca.io.masks import RLE, encode_rle

if TYPE_CHECKING:
    from segment_anything.modeling import Sam
    from transformers import SamModel

    from sca.encoders.sam import SamEncoder
    from sca.model import SegmentationModel
    from sca.segmenters.sam import SamSegmenter

POINTS_PER_BATCH = 64  # default of both generators
ORIGINAL_NAME_PATTERNS = (  # of tensors, from ours
    (r"^vision\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
    (r"^vision\.neck\.conv1\.", "image_encoder.neck.0."),
    (r"^vision\.neck\.layer_norm1\.", "image_encoder.neck.1."),
    (r"^vision\.neck\.conv2\.", "image_encoder.neck.2."),
    (r"^vision\.neck\.layer_norm2\.", "image_encoder.neck.3."),
    (r"^vision\.layers\.(\d+)\.", r"image_encoder.blocks.\1."),
    (r"^vision\.", "image_encoder."),
    (r"^decoder\.", "mask_decoder."),
    (r"(iou_prediction_head|hypernetworks_mlps\.\d)\.layers\.0\.", r"\1.layers.1."),
    (r"\.proj_in\.", ".layers.0."),
    (r"\.proj_out\.", ".layers.2."),
    (r"upscale_conv1", "output_upscaling.0"),
    (r"upscale_layer_norm", "output_upscaling.1"),
    (r"upscale_conv2", "output_upscaling.3"),
    (r"mask_embed\.conv1", "mask_downscaling.0"),
    (r"mask_embed\.layer_norm1", "mask_downscaling.1"),
    (r"mask_embed\.conv2", "mask_downscaling.3"),
    (r"mask_embed\.layer_norm2", "mask_downscaling.4"),
    (r"mask_embed\.conv3", "mask_downscaling.6"),
    (r"\bpoint_embed\.", "point_embeddings."),
    (r"shared_embedding\.positional_embedding", "pe_layer.positional_encoding_gaussian_matrix"),
    (r"\.layer_norm", ".norm"),
)
LIBRARY_NAME_PREFIXES = (("vision.", "vision_encoder."), ("decoder.", "mask_decoder."))  # from ours to transformers'


Point = tuple[float, float]  # x y in image pixels


class GeneratedMask(NamedTuple):
    """Mask of an automatic mask generator.

    Attributes:
        rle: Mask in image pixels.
        predicted_iou: IoU predicted by the segmenter.
        point: x y of the point prompt in image pixels; None if the generator does not return it.
    """

    rle: RLE
    predicted_iou: float
    point: Point | None


MaskGenerator = Callable[[Image.Image, EverythingOptions], list[GeneratedMask]]


def check_original_code() -> None:
    """Check that the original code is installed.

    Raises:
        ValueError: It is not.
    """
    try:
        import segment_anything  # noqa: F401
    except ImportError as error:  # also of torchvision, which it imports
        raise ValueError(
            f"the original code of SAM cannot be imported ({error}); install it with `pip install segment-anything "
            "torchvision`, or name other parts"
        ) from error


def build_original_generator(model: SegmentationModel) -> MaskGenerator:
    """Build the original generator.

    Args:
        model: Model with a SAM encoder and a SAM segmenter in float32.

    Returns:
        A function of an image and options that returns masks.

    Raises:
        ValueError: The original code is not installed.
    """
    check_original_code()
    from segment_anything import SamAutomaticMaskGenerator

    sam = build_original_sam(*_get_parts(model))

    def generate_masks(image: Image.Image, options: EverythingOptions) -> list[GeneratedMask]:
        generator = SamAutomaticMaskGenerator(
            sam,
            points_per_side=options.points_per_side,
            points_per_batch=POINTS_PER_BATCH,
            pred_iou_thresh=options.pred_iou_thresh,
            stability_score_thresh=options.stability_score_thresh,
            stability_score_offset=options.stability_score_offset,
            box_nms_thresh=options.box_nms_thresh,
            output_mode="coco_rle",
        )
        return [
            GeneratedMask(each["segmentation"], each["predicted_iou"], tuple(each["point_coords"][0]))
            for each in generator.generate(np.asarray(image))
        ]

    return generate_masks


def build_pipeline_generator(model: SegmentationModel) -> MaskGenerator:
    """Build the pipeline of transformers.

    Args:
        model: Model with a SAM encoder and a SAM segmenter.

    Returns:
        A function of an image and options that returns masks.
    """
    from transformers import SamImageProcessor
    from transformers.pipelines.mask_generation import MaskGenerationPipeline

    encoder, segmenter = _get_parts(model)
    image_size = encoder.image_format.size
    processor = SamImageProcessor(
        size={"longest_edge": image_size},
        pad_size={"height": image_size, "width": image_size},
        image_mean=encoder.image_format.mean,
        image_std=encoder.image_format.std,
    )
    device = next(encoder.parameters()).device
    pipeline = MaskGenerationPipeline(
        model=build_library_sam(encoder, segmenter), image_processor=processor, device=device
    )

    def generate_masks(image: Image.Image, options: EverythingOptions) -> list[GeneratedMask]:
        output = pipeline(
            image,
            points_per_batch=POINTS_PER_BATCH,
            points_per_crop=options.points_per_side,
            pred_iou_thresh=options.pred_iou_thresh,
            stability_score_thresh=options.stability_score_thresh,
            stability_score_offset=options.stability_score_offset,
            crops_nms_thresh=options.box_nms_thresh,
        )
        return [
            GeneratedMask(encode_rle(np.asarray(mask)), float(score), None)
            for mask, score in zip(output["masks"], output["scores"], strict=True)
        ]

    return generate_masks


def _get_parts(model: SegmentationModel) -> tuple[SamEncoder, SamSegmenter]:
    return cast("SamEncoder", model.encoder), cast("SamSegmenter", model.segmenter)


def build_original_sam(encoder: SamEncoder, segmenter: SamSegmenter) -> Sam:
    """Build the original model with our parameters.

    The LayerNorms of its two-way transformer have the epsilon of transformers and ours, which is smaller.

    Args:
        encoder: SAM encoder.
        segmenter: Its segmenter.

    Returns:
        The model in eval mode.
    """
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    vision: Any = encoder.vision.config  # transformers' types allow None
    decoder, image_format = segmenter.decoder, encoder.image_format
    block = decoder.transformer.layers[0]
    hidden_size, grid_size = decoder.hidden_size, segmenter.grid_size
    with torch.device("meta"):
        image_encoder = ImageEncoderViT(
            img_size=image_format.size,
            patch_size=encoder.stride,
            embed_dim=vision.hidden_size,
            depth=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            mlp_ratio=vision.mlp_dim / vision.hidden_size,
            out_chans=encoder.channels,
            use_rel_pos=True,
            window_size=vision.window_size,
            global_attn_indexes=tuple(vision.global_attn_indexes),
            norm_layer=partial(nn.LayerNorm, eps=vision.layer_norm_eps),
        )
        prompt_encoder = PromptEncoder(
            hidden_size,
            (grid_size, grid_size),
            (image_format.size, image_format.size),
            mask_in_chans=segmenter.prompt_encoder.mask_embed.conv2.out_channels,
        )
        transformer = TwoWayTransformer(
            depth=len(decoder.transformer.layers),
            embedding_dim=hidden_size,
            num_heads=block.self_attn.num_attention_heads,
            mlp_dim=block.mlp.lin1.out_features,
        )
        mask_decoder = MaskDecoder(
            transformer_dim=hidden_size,
            transformer=transformer,
            iou_head_hidden_dim=decoder.iou_prediction_head.proj_in.out_features,
        )
    for layer in transformer.layers:
        for norm in (layer.norm1, layer.norm2, layer.norm3, layer.norm4):
            norm.eps = block.layer_norm1.eps
    mean, std = ([255 * value for value in values] for values in (image_format.mean, image_format.std))
    sam = Sam(image_encoder, prompt_encoder, mask_decoder, mean, std)
    sam.load_state_dict(_collect_tensors(encoder, segmenter, convert_to_original_name), assign=True)
    return sam.to(next(encoder.parameters()).device).eval()


def build_library_sam(encoder: SamEncoder, segmenter: SamSegmenter) -> SamModel:
    """Build transformers' model with our parameters.

    Args:
        encoder: SAM encoder.
        segmenter: Its segmenter.

    Returns:
        The model in eval mode.
    """
    from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig

    decoder, image_size = segmenter.decoder, encoder.image_format.size
    block = decoder.transformer.layers[0]
    config = SamConfig(
        vision_config=deepcopy(encoder.vision.config),
        prompt_encoder_config=SamPromptEncoderConfig(
            hidden_size=decoder.hidden_size,
            image_size=image_size,
            patch_size=encoder.stride,
            mask_input_channels=segmenter.prompt_encoder.mask_embed.conv2.out_channels,
        ),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=decoder.hidden_size,
            mlp_dim=block.mlp.lin1.out_features,
            num_hidden_layers=len(decoder.transformer.layers),
            num_attention_heads=block.self_attn.num_attention_heads,
            iou_head_hidden_dim=decoder.iou_prediction_head.proj_in.out_features,
            layer_norm_eps=block.layer_norm1.eps,
        ),
    )
    with torch.device("meta"):
        sam = SamModel(config)
    tensors = _collect_tensors(encoder, segmenter, _convert_to_library_name)
    frequencies = tensors["prompt_encoder.shared_embedding.positional_embedding"]
    sam.load_state_dict(tensors | {"shared_image_embedding.positional_embedding": frequencies}, assign=True)
    return sam.eval()


def convert_to_original_name(name: str) -> str:
    """Convert the name of a parameter of our SAM encoder or segmenter to that in the original code."""
    for pattern, original in ORIGINAL_NAME_PATTERNS:
        name = re.sub(pattern, original, name)
    return name


def _convert_to_library_name(name: str) -> str:
    for prefix, library_prefix in LIBRARY_NAME_PREFIXES:
        if name.startswith(prefix):
            return library_prefix + name.removeprefix(prefix)
    return name


def _collect_tensors(
    encoder: SamEncoder, segmenter: SamSegmenter, convert_name: Callable[[str], str]
) -> dict[str, Tensor]:
    return {
        convert_name(name): tensor
        for part in (encoder, segmenter)
        for name, tensor in part.state_dict(keep_vars=True).items()
    }
