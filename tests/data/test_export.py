"""Exported datasets read back unchanged, and an export writes its folder atomically."""

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


class MinimalDataset:
    """A minimal dataset: a length and an index, no split and no error past the end."""

    def __init__(self, *samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index % len(self.samples)]


def make_sample(image_id=1, region_id=1, **fields):
    return Sample(Image.new("RGB", (8, 6)), image_id, (Region(region_id, (1.5, 2, 4, 5), **fields),))


def read_json(path):
    return json.loads(path.read_text())


def test_coco_export_reads_back_equal(tmp_path):
    folder = export_dataset(SPLITS, tmp_path / "out", "coco")
    for split, scenes in SPLITS.items():
        exported = Coco(split, root=folder)
        assert len(exported) == len(scenes)
        assert not exported.skipped
        for original, read_back in zip(scenes, exported, strict=True):
            assert np.array_equal(original.image, read_back.image)
            assert original[1:] == read_back[1:]


def test_coco_export_is_read_by_pycocotools(tmp_path):
    with contextlib.redirect_stdout(io.StringIO()):
        coco_api = COCO(export_dataset(SPLITS, tmp_path / "out", "coco") / "train.json")
    for sample in SPLITS["train"]:
        (image,) = coco_api.loadImgs(sample.image_id)
        assert (tmp_path / "out" / "train" / image["file_name"]).is_file()
        annotations = coco_api.loadAnns(coco_api.getAnnIds(sample.image_id))
        assert len(annotations) == len(sample.regions)
        for region, annotation in zip(sample.regions, annotations, strict=True):
            x1, y1, x2, y2 = region.box
            mask = coco_api.annToMask(annotation)
            assert annotation["bbox"] == [x1, y1, x2 - x1, y2 - y1] == rle.toBbox(region.mask).tolist()
            assert annotation["area"] == mask.sum()
            assert np.array_equal(mask, rle.decode(region.mask))
            assert coco_api.loadCats(annotation["category_id"])[0]["name"] == region.name


def test_coco_export_writes_regions_without_mask_name_or_phrases(tmp_path):
    folder = export_dataset(MinimalDataset(make_sample()), tmp_path / "out", "coco")
    assert Coco("train", root=folder)[0].regions == (Region(1, (1.5, 2, 4, 5), name="region"),)
    assert read_json(folder / "train.json")["annotations"][0]["area"] == 7.5


def test_visual_genome_export_writes_one_region_per_phrase(tmp_path):
    folder = export_dataset(SPLITS, tmp_path / "out", "vg")
    samples = [sample for scenes in SPLITS.values() for sample in scenes]
    images, descriptions = read_json(folder / "image_data.json"), read_json(folder / "region_descriptions.json")
    assert read_json(folder / "densecap_splits.json") == {
        "train": [sample.image_id for sample in SPLITS["train"]],
        "val": [sample.image_id for sample in SPLITS["val"]],
        "test": [],
    }
    for sample, image, description in zip(samples, images, descriptions, strict=True):
        assert image["image_id"] == description["id"] == sample.image_id
        with Image.open(folder / image["url"]) as saved_image:
            assert saved_image.format == "JPEG"
            assert saved_image.size == (image["width"], image["height"]) == sample.image.size
        written_phrases = [
            (r["phrase"], r["x"], r["y"], r["x"] + r["width"], r["y"] + r["height"]) for r in description["regions"]
        ]
        assert written_phrases == [(phrase, *region.box) for region in sample.regions for phrase in region.phrases]
        assert {region["image_id"] for region in description["regions"]} == {sample.image_id}
    ids = [region["region_id"] for description in descriptions for region in description["regions"]]
    assert len(ids) == len(set(ids))


def test_visual_genome_export_uses_name_of_region_without_phrases(tmp_path):
    folder = export_dataset(MinimalDataset(make_sample(1, 1, name="owl"), make_sample(2, 2)), tmp_path / "out", "vg")
    named, nameless = read_json(folder / "region_descriptions.json")
    assert [region["phrase"] for region in named["regions"]] == ["owl"]
    assert nameless["regions"] == []


@pytest.mark.parametrize("format", ["sa1b", "coco-captions", "vg-grit"])
def test_export_without_classes_writes_name_as_phrase(tmp_path, format):
    mask = encode_rle(np.ones((20, 30), bool))
    region = Region(1, (0.0, 0.0, 30.0, 20.0), mask, "owl")
    sample = Sample(Image.new("RGB", (30, 20)), 1, (region,))
    folder = export_dataset({"train": MinimalDataset(sample)}, tmp_path / "out", format)
    name = {"sa1b": "sa1b", "coco-captions": "coco-captions", "vg-grit": "visual-genome-grit"}[format]
    (read_back,) = datasets.build(name, "train", root=folder)
    assert [region.phrases for region in read_back.regions] == [("owl",)]


def test_refcoco_export_links_sentences_to_annotations(tmp_path):
    folder = export_dataset(SPLITS, tmp_path / "out", "refcoco")
    with contextlib.redirect_stdout(io.StringIO()):
        coco_api = COCO(folder / "instances.json")
    refs = pickle.loads((folder / "refs(unc).p").read_bytes())
    regions = {region.id: (split, s, region) for split in SPLITS for s in SPLITS[split] for region in s.regions}
    assert [ref["ann_id"] for ref in refs] == list(regions)
    for ref in refs:
        split, sample, region = regions[ref["ann_id"]]
        assert (ref["split"], ref["image_id"]) == (split, sample.image_id)
        assert ref["category_id"] == coco_api.anns[region.id]["category_id"]
        assert [sentence["raw"] for sentence in ref["sentences"]] == list(region.phrases)
        assert [sentence["sent_id"] for sentence in ref["sentences"]] == ref["sent_ids"]
        with Image.open(folder / "images" / coco_api.imgs[sample.image_id]["file_name"]) as saved_image:
            assert np.array_equal(saved_image, sample.image)
    assert len({number for ref in refs for number in ref["sent_ids"]}) == sum(len(ref["sent_ids"]) for ref in refs)


def test_refcoco_export_keeps_raw_sentence_and_tokens(tmp_path):
    folder = export_dataset(
        MinimalDataset(make_sample(1, 1, phrases=("The OWL, left!",)), make_sample(2, 2)), tmp_path / "out", "refcoco"
    )
    (ref,) = pickle.loads((folder / "refs(unc).p").read_bytes())
    assert ref["sentences"] == [
        {"raw": "The OWL, left!", "sent": "the owl left", "sent_id": 0, "tokens": ["the", "owl", "left"]}
    ]


@pytest.mark.parametrize("format", EXPORT_WRITERS)
def test_export_max_images_limits_each_split(tmp_path, format):
    folder = export_dataset(SPLITS, tmp_path / "out", format, max_images=1)
    image_files = [path for path in folder.rglob("*.[pj][np]g") if "annotations" not in path.parts]  # no segments
    assert len(image_files) == len(SPLITS)


@pytest.mark.parametrize("format", EXPORT_WRITERS)
def test_export_rejects_empty_dataset_and_leaves_no_files(tmp_path, format):
    with pytest.raises(EmptyDatasetError, match="no sample can be read"):
        export_dataset(MinimalDataset(), tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_export_uses_split_of_single_dataset(tmp_path):
    export_dataset(Scenes("test", num_images=1, image_size=64), tmp_path / "out", "coco")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"test.json", "test"}


def test_export_skips_unreadable_images(tmp_path):
    folder = export_dataset(SPLITS["train"], tmp_path / "one", "coco")
    next((folder / "train").iterdir()).write_bytes(b"")
    reexported = export_dataset(Coco("train", root=folder), tmp_path / "two", "coco")
    assert len(list((reexported / "train").iterdir())) == len(SPLITS["train"]) - 1


def test_export_accepts_empty_folder_and_rejects_full_one(tmp_path):
    (tmp_path / "out").mkdir()
    export_dataset(SPLITS, tmp_path / "out", "coco", max_images=1)
    with pytest.raises(OutputError, match="not a new or empty folder"):
        export_dataset(SPLITS, tmp_path / "out", "coco")
    with pytest.raises(ValueError, match="unknown format 'voc'; choose from coco, coco-captions, coco-panoptic, "):
        export_dataset(SPLITS, tmp_path / "new", "voc")


@pytest.mark.parametrize("format", EXPORT_WRITERS)
def test_failed_export_leaves_no_files(tmp_path, format):
    with pytest.raises(ValueError, match="image id 1 occurs twice in split 'train'; ids must be unique"):
        export_dataset(MinimalDataset(make_sample(), make_sample()), tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["vg", "refcoco"])
def test_export_rejects_region_ids_shared_by_splits(tmp_path, format):
    with pytest.raises(ValueError, match="region id 1 occurs in splits 'train' and 'val'; ids must be unique"):
        export_dataset(
            {"train": MinimalDataset(make_sample(1)), "val": MinimalDataset(make_sample(2))}, tmp_path / "out", format
        )
