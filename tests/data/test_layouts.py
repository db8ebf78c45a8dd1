"""Every layout: what was written is read, and what is wrong with it is named or counted, never passed over."""

import json
import random
import shutil

import pytest
from PIL import Image
from sca_registry import datasets

from sca.conformance import check
from sca.data.export import export
from sca.data.scenes import Scenes

SPLITS = {"train": Scenes("train", count=5, size=64)}
LAYOUTS = {  # by the name of the reader: the format, and the file that messages name
    "coco": ("coco", "train.json"),
    "coco-captions": ("coco-captions", "annotations/captions_train2017.json"),
    "coco-panoptic": ("coco-panoptic", "annotations/panoptic_train2017.json"),
    "objects365": ("objects365", "annotations/zhiyuan_objv2_train.json"),
    "v3det": ("v3det", "annotations/v3det_2023_v1_train.json"),
    "visual-genome-grit": ("vg-grit", "train.json"),
    "sa1b": ("sa1b", "sa_{first}.json"),
}
every_layout = pytest.mark.parametrize("name", LAYOUTS)


@pytest.fixture
def written(tmp_path, name):
    """A folder in the layout, and its file."""
    format, file = LAYOUTS[name]
    root = export(SPLITS, tmp_path / "root", format)
    first = sorted(int(path.stem[3:]) for path in root.glob("sa_*.jpg")) or [""]
    return root, root / file.format(first=first[0])


def changed(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def annotations(content):
    first = content["annotations"][0]
    return first["segments_info"] if "segments_info" in first else content["annotations"]


@every_layout
def test_what_was_written_is_read(written, name):
    root, _ = written
    found = datasets.build(name, "train", root=root)
    assert len(found) == 5
    assert not found.skipped
    for sample, truth in zip(found, SPLITS["train"], strict=True):
        assert sample.image_id == truth.image_id
        told = {phrase.lower() for region in sample.regions for phrase in region.phrases}
        names = {region.name for region in sample.regions}
        true_names = {region.name for region in truth.regions}
        true_phrases = {phrase.lower() for region in truth.regions for phrase in region.phrases}
        assert told == (set() if name in ("coco-panoptic", "objects365", "v3det") else true_phrases)
        assert names == ({None} if name in ("coco-captions", "visual-genome-grit", "sa1b") else true_names)
        boxes = {tuple(map(round, region.box)) for region in truth.regions}
        if name == "coco-captions":
            assert [region.box for region in sample.regions] == [(0, 0, 64, 64)]
        else:
            ours = {tuple(map(round, region.box)) for region in sample.regions}
            assert ours == boxes or name == "coco-panoptic"
        if name in ("coco", "coco-panoptic", "sa1b"):
            assert all(region.mask for region in sample.regions)


@every_layout
def test_a_reader_keeps_the_promises_of_a_dataset(written, name):
    root, _ = written
    broken = [finding for finding in check("datasets", name, split="train", root=str(root)) if not finding.passed]
    assert broken == []


@every_layout
def test_a_missing_file_is_named(written, name):
    root, file = written
    for path in root.rglob("*.json"):
        path.unlink()
    with pytest.raises(ValueError, match="no SA-1B in" if name == "sa1b" else f"looked for .*{file.name}"):
        datasets.build(name, "train", root=root)


@every_layout
def test_a_file_that_is_cut_in_the_middle_is_named(written, name):
    root, file = written
    whole = file.read_bytes()
    draw = random.Random(name)
    for length in {1, len(whole) // 2, len(whole) - 1, *draw.sample(range(2, len(whole)), 5)}:
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{file.name}.*is not whole JSON"):
            datasets.build(name, "train", root=root)


@every_layout
def test_pictures_that_are_missing_or_corrupt_are_counted_and_too_many_stop(written, name):
    root, _ = written
    pictures = sorted(path for path in root.rglob("*.[pj][np]g") if "annotations" not in path.parts)
    pictures[0].unlink()
    pictures[1].write_bytes(b"no picture")
    found = datasets.build(name, "train", root=root)
    assert len(list(found)) == 3
    assert found.skipped["image missing"] == found.skipped["image unreadable"] == 1
    assert pictures[0].name in found.examples["image missing"][0]
    with pytest.raises(ValueError, match="more than max_bad=0"):
        list(datasets.build(name, "train", root=root, max_bad=0))


@every_layout
def test_words_are_taken_as_they_are(written, name):
    root, file = written
    texts = [" ".join(["word"] * 10_000), "猫が二匹 😺", "قطة", "   "]

    def told(content):
        if name in ("coco-panoptic", "objects365", "v3det"):
            for category, text in zip(content["categories"], texts[:3], strict=False):
                category["name"] = text
        else:
            for annotation, text in zip(annotations(content), texts, strict=False):
                annotation["caption"] = text

    changed(file, told)
    if name == "sa1b":
        file.with_suffix(".captions.json").unlink()
    found = datasets.build(name, "train", root=root)
    seen = {text for sample in found for region in sample.regions for text in (region.name, *region.phrases)}
    assert set(texts[:2]) <= seen
    assert not any(text is not None and not text.strip() for text in seen)


ROWS = [name for name in LAYOUTS if name != "coco-captions"]  # whose annotations have boxes or segments


@pytest.mark.parametrize("name", ROWS)
def test_a_region_without_a_box_stops_and_one_outside_is_counted(written, name):
    root, file = written
    if name == "coco-panoptic":
        changed(file, lambda content: annotations(content)[0].update(id=99_999))
        assert datasets.build(name, "train", root=root).skipped == {
            "segment without a pixel": 1,
            "pixels of no segment": 1,
        }
        return
    changed(file, lambda content: annotations(content)[0].update(bbox=[200, 200, 9, 9], segmentation=[]))
    found = datasets.build(name, "train", root=root)
    assert found.skipped["empty box"] == 1
    assert "annotations[0]" in found.examples["empty box"][0]
    changed(file, lambda content: annotations(content)[0].pop("bbox"))
    with pytest.raises(ValueError, match=rf"{file.name}: annotations\[0\] \(id \d+\): no 'bbox'"):
        datasets.build(name, "train", root=root)


@every_layout
def test_an_id_that_is_given_twice_is_refused(written, name):
    root, file = written
    what = "images" if name == "coco-panoptic" else "annotations"
    changed(file, lambda content: content[what].append(content[what][0]))
    with pytest.raises(ValueError, match=rf"{what}\[\d+\] \(id \d+\): this id was given before"):
        datasets.build(name, "train", root=root)


@pytest.mark.parametrize("name", ["coco", "coco-panoptic", "objects365", "v3det"])
def test_a_category_without_a_name_is_refused(written, name):
    root, file = written
    changed(file, lambda content: annotations(content)[0].update(category_id=77))
    with pytest.raises(ValueError, match="category_id 77 has no name among the categories"):
        datasets.build(name, "train", root=root)


@pytest.mark.parametrize("name", ["coco-panoptic"])
def test_segments_that_cannot_be_read_are_counted(written, name):
    root, _ = written
    first, second, *_ = sorted((root / "annotations").rglob("*.png"))
    first.write_bytes(b"no picture")
    Image.new("RGB", (3, 3)).save(second)
    found = datasets.build(name, "train", root=root)
    assert found.skipped["segments unreadable"] == found.skipped["segments of another size"] == 1
    shutil.rmtree(root / "annotations/panoptic_train2017")
    with pytest.raises(ValueError, match=r"there is no folder .*panoptic_train2017"):
        datasets.build(name, "train", root=root)


@pytest.mark.parametrize("name", ["v3det"])
def test_underscores_in_names_are_read_as_spaces(written, name):
    root, file = written
    changed(file, lambda content: content["categories"][0].update(name="aerosol_can"))
    assert "aerosol can" in datasets.build(name, "train", root=root).attributes["name"]


@pytest.mark.parametrize("name", ["sa1b"])
def test_masks_without_words_and_captions_without_masks_are_counted(written, name):
    root, file = written
    captions = file.with_suffix(".captions.json")
    first = next(iter(json.loads(captions.read_text())))
    changed(captions, lambda content: content.update({"777": ["a thing"], first: "  "}))
    found = datasets.build(name, "train", root=root)
    assert found.skipped == {"region without words": 1, "caption of no mask": 1}
    with pytest.raises(ValueError, match="SA-1B has one split, train, and 'val' was asked for"):
        datasets.build(name, "val", root=root)


@pytest.mark.parametrize("name", ["sa1b"])
def test_a_picture_in_two_folders_is_refused(written, name):
    root, file = written
    (root / "again").mkdir()
    shutil.copy(file, root / "again")
    with pytest.raises(ValueError, match=rf"{file.name} is the same picture as .*{file.name}"):
        datasets.build(name, "train", root=root)
