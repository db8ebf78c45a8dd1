"""Image encoder from the backbone and neck of an mmdet detector."""

from __future__ import annotations

from sca_registry.contracts import ImageFormat
from torch import Tensor, nn

from sca.nn.feature_shape import freeze_unused_parameters, probe_feature_shape
from sca_mmdet.detectors import build_detector, load_mmdet_config, silence_mmdet

TARGET_STRIDE = 16  # stride of SAM's grid, to select the default level


class MmdetEncoder(nn.Module):
    """Image encoder from one feature level of a detector's backbone and neck.

    Args:
        config: Name of a config in mmdet, or path of a file.
        weights: File or URL in the format of mmdet.
        pretrained: Load `weights`; False for random weights.
        image_size: Side S of the square model input in pixels.
        feature_level: Index of the feature level, from the finest, 0, or negative from the coarsest. By default the
            level with the stride nearest to 16.
        resize_mode: "pad" or "stretch", see `ImageFormat`.

    Raises:
        ValueError: The config, the weights or the level do not exist, or the backbone or neck needs compiled operators.
    """

    default_segmenter = "box"

    def __init__(
        self,
        config: str,
        weights: str | None = None,
        pretrained: bool = True,
        image_size: int = 640,
        feature_level: int | None = None,
        resize_mode: str = "pad",
    ):
        super().__init__()
        if pretrained and weights is None:
            raise ValueError("no weights; set weights=FILE or a URL, or pretrained=false")
        mmdet_config = load_mmdet_config(config, ("backbone", "neck"))
        detector, _ = build_detector(mmdet_config, config, weights if pretrained else None)
        self.checkpoint = weights if pretrained else None
        self.backbone = detector.backbone
        self.neck = detector.neck if getattr(detector, "with_neck", False) else None
        self.image_format = _make_image_format(
            mmdet_config.model.get("data_preprocessor") or {}, image_size, resize_mode
        )
        self.level = 0
        levels = self._probe_levels()
        if feature_level is None:
            feature_level = min(levels, key=lambda number: abs(levels[number][1] - TARGET_STRIDE), default=0)
        if not -len(levels) <= feature_level < len(levels):
            raise ValueError(
                f"feature_level {feature_level} is out of range; {config} has {len(levels)} levels, from "
                f"{-len(levels)} to {len(levels) - 1}"
            )
        self.level = feature_level % len(levels)
        self.channels, self.stride = levels[self.level]
        freeze_unused_parameters(self, self.image_format.size)  # parameters of the other levels

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode normalized images: (B, 3, S, S) -> (B, C, S / stride, S / stride)."""
        return self._compute_levels(pixel_values)[self.level]

    def _compute_levels(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        with silence_mmdet():
            features = self.backbone(pixel_values)
            return tuple(features if self.neck is None else self.neck(features))

    def _probe_levels(self) -> dict[int, tuple[int, int]]:
        """Return channels and stride of each level, up to the first whose grid does not divide the image."""
        shapes: dict[int, tuple[int, int]] = {}
        while True:
            self.level = len(shapes)
            try:
                shapes[self.level] = probe_feature_shape(self, self.image_format.size)
            except IndexError:
                return shapes
            except ValueError:  # the level is too coarse for the image size
                if shapes:
                    return shapes
                raise


def _make_image_format(preprocessor: dict, image_size: int, resize_mode: str) -> ImageFormat:
    """Convert mmdet's preprocessing, which reads images as BGR in 0..255, to an image format."""
    mean, std = preprocessor.get("mean") or [0.0] * 3, preprocessor.get("std") or [1.0] * 3
    is_bgr = not preprocessor.get("bgr_to_rgb")
    if is_bgr:
        mean, std = mean[::-1], std[::-1]
    return ImageFormat(
        size=image_size,
        mean=tuple(value / 255 for value in mean),
        std=tuple(value / 255 for value in std),
        channel_order="bgr" if is_bgr else "rgb",
        resize_mode=resize_mode,
    )
