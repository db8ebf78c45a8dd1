"""Datasets find images under every spelling of their names and count missing images."""

import json
import unicodedata
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sca_registry import datasets

from sca.data.coco import CocoJson
from sca.data.jsonl import Jsonl
from sca.data.labeling_tools import LabelingToolDataset
from sca.data.sa1b import Sa1b

IMAGE_STEMS = st.text(st.sampled_from("ab é각Å +#&-"), min_size=1, max_size=5).filter(lambda name: name.strip() == name)
SPELLINGS = (
    lambda name: name,
    lambda name: name.replace("/", "\\"),
    lambda name: unicodedata.normalize("NFC", name),
    lambda name: unicodedata.normalize("NFD", name),
    quote,
    lambda name: f"images/{name}",
    lambda name: f"/data/local-files/?d=images/{quote(name)}",
    lambda name: f"D:\\photos\\images\\{name}",
)


def _write_image(path: Path, width: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, 8)).save(path)


def _write_coco(path: Path, *names: str) -> Path:
    images = [{"id": n, "file_name": name, "width": 8, "height": 8} for n, name in enumerate(names)]
    annotations = [{"id": n, "image_id": n, "category_id": 1, "bbox": [0, 0, 4, 4]} for n, _ in enumerate(names)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def _write_jsonl(path: Path, *names: str) -> Path:
    lines = ({"image": name, "box": [0, 0, 1, 8], "caption": "a thing"} for name in names)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(IMAGE_STEMS, st.sampled_from(SPELLINGS)), min_size=1, max_size=8, unique_by=lambda pair: pair[0])
)
@pytest.mark.slow
def test_jsonl_finds_images_in_every_spelling(stems_and_spellings):
    with TemporaryDirectory() as folder:
        root = Path(folder, "images")
        written_names = []
        for number, (stem, spell) in enumerate(stems_and_spellings):
            name = unicodedata.normalize(
                "NFD" if number % 2 else "NFC", f"{'sub/' if number % 3 else ''}{stem}{number}.png"
            )
            _write_image(root / name, width=number + 1)
            written_names.append(spell(name))
        dataset = Jsonl("val", file=_write_jsonl(Path(folder, "a.jsonl"), *written_names), image_root=root)
        assert [sample.image.width for sample in dataset] == list(range(1, len(stems_and_spellings) + 1))
        assert not dataset.skipped


@pytest.mark.parametrize(
    "name", ["sub\\a.png", "./sub/a.png", "images/sub/a.png", "/old/images/sub/a.png", "sub/%61.png"]
)
def test_coco_finds_image_in_every_spelling(tmp_path, name):
    _write_image(tmp_path / "images/sub/a.png")
    dataset = CocoJson("val", _write_coco(tmp_path / "a.json", name), tmp_path / "images")
    assert (len(dataset), dataset.skipped) == (1, {})
    assert len(list(dataset)) == 1


def test_coco_counts_urls_and_ambiguous_names_by_reason(tmp_path):
    for name in ("a.png", "images/a.png", "b.png", "c.png"):
        _write_image(tmp_path / name)
    names = ("https://host/c.png", "/old/a.png", "/train/b.png", "/val/b.png", "c.png", "d.png")
    dataset = CocoJson("val", _write_coco(tmp_path / "a.json", *names), tmp_path)
    assert dataset.skipped == {"image is a URL": 1, "image name ambiguous": 2, "image missing": 1}
    assert "is a URL, not a file" in dataset.examples["image is a URL"][0]
    ambiguous_example, conflict_example = dataset.examples["image name ambiguous"]
    assert all(str(tmp_path / name) in ambiguous_example for name in ("a.png", "images/a.png"))
    assert "'/val/b.png' and '/train/b.png' both refer to" in conflict_example
    assert len(dataset) == 2
    (tmp_path / "images/a.png").unlink()  # resolves the ambiguity, so that the table is converted again
    assert len(CocoJson("val", tmp_path / "a.json", tmp_path)) == 3


def test_jsonl_resolves_image_names_through_symlinks(tmp_path):
    _write_image(tmp_path / "store/a.png")
    _write_image(tmp_path / "a.png", width=3)
    (tmp_path / "store/deep").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root/link").symlink_to(tmp_path / "store/deep")
    dataset = Jsonl("val", _write_jsonl(tmp_path / "a.jsonl", "link/../a.png"), tmp_path / "root")
    assert dataset[0].image.width == 8


def test_sa1b_finds_images_below_symlinks_once(tmp_path):
    store = tmp_path / "store"
    _write_image(store / "sa_1.jpg")
    annotation = {"id": 1, "bbox": [0, 0, 4, 4], "caption": "a thing"}
    image = {"image_id": 1, "file_name": "sa_1.jpg", "width": 8, "height": 8}
    (store / "sa_1.json").write_text(json.dumps({"image": image, "annotations": [annotation]}))
    root = tmp_path / "root"
    root.mkdir()
    (root / "one").symlink_to(store)
    (root / "two").symlink_to(store)
    (store / "loop").symlink_to(root)
    assert len(Sa1b("train", root)) == 1


@pytest.mark.parametrize("name", ["coco", "coco-json", "jsonl"])
def test_datasets_expand_home_directory(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    _write_image(tmp_path / "data/val/a.png")
    _write_coco(tmp_path / "data/val.json", "a.png")
    _write_jsonl(tmp_path / "data/val.jsonl", "a.png")
    options = {
        "coco": {"root": "~/data"},
        "coco-json": {"annotations": "~/data/val.json", "image_root": "~/data/val"},
        "jsonl": {"file": "~/data/val.jsonl", "image_root": "~/data/val"},
    }
    assert len(datasets.build(name, "val", **options[name])) == 1


def _write_label_studio(path: Path, *names: str) -> Path:
    common_fields = {"original_width": 8, "original_height": 8, "type": "rectanglelabels", "to_name": "image"}
    value = {"x": 0, "y": 0, "width": 50, "height": 50, "rectanglelabels": ["thing"]}
    tasks = [
        {"data": {"image": name}, "annotations": [{"result": [{**common_fields, "value": value}]}]} for name in names
    ]
    path.write_text(json.dumps(tasks))
    return path


READERS = {
    "jsonl": lambda folder, split, *names: Jsonl(split, _write_jsonl(folder / "a.jsonl", *names), val_fraction=0.3),
    "coco": lambda folder, split, *names: CocoJson(
        split, _write_coco(folder / "a.json", *names), folder, val_fraction=0.3
    ),
    "label-studio": lambda folder, split, *names: LabelingToolDataset(
        split, _write_label_studio(folder / "a.json", *names), val_fraction=0.3
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_dataset_merges_spellings_of_a_file_before_splitting(tmp_path, reader):
    for number in range(12):
        _write_image(tmp_path / f"im/{number}.png")
    names = [spelling for number in range(12) for spelling in (f"im/{number}.png", f"im\\{number}.png")]
    train, val = (READERS[reader](tmp_path, split, *names) for split in ("train", "val"))
    assert (len(train), len(val)) == (8, 4)
    assert not set(train._table["file"]) & set(val._table["file"])
    assert [len(regions) for dataset in (train, val) for regions in dataset.iter_annotations()] == [2] * 12
    assert not train.skipped


@pytest.mark.parametrize("names", [("a.png", "/data/val/a.png"), ("/data/val/a.png", "a.png")])
@pytest.mark.parametrize("reader", READERS)
def test_dataset_counts_image_names_that_resolve_to_the_same_file(tmp_path, reader, names):
    for name in ("a.png", "b.png", "c.png", "d.png"):
        _write_image(tmp_path / name)
    split_datasets = [READERS[reader](tmp_path, split, *names, "b.png", "c.png", "d.png") for split in ("train", "val")]
    assert sum(map(len, split_datasets)) == 4
    assert sum(dataset.skipped["image name ambiguous"] for dataset in split_datasets) == 1


def test_dataset_rejects_records_of_one_file_with_different_sizes(tmp_path):
    _write_image(tmp_path / "im/a.png")
    path = _write_coco(tmp_path / "a.json", "im/a.png", "im\\a.png")
    path.write_text(path.read_text().replace('"width": 8', '"width": 9', 1))
    dataset = CocoJson("train", path, tmp_path)
    assert dataset.skipped["unusable image"] == 1
    assert [len(regions) for regions in dataset.iter_annotations()] == [1]
