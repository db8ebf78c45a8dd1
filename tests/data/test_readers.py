"""What every reader promises of files, whole and damaged: nothing is lost without being counted and named.

Each layout is written by `export` and damaged afterwards.
"""

import json
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from sca_registry import datasets

from sca.data.export import EXPORT_WRITERS, export_dataset
from sca.data.scenes import Scenes
from sca.testing.conformance import check_component

SCENES = Scenes("val", num_images=3, image_size=64, seed=4)
LONG = " ".join(f"word{number}" for number in range(10_000))
SCRIPTS = ["собака на снегу", "雪の上の犬", "كلب على الثلج", "בית", "🐕 naïve"]


class Layout(NamedTuple):
    """Where the parts of a layout are; a record is found in the content of its file."""

    format: str
    file: str  # has the regions
    regions: Callable[[Any], list[dict]]
    box: str | None = "bbox"  # a field that a region's box is not known without
    identity: str = "id"
    words: str | None = None  # the field with what is said of a region
    told: tuple[str, Callable[[Any], list[dict]]] | None = None  # the file and the records with that field, if others
    named: bool = False  # by categories
    split: str = "val"
    options: tuple[str, ...] = ("root={}",)


def annotations(content):
    return content["annotations"]


LAYOUTS = {
    "coco": Layout("coco", "val.json", annotations, words="caption", named=True),
    "visual-genome": Layout(
        "vg",
        "region_descriptions.json",
        lambda content: [region for image in content for region in image["regions"]],
        box="x",
        identity="region_id",
        words="phrase",
    ),
    "refcoco": Layout(
        "refcoco",
        "instances.json",
        annotations,
        words="sent",
        told=("refs(unc).json", lambda content: [ref["sentences"][0] for ref in content]),
        named=True,
    ),
    "jsonl": Layout("jsonl", "val.jsonl", lambda lines: lines, "box", words="phrases", options=("file={}/val.jsonl",)),
    "visual-genome-grit": Layout("vg-grit", "val.json", annotations, words="caption"),
    "coco-captions": Layout("coco-captions", "annotations/captions_val2017.json", annotations, None, words="caption"),
    "coco-panoptic": Layout(
        "coco-panoptic",
        "annotations/panoptic_val2017.json",
        lambda content: [segment for image in content["annotations"] for segment in image["segments_info"]],
        None,
        named=True,
    ),
    "objects365": Layout("objects365", "annotations/zhiyuan_objv2_val.json", annotations, named=True),
    "v3det": Layout("v3det", "annotations/v3det_2023_v1_val.json", annotations, named=True),
    "sa1b": Layout(
        "sa1b",
        f"sa_{SCENES[0].image_id}.json",
        annotations,
        told=(f"sa_{SCENES[0].image_id}.captions.json", lambda content: content),
        words="caption",
        split="train",
    ),
}
SAID = [name for name, layout in LAYOUTS.items() if layout.words]
BOXED = [name for name, layout in LAYOUTS.items() if layout.box]


def read(path):
    text = path.read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def write(path, content):
    lines = path.suffix == ".jsonl"
    text = "\n".join(map(json.dumps, content)) if lines else json.dumps(content, ensure_ascii=False)
    path.write_text(text, "utf-8")


class Written:
    """A dataset in files that can be damaged and read."""

    def __init__(self, name, folder):
        self.name, self.layout = name, LAYOUTS[name]
        self.root = export_dataset(SCENES, folder / "out", self.layout.format)
        for refs in self.root.glob("refs*.p"):
            write(refs.with_suffix(".json"), pickle.loads(refs.read_bytes()))
            refs.unlink()
        self.file = self.root / self.layout.file

    def open(self, split="", **options):
        split = split or self.layout.split
        given = dict(option.format(self.root).split("=") for option in self.layout.options)
        return datasets.build(self.name, split, **given, **options)

    def change(self, change, place=0):
        """Applies `change` to a region's record."""
        content = read(self.file)
        change(self.layout.regions(content)[place])
        write(self.file, content)

    def say(self, *words):
        """Has these said of the first regions, of each nothing else, and gives those for which there were regions."""
        told = self.layout.told and (self.root / self.layout.told[0], self.layout.told[1])
        file, records = told or (self.file, self.layout.regions)
        content = read(file)
        if self.name == "sa1b":  # by the ids of annotations
            content |= {key: [phrase] for key, phrase in zip(content, words, strict=False)}
            write(file, content)
            return words[: len(content)]
        for record, phrase in zip(records(content), words, strict=False):
            listed = isinstance(record[self.layout.words], list)
            record[self.layout.words] = [phrase] if listed else phrase
        write(file, content)
        return words[: len(records(content))]

    def pictures(self):
        kinds = (*self.root.rglob("*.png"), *self.root.rglob("*.jpg"))
        return sorted(path for path in kinds if "annotations" not in path.parts)


@pytest.fixture
def written(request, tmp_path, monkeypatch):
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "cache"))
    return Written(request.param, tmp_path)


def each(names=tuple(LAYOUTS)):
    return pytest.mark.parametrize("written", names, indirect=True)


def spoken(dataset):
    return [phrase for sample in dataset for region in sample.regions for phrase in region.phrases]


def test_every_format_that_is_written_is_read_here():
    assert {layout.format for layout in LAYOUTS.values()} == set(EXPORT_WRITERS)


@each()
def test_a_whole_layout_is_read_whole(written):
    dataset = written.open()
    assert sorted(dataset.image_ids) == sorted(sample.image_id for sample in SCENES)
    assert not dataset.skipped
    if written.layout.words:
        expected = [phrase for sample in SCENES for region in sample.regions for phrase in region.phrases]
        assert sorted(spoken(dataset)) == sorted(expected)
    if written.layout.named:
        assert {name for sample in dataset for name in (region.name for region in sample.regions)} <= {
            region.name for sample in SCENES for region in sample.regions
        }


@each()
@pytest.mark.slow
def test_it_keeps_the_promises_of_a_dataset(written):
    given = dict(option.format(written.root).split("=") for option in written.layout.options)
    findings = check_component("dataset", written.name, split=written.layout.split, **given)
    assert [finding for finding in findings if not finding.passed] == []


@each()
@pytest.mark.slow
def test_a_conversion_that_is_stopped_goes_on_and_comes_to_the_same(written, tmp_path, monkeypatch):
    written.pictures()[0].unlink()
    monkeypatch.setattr("sca.data.conversion.IMAGES_PER_SHARD", 1)
    whole = written.open()
    record, made = type(whole)._build_row, []

    def stopping(self, entry):
        made.append(entry)
        if len(made) == 2:
            raise KeyboardInterrupt
        return record(self, entry)

    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(type(whole), "_build_row", stopping)
    with pytest.raises(KeyboardInterrupt):
        written.open()
    resumed = written.open()
    assert len(made) == 4  # the first; the second, which was stopped; and after it the second and the third
    assert resumed.metadata == whole.metadata
    assert [sample[1:] for sample in resumed] == [sample[1:] for sample in whole]


@each()
def test_a_file_that_is_missing_is_named(written):
    for file in written.file.parent.glob("sa_*.json") if written.name == "sa1b" else [written.file]:
        file.unlink()
    with pytest.raises(ValueError, match="sa_" if written.name == "sa1b" else written.file.name.replace(".", r"\.")):
        written.open()


@each()
def test_a_file_that_is_cut_in_the_middle_is_named(written):
    whole = written.file.read_bytes()
    written.file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{written.file.name}.* is not valid JSON: .*\bat (column )?\d+"):
        written.open(max_bad=0)


@each(BOXED)
def test_a_region_without_a_box_is_named(written):
    written.change(lambda region: [region.pop(key, None) for key in (written.layout.box, "mask", "segmentation")])
    with pytest.raises(ValueError, match=rf"{written.file.name}.*: no '{written.layout.box}'; it has: "):
        written.open(max_bad=0)


@each(BOXED)
def test_a_box_outside_is_counted_and_one_over_the_edge_clipped(written):
    box, corners = written.layout.box, written.name == "jsonl"

    def move(x, end):
        if box == "x":
            return lambda region: region.update(x=x, width=end - x)
        return lambda region: region.update({box: [x, 1, end if corners else end - x, 20]}, segmentation=None)

    whole = written.open().metadata["regions"]
    written.change(move(70, 80), 0)
    written.change(move(30, 66), 1)
    dataset = written.open()
    assert dataset.skipped == {"empty box": 1, "box clipped": 1}
    assert dataset.metadata["regions"] == whole - 1
    assert written.file.name in dataset.examples["empty box"][0]
    assert any(region.box[0] == 30 and region.box[2] == 64 for sample in dataset for region in sample.regions)


@each()
def test_pictures_that_are_missing_or_corrupt_are_counted_and_too_many_stop(written):
    first, second, third = written.pictures()
    first.unlink()
    second.write_bytes(second.read_bytes()[:200])
    dataset = written.open()
    assert dataset.skipped == {"image missing": 1}
    (sample,) = dataset
    assert str(sample.image_id) in third.stem
    assert dataset.skipped == {"image missing": 1, "image unreadable": 1}
    assert first.name in dataset.examples["image missing"][0]
    assert second.name in dataset.examples["image unreadable"][0]
    with pytest.raises(ValueError, match=r"2 images of .* more than max_bad=1; image missing: 1, .* unreadable: 1"):
        list(written.open(max_bad=1))
    with pytest.raises(ValueError, match=r"1 images of .* more than max_bad=0"):
        written.open(max_bad=0)


@each()
def test_an_id_that_is_given_twice_is_named(written):
    content = read(written.file)
    first, second = written.layout.regions(content)[:2]
    second[written.layout.identity] = first[written.layout.identity]
    write(written.file, content)
    if written.name == "visual-genome":  # as published, some are
        dataset = written.open()
        assert dataset.skipped == {"region id repeated": 1}
        assert f"region_id {first['region_id']}" in dataset.examples["region id repeated"][0]
        return
    with pytest.raises(ValueError, match=rf"{written.file.name}.*\(id {first['id']}\): this id was given before"):
        written.open(max_bad=0)


@each(SAID)
def test_an_empty_caption_is_counted(written):
    whole = spoken(written.open())
    written.say("  \n")
    dataset = written.open()
    assert sum(dataset.skipped.values()) == 1
    assert set(dataset.skipped) <= {"blank phrase", "region without text"}
    assert len(spoken(dataset)) < len(whole)
    assert all(dataset.examples.values())


@each(SAID)
def test_long_captions_and_those_in_any_script_are_kept_as_they_are(written):
    said = written.say(LONG, *SCRIPTS)
    dataset = written.open()
    assert set(said) <= set(spoken(dataset))
    assert len(said) > 2
    assert not dataset.skipped


@each([name for name, layout in LAYOUTS.items() if layout.named])
def test_a_category_without_a_name_is_named(written):
    content = read(written.file)
    written.layout.regions(content)[0]["category_id"] = 77
    write(written.file, content)
    with pytest.raises(ValueError, match=rf"{written.file.name}.*: category_id 77 has no name among the categories"):
        written.open(max_bad=0)
    written.change(lambda region: region.update(category_id=1))
    content = read(written.file)
    del content["categories"][0]["name"]
    write(written.file, content)
    with pytest.raises(ValueError, match=rf"{written.file.name}: categories\[0\] \(id 1\): no 'name'"):
        written.open(max_bad=0)


@each([name for name in LAYOUTS if name not in ("jsonl", "sa1b")])
def test_a_split_that_is_not_there_is_named(written):
    with pytest.raises(ValueError, match=r"split '?nowhere'?"):
        written.open("nowhere")


@each([name for name in LAYOUTS if name != "visual-genome"])  # whose pictures are called by their ids
@pytest.mark.parametrize("name", [r"\u0000", "a" * 5000])
@pytest.mark.slow
def test_a_name_that_no_file_can_have_is_that_of_a_missing_picture(written, name):
    picture = written.pictures()[0].name
    for file in written.root.rglob("*.json*"):
        file.write_text(file.read_text("utf-8").replace(picture, name), "utf-8")
    assert written.open().skipped == {"image missing": 1}


@each(["coco-panoptic"])
@pytest.mark.parametrize("name", [r"\u0000", "a" * 5000])
def test_a_name_that_no_file_can_have_is_that_of_unreadable_segments(written, name):
    text = written.file.read_text("utf-8")
    written.file.write_text(text.replace(next(written.root.rglob("*.png")).name, name), "utf-8")
    assert written.open().skipped == {"segments unreadable": 1}
