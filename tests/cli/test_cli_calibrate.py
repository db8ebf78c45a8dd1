"""`sca calibrate`, and what `sca caption` prints with a calibrated model."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import sca
from sca.checkpoints.native import read_weights, save
from sca.checkpoints.uncertainty import hash_as_float32, write_uncertainty
from sca.cli.image_runs import OutOfDistributionImages
from sca.evaluation.calibration import _FeaturePooling
from sca.inference.engine import Engine
from sca.uncertainty import Calibration, Uncertainty, fit_domain


@pytest.fixture
def calibrated_folder(build_small_model, working_folder):
    """Checkpoint whose domain is noise, calibrated for captions of boxes."""
    model = build_small_model()
    save(model, working_folder / "model")
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)) for _ in range(24)]
    features = _FeaturePooling(Engine(model), 8, 0, None).pool_images(noise)
    domain = fit_domain(features, features, 1.0)
    domain = replace(domain, threshold=1.5 * domain.threshold)
    weights_hash = hash_as_float32(read_weights(working_folder / "model"))
    uncertainty = Uncertainty({("caption", "box"): Calibration(1.0, 0.0)}, domain, weights_hash)
    write_uncertainty(uncertainty, working_folder / "model")
    noise[0].save(working_folder / "noise.png")
    Image.new("RGB", (80, 60), "red").save(working_folder / "red.png")
    return "./model"


def test_caption_reports_images_unlike_the_training_images_in_one_line(run_sca, calibrated_folder, working_folder):
    result = run_sca(
        *("caption", "noise.png", "red.png", "--model", calibrated_folder, "--box", "5,5,40,40", "--out", "out")
    )
    assert result.status == 0, result.err
    warnings = [line for line in result.err if "unlike" in line]
    assert warnings == ["sca: 1 of 2 images are unlike the training images, so their captions may be wrong: red.png"]
    assert "confidence" in result.out
    records = [json.loads(line) for line in (working_folder / "out/captions.jsonl").read_text().splitlines()]
    noise, red = records
    assert noise["confidence"] == pytest.approx(noise["score"], abs=1e-4)
    assert noise["ood_score"] <= 1 < red["ood_score"]
    assert "confidence" not in red


def test_find_reports_matches_in_images_unlike_the_training_images(run_sca, calibrated_folder, working_folder):
    lines = [json.dumps({"image": name, "box": [5, 5, 40, 40]}) for name in ("noise.png", "red.png", "red.png")]
    (working_folder / "prompts.jsonl").write_text("\n".join(lines))
    arguments = ("find", "a star", "noise.png", "red.png", "--model", calibrated_folder, "--prompts", "prompts.jsonl")
    result = run_sca(*arguments, "--threshold=-1000")
    assert result.status == 0, result.err
    assert [line for line in result.err if "unlike" in line] == [
        "sca: 1 of 2 images are unlike the training images, so their matches may be wrong: red.png"
    ]
    assert [line for line in run_sca(*arguments, "--threshold", 1).err if "unlike" in line] == []


def test_caption_without_calibration_prints_as_before(run_sca, calibrated_folder, working_folder):
    (working_folder / "model/uncertainty.json").unlink()
    result = run_sca("caption", "red.png", "--model", calibrated_folder, "--box", "5,5,40,40", "--out", "out")
    assert "confidence" not in result.out
    assert [line for line in result.err if "unlike" in line] == []
    record = json.loads((working_folder / "out/captions.jsonl").read_text())
    assert {"confidence", "ood_score"} & record.keys() == set()


def test_converted_captions_keep_their_confidence(run_sca, calibrated_folder, working_folder):
    run_sca("caption", "noise.png", "--model", calibrated_folder, "--box", "5,5,40,40", "--out", "out")
    run_sca("convert", "out/captions.jsonl", "copy", "--format", "jsonl")
    first, second = (json.loads((working_folder / f"{name}/captions.jsonl").read_text()) for name in ("out", "copy"))
    assert (first["confidence"], first["ood_score"]) == (second["confidence"], second["ood_score"])


def test_out_of_distribution_images_names_the_first_of_many(build_small_model):
    images = OutOfDistributionImages()
    assert images.summarize() == ""
    model = build_small_model()
    (caption,) = Engine(model).caption(Image.new("RGB", (64, 64)), [sca.Prompt(box=(1, 1, 9, 9))])
    images.add("a.png", [replace(caption, ood_score=2.0)])
    assert images.summarize() == "a.png is unlike the training images, so its captions may be wrong"
    images = OutOfDistributionImages()
    for index in range(5):
        images.add(f"{index}.png", [replace(caption, ood_score=2.0)])
    assert images.summarize().endswith("0.png, 1.png, 2.png and 2 more")


@pytest.mark.slow
def test_calibrate_writes_uncertainty_and_prints_a_table(run_sca, working_folder):
    save(sca.load("sca-tiny"), working_folder / "model")
    options = ("--max-images", 60, "--prompt-type", "box", "--max-training-images", 40, "--batch-size", 20)
    result = run_sca("calibrate", "./model", "scenes", *options)
    assert result.status == 0, result.err
    assert "ECE of score" in result.out
    assert result.err == ["sca: wrote ./model/uncertainty.json"]
    assert sca.load("./model").uncertainty.domain is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sca-tiny", "scenes"), "not a checkpoint folder"),
        (("./model", "scens"), "Did you mean 'scenes'?"),
        (("./model", "scenes", "--prompt-type", "bax"), "Did you mean 'box'?"),
        (("./nothing", "scenes"), "not a checkpoint folder"),
    ],
)
def test_calibrate_reports_invalid_arguments_in_one_line(get_sca_error, calibrated_folder, arguments, message):
    assert message in get_sca_error(2, "calibrate", *arguments)
