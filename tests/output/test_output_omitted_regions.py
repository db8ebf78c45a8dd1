"""Regions that a format cannot represent are omitted, with one warning per output."""

import json
from xml.etree import ElementTree

import pytest
from PIL import Image, ImageDraw
from sca_registry.contracts import Caption, Prompt

from sca.io.errors import InputError
from sca.output.formats import MultiFormatWriter
from sca.output.jsonl import caption_to_record
from sca.output.label_studio import make_results
from sca.output.labeling_interface import Control, LabelingInterface
from sca.output.png import draw_captions
from sca.output.reader import read_captions

BOX = (1.5, 2.0, 10.0, 12.25)
UNLOCATED = Caption("nowhere", 0.5, None, None, None, Prompt(), 1, name="ghost")
CAPTIONS = [Caption("a box", 0.5, BOX, None, None, Prompt(box=BOX), 0), UNLOCATED]
FORMATS = {
    "cvat": "CVAT annotations",
    "fiftyone": "FiftyOne labels",
    "label-studio": "Label Studio predictions",
    "labelme": "LabelMe files",
}
POINT_CAPTION = Caption("a point", 0.5, None, None, None, Prompt(points=((5, 6, 1),)), 0)


def write_images(folder, format_name):
    """Write one image without and two images with a region that has no mask, box or point."""
    image = Image.new("RGB", (40, 30))
    with MultiFormatWriter(folder, (format_name,)) as writers:
        writers.add("a.png", image, CAPTIONS[:1])
        writers.add("b.png", image, CAPTIONS)
        writers.add("c.png", image, [*CAPTIONS, UNLOCATED])
    return writers.paths[format_name]


def read_texts(path, format_name):
    if format_name == "cvat":
        return [each.text for each in ElementTree.parse(path).iterfind("image/*/attribute[@name='caption']")]
    if format_name == "fiftyone":
        samples = json.loads((path / "samples.json").read_text())["samples"]
        labels = [each for sample in samples for each in (*sample["regions"]["detections"], sample["points"])]
        return [each["caption"] for each in labels if "caption" in each]
    return [caption.text for image in read_captions(path) for caption in image.captions]


@pytest.mark.parametrize("format_name", FORMATS)
def test_writer_omits_regions_without_coordinates_and_warns_once_with_their_number(tmp_path, caplog, format_name):
    path = write_images(tmp_path, format_name)
    assert read_texts(path, format_name) == ["a box"] * 3
    text = f"{FORMATS[format_name]} omit 3 regions without a mask, a box or a point; the first is in b.png"
    assert [record.getMessage() for record in caplog.records] == [text]


@pytest.mark.parametrize(
    ("format_name", "omitted"),
    [
        ("coco", "COCO annotations omit 3 regions without a mask or a box"),
        ("yolo", "YOLO labels omit 3 regions without a box"),
    ],
)
def test_writer_warns_once_with_the_number_of_regions_without_a_box_of_all_images(
    tmp_path, caplog, format_name, omitted
):
    for folder in ("first", "second"):
        with MultiFormatWriter(tmp_path / folder, (format_name,)) as writers:
            for stem, captions in (("a", CAPTIONS[:1]), ("b", [POINT_CAPTION, UNLOCATED]), ("c", [POINT_CAPTION])):
                writers.add(f"{stem}.png", Image.new("RGB", (40, 30)), captions)
        text = f"{omitted}; the first is in b.png"
        assert [record.getMessage() for record in caplog.records] == [text]
        caplog.clear()


def test_coco_annotations_without_omitted_regions_are_numbered_from_1(tmp_path):
    content = json.loads(write_images(tmp_path, "coco").read_text())
    assert [each["id"] for each in content["annotations"]] == [1, 2, 3]
    assert [each["caption"] for each in content["annotations"]] == ["a box"] * 3
    assert [each["name"] for each in content["categories"]] == ["region"]
    assert len(content["images"]) == 3


def test_drawn_captions_without_coordinates_are_not_connected_with_a_corner(monkeypatch):
    lines = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "line", lambda self, ends, **options: lines.append(ends))
    image = Image.new("RGB", (600, 400))
    draw_captions(image, [UNLOCATED] * 12)
    assert lines == []
    draw_captions(image, [POINT_CAPTION] * 12)
    assert lines


def test_geojson_writer_keeps_regions_without_coordinates(tmp_path, caplog):
    path = write_images(tmp_path, "geojson")
    features = json.loads(path.read_text())["features"]
    assert [each["geometry"] is None for each in features] == [False, False, True, False, True, True]
    images = list(read_captions(path))
    assert [[each.text for each in image.captions] for image in images] == [
        ["a box"],
        ["a box", "nowhere"],
        ["a box", "nowhere", "nowhere"],
    ]
    assert images[1].captions[1].box is None
    assert caplog.records == []


def test_label_studio_results_of_a_box_are_not_a_point():
    interface = LabelingInterface(mask=Control("mask"), point=Control("point"))
    record = caption_to_record("a.png", Image.new("RGB", (40, 30)), CAPTIONS[0])
    with pytest.raises(InputError, match="a region has no mask; add RectangleLabels"):
        make_results(record, "region-0", interface)
