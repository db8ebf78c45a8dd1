"""RefCOCO: each expression is in its own split, and reading a file runs no code."""

import json
import pickle
import struct

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from sca_registry import datasets

from sca.data.export import export_dataset
from sca.data.refcoco import RefCoco
from sca.data.scenes import Scenes
from sca.testing.conformance import check_component

SIDE = 64


def make_ref(ref_id, split, image_id=1, **changes):
    sentences = [{"sent": f"{text} {ref_id}", "raw": "RAW", "sent_id": 0, "tokens": []} for text in ("one", "other")]
    return {
        "ref_id": ref_id,
        "ann_id": 100 + ref_id,
        "image_id": image_id,
        "category_id": 1,
        "split": split,
        "file_name": "unused.jpg",
        "sent_ids": [0, 1],
        "sentences": sentences,
        **changes,
    }


def make_instances(*refs, **changes):
    images = [{"id": n, "file_name": f"COCO_train2014_{n:012d}.jpg", "width": SIDE, "height": SIDE} for n in (1, 2)]
    annotations_by_id = {
        item["ann_id"]: {
            "id": item["ann_id"],
            "image_id": item["image_id"],
            "category_id": 1,
            "bbox": [item["ref_id"], 4, 10, 8],
            "segmentation": [[item["ref_id"], 4, item["ref_id"] + 10, 4, item["ref_id"] + 10, 12, item["ref_id"], 12]],
            "iscrowd": 0,
        }
        for item in refs
    }
    content = {
        "images": images,
        "annotations": list(annotations_by_id.values()),
        "categories": [{"id": 1, "name": "cat"}],
    }
    return content | changes


REFS = (make_ref(1, "train"), make_ref(2, "val"), make_ref(3, "val", 2), make_ref(4, "testA", 2), make_ref(5, "val"))


@pytest.fixture
def write_refcoco(tmp_path):
    """Return a function that writes refs in the published layout and returns the root."""

    def write(refs=REFS, collection="refcoco", by="unc", content=None, images="images/mscoco/images/train2014"):
        (tmp_path / images).mkdir(parents=True, exist_ok=True)
        for number in (1, 2):
            Image.new("RGB", (SIDE, SIDE)).save(tmp_path / images / f"COCO_train2014_{number:012d}.jpg")
        (tmp_path / collection).mkdir(exist_ok=True)
        data = refs if isinstance(refs, bytes) else pickle.dumps(list(refs), protocol=2)
        (tmp_path / collection / f"refs({by}).p").write_bytes(data)
        content = content or make_instances(*REFS)
        (tmp_path / collection / "instances.json").write_text(json.dumps(content))
        return tmp_path

    return write


def test_refcoco_reads_all_fields(write_refcoco):
    dataset = datasets.build("refcoco", "val", root=str(write_refcoco()))
    assert dataset.image_ids == [1, 2]
    first, second = dataset[0].regions
    assert (first.id, first.box, first.name) == (2, (2, 4, 12, 12), "cat")
    assert first.phrases == ("one 2", "other 2")
    true_mask = np.zeros((SIDE, SIDE), bool)
    true_mask[4:12, 2:12] = True
    assert np.array_equal(rle.decode(first.mask), true_mask)
    assert second.id == 5
    assert dataset.attribute_values == {"name": ("cat",)}
    assert dataset.split == "val"


def test_refcoco_split_is_that_of_the_expression_not_the_image(write_refcoco):
    root = write_refcoco()
    ids = {
        split: [(sample.image_id, [region.id for region in sample.regions]) for sample in RefCoco(split, root=root)]
        for split in ("train", "val", "testA")
    }
    assert ids == {"train": [(1, [1])], "val": [(1, [2, 5]), (2, [3])], "testA": [(2, [4])]}


def test_refcoco_with_all_objects_reads_every_annotation_of_the_images_of_a_split(write_refcoco):
    repeated = make_ref(6, "val", ann_id=102)
    crowds = (make_ref(7, "unused"), make_ref(8, "val"))
    content = make_instances(*REFS, *crowds)
    for each in content["annotations"][-2:]:
        each["iscrowd"] = 1
    root = write_refcoco((*REFS, repeated, crowds[1]), content=content)
    assert [len(sample.regions) for sample in RefCoco("val", root=root)] == [4, 1]
    dataset = RefCoco("val", root=root, objects="all")
    phrases = [{region.id: region.phrases for region in sample.regions} for sample in dataset]
    assert phrases == [
        {
            101: (),  # of another split
            102: ("one 2", "other 2", "one 6", "other 6"),
            105: ("one 5", "other 5"),
            108: ("one 8", "other 8"),
        },
        {103: ("one 3", "other 3"), 104: ()},
    ]
    unreferred = dataset[0].regions[0]
    assert (unreferred.box, unreferred.name, unreferred.mask is None) == ((1, 4, 11, 12), "cat", False)
    assert dataset.skipped == {"crowd": 1}
    assert [sample.image_id for sample in RefCoco("train", root=root, objects="all")] == [1]
    with pytest.raises(ValueError, match="objects is 'al'"):
        RefCoco("val", root=root, objects="al")


def test_refcoco_with_all_objects_skips_only_a_broken_annotation(write_refcoco):
    content = make_instances(*REFS)
    content["annotations"][0]["bbox"] = [1, 2, 3]
    dataset = RefCoco("val", root=write_refcoco(content=content), objects="all")
    assert [[region.id for region in sample.regions] for sample in dataset] == [[102, 105], [103, 104]]
    assert dataset.skipped.total() == 1


@pytest.mark.parametrize(
    ("name", "collection", "by"), [("refcoco-plus", "refcoco+", "unc"), ("refcocog", "refcocog", "umd")]
)
def test_refcoco_collections_use_their_folder_and_default_split(write_refcoco, name, collection, by):
    dataset = datasets.build(name, "val", root=str(write_refcoco(collection=collection, by=by)))
    assert [len(sample.regions) for sample in dataset] == [2, 1]


def test_refcocog_accepts_google_split(write_refcoco):
    root = str(write_refcoco(collection="refcocog", by="google"))
    assert len(datasets.build("refcocog", "val", root=root, split_by="google")) == 2
    with pytest.raises(
        ValueError, match=r"no refs\(umd\)\.p or .*; found: refs\(google\)\.p; set split_by=unc, google or"
    ):
        datasets.build("refcocog", "val", root=root)


def test_refcoco_finds_images_in_default_or_given_folder(write_refcoco, tmp_path):
    root = write_refcoco(images="train2014")
    expected = [sample[1:] for sample in RefCoco("val", root=root)]
    (root / "train2014").rename(root / "else")
    assert [sample[1:] for sample in RefCoco("val", root=root, image_root=root / "else")] == expected
    assert [sample[1:] for sample in RefCoco("val", root=root / "refcoco", image_root=root / "else")] == expected
    with pytest.raises(
        ValueError, match=r"no folder .*train2014 or .*; set image_root=FOLDER with COCO's train2014 images"
    ):
        RefCoco("val", root=root)


def test_refcoco_passes_conformance(write_refcoco):
    findings = check_component("dataset", "refcoco", split="val", root=str(write_refcoco()))
    assert [finding for finding in findings if not finding.passed] == []


def test_refcoco_reads_back_exported_scenes(tmp_path):
    scenes = Scenes("val", num_images=3, image_size=SIDE)
    exported = RefCoco("val", root=export_dataset(scenes, tmp_path / "out", "refcoco"))
    for original, read_back in zip(scenes, exported, strict=True):
        assert [(r.box, r.mask, r.name, r.phrases) for r in original.regions] == [
            (r.box, r.mask, r.name, r.phrases) for r in read_back.regions
        ]


def test_refcoco_reads_python_2_pickles_and_json(write_refcoco):
    root = write_refcoco()
    expected = [sample[1:] for sample in RefCoco("val", root=root)]
    file = root / "refcoco" / "refs(unc).p"
    (file.with_suffix(".json")).write_text(json.dumps(pickle.loads(file.read_bytes())))
    file.unlink()
    assert [sample[1:] for sample in RefCoco("val", root=root)] == expected
    sentence = b"caf\xe9"  # a byte string of Python 2, here in Latin-1
    text = b"U" + struct.pack("B", len(sentence)) + sentence
    pickled_refs = pickle.dumps([make_ref(2, "val", sentences=[{"sent": "CAFE"}])], protocol=2)
    pickled_refs = pickled_refs.replace(b"X\x04\x00\x00\x00CAFE", text)
    (file.with_suffix(".json")).unlink()
    assert RefCoco("val", root=write_refcoco(pickled_refs))[0].regions[0].phrases == ("café",)


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_refcoco_rejects_malicious_pickle_without_running_it(write_refcoco, tmp_path, protocol):
    data = pickle.dumps([make_ref(1, "val", sentences=[Malicious(tmp_path / "harm")])], protocol=protocol)
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p is not a complete pickle of lists.*: it refers to \w+\.open"):
        RefCoco("val", root=write_refcoco(data))
    assert not (tmp_path / "harm").exists()


def test_refcoco_rejects_pickle_with_any_class(write_refcoco):
    with pytest.raises(ValueError, match=r"it refers to collections\.OrderedDict"):
        RefCoco("val", root=write_refcoco(b"ccollections\nOrderedDict\n)R."))


@pytest.mark.parametrize("data", [b"", b"nothing", pickle.dumps(list(REFS))[:200], b"\x80\x02}q\x00(U", b"\x82\x01."])
def test_refcoco_reports_damaged_pickle(write_refcoco, data):
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p is not a complete pickle"):
        RefCoco("val", root=write_refcoco(data))


def test_refcoco_reports_unknown_split_and_collection(write_refcoco):
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p has no split 'testB'; it has: train, val, testA"):
        RefCoco("testB", root=write_refcoco())
    with pytest.raises(ValueError, match="unknown collection 'refclef'; choose from refcoco, refcoco\\+, refcocog"):
        RefCoco("val", root="unused", collection="refclef")


REF_PATTERN = r"refs\(unc\)\.p: \[0\] \(ref_id 2\)"


@pytest.mark.parametrize(
    ("refs", "message"),
    [
        ({}, r"refs\(unc\)\.p must contain a list of refs, not a dict"),
        ([4], r"refs\(unc\)\.p: \[0\] is 4; expected an object"),
        ([make_ref(2, "val"), make_ref(2, "train")], r"\[1\] \(ref_id 2\): duplicate ref_id"),
        ([make_ref(2, None)], REF_PATTERN + ", 'split' is None; expected a string"),
        ([make_ref(2, "val", ann_id=5)], REF_PATTERN + r": ann_id 5 is not among the annotations of .*instances\.json"),
        ([make_ref(2, "val", ann_id="5")], REF_PATTERN + r", 'ann_id' is '5'; expected an integer"),
        ([make_ref(2, "val", image_id=3)], REF_PATTERN + r": image_id 3 is not among the images of .*instances\.json"),
        ([make_ref(2, "val", image_id=2)], REF_PATTERN + r": ann_id 102 is of image 1, not of 2"),
        ([make_ref(2, "val", sentences=None)], REF_PATTERN + r", 'sentences' is None; expected a list"),
        ([make_ref(2, "val", sentences=[{}])], REF_PATTERN + r": sentences\[0\]: no 'sent'; it has: nothing"),
        (
            [make_ref(2, "val", sentences=[{"sent": 4}])],
            REF_PATTERN + r": sentences\[0\], 'sent' is 4; expected a string",
        ),
    ],
)
def test_refcoco_reports_broken_ref_with_file_and_field(write_refcoco, refs, message):
    with pytest.raises(ValueError, match=message):
        RefCoco("val", root=write_refcoco(pickle.dumps(refs)), max_bad_records=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox": [1, 2, 3]}, "'bbox' is .*; expected 4 numbers"),
        ({"bbox": [1, 2, -3, 4]}, "'bbox' has width -3 and height"),
        ({"bbox": [1, 2, 3, float("inf")]}, "'bbox' is .*; expected 4 numbers"),
        ({"segmentation": {"size": [1, 1], "counts": "1"}}, r"'segmentation' has size \[1, 1\]"),
        ({"category_id": 8}, "category_id 8 has no name"),
    ],
)
def test_refcoco_reports_broken_annotation(write_refcoco, changes, message):
    content = make_instances(*REFS)
    content["annotations"][1] |= changes
    with pytest.raises(ValueError, match=rf"instances\.json: annotations\[1\] \(id 102\)[:,] {message}"):
        RefCoco("val", root=write_refcoco(content=content), max_bad_records=0)
