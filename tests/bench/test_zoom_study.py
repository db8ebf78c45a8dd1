"""The study of zoom, on a few small mosaics."""

import json

import pytest
import zoom


@pytest.mark.slow
def test_zoom_study_measures_mosaics_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zoom, "MOSAIC_SIDES", {2: 2})
    out = tmp_path / "results.json"
    arguments = ["sca-tiny", "--num-tuning-images", "1", "--out", str(out)]
    zoom.main(arguments)
    table, results = capsys.readouterr().out, json.loads(out.read_text())
    assert [each["name"] for each in results["images"]] == ["mosaic-2-0", "mosaic-2-1"]
    assert zoom.render_curve(results) in table
    outcomes = zoom.compute_outcomes(results, zoom.ZoomOptions(**results["zoom"]))
    small = outcomes.select_rows(outcomes.cells <= zoom.SMALL_CELLS).summarize()
    assert small["zoomed"] > small["plain"]

    monkeypatch.setattr(zoom, "measure_image", lambda *_: pytest.fail("measured again"))
    zoom.main(arguments)
    assert json.loads(out.read_text())["images"] == results["images"]
    with pytest.raises(SystemExit, match="was measured with num_tuning_images=1, not 2; choose another --out"):
        zoom.main([*arguments, "--num-tuning-images", "2"])
