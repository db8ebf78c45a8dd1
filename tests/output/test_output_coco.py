import json
from dataclasses import replace

import numpy as np
import pytest
from pycocotools.coco import COCO

from sca.io import masks
from sca.io.prompt_files import read_region_prompts
from sca.output.formats import MultiFormatWriter


@pytest.fixture
def written(tmp_path, picture, captions):
    with MultiFormatWriter(tmp_path, ("coco",), model="m") as writers:
        writers.add("a.png", picture, captions)
        writers.add("none.png", picture, [])
        writers.add("b.png", picture, captions[:2])
    return writers.paths["coco"]


def test_pycocotools_reads_back_every_image_and_region(written, captions):
    coco = COCO(str(written))
    assert [coco.imgs[n]["file_name"] for n in (1, 2, 3)] == ["a.png", "none.png", "b.png"]
    assert [len(coco.getAnnIds(imgIds=[n])) for n in (1, 2, 3)] == [4, 0, 2]
    assert list(coco.anns) == [1, 2, 3, 4, 5, 6]
    assert coco.loadCats(coco.getCatIds())[0]["name"] == "region"
    assert [annotation["caption"] for annotation in coco.imgToAnns[1]] == [caption.text for caption in captions]


def test_masks_boxes_and_areas_are_as_coco_has_them(written, captions):
    coco = COCO(str(written))
    disc, box, point, square = coco.imgToAnns[1]
    for annotation, caption in ((disc, captions[0]), (square, captions[3])):
        mask = masks.decode_rle(caption.mask)
        assert (coco.annToMask(annotation) == mask).all()
        assert annotation["area"] == mask.sum()
        x, y, width, height = annotation["bbox"]
        assert (x, y, x + width, y + height) == caption.box
    assert box["bbox"] == [1.5, 2, 8.5, 10.25]
    assert box["area"] == 8.5 * 10.25
    assert coco.annToMask(box).sum() == pytest.approx(87, abs=20), "a box is a polygon for those who ask for a mask"
    assert (point["bbox"], point["area"], point["segmentation"]) == ([0, 0, 0, 0], 0, [])
    assert {annotation["iscrowd"] for annotation in coco.anns.values()} == {0}
    assert [annotation["score"] for annotation in coco.imgToAnns[1]] == [0.75, 0.5, 0.25, 1.0]


def test_a_mask_without_a_box_brings_its_own(tmp_path, picture, captions):
    nothing = masks.encode_rle(np.zeros((30, 40), bool))
    with MultiFormatWriter(tmp_path, ("coco",)) as writers:
        writers.add("a.png", picture, [replace(captions[0], box=None), replace(captions[0], box=None, mask=nothing)])
    full, empty = json.loads(writers.paths["coco"].read_text())["annotations"]
    assert full["bbox"][:2] == list(captions[0].box[:2])
    assert (empty["bbox"], empty["area"]) == ([0, 0, 0, 0], 0)


def test_the_file_serves_as_prompts(written):
    prompts = read_region_prompts(written)
    assert [len(prompts[key]) for key in prompts] == [3, 0, 2]
    (problem,) = prompts.problems  # of a region without a box or a mask
    assert "has no area" in problem
    assert prompts["b.png"][1].box == (1.5, 2.0, 10.0, 12.25)


def test_hostile_captions_come_back_as_they_were(tmp_path, picture, hostile):
    with MultiFormatWriter(tmp_path, ("coco",), model='"}') as writers:
        writers.add('"},{.png', picture, hostile)
    content = json.loads(writers.paths["coco"].read_bytes())
    assert [annotation["caption"] for annotation in content["annotations"]] == [caption.text for caption in hostile]
    assert content["images"][0]["file_name"] == '"},{.png'
    assert content["info"]["model"] == '"}'
