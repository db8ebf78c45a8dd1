"""Output formats: valid for their tools, and readable by `read_captions`."""

import json
import math
import os

import numpy as np
import pytest
from PIL import Image
from sca_registry.contracts import Caption, Prompt

from sca.io import masks
from sca.io.annotations.brush_rle import decode_brush_rle, encode_brush_rle
from sca.io.errors import InputError
from sca.output.contours import mask_to_polygons, rings_to_mask
from sca.output.formats import OUTPUT_FORMATS, MultiFormatWriter
from sca.output.reader import read_captions

READABLE_FORMATS = {
    "jsonl": "captions.jsonl",
    "coco": "coco.json",
    "parquet": "captions.parquet",
    "geojson": "captions.geojson",
    "label-studio": "label-studio.json",
    "labelme": "labelme",
}
FORMATS_WITH_PROMPTS = ("jsonl", "parquet", "geojson")  # formats that store prompts


@pytest.fixture
def output_paths(tmp_path, noise_image, captions, monkeypatch):
    """Captions of two images in every readable format."""
    monkeypatch.chdir(tmp_path)
    with MultiFormatWriter("out", READABLE_FORMATS, model="m") as writers:
        writers.add("a.png", noise_image, captions)
        writers.add("b/é.png", noise_image.resize((31, 17)), [])
        writers.add("c.png", noise_image, captions[::-1])
    return writers.paths


@pytest.mark.parametrize("format_name", READABLE_FORMATS)
def test_read_captions_reads_every_readable_format(output_paths, captions, format_name):
    captioned_images = {
        captioned_image.image: captioned_image for captioned_image in read_captions(output_paths[format_name])
    }
    assert set(captioned_images) == {"a.png", "c.png"} | (
        {"b/é.png"} if format_name in ("coco", "label-studio", "labelme") else set()
    )
    assert captioned_images["a.png"].size == (40, 30)
    if format_name == "coco":  # has no points
        captions = [caption for caption in captions if caption.mask or caption.box]
    for caption, expected in zip(captioned_images["a.png"].captions, captions, strict=True):
        assert caption.text == expected.text
        assert caption.mask == expected.mask
        assert caption.score == pytest.approx(expected.score)
        if expected.mask or expected.box:
            assert caption.box == pytest.approx(expected.box)
        if format_name in FORMATS_WITH_PROMPTS:
            assert (caption.prompt.box, caption.prompt.points) == (expected.prompt.box, expected.prompt.points)
            expected_iou = expected.predicted_iou
            assert caption.predicted_iou == (None if expected_iou is None else pytest.approx(expected_iou))
    if format_name != "labelme":
        assert captioned_images["a.png"].model == "m"


def count_components(mask):
    """Return the number of 4-connected components."""
    remaining, count = {(y, x) for y, x in np.argwhere(mask).tolist()}, 0
    while remaining:
        count, component = count + 1, [remaining.pop()]
        for y, x in component:
            neighbors = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & remaining
            remaining -= neighbors
            component += neighbors
    return count


def compute_signed_area(ring):
    x, y = np.transpose(ring)
    return (x * np.roll(y, -1) - np.roll(x, -1) * y).sum()


@pytest.mark.parametrize("seed", range(6))
def test_mask_to_polygons_and_encode_brush_rle_round_trip_any_mask(seed):
    random_values = np.random.default_rng(seed).random((23 + seed, 31))
    mask = random_values > (0.5, 0.2, 0.8, 0.05, 0.95, 0.99)[seed]
    polygons = mask_to_polygons(mask)
    assert (rings_to_mask([ring for polygon in polygons for ring in polygon], 31, 23 + seed) == mask).all()
    assert (decode_brush_rle(encode_brush_rle(mask), 31, 23 + seed) == mask).all()
    assert len(polygons) == count_components(mask)
    for outer, *holes in polygons:
        assert compute_signed_area(outer) > 0 > max(map(compute_signed_area, holes), default=-1)
    for ring in (ring for polygon in polygons for ring in polygon):
        assert len({tuple(corner) for corner in ring}) == len(ring), "a ring touches itself"


def test_mask_to_polygons_assigns_holes_to_the_enclosing_polygon():
    mask = np.zeros((20, 20), bool)
    mask[2:18, 2:18] = True
    mask[4:16, 4:16] = False
    mask[6:14, 6:14] = True
    mask[8:10, 8:10] = False
    assert sorted(map(len, mask_to_polygons(mask))) == [2, 2]
    assert mask_to_polygons(np.zeros((3, 3), bool)) == []


def test_mask_to_polygons_keeps_a_hole_that_touches_the_edge_at_a_corner():
    mask = np.ones((4, 4), bool)
    mask[1, 1] = mask[0, 0] = False
    (((*outer,), hole),) = mask_to_polygons(mask)
    assert [1, 1] in outer
    assert sorted(hole) == [[1, 1], [1, 2], [2, 1], [2, 2]]


def test_labelme_writer_follows_the_file_format_of_labelme(output_paths, captions):
    """LabelMe's format: corners of boxes, crops of masks, and the image path."""
    content = json.loads((output_paths["labelme"] / "a.json").read_text())
    assert os.path.normpath(output_paths["labelme"] / content["imagePath"]) == "a.png"
    assert {"version", "flags", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth"} <= content.keys()
    disc_shape = content["shapes"][0]
    (x1, y1), (x2, y2) = disc_shape["points"]
    assert (x1, y1, x2 + 1, y2 + 1) == captions[0].box
    assert [shape["shape_type"] for shape in content["shapes"]] == ["mask", "rectangle", "point", "mask"]


def test_parquet_writer_output_is_read_by_datasets(output_paths):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_parquet(str(output_paths["parquet"]))
    assert table.num_rows == 8
    assert table[0]["caption"] == "a disc"
    assert json.loads(table[0]["prompt"])["points"]


def test_geojson_writer_closes_rings(output_paths):
    content = json.loads(output_paths["geojson"].read_text())
    for feature in content["features"]:
        if feature["geometry"]["type"] == "MultiPolygon":
            assert all(ring[0] == ring[-1] for polygon in feature["geometry"]["coordinates"] for ring in polygon)


def test_read_captions_returns_hostile_captions_of_every_format(tmp_path, noise_image, hostile_captions):
    with MultiFormatWriter(tmp_path, READABLE_FORMATS) as writers:
        writers.add("a.png", noise_image, hostile_captions)
    for format_name, path in writers.paths.items():
        (captioned_image,) = read_captions(path)
        texts = [caption.text for caption in captioned_image.captions]
        expected = [caption.text for caption in hostile_captions]
        if format_name == "parquet":  # UTF-8 has no half letters
            expected = [text.encode("utf-8", "replace").decode() for text in expected]
        if format_name == "labelme":  # an empty description is none
            expected = [text or "region" for text in expected]
        assert texts == expected, format_name


VALID_RECORD = {"image": "a.png", "width": 4, "height": 3, "region_id": 0, "caption": "x", "box": [0, 0, 1, 1]}
INVALID_FILES = {
    "not JSON": ("a.jsonl", "{", "a.jsonl, line 1 is not valid JSON"),
    "no image": (
        "a.jsonl",
        json.dumps({**VALID_RECORD, "image": 3}),
        "line 1, 'image' is 3; expected the file name of an image",
    ),
    "no size": ("a.jsonl", json.dumps({**VALID_RECORD, "width": None}), "line 1, 'width' is None; expected an integer"),
    "no caption": (
        "a.jsonl",
        json.dumps({**VALID_RECORD, "caption": None}),
        "line 1, 'caption' is None; expected a string",
    ),
    "a box beyond float": ("a.jsonl", json.dumps({**VALID_RECORD, "box": [0, 0, 1, 10**400]}), "line 1, 'box' is ["),
    "a box of three": ("a.jsonl", json.dumps({**VALID_RECORD, "box": [1, 2, 3]}), "line 1, 'box' is ["),
    "a broken mask": (
        "a.jsonl",
        json.dumps({**VALID_RECORD, "mask": {"size": [3, 4], "counts": "z"}}),
        "line 1, 'mask'",
    ),
    "another mask": (
        "a.jsonl",
        json.dumps({**VALID_RECORD, "mask": masks.encode_rle(np.ones((2, 2), bool))}),
        "its size is [2, 2], the image's [3, 4]",
    ),
    "interleaved images": (
        "a.jsonl",
        "\n".join(json.dumps({**VALID_RECORD, "image": name}) for name in "aba"),
        "line 3: 'a' has records in several places; sort the records by image",
    ),
    "another kind": ("a.json", "{}", "a.json is not a captions file"),
    "no parquet": ("a.parquet", "PAR1", "is not a valid Parquet file"),
    "a list of what": ("a.json", "[3]", "task 0 is 3; expected an object"),
    "lost annotations": (
        "a.json",
        json.dumps({"images": [], "annotations": [{"image_id": 7}]}),
        "annotations[0], 'image_id': no image has this id",
    ),
    "odd polygons": (
        "a.geojson",
        json.dumps(
            {
                "type": "FeatureCollection",
                "features": [
                    {
                        "properties": VALID_RECORD,
                        "geometry": {"type": "MultiPolygon", "coordinates": [[[[0, 0], [2, 1], [1, 2], [0, 0]]]]},
                    }
                ],
            }
        ),
        "features[0]: invalid mask: edges that do not follow pixels",
    ),
}


@pytest.mark.parametrize("case_name", INVALID_FILES)
def test_read_captions_rejects_invalid_files_in_one_line(tmp_path, monkeypatch, case_name):
    monkeypatch.chdir(tmp_path)
    file_name, content, message = INVALID_FILES[case_name]
    (tmp_path / file_name).write_text(content)
    with pytest.raises(InputError) as error_info:
        list(read_captions(file_name))
    assert message in str(error_info.value)
    assert "\n" not in str(error_info.value)


def test_read_captions_reports_a_missing_file_and_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*none"):
        list(read_captions(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match=r"no \.json files in"):
        list(read_captions(tmp_path))


def test_encode_brush_rle_follows_the_bit_format_of_label_studio(noise_image, captions):
    """Decode RLE bytes to the mask; reimplements the decoder of label-studio-sdk."""

    class Bits:
        def __init__(self, code):
            self.text, self.place = "".join(f"{byte:08b}" for byte in code), 0

        def read(self, num_values):
            self.place += num_values
            return int(self.text[self.place - num_values : self.place], 2)

    mask = masks.decode_rle(captions[0].mask)
    bit_reader = Bits(encode_brush_rle(mask))
    num_values, num_value_bits = bit_reader.read(32), bit_reader.read(5) + 1
    length_bit_counts = [bit_reader.read(4) + 1 for _ in range(4)]
    values = []
    while len(values) < num_values:
        is_run, length = bit_reader.read(1), bit_reader.read(length_bit_counts[bit_reader.read(2)]) + 1
        values += (
            [bit_reader.read(num_value_bits)] * length
            if is_run
            else [bit_reader.read(num_value_bits) for _ in range(length)]
        )
    assert (np.reshape(values, (*mask.shape, 4))[..., 3] == 255 * mask).all()


def test_read_captions_keeps_a_missing_score_as_nan(tmp_path):
    caption = Caption("written by a person", math.nan, (0.0, 0.0, 2.0, 2.0), None, None, Prompt(), 0)
    with MultiFormatWriter(tmp_path, READABLE_FORMATS) as writers:
        writers.add("a.png", Image.new("RGB", (4, 3)), [caption])
    for path in writers.paths.values():
        (captioned_image,) = read_captions(path)
        assert math.isnan(captioned_image.captions[0].score)


@pytest.mark.parametrize("format_name", OUTPUT_FORMATS)
def test_output_writers_write_numbers_beyond_float_and_int64(tmp_path, format_name):
    alternatives = [{"caption": "y", "score": 10**400}]
    record = {
        **VALID_RECORD,
        "score": 10**400,
        "predicted_iou": 10**400,
        "region_id": 10**400,
        "alternatives": alternatives,
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    (captioned_image,) = read_captions(tmp_path / "a.jsonl")
    with MultiFormatWriter(tmp_path / "out", [format_name]) as writers:
        writers.add("a.png", Image.new("RGB", (4, 3)), captioned_image.captions)
