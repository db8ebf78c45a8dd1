"""mmcv's compiled operators, as far as torchvision has them, so that mmcv-lite will do.

mmdet imports `mmcv._ext` wherever it uses any of them; mmcv-lite comes without it. The module that is put in its place
has non-maximum suppression and RoIAlign, and whatever else is called says that it needs the compiled mmcv. Where the
compiled one is installed, it is left alone.
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

NAME = "mmcv._ext"
WAYS = "install the compiled one (pip install mmcv==2.1.0, which builds it), or choose a config without it"
NEEDS = {  # what a config names, and the operator that it uses
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
SWITCHES = {
    "dcn": "deform_conv",
    "dcn_cfg": "deform_conv",
    "dcn_on_last_conv": "deform_conv",
    "with_deform": "deform_conv",
}


def prepare() -> None:
    """Makes `import mmdet` possible with mmcv-lite."""
    if NAME in sys.modules or find_spec(NAME) is not None:
        return
    module = _Operators(NAME)
    module.__spec__ = ModuleSpec(NAME, None)
    for operator in (nms, softnms, roi_align_forward, roi_align_backward):
        setattr(module, operator.__name__, operator)
    sys.modules[NAME] = module
    from mmcv.ops import multi_scale_deform_attn

    multi_scale_deform_attn.IS_CUDA_AVAILABLE = False  # its plain torch version works on any device


def refuse_compiled(config: Mapping[str, Any], name: str) -> None:
    """Raises ValueError if a model's config asks for an operator that is not there, before anything is built."""
    if find_spec(NAME) is not None and not isinstance(sys.modules.get(NAME), _Operators):
        return
    for where, operator in _asked(config, "model"):
        raise ValueError(f"{name} needs mmcv's compiled {operator} ({where}): {WAYS}")


def _asked(config: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(config, Mapping):
        kind = config.get("type")
        if isinstance(kind, str) and kind in NEEDS and config.get("use_dcn", True):
            yield f"{path}.type={kind}", NEEDS[kind]
        for key, value in config.items():
            if key in SWITCHES and value:
                yield f"{path}.{key}", SWITCHES[key]
            yield from _asked(value, f"{path}.{key}")
    elif isinstance(config, Sequence) and not isinstance(config, str):
        for number, value in enumerate(config):
            yield from _asked(value, f"{path}[{number}]")


class _Operators(ModuleType):
    """Has every name; what is not implemented fails when it is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*_: Any, **__: Any) -> None:
            raise RuntimeError(f"this needs mmcv's compiled {name}: {WAYS}")

        return absent


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """(N, 4) boxes x1 y1 x2 y2 and (N,) scores -> the rows to keep, best first."""
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
    """Soft-NMS (arXiv 1704.04503), which lowers the scores of what overlaps: method 0 to nothing, 1 by the share that
    overlaps, 2 by a Gaussian of it. Rows are written into `dets` (N, 5) as they are chosen; gives which rows these are.
    """
    scores, left, chosen = scores.clone(), torch.ones(len(boxes), dtype=torch.bool), []
    area = (boxes[:, 2:] - boxes[:, :2] + offset).prod(1)
    while left.any():
        best = int(scores.masked_fill(~left, -torch.inf).argmax())
        dets[len(chosen), :4], dets[len(chosen), 4] = boxes[best], scores[best]
        chosen.append(best)
        left[best] = False
        low, high = torch.maximum(boxes[best, :2], boxes[:, :2]), torch.minimum(boxes[best, 2:], boxes[:, 2:])
        both = (high - low + offset).clamp(min=0).prod(1)
        iou = both / (area[best] + area - both)
        if method == 2:
            factor = torch.exp(-iou.square() / sigma)
        else:
            factor = torch.where(iou < iou_threshold, 1.0, 1 - iou if method else 0.0)
        scores = torch.where(left, scores * factor, scores)
        left &= scores >= min_score
    return torch.tensor(chosen, dtype=torch.long)


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
    """RoIAlign (arXiv 1703.06870) by averages, into `output` (R, C, aligned_height, aligned_width)."""
    if pool_mode != 1:
        raise RuntimeError(f"RoIAlign by maxima needs the compiled mmcv: {WAYS}")
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
    with torch.enable_grad():
        features = torch.zeros_like(grad_input, requires_grad=True)
        found = roi_align(features, rois, (aligned_height, aligned_width), spatial_scale, sampling_ratio, aligned)
        (gradient,) = torch.autograd.grad(found, features, grad_output)
    grad_input.copy_(gradient)
