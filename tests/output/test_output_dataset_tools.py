"""Outputs for CVAT, FiftyOne and YOLO: their formats, and what the packages of tools read from them."""

import base64
import io
import json
import subprocess
import zlib
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from sca_registry.contracts import Caption, Prompt
from tool_environment import create_tool_environment

from sca.io import masks
from sca.output.formats import MultiFormatWriter

FORMATS = ("cvat", "fiftyone", "yolo")
NAMES = ("cat", "dog & <owner>", None)
BOX = (1.5, 2.25, 30.0, 20.5)


def make_captions(rng, width, height, count):
    """Regions with masks of any shape, with holes and several parts, and with boxes."""
    captions = []
    for number in range(count):
        name, text = NAMES[number % len(NAMES)], f'region {number}: "éüß" & 日本語 \N{GRINNING FACE}'
        if number % 3 == 2:
            (x1, x2), (y1, y2) = (np.sort(rng.uniform(0, side, 2)).tolist() for side in (width, height))
            captions.append(Caption(text, 0.5, (x1, y1, x2, y2), None, None, Prompt(), number, name=name))
            continue
        mask = rng.random((height, width)) < (0.02, 0.5, 0.98)[number % 4 % 3]
        mask[: number % 5, :] = False
        captions.append(
            Caption(text, 0.5, masks.mask_to_box(mask), masks.encode_rle(mask), 0.75, Prompt(), number, name=name)
        )
    return captions


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Folder with 20 regions of three images in every format, and the captions by the stem of their image."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    captions_by_stem = {}
    with MultiFormatWriter("out", FORMATS, model="m") as writers:
        for stem, size, count in (("a", (40, 30), 7), ("b é", (301, 177), 10), ("c", (33, 9), 3)):
            path = Path(f"photos/{stem}.png")
            path.parent.mkdir(exist_ok=True)
            image = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8))
            image.save(path)
            captions_by_stem[stem] = make_captions(rng, *size, count)
            writers.add(path, image, captions_by_stem[stem])
    (tmp_path / "out/images").symlink_to(tmp_path)  # datumaro opens the images of CVAT there
    return tmp_path / "out", captions_by_stem


def write_captions(folder, captions, size=(40, 30)):
    with MultiFormatWriter(folder, FORMATS, model="m") as writers:
        writers.add("photos/a.png", Image.new("RGB", size), captions)


def decode_row_runs(element):
    """Return the mask of a CVAT element: runs row by row inside its box, beginning with background."""
    runs = [int(length) for length in element.get("rle").split(",")]
    pixels = np.repeat(np.arange(len(runs)) % 2, runs).astype(bool)
    return pixels.reshape(int(element.get("height")), int(element.get("width")))


def test_cvat_writer_follows_cvat_for_images(tmp_path, captions):
    write_captions(tmp_path, captions)
    root = ElementTree.parse(tmp_path / "cvat.xml").getroot()
    assert [child.tag for child in root] == ["version", "meta", "image"]
    assert root.findtext("version") == "1.1"
    (label,) = root.findall("meta/task/labels/label")
    assert label.findtext("name") == "region"
    attributes = [(each.findtext("name"), each.findtext("input_type")) for each in label.iter("attribute")]
    assert attributes == [("caption", "text"), ("score", "text")]
    (image,) = root.iter("image")
    assert image.attrib == {"id": "0", "name": "photos/a.png", "width": "40", "height": "30"}
    disc, box, point, square = image
    assert [shape.tag for shape in image] == ["mask", "box", "points", "mask"]
    assert [shape.findtext("attribute[@name='caption']") for shape in image] == [each.text for each in captions]
    for shape, caption in ((disc, captions[0]), (square, captions[3])):
        mask, (left, top) = np.zeros((30, 40), bool), (int(shape.get("left")), int(shape.get("top")))
        mask_crop = decode_row_runs(shape)
        mask[top : top + mask_crop.shape[0], left : left + mask_crop.shape[1]] = mask_crop
        assert (mask == masks.decode_rle(caption.mask)).all()
    assert square.get("rle") == "0, 64"
    assert [float(box.get(side)) for side in ("xtl", "ytl", "xbr", "ybr")] == list(captions[1].box)
    assert (point.get("points"), point.get("label"), point.get("source")) == ("5.0,6.0", "region", "auto")


def test_cvat_writer_lists_names_as_labels_and_escapes_texts(tmp_path, hostile_captions):
    named = Caption("x", 0.5, BOX, None, None, Prompt(), 9, name='a "b" <c>')
    write_captions(tmp_path, [*hostile_captions, named])
    root = ElementTree.parse(tmp_path / "cvat.xml").getroot()
    assert [label.findtext("name") for label in root.iter("label")] == ["region", 'a "b" <c>']
    texts = [attribute.text or "" for attribute in root.findall("image/*/attribute[@name='caption']")]
    expected = [caption.text for caption in hostile_captions]
    expected[1] = "two\nlines\r\nand\u2028more\\x00\\x1b[31m"  # XML has no control characters
    expected[6] = "half a pair \\ud83d"
    assert texts == [*expected, "x"]


def test_fiftyone_writer_follows_its_dataset_layout(tmp_path, captions):
    corner_mask = np.zeros((30, 40), bool)
    corner_mask[3:9, 5] = corner_mask[8, 5:12] = True
    captions[0] = replace(captions[0], mask=masks.encode_rle(corner_mask), box=masks.mask_to_box(corner_mask))
    write_captions(tmp_path, captions)
    assert json.loads((tmp_path / "fiftyone/metadata.json").read_text()) == {
        "media_type": "image",
        "info": {"model": "m"},
    }
    (sample,) = json.loads((tmp_path / "fiftyone/samples.json").read_text())["samples"]
    assert Path(tmp_path / "fiftyone" / sample["filepath"]).resolve() == Path("photos/a.png").resolve()
    corner, box, square = sample["regions"]["detections"]
    assert sample["regions"]["_cls"] == "Detections"
    assert {each["_cls"] for each in (corner, box, square)} == {"Detection"}
    for detection, caption in ((corner, captions[0]), (square, captions[3])):
        content = zlib.decompress(base64.b64decode(detection["mask"]["$binary"]["base64"]))
        x1, y1, x2, y2 = (int(value) for value in caption.box)
        assert (np.load(io.BytesIO(content)) == masks.decode_rle(caption.mask)[y1:y2, x1:x2]).all()
        assert detection["bounding_box"] == [x1 / 40, y1 / 30, (x2 - x1) / 40, (y2 - y1) / 30]
    assert (box["label"], box["caption"], box["confidence"], "mask" in box) == ("region", "a box", 0.5, False)
    (point,) = sample["points"]["keypoints"]
    assert (point["points"], point["caption"], point["confidence"]) == ([[5 / 40, 6 / 30]], "a point", [0.25])


def test_yolo_writer_follows_the_detection_layout(tmp_path, captions, caplog):
    named = Caption("x", 0.5, BOX, None, None, Prompt(), 9, name='a "b"\n')
    write_captions(tmp_path, [*captions, named])
    lines = (tmp_path / "yolo/labels/a.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["0", "0", "0", "1"]
    x, y, width, height = np.array(lines[1].split()[1:], float) * [40, 30, 40, 30]
    assert [x - width / 2, y - height / 2, x + width / 2, y + height / 2] == pytest.approx(captions[1].box)
    expected = 'train: images\nval: images\nnames:\n  0: "region"\n  1: "a \\"b\\"\\\\n"\n'
    assert (tmp_path / "yolo/data.yaml").read_text() == expected
    assert Image.open(tmp_path / "yolo/images/a.png").size == (40, 30)


@pytest.fixture(scope="module")
def datumaro_python(tmp_path_factory):
    return create_tool_environment(tmp_path_factory.mktemp("datumaro"), "datumaro")


@pytest.fixture(scope="module")
def fiftyone_python(tmp_path_factory):
    return create_tool_environment(tmp_path_factory.mktemp("fiftyone"), "fiftyone")


def check_tool_regions(interpreter, reader, written):
    """Check that a tool reads equal boxes, masks, texts and labels, in order."""
    folder, captions_by_stem = written
    script = Path(__file__).with_name("dataset_tool_readers.py")
    process = subprocess.run([interpreter, script, reader, folder], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    regions = json.loads(process.stdout.splitlines()[-1])
    assert len(regions) == sum(map(len, captions_by_stem.values())) == 20
    regions_by_stem = {}
    for region in regions:
        regions_by_stem.setdefault(Path(region["image"]).name, []).append(region)
    for stem, captions in captions_by_stem.items():
        for region, caption in zip(regions_by_stem[stem], captions, strict=True):
            assert region["label"] == (caption.name or "region")
            if region["box"] is not None:
                assert region["box"] == pytest.approx(caption.box, abs=0.01)  # datumaro rounds to two decimals
            if "yolo" not in reader:
                assert region["caption"] == caption.text
                assert (region["mask"] is None) == (caption.mask is None)
            if region["mask"] is not None:
                shape, packed = region["mask"]
                mask = masks.decode_rle(caption.mask)
                assert (shape, packed) == (list(mask.shape), np.packbits(mask).tobytes().hex())


@pytest.mark.all
@pytest.mark.parametrize("reader", ["cvat", "yolo"])
def test_datumaro_reads_equal_regions(written, datumaro_python, reader):
    check_tool_regions(datumaro_python, reader, written)


@pytest.mark.all
@pytest.mark.parametrize("reader", ["fiftyone", "fiftyone-yolo"])
def test_fiftyone_reads_equal_regions(written, fiftyone_python, reader):
    check_tool_regions(fiftyone_python, reader, written)
