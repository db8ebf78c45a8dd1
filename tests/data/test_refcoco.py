"""RefCOCO: each expression in its own split, and no file that is read can run anything."""

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


def ref(identity, split, image_id=1, **changes):
    sentences = [{"sent": f"{text} {identity}", "raw": "RAW", "sent_id": 0, "tokens": []} for text in ("one", "other")]
    return {
        "ref_id": identity,
        "ann_id": 100 + identity,
        "image_id": image_id,
        "category_id": 1,
        "split": split,
        "file_name": "unused.jpg",
        "sent_ids": [0, 1],
        "sentences": sentences,
        **changes,
    }


def instances(*refs, **changes):
    pictures = [{"id": n, "file_name": f"COCO_train2014_{n:012d}.jpg", "width": SIDE, "height": SIDE} for n in (1, 2)]
    things = {
        each["ann_id"]: {
            "id": each["ann_id"],
            "image_id": each["image_id"],
            "category_id": 1,
            "bbox": [each["ref_id"], 4, 10, 8],
            "segmentation": [[each["ref_id"], 4, each["ref_id"] + 10, 4, each["ref_id"] + 10, 12, each["ref_id"], 12]],
            "iscrowd": 0,
        }
        for each in refs
    }
    whole = {"images": pictures, "annotations": list(things.values()), "categories": [{"id": 1, "name": "cat"}]}
    return whole | changes


REFS = (ref(1, "train"), ref(2, "val"), ref(3, "val", 2), ref(4, "testA", 2), ref(5, "val"))


@pytest.fixture
def write(tmp_path):
    """Writes refs in the publishers' layout and gives the root."""

    def write(refs=REFS, collection="refcoco", by="unc", content=None, images="images/mscoco/images/train2014"):
        (tmp_path / images).mkdir(parents=True, exist_ok=True)
        for number in (1, 2):
            Image.new("RGB", (SIDE, SIDE)).save(tmp_path / images / f"COCO_train2014_{number:012d}.jpg")
        (tmp_path / collection).mkdir(exist_ok=True)
        data = refs if isinstance(refs, bytes) else pickle.dumps(list(refs), protocol=2)
        (tmp_path / collection / f"refs({by}).p").write_bytes(data)
        content = content or instances(*REFS)
        (tmp_path / collection / "instances.json").write_text(json.dumps(content))
        return tmp_path

    return write


def test_everything_is_read_as_it_was_written(write):
    dataset = datasets.build("refcoco", "val", root=str(write()))
    assert dataset.image_ids == [1, 2]
    first, second = dataset[0].regions
    assert (first.id, first.box, first.name) == (2, (2, 4, 12, 12), "cat")
    assert first.phrases == ("one 2", "other 2")
    truth = np.zeros((SIDE, SIDE), bool)
    truth[4:12, 2:12] = True
    assert np.array_equal(rle.decode(first.mask), truth)
    assert second.id == 5
    assert dataset.attribute_values == {"name": ("cat",)}
    assert dataset.split == "val"


def test_the_split_is_that_of_the_expression_and_not_that_of_the_image(write):
    root = write()
    ids = {
        split: [(sample.image_id, [region.id for region in sample.regions]) for sample in RefCoco(split, root=root)]
        for split in ("train", "val", "testA")
    }
    assert ids == {"train": [(1, [1])], "val": [(1, [2, 5]), (2, [3])], "testA": [(2, [4])]}


@pytest.mark.parametrize(
    ("name", "collection", "by"), [("refcoco-plus", "refcoco+", "unc"), ("refcocog", "refcocog", "umd")]
)
def test_each_collection_has_its_folder_and_its_usual_split(write, name, collection, by):
    dataset = datasets.build(name, "val", root=str(write(collection=collection, by=by)))
    assert [len(sample.regions) for sample in dataset] == [2, 1]


def test_the_published_split_of_refcocog_is_an_option(write):
    root = str(write(collection="refcocog", by="google"))
    assert len(datasets.build("refcocog", "val", root=root, by="google")) == 2
    with pytest.raises(
        ValueError, match=r"no refs\(umd\)\.p or .*; there is: refs\(google\)\.p; give by=unc, google or"
    ):
        datasets.build("refcocog", "val", root=root)


def test_pictures_are_looked_for_in_the_usual_places(write, tmp_path):
    root = write(images="train2014")
    expected = [sample[1:] for sample in RefCoco("val", root=root)]
    (root / "train2014").rename(root / "else")
    assert [sample[1:] for sample in RefCoco("val", root=root, images=root / "else")] == expected
    assert [sample[1:] for sample in RefCoco("val", root=root / "refcoco", images=root / "else")] == expected
    with pytest.raises(
        ValueError, match=r"no folder .*train2014 or .*: give images=FOLDER with COCO's train2014 images"
    ):
        RefCoco("val", root=root)


def test_it_keeps_the_promises_of_a_dataset(write):
    findings = check_component("dataset", "refcoco", split="val", root=str(write()))
    assert [finding for finding in findings if not finding.passed] == []


def test_what_was_exported_is_read_back(tmp_path):
    scenes = Scenes("val", num_images=3, image_size=SIDE)
    again = RefCoco("val", root=export_dataset(scenes, tmp_path / "out", "refcoco"))
    for one, other in zip(scenes, again, strict=True):
        assert [(r.box, r.mask, r.name, r.phrases) for r in one.regions] == [
            (r.box, r.mask, r.name, r.phrases) for r in other.regions
        ]


def test_python_2_wrote_the_pickles_and_json_will_do_as_well(write):
    root = write()
    expected = [sample[1:] for sample in RefCoco("val", root=root)]
    file = root / "refcoco" / "refs(unc).p"
    (file.with_suffix(".json")).write_text(json.dumps(pickle.loads(file.read_bytes())))
    file.unlink()
    assert [sample[1:] for sample in RefCoco("val", root=root)] == expected
    sentence = b"caf\xe9"  # as Python 2 has it: a byte string, here in Latin-1
    text = b"U" + struct.pack("B", len(sentence)) + sentence
    written = pickle.dumps([ref(2, "val", sentences=[{"sent": "CAFE"}])], protocol=2)
    written = written.replace(b"X\x04\x00\x00\x00CAFE", text)
    (file.with_suffix(".json")).unlink()
    assert RefCoco("val", root=write(written))[0].regions[0].phrases == ("café",)


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_is_refused_and_nothing_runs(write, tmp_path, protocol):
    data = pickle.dumps([ref(1, "val", sentences=[Malicious(tmp_path / "harm")])], protocol=protocol)
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p is no whole pickle of only lists.*: it asks for \w+\.open"):
        RefCoco("val", root=write(data))
    assert not (tmp_path / "harm").exists()


def test_not_even_a_harmless_class_is_looked_up(write):
    with pytest.raises(ValueError, match=r"it asks for collections\.OrderedDict"):
        RefCoco("val", root=write(b"ccollections\nOrderedDict\n)R."))


@pytest.mark.parametrize("data", [b"", b"nothing", pickle.dumps(list(REFS))[:200], b"\x80\x02}q\x00(U", b"\x82\x01."])
def test_a_damaged_pickle_is_named(write, data):
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p is no whole pickle"):
        RefCoco("val", root=write(data))


def test_an_unknown_split_says_which_there_are(write):
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p has no split 'testB'; it has: train, val, testA"):
        RefCoco("testB", root=write())
    with pytest.raises(ValueError, match="no collection 'refclef'; there are: refcoco, refcoco\\+, refcocog"):
        RefCoco("val", root="unused", collection="refclef")


PLACE = r"refs\(unc\)\.p: \[0\] \(ref_id 2\)"


@pytest.mark.parametrize(
    ("refs", "message"),
    [
        ({}, r"refs\(unc\)\.p must be a list of refs, not of type dict"),
        ([4], r"refs\(unc\)\.p: \[0\] is 4; give an object"),
        ([ref(2, "val"), ref(2, "train")], r"\[1\] \(ref_id 2\): this ref_id was given before"),
        ([ref(2, None)], PLACE + ", 'split' is None; give text"),
        ([ref(2, "val", ann_id=5)], PLACE + r": ann_id 5 is not among the annotations of .*instances\.json"),
        ([ref(2, "val", ann_id="5")], PLACE + r", 'ann_id' is '5'; give an integer"),
        ([ref(2, "val", image_id=3)], PLACE + r": image_id 3 is not among the images of .*instances\.json"),
        ([ref(2, "val", image_id=2)], PLACE + r": ann_id 102 is of image 1, not of 2"),
        ([ref(2, "val", sentences=None)], PLACE + r", 'sentences' is None; give a list"),
        ([ref(2, "val", sentences=[{}])], PLACE + r": sentences\[0\]: no 'sent'; it has: nothing"),
        ([ref(2, "val", sentences=[{"sent": 4}])], PLACE + r": sentences\[0\], 'sent' is 4; give text"),
    ],
)
def test_a_broken_ref_is_named_with_its_file_and_field(write, refs, message):
    with pytest.raises(ValueError, match=message):
        RefCoco("val", root=write(pickle.dumps(refs)), max_bad=0)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"bbox": [1, 2, 3]}, "'bbox' is .*; give 4 numbers"),
        ({"bbox": [1, 2, -3, 4]}, "'bbox' has width -3 and height"),
        ({"bbox": [1, 2, 3, float("inf")]}, "'bbox' is .*; give 4 numbers"),
        ({"segmentation": {"size": [1, 1], "counts": "1"}}, r"'segmentation': has size \[1, 1\]"),
        ({"category_id": 8}, "category_id 8 has no name"),
    ],
)
def test_a_broken_annotation_is_named(write, broken, message):
    content = instances(*REFS)
    content["annotations"][1] |= broken
    with pytest.raises(ValueError, match=rf"instances\.json: annotations\[1\] \(id 102\)[:,] {message}"):
        RefCoco("val", root=write(content=content), max_bad=0)
