"""Confidence and OOD scores of captions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sca_registry.contracts import Prompt

import sca
from sca.data.scenes import Scenes
from sca.inference.automatic import caption_everything
from sca.inference.engine import Engine
from sca.uncertainty import (
    Calibration,
    Domain,
    Uncertainty,
    fit_calibration,
    fit_domain,
    get_prompt_kind,
    pool_features,
)

POINT = ((3.0, 4.0, 1),)
BOX = (8.0, 8.0, 60.0, 60.0)


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        (Prompt(box=BOX), "box"),
        (Prompt(points=POINT), "point"),
        (Prompt(points=(*POINT, (5.0, 5.0, 0))), "points"),
        (Prompt(points=((3.0, 4.0, 0),)), "points"),
        (Prompt(BOX, POINT), "box-and-point"),
        (Prompt(mask=np.ones((2, 2), bool)), "mask"),
    ],
)
def test_get_prompt_kind_distinguishes_prompts(prompt, kind):
    assert get_prompt_kind(prompt) == kind


def test_fit_calibration_recovers_the_probability_of_correct_captions():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(20_000, generator=generator, dtype=torch.float64)
    probabilities = torch.sigmoid(0.5 * torch.logit(scores, 1e-6) - 1)
    calibration = fit_calibration(scores, torch.rand(20_000, generator=generator) < probabilities)
    assert calibration.slope == pytest.approx(0.5, abs=0.05)
    assert calibration.intercept == pytest.approx(-1, abs=0.05)


@pytest.mark.parametrize("is_correct", [True, False])
def test_fit_calibration_is_never_certain(is_correct):
    calibration = fit_calibration(torch.linspace(0, 1, 50), torch.full((50,), is_correct))
    confidence = calibration.compute_confidence(0.5)
    assert 0.001 < confidence < 0.999
    assert (confidence > 0.9) == is_correct


@pytest.mark.parametrize("score", [0.0, 1.0, 0.3])
def test_confidence_is_a_probability_for_extreme_parameters(score):
    assert 0 <= Calibration(1e6, -1e6).compute_confidence(score) <= 1


def test_confidence_of_an_unknown_score_is_none():
    assert Calibration(1, 0).compute_confidence(float("nan")) is None


def test_pool_features_ignores_padding():
    features = torch.zeros(1, 3, 4, 4)
    features[:, :, :2] = 1
    assert pool_features(features, [(32, 16)], 32).tolist() == [[1, 1, 1, 0, 0, 0]]
    assert pool_features(features, [(32, 32)], 32)[0, 0] == 0.5


def test_domain_separates_images_of_another_distribution():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    domain = fit_domain(features[:200], features[200:300], 0.99)
    same, other = domain.compute_ood_scores(features[300:]), domain.compute_ood_scores(5 * torch.ones(10, 12))
    assert np.mean(np.array(same) > 1) <= 0.05
    assert min(other) > 1


@pytest.fixture
def calibrated_engine(build_small_model):
    model = build_small_model()
    channels = model.encoder.channels
    domain = Domain(
        torch.zeros(2 * channels, dtype=torch.float64),
        torch.ones(2 * channels, dtype=torch.float64),
        torch.eye(1, 2 * channels, dtype=torch.float64),
        torch.ones(1, dtype=torch.float64),
        residual_variance=1.0,
        threshold=1e6,
    )
    model.uncertainty = Uncertainty({("caption", "box"): Calibration(2.0, 1.0)}, domain, "0")
    return Engine(model)


def set_threshold(engine, threshold):
    uncertainty = engine.model.uncertainty
    engine.model.uncertainty = replace(uncertainty, domain=replace(uncertainty.domain, threshold=threshold))


def test_captions_have_a_confidence_where_the_model_is_calibrated(calibrated_engine, scene):
    prompts = [Prompt(box=BOX), Prompt(points=POINT)]
    box_caption, point_caption = calibrated_engine.caption(scene.image, prompts)
    assert box_caption.confidence == Calibration(2.0, 1.0).compute_confidence(box_caption.score)
    assert point_caption.confidence is None
    assert 0 < box_caption.ood_score == point_caption.ood_score < 1
    (name,) = calibrated_engine.caption(scene.image, prompts[:1], "recognition")
    assert name.confidence is None


def test_captions_of_an_image_unlike_the_training_images_have_no_confidence(calibrated_engine, scene):
    set_threshold(calibrated_engine, 1e-6)
    (caption,) = calibrated_engine.caption(scene.image, [Prompt(box=BOX)])
    assert caption.ood_score > 1
    assert caption.confidence is None


def test_sampled_captions_have_no_confidence(calibrated_engine, scene):
    (caption,) = calibrated_engine.caption(scene.image, [Prompt(box=BOX)], do_sample=True)
    assert caption.confidence is None


def test_uncertainty_changes_nothing_else(calibrated_engine, scene):
    prompts = [Prompt(box=region.box) for region in scene.regions]
    captions = calibrated_engine.caption(scene.image, prompts)
    calibrated_engine.model.uncertainty = None
    plain = calibrated_engine.caption(scene.image, prompts)
    assert [replace(each, confidence=None, ood_score=None) for each in captions] == plain
    assert calibrated_engine.compute_ood_scores(calibrated_engine.encode([scene.image])) is None


def test_ood_score_does_not_depend_on_the_batch(calibrated_engine, scene):
    images = [scene.image, scene.image.crop((0, 0, 60, 30)), Image.new("RGB", (20, 90))]
    together = calibrated_engine.compute_ood_scores(calibrated_engine.encode(images))
    alone = [calibrated_engine.compute_ood_scores(calibrated_engine.encode([image]))[0] for image in images]
    assert together == pytest.approx(alone, rel=1e-4)


def test_predictor_ood_score_is_that_of_the_current_image(calibrated_engine, scene):
    predictor = sca.Predictor(calibrated_engine)
    assert predictor.ood_score is None
    predictor.set_image(scene.image)
    assert predictor.ood_score == predictor.predict(boxes=[BOX])[0].ood_score


def test_found_regions_have_confidences_and_ood_scores(calibrated_engine, scene):
    predictor = sca.Predictor(calibrated_engine)
    predictor.set_image(scene.image)
    (match,) = predictor.find("a star", boxes=[BOX])
    assert match.confidence == Calibration(2.0, 1.0).compute_confidence(match.score)
    assert match.ood_score == predictor.ood_score
    set_threshold(calibrated_engine, 1e-6)
    (match,) = predictor.find("a star", boxes=[BOX])
    assert match.confidence is None
    assert match.ood_score > 1


def test_bundled_model_flags_noise_but_no_scenes():
    engine = sca.load_captioner("sca-tiny")
    scenes = [Scenes("test", num_images=4, image_size=size)[index].image for index, size in enumerate((64, 128, 320))]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8))
    *scene_scores, noise_score = engine.compute_ood_scores(engine.encode([*scenes, noise]))
    assert max(scene_scores) < 1 < noise_score


def test_everything_mode_of_the_bundled_model_has_confidences():
    predictor = sca.Predictor(sca.load("sca-tiny"))
    predictor.set_image(Scenes("test", num_images=1)[0].image)
    captions = caption_everything(predictor)
    assert captions
    assert all(0.5 < caption.confidence <= 1 for caption in captions)


def test_captions_from_crops_have_the_ood_score_of_their_image_and_no_confidence():
    predictor = sca.Predictor(sca.load("sca-tiny"))
    image = Image.new("RGB", (512, 512), (90, 90, 100))
    image.paste(Scenes("test", num_images=1)[0].image.resize((40, 40)), (100, 100))
    predictor.set_image(image)
    boxes = [(100, 100, 124, 124), (20, 20, 400, 400)]
    small, large = predictor.predict(boxes=boxes, zoom=4.0)
    assert small.ood_score == large.ood_score == predictor.ood_score
    assert small.confidence is None
    (plain,) = predictor.predict(boxes=boxes[:1])
    assert (plain.confidence is None) == (predictor.ood_score > 1)
