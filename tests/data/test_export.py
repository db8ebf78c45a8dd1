"""Exported datasets read back as what they were, and a folder appears whole or not at all."""

import contextlib
import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from sca_registry import datasets
from sca_registry.contracts import Region, Sample

from sca.data.coco import Coco
from sca.data.export import EXPORT_WRITERS, export_dataset
from sca.data.record_parsing import EmptyDatasetError
from sca.data.scenes import Scenes
from sca.io.errors import OutputError
from sca.io.masks import encode_rle

SPLITS = {"train": Scenes("train", num_images=4, image_size=64), "val": Scenes("val", num_images=2, image_size=64)}


class Plain:
    """The least that a dataset can be: a length and an index; no split, and no error past the end."""

    def __init__(self, *samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index % len(self.samples)]


def bare(identity=1, region=1, **facts):
    return Sample(Image.new("RGB", (8, 6)), identity, (Region(region, (1.5, 2, 4, 5), **facts),))


def read(path):
    return json.loads(path.read_text())


def test_coco_reads_back_equal(tmp_path):
    folder = export_dataset(SPLITS, tmp_path / "out", "coco")
    for split, scenes in SPLITS.items():
        again = Coco(split, root=folder)
        assert len(again) == len(scenes)
        assert not again.skipped
        for one, other in zip(scenes, again, strict=True):
            assert np.array_equal(one.image, other.image)
            assert one[1:] == other[1:]


def test_the_official_reader_reads_the_same_coco(tmp_path):
    with contextlib.redirect_stdout(io.StringIO()):
        official = COCO(export_dataset(SPLITS, tmp_path / "out", "coco") / "train.json")
    for sample in SPLITS["train"]:
        (image,) = official.loadImgs(sample.image_id)
        assert (tmp_path / "out" / "train" / image["file_name"]).is_file()
        annotations = official.loadAnns(official.getAnnIds(sample.image_id))
        assert len(annotations) == len(sample.regions)
        for region, annotation in zip(sample.regions, annotations, strict=True):
            x1, y1, x2, y2 = region.box
            mask = official.annToMask(annotation)
            assert annotation["bbox"] == [x1, y1, x2 - x1, y2 - y1] == rle.toBbox(region.mask).tolist()
            assert annotation["area"] == mask.sum()
            assert np.array_equal(mask, rle.decode(region.mask))
            assert official.loadCats(annotation["category_id"])[0]["name"] == region.name


def test_regions_without_mask_name_or_phrases_can_be_written(tmp_path):
    folder = export_dataset(Plain(bare()), tmp_path / "out", "coco")
    assert Coco("train", root=folder)[0].regions == (Region(1, (1.5, 2, 4, 5), name="region"),)
    assert read(folder / "train.json")["annotations"][0]["area"] == 7.5


def test_visual_genome_has_one_region_a_phrase(tmp_path):
    folder = export_dataset(SPLITS, tmp_path / "out", "vg")
    samples = [sample for scenes in SPLITS.values() for sample in scenes]
    images, descriptions = read(folder / "image_data.json"), read(folder / "region_descriptions.json")
    assert read(folder / "densecap_splits.json") == {
        "train": [sample.image_id for sample in SPLITS["train"]],
        "val": [sample.image_id for sample in SPLITS["val"]],
        "test": [],
    }
    for sample, image, described in zip(samples, images, descriptions, strict=True):
        assert image["image_id"] == described["id"] == sample.image_id
        with Image.open(folder / image["url"]) as picture:
            assert picture.format == "JPEG"
            assert picture.size == (image["width"], image["height"]) == sample.image.size
        told = [(r["phrase"], r["x"], r["y"], r["x"] + r["width"], r["y"] + r["height"]) for r in described["regions"]]
        assert told == [(phrase, *region.box) for region in sample.regions for phrase in region.phrases]
        assert {region["image_id"] for region in described["regions"]} == {sample.image_id}
    ids = [region["region_id"] for described in descriptions for region in described["regions"]]
    assert len(ids) == len(set(ids))


def test_visual_genome_falls_back_on_the_name(tmp_path):
    folder = export_dataset(Plain(bare(1, 1, name="owl"), bare(2, 2)), tmp_path / "out", "vg")
    named, nameless = read(folder / "region_descriptions.json")
    assert [region["phrase"] for region in named["regions"]] == ["owl"]
    assert nameless["regions"] == []


@pytest.mark.parametrize("format", ["sa1b", "coco-captions", "vg-grit"])
def test_layouts_without_classes_say_the_name_of_a_region_without_phrases(tmp_path, format):
    mask = encode_rle(np.ones((20, 30), bool))
    region = Region(1, (0.0, 0.0, 30.0, 20.0), mask, "owl")
    sample = Sample(Image.new("RGB", (30, 20)), 1, (region,))
    folder = export_dataset({"train": Plain(sample)}, tmp_path / "out", format)
    name = {"sa1b": "sa1b", "coco-captions": "coco-captions", "vg-grit": "visual-genome-grit"}[format]
    (read_back,) = datasets.build(name, "train", root=folder)
    assert [region.phrases for region in read_back.regions] == [("owl",)]


def test_refcoco_points_from_sentences_to_annotations(tmp_path):
    folder = export_dataset(SPLITS, tmp_path / "out", "refcoco")
    with contextlib.redirect_stdout(io.StringIO()):
        official = COCO(folder / "instances.json")
    refs = pickle.loads((folder / "refs(unc).p").read_bytes())
    regions = {region.id: (split, s, region) for split in SPLITS for s in SPLITS[split] for region in s.regions}
    assert [ref["ann_id"] for ref in refs] == list(regions)
    for ref in refs:
        split, sample, region = regions[ref["ann_id"]]
        assert (ref["split"], ref["image_id"]) == (split, sample.image_id)
        assert ref["category_id"] == official.anns[region.id]["category_id"]
        assert [sentence["raw"] for sentence in ref["sentences"]] == list(region.phrases)
        assert [sentence["sent_id"] for sentence in ref["sentences"]] == ref["sent_ids"]
        with Image.open(folder / "images" / official.imgs[sample.image_id]["file_name"]) as picture:
            assert np.array_equal(picture, sample.image)
    assert len({number for ref in refs for number in ref["sent_ids"]}) == sum(len(ref["sent_ids"]) for ref in refs)


def test_a_sentence_is_kept_as_typed_and_as_tokens(tmp_path):
    folder = export_dataset(Plain(bare(1, 1, phrases=("The OWL, left!",)), bare(2, 2)), tmp_path / "out", "refcoco")
    (ref,) = pickle.loads((folder / "refs(unc).p").read_bytes())
    assert ref["sentences"] == [
        {"raw": "The OWL, left!", "sent": "the owl left", "sent_id": 0, "tokens": ["the", "owl", "left"]}
    ]


@pytest.mark.parametrize("format", EXPORT_WRITERS)
def test_a_limit_keeps_the_first_of_each_split(tmp_path, format):
    folder = export_dataset(SPLITS, tmp_path / "out", format, max_images=1)
    pictures = [path for path in folder.rglob("*.[pj][np]g") if "annotations" not in path.parts]  # and no segments
    assert len(pictures) == len(SPLITS)


@pytest.mark.parametrize("format", EXPORT_WRITERS)
def test_export_of_no_samples_is_refused_and_leaves_nothing(tmp_path, format):
    with pytest.raises(EmptyDatasetError, match="no sample can be read"):
        export_dataset(Plain(), tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_a_single_dataset_is_written_as_the_split_it_is(tmp_path):
    export_dataset(Scenes("test", num_images=1, image_size=64), tmp_path / "out", "coco")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"test.json", "test"}


def test_unreadable_pictures_are_not_exported_twice(tmp_path):
    folder = export_dataset(SPLITS["train"], tmp_path / "one", "coco")
    next((folder / "train").iterdir()).write_bytes(b"")
    again = export_dataset(Coco("train", root=folder), tmp_path / "two", "coco")
    assert len(list((again / "train").iterdir())) == len(SPLITS["train"]) - 1


def test_an_empty_folder_is_filled_and_a_full_one_refused(tmp_path):
    (tmp_path / "out").mkdir()
    export_dataset(SPLITS, tmp_path / "out", "coco", max_images=1)
    with pytest.raises(OutputError, match="not a new or empty folder"):
        export_dataset(SPLITS, tmp_path / "out", "coco")
    with pytest.raises(ValueError, match="no format 'voc'; there are: coco, coco-captions, coco-panoptic, "):
        export_dataset(SPLITS, tmp_path / "new", "voc")


@pytest.mark.parametrize("format", EXPORT_WRITERS)
def test_a_failure_leaves_nothing_behind(tmp_path, format):
    with pytest.raises(ValueError, match="image id 1 of split 'train' was there before, in split 'train'"):
        export_dataset(Plain(bare(), bare()), tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["vg", "refcoco"])
def test_splits_in_one_file_may_not_share_ids(tmp_path, format):
    with pytest.raises(ValueError, match="region id 1 of split 'val' was there before, in split 'train'"):
        export_dataset({"train": Plain(bare(1)), "val": Plain(bare(2))}, tmp_path / "out", format)
