"""COCO instances: what is written comes out, damage is named, and nothing is said that is not so."""

import json
import math

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from sca_registry import datasets

from sca.data.coco import Coco
from sca.io import masks
from sca.io.annotations.annotation import SkipCounter
from sca.io.errors import InputError
from sca.io.prompt_files import read_region_prompts
from sca.output.reader import read_captions

WIDTH, HEIGHT = 40, 30


def annotation(identity, **changes):
    return {"id": identity, "image_id": 1, "category_id": 7, "bbox": [2, 3, 10, 8]} | changes


def content(*annotations, **changes):
    return {
        "images": [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "old owl"}],
        "annotations": list(annotations) or [annotation(1)],
    } | changes


@pytest.fixture
def written(tmp_path):
    """Writes a dataset of one gray picture and gives its folder."""

    def write(content, text=None):
        (tmp_path / "val").mkdir(exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), "gray").save(tmp_path / "val" / "a.png")
        (tmp_path / "val.json").write_text(json.dumps(content) if text is None else text)
        return tmp_path

    return write


def test_a_region_is_read_as_it_was_written(written):
    one = annotation(5, bbox=[2.5, 3, 10, 8], caption=["a tabby", " "], attributes={"age": 3, "at": [1, 2]})
    (sample,) = Coco("val", root=written(content(one, annotation(6, category_id=9, caption="who"))))
    assert sample.image.size == (WIDTH, HEIGHT)
    assert sample.image_id == 1
    first, second = sample.regions
    assert (first.id, first.box, first.name) == (5, (2.5, 3, 12.5, 11), "cat")
    assert (first.phrases, first.attributes, first.mask) == (("a tabby",), {"age": 3, "at": (1, 2)}, None)
    assert (second.name, second.phrases) == ("old owl", ("who",))


def test_polygons_and_both_kinds_of_rle_give_the_same_mask(written):
    truth = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    truth[3:11, 2:12] = 1
    packed = rle.encode(truth)
    runs = np.flatnonzero(np.diff(truth.ravel(order="F"), prepend=0, append=2))
    forms = [
        [[2, 3, 12, 3, 12, 11, 2, 11]],
        [[2, 3, 7, 3, 7, 11, 2, 11], [7, 3, 12, 3, 12, 11, 7, 11], [1, 1, 2, 2]],  # the last has two points
        {"size": [HEIGHT, WIDTH], "counts": np.diff(runs, prepend=0).tolist()},
        {"size": [HEIGHT, WIDTH], "counts": packed["counts"].decode()},
    ]
    dataset = Coco("val", root=written(content(*(annotation(n, segmentation=form) for n, form in enumerate(forms)))))
    masks = [region.mask for region in dataset[0].regions]
    assert all(mask == {"size": [HEIGHT, WIDTH], "counts": packed["counts"].decode()} for mask in masks)
    assert dataset.skipped == {"polygon with fewer than three points": 1}


def test_a_missing_bbox_is_that_of_the_segmentation(written):
    square = [[2, 3, 12, 3, 12, 11, 2, 11]]
    for bbox in (None, []):
        (region,) = Coco("val", root=written(content(annotation(1, bbox=bbox, segmentation=square))))[0].regions
        assert region.box == (2, 3, 12, 11)


def test_keypoints_are_counted(written):
    dataset = Coco("val", root=written(content(annotation(1, keypoints=[3, 4, 2]), annotation(2, keypoints=[0, 0, 0]))))
    assert dataset.skipped == {"keypoints": 1}


def test_the_official_layout_and_plain_paths_are_found(written):
    root = written(content())
    official = root / "official" / "annotations" / "instances_val2017.json"
    official.parent.mkdir(parents=True)
    official.write_text((root / "val.json").read_text())
    (root / "official" / "val2017").symlink_to(root / "val")
    plain = Coco("any", annotations=root / "val.json", images=root / "val")
    assert plain[0][1:] == Coco("val", root=root / "official")[0][1:] == Coco("val", root=root)[0][1:]


def test_what_is_left_out_is_counted(written):
    kept = annotation(1, bbox=[-5, 20, 20, 20])
    crowd = annotation(2, iscrowd=1, segmentation={"size": [1], "counts": [1]})
    outside, flat = annotation(3, bbox=[50, 3, 5, 5]), annotation(4, bbox=[5, 5, 0, 4])
    images = [*content()["images"], {"id": 2, "file_name": "b.png", "width": 1, "height": 1}]
    images.append({"id": 3, "file_name": "a.png", "width": WIDTH, "height": HEIGHT})
    dataset = Coco("val", root=written(content(kept, crowd, outside, flat, images=images)))
    (sample,) = dataset
    (region,) = sample.regions
    assert region.box == (0, 20, 15, HEIGHT)
    assert dataset.skipped == {
        "box clipped": 1,
        "crowd": 1,
        "empty box": 2,
        "image missing": 1,
        "image without regions": 1,
    }
    assert "annotations[1] (id 2)" in dataset.examples["crowd"][0]
    assert dataset.examples["image missing"] == ["b.png"]


def several(folder, damage):
    """Four images, some damaged; a function for each."""
    images = [{"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT} for n in range(4)]
    annotations = [annotation(n, image_id=n) for n in range(4)]
    for n in range(4):
        Image.effect_noise((WIDTH, HEIGHT), 50).save(folder / "val" / f"{n}.png")
        damage.get(n, lambda path: None)(folder / "val" / f"{n}.png")
    (folder / "val.json").write_text(json.dumps(content(*annotations, images=images)))
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:300])


def shrink(path):
    Image.new("RGB", (20, 20)).save(path)


def test_bad_pictures_are_passed_over_when_found(written):
    dataset = Coco("val", root=several(written(content()), {0: cut, 2: shrink}))
    assert len(dataset) == 4
    assert [sample.image_id for sample in dataset] == [1, 3]
    assert [dataset[index].image_id for index in range(4)] == [1, 1, 3, 3]
    assert dataset.skipped == {"image unreadable": 1, "image of another size": 1}
    assert "records 40 x 30 and the image is 20 x 20" in dataset.examples["image of another size"][0]
    with pytest.raises(IndexError):
        dataset[4]


@pytest.mark.parametrize("factor", [0.5, 2, 7.5])
def test_regions_of_a_resized_image_are_scaled_to_it(written, factor):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[4:16, 8:20] = True
    root = written(content(annotation(1, bbox=[8, 4, 12, 12], segmentation=masks.encode_rle(mask))))
    size = round(WIDTH * factor), round(HEIGHT * factor)
    Image.new("RGB", size).save(root / "val" / "a.png")
    (sample,) = dataset = Coco("val", root=root)
    (region,) = sample.regions
    assert sample.image.size == size
    assert region.box == pytest.approx([value * factor for value in (8, 4, 20, 16)])
    assert masks.mask_to_box(region.mask) == pytest.approx(region.box, abs=0.5)
    assert not dataset.skipped


def test_image_turned_after_annotation_is_left_out(written):
    root = written(content(annotation(1)))
    Image.new("RGB", (HEIGHT, WIDTH)).save(root / "val" / "a.png")
    dataset = Coco("val", root=root)
    assert not list(dataset)
    assert "the image is 30 x 40 (width x height): it was rotated" in dataset.examples["image of another size"][0]


@pytest.mark.parametrize("bbox", [[0.1, 0.2, 0.5, 0.5], [30, 20, 60, 60], [35, 25, 500, 600]])
def test_normalized_box_is_left_out_and_counted(written, bbox):
    dataset = Coco("val", root=written(content(annotation(1), annotation(2, bbox=bbox))))
    (sample,) = dataset
    assert [region.id for region in sample.regions] == [1]
    assert dataset.skipped == {"normalized box": 1}
    assert "annotations[1] (id 2)" in dataset.examples["normalized box"][0]


def test_too_many_bad_pictures_stop_with_an_account(written):
    root = several(written(content()), {0: lambda path: path.unlink(), 2: cut})
    dataset = Coco("val", root=root, max_bad=1)
    with pytest.raises(ValueError, match=r"2 images .* more than max_bad=1; image missing: 1, such as 0.png; .*2.png"):
        list(dataset)
    with pytest.raises(ValueError, match="1 images"):
        Coco("val", root=root, max_bad=0)


def test_a_dataset_with_no_readable_picture_says_so(written):
    dataset = Coco("val", root=several(written(content()), dict.fromkeys(range(4), cut)))
    with pytest.raises(ValueError, match=r"no picture in .* can be read; image unreadable: 4"):
        dataset[0]


def test_a_picture_is_seen_as_its_viewer_sees_it(written):
    root = written(content())
    stored = Image.new("RGB", (HEIGHT, WIDTH), "gray")
    exif = stored.getexif()
    exif[0x0112] = 6  # turned by a quarter
    stored.save(root / "val" / "a.png", exif=exif)
    assert Coco("val", root=root)[0].image.size == (WIDTH, HEIGHT)


PLACE = r"val\.json: annotations\[0\] \(id 1\): "
PLACE_OF = r"val\.json: annotations\[0\] \(id 1\), "


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"images": None}, r"val\.json: no list 'images'"),
        ({"images": [{"id": 1, "file_name": "a.png", "width": 4}]}, r"images\[0\] \(id 1\): no 'height'; it has: id, "),
        (
            {"images": [{"id": 1, "file_name": "a.png", "width": 0, "height": 2}]},
            "'width' and 'height' are .0, 2.; give the size",
        ),
        ({"images": content()["images"] * 2}, r"images\[1\] \(id 1\): this id was given before"),
        ({"categories": [{"id": 7}]}, r"categories\[0\] \(id 7\): no 'name'"),
        ({"categories": []}, PLACE + "category_id 7 has no name among the categories"),
        ({"annotations": [3]}, r"annotations\[0\] is 3; give an object"),
        ({"annotations": [{}]}, r"annotations\[0\]: no 'id'; it has: nothing"),
        ({"annotations": [annotation("x")]}, "'id' is 'x'; give an integer"),
        ({"annotations": [annotation(1), annotation(1)]}, r"annotations\[1\] \(id 1\): this id was given before"),
        ({"annotations": [annotation(1, image_id=4)]}, PLACE + "image_id 4 is not among the images"),
        ({"annotations": [{"id": 1, "image_id": 1, "category_id": 7}]}, PLACE + "no 'bbox'"),
        ({"annotations": [annotation(1, bbox=[1, 2, 3])]}, PLACE_OF + "'bbox' is .*; give 4 numbers"),
        ({"annotations": [annotation(1, bbox=[1, 2, 3, math.nan])]}, PLACE_OF + "'bbox' is .*; give 4 numbers"),
        (
            {"annotations": [annotation(1, bbox=[1, 2, -3, 4])]},
            PLACE_OF + "'bbox' has width -3 and height",
        ),
        ({"annotations": [annotation(1, caption=[4])]}, PLACE_OF + "'caption' is .*; give text"),
        ({"annotations": [annotation(1, attributes=[4])]}, PLACE[:-2] + r", 'attributes' is .*; give an object"),
        (
            {"annotations": [annotation(1, segmentation=[[1, 2, 3]])]},
            PLACE_OF + "'segmentation': must be lists",
        ),
        (
            {"annotations": [annotation(1, segmentation={"size": [3, 3]})]},
            PLACE_OF + "'segmentation': must be poly",
        ),
        (
            {"annotations": [annotation(1, segmentation={"size": [3, 3], "counts": "1"})]},
            r"size \[3, 3\] in an image of \[30, 40\]",
        ),
        (
            {"annotations": [annotation(1, segmentation={"size": [HEIGHT, WIDTH], "counts": [4, 5]})]},
            PLACE_OF + "'segmentation': counts do not add up to the 1200 pixels",
        ),
    ],
)
def test_a_broken_record_is_named_with_its_file_and_field(written, broken, message):
    with pytest.raises(ValueError, match=message):
        Coco("val", root=written(content(**broken)), max_bad=0)


def test_a_file_that_is_cut_off_or_is_no_coco_is_named(written):
    text = json.dumps(content())
    with pytest.raises(ValueError, match=r"val\.json is not valid JSON: .* of 100 bytes; was it cut off"):
        Coco("val", root=written(None, text[:100]))
    with pytest.raises(ValueError, match=r"val\.json: COCO's format is an object"):
        Coco("val", root=written(None, "[]"))
    root = written(content())
    (root / "val.json").write_bytes(b'{"\xff": 1}')
    with pytest.raises(ValueError, match=r"val\.json is not JSON: .*utf-8"):
        Coco("val", root=root)


def test_missing_files_and_unclear_options_say_what_to_give(tmp_path):
    with pytest.raises(ValueError, match=r"split 'val': looked for .*val\.json with .* or .*instances_val2017\.json"):
        Coco("val", root=tmp_path)
    with pytest.raises(ValueError, match="give root=FOLDER, or both"):
        Coco("val", annotations=tmp_path / "val.json")


def test_any_file_in_the_format_is_read_by_name(written):
    root = written(content(annotation(5, caption="a tabby")))
    options = {"annotations": f"{root}/{{split}}.json", "images": f"{root}/{{split}}"}
    (sample,) = datasets.build("coco-json", "val", **options)
    assert sample[1:] == Coco("val", root=root)[0][1:]
    with pytest.raises(ValueError, match=r"no data for split 'test': looked for .*test\.json with"):
        datasets.build("coco-json", "test", **options)


def test_a_mask_of_which_nothing_is_left_is_none(written):
    dataset = Coco("val", root=written(content(annotation(1, segmentation=[[-9, -9, -5, -9, -5, -5]]))))
    assert dataset[0].regions[0].mask is None
    assert dataset.skipped == {"polygon covering no pixel": 1}


SQUARE = [[2, 3, 12, 3, 12, 11, 2, 11]]


@pytest.mark.parametrize(
    ("record", "box"),
    [
        ({"bbox": [0, 0, 0, 0], "segmentation": SQUARE}, (2, 3, 12, 11)),
        ({"bbox": [5, 5, 0, 4], "segmentation": SQUARE}, (2, 3, 12, 11)),
        ({"segmentation": SQUARE}, (2, 3, 12, 11)),
        ({"bbox": [1, 1, 3, 3], "segmentation": SQUARE}, (1, 1, 4, 4)),
        ({"bbox": [1, 1, 3, 3], "segmentation": SQUARE, "isbox": 1}, (1, 1, 4, 4)),
        ({"bbox": [0, 0, 0, 0]}, None),
    ],
)
def test_coco_readers_agree_on_a_region(written, record, box):
    root = written(content({**annotation(1), "bbox": None, **record}))
    dataset = Coco("val", root=root)
    found = [[region.box for sample in dataset for region in sample.regions]]
    found.append([prompt.box for prompt in _read_prompts(root / "val.json")])
    (captioned,) = read_captions(root / "val.json", SkipCounter())
    found.append([caption.box for caption in captioned.captions if caption.box])
    assert found == [[box] if box else []] * 3


def _read_prompts(path):
    try:
        return [prompt for prompts in read_region_prompts(path).values() for prompt in prompts]
    except InputError:
        return []


def test_coco_without_categories_keeps_regions_with_captions(written):
    whole = content(annotation(1, caption="a cat"), {"id": 2, "image_id": 1, "bbox": [1, 1, 5, 5], "caption": "a dog"})
    whole.pop("categories")
    dataset = Coco("val", root=written(whole))
    assert [(region.name, region.phrases) for region in dataset[0].regions] == [(None, ("a cat",)), (None, ("a dog",))]
    assert dataset.skipped == {"file without categories": 1}
