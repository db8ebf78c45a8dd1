"""COCO instances: annotations read back unchanged and damage is reported."""

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


def make_annotation(annotation_id, **changes):
    return {"id": annotation_id, "image_id": 1, "category_id": 7, "bbox": [2, 3, 10, 8]} | changes


def make_coco_content(*annotations, **changes):
    return {
        "images": [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "old owl"}],
        "annotations": list(annotations) or [make_annotation(1)],
    } | changes


@pytest.fixture
def write_dataset(tmp_path):
    """Return a function that writes a dataset of one gray image and returns its folder."""

    def write(content, text=None):
        (tmp_path / "val").mkdir(exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), "gray").save(tmp_path / "val" / "a.png")
        (tmp_path / "val.json").write_text(json.dumps(content) if text is None else text)
        return tmp_path

    return write


def test_coco_reads_all_region_fields(write_dataset):
    first_annotation = make_annotation(
        5, bbox=[2.5, 3, 10, 8], caption=["a tabby", " "], attributes={"age": 3, "at": [1, 2]}
    )
    (sample,) = Coco(
        "val", root=write_dataset(make_coco_content(first_annotation, make_annotation(6, category_id=9, caption="who")))
    )
    assert sample.image.size == (WIDTH, HEIGHT)
    assert sample.image_id == 1
    first, second = sample.regions
    assert (first.id, first.box, first.name) == (5, (2.5, 3, 12.5, 11), "cat")
    assert (first.phrases, first.attributes, first.mask) == (("a tabby",), {"age": 3, "at": (1, 2)}, None)
    assert (second.name, second.phrases) == ("old owl", ("who",))


def test_coco_polygons_and_both_kinds_of_rle_give_the_same_mask(write_dataset):
    true_mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    true_mask[3:11, 2:12] = 1
    compressed_rle = rle.encode(true_mask)
    run_ends = np.flatnonzero(np.diff(true_mask.ravel(order="F"), prepend=0, append=2))
    segmentations = [
        [[2, 3, 12, 3, 12, 11, 2, 11]],
        [[2, 3, 7, 3, 7, 11, 2, 11], [7, 3, 12, 3, 12, 11, 7, 11], [1, 1, 2, 2]],  # the last has two points
        {"size": [HEIGHT, WIDTH], "counts": np.diff(run_ends, prepend=0).tolist()},
        {"size": [HEIGHT, WIDTH], "counts": compressed_rle["counts"].decode()},
    ]
    dataset = Coco(
        "val",
        root=write_dataset(
            make_coco_content(
                *(make_annotation(n, segmentation=segmentation) for n, segmentation in enumerate(segmentations))
            )
        ),
    )
    region_masks = [region.mask for region in dataset[0].regions]
    assert all(mask == {"size": [HEIGHT, WIDTH], "counts": compressed_rle["counts"].decode()} for mask in region_masks)
    assert dataset.skipped == {"polygon with fewer than three points": 1}


def test_coco_computes_missing_bbox_from_segmentation(write_dataset):
    polygon = [[2, 3, 12, 3, 12, 11, 2, 11]]
    for bbox in (None, []):
        (region,) = Coco(
            "val", root=write_dataset(make_coco_content(make_annotation(1, bbox=bbox, segmentation=polygon)))
        )[0].regions
        assert region.box == (2, 3, 12, 11)


def test_coco_counts_keypoints(write_dataset):
    dataset = Coco(
        "val",
        root=write_dataset(
            make_coco_content(make_annotation(1, keypoints=[3, 4, 2]), make_annotation(2, keypoints=[0, 0, 0]))
        ),
    )
    assert dataset.skipped == {"keypoints": 1}


def test_coco_finds_official_layout_and_explicit_paths(write_dataset):
    root = write_dataset(make_coco_content())
    official_file = root / "official" / "annotations" / "instances_val2017.json"
    official_file.parent.mkdir(parents=True)
    official_file.write_text((root / "val.json").read_text())
    (root / "official" / "val2017").symlink_to(root / "val")
    dataset_by_paths = Coco("any", annotations=root / "val.json", image_root=root / "val")
    assert dataset_by_paths[0][1:] == Coco("val", root=root / "official")[0][1:] == Coco("val", root=root)[0][1:]


def test_coco_counts_skipped_records(write_dataset):
    clipped = make_annotation(1, bbox=[-5, 20, 20, 20])
    crowd = make_annotation(2, iscrowd=1, segmentation={"size": [1], "counts": [1]})
    outside, zero_width = make_annotation(3, bbox=[50, 3, 5, 5]), make_annotation(4, bbox=[5, 5, 0, 4])
    images = [*make_coco_content()["images"], {"id": 2, "file_name": "b.png", "width": 1, "height": 1}]
    images.append({"id": 3, "file_name": "a.png", "width": WIDTH, "height": HEIGHT})
    dataset = Coco("val", root=write_dataset(make_coco_content(clipped, crowd, outside, zero_width, images=images)))
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


def write_four_images(folder, damage_by_index):
    """Write four images and apply the damage functions by index."""
    images = [{"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT} for n in range(4)]
    annotations = [make_annotation(n, image_id=n) for n in range(4)]
    for n in range(4):
        Image.effect_noise((WIDTH, HEIGHT), 50).save(folder / "val" / f"{n}.png")
        damage_by_index.get(n, lambda path: None)(folder / "val" / f"{n}.png")
    (folder / "val.json").write_text(json.dumps(make_coco_content(*annotations, images=images)))
    return folder


def truncate_file(path):
    path.write_bytes(path.read_bytes()[:300])


def replace_with_smaller_image(path):
    Image.new("RGB", (20, 20)).save(path)


def test_coco_skips_bad_images_when_read(write_dataset):
    dataset = Coco(
        "val",
        root=write_four_images(write_dataset(make_coco_content()), {0: truncate_file, 2: replace_with_smaller_image}),
    )
    assert len(dataset) == 4
    assert [sample.image_id for sample in dataset] == [1, 3]
    assert [dataset[index].image_id for index in range(4)] == [1, 1, 3, 3]
    assert dataset.skipped == {"image unreadable": 1, "image of a different size": 1}
    assert (
        "records 40 x 30 (width x height), but the image is 20 x 20" in dataset.examples["image of a different size"][0]
    )
    with pytest.raises(IndexError):
        dataset[4]


@pytest.mark.parametrize("factor", [0.5, 2, 7.5])
def test_coco_scales_regions_to_resized_image(write_dataset, factor):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[4:16, 8:20] = True
    root = write_dataset(
        make_coco_content(make_annotation(1, bbox=[8, 4, 12, 12], segmentation=masks.encode_rle(mask)))
    )
    size = round(WIDTH * factor), round(HEIGHT * factor)
    Image.new("RGB", size).save(root / "val" / "a.png")
    (sample,) = dataset = Coco("val", root=root)
    (region,) = sample.regions
    assert sample.image.size == size
    assert region.box == pytest.approx([value * factor for value in (8, 4, 20, 16)])
    assert masks.mask_to_box(region.mask) == pytest.approx(region.box, abs=0.5)
    assert not dataset.skipped


def test_coco_skips_image_rotated_after_annotation(write_dataset):
    root = write_dataset(make_coco_content(make_annotation(1)))
    Image.new("RGB", (HEIGHT, WIDTH)).save(root / "val" / "a.png")
    dataset = Coco("val", root=root)
    assert not list(dataset)
    assert "the image is 30 x 40: the image was rotated" in dataset.examples["image of a different size"][0]


@pytest.mark.parametrize("bbox", [[0.1, 0.2, 0.5, 0.5], [30, 20, 60, 60], [35, 25, 500, 600]])
def test_coco_skips_and_counts_normalized_boxes(write_dataset, bbox):
    dataset = Coco("val", root=write_dataset(make_coco_content(make_annotation(1), make_annotation(2, bbox=bbox))))
    (sample,) = dataset
    assert [region.id for region in sample.regions] == [1]
    assert dataset.skipped == {"normalized box": 1}
    assert "annotations[1] (id 2)" in dataset.examples["normalized box"][0]


def test_coco_raises_if_bad_images_exceed_max_bad(write_dataset):
    root = write_four_images(write_dataset(make_coco_content()), {0: lambda path: path.unlink(), 2: truncate_file})
    dataset = Coco("val", root=root, max_bad_records=1)
    with pytest.raises(
        ValueError, match=r"2 images .* more than max_bad_records=1; image missing: 1, such as 0.png; .*2.png"
    ):
        list(dataset)
    with pytest.raises(ValueError, match="1 images"):
        Coco("val", root=root, max_bad_records=0)


def test_coco_reports_dataset_without_readable_images(write_dataset):
    dataset = Coco(
        "val", root=write_four_images(write_dataset(make_coco_content()), dict.fromkeys(range(4), truncate_file))
    )
    with pytest.raises(ValueError, match=r"no image in .* can be read; image unreadable: 4"):
        dataset[0]


def test_coco_applies_exif_orientation(write_dataset):
    root = write_dataset(make_coco_content())
    stored_image = Image.new("RGB", (HEIGHT, WIDTH), "gray")
    exif = stored_image.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    stored_image.save(root / "val" / "a.png", exif=exif)
    assert Coco("val", root=root)[0].image.size == (WIDTH, HEIGHT)


RECORD_PATTERN = r"val\.json: annotations\[0\] \(id 1\): "
FIELD_PATTERN = r"val\.json: annotations\[0\] \(id 1\), "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, r"val\.json: no list 'images'"),
        ({"images": [{"id": 1, "file_name": "a.png", "width": 4}]}, r"images\[0\] \(id 1\): no 'height'; it has: id, "),
        (
            {"images": [{"id": 1, "file_name": "a.png", "width": 0, "height": 2}]},
            "'width' and 'height' are .0, 2.; expected the size",
        ),
        ({"images": make_coco_content()["images"] * 2}, r"images\[1\] \(id 1\): duplicate id"),
        ({"categories": [{"id": 7}]}, r"categories\[0\] \(id 7\): no 'name'"),
        ({"categories": []}, RECORD_PATTERN + "category_id 7 has no name among the categories"),
        ({"annotations": [3]}, r"annotations\[0\] is 3; expected an object"),
        ({"annotations": [{}]}, r"annotations\[0\]: no 'id'; it has: nothing"),
        ({"annotations": [make_annotation("x")]}, "'id' is 'x'; expected an integer"),
        ({"annotations": [make_annotation(1), make_annotation(1)]}, r"annotations\[1\] \(id 1\): duplicate id"),
        ({"annotations": [make_annotation(1, image_id=4)]}, RECORD_PATTERN + "image_id 4 is not among the images"),
        ({"annotations": [{"id": 1, "image_id": 1, "category_id": 7}]}, RECORD_PATTERN + "no 'bbox' or 'segmentation'"),
        ({"annotations": [make_annotation(1, bbox=[1, 2, 3])]}, FIELD_PATTERN + "'bbox' is .*; expected 4 numbers"),
        (
            {"annotations": [make_annotation(1, bbox=[1, 2, 3, math.nan])]},
            FIELD_PATTERN + "'bbox' is .*; expected 4 numbers",
        ),
        (
            {"annotations": [make_annotation(1, bbox=[1, 2, -3, 4])]},
            FIELD_PATTERN + "'bbox' has width -3 and height",
        ),
        ({"annotations": [make_annotation(1, caption=[4])]}, FIELD_PATTERN + "'caption' is .*; expected a string"),
        (
            {"annotations": [make_annotation(1, attributes=[4])]},
            RECORD_PATTERN[:-2] + r", 'attributes' is .*; expected an object",
        ),
        (
            {"annotations": [make_annotation(1, segmentation=[[1, 2, 3]])]},
            FIELD_PATTERN + "'segmentation' must contain lists",
        ),
        (
            {"annotations": [make_annotation(1, segmentation={"size": [3, 3]})]},
            FIELD_PATTERN + "'segmentation' must be poly",
        ),
        (
            {"annotations": [make_annotation(1, segmentation={"size": [3, 3], "counts": "1"})]},
            r"size \[3, 3\], but the image is \[30, 40\]",
        ),
        (
            {"annotations": [make_annotation(1, segmentation={"size": [HEIGHT, WIDTH], "counts": [4, 5]})]},
            FIELD_PATTERN + "'segmentation' is not a valid RLE of 40 x 30 pixels",
        ),
    ],
)
def test_coco_reports_broken_record_with_file_and_field(write_dataset, changes, message):
    with pytest.raises(ValueError, match=message):
        Coco("val", root=write_dataset(make_coco_content(**changes)), max_bad_records=0)


def test_coco_reports_truncated_and_invalid_files(write_dataset):
    text = json.dumps(make_coco_content())
    with pytest.raises(ValueError, match=r"val\.json is not valid JSON: .* of 100 bytes; copy or download it again"):
        Coco("val", root=write_dataset(None, text[:100]))
    with pytest.raises(ValueError, match=r"val\.json: COCO's format is an object"):
        Coco("val", root=write_dataset(None, "[]"))
    root = write_dataset(make_coco_content())
    (root / "val.json").write_bytes(b'{"\xff": 1}')
    with pytest.raises(ValueError, match=r"val\.json is not JSON: .*utf-8"):
        Coco("val", root=root)


def test_coco_reports_missing_files_and_incomplete_options(tmp_path):
    with pytest.raises(ValueError, match=r"split 'val': looked for .*val\.json with .* or .*instances_val2017\.json"):
        Coco("val", root=tmp_path)
    with pytest.raises(ValueError, match="set root=FOLDER, or both"):
        Coco("val", annotations=tmp_path / "val.json")


def test_coco_json_reads_files_by_split_pattern(write_dataset):
    root = write_dataset(make_coco_content(make_annotation(5, caption="a tabby")))
    options = {"annotations": f"{root}/{{split}}.json", "image_root": f"{root}/{{split}}"}
    (sample,) = datasets.build("coco-json", "val", **options)
    assert sample[1:] == Coco("val", root=root)[0][1:]
    with pytest.raises(ValueError, match=r"no data for split 'test': looked for .*test\.json with"):
        datasets.build("coco-json", "test", **options)


def test_coco_mask_outside_the_image_is_none(write_dataset):
    dataset = Coco(
        "val", root=write_dataset(make_coco_content(make_annotation(1, segmentation=[[-9, -9, -5, -9, -5, -5]])))
    )
    assert dataset[0].regions[0].mask is None
    assert dataset.skipped == {"polygon covering no pixel": 1}


SQUARE_POLYGON = [[2, 3, 12, 3, 12, 11, 2, 11]]


@pytest.mark.parametrize(
    ("record", "box"),
    [
        ({"bbox": [0, 0, 0, 0], "segmentation": SQUARE_POLYGON}, (2, 3, 12, 11)),
        ({"bbox": [5, 5, 0, 4], "segmentation": SQUARE_POLYGON}, (2, 3, 12, 11)),
        ({"segmentation": SQUARE_POLYGON}, (2, 3, 12, 11)),
        ({"bbox": [1, 1, 3, 3], "segmentation": SQUARE_POLYGON}, (1, 1, 4, 4)),
        ({"bbox": [1, 1, 3, 3], "segmentation": SQUARE_POLYGON, "isbox": 1}, (1, 1, 4, 4)),
        ({"bbox": [0, 0, 0, 0]}, None),
    ],
)
def test_coco_readers_agree_on_a_region(write_dataset, record, box):
    root = write_dataset(make_coco_content({**make_annotation(1), "bbox": None, **record}))
    dataset = Coco("val", root=root)
    boxes_by_reader = [[region.box for sample in dataset for region in sample.regions]]
    boxes_by_reader.append([prompt.box for prompt in _read_prompts(root / "val.json")])
    (captioned_image,) = read_captions(root / "val.json", SkipCounter())
    boxes_by_reader.append([caption.box for caption in captioned_image.captions if caption.box])
    assert boxes_by_reader == [[box] if box else []] * 3


def _read_prompts(path):
    try:
        return [prompt for prompts in read_region_prompts(path).values() for prompt in prompts]
    except InputError:
        return []


def test_coco_without_categories_keeps_regions_with_captions(write_dataset):
    coco_content = make_coco_content(
        make_annotation(1, caption="a cat"), {"id": 2, "image_id": 1, "bbox": [1, 1, 5, 5], "caption": "a dog"}
    )
    coco_content.pop("categories")
    dataset = Coco("val", root=write_dataset(coco_content))
    assert [(region.name, region.phrases) for region in dataset[0].regions] == [(None, ("a cat",)), (None, ("a dog",))]
    assert dataset.skipped == {"file without categories": 1}
