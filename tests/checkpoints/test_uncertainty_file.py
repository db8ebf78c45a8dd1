"""uncertainty.json of checkpoints."""

from __future__ import annotations

import json

import pytest
import torch

import sca
from sca.checkpoints.native import read_weights, save
from sca.checkpoints.push import CHECKPOINT_FILES
from sca.checkpoints.uncertainty import MAX_UNCERTAINTY_BYTES, hash_values, write_uncertainty
from sca.io.errors import InputError
from sca.uncertainty import Calibration, Uncertainty, fit_domain

CALIBRATIONS = {("caption", "box"): Calibration(2.5, -1.25), ("recognition", "point"): Calibration(0.5, 0.0)}


@pytest.fixture
def folder(build_small_model, tmp_path):
    model = build_small_model()
    save(model, tmp_path / "model")
    features = torch.randn(40, 2 * model.encoder.channels, generator=torch.Generator().manual_seed(0))
    domain = fit_domain(features, features, 0.9)
    uncertainty = Uncertainty(CALIBRATIONS, domain, hash_values(read_weights(tmp_path / "model")))
    write_uncertainty(uncertainty, tmp_path / "model")
    return tmp_path / "model"


def edit_file(folder, change):
    path = folder / "uncertainty.json"
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def test_load_restores_calibrations_and_domain(folder):
    uncertainty = sca.load(folder).uncertainty
    assert uncertainty.calibrations == CALIBRATIONS
    pooled = torch.randn(3, len(uncertainty.domain.mean))
    assert min(uncertainty.domain.compute_ood_scores(pooled)) > 0


def test_load_without_the_file_has_no_uncertainty(folder):
    (folder / "uncertainty.json").unlink()
    assert sca.load(folder).uncertainty is None


def test_save_copies_the_uncertainty_of_unchanged_weights(folder, tmp_path):
    model = sca.load(folder)
    save(model, tmp_path / "copy")
    assert (tmp_path / "copy/uncertainty.json").read_bytes() == (folder / "uncertainty.json").read_bytes()
    with torch.no_grad():
        model.task_tokens += 1
    save(model, tmp_path / "copy")
    assert not (tmp_path / "copy/uncertainty.json").exists()
    assert sca.load(tmp_path / "copy").uncertainty is None


def test_uncertainty_belongs_to_the_checkpoint_files():
    assert "uncertainty.json" in CHECKPOINT_FILES


def test_load_rejects_the_uncertainty_of_other_weights(folder):
    edit_file(folder, lambda table: table.update(weights_hash="0" * 64))
    with pytest.raises(InputError, match="measured with other weights; run `sca calibrate` again"):
        sca.load(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), 2, "format 2"),
        (("calibrations",), [], "expected an object"),
        (("calibrations", "caption", "box"), 3, "expected an object"),
        (("calibrations", "caption", "box", "slope"), -1, "'slope' contains -1"),
        (("calibrations", "caption", "box", "slope"), 1e30, "'slope' contains 1e\\+30"),
        (("calibrations", "caption", "box", "intercept"), "high", "'intercept' contains 'high'"),
        (("calibrations", "translation"), {"box": {}}, "unknown task or prompt"),
        (("calibrations", "caption", "scribble"), {}, "unknown task or prompt"),
        (("domain",), [], "expected an object"),
        (("domain", "threshold"), 0, "'threshold' contains 0"),
        (("domain", "residual_variance"), None, "'residual_variance' contains None"),
        (("domain", "mean"), [0.0], "'mean' is 1 numbers, expected"),
        (("domain", "scale", 0), 0, "'scale' contains 0"),
        (("domain", "variances"), [], "'variances' is 0 numbers"),
        (("domain", "components"), [], "has 0 components"),
        (("domain", "components", 0), [True], "'components'\\[0\\] is 1 numbers"),
    ],
)
def test_load_rejects_invalid_values_in_one_line(folder, path, value, message):
    def set_value(table):
        for key in path[:-1]:
            table = table[key]
        table[path[-1]] = value

    edit_file(folder, set_value)
    with pytest.raises(InputError, match=message) as raised:
        sca.load(folder)
    assert "\n" not in str(raised.value)
    assert "uncertainty.json" in str(raised.value)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"format": 1}', b'{"format": NaN}', b" " * (MAX_UNCERTAINTY_BYTES + 1)]
)
def test_load_rejects_damaged_files_in_one_line(folder, content):
    (folder / "uncertainty.json").write_bytes(content)
    with pytest.raises(InputError, match=r"uncertainty\.json") as raised:
        sca.load(folder)
    assert "\n" not in str(raised.value)
