"""Replacements of mmcv's compiled operators by torchvision's, so that mmcv-lite is sufficient.

mmdet imports `mmcv._ext`, which mmcv-lite lacks, wherever it uses a compiled operator. The replacement of that module
implements non-maximum suppression and RoIAlign. All other operators raise an error that the compiled mmcv is required.
If the compiled mmcv is installed, it is used.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import nms as suppress
from torchvision.ops import roi_align

EXTENSION_MODULE = "mmcv._ext"
REMEDY = "install the compiled one (pip install mmcv==2.1.0, which builds it), or choose a config without it"
OPERATOR_BY_TYPE = {  # type in a config, and the operator it uses
    "DCN": "deform_conv",
    "DCNv2": "modulated_deform_conv",
    "FPN_CARAFE": "carafe",
    "carafe": "carafe",
    "CTResNetNeck": "modulated_deform_conv",
    "DyHead": "modulated_deform_conv",
    "ATSSVLFusionHead": "modulated_deform_conv",
    "SAC": "deform_conv",
    "RepPointsHead": "deform_conv",
    "GARPNHead": "deform_conv",
    "GARetinaHead": "deform_conv",
    "GAFPNHead": "deform_conv",
    "StageCascadeRPNHead": "deform_conv",
    "CentripetalHead": "deform_conv",
    "TOODHead": "deform_conv",
    "DDODHead": "deform_conv",
    "VFNetHead": "deform_conv",
    "DeformRoIPoolPack": "deform_roi_pool",
    "ModulatedDeformRoIPoolPack": "deform_roi_pool",
    "RoIPool": "roi_pool",
}
OPERATOR_BY_FLAG = {
    "dcn": "deform_conv",
    "dcn_cfg": "deform_conv",
    "dcn_on_last_conv": "deform_conv",
    "with_deform": "deform_conv",
}


def install_operators() -> None:
    """Install the replacement operators, so that mmdet can be imported with mmcv-lite."""
    if EXTENSION_MODULE in sys.modules or find_spec(EXTENSION_MODULE) is not None:
        return
    module = _OperatorModule(EXTENSION_MODULE)
    module.__spec__ = ModuleSpec(EXTENSION_MODULE, None)
    for operator in (nms, softnms, roi_align_forward, roi_align_backward):
        setattr(module, operator.__name__, operator)
    sys.modules[EXTENSION_MODULE] = module
    from mmcv.ops import multi_scale_deform_attn

    multi_scale_deform_attn.IS_CUDA_AVAILABLE = False  # use the pure torch version, which works on any device


def check_operators(config: Mapping[str, Any], name: str) -> None:
    """Check that all operators of a model are available, before it is built.

    Args:
        config: Config of the model.
        name: Name of the config, for error messages.

    Raises:
        ValueError: The model needs an operator of the compiled mmcv.
    """
    if find_spec(EXTENSION_MODULE) is not None and not isinstance(sys.modules.get(EXTENSION_MODULE), _OperatorModule):
        return
    for location, operator in _iter_required_operators(config, "model"):
        raise ValueError(f"{name} needs mmcv's compiled {operator} ({location}): {REMEDY}")


def _iter_required_operators(config: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(config, Mapping):
        type_name = config.get("type")
        if isinstance(type_name, str) and type_name in OPERATOR_BY_TYPE and config.get("use_dcn", True):
            yield f"{path}.type={type_name}", OPERATOR_BY_TYPE[type_name]
        for key, value in config.items():
            if key in OPERATOR_BY_FLAG and value:
                yield f"{path}.{key}", OPERATOR_BY_FLAG[key]
            yield from _iter_required_operators(value, f"{path}.{key}")
    elif isinstance(config, Sequence) and not isinstance(config, str):
        for index, value in enumerate(config):
            yield from _iter_required_operators(value, f"{path}[{index}]")


class _OperatorModule(ModuleType):
    """Module with every name; operators that are not implemented fail when called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def raise_missing(*_: Any, **__: Any) -> None:
            raise RuntimeError(f"the compiled operator {name} of mmcv is required: {REMEDY}")

        return raise_missing


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Suppress overlapping boxes.

    Args:
        boxes: (N, 4) x1 y1 x2 y2.
        scores: (N,) scores.
        iou_threshold: IoU above which the box with the lower score is removed.
        offset: 1 if x2 and y2 are inclusive, else 0.

    Returns:
        The rows to keep, best first.
    """
    if offset:
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] + offset), dim=1)
    return suppress(boxes, scores, iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Suppress overlapping boxes by Soft-NMS (arXiv 1704.04503), which lowers their scores.

    Args:
        boxes: (N, 4) x1 y1 x2 y2.
        scores: (N,) scores.
        dets: (N, 5) output, boxes and new scores in the order of selection.
        iou_threshold: IoU from which scores are lowered by methods 0 and 1.
        sigma: Parameter of the Gaussian of method 2.
        min_score: Boxes with a lower score are removed.
        method: 0 sets scores to zero, 1 multiplies them by 1 - IoU, 2 by exp(-IoU ** 2 / sigma).
        offset: 1 if x2 and y2 are inclusive, else 0.

    Returns:
        The selected rows, in order.
    """
    scores, is_left, selected_rows = scores.clone(), torch.ones(len(boxes), dtype=torch.bool), []
    area = (boxes[:, 2:] - boxes[:, :2] + offset).prod(1)
    while is_left.any():
        best = int(scores.masked_fill(~is_left, -torch.inf).argmax())
        dets[len(selected_rows), :4], dets[len(selected_rows), 4] = boxes[best], scores[best]
        selected_rows.append(best)
        is_left[best] = False
        top_left, bottom_right = (
            torch.maximum(boxes[best, :2], boxes[:, :2]),
            torch.minimum(boxes[best, 2:], boxes[:, 2:]),
        )
        intersection = (bottom_right - top_left + offset).clamp(min=0).prod(1)
        iou = intersection / (area[best] + area - intersection)
        if method == 2:
            factor = torch.exp(-iou.square() / sigma)
        else:
            factor = torch.where(iou < iou_threshold, 1.0, 1 - iou if method else 0.0)
        scores = torch.where(is_left, scores * factor, scores)
        is_left &= scores >= min_score
    return torch.tensor(selected_rows, dtype=torch.long)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Compute RoIAlign with average pooling (arXiv 1703.06870).

    Args:
        input: (B, C, h, w) features.
        rois: (R, 5) image index and box x1 y1 x2 y2 in image pixels.
        output: (R, C, aligned_height, aligned_width) output.
        argmax_y: Unused, for maximum pooling.
        argmax_x: Unused, for maximum pooling.
        aligned_height: Height of the output in cells.
        aligned_width: Width of the output in cells.
        spatial_scale: Feature cells per pixel.
        sampling_ratio: Samples per cell and axis; 0 for an adaptive number.
        pool_mode: 1 for average pooling; others are not supported.
        aligned: Shift boxes by half a pixel.

    Raises:
        RuntimeError: `pool_mode` is not 1.
    """
    if pool_mode != 1:
        raise RuntimeError(f"RoIAlign with maximum pooling requires the compiled mmcv: {REMEDY}")
    output.copy_(roi_align(input, rois, (aligned_height, aligned_width), spatial_scale, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Compute the gradient of `roi_align_forward` and write it to `grad_input` (B, C, h, w)."""
    with torch.enable_grad():
        features = torch.zeros_like(grad_input, requires_grad=True)
        pooled = roi_align(features, rois, (aligned_height, aligned_width), spatial_scale, sampling_ratio, aligned)
        (gradient,) = torch.autograd.grad(pooled, features, grad_output)
    grad_input.copy_(gradient)
