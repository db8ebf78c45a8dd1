"""What a dataset holds is counted, and its samples can be looked at."""

import json

import pytest
from sca_registry import datasets

from sca.data.export import export_dataset
from sca.data.scenes import Scenes
from sca.data.stats import compute_dataset_stats


@pytest.fixture
def root(tmp_path):
    return export_dataset({"val": Scenes("val", num_images=6, image_size=64)}, tmp_path / "root", "coco")


def test_numbers_are_those_of_the_samples_and_no_picture_is_opened(root):
    scenes = Scenes("val", num_images=6, image_size=64)
    regions = [region for sample in scenes for region in sample.regions]
    dataset = datasets.build("coco", "val", root=root)
    for picture in root.rglob("*.png"):
        picture.write_bytes(b"")
    for found in (compute_dataset_stats(scenes), compute_dataset_stats(dataset)):
        assert found["images"] == 6
        assert found["regions"] == found["regions_with_mask"] == len(regions)
        assert found["phrases"] == sum(len(region.phrases) for region in regions)
        assert found["words"] == sum(len(phrase.split()) for region in regions for phrase in region.phrases)
        assert sum(found["regions_by_size"].values()) == len(regions)
        assert found["regions_an_image"]["most"] == max(len(sample.regions) for sample in scenes)
        assert found["commonest_classes"].keys() == {region.name for region in regions}
    assert found["hash"] == dataset.content_hash


def test_a_table_of_files_that_have_changed_gives_way_to_the_new_one(root, tmp_path, monkeypatch):
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "cache"))

    def tables():
        return [path.name for path in (tmp_path / "cache/data").iterdir() if path.is_dir()]

    datasets.build("coco", "val", root=root)
    (first,) = tables()
    content = json.loads((root / "val.json").read_text())
    content["annotations"].pop()
    (root / "val.json").write_text(json.dumps(content))
    datasets.build("coco", "val", root=root)
    (second,) = tables()
    assert second != first
