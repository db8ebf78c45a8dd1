"""Visual Genome: regions and splits read back unchanged, and damage is reported."""

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


def make_region(region_id, image_id=1, **changes):
    record = {"region_id": region_id, "image_id": image_id, "x": 3, "y": 4, "width": 10, "height": 20}
    return {**record, "phrase": f"thing {region_id}", **changes}


def make_image_record(image_id, **changes):
    return {"image_id": image_id, "width": SIDE, "height": SIDE, "url": "", "coco_id": None} | changes


@pytest.fixture
def write_visual_genome(tmp_path):
    """Return a function that writes images 1 and 2, one per folder, and returns the root; `files` replace files."""

    def write(*regions, **files):
        for image_id, folder in ((1, "VG_100K"), (2, "VG_100K_2")):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new("RGB", (SIDE, SIDE), (image_id, 0, 0)).save(tmp_path / folder / f"{image_id}.jpg")
        descriptions = [
            {"id": 1, "regions": list(regions) or [make_region(1)]},
            {"id": 2, "regions": [make_region(20, 2)]},
        ]
        contents = {
            "image_data": [make_image_record(1), make_image_record(2)],
            "region_descriptions": descriptions,
            "densecap_splits": {"train": [1], "val": [2], "test": [2, 1]},
        }
        for name, content in {**contents, **files}.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / f"{name}.json").write_text(text)
        return tmp_path

    return write


def test_visual_genome_reads_all_fields(write_visual_genome):
    root = write_visual_genome(make_region(1), make_region(2, x=0, width=SIDE, phrase=" a wide\none "))
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


def test_visual_genome_passes_conformance(write_visual_genome):
    findings = check_component("dataset", "visual-genome", split="test", root=str(write_visual_genome()))
    assert [finding for finding in findings if not finding.passed] == []


def test_visual_genome_reads_back_exported_scenes(tmp_path):
    scenes = Scenes("val", num_images=3, image_size=SIDE)
    exported = VisualGenome("val", root=export_dataset(scenes, tmp_path / "out", "vg"))
    for original, read_back in zip(scenes, exported, strict=True):
        expected = [(phrase, region.box) for region in original.regions for phrase in region.phrases]
        assert expected == [(*region.phrases, region.box) for region in read_back.regions]


def test_visual_genome_counts_skipped_records(write_visual_genome):
    clipped = make_region(2, x=-5, y=60)
    outside, zero_width, blank = make_region(3, x=SIDE), make_region(4, width=0), make_region(5, phrase=" ")
    root = write_visual_genome(
        make_region(1), clipped, outside, zero_width, blank, make_region(1, phrase="again"), make_region(20)
    )
    splits = {"val": [1, 2, 3, 4, 5, 1]}
    images = [make_image_record(number) for number in (1, 2, 3, 4)]
    descriptions = [
        *json.loads((root / "region_descriptions.json").read_text()),
        {"id": 3, "regions": [make_region(30, 3)]},
    ]
    root = write_visual_genome(densecap_splits=splits, image_data=images, region_descriptions=descriptions)
    dataset = VisualGenome("val", root=root)
    assert dataset.image_ids == [1]  # the first region 20 is kept, and so the second image has no region
    assert [region.box for region in dataset[0].regions] == [(3, 4, 13, 24), (0, 60, 5, SIDE), (3, 4, 13, 24)]
    assert dataset[0].regions[0].phrases == ("thing 1",)
    assert dataset.skipped == {
        "box clipped": 1,
        "empty box": 2,
        "region without text": 1,
        "duplicate region id": 2,
        "duplicate image id": 1,
        "image without data": 1,
        "image missing": 1,
        "image without regions": 2,
    }
    assert dataset.examples["image missing"] == ["3.jpg"]
    with pytest.raises(
        ValueError, match=r"2 images .* max_bad_records=1; image missing: 1, such as 3.jpg; image without data: 1"
    ):
        VisualGenome("val", root=root, max_bad_records=1)


def test_visual_genome_accepts_splits_path_and_reports_missing_files(write_visual_genome, tmp_path_factory):
    root = write_visual_genome()
    splits_path = (root / "densecap_splits.json").rename(tmp_path_factory.mktemp("elsewhere") / "mine.json")
    assert VisualGenome("train", root=root, splits=splits_path).image_ids == [1]
    with pytest.raises(ValueError, match=r"download info/densecap_splits\.json from .*jcjohnson/densecap to .*splits="):
        VisualGenome("train", root=root)
    with pytest.raises(ValueError, match=r"mine\.json has no split 'testA'; it has: train, val, test"):
        VisualGenome("testA", root=root, splits=splits_path)
    (root / "image_data.json").unlink()
    with pytest.raises(ValueError, match=r"no image_data\.json in .*; set root=FOLDER"):
        VisualGenome("train", root=root, splits=splits_path)


def test_visual_genome_counts_skipped_images_once_after_interrupted_rename(write_visual_genome, tmp_path, monkeypatch):
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "cache"))
    root = write_visual_genome(region_descriptions=[{"id": 1, "regions": [make_region(1)]}])
    rename = os.rename

    def raise_interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sca.data.conversion.os.rename", raise_interrupt)
    with pytest.raises(KeyboardInterrupt):
        VisualGenome("test", root=root)
    monkeypatch.setattr("sca.data.conversion.os.rename", rename)
    dataset = VisualGenome("test", root=root)
    assert dataset.image_ids == [1]
    assert dataset.skipped == {"image without regions": 1}


def test_visual_genome_reads_file_larger_than_chunk(write_visual_genome, monkeypatch):
    root = write_visual_genome(make_region(1, phrase='a \\ "quoted" phrase, [1]'), make_region(2))
    expected = [sample[1:] for sample in VisualGenome("test", root=root)]
    for chunk_bytes in (1, 7, 100):
        monkeypatch.setattr("sca.data.json_stream.CHUNK_BYTES", chunk_bytes)
        (root / "region_descriptions.json").touch()
        assert [sample[1:] for sample in VisualGenome("test", root=root)] == expected


REGION_PATTERN = r"region_descriptions\.json: \[0\] \(id 1\): regions\[0\]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phrase": 3}, REGION_PATTERN + r" \(region_id 1\), 'phrase' is 3; expected a string"),
        ({"phrase": "\ud800"}, REGION_PATTERN + r" \(region_id 1\), 'phrase' contains .*, half of a surrogate pair"),
        ({"x": None}, REGION_PATTERN + r" \(region_id 1\), 'x' is None; expected a number"),
        ({"y": float("nan")}, REGION_PATTERN + r" \(region_id 1\), 'y' is nan; expected a number"),
        ({"x": 10**400}, REGION_PATTERN + r" \(region_id 1\), 'x' is 1000"),
        ({"width": -4}, REGION_PATTERN + r" \(region_id 1\): the box has width -4 and height 20"),
        ({"image_id": 2}, REGION_PATTERN + r" \(region_id 1\): image_id 2 differs from that of its image"),
        ({"region_id": "1"}, REGION_PATTERN + r", 'region_id' is '1'; expected an integer"),
        ({"region_id": 1 << 63}, REGION_PATTERN + r", 'region_id' is .*; expected an integer"),
    ],
)
def test_visual_genome_reports_broken_region_with_file_and_field(write_visual_genome, changes, message):
    with pytest.raises(ValueError, match=message):
        VisualGenome("train", root=write_visual_genome(make_region(1) | changes), max_bad_records=0)


@pytest.mark.parametrize("key", ["region_id", "phrase", "x", "height"])
def test_visual_genome_reports_missing_field(write_visual_genome, key):
    record = make_region(1)
    del record[key]
    with pytest.raises(ValueError, match=rf"{REGION_PATTERN}.*: no '{key}'; it has: "):
        VisualGenome("train", root=write_visual_genome(record), max_bad_records=0)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"region_descriptions": "[{}]"}, r"region_descriptions\.json: \[0\]: no 'id'; it has: nothing"),
        (
            {"region_descriptions": '[{"id": 1, "reg'},
            r"region_descriptions\.json is not valid JSON: Unter.*; copy or download",
        ),
        ({"region_descriptions": '[{"id": 1, "regions": []}'}, r"region_descriptions\.json is not valid JSON"),
        ({"region_descriptions": '[{"id": 1, "regions": []},'}, r"region_descriptions\.json is not valid JSON"),
        ({"region_descriptions": ""}, r"region_descriptions\.json is not valid JSON"),
        ({"region_descriptions": "[] []"}, r"region_descriptions\.json is not valid JSON"),
        (
            {"region_descriptions": '{"id": 1}'},
            r"region_descriptions\.json must be a list .*, not an object",
        ),
        ({"region_descriptions": "[1]"}, r"region_descriptions\.json: \[0\] is 1; expected an object"),
        ({"region_descriptions": [{"id": 1}]}, r"\[0\] \(id 1\): no 'regions'"),
        ({"region_descriptions": [{"id": 1, "regions": [4]}]}, r"regions\[0\] is 4; expected an object"),
        ({"region_descriptions": [{"id": 7, "regions": []}] * 2}, r"\[1\] \(id 7\): duplicate id"),
        (
            {"image_data": [make_image_record(1), make_image_record(1)]},
            r"image_data\.json: \[1\] \(image_id 1\): duplicate image_id",
        ),
        (
            {"image_data": [make_image_record(1, width=0)]},
            r"image_data\.json: \[0\] \(image_id 1\): 'width' and 'height' are .0, 64.; expected the size",
        ),
        (
            {"image_data": [make_image_record(1, height="9")]},
            r"image_data\.json: \[0\] \(image_id 1\), 'height' is .*; expected an integer",
        ),
        ({"image_data": [make_image_record(2)]}, "image without data: 1, such as 1"),
        ({"densecap_splits": []}, r"densecap_splits\.json is \[\]; expected an object"),
        ({"densecap_splits": {"train": 3}}, r"densecap_splits\.json, 'train' is 3; expected a list"),
        ({"densecap_splits": {"train": [1, "2"]}}, r"densecap_splits\.json: train\[1\] must be an image id, not '2'"),
        ({"densecap_splits": '{"train": [1'}, r"densecap_splits\.json is not valid JSON"),
    ],
)
def test_visual_genome_reports_broken_file(write_visual_genome, files, message):
    with pytest.raises(ValueError, match=message):
        VisualGenome("train", root=write_visual_genome(**files), max_bad_records=0)
