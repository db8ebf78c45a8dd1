"""The file `sizes.json` of a checkpoint in PAM's layout: sizes that its tensors do not contain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sca.checkpoints.layout import SIZES_FILE
from sca.io.errors import InputError
from sca.io.json import read_json

IMAGE_SIZE, MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 1024, 32, 4096
IMAGE_SIZE_STEP = 32  # an image token has 2 x 2 cells of 16 pixels
FIXED_SIZES: Mapping[str, Mapping[str, Any]] = {
    "neck": {"fpn_top_down_levels": [2, 3], "scalp": 1},
    "perceiver": {"downsample": 2},
}
HEAD_FIELDS = {"hiera": "num_heads", "sam_decoder": "heads", "perceiver": "heads"}
LIST_FIELDS = ("window_spec", "global_att_blocks")
TENSOR_FIELDS: Mapping[str, tuple[str, ...]] = {  # fields that must equal the sizes of the tensors
    "hiera": ("embed_dim", "stages", "window_pos_embed_bkg_spatial_size"),
    "neck": ("d_model", "backbone_channel_list"),
    "sam_decoder": ("width", "depth", "mlp", "iou_depth", "iou_width", "mask_channels"),
    "perceiver": ("width", "queries", "depth", "mlp"),
}

Sizes = Mapping[str, Any]


def read_sizes(folder: Path) -> Sizes:
    """Read the sizes of a checkpoint.

    Args:
        folder: Checkpoint folder.

    Returns:
        Fields by table, and `image_size`; empty without the file.

    Raises:
        InputError: The file is not an object of known fields, or a value is invalid.
    """
    path = folder / SIZES_FILE
    try:
        sizes = read_json(path)
    except FileNotFoundError:
        return {}
    if not isinstance(sizes, dict):
        raise InputError(f"{path} contains no JSON object; correct or remove the file")
    image_size = sizes.get("image_size", IMAGE_SIZE)
    if not (
        _is_count(image_size) and MIN_IMAGE_SIZE <= image_size <= MAX_IMAGE_SIZE and image_size % IMAGE_SIZE_STEP == 0
    ):
        expected = f"a multiple of {IMAGE_SIZE_STEP} from {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE}"
        raise _make_error(path, "image_size", image_size, expected)
    for table, fields in sizes.items():
        if table == "image_size":
            continue
        if table not in TENSOR_FIELDS:
            raise InputError(f"{path}: unknown field {table!r:.80}; use {', '.join(('image_size', *TENSOR_FIELDS))}")
        _check_table(path, table, fields)
    return sizes


def _check_table(path: Path, table: str, fields: Any) -> None:
    if not isinstance(fields, dict):
        raise _make_error(path, table, fields, "an object")
    fixed = FIXED_SIZES.get(table, {})
    head_field = HEAD_FIELDS.get(table)
    known = [*filter(None, [head_field]), *(LIST_FIELDS if table == "hiera" else ()), *TENSOR_FIELDS[table], *fixed]
    for field, value in fields.items():
        name = f"{table}.{field}"
        if field not in known:
            raise InputError(f"{path}: unknown field {name!r:.80}; use {', '.join(known)}")
        if field in fixed and not _is_equal(value, fixed[field]):
            raise _make_error(path, name, value, f"{fixed[field]}, the only supported value")
        if field == head_field and not (_is_count(value) and value >= 1):
            raise _make_error(path, name, value, "an integer of at least 1")
        if field in LIST_FIELDS and not (isinstance(value, list) and all(map(_is_count, value))):
            raise _make_error(path, name, value, "a list of integers of at least 0")


def check_sizes_fit_tensors(sizes: Sizes, tensor_sizes: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Check sizes against those of the tensors.

    Args:
        sizes: Output of `read_sizes`.
        tensor_sizes: Sizes that the tensors have, by field and table. Tables that are not included are not checked.
        folder: Checkpoint folder, for error messages.

    Raises:
        InputError: A size differs, heads do not divide their width, or a list does not fit the stages or blocks.
    """
    path = folder / SIZES_FILE
    for table, expected in tensor_sizes.items():
        fields = sizes.get(table, {})
        for field in TENSOR_FIELDS[table]:
            if field in fields and not _is_equal(fields[field], expected[field]):
                raise _make_error(path, f"{table}.{field}", fields[field], f"{expected[field]}, as the tensors have")
        head_field = HEAD_FIELDS.get(table)
        if head_field in fields:
            # cross-attention of the two-way transformers has half the width
            width = expected["embed_dim"] if table == "hiera" else expected["width"] // 2
            if width % fields[head_field]:
                raise _make_error(path, f"{table}.{head_field}", fields[head_field], f"a divisor of {width}")
    if "hiera" in tensor_sizes:
        stages, fields = tensor_sizes["hiera"]["stages"], sizes.get("hiera", {})
        windows, global_blocks = (fields.get(field) for field in LIST_FIELDS)
        if windows is not None and not (len(windows) == len(stages) and all(windows)):
            expected_windows = f"{len(stages)} sizes of at least 1, one for each stage"
            raise _make_error(path, "hiera.window_spec", windows, expected_windows)
        if global_blocks is not None and any(block >= sum(stages) for block in global_blocks):
            raise _make_error(path, "hiera.global_att_blocks", global_blocks, f"indices less than {sum(stages)}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_equal(value: Any, expected: Any) -> bool:
    values, expected_values = ([each] if not isinstance(each, list) else each for each in (value, expected))
    return type(value) is type(expected) and all(map(_is_count, values)) and values == expected_values


def _make_error(path: Path, name: str, value: Any, expected: str) -> InputError:
    return InputError(f"{path}: {name} is {value!r:.80}; expected {expected}")
