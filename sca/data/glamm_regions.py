"""Captioned boxes of RefCOCOg and Visual Genome in the files of GLaMM's evaluation (arXiv 2311.03356)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sca.data.coco import Coco, CocoIndex
from sca.data.record_parsing import parse_phrases
from sca.io.errors import InputError
from sca.io.validation import check_choice, read_field, read_xywh_box

LAYOUTS = {  # split, annotation file and image folder of each collection
    "refcocog": (
        "val",
        "RefCoco_Reg/mdetr_annotations/finetune_refcocog_val_captions.json",
        "coco_2014/train2014",
    ),
    "visual-genome": ("test", "visual_genome/test_caption.json", "visual_genome/images"),
}


class GlammRegions(Coco):
    """Files of GLaMM's evaluation of region captions: COCO's format with one image record per region.

    The region of an image record is the annotation with the same id, and its phrases are the captions of all
    annotations of this record, against which GLaMM scores. An image file therefore has as many records as regions. The
    layout is that of `eval/region_captioning` and `eval/ddp.py` in https://github.com/mbzuai-oryx/groundingLMM. See
    `Coco`.

    Args:
        split: "val" of RefCOCOg, "test" of Visual Genome.
        root: Folder `data` of GLaMM.
        collection: "refcocog" or "visual-genome".
        annotations: JSON file, instead of the one in `root`.
        image_root: Image folder, instead of the one in `root`.
        max_bad_records: Maximum number of unusable records of each kind: a benchmark is complete by default.
    """

    reader = "glamm-regions"
    has_class_names = False

    def __init__(
        self,
        split: str,
        root: str | Path | None = None,
        collection: str = "refcocog",
        annotations: str | Path | None = None,
        image_root: str | Path | None = None,
        max_bad_records: int = 0,
    ):
        check_choice("collection", collection, LAYOUTS)
        expected_split, *layout = LAYOUTS[collection]
        if split != expected_split:
            raise InputError(f"{collection} has no split {split!r} in the files of GLaMM; use {expected_split}")
        self.layouts: tuple[tuple[str, str], ...] = ((layout[0], layout[1]),)
        super().__init__(split, root, annotations, image_root, max_bad_records)

    def _add_annotations(
        self, row: dict[str, Any], annotations: list[tuple[dict[str, Any], str]], coco_index: CocoIndex
    ) -> None:
        own = [(record, location) for record, location in annotations if record["id"] == row["image_id"]]
        if not own:
            raise InputError(f"{self.annotations}: image {row['image_id']} has no annotation with its id")
        record, location = own[0]
        texts = [read_field(each, "caption", str, place) for each, place in annotations]
        box = read_xywh_box(record, "bbox", location)
        self._add_region(row, record["id"], box, location, phrases=parse_phrases(texts, "caption", location))
