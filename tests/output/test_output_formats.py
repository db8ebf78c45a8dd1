"""What one tool is given, it reads; and what is written can be read back."""

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

READ = {
    "jsonl": "captions.jsonl",
    "coco": "coco.json",
    "parquet": "captions.parquet",
    "geojson": "captions.geojson",
    "label-studio": "label-studio.json",
    "labelme": "labelme",
}
PROMPTS = ("jsonl", "parquet", "geojson")  # that have a place for what was asked


@pytest.fixture
def written(tmp_path, picture, captions, monkeypatch):
    """Two images in every format that can be read."""
    monkeypatch.chdir(tmp_path)
    with MultiFormatWriter("out", READ, model="m") as writers:
        writers.add("a.png", picture, captions)
        writers.add("b/é.png", picture.resize((31, 17)), [])
        writers.add("c.png", picture, captions[::-1])
    return writers.paths


@pytest.mark.parametrize("name", READ)
def test_captions_are_read_back(written, captions, name):
    found = {each.image: each for each in read_captions(written[name])}
    assert set(found) == {"a.png", "c.png"} | ({"b/é.png"} if name in ("coco", "label-studio", "labelme") else set())
    assert found["a.png"].size == (40, 30)
    for told, expected in zip(found["a.png"].captions, captions, strict=True):
        assert told.text == expected.text
        assert told.mask == expected.mask
        assert told.score == pytest.approx(expected.score)
        if expected.mask or expected.box:
            assert told.box == pytest.approx(expected.box)
        if name in PROMPTS:
            assert (told.prompt.box, told.prompt.points) == (expected.prompt.box, expected.prompt.points)
            expected_iou = expected.predicted_iou
            assert told.predicted_iou == (None if expected_iou is None else pytest.approx(expected_iou))
    if name != "labelme":
        assert found["a.png"].model == "m"


def components(mask):
    """How many there are of pixels that touch by an edge."""
    left, count = {(y, x) for y, x in np.argwhere(mask).tolist()}, 0
    while left:
        count, reached = count + 1, [left.pop()]
        for y, x in reached:
            near = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & left
            left -= near
            reached += near
    return count


def turn(ring):
    x, y = np.transpose(ring)
    return (x * np.roll(y, -1) - np.roll(x, -1) * y).sum()


@pytest.mark.parametrize("seed", range(6))
def test_masks_of_any_shape_go_through_polygons_and_brushes(seed):
    noise = np.random.default_rng(seed).random((23 + seed, 31))
    mask = noise > (0.5, 0.2, 0.8, 0.05, 0.95, 0.99)[seed]
    found = mask_to_polygons(mask)
    assert (rings_to_mask([ring for polygon in found for ring in polygon], 31, 23 + seed) == mask).all()
    assert (decode_brush_rle(encode_brush_rle(mask), 31, 23 + seed) == mask).all()
    assert len(found) == components(mask)
    for outer, *holes in found:
        assert turn(outer) > 0 > max(map(turn, holes), default=-1)
    for ring in (ring for polygon in found for ring in polygon):
        assert len({tuple(corner) for corner in ring}) == len(ring), "a ring touches itself"


def test_holes_are_in_the_polygon_around_them():
    mask = np.zeros((20, 20), bool)
    mask[2:18, 2:18] = True
    mask[4:16, 4:16] = False
    mask[6:14, 6:14] = True
    mask[8:10, 8:10] = False
    assert sorted(map(len, mask_to_polygons(mask))) == [2, 2]
    assert mask_to_polygons(np.zeros((3, 3), bool)) == []


def test_a_hole_that_reaches_the_edge_by_a_corner_stays_a_hole():
    mask = np.ones((4, 4), bool)
    mask[1, 1] = mask[0, 0] = False
    (((*outer,), hole),) = mask_to_polygons(mask)
    assert [1, 1] in outer
    assert sorted(hole) == [[1, 1], [1, 2], [2, 1], [2, 2]]


def test_labelme_reads_its_files(written, captions):
    """As LabelMe's own file format has it: corners, a mask's crop, and the picture's place."""
    content = json.loads((written["labelme"] / "a.json").read_text())
    assert os.path.normpath(written["labelme"] / content["imagePath"]) == "a.png"
    assert {"version", "flags", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth"} <= content.keys()
    disc = content["shapes"][0]
    (x1, y1), (x2, y2) = disc["points"]
    assert (x1, y1, x2 + 1, y2 + 1) == captions[0].box
    assert [shape["shape_type"] for shape in content["shapes"]] == ["mask", "rectangle", "point", "mask"]


def test_datasets_and_pandas_read_parquet(written):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_parquet(str(written["parquet"]))
    assert table.num_rows == 8
    assert table[0]["caption"] == "a disc"
    assert json.loads(table[0]["prompt"])["points"]


def test_geojson_rings_are_closed(written):
    content = json.loads(written["geojson"].read_text())
    for feature in content["features"]:
        if feature["geometry"]["type"] == "MultiPolygon":
            assert all(ring[0] == ring[-1] for polygon in feature["geometry"]["coordinates"] for ring in polygon)


def test_hostile_words_come_back(tmp_path, picture, hostile):
    with MultiFormatWriter(tmp_path, READ) as writers:
        writers.add("a.png", picture, hostile)
    for name, path in writers.paths.items():
        (found,) = read_captions(path)
        words = [each.text for each in found.captions]
        expected = [each.text for each in hostile]
        if name == "parquet":  # UTF-8 has no half letters
            expected = [text.encode("utf-8", "replace").decode() for text in expected]
        if name == "labelme":  # an empty description is none
            expected = [text or "region" for text in expected]
        assert words == expected, name


LINE = {"image": "a.png", "width": 4, "height": 3, "region_id": 0, "caption": "x", "box": [0, 0, 1, 1]}
BROKEN = {
    "not JSON": ("a.jsonl", "{", "a.jsonl, line 1 is not valid JSON"),
    "no image": ("a.jsonl", json.dumps({**LINE, "image": 3}), "line 1, 'image' is 3; give the file name of an image"),
    "no size": ("a.jsonl", json.dumps({**LINE, "width": None}), "line 1, 'width' is None; give an integer"),
    "no caption": ("a.jsonl", json.dumps({**LINE, "caption": None}), "line 1, 'caption' is None; give text"),
    "a box beyond float": ("a.jsonl", json.dumps({**LINE, "box": [0, 0, 1, 10**400]}), "line 1, 'box' is ["),
    "a box of three": ("a.jsonl", json.dumps({**LINE, "box": [1, 2, 3]}), "line 1, 'box' is ["),
    "a broken mask": ("a.jsonl", json.dumps({**LINE, "mask": {"size": [3, 4], "counts": "z"}}), "line 1, 'mask'"),
    "another mask": (
        "a.jsonl",
        json.dumps({**LINE, "mask": masks.encode_rle(np.ones((2, 2), bool))}),
        "its size is [2, 2], the image's [3, 4]",
    ),
    "images mixed": (
        "a.jsonl",
        "\n".join(json.dumps({**LINE, "image": name}) for name in "aba"),
        "line 3: 'a' had records before",
    ),
    "another kind": ("a.json", "{}", "a.json is not a captions file"),
    "no parquet": ("a.parquet", "PAR1", "is not a valid Parquet file"),
    "a list of what": ("a.json", "[3]", "task 0 is 3; give an object"),
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
                        "properties": LINE,
                        "geometry": {"type": "MultiPolygon", "coordinates": [[[[0, 0], [2, 1], [1, 2], [0, 0]]]]},
                    }
                ],
            }
        ),
        "features[0]: invalid mask: edges that do not follow pixels",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    file, content, message = BROKEN[name]
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError) as raised:
        list(read_captions(file))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_and_an_empty_folder_are_said(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*none"):
        list(read_captions(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match=r"no \.json files in"):
        list(read_captions(tmp_path))


def test_label_studio_has_its_own_code_for_masks(picture, captions):
    """The bytes that the decoder of label-studio-sdk gives back as the mask; here it is written out again."""

    class Bits:
        def __init__(self, code):
            self.text, self.place = "".join(f"{byte:08b}" for byte in code), 0

        def read(self, count):
            self.place += count
            return int(self.text[self.place - count : self.place], 2)

    mask = masks.decode_rle(captions[0].mask)
    bits = Bits(encode_brush_rle(mask))
    count, word = bits.read(32), bits.read(5) + 1
    sizes = [bits.read(4) + 1 for _ in range(4)]
    values = []
    while len(values) < count:
        repeats, length = bits.read(1), bits.read(sizes[bits.read(2)]) + 1
        values += [bits.read(word)] * length if repeats else [bits.read(word) for _ in range(length)]
    assert (np.reshape(values, (*mask.shape, 4))[..., 3] == 255 * mask).all()


def test_a_score_that_is_none_stays_none(tmp_path):
    caption = Caption("said by a person", math.nan, (0.0, 0.0, 2.0, 2.0), None, None, Prompt(), 0)
    with MultiFormatWriter(tmp_path, READ) as writers:
        writers.add("a.png", Image.new("RGB", (4, 3)), [caption])
    for path in writers.paths.values():
        (found,) = read_captions(path)
        assert math.isnan(found.captions[0].score)


@pytest.mark.parametrize("name", OUTPUT_FORMATS)
def test_numbers_beyond_float_and_int64_are_read_and_written(tmp_path, name):
    alternatives = [{"caption": "y", "score": 10**400}]
    huge = {**LINE, "score": 10**400, "predicted_iou": 10**400, "region_id": 10**400, "alternatives": alternatives}
    (tmp_path / "a.jsonl").write_text(json.dumps(huge))
    (each,) = read_captions(tmp_path / "a.jsonl")
    with MultiFormatWriter(tmp_path / "out", [name]) as writers:
        writers.add("a.png", Image.new("RGB", (4, 3)), each.captions)
