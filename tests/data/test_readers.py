"""Every reader counts and reports the records it skips, in complete and in damaged files.

`export` writes each layout, and the tests damage it.
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
LONG_CAPTION = " ".join(f"word{number}" for number in range(10_000))
CAPTIONS_IN_OTHER_SCRIPTS = ["собака на снегу", "雪の上の犬", "كلب على الثلج", "בית", "🐕 naïve"]


class Layout(NamedTuple):
    """The files and fields of a layout."""

    format: str
    file: str  # contains the regions
    regions: Callable[[Any], list[dict]]
    box_field: str | None = "bbox"  # the field that a region's box depends on
    id_field: str = "id"
    caption_field: str | None = None  # the caption field of a region
    caption_records: tuple[str, Callable[[Any], list[dict]]] | None = (
        None  # the file and the records with that field, if different
    )
    has_categories: bool = False  # has categories
    split: str = "val"
    options: tuple[str, ...] = ("root={}",)


def get_annotations(content):
    return content["annotations"]


LAYOUTS = {
    "coco": Layout("coco", "val.json", get_annotations, caption_field="caption", has_categories=True),
    "visual-genome": Layout(
        "vg",
        "region_descriptions.json",
        lambda content: [region for image in content for region in image["regions"]],
        box_field="x",
        id_field="region_id",
        caption_field="phrase",
    ),
    "refcoco": Layout(
        "refcoco",
        "instances.json",
        get_annotations,
        caption_field="sent",
        caption_records=("refs(unc).json", lambda content: [ref["sentences"][0] for ref in content]),
        has_categories=True,
    ),
    "refcocog": Layout(
        "refcocog",
        "instances.json",
        get_annotations,
        caption_field="sent",
        caption_records=("refs(umd).json", lambda content: [ref["sentences"][0] for ref in content]),
        has_categories=True,
    ),
    "jsonl": Layout(
        "jsonl", "val.jsonl", lambda lines: lines, "box", caption_field="phrases", options=("file={}/val.jsonl",)
    ),
    "visual-genome-grit": Layout("vg-grit", "val.json", get_annotations, caption_field="caption"),
    "coco-captions": Layout(
        "coco-captions", "annotations/captions_val2017.json", get_annotations, None, caption_field="caption"
    ),
    "coco-panoptic": Layout(
        "coco-panoptic",
        "annotations/panoptic_val2017.json",
        lambda content: [segment for image in content["annotations"] for segment in image["segments_info"]],
        None,
        has_categories=True,
    ),
    "objects365": Layout("objects365", "annotations/zhiyuan_objv2_val.json", get_annotations, has_categories=True),
    "v3det": Layout("v3det", "annotations/v3det_2023_v1_val.json", get_annotations, has_categories=True),
    "sa1b": Layout(
        "sa1b",
        f"sa_{SCENES[0].image_id}.json",
        get_annotations,
        caption_records=(f"sa_{SCENES[0].image_id}.captions.json", lambda content: content),
        caption_field="caption",
        split="train",
    ),
}
LAYOUTS_WITH_CAPTIONS = [name for name, layout in LAYOUTS.items() if layout.caption_field]
LAYOUTS_WITH_BOXES = [name for name, layout in LAYOUTS.items() if layout.box_field]


def read_json_file(path):
    text = path.read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def write_json_file(path, content):
    is_jsonl = path.suffix == ".jsonl"
    text = "\n".join(map(json.dumps, content)) if is_jsonl else json.dumps(content, ensure_ascii=False)
    path.write_text(text, "utf-8")


class WrittenDataset:
    """A dataset in files that tests damage and read."""

    def __init__(self, name, folder):
        self.name, self.layout = name, LAYOUTS[name]
        self.root = export_dataset(SCENES, folder / "out", self.layout.format)
        for refs in self.root.glob("refs*.p"):
            write_json_file(refs.with_suffix(".json"), pickle.loads(refs.read_bytes()))
            refs.unlink()
        self.file = self.root / self.layout.file

    def open_dataset(self, split="", **options):
        split = split or self.layout.split
        layout_options = dict(option.format(self.root).split("=") for option in self.layout.options)
        return datasets.build(self.name, split, **layout_options, **options)

    def change_region(self, change, index=0):
        """Apply `change` to a region's record."""
        content = read_json_file(self.file)
        change(self.layout.regions(content)[index])
        write_json_file(self.file, content)

    def set_captions(self, *captions):
        """Set the only captions of the first regions and return the captions that were used."""
        separate_records = self.layout.caption_records and (
            self.root / self.layout.caption_records[0],
            self.layout.caption_records[1],
        )
        file, records = separate_records or (self.file, self.layout.regions)
        content = read_json_file(file)
        if self.name == "sa1b":  # refers to annotation ids
            content |= {key: [phrase] for key, phrase in zip(content, captions, strict=False)}
            write_json_file(file, content)
            return captions[: len(content)]
        for record, phrase in zip(records(content), captions, strict=False):
            is_list = isinstance(record[self.layout.caption_field], list)
            record[self.layout.caption_field] = [phrase] if is_list else phrase
        write_json_file(file, content)
        return captions[: len(records(content))]

    def list_images(self):
        paths = (*self.root.rglob("*.png"), *self.root.rglob("*.jpg"))
        return sorted(path for path in paths if "annotations" not in path.parts)


@pytest.fixture
def written_dataset(request, tmp_path, monkeypatch):
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "cache"))
    return WrittenDataset(request.param, tmp_path)


def parametrize_layouts(names=tuple(LAYOUTS)):
    return pytest.mark.parametrize("written_dataset", names, indirect=True)


def list_phrases(dataset):
    return [phrase for sample in dataset for region in sample.regions for phrase in region.phrases]


def test_readers_cover_all_export_formats():
    assert {layout.format for layout in LAYOUTS.values()} == set(EXPORT_WRITERS)


@parametrize_layouts()
def test_reader_reads_complete_layout(written_dataset):
    dataset = written_dataset.open_dataset()
    assert sorted(dataset.image_ids) == sorted(sample.image_id for sample in SCENES)
    assert not dataset.skipped
    if written_dataset.layout.caption_field:
        expected = [phrase for sample in SCENES for region in sample.regions for phrase in region.phrases]
        assert sorted(list_phrases(dataset)) == sorted(expected)
    if written_dataset.layout.has_categories:
        assert {name for sample in dataset for name in (region.name for region in sample.regions)} <= {
            region.name for sample in SCENES for region in sample.regions
        }


@parametrize_layouts()
@pytest.mark.slow
def test_reader_passes_conformance(written_dataset):
    layout_options = dict(option.format(written_dataset.root).split("=") for option in written_dataset.layout.options)
    findings = check_component("dataset", written_dataset.name, split=written_dataset.layout.split, **layout_options)
    assert [finding for finding in findings if not finding.passed] == []


@parametrize_layouts()
@pytest.mark.slow
def test_reader_resumes_interrupted_conversion_with_the_same_result(written_dataset, tmp_path, monkeypatch):
    written_dataset.list_images()[0].unlink()
    monkeypatch.setattr("sca.data.conversion.IMAGES_PER_SHARD", 1)
    uninterrupted = written_dataset.open_dataset()
    build_row, built_entries = type(uninterrupted)._build_row, []

    def build_row_or_stop(self, entry):
        built_entries.append(entry)
        if len(built_entries) == 2:
            raise KeyboardInterrupt
        return build_row(self, entry)

    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(type(uninterrupted), "_build_row", build_row_or_stop)
    with pytest.raises(KeyboardInterrupt):
        written_dataset.open_dataset()
    resumed = written_dataset.open_dataset()
    assert len(built_entries) == 4  # the first; the second, interrupted; then the second and the third
    assert resumed.metadata == uninterrupted.metadata
    assert [sample[1:] for sample in resumed] == [sample[1:] for sample in uninterrupted]


@parametrize_layouts()
def test_reader_reports_missing_file(written_dataset):
    for file in (
        written_dataset.file.parent.glob("sa_*.json") if written_dataset.name == "sa1b" else [written_dataset.file]
    ):
        file.unlink()
    with pytest.raises(
        ValueError, match="sa_" if written_dataset.name == "sa1b" else written_dataset.file.name.replace(".", r"\.")
    ):
        written_dataset.open_dataset()


@parametrize_layouts()
def test_reader_reports_truncated_file(written_dataset):
    complete_bytes = written_dataset.file.read_bytes()
    written_dataset.file.write_bytes(complete_bytes[: len(complete_bytes) // 2])
    with pytest.raises(ValueError, match=rf"{written_dataset.file.name}.* is not valid JSON: .*\bat (column )?\d+"):
        written_dataset.open_dataset(max_bad_records=0)


@parametrize_layouts(LAYOUTS_WITH_BOXES)
def test_reader_reports_region_without_box(written_dataset):
    written_dataset.change_region(
        lambda region: [region.pop(key, None) for key in (written_dataset.layout.box_field, "mask", "segmentation")]
    )
    with pytest.raises(
        ValueError,
        match=rf"{written_dataset.file.name}.*: no '{written_dataset.layout.box_field}'.*; (its keys are|it has): ",
    ):
        written_dataset.open_dataset(max_bad_records=0)


@parametrize_layouts(LAYOUTS_WITH_BOXES)
def test_reader_counts_boxes_outside_the_image_and_clips_those_across_its_edge(written_dataset):
    box_field, has_corner_boxes = written_dataset.layout.box_field, written_dataset.name == "jsonl"

    def make_box_change(x, end):
        if box_field == "x":
            return lambda region: region.update(x=x, width=end - x)
        return lambda region: region.update(
            {box_field: [x, 1, end if has_corner_boxes else end - x, 20]}, segmentation=None
        )

    num_regions = written_dataset.open_dataset().metadata["regions"]
    written_dataset.change_region(make_box_change(70, 80), 0)
    written_dataset.change_region(make_box_change(30, 66), 1)
    dataset = written_dataset.open_dataset()
    assert dataset.skipped == {"empty box": 1, "box clipped": 1}
    assert dataset.metadata["regions"] == num_regions - 1
    assert written_dataset.file.name in dataset.examples["empty box"][0]
    assert any(region.box[0] == 30 and region.box[2] == 64 for sample in dataset for region in sample.regions)


@parametrize_layouts()
def test_reader_counts_missing_and_corrupt_images_up_to_max_bad(written_dataset):
    first, second, third = written_dataset.list_images()
    first.unlink()
    second.write_bytes(second.read_bytes()[:200])
    dataset = written_dataset.open_dataset()
    assert dataset.skipped == {"image missing": 1}
    (sample,) = dataset
    assert str(sample.image_id) in third.stem
    assert dataset.skipped == {"image missing": 1, "image unreadable": 1}
    assert first.name in dataset.examples["image missing"][0]
    assert second.name in dataset.examples["image unreadable"][0]
    with pytest.raises(
        ValueError, match=r"2 images of .* more than max_bad_records=1; image missing: 1, .* unreadable: 1"
    ):
        list(written_dataset.open_dataset(max_bad_records=1))
    with pytest.raises(ValueError, match=r"1 images of .* more than max_bad_records=0"):
        written_dataset.open_dataset(max_bad_records=0)


@parametrize_layouts()
def test_reader_reports_repeated_id(written_dataset):
    content = read_json_file(written_dataset.file)
    first, second = written_dataset.layout.regions(content)[:2]
    second[written_dataset.layout.id_field] = first[written_dataset.layout.id_field]
    write_json_file(written_dataset.file, content)
    if written_dataset.name == "visual-genome":  # as in some published files
        dataset = written_dataset.open_dataset()
        assert dataset.skipped == {"duplicate region id": 1}
        assert f"region_id {first['region_id']}" in dataset.examples["duplicate region id"][0]
        return
    with pytest.raises(ValueError, match=rf"{written_dataset.file.name}.*\(id {first['id']}\): duplicate id"):
        written_dataset.open_dataset(max_bad_records=0)


@parametrize_layouts(LAYOUTS_WITH_CAPTIONS)
def test_reader_counts_empty_captions(written_dataset):
    original_phrases = list_phrases(written_dataset.open_dataset())
    written_dataset.set_captions("  \n")
    dataset = written_dataset.open_dataset()
    assert sum(dataset.skipped.values()) == 1
    assert set(dataset.skipped) <= {"blank phrase", "region without text"}
    assert len(list_phrases(dataset)) < len(original_phrases)
    assert all(dataset.examples.values())


@parametrize_layouts(LAYOUTS_WITH_CAPTIONS)
def test_reader_keeps_long_and_non_latin_captions(written_dataset):
    captions = written_dataset.set_captions(LONG_CAPTION, *CAPTIONS_IN_OTHER_SCRIPTS)
    dataset = written_dataset.open_dataset()
    assert set(captions) <= set(list_phrases(dataset))
    assert len(captions) > 2
    assert not dataset.skipped


@parametrize_layouts([name for name, layout in LAYOUTS.items() if layout.has_categories])
def test_reader_reports_category_without_name(written_dataset):
    content = read_json_file(written_dataset.file)
    written_dataset.layout.regions(content)[0]["category_id"] = 77
    write_json_file(written_dataset.file, content)
    with pytest.raises(
        ValueError, match=rf"{written_dataset.file.name}.*: category_id 77 has no name among the categories"
    ):
        written_dataset.open_dataset(max_bad_records=0)
    written_dataset.change_region(lambda region: region.update(category_id=1))
    content = read_json_file(written_dataset.file)
    del content["categories"][0]["name"]
    write_json_file(written_dataset.file, content)
    with pytest.raises(ValueError, match=rf"{written_dataset.file.name}: categories\[0\] \(id 1\): no 'name'"):
        written_dataset.open_dataset(max_bad_records=0)


@parametrize_layouts([name for name in LAYOUTS if name not in ("jsonl", "sa1b")])
def test_reader_reports_unknown_split(written_dataset):
    with pytest.raises(ValueError, match=r"split '?nowhere'?"):
        written_dataset.open_dataset("nowhere")


@parametrize_layouts([name for name in LAYOUTS if name != "visual-genome"])  # whose images are named by their ids
@pytest.mark.parametrize("name", [r"\u0000", "a" * 5000])
@pytest.mark.slow
def test_reader_counts_image_with_invalid_file_name_as_missing(written_dataset, name):
    image_name = written_dataset.list_images()[0].name
    for file in written_dataset.root.rglob("*.json*"):
        file.write_text(file.read_text("utf-8").replace(image_name, name), "utf-8")
    assert written_dataset.open_dataset().skipped == {"image missing": 1}


@parametrize_layouts(["coco-panoptic"])
@pytest.mark.parametrize("name", [r"\u0000", "a" * 5000])
def test_panoptic_reader_counts_segments_with_invalid_file_name_as_unreadable(written_dataset, name):
    text = written_dataset.file.read_text("utf-8")
    written_dataset.file.write_text(text.replace(next(written_dataset.root.rglob("*.png")).name, name), "utf-8")
    assert written_dataset.open_dataset().skipped == {"segments unreadable": 1}
