"""Dataset statistics and sample views."""

import json

import pytest
from sca_registry import datasets

from sca.data.export import export_dataset
from sca.data.scenes import Scenes
from sca.data.stats import compute_dataset_stats


@pytest.fixture
def root(tmp_path):
    return export_dataset({"val": Scenes("val", num_images=6, image_size=64)}, tmp_path / "root", "coco")


def test_dataset_stats_match_samples_without_opening_images(root):
    scenes = Scenes("val", num_images=6, image_size=64)
    regions = [region for sample in scenes for region in sample.regions]
    dataset = datasets.build("coco", "val", root=root)
    for image_path in root.rglob("*.png"):
        image_path.write_bytes(b"")
    for stats in (compute_dataset_stats(scenes), compute_dataset_stats(dataset)):
        assert stats["num_images"] == 6
        assert stats["num_regions"] == stats["num_regions_with_mask"] == len(regions)
        assert stats["num_phrases"] == sum(len(region.phrases) for region in regions)
        assert stats["num_words"] == sum(len(phrase.split()) for region in regions for phrase in region.phrases)
        assert sum(stats["regions_by_size"].values()) == len(regions)
        assert stats["regions_per_image"]["max"] == max(len(sample.regions) for sample in scenes)
        assert stats["most_common_classes"].keys() == {region.name for region in regions}
    assert stats["hash"] == dataset.content_hash


def test_conversion_replaces_table_of_changed_files(root, tmp_path, monkeypatch):
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "cache"))

    def list_tables():
        return [path.name for path in (tmp_path / "cache/data").iterdir() if path.is_dir()]

    datasets.build("coco", "val", root=root)
    (first,) = list_tables()
    content = json.loads((root / "val.json").read_text())
    content["annotations"].pop()
    (root / "val.json").write_text(json.dumps(content))
    datasets.build("coco", "val", root=root)
    (second,) = list_tables()
    assert second != first
