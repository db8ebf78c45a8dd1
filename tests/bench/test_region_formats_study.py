"""The study of region formats, on a tiny vision-language model with random weights."""

import json

import pytest
import region_formats
import sca_registry

from sca.testing.tiny import get_tiny_options


@pytest.fixture(scope="module")
def florence_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("florence")
    model = sca_registry.captioners.build("vlm", **get_tiny_options("captioner", "vlm")).image_text_model
    model.model.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_region_formats_study_compares_all_formats_on_the_same_regions(florence_folder, tmp_path, capsys):
    out = tmp_path / "results.json"
    arguments = ["--dataset", "scenes image_size=64", "--max-images", "5", "--max-new-tokens", "3", "--out", str(out)]
    region_formats.main([f"vlm weights={florence_folder} precision=float32", *arguments])
    table = capsys.readouterr().out
    results = json.loads(out.read_text())["region_formats"]
    assert [*results] == [*region_formats.REGION_FORMATS]
    assert "region_format is 'alpha'. Choose from: crop, box" in results["alpha"]["reason"]
    measured = {name: each for name, each in results.items() if name != "alpha"}
    assert len({each["regions"] for each in measured.values()}) == 1
    for name, each in measured.items():
        difference = each["differences"]["cider-d"]
        expected = each["scores"]["cider-d"] - results["crop"]["scores"]["cider-d"]
        assert difference["mean"] == pytest.approx(expected)
        assert difference["ci_low"] <= difference["mean"] <= difference["ci_high"]
        assert f"| {name} | " in table
    assert results["coordinates"]["options"] == {"region_format": "coordinates"}
    assert "| cider-d | difference from crops (95% CI) | " in table
    assert "\nalpha: captioner 'vlm' cannot be built: region_format is 'alpha'" in table
