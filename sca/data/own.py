"""A person's own annotated pictures, recognised by what lies there."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

TOLD = {"names": "both", "augment": {"flip": 0.5, "crop": 0.7, "colour": 0.2}}  # of a source in a recipe
HOLD_OUT = 0.1  # the share of the images of a single file that a model is not trained on


def recognised(path: str | Path) -> dict[str, Any]:
    """The table of a recipe's data for `path`: a `.jsonl` file, a COCO `.json` file, or a folder with either, or with
    `train.json`, `train/`, `val.json` and `val/`. Pictures lie where the file says, from its folder or from `images/`
    beside it. Of a file without splits, `HOLD_OUT` are kept for "val".

    ValueError if there is nothing, or more than one file to choose from.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"data={path}: there is no such file or folder")
    if path.is_dir():
        if (path / "train.json").is_file() and (path / "train").is_dir():
            return {"name": "coco", "root": str(path), **TOLD}
        files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl"))
        if len(files) != 1:
            found = ", ".join(file.name for file in files[:5]) or "none"
            raise ValueError(f"data={path}: a folder with one .jsonl or COCO .json file is wanted, and it has {found}")
        (path,) = files
    pictures = path.parent / "images" if (path.parent / "images").is_dir() else path.parent
    if path.suffix == ".jsonl":
        return {"name": "jsonl", "file": str(path), "images": str(pictures), "hold_out": HOLD_OUT, **TOLD}
    if path.suffix == ".json":
        return {"name": "coco-json", "annotations": str(path), "images": str(pictures), "hold_out": HOLD_OUT, **TOLD}
    raise ValueError(f"data={path}: a .jsonl file, a COCO .json file or a folder with one is wanted")


def chosen(name: str, split: str, hold_out: float) -> bool:
    """Whether the image of this file name is of the split: a share `hold_out` of all are "val", the others "train"."""
    if not hold_out:
        return True
    drawn = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 2**32
    return (drawn < hold_out) == (split == "val")


def check_hold_out(split: str, hold_out: float) -> str:
    """What a table's key has to know. ValueError for a split that there is not, or no share."""
    if not 0 <= hold_out < 1:
        raise ValueError(f"hold_out={hold_out}: give the share of the images that are kept for val, from 0 to 1")
    if hold_out and split not in ("train", "val"):
        raise ValueError(f"with hold_out={hold_out} the splits are train and val, and {split!r} was asked for")
    return f"{split} {hold_out}" if hold_out else ""
