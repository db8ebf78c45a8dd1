"""Training data of Describe Anything: masks with captions, and records that cannot be used."""

import json

import numpy as np
import pytest
from PIL import Image

from sca.data.dam_json import DamJson
from sca.io.errors import InputError
from sca.io.masks import encode_rle

pytest.importorskip("datasets", reason="requires the extra data")


def make_region(x=4, **fields):
    mask = np.zeros((24, 32), bool)
    mask[3:9, x : x + 5] = True
    return {"mask_rle": encode_rle(mask), "caption": f"a shape at {x}", "ann_id": x, "tar_file": "0.tar"} | fields


@pytest.fixture
def open_samples(tmp_path):
    """Function that writes the regions of samples and opens them as a dataset."""

    def write_and_open(samples, **options):
        (tmp_path / "images").mkdir()
        for name in samples:
            if name != "missing":
                Image.new("RGB", (32, 24), (200, 30, 30)).save(tmp_path / "images" / f"{name}.jpg")
        (tmp_path / "annotations.json").write_text(json.dumps(samples))
        return DamJson("train", tmp_path / "annotations.json", **options)

    return write_and_open


def test_dam_json_reads_masks_and_captions_of_each_sample(open_samples):
    first, second = open_samples({"17": [make_region(), make_region(20)], "9": [make_region(1)]})
    assert [(region.id, region.box, region.phrases) for region in first.regions] == [
        (0, (4.0, 3.0, 9.0, 9.0), ("a shape at 4",)),
        (1, (20.0, 3.0, 25.0, 9.0), ("a shape at 20",)),
    ]
    assert first.regions[0].mask == make_region()["mask_rle"]
    assert [(region.id, region.phrases) for region in second.regions] == [(2, ("a shape at 1",))]


def test_dam_json_counts_records_that_it_does_not_use(open_samples):
    dataset = open_samples(
        {
            "1": [make_region(), make_region(caption=None), make_region(mask_rle={"size": [24], "counts": "a"}), 7],
            "2": [make_region(mask_rle=[make_region()["mask_rle"]] * 2)],
            "missing": [make_region()],
        }
    )
    assert [len(sample.regions) for sample in dataset] == [1]
    assert dataset.skipped == {"unusable region": 3, "record of a video": 1, "image missing": 1}


def test_dam_json_holds_out_images(open_samples, tmp_path):
    samples = {str(number): [make_region()] for number in range(9)}
    train = open_samples(samples, val_fraction=0.3)
    val = DamJson("val", tmp_path / "annotations.json", val_fraction=0.3)
    assert (len(train), len(val)) == (6, 3)


def test_dam_json_rejects_a_list(tmp_path):
    (tmp_path / "annotations.json").write_text("[1]")
    with pytest.raises(InputError, match=r"annotations\.json is a list; expected an object"):
        DamJson("train", tmp_path / "annotations.json")
