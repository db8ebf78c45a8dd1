"""Measurement of calibrations and training domains."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import sca
from sca.checkpoints.native import save
from sca.evaluation.calibration import (
    CalibrationReport,
    CalibrationResult,
    _compute_ece_interval,
    calibrate_checkpoint,
    compute_ece,
    is_correct_caption,
)
from sca.io.errors import InputError, OutputError
from sca.uncertainty import Calibration, fit_domain

SCENE_ATTRIBUTES = {"color": "red", "shape": "star", "size": "small", "texture": "plain"}


def make_record(task, caption, name=None, attributes=None):
    return {"task": task, "caption": caption, "truth": {"name": name, "attributes": attributes or {}}}


@pytest.mark.parametrize(
    ("record", "is_correct"),
    [
        (make_record("recognition", "Car", "car"), True),
        (make_record("recognition", "a car", "car"), False),
        (make_record("caption", "a large car", "car"), True),
        (make_record("caption", "a large cart", "car"), False),
        (make_record("caption", "a small plain red star", "star", SCENE_ATTRIBUTES), True),
        (make_record("caption", "a small plain blue star", "star", SCENE_ATTRIBUTES), False),
        (make_record("caption", "a star", "star", SCENE_ATTRIBUTES), False),
        (make_record("caption", "a car"), None),
    ],
)
def test_is_correct_judges_captions_by_attributes_else_by_class_name(record, is_correct):
    assert is_correct_caption(record, record["task"]) is is_correct


def test_is_correct_ignores_other_tasks():
    assert is_correct_caption(make_record("caption", "car", "car"), "recognition") is None


def test_compute_ece_is_zero_for_calibrated_confidences_and_grows_with_overconfidence():
    rng = np.random.default_rng(0)
    confidences = rng.random(20_000)
    correct = (rng.random(20_000) < confidences).astype(float)
    error, bins = compute_ece(confidences, correct)
    assert error < 0.01
    assert [each.num_regions for each in bins] == [2000] * 10
    assert bins[0].accuracy < 0.1 < 0.9 < bins[-1].accuracy
    assert compute_ece(np.ones(20_000), correct)[0] == pytest.approx(0.5, abs=0.02)


def test_compute_ece_interval_contains_the_error_and_needs_several_images():
    rng = np.random.default_rng(0)
    confidences, correct = np.full(1000, 0.9), (rng.random(1000) < 0.6).astype(float)
    low, high = _compute_ece_interval(confidences, correct, np.repeat(np.arange(50), 20))
    assert low < 0.3 < high
    assert high - low < 0.2
    assert _compute_ece_interval(confidences, correct, np.zeros(1000)) is None


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> tuple[CalibrationReport, object]:
    """A copy of sca-tiny, calibrated on scenes with box prompts."""
    folder = tmp_path_factory.mktemp("calibration") / "model"
    save(sca.load("sca-tiny"), folder)
    (folder / "uncertainty.json").unlink()
    report = calibrate_checkpoint(
        folder, "scenes", prompt_types=("box",), max_images=60, max_training_images=60, batch_size=30
    )
    return report, folder


@pytest.mark.slow
def test_calibrate_checkpoint_stores_what_it_measures(calibrated):
    report, folder = calibrated
    uncertainty = sca.load(folder).uncertainty
    saved = {(each.task, each.prompt_kind): each.calibration for each in report.results if not each.reason}
    assert set(saved) == set(uncertainty.calibrations) == {("caption", "box"), ("recognition", "box")}
    for key, calibration in saved.items():
        assert uncertainty.calibrations[key].slope == pytest.approx(calibration.slope, rel=1e-4)
    assert report.domain.num_training_images == 60
    assert report.domain.num_images == 30
    assert report.domain.flagged_fraction <= 0.2
    caption = next(each for each in report.results if each.task == "caption")
    assert caption.ece < caption.score_ece
    assert caption.ece <= 0.08


@pytest.mark.slow
def test_calibration_report_is_plain_json_and_a_table(calibrated):
    report, _ = calibrated
    table = json.loads(json.dumps(report.to_dict()))
    assert {each["prompt_type"] for each in table["results"]} == {"box"}
    assert len(report.build_table().rows) == len(report.results)


def test_calibrate_checkpoint_requires_a_folder():
    with pytest.raises(InputError, match="'sca-tiny' is not a checkpoint folder; calibration writes to it"):
        calibrate_checkpoint("sca-tiny", "scenes")


@pytest.mark.slow
def test_calibrate_checkpoint_rejects_too_few_regions(build_small_model, tmp_path):
    save(build_small_model(), tmp_path / "model")
    with pytest.raises(InputError, match="at least 50 are required; use more images"):
        calibrate_checkpoint(
            tmp_path / "model", {"name": "scenes", "num_images": 4}, prompt_types=("box",), train_split=None
        )
    assert not (tmp_path / "model/uncertainty.json").exists()


@pytest.fixture
def saved_folder(build_small_model, tmp_path):
    return save(build_small_model(), tmp_path / "model")


@pytest.fixture
def reject_measuring(monkeypatch):
    """Fail when a model starts to measure."""
    monkeypatch.setattr("sca.evaluation.calibration._measure_calibrations", lambda *_: pytest.fail("measured"))


@pytest.fixture
def replace_measuring(monkeypatch):
    """Replace the measurement by calibrations with these slopes of captions, by prompt type."""

    def set_slopes(**slopes):
        def make_results(engine, dataset, prompt_type, *_):
            slope = slopes[prompt_type.replace("-", "_")]
            kind = "point" if prompt_type == "mask-point" else prompt_type
            reason = "" if slope > 0 else "no"
            return [
                CalibrationResult(
                    "caption", prompt_type, kind, Calibration(slope, 0.0), 50, 0.5, 0.1, 0.1, None, (), reason
                )
            ]

        monkeypatch.setattr("sca.evaluation.calibration._measure_calibrations", make_results)

    return set_slopes


def read_slopes(folder):
    return {kind: each.slope for (_, kind), each in sca.load(folder).uncertainty.calibrations.items()}


def test_calibrate_checkpoint_keeps_what_it_does_not_measure(saved_folder, replace_measuring):
    replace_measuring(box=1.0, mask_point=2.0)
    types = ("box", "mask-point")
    calibrate_checkpoint(saved_folder, "scenes", prompt_types=types, max_images=20, max_training_images=20)
    domain = sca.load(saved_folder).uncertainty.domain
    replace_measuring(box=3.0)
    calibrate_checkpoint(saved_folder, "scenes", prompt_types=("box",), train_split=None)
    assert read_slopes(saved_folder) == {"box": 3.0, "point": 2.0}
    assert sca.load(saved_folder).uncertainty.domain.threshold == domain.threshold
    replace_measuring(mask_point=-1.0)
    calibrate_checkpoint(saved_folder, "scenes", prompt_types=("mask-point",), train_split=None)
    assert read_slopes(saved_folder) == {"box": 3.0}


def test_calibrate_checkpoint_stores_the_rest_of_what_cannot_be_stored(saved_folder, replace_measuring, monkeypatch):
    replace_measuring(box=1.0, mask=1e9)
    monkeypatch.setattr(
        "sca.evaluation.calibration.fit_domain", lambda *args: replace(fit_domain(*args), threshold=1e-20)
    )
    options = {"prompt_types": ("box", "mask"), "max_images": 20, "max_training_images": 20}
    report = calibrate_checkpoint(saved_folder, "scenes", **options)
    assert read_slopes(saved_folder) == {"box": 1.0}
    assert sca.load(saved_folder).uncertainty.domain is None
    assert [each.reason.partition("'slope' ")[-1] for each in report.results] == [
        *("", "contains 1000000000.0, expected numbers from 1e-12 to 1e+06")
    ]
    assert "'threshold' contains 1e-20, expected" in report.to_dict()["domain"]["reason"]
    assert "OOD score not saved: the measured uncertainty, 'domain', 'threshold'" in report.build_table().notes[-1]


def test_calibrate_checkpoint_replaces_the_uncertainty_of_other_weights(
    saved_folder, build_small_model, replace_measuring
):
    replace_measuring(box=1.0, mask=2.0)
    options = {"prompt_types": ("box",), "train_split": None}
    calibrate_checkpoint(saved_folder, "scenes", **options)
    stale_content = (saved_folder / "uncertainty.json").read_text()
    save(build_small_model(seed=1), saved_folder)
    (saved_folder / "uncertainty.json").write_text(stale_content)
    calibrate_checkpoint(saved_folder, "scenes", **{**options, "prompt_types": ("mask",)})
    assert read_slopes(saved_folder) == {"mask": 2.0}
    (saved_folder / "uncertainty.json").write_text("{")
    calibrate_checkpoint(saved_folder, "scenes", **options)
    assert read_slopes(saved_folder) == {"box": 1.0}


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("scenes", {"prompt_types": ("center", "mask-point")}, "center and mask-point are both calibrated as 'point'"),
        ("scenes", {"prompt_types": ("box", "bax")}, "prompt_types is 'bax'. Did you mean 'box'"),
        ("scenes", {"prompt_types": ()}, r"prompt_types is \(\); expected a list of 1 or more strings"),
        ("scenes", {"prompt_types": "box"}, "prompt_types is 'box'; expected a list"),
        ("scenes", {"batch_size": 0}, "batch_size is 0; expected an integer of at least 1"),
        ("scenes", {"seed": -1}, "seed is -1; expected an integer of at least 0"),
        ("scenes", {"max_images": 1}, "max_images is 1; expected an integer of at least 2"),
        ("scenes", {"max_training_images": 19}, "max_training_images is 19; expected an integer of at least 20"),
        ("scenes", {"train_split": "trian"}, "trian"),
        ({"name": "scenes", "num_images": 19}, {}, "scenes train has 19 images; the OOD score requires at least 20"),
    ],
)
@pytest.mark.usefixtures("reject_measuring")
def test_calibrate_checkpoint_checks_its_arguments_before_it_measures(saved_folder, dataset, options, message):
    with pytest.raises(ValueError, match=message):
        calibrate_checkpoint(saved_folder, dataset, **options)


@pytest.mark.usefixtures("reject_measuring")
def test_calibrate_checkpoint_checks_that_the_folder_is_writable(saved_folder, monkeypatch):
    def reject_folder(folder):
        raise OutputError(f"{folder} cannot be written")

    monkeypatch.setattr("sca.evaluation.calibration.create_writable_folder", reject_folder)
    with pytest.raises(OutputError, match="cannot be written"):
        calibrate_checkpoint(saved_folder, "scenes")
