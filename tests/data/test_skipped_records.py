"""Readers skip only broken regions, count them, and report them in one line."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sca.data.coco import Coco, CocoJson
from sca.data.conversion import UNUSABLE_IMAGE_REASON, UNUSABLE_REGION_REASON
from sca.data.custom import choose_split
from sca.data.jsonl import Jsonl
from sca.data.record_parsing import EmptyDatasetError
from sca.data.summary import check_dataset_not_empty, summarize_dataset

SIDE = 32
VALID = "good"
BROKEN_JSONL_FIELDS = {  # errors of a region in JSON lines; the values replace those of a valid one
    "no box": {"box": ...},
    "short box": {"box": [1, 2, 3]},
    "text in a box": {"box": [1, 2, 3, "4"]},
    "caption of numbers": {"caption": [3]},
    "mask of another size": {"mask": {"size": [1, 1], "counts": "1"}},
    "attributes in a list": {"attributes": [3]},
    "no image": {"image": ...},
    "image is a number": {"image": 3},
}
BROKEN_COCO_FIELDS = {  # the same in the COCO format
    "no box": {"bbox": ...},
    "short box": {"bbox": [1, 2, 3]},
    "text in a box": {"bbox": [1, 2, 3, "4"]},
    "negative width": {"bbox": [9, 2, -3, 4]},
    "caption of numbers": {"caption": [3]},
    "mask of another size": {"segmentation": {"size": [1, 1], "counts": "1"}},
    "attributes in a list": {"attributes": [3]},
    "no image": {"image_id": ...},
    "image of another file": {"image_id": 99},
    "no id": {"id": ...},
    "text for an id": {"id": "7"},
    "unknown category": {"category_id": 99, "caption": ...},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("skipped")
    for number in range(3):
        Image.new("RGB", (SIDE, SIDE), (number, 0, 0)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(autouse=True)
def _cache(folder, monkeypatch):
    monkeypatch.setenv("SCA_CACHE", str(folder / "cache"))


def apply_changes(record, changes):
    return {key: value for key, value in {**record, **changes}.items() if value is not ...}


def list_first_phrases(dataset):
    return {region.phrases[0] for regions in dataset.iter_annotations() for region in regions}


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from([VALID, *BROKEN_JSONL_FIELDS, "not JSON"])),
        min_size=1,
        max_size=12,
    )
)
def test_jsonl_keeps_valid_lines_and_reports_broken_ones(folder, images_and_kinds):
    lines, valid_captions, broken_locations = [], set(), []
    for number, (image, kind) in enumerate(images_and_kinds):
        line = {"image": f"{image}.png", "box": [1, 2, 9, 8], "caption": f"region {number}"}
        lines.append(
            '{"image": ' if kind == "not JSON" else json.dumps(apply_changes(line, BROKEN_JSONL_FIELDS.get(kind, {})))
        )
        if kind == VALID:
            valid_captions.add(f"region {number}")
        else:
            broken_locations.append(f"line {number + 1}")
    file = folder / "regions.jsonl"
    file.write_text("\n".join(lines))
    dataset = Jsonl("train", file)
    assert list_first_phrases(dataset) == valid_captions
    assert dataset.skipped[UNUSABLE_REGION_REASON] == len(broken_locations)
    examples_text = " ".join(dataset.examples.get(UNUSABLE_REGION_REASON, ()))
    assert sum(
        f"{location} " in examples_text or f"{location}:" in examples_text for location in broken_locations
    ) >= min(len(broken_locations), 5)
    assert (f"{len(broken_locations)} unusable region" in summarize_dataset(dataset)) == bool(broken_locations)
    if broken_locations:
        with pytest.raises(
            ValueError,
            match=rf"{len(broken_locations)} regions of .* more than max_bad_records={len(broken_locations) - 1}; "
            ".*line",
        ):
            Jsonl("train", file, max_bad_records=len(broken_locations) - 1)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from([VALID, *BROKEN_COCO_FIELDS, "no object"])),
        min_size=1,
        max_size=12,
    )
)
def test_coco_keeps_valid_annotations_and_reports_broken_ones(folder, images_and_kinds):
    annotations, valid_captions, broken_locations = [], set(), []
    for number, (image, kind) in enumerate(images_and_kinds):
        valid_annotation = {
            "id": number,
            "image_id": image,
            "category_id": 1,
            "bbox": [1, 2, 8, 6],
            "caption": f"region {number}",
        }
        annotations.append(
            4 if kind == "no object" else apply_changes(valid_annotation, BROKEN_COCO_FIELDS.get(kind, {}))
        )
        if kind == VALID:
            valid_captions.add(f"region {number}")
        else:
            broken_locations.append(f"annotations[{number}]")
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": SIDE, "height": SIDE} for n in range(3)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "thing"}],
    }
    (folder / "all.json").write_text(json.dumps(content))
    dataset = Coco("train", annotations=folder / "all.json", image_root=folder)
    assert list_first_phrases(dataset) == valid_captions
    assert dataset.skipped[UNUSABLE_REGION_REASON] == len(broken_locations)
    examples_text = " ".join(dataset.examples.get(UNUSABLE_REGION_REASON, ()))
    assert sum(location in examples_text for location in broken_locations) >= min(len(broken_locations), 5)


def write_coco_dataset(folder, annotations=None, **changes):
    region = {"category_id": 1, "bbox": [1, 2, 8, 6]}
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": SIDE, "height": SIDE} for n in range(3)],
        "annotations": [
            {"id": n, "image_id": n, **region, **fields} for n, fields in enumerate(annotations or [{}] * 3)
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (folder / "mine.json").write_text(json.dumps(content | changes))
    return Coco("train", annotations=folder / "mine.json", image_root=folder)


def test_summarize_dataset_counts_regions_captions_names_and_images(folder):
    images = [{"id": n, "file_name": name, "width": SIDE, "height": SIDE} for n, name in enumerate(["0.png", "x.jpg"])]
    annotations = [{"caption": "a dog"}, {}, {"image_id": 0}]
    dataset = write_coco_dataset(folder, annotations, images=images)
    line = summarize_dataset(dataset)
    assert line.startswith("2 regions, 1 with captions, 1 class name, 1 image; ")
    assert f"1 image missing: x.jpg (looked in {folder})" in line
    assert "\n" not in line


def test_coco_skips_image_with_broken_record(folder):
    images = [{"id": 0, "file_name": "0.png"}, {"id": 1, "file_name": "1.png", "width": SIDE, "height": SIDE}]
    dataset = write_coco_dataset(folder, [{}, {}], images=images)
    assert dataset.image_ids == [1]
    assert dataset.skipped == {UNUSABLE_IMAGE_REASON: 1}
    assert "images[0] (id 0): no 'width'" in summarize_dataset(dataset)


@pytest.mark.parametrize("key", ["description", "text", "Captions", "sentences"])
def test_summarize_dataset_reports_captions_under_unread_keys(folder, key):
    dataset = write_coco_dataset(folder, [{key: "a dog"}] * 3)
    assert f"3 captions under {key!r}, which is not read (the key is 'caption')" in summarize_dataset(dataset)
    assert dataset.metadata["captioned_regions"] == 0
    lines = [{"image": "0.png", "box": [1, 2, 9, 8], "name": "dog", key: "a dog"}]
    (folder / "named.jsonl").write_text("\n".join(map(json.dumps, lines)))
    line = summarize_dataset(Jsonl("train", folder / "named.jsonl"))
    assert f"1 caption under {key!r}, which is not read (the key is 'caption' or 'phrases')" in line


def test_coco_keeps_captions_of_category_without_name(folder):
    categories = [{"id": 1}, {"id": 2, "name": "cat"}]
    dataset = write_coco_dataset(folder, [{"caption": "a dog"}, {"category_id": 2}, {}], categories=categories)
    assert list_phrases_and_names(dataset) == [("a dog", None), ("", "cat")]
    assert dataset.skipped["category without a name"] == 1
    assert dataset.attribute_values == {"name": ("cat",)}
    with pytest.raises(
        ValueError, match=r"1 categories of .* more than max_bad_records=0; .*categories\[0\] \(id 1\): no 'name'"
    ):
        Coco("train", annotations=folder / "mine.json", image_root=folder, max_bad_records=0)


def list_phrases_and_names(dataset):
    return [(" ".join(r.phrases), r.name) for regions in dataset.iter_annotations() for r in regions]


def test_summarize_dataset_counts_missing_images(folder):
    names = ["0.png", *(f"gone{n}.png" for n in range(9))]
    images = [{"id": n, "file_name": name, "width": SIDE, "height": SIDE} for n, name in enumerate(names)]
    dataset = write_coco_dataset(folder, [{}] * 10, images=images)
    assert len(dataset) == 1
    assert "9 images missing: gone0.png, gone1.png, gone2.png and 6 more" in summarize_dataset(dataset)


def test_check_dataset_not_empty_reports_missing_images_and_folder(folder):
    images = [{"id": n, "file_name": f"gone{n}.png", "width": SIDE, "height": SIDE} for n in range(2)]
    dataset = write_coco_dataset(folder, [{}, {}], images=images)
    with pytest.raises(EmptyDatasetError) as caught:
        check_dataset_not_empty(dataset, "data.own (train)")
    assert str(caught.value) == (
        f"data.own (train) has no usable image: 2 images missing: gone0.png, gone1.png (looked in {folder})"
    )


@pytest.mark.parametrize(("num_images", "num_held_out"), [(1, 0), (2, 0), (3, 1), (8, 2), (12, 4), (40, 4), (100, 10)])
def test_choose_split_holds_out_at_least_four_and_at_most_a_third(num_images, num_held_out):
    names = [f"{number}.png" for number in range(num_images)]
    train, train_remarks = choose_split(names, "train", 0.1)
    val, val_remarks = choose_split(names, "val", 0.1)
    assert len(val) == num_held_out
    assert not train & val
    assert train | val == set(names)
    assert train_remarks == val_remarks == [f"{num_held_out} of {num_images} images held out for validation"]


def test_choose_split_does_not_depend_on_order(folder):
    names = [f"{number}.png" for number in range(30)]
    assert choose_split(names, "val", 0.1) == choose_split(names[::-1], "val", 0.1)


def test_summarize_dataset_reports_held_out_images(folder):
    write_coco_dataset(folder)
    options = {"annotations": folder / "mine.json", "image_root": folder, "val_fraction": 0.1}
    for _ in range(2):  # after conversion, and after reopening
        assert "; 1 of 3 images held out for validation" in summarize_dataset(CocoJson("train", **options))
    assert len(CocoJson("val", **options)) == 1
