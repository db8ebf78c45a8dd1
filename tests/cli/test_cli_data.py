"""`sca data`: what a dataset holds, as numbers and as a page."""

import json
import re

import pytest

from sca.data.export import export_dataset
from sca.data.scenes import Scenes


@pytest.fixture
def root(tmp_path):
    return export_dataset({"val": Scenes("val", num_images=6, image_size=64)}, tmp_path / "root", "coco")


def test_the_command_tells_them_and_what_was_left_out(root, shell):
    next((root / "val").iterdir()).unlink()
    told = shell("data", "stats", "coco", f"root='{root}'", "--json")
    found = json.loads(told.out)
    assert found["images"] == 5
    assert found["skipped"] == {"image missing": 1}
    assert len(found["examples"]["image missing"]) == 1
    table = shell("data", "stats", "coco", f"root='{root}'")
    assert table.status == 0
    assert "image missing 1" in table.out


def test_pictures_are_opened_when_that_is_asked_for(root, shell):
    next((root / "val").iterdir()).write_bytes(b"no picture")
    for option, skipped in ([], {}), (["--check-images"], {"image unreadable": 1}):
        assert json.loads(shell("data", "stats", "coco", f"root='{root}'", "--json", *option).out)["skipped"] == skipped
    too_many = shell("data", "stats", "coco", f"root='{root}'", "max_bad=0", "--check-images")
    assert too_many.status == 2
    assert "more than max_bad=0; image unreadable: 1" in too_many.err[0]


def test_a_page_shows_samples_before_and_after_augmentation(root, shell, here):
    scenes = Scenes("val", num_images=6, image_size=64)
    told = shell(
        "data", "view", "coco", f"root='{root}'", "--limit", 2, "--augment", "{flip=1.0}", "--out", "page.html"
    )
    assert told.status == 0, told.err
    page = (here / "page.html").read_text()
    assert page.count("<section") == 4
    assert page.count("augmented</h2>") == 2
    assert any(phrase in page for sample in scenes for region in sample.regions for phrase in region.phrases)
    wrong = shell("data", "view", "coco", f"root='{root}'", "--augment", "{flop=1.0}")
    assert wrong.status == 2
    assert "--augment has no 'flop'. Did you mean 'flip'" in wrong.err[0]


@pytest.mark.parametrize("folder", [".", "/", "there"])
def test_a_page_is_not_written_over_a_folder(shell, here, folder):
    (here / "there").mkdir()
    told = shell("data", "view", "scenes", "num_images=1", "--limit", 1, "--out", folder)
    assert told.status == 2
    assert told.err[1:] == [f"sca: cannot write {folder}: Is a directory; choose another folder"]


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("command", ["view", "export"])
def test_data_view_and_export_reject_a_dataset_without_images(shell, here, command, damaged):
    line = {"image": "a.png", "box": [0, 0, 4, 4], "caption": "a dog", "width": 8, "height": 8}
    (here / "mine.jsonl").write_text(json.dumps(line))
    if damaged:
        (here / "a.png").write_bytes(b"damaged")
    where = ["out"] if command == "export" else ["--out", "out.html"]
    found = shell("data", command, "jsonl", *where, "file=mine.jsonl", "--split", "train")
    assert found.status == 1
    assert re.search("image unreadable: .*a.png" if damaged else "1 image missing: a.png", found.err[-1])
    assert not found.out
    assert not (here / "out").exists()


def test_data_view_reports_what_it_read(shell, here):
    found = shell("data", "view", "scenes", "num_images=2", "image_size=64", "--out", "out.html")
    assert (found.status, found.err) == (0, ["sca: scenes val: 2 images"])
