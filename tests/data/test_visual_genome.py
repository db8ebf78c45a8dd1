"""Visual Genome: regions and splits are read as they were written, and what is broken is named."""

import json
import os

import pytest
from PIL import Image
from sca_registry import datasets
from sca_registry.contracts import Region

from sca.data.export import export_dataset
from sca.data.scenes import Scenes
from sca.data.visual_genome import VisualGenome
from sca.testing.conformance import check_component

SIDE = 64


def region(identity, image_id=1, **changes):
    whole = {"region_id": identity, "image_id": image_id, "x": 3, "y": 4, "width": 10, "height": 20}
    return {**whole, "phrase": f"thing {identity}", **changes}


def picture(image_id, **changes):
    return {"image_id": image_id, "width": SIDE, "height": SIDE, "url": "", "coco_id": None} | changes


@pytest.fixture
def write(tmp_path):
    """Writes images 1 and 2, one in each folder, and gives the root; whole files may be replaced."""

    def write(*regions, **files):
        for image_id, folder in ((1, "VG_100K"), (2, "VG_100K_2")):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new("RGB", (SIDE, SIDE), (image_id, 0, 0)).save(tmp_path / folder / f"{image_id}.jpg")
        described = [{"id": 1, "regions": list(regions) or [region(1)]}, {"id": 2, "regions": [region(20, 2)]}]
        contents = {
            "image_data": [picture(1), picture(2)],
            "region_descriptions": described,
            "densecap_splits": {"train": [1], "val": [2], "test": [2, 1]},
        }
        for name, content in {**contents, **files}.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / f"{name}.json").write_text(text)
        return tmp_path

    return write


def test_everything_is_read_as_it_was_written(write):
    root = write(region(1), region(2, x=0, width=SIDE, phrase=" a wide\none "))
    dataset = datasets.build("visual-genome", "test", root=str(root))
    assert dataset.image_ids == [1, 2]
    assert dataset[0].regions == (
        Region(1, (3, 4, 13, 24), phrases=("thing 1",)),
        Region(2, (0, 4, SIDE, 24), phrases=("a wide\none",)),
    )
    assert dataset[1].image.size == (SIDE, SIDE)
    assert dataset[1].image.getpixel((0, 0))[0] in (1, 2, 3)
    assert not dataset.skipped
    assert [VisualGenome(split, root=root).image_ids for split in ("train", "val")] == [[1], [2]]


def test_it_keeps_the_promises_of_a_dataset(write):
    findings = check_component("dataset", "visual-genome", split="test", root=str(write()))
    assert [finding for finding in findings if not finding.passed] == []


def test_what_was_exported_is_read_back(tmp_path):
    scenes = Scenes("val", num_images=3, image_size=SIDE)
    again = VisualGenome("val", root=export_dataset(scenes, tmp_path / "out", "vg"))
    for one, other in zip(scenes, again, strict=True):
        told = [(phrase, region.box) for region in one.regions for phrase in region.phrases]
        assert told == [(*region.phrases, region.box) for region in other.regions]


def test_what_is_left_out_is_counted(write):
    reaching = region(2, x=-5, y=60)
    outside, flat, blank = region(3, x=SIDE), region(4, width=0), region(5, phrase=" ")
    root = write(region(1), reaching, outside, flat, blank, region(1, phrase="again"), region(20))
    splits = {"val": [1, 2, 3, 4, 5, 1]}
    images = [picture(number) for number in (1, 2, 3, 4)]
    described = [*json.loads((root / "region_descriptions.json").read_text()), {"id": 3, "regions": [region(30, 3)]}]
    root = write(densecap_splits=splits, image_data=images, region_descriptions=described)
    dataset = VisualGenome("val", root=root)
    assert dataset.image_ids == [1]  # of the region 20 the first counts, and so the second image has none
    assert [region.box for region in dataset[0].regions] == [(3, 4, 13, 24), (0, 60, 5, SIDE), (3, 4, 13, 24)]
    assert dataset[0].regions[0].phrases == ("thing 1",)
    assert dataset.skipped == {
        "box clipped": 1,
        "empty box": 2,
        "region without text": 1,
        "region id repeated": 2,
        "image id repeated": 1,
        "image without data": 1,
        "image missing": 1,
        "image without regions": 2,
    }
    assert dataset.examples["image missing"] == ["3.jpg"]
    with pytest.raises(
        ValueError, match=r"2 images .* max_bad=1; image missing: 1, such as 3.jpg; image without data: 1"
    ):
        VisualGenome("val", root=root, max_bad=1)


def test_the_splits_may_lie_elsewhere_and_their_absence_says_where_to_get_them(write, tmp_path_factory):
    root = write()
    elsewhere = (root / "densecap_splits.json").rename(tmp_path_factory.mktemp("elsewhere") / "mine.json")
    assert VisualGenome("train", root=root, splits=elsewhere).image_ids == [1]
    with pytest.raises(
        ValueError, match=r"take info/densecap_splits\.json of the densecap .*jcjohnson/densecap.*splits="
    ):
        VisualGenome("train", root=root)
    with pytest.raises(ValueError, match=r"mine\.json has no split 'testA'; it has: train, val, test"):
        VisualGenome("testA", root=root, splits=elsewhere)
    (root / "image_data.json").unlink()
    with pytest.raises(ValueError, match=r"there is no image_data\.json; give root=FOLDER"):
        VisualGenome("train", root=root, splits=elsewhere)


def test_what_is_counted_at_the_end_is_counted_once_if_only_the_last_step_was_missing(write, tmp_path, monkeypatch):
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "cache"))
    root = write(region_descriptions=[{"id": 1, "regions": [region(1)]}])
    rename = os.rename

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sca.data.conversion.os.rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        VisualGenome("test", root=root)
    monkeypatch.setattr("sca.data.conversion.os.rename", rename)
    dataset = VisualGenome("test", root=root)
    assert dataset.image_ids == [1]
    assert dataset.skipped == {"image without regions": 1}


def test_a_file_longer_than_what_is_read_at_a_time_is_read_whole(write, monkeypatch):
    root = write(region(1, phrase='a \\ "quoted" phrase, [1]'), region(2))
    whole = [sample[1:] for sample in VisualGenome("test", root=root)]
    for chunk in (1, 7, 100):
        monkeypatch.setattr("sca.data.json_stream.CHUNK_BYTES", chunk)
        (root / "region_descriptions.json").touch()
        assert [sample[1:] for sample in VisualGenome("test", root=root)] == whole


PLACE = r"region_descriptions\.json: \[0\] \(id 1\): regions\[0\]"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"phrase": 3}, PLACE + r" \(region_id 1\), 'phrase' is 3; give text"),
        ({"phrase": "\ud800"}, PLACE + r" \(region_id 1\), 'phrase' contains .*, half of a surrogate pair"),
        ({"x": None}, PLACE + r" \(region_id 1\), 'x' is None; give a number"),
        ({"y": float("nan")}, PLACE + r" \(region_id 1\), 'y' is nan; give a number"),
        ({"x": 10**400}, PLACE + r" \(region_id 1\), 'x' is 1000"),
        ({"width": -4}, PLACE + r" \(region_id 1\): the box has width -4 and height 20"),
        ({"image_id": 2}, PLACE + r" \(region_id 1\): image_id 2 is not that of its image"),
        ({"region_id": "1"}, PLACE + r", 'region_id' is '1'; give an integer"),
        ({"region_id": 1 << 63}, PLACE + r", 'region_id' is .*; give an integer"),
    ],
)
def test_a_broken_region_is_named_with_its_file_and_field(write, broken, message):
    with pytest.raises(ValueError, match=message):
        VisualGenome("train", root=write(region(1) | broken), max_bad=0)


@pytest.mark.parametrize("key", ["region_id", "phrase", "x", "height"])
def test_a_missing_field_is_named(write, key):
    whole = region(1)
    del whole[key]
    with pytest.raises(ValueError, match=rf"{PLACE}.*: no '{key}'; it has: "):
        VisualGenome("train", root=write(whole), max_bad=0)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"region_descriptions": "[{}]"}, r"region_descriptions\.json: \[0\]: no 'id'; it has: nothing"),
        (
            {"region_descriptions": '[{"id": 1, "reg'},
            r"region_descriptions\.json is not valid JSON: Unter.*; was it cut",
        ),
        ({"region_descriptions": '[{"id": 1, "regions": []}'}, r"region_descriptions\.json is not valid JSON"),
        ({"region_descriptions": '[{"id": 1, "regions": []},'}, r"region_descriptions\.json is not valid JSON"),
        ({"region_descriptions": ""}, r"region_descriptions\.json is not valid JSON"),
        ({"region_descriptions": "[] []"}, r"region_descriptions\.json is not valid JSON"),
        (
            {"region_descriptions": '{"id": 1}'},
            r"region_descriptions\.json must be a list .*, and is an object",
        ),
        ({"region_descriptions": "[1]"}, r"region_descriptions\.json: \[0\] is 1; give an object"),
        ({"region_descriptions": [{"id": 1}]}, r"\[0\] \(id 1\): no 'regions'"),
        ({"region_descriptions": [{"id": 1, "regions": [4]}]}, r"regions\[0\] is 4; give an object"),
        ({"region_descriptions": [{"id": 7, "regions": []}] * 2}, r"\[1\] \(id 7\): this id was given before"),
        ({"image_data": [picture(1), picture(1)]}, r"image_data\.json: \[1\] \(image_id 1\): this image_id was given"),
        (
            {"image_data": [picture(1, width=0)]},
            r"image_data\.json: \[0\] \(image_id 1\): 'width' and 'height' are .0, 64.; give the size",
        ),
        (
            {"image_data": [picture(1, height="9")]},
            r"image_data\.json: \[0\] \(image_id 1\), 'height' is .*; give an integer",
        ),
        ({"image_data": [picture(2)]}, "image without data: 1, such as 1"),
        ({"densecap_splits": []}, r"densecap_splits\.json is \[\]; give an object"),
        ({"densecap_splits": {"train": 3}}, r"densecap_splits\.json, 'train' is 3; give a list"),
        ({"densecap_splits": {"train": [1, "2"]}}, r"densecap_splits\.json: train\[1\] must be an image id, not '2'"),
        ({"densecap_splits": '{"train": [1'}, r"densecap_splits\.json is not valid JSON"),
    ],
)
def test_a_broken_file_is_named(write, files, message):
    with pytest.raises(ValueError, match=message):
        VisualGenome("train", root=write(**files), max_bad=0)
