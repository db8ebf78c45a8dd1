"""JSON lines: what `sca caption` writes and what people write by hand is read, and a broken line is named."""

import json
import os

import numpy as np
import pytest
from PIL import Image
from sca_registry import datasets
from sca_registry.contracts import Caption, Prompt, Region

from sca.data.jsonl import Jsonl
from sca.io import masks
from sca.output.jsonl import JsonlWriter as Output
from sca.testing.conformance import check_component

WIDTH, HEIGHT = 64, 48


@pytest.fixture
def write(tmp_path):
    """Writes lines beside two pictures, and gives the file."""

    def write(*lines, name="regions.jsonl"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        for number in (1, 2):
            Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / name).write_text("\n".join(texts), "utf-8")
        return tmp_path / name

    return write


def line(**changes):
    return {"image": "photos/1.png", "box": [2, 3, 12, 11.5], "caption": "a dog"} | changes


def square():
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[4:12, 3:9] = True
    return mask


def test_everything_is_read_as_it_was_written(write):
    code = masks.encode_rle(square())
    polygon = [[3, 4, 9, 4, 9, 12, 3, 12]]
    file = write(
        line(name="dog", mask=code, attributes={"age": 3, "at": [1, 2]}),
        "",
        line(image="photos/2.png", caption=["a café", "☕"], width=WIDTH, height=HEIGHT),
        "  ",
        line(image="./photos/1.png", caption=None, phrases=["one", " two "], mask=polygon, score=0.5),
        '\ufeff{"image": "photos/1.png", "box": [0, 0, 64, 48], "name": "cat"}',
    )
    first, second = datasets.build("jsonl", "val", file=str(file))
    assert (first.image_id, second.image_id) == (0, 1)
    assert first.image.size == (WIDTH, HEIGHT)
    assert first.regions == (
        Region(0, (2, 3, 12, 11.5), code, "dog", ("a dog",), {"age": 3, "at": (1, 2)}),
        Region(2, (2, 3, 12, 11.5), code, None, ("one", "two")),
        Region(3, (0, 0, 64, 48), None, "cat"),
    )
    assert second.regions == (Region(1, (2, 3, 12, 11.5), phrases=("a café", "☕")),)
    assert Jsonl("val", file=file).attribute_values == {"name": ("cat", "dog")}


def test_ids_that_are_given_are_kept(write):
    file = write(line(id=7, image_id=70), line(id=5, image_id=60, image="photos/2.png"), line(id=6, image_id=70))
    read = [(sample.image_id, [region.id for region in sample.regions]) for sample in Jsonl("val", file=file)]
    assert read == [(70, [7, 6]), (60, [5])]


def test_it_keeps_the_promises_of_a_dataset(write):
    file = write(line(mask=masks.encode_rle(square())), line(image="photos/2.png"))
    findings = check_component("dataset", "jsonl", split="val", file=str(file))
    assert [finding for finding in findings if not finding.passed] == []


def test_what_sca_caption_writes_is_read_as_it_is(write, tmp_path, monkeypatch):
    code = masks.encode_rle(square())
    write()
    output = Output(tmp_path / "out.jsonl", model="tiny")
    for number in (1, 2):
        path = f"photos/{number}.png"
        answers = [
            Caption("a dog", 0.5, (2.0, 3.0, 12.0, 11.5), code, 0.9, Prompt(box=(2.0, 3.0, 12.0, 11.5)), 0),
            Caption("café", float("nan"), None, code, None, Prompt(points=((4, 5, 1),)), 1, (("other", 0.1),)),
            Caption("", 0.0, (1.0, 1.0, 5.0, 5.0), None, None, Prompt(mask=square()), 2),
        ]
        with Image.open(tmp_path / path) as image:
            output.add(path, image, answers)
    output.close()
    dataset = Jsonl("val", file=tmp_path / "out.jsonl")
    for sample in dataset:
        assert [region.phrases for region in sample.regions] == [("a dog",), ("café",)]
        assert [region.box for region in sample.regions] == [(2, 3, 12, 11.5), (3, 4, 9, 12)]
        assert [region.mask for region in sample.regions] == [code, code]
    assert len(dataset) == 2
    assert dataset.skipped == {"region without text": 2}


def test_images_are_found_by_the_file_by_the_folder_given_or_where_one_works(write, tmp_path, monkeypatch):
    file = write(line())
    out = tmp_path / "elsewhere" / "out"
    out.mkdir(parents=True)
    moved = file.rename(out / "regions.jsonl")
    assert len(Jsonl("val", file=moved, images=tmp_path)) == 1
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Jsonl("val", file="out/regions.jsonl").skipped == {"image missing": 1}
    monkeypatch.chdir(tmp_path)
    dataset = Jsonl("val", file="elsewhere/out/regions.jsonl")
    monkeypatch.chdir("/")
    assert dataset[0].regions[0].phrases == ("a dog",)


def test_a_file_of_each_split_is_named_at_once(write):
    for split in ("train", "val"):
        file = write(line(caption=split), name=f"{split}.jsonl")
    pattern = str(file.with_name("{split}.jsonl"))
    assert [Jsonl(split, file=pattern)[0].regions[0].phrases for split in ("train", "val")] == [("train",), ("val",)]
    with pytest.raises(ValueError, match=r"there is no file .*test\.jsonl; give file=FILE, which may hold {split}"):
        Jsonl("test", file=pattern)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_a_picture_without_a_recorded_size_is_seen_as_its_viewer_sees_it(write, tmp_path, suffix):
    file = write(line(image=f"photos/turned.{suffix}", box=[0, 0, HEIGHT, WIDTH]))
    turned = Image.new("RGB", (WIDTH, HEIGHT))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "photos" / f"turned.{suffix}", exif=exif)
    (sample,) = dataset = Jsonl("val", file=file)
    assert sample.image.size == (HEIGHT, WIDTH)
    assert not dataset.skipped


def test_jsonl_without_a_recorded_size_judges_boxes_by_the_present_image(write, tmp_path):
    def boxes(width, height):
        Image.new("RGB", (width, height)).save(tmp_path / "photos" / "1.png")
        dataset = Jsonl("val", file=file)
        assert [sample.image.size for sample in dataset] == [(width, height)] * len(dataset)
        return [region.box for sample in dataset for region in sample.regions], dict(dataset.skipped)

    file = write(line(box=[0, 0, 208, 204]))
    assert boxes(200, 200) == ([(0, 0, 200, 200)], {"box clipped": 1})
    assert boxes(300, 300) == ([(0, 0, 208, 204)], {})
    assert boxes(100, 100) == ([], {"normalized box": 1, "image without regions": 1})
    assert boxes(210, 210) == ([(0, 0, 208, 204)], {})


def test_jsonl_keeps_the_table_of_an_image_that_is_only_written_again(write, tmp_path):
    file = write(line())
    about = Jsonl("val", file=file)._table.cache_files
    before = [os.stat(each["filename"]).st_ino for each in about]
    os.utime(tmp_path / "photos" / "1.png", (1, 1))
    after = [os.stat(each["filename"]).st_ino for each in Jsonl("val", file=file)._table.cache_files]
    assert before == after


def test_what_is_left_out_is_counted(write, tmp_path):
    lines = [
        line(box=[-1, 3, 12, 90]),
        line(box=[64, 3, 70, 9]),
        line(box=[5, 5, 5, 9]),
        line(caption=" "),
        line(box=None, mask=[[-9, -9, -5, -9, -5, -5]]),
        line(box=[1, 2, 3, 4], mask=[[-9, -9, -5, -9, -5, -5]]),
        line(image="missing.png"),
        line(image="photos/2.png"),
    ]
    file = write(*lines)
    (tmp_path / "photos" / "2.png").write_bytes(b"no picture")
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
    with pytest.raises(ValueError, match=r"2 images .* more than max_bad=1"):
        Jsonl("val", file=file, max_bad=1)


PLACE = r"regions\.jsonl: line 1 \(id \d\): "


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"image": "a.'], r"regions\.jsonl: line 1 is not valid JSON: Unterminated string"),
        ([line(), "", "[3]"], r"regions\.jsonl: line 3 is \[3\]; give an object"),
        ([{"box": [1, 2, 3, 4]}], PLACE + "no 'image'; it has: box"),
        ([line(image=4)], PLACE[:-2] + r", 'image' is 4; give text"),
        ([{"image": "photos/1.png", "caption": "x"}], PLACE + "no 'box'; it has: image, caption"),
        ([line(box=None)], PLACE[:-2] + r", 'box' is None; give 4 numbers \(x1, y1, x2, y2\)"),
        ([line(box=[1, 2, 3])], PLACE[:-2] + r", 'box' is .*; give 4 numbers"),
        ([line(box=[1, 2, 3, "4"])], PLACE[:-2] + r", 'box' is .*; give 4 numbers"),
        ([line(box=[1, 2, 3, float("nan")])], PLACE[:-2] + r", 'box' is .*; give 4 numbers"),
        ([line(box=[9, 2, 3, 4])], PLACE + r"box is \[9, 2, 3, 4\], whose ends come before its beginnings"),
        ([line(box=[1, 9, 3, 4])], PLACE + r"box is \[1, 9, 3, 4\], whose ends"),
        ([line(caption=3)], PLACE[:-2] + r", 'caption' is 3; give text, or a list of texts"),
        ([line(caption=None)], PLACE + "give a caption or phrases, a name, or both; there is none"),
        ([line(phrases=["x"])], PLACE + "give a caption or phrases, .*; there is caption and phrases"),
        ([line(caption=None, phrases=[3])], PLACE[:-2] + r", 'phrases' is .*; give text, or a list of texts"),
        ([line(caption="\ud800")], PLACE[:-2] + ", 'caption' contains .*, half of a surrogate pair"),
        ([line(name=3)], PLACE[:-2] + r", 'name' is 3; give text"),
        ([line(attributes=[3])], PLACE[:-2] + r", 'attributes' is .*; give an object"),
        ([line(mask={"size": [4, 4], "counts": "1"})], PLACE + r"mask has size \[4, 4\] in an image of \[48, 64\]"),
        ([line(mask={"size": [48, 64], "counts": "1"})], PLACE + "mask counts do not add up to the 3072 pixels"),
        ([line(mask={"size": [48, 64], "counts": "é"})], PLACE + "mask counts do not add up"),
        ([line(mask={"size": [48, 64], "counts": [5]})], PLACE + "mask counts do not add up"),
        ([line(mask=[[1, 2, 3]])], PLACE + "mask must be lists of x, y"),
        ([line(mask=[[1, 2, 1e30, 4, 5, 6]])], PLACE + "mask has a point far outside the image of 64 x 48"),
        ([line(mask=7)], PLACE + "mask must be polygons, or RLE"),
        ([line(width=5)], PLACE + "no 'height'"),
        ([line(width=5, height=-1)], PLACE + "'width' and 'height' are .5, -1.; give the size"),
        (
            [line(width=5, height=9), line(width=9, height=5)],
            r"line 2 .*: width and height are \(9, 5\), and \(5, 9\) on",
        ),
        ([line(id=1), line(id=1)], r"line 2 \(id 1\): this id was given before"),
        ([line(id=1), line()], "line 2: no 'id', which the first line has; give it on every line, or on none"),
        (
            [line(), line(image_id=1)],
            "line 2: 'image_id', which the first line lacks; give it on every line, or on none",
        ),
        ([line(id="1")], "line 1, 'id' is '1'; give an integer"),
        ([line(image_id=1), line(image_id=2)], r"line 2 .*: image_id 2 is another than before, 1, for the same image"),
        (
            [line(image_id=1), line(image_id=1, image="photos/2.png")],
            r"line 2 .*: image_id 1 was given before, to photos.1\.png",
        ),
    ],
)
def test_a_broken_line_is_named_with_its_file_and_field(write, lines, message):
    with pytest.raises(ValueError, match=message):
        Jsonl("val", file=write(*lines), max_bad=0)


def test_text_that_is_not_utf_8_is_named(write):
    file = write(line())
    file.write_bytes(file.read_bytes() + b'\n{"caption": "\xe9"}')
    with pytest.raises(ValueError, match=r"regions\.jsonl: line 2 is not UTF-8"):
        Jsonl("val", file=file, max_bad=0)
