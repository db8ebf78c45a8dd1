"""Detection of a user's own annotated images, and splits of a file without splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sca.data.json_stream import iter_members
from sca.io.errors import InputError
from sca.io.json import is_json_lines_name
from sca.io.paths import expand_user

SOURCE_DEFAULTS = {
    "class_name_task": "both",
    "augment": {"flip_prob": 0.5, "min_crop_fraction": 0.7, "color_jitter": 0.2},
}
DEFAULT_VAL_FRACTION = 0.1  # fraction of the images of a file without splits
MIN_VAL_IMAGES = 4  # images, but at most a third of all
SPLIT_ALIASES = {"train": ("training",), "val": ("valid", "validation"), "test": ("testing",)}  # names that tools use
COCO_LAYOUTS = (  # annotation file and image folder of "train" in layouts of the dataset `coco`
    ("train.json", "train"),
    ("annotations/instances_train2017.json", "train2017"),
)
SPLIT_LAYOUTS = (  # annotation file and image folder of exports with splits: Roboflow, CVAT
    ("{split}/_annotations.coco.json", "{split}"),
    ("annotations/instances_{split}.json", "images/{split}"),
    ("annotations/instances_{split}.json", "images"),
)


def detect_data_source(path: str | Path) -> dict[str, Any]:
    """Return the recipe's data table for a file or folder.

    Images are relative to the folder of the annotation file, or to `images/` next to it. If the data has no splits,
    "val" has the fraction `DEFAULT_VAL_FRACTION`, see `choose_split`. Suffixes are case-insensitive.

    Args:
        path: One of:
            - a `.jsonl` or `.ndjson` file;
            - a `.json` file of COCO, Label Studio or LabelMe;
            - a folder with one of these, or with LabelMe files;
            - a folder with `train.json`, `train/`, `val.json` and `val/`;
            - COCO 2017 as distributed: `annotations/`, `train2017/` and `val2017/`;
            - an export in COCO's format from Label Studio, CVAT or Roboflow.

    Returns:
        The registered name and the options of the dataset.

    Raises:
        InputError: The path does not exist, or contains no annotation file or more than one.
    """
    path = expand_user(path)
    if not path.exists():
        raise InputError(f"data={path} does not exist")
    if path.is_dir():
        if any((path / file).is_file() and (path / images).is_dir() for file, images in COCO_LAYOUTS):
            return {"name": "coco", "root": str(path), **SOURCE_DEFAULTS}
        if table := _find_split_export(path):
            return {**table, **SOURCE_DEFAULTS}
        if _is_labelme_folder(path):
            return {"name": "annotations", "file": str(path), "val_fraction": DEFAULT_VAL_FRACTION, **SOURCE_DEFAULTS}
        path = _find_single_file(path)
    image_root = _find_image_folder(path)
    if is_json_lines_name(path):
        return {
            "name": "jsonl",
            "file": str(path),
            "image_root": str(image_root),
            "val_fraction": DEFAULT_VAL_FRACTION,
            **SOURCE_DEFAULTS,
        }
    if _is_json_name(path):
        tool = _detect_tool(path)
        if tool == "LabelMe":  # image names are relative to its own folder
            return {"name": "annotations", "file": str(path), "val_fraction": DEFAULT_VAL_FRACTION, **SOURCE_DEFAULTS}
        if tool == "Label Studio":
            return {
                "name": "annotations",
                "file": str(path),
                "image_root": str(image_root),
                "val_fraction": DEFAULT_VAL_FRACTION,
                **SOURCE_DEFAULTS,
            }
        return {
            "name": "coco-json",
            "annotations": str(path),
            "image_root": str(image_root),
            "val_fraction": DEFAULT_VAL_FRACTION,
            **SOURCE_DEFAULTS,
        }
    raise InputError(
        f"data={path} has an unknown format; pass a .jsonl file, a .json file of a labeling tool, or a folder with one"
    )


def _is_labelme_folder(folder: Path) -> bool:
    """Return whether all annotation files of a folder are LabelMe files."""
    files = _list_annotation_files(folder)
    return bool(files) and all(_is_json_name(file) and _detect_tool(file) == "LabelMe" for file in files)


def _list_annotation_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if _is_json_name(file) or is_json_lines_name(file))


def _is_json_name(path: Path) -> bool:
    return path.suffix.lower() == ".json"


def _detect_tool(path: Path) -> str:
    """Return the tool of a .json file by its first keys; "COCO" if the file is unreadable."""
    with suppress(ValueError):
        for key, *_ in iter_members(path):
            if key in (None, "data"):
                return "Label Studio"
            if key in ("shapes", "imagePath", "imageData"):
                return "LabelMe"
            if key in ("images", "categories"):
                return "COCO"
    return "COCO"


def _find_split_export(folder: Path) -> dict[str, Any] | None:
    """Return the data source of an export with files for "train" and "val"; None if there are none."""
    for file, image_folder in SPLIT_LAYOUTS:
        paths = [
            resolve_split_path(f"{folder}/{each}", split) for each in (file, image_folder) for split in ("train", "val")
        ]
        if all(each.exists() for each in paths):
            return {"name": "coco-json", "annotations": f"{folder}/{file}", "image_root": f"{folder}/{image_folder}"}
    return None


def _find_single_file(folder: Path) -> Path:
    """Return the only annotation file of a folder. Raises InputError."""
    files = _list_annotation_files(folder)
    if not files:  # CVAT with any subset name, or Roboflow without splits
        files = sorted([*folder.glob("annotations/*.json"), *folder.glob("*/_annotations.coco.json")])
        train_files = [resolve_split_path(f"{folder}/{file}", "train") for file, _ in SPLIT_LAYOUTS]
        files = [file for file in files if file in train_files] or files
    if len(files) != 1:
        file_names = ", ".join(str(file.relative_to(folder)) for file in files[:5]) or "none"
        raise InputError(f"data={folder} must contain exactly one .jsonl or .json file; it contains {file_names}")
    return files[0]


def _find_image_folder(file: Path) -> Path:
    """Return the folder that image names in an annotation file are relative to."""
    root = file.parent.parent if file.parent.name == "annotations" else file.parent
    subset = file.stem.partition("_")[2]  # such as `default` in instances_default.json
    candidates = [root / "images" / subset, root / "images"] if subset else [root / "images"]
    return next((folder for folder in candidates if folder.is_dir()), root)


def resolve_split_path(path: str, split: str) -> Path:
    """Replace `{split}` in a path by the name of a split, in the spelling that exists ("val", "valid", "Val").

    Args:
        path: Path, with or without `{split}`.
        split: Name of the split.

    Returns:
        The first existing path; if none exists, the path with `split` unchanged.
    """
    names = (split, *SPLIT_ALIASES.get(split, ()))
    candidates = [path.replace("{split}", form) for name in names for form in (name, name.capitalize())]
    return next((each for each in map(Path, candidates) if each.exists()), Path(candidates[0]))


def resolve_data_file(file: str | Path, split: str) -> Path:
    """Return the data file of a split, see `resolve_split_path`; raise InputError if it does not exist."""
    path = resolve_split_path(str(expand_user(file)), split)
    if not path.is_file():
        raise InputError(f"{path} does not exist; set file=FILE, which may contain {{split}}")
    return path


def choose_split(names: Iterable[str], split: str, val_fraction: float) -> tuple[set[str], list[str]]:
    """Choose the images of a split of a file without splits.

    "val" has the first images in the order of a hash of their names: the fraction `val_fraction`, at least
    `MIN_VAL_IMAGES` images, or a third of all if that is fewer. "train" has the others.

    Args:
        names: File names of the images, one per file.
        split: "train" or "val".
        val_fraction: Fraction of the images, from 0 to below 1; 0 if the file has only one split.

    Returns:
        The names in the split, and remarks with the number of held-out images.
    """
    unique_names = set(names)
    if not val_fraction:
        return unique_names, []
    ordered = sorted(unique_names, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest())
    count = max(int(val_fraction * len(ordered)), min(MIN_VAL_IMAGES, len(ordered) // 3))
    split_names = ordered[:count] if split == "val" else ordered[count:]
    return set(split_names), [f"{count} of {len(ordered)} images held out for validation"]


def make_val_fraction_key(split: str, val_fraction: float) -> str:
    """Return the part of a table's selection key for a held-out split.

    Args:
        split: Name of the split.
        val_fraction: Fraction of the held-out images, from 0 to below 1.

    Returns:
        Part of the key; empty if nothing is held out.

    Raises:
        ValueError: The fraction is out of range, or a split other than "train" and "val" is held out.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; expected a number from 0 to less than 1")
    if val_fraction and split not in ("train", "val"):
        raise ValueError(f"no split {split!r} with val_fraction={val_fraction}; choose train or val")
    return f"{split} {val_fraction}" if val_fraction else ""
