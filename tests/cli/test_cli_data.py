"""`sca data`: statistics of a dataset in the terminal and as a page."""

import json
import re

import pytest

from sca.data.export import export_dataset
from sca.data.scenes import Scenes


@pytest.fixture
def coco_folder(tmp_path):
    return export_dataset({"val": Scenes("val", num_images=6, image_size=64)}, tmp_path / "root", "coco")


def test_data_stats_reports_counts_and_skipped_images(coco_folder, run_sca):
    next((coco_folder / "val").iterdir()).unlink()
    json_result = run_sca("data", "stats", "coco", f"root='{coco_folder}'", "--json")
    statistics = json.loads(json_result.out)
    assert statistics["num_images"] == 5
    assert statistics["skipped"] == {"image missing": 1}
    assert len(statistics["skipped_examples"]["image missing"]) == 1
    text_result = run_sca("data", "stats", "coco", f"root='{coco_folder}'")
    assert text_result.status == 0
    assert "image missing 1" in text_result.out


def test_data_stats_reads_images_only_with_check_images(coco_folder, run_sca):
    next((coco_folder / "val").iterdir()).write_bytes(b"not an image")
    for flags, skipped in ([], {}), (["--check-images"], {"image unreadable": 1}):
        assert (
            json.loads(run_sca("data", "stats", "coco", f"root='{coco_folder}'", "--json", *flags).out)["skipped"]
            == skipped
        )
    limit_result = run_sca("data", "stats", "coco", f"root='{coco_folder}'", "max_bad_records=0", "--check-images")
    assert limit_result.status == 2
    assert "more than max_bad_records=0; image unreadable: 1" in limit_result.err[0]


def test_data_view_shows_samples_before_and_after_augmentation(coco_folder, run_sca, working_folder):
    scenes = Scenes("val", num_images=6, image_size=64)
    result = run_sca(
        "data",
        "view",
        "coco",
        f"root='{coco_folder}'",
        "--num-images",
        2,
        "--augment",
        "{flip_prob=1.0}",
        "--out",
        "page.html",
    )
    assert result.status == 0, result.err
    page = (working_folder / "page.html").read_text()
    assert page.count("<section") == 4
    assert page.count("augmented</h2>") == 2
    assert any(phrase in page for sample in scenes for region in sample.regions for phrase in region.phrases)
    typo_result = run_sca("data", "view", "coco", f"root='{coco_folder}'", "--augment", "{flop_prob=1.0}")
    assert typo_result.status == 2
    assert "unknown key 'flop_prob' in --augment. Did you mean 'flip_prob'" in typo_result.err[0]


@pytest.mark.parametrize("folder", [".", "/", "there"])
def test_data_view_does_not_overwrite_a_folder(run_sca, working_folder, folder):
    (working_folder / "there").mkdir()
    result = run_sca("data", "view", "scenes", "num_images=1", "--num-images", 1, "--out", folder)
    assert result.status == 2
    assert result.err[1:] == [f"sca: cannot write {folder}: Is a directory; choose another folder"]


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("command", ["view", "export"])
def test_data_view_and_export_reject_dataset_without_readable_images(run_sca, working_folder, command, damaged):
    record = {"image": "a.png", "box": [0, 0, 4, 4], "caption": "a dog", "width": 8, "height": 8}
    (working_folder / "mine.jsonl").write_text(json.dumps(record))
    if damaged:
        (working_folder / "a.png").write_bytes(b"damaged")
    out_arguments = ["out"] if command == "export" else ["--out", "out.html"]
    result = run_sca("data", command, "jsonl", *out_arguments, "file=mine.jsonl", "--split", "train")
    assert result.status == 1
    assert re.search("image unreadable: .*a.png" if damaged else "1 image missing: a.png", result.err[-1])
    assert not result.out
    assert not (working_folder / "out").exists()


def test_data_view_reports_number_of_images_read(run_sca, working_folder):
    result = run_sca("data", "view", "scenes", "num_images=2", "image_size=64", "--out", "out.html")
    assert (result.status, result.err) == (0, ["sca: scenes val: 2 images"])
