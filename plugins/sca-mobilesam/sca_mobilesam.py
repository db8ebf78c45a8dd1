"""MobileSAM (arXiv 2306.14289, github.com/ChaoningZhang/MobileSAM): SAM with TinyViT as its image encoder.

Its file mobile_sam.pt contains the encoder and SAM's prompt encoder and mask decoder under the tensor names of the
original code. Here the encoder is timm's TinyViT and the others are transformers' modules, so the names are converted.
"""

import re

import torch
from sca_registry.contracts import ImageFormat
from torch import nn

from sca.io.errors import InputError
from sca.io.weight_files import translate_load_errors
from sca.segmenters.sam import SamSegmenter

TINY_VIT_OPTIONS = {  # TinyViT-5M
    "embed_dims": (64, 128, 160, 320),
    "depths": (2, 2, 6, 2),
    "num_heads": (2, 4, 5, 10),
    "window_sizes": (7, 7, 14, 7),
}
ENCODER_NAME_RULES = (  # pattern of an original tensor name, and its replacement
    (r"^patch_embed\.seq\.0\.", "vit.patch_embed.conv1."),
    (r"^patch_embed\.seq\.2\.", "vit.patch_embed.conv2."),
    (r"^layers\.(\d)\.blocks\.", r"vit.stages.\1.blocks."),
    (r"^layers\.(\d)\.downsample\.", lambda match: f"vit.stages.{int(match[1]) + 1}.downsample."),
    (r"\.c\.", ".conv."),
)
SEGMENTER_NAME_RULES = (
    (r"^mask_decoder\.", "decoder."),
    (r"layers\.0\.(weight|bias)$", r"proj_in.\1"),  # heads, each an MLP of three layers
    (r"layers\.1\.(weight|bias)$", r"layers.0.\1"),
    (r"layers\.2\.(weight|bias)$", r"proj_out.\1"),
    (r"output_upscaling\.0\.", "upscale_conv1."),
    (r"output_upscaling\.1\.", "upscale_layer_norm."),
    (r"output_upscaling\.3\.", "upscale_conv2."),
    (r"mask_downscaling\.0\.", "mask_embed.conv1."),
    (r"mask_downscaling\.1\.", "mask_embed.layer_norm1."),
    (r"mask_downscaling\.3\.", "mask_embed.conv2."),
    (r"mask_downscaling\.4\.", "mask_embed.layer_norm2."),
    (r"mask_downscaling\.6\.", "mask_embed.conv3."),
    (r"point_embeddings\.", "point_embed."),
    (r"pe_layer\.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
    (r"\.norm", ".layer_norm"),
)
UNUSED_PREFIXES = ("norm_head.", "head.")  # classifier head of TinyViT


class MobileSamEncoder(nn.Module):
    """Image encoder TinyViT-5M, with stride 1 in its last stage, and SAM's neck.

    Args:
        weights: Path of mobile_sam.pt.
        pretrained: Load `weights`; False for random weights.
        image_size: Side S of the square model input in pixels, a multiple of 16.

    Raises:
        ValueError: The image size is not a multiple of 16, or the weights are missing.
        InputError: The weights cannot be read, or are not those of MobileSAM.
    """

    stride = 16
    channels = 256
    default_segmenter = "mobilesam"

    def __init__(self, weights: str | None = None, pretrained: bool = True, image_size: int = 1024):
        super().__init__()
        from timm.models.tiny_vit import TinyVit

        if image_size % self.stride:
            raise ValueError(f"image_size {image_size} must be a multiple of the stride {self.stride}")
        self.checkpoint = _check_weights(weights, pretrained)
        self.image_format = ImageFormat(size=image_size)
        self.vit = TinyVit(num_classes=0, drop_path_rate=0.0, **TINY_VIT_OPTIONS)
        self.vit.head = nn.Identity()
        self.vit.stages[-1].downsample.conv2.conv.stride = (1, 1)
        self.neck = nn.Sequential(
            nn.Conv2d(TINY_VIT_OPTIONS["embed_dims"][-1], self.channels, 1, bias=False),
            _ChannelNorm(self.channels),
            nn.Conv2d(self.channels, self.channels, 3, padding=1, bias=False),
            _ChannelNorm(self.channels),
        )
        if self.checkpoint:
            _load_tensors(self, self.checkpoint, "image_encoder.", ENCODER_NAME_RULES)

    def forward(self, pixel_values):
        """Encode normalized images: (B, 3, S, S) -> (B, 256, S / 16, S / 16)."""
        return self.neck(self.vit.stages(self.vit.patch_embed(pixel_values)))


class MobileSamSegmenter(SamSegmenter):
    """Segmenter with SAM's prompt encoder and mask decoder.

    Args:
        encoder: Image encoder.
        weights: Path of mobile_sam.pt; that of the encoder by default.
        pretrained: Load `weights`; False for random weights.

    Raises:
        InputError: The weights cannot be read, or are not those of MobileSAM.
    """

    def __init__(self, encoder, weights: str | None = None, pretrained: bool = True):
        super().__init__(encoder, pretrained=False)
        weights = weights or getattr(encoder, "checkpoint", None)
        self.checkpoint = weights if pretrained else None
        if self.checkpoint:
            _load_tensors(self, self.checkpoint, ("prompt_encoder.", "mask_decoder."), SEGMENTER_NAME_RULES)


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, h, w)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, features):
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _check_weights(weights: str | None, pretrained: bool) -> str | None:
    if pretrained and weights is None:
        raise ValueError("no weights; set weights=mobile_sam.pt, or pretrained=false")
    return weights if pretrained else None


def _load_tensors(component: nn.Module, file: str, prefix: str | tuple[str, ...], names: tuple) -> None:
    """Load the tensors of a file whose names start with `prefix` into a component; InputError if they do not fit."""
    with translate_load_errors(file):
        content = torch.load(file, map_location="cpu", weights_only=True)
    tensors = {}
    for name, tensor in content.items():
        if name.startswith(prefix):
            name = name.removeprefix(prefix) if isinstance(prefix, str) else name
            for pattern, replacement in names:
                name = re.sub(pattern, replacement, name)
            if not name.startswith(UNUSED_PREFIXES) and not name.endswith("attention_bias_idxs"):
                tensors[name] = tensor
    component_tensors = component.state_dict()
    # Batch counters may be missing in the file, because nothing uses them.
    counters = {name: tensor for name, tensor in component_tensors.items() if name.endswith("num_batches_tracked")}
    tensors = {**counters, **tensors}
    missing, unexpected = (
        sorted(component_tensors.keys() - tensors.keys()),
        sorted(tensors.keys() - component_tensors.keys()),
    )
    if missing or unexpected:
        problem = f"missing {missing[0]}" if missing else f"unexpected {unexpected[0]}"
        raise InputError(f"{file} is not a MobileSAM checkpoint: {problem} ({len(missing) + len(unexpected)} tensors)")
    with translate_load_errors(file):
        component.load_state_dict(tensors)
