import json
from dataclasses import replace

import numpy as np
import pytest
from pycocotools.coco import COCO

from sca.io import masks
from sca.io.prompt_files import read_region_prompts
from sca.output.formats import MultiFormatWriter


@pytest.fixture
def coco_path(tmp_path, noise_image, captions):
    with MultiFormatWriter(tmp_path, ("coco",), model="m") as writers:
        writers.add("a.png", noise_image, captions)
        writers.add("none.png", noise_image, [])
        writers.add("b.png", noise_image, captions[:2])
    return writers.paths["coco"]


def test_coco_writer_output_is_read_by_pycocotools(coco_path, captions):
    coco = COCO(str(coco_path))
    assert [coco.imgs[n]["file_name"] for n in (1, 2, 3)] == ["a.png", "none.png", "b.png"]
    assert [len(coco.getAnnIds(imgIds=[n])) for n in (1, 2, 3)] == [3, 0, 2]
    assert list(coco.anns) == [1, 2, 3, 4, 5]
    assert coco.loadCats(coco.getCatIds())[0]["name"] == "region"
    texts = [annotation["caption"] for annotation in coco.imgToAnns[1]]
    assert texts == [caption.text for caption in captions if caption.mask or caption.box]


def test_coco_writer_stores_masks_boxes_and_areas_as_coco(coco_path, captions):
    coco = COCO(str(coco_path))
    disc_annotation, box_annotation, square_annotation = coco.imgToAnns[1]
    for annotation, caption in ((disc_annotation, captions[0]), (square_annotation, captions[3])):
        mask = masks.decode_rle(caption.mask)
        assert (coco.annToMask(annotation) == mask).all()
        assert annotation["area"] == mask.sum()
        x, y, width, height = annotation["bbox"]
        assert (x, y, x + width, y + height) == caption.box
    assert box_annotation["bbox"] == [1.5, 2, 8.5, 10.25]
    assert box_annotation["area"] == 8.5 * 10.25
    assert coco.annToMask(box_annotation).sum() == pytest.approx(87, abs=20), (
        "a box is a polygon for those who ask for a mask"
    )
    assert {annotation["iscrowd"] for annotation in coco.anns.values()} == {0}
    assert [annotation["score"] for annotation in coco.imgToAnns[1]] == [0.75, 0.5, 1.0]


def test_coco_writer_computes_the_box_of_a_mask_without_box(tmp_path, noise_image, captions):
    empty_rle = masks.encode_rle(np.zeros((30, 40), bool))
    with MultiFormatWriter(tmp_path, ("coco",)) as writers:
        writers.add(
            "a.png", noise_image, [replace(captions[0], box=None), replace(captions[0], box=None, mask=empty_rle)]
        )
    disc_annotation, empty_annotation = json.loads(writers.paths["coco"].read_text())["annotations"]
    assert disc_annotation["bbox"][:2] == list(captions[0].box[:2])
    assert (empty_annotation["bbox"], empty_annotation["area"]) == ([0, 0, 0, 0], 0)


def test_read_region_prompts_reads_coco_writer_output(coco_path):
    prompts = read_region_prompts(coco_path)
    assert [len(prompts[key]) for key in prompts] == [3, 0, 2]
    assert not prompts.problems
    assert prompts["b.png"][1].box == (1.5, 2.0, 10.0, 12.25)


def test_coco_writer_keeps_hostile_captions_unchanged(tmp_path, noise_image, hostile_captions):
    with MultiFormatWriter(tmp_path, ("coco",), model='"}') as writers:
        writers.add('"},{.png', noise_image, hostile_captions)
    content = json.loads(writers.paths["coco"].read_bytes())
    assert [annotation["caption"] for annotation in content["annotations"]] == [
        caption.text for caption in hostile_captions
    ]
    assert content["images"][0]["file_name"] == '"},{.png'
    assert content["info"]["model"] == '"}'
