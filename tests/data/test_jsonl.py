"""JSON lines: reads output of `sca caption` and hand-written files, and reports broken lines."""

import json
import os

import numpy as np
import pytest
from PIL import Image
from sca_registry import datasets
from sca_registry.contracts import Caption, Prompt, Region

from sca.data.jsonl import Jsonl
from sca.io import masks
from sca.output.jsonl import JsonlWriter
from sca.testing.conformance import check_component

WIDTH, HEIGHT = 64, 48


@pytest.fixture
def write_jsonl(tmp_path):
    """Return a function that writes lines next to two images and returns the file."""

    def write(*lines, name="regions.jsonl"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        for number in (1, 2):
            Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / name).write_text("\n".join(texts), "utf-8")
        return tmp_path / name

    return write


def make_line(**changes):
    return {"image": "photos/1.png", "box": [2, 3, 12, 11.5], "caption": "a dog"} | changes


def make_square_mask():
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[4:12, 3:9] = True
    return mask


def test_jsonl_reads_all_fields(write_jsonl):
    rle = masks.encode_rle(make_square_mask())
    polygon = [[3, 4, 9, 4, 9, 12, 3, 12]]
    file = write_jsonl(
        make_line(name="dog", mask=rle, attributes={"age": 3, "at": [1, 2]}),
        "",
        make_line(image="photos/2.png", caption=["a café", "☕"], width=WIDTH, height=HEIGHT),
        "  ",
        make_line(image="./photos/1.png", caption=None, phrases=["one", " two "], mask=polygon, score=0.5),
        '\ufeff{"image": "photos/1.png", "box": [0, 0, 64, 48], "name": "cat"}',
    )
    first, second = datasets.build("jsonl", "val", file=str(file))
    assert (first.image_id, second.image_id) == (0, 1)
    assert first.image.size == (WIDTH, HEIGHT)
    assert first.regions == (
        Region(0, (2, 3, 12, 11.5), rle, "dog", ("a dog",), {"age": 3, "at": (1, 2)}),
        Region(2, (2, 3, 12, 11.5), rle, None, ("one", "two")),
        Region(3, (0, 0, 64, 48), None, "cat"),
    )
    assert second.regions == (Region(1, (2, 3, 12, 11.5), phrases=("a café", "☕")),)
    assert Jsonl("val", file=file).attribute_values == {"name": ("cat", "dog")}


def test_jsonl_keeps_given_ids(write_jsonl):
    file = write_jsonl(
        make_line(id=7, image_id=70), make_line(id=5, image_id=60, image="photos/2.png"), make_line(id=6, image_id=70)
    )
    ids_by_image = [(sample.image_id, [region.id for region in sample.regions]) for sample in Jsonl("val", file=file)]
    assert ids_by_image == [(70, [7, 6]), (60, [5])]


def test_jsonl_passes_conformance(write_jsonl):
    file = write_jsonl(make_line(mask=masks.encode_rle(make_square_mask())), make_line(image="photos/2.png"))
    findings = check_component("dataset", "jsonl", split="val", file=str(file))
    assert [finding for finding in findings if not finding.passed] == []


def test_jsonl_reads_output_of_sca_caption(write_jsonl, tmp_path, monkeypatch):
    rle = masks.encode_rle(make_square_mask())
    write_jsonl()
    writer = JsonlWriter(tmp_path / "out.jsonl", model="tiny")
    for number in (1, 2):
        path = f"photos/{number}.png"
        captions = [
            Caption("a dog", 0.5, (2.0, 3.0, 12.0, 11.5), rle, 0.9, Prompt(box=(2.0, 3.0, 12.0, 11.5)), 0),
            Caption("café", float("nan"), None, rle, None, Prompt(points=((4, 5, 1),)), 1, (("other", 0.1),)),
            Caption("", 0.0, (1.0, 1.0, 5.0, 5.0), None, None, Prompt(mask=make_square_mask()), 2),
        ]
        with Image.open(tmp_path / path) as image:
            writer.add(path, image, captions)
    writer.close()
    dataset = Jsonl("val", file=tmp_path / "out.jsonl")
    for sample in dataset:
        assert [region.phrases for region in sample.regions] == [("a dog",), ("café",)]
        assert [region.box for region in sample.regions] == [(2, 3, 12, 11.5), (3, 4, 9, 12)]
        assert [region.mask for region in sample.regions] == [rle, rle]
    assert len(dataset) == 2
    assert dataset.skipped == {"region without text": 2}


def test_jsonl_finds_images_in_given_folder_or_working_directory(write_jsonl, tmp_path, monkeypatch):
    file = write_jsonl(make_line())
    out = tmp_path / "elsewhere" / "out"
    out.mkdir(parents=True)
    moved = file.rename(out / "regions.jsonl")
    assert len(Jsonl("val", file=moved, image_root=tmp_path)) == 1
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Jsonl("val", file="out/regions.jsonl").skipped == {"image missing": 1}
    monkeypatch.chdir(tmp_path)
    dataset = Jsonl("val", file="elsewhere/out/regions.jsonl")
    monkeypatch.chdir("/")
    assert dataset[0].regions[0].phrases == ("a dog",)


def test_jsonl_file_pattern_selects_split(write_jsonl):
    for split in ("train", "val"):
        file = write_jsonl(make_line(caption=split), name=f"{split}.jsonl")
    pattern = str(file.with_name("{split}.jsonl"))
    assert [Jsonl(split, file=pattern)[0].regions[0].phrases for split in ("train", "val")] == [("train",), ("val",)]
    with pytest.raises(ValueError, match=r"test\.jsonl does not exist; set file=FILE, which may contain {split}"):
        Jsonl("test", file=pattern)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_jsonl_without_recorded_size_applies_exif_orientation(write_jsonl, tmp_path, suffix):
    file = write_jsonl(make_line(image=f"photos/turned.{suffix}", box=[0, 0, HEIGHT, WIDTH]))
    rotated = Image.new("RGB", (WIDTH, HEIGHT))
    exif = rotated.getexif()
    exif[0x0112] = 6
    rotated.save(tmp_path / "photos" / f"turned.{suffix}", exif=exif)
    (sample,) = dataset = Jsonl("val", file=file)
    assert sample.image.size == (HEIGHT, WIDTH)
    assert not dataset.skipped


def test_jsonl_without_recorded_size_checks_boxes_against_current_image(write_jsonl, tmp_path):
    def read_boxes(width, height):
        Image.new("RGB", (width, height)).save(tmp_path / "photos" / "1.png")
        dataset = Jsonl("val", file=file)
        assert [sample.image.size for sample in dataset] == [(width, height)] * len(dataset)
        return [region.box for sample in dataset for region in sample.regions], dict(dataset.skipped)

    file = write_jsonl(make_line(box=[0, 0, 208, 204]))
    assert read_boxes(200, 200) == ([(0, 0, 200, 200)], {"box clipped": 1})
    assert read_boxes(300, 300) == ([(0, 0, 208, 204)], {})
    assert read_boxes(100, 100) == ([], {"normalized box": 1, "image without regions": 1})
    assert read_boxes(210, 210) == ([(0, 0, 208, 204)], {})


def test_jsonl_reuses_table_if_only_modification_time_of_image_changes(write_jsonl, tmp_path):
    file = write_jsonl(make_line())
    cache_files = Jsonl("val", file=file)._table.cache_files
    original_inodes = [os.stat(cache_file["filename"]).st_ino for cache_file in cache_files]
    os.utime(tmp_path / "photos" / "1.png", (1, 1))
    reopened_inodes = [
        os.stat(cache_file["filename"]).st_ino for cache_file in Jsonl("val", file=file)._table.cache_files
    ]
    assert original_inodes == reopened_inodes


def test_jsonl_counts_skipped_records(write_jsonl, tmp_path):
    lines = [
        make_line(box=[-1, 3, 12, 90]),
        make_line(box=[64, 3, 70, 9]),
        make_line(box=[5, 5, 5, 9]),
        make_line(caption=" "),
        make_line(box=None, mask=[[-9, -9, -5, -9, -5, -5]]),
        make_line(box=[1, 2, 3, 4], mask=[[-9, -9, -5, -9, -5, -5]]),
        make_line(image="missing.png"),
        make_line(image="photos/2.png"),
    ]
    file = write_jsonl(*lines)
    (tmp_path / "photos" / "2.png").write_bytes(b"no image")
    (sample,) = dataset = Jsonl("val", file=file)
    assert [region.box for region in sample.regions] == [(0, 3, 12, HEIGHT), (1, 2, 3, 4)]
    assert dataset.skipped == {
        "box clipped": 1,
        "empty box": 2,
        "region without text": 1,
        "empty mask": 2,
        "image missing": 1,
        "image unreadable": 1,
    }
    with pytest.raises(ValueError, match=r"2 images .* more than max_bad_records=1"):
        Jsonl("val", file=file, max_bad_records=1)


LINE_PATTERN = r"regions\.jsonl: line 1 \(id \d\): "


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"image": "a.'], r"regions\.jsonl: line 1 is not valid JSON: Unterminated string"),
        ([make_line(), "", "[3]"], r"regions\.jsonl: line 3 is \[3\]; expected an object"),
        ([{"box": [1, 2, 3, 4]}], LINE_PATTERN + "no 'image'; it has: box"),
        ([make_line(image=4)], LINE_PATTERN[:-2] + r", 'image' is 4; expected a string"),
        ([{"image": "photos/1.png", "caption": "x"}], LINE_PATTERN + "no 'box'; it has: image, caption"),
        ([make_line(box=None)], LINE_PATTERN[:-2] + r", 'box' is None; expected 4 numbers \(x1, y1, x2, y2\)"),
        ([make_line(box=[1, 2, 3])], LINE_PATTERN[:-2] + r", 'box' is .*; expected 4 numbers"),
        ([make_line(box=[1, 2, 3, "4"])], LINE_PATTERN[:-2] + r", 'box' is .*; expected 4 numbers"),
        ([make_line(box=[1, 2, 3, float("nan")])], LINE_PATTERN[:-2] + r", 'box' is .*; expected 4 numbers"),
        (
            [make_line(box=[9, 2, 3, 4])],
            LINE_PATTERN + r"box is \[9, 2, 3, 4\], with x2 < x1 or y2 < y1; expected x1, y1, x2, y2",
        ),
        ([make_line(box=[1, 9, 3, 4])], LINE_PATTERN + r"box is \[1, 9, 3, 4\], with x2 < x1 or y2 < y1"),
        ([make_line(caption=3)], LINE_PATTERN[:-2] + r", 'caption' is 3; expected a string, or a list of strings"),
        ([make_line(caption=None)], LINE_PATTERN + "no text; set name, caption, phrases, or question and answer"),
        (
            [make_line(phrases=["x"])],
            LINE_PATTERN + "caption and phrases are mutually exclusive; omit one of them",
        ),
        (
            [make_line(caption=None, phrases=[3])],
            LINE_PATTERN[:-2] + r", 'phrases' is .*; expected a string, or a list of strings",
        ),
        ([make_line(caption="\ud800")], LINE_PATTERN[:-2] + ", 'caption' contains .*, half of a surrogate pair"),
        ([make_line(name=3)], LINE_PATTERN[:-2] + r", 'name' is 3; expected a string"),
        ([make_line(attributes=[3])], LINE_PATTERN[:-2] + r", 'attributes' is .*; expected an object"),
        (
            [make_line(mask={"size": [4, 4], "counts": "1"})],
            LINE_PATTERN + r"mask has size \[4, 4\], but the image is \[48, 64\]",
        ),
        (
            [make_line(mask={"size": [48, 64], "counts": "1"})],
            LINE_PATTERN + "mask is not a valid RLE of 64 x 48 pixels",
        ),
        ([make_line(mask={"size": [48, 64], "counts": "é"})], LINE_PATTERN + "mask is not a valid RLE"),
        ([make_line(mask={"size": [48, 64], "counts": [5]})], LINE_PATTERN + "mask is not a valid RLE"),
        ([make_line(mask=[[1, 2, 3]])], LINE_PATTERN + "mask must contain lists of x, y"),
        ([make_line(mask=[[1, 2, 1e30, 4, 5, 6]])], LINE_PATTERN + "mask has a point far outside the image of 64 x 48"),
        ([make_line(mask=7)], LINE_PATTERN + "mask must be polygons, or an RLE"),
        ([make_line(width=5)], LINE_PATTERN + "no 'height'"),
        ([make_line(width=5, height=-1)], LINE_PATTERN + "'width' and 'height' are .5, -1.; expected the size"),
        (
            [make_line(width=5, height=9), make_line(width=9, height=5)],
            r"line 2 .*: the image size is \(9, 5\), but an earlier line has \(5, 9\)",
        ),
        ([make_line(id=1), make_line(id=1)], r"line 2 \(id 1\): duplicate id"),
        ([make_line(id=1), make_line()], "line 2: no 'id', which the first line has; set it on every line or on none"),
        (
            [make_line(), make_line(image_id=1)],
            "line 2: 'image_id', which the first line lacks; set it on every line or on none",
        ),
        ([make_line(id="1")], "line 1, 'id' is '1'; expected an integer"),
        (
            [make_line(image_id=1), make_line(image_id=2)],
            r"line 2 .*: image_id 2 differs from the earlier 1 of this image",
        ),
        (
            [make_line(image_id=1), make_line(image_id=1, image="photos/2.png")],
            r"line 2 .*: duplicate image_id 1, which photos.1\.png has",
        ),
    ],
)
def test_jsonl_reports_broken_line_with_file_and_field(write_jsonl, lines, message):
    with pytest.raises(ValueError, match=message):
        Jsonl("val", file=write_jsonl(*lines), max_bad_records=0)


def test_jsonl_reports_line_that_is_not_utf8(write_jsonl):
    file = write_jsonl(make_line())
    file.write_bytes(file.read_bytes() + b'\n{"caption": "\xe9"}')
    with pytest.raises(ValueError, match=r"regions\.jsonl: line 2 is not UTF-8"):
        Jsonl("val", file=file, max_bad_records=0)
