"""uncertainty.json of checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import sca
from sca.checkpoints.load import load_uncalibrated
from sca.checkpoints.native import is_saved, read_weights, save
from sca.checkpoints.push import CHECKPOINT_FILES
from sca.checkpoints.uncertainty import MAX_UNCERTAINTY_BYTES, hash_as_float32, write_uncertainty
from sca.io.errors import InputError
from sca.uncertainty import Calibration, Uncertainty, fit_domain

CALIBRATIONS = {("caption", "box"): Calibration(2.5, -1.25), ("recognition", "point"): Calibration(0.5, 0.0)}


@pytest.fixture
def folder(build_small_model, tmp_path):
    model = build_small_model()
    save(model, tmp_path / "model")
    features = torch.randn(40, 2 * model.encoder.channels, generator=torch.Generator().manual_seed(0))
    domain = fit_domain(features, features, 0.9)
    uncertainty = Uncertainty(CALIBRATIONS, domain, hash_as_float32(read_weights(tmp_path / "model")))
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


def test_is_saved_compares_the_uncertainty(folder):
    model = sca.load(folder)
    assert is_saved(model, folder)
    model.uncertainty = None
    assert not is_saved(model, folder)
    (folder / "uncertainty.json").unlink()
    assert is_saved(model, folder)


def test_load_uncalibrated_ignores_a_damaged_file(folder):
    (folder / "uncertainty.json").write_text("{")
    assert load_uncalibrated(folder).uncertainty is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibrations": {("caption", "box"): Calibration(1e7, 0.0)}}, "'slope' contains 10000000.0"),
        ({"calibrations": {("caption", "scribble"): Calibration(1.0, 0.0)}}, "unknown task or prompt"),
        ({"domain": {"threshold": 0.0}}, "'threshold' contains 0.0, .*; use more images, or pass --no-ood"),
        ({"domain": {"scale": torch.tensor([1e9])}}, "'scale' is 1 numbers, expected"),
        ({"weights_hash": "0" * MAX_UNCERTAINTY_BYTES}, "; pass --no-ood to `sca calibrate`"),
    ],
)
def test_write_uncertainty_rejects_what_cannot_be_read(folder, change, message):
    uncertainty = sca.load(folder).uncertainty
    if isinstance(change.get("domain"), dict):
        change = {"domain": replace(uncertainty.domain, **change["domain"])}
    content = (folder / "uncertainty.json").read_bytes()
    with pytest.raises(InputError, match=message):
        write_uncertainty(replace(uncertainty, **change), folder)
    assert (folder / "uncertainty.json").read_bytes() == content


def test_fit_domain_bounds_the_distances_of_constant_features(folder):
    generator = torch.Generator().manual_seed(0)
    num_features = len(sca.load(folder).uncertainty.domain.mean)
    features = torch.randn(40, num_features, generator=generator)
    features[:, 0] = 0.5
    held_out = torch.randn(40, num_features, generator=generator)
    domain = fit_domain(features, held_out, 0.9)
    assert domain.threshold < 1e4
    write_uncertainty(Uncertainty(CALIBRATIONS, domain, hash_as_float32(read_weights(folder))), folder)
    assert sca.load(folder).uncertainty.domain is not None


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
    assert str(raised.value).endswith("; run `sca calibrate` again, or delete uncertainty.json")


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"format": 1}', b'{"format": NaN}', b" " * (MAX_UNCERTAINTY_BYTES + 1)]
)
def test_load_rejects_damaged_files_in_one_line(folder, content):
    (folder / "uncertainty.json").write_bytes(content)
    with pytest.raises(InputError, match=r"; run `sca calibrate` again, or delete uncertainty\.json$") as raised:
        sca.load(folder)
    assert "\n" not in str(raised.value)
