"""Pretraining: each objective learns, runs repeat exactly, and the committed weights load."""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sca_registry.contracts import Region, Sample
from tiny import TINY_VIT_OPTIONS

import pretrain
from language_model_objective import draw_texts
from masked_pixel_objective import MASKED_FRACTION, draw_patch_masks
from pretrained_folder import CAMVID_TERMS, render_card
from pretraining_data import PretrainingData, crop_region, crop_square
from pretraining_loop import Objective, train_objective
from pretraining_probe import fit_and_predict, probe_folders, render_results
from sca.data.scenes import Scenes
from sca.encoders.tiny_vit import TinyVit
from sca.evaluation.evaluate import evaluate
from sca.inference.factory import load_captioner
from sca.inference.processor import Processor
from sca.io.errors import InputError
from sca.language_models.hf import HfLanguageModel
from sca.segmenters.sam import SamSegmenter

ROOT = Path(__file__).resolve().parents[2]
PRETRAINED = ROOT / "benchmarks" / "pretrained"
COMMITTED = [folder.name for folder in sorted(PRETRAINED.glob("*"))]  # none in an sdist
COMMITTED_ENCODERS = [name for name in COMMITTED if name.startswith("tiny-vit-")]
MAX_FOLDER_BYTES = 5_000_000
TINY_OPTIONS = {
    "encoder": TINY_VIT_OPTIONS,
    "language_model": {"hidden_size": 32, "depth": 1, "num_heads": 2, "max_positions": 24},
    "captioner": {"image_size": 32, "hidden_size": 32, "depth": 1, "num_heads": 2},
}


def get_options(objective):
    return TINY_OPTIONS[pretrain.OBJECTIVES[objective].kind]


def read_config(folder):
    return json.loads((folder / "config.json").read_text("utf-8"))


@pytest.fixture
def scene_images():
    encoder_input = Processor(TinyVit(**pretrain.ENCODER_OPTIONS).image_format, 16)
    return encoder_input.preprocess_images([Scenes("test")[index].image for index in range(2)])


@torch.inference_mode()
@pytest.mark.parametrize("name", COMMITTED_ENCODERS)
def test_committed_encoder_matches_its_config(name, scene_images):
    config = read_config(PRETRAINED / name)
    assert config["encoder"] == pretrain.ENCODER_OPTIONS
    encoder = TinyVit(weights=str(PRETRAINED / name)).eval()
    features = encoder(scene_images)
    assert features.shape == (2, 96, 16, 16)
    assert features.isfinite().all()
    assert not torch.allclose(features[0], features[1], atol=0.1)
    assert encoder.default_segmenter == config["training"]["segmenter"]
    assert name == f"tiny-vit-{config['training']['objective']}"
    assert (SamSegmenter(encoder).checkpoint is None) == (config["training"]["objective"] != "masks")


def test_committed_encoders_cover_all_objectives():
    names = {f"tiny-vit-{name}" for name, each in pretrain.OBJECTIVES.items() if each.kind == "encoder"}
    assert not COMMITTED or names == set(COMMITTED_ENCODERS)


@torch.inference_mode()
@pytest.mark.skipif(not COMMITTED, reason="not a checkout")
def test_committed_language_model_prefers_captions_and_follows_its_prefix():
    language_model = HfLanguageModel(str(PRETRAINED / "tiny-gpt2-captions")).eval()

    def compute_loss(text, prefix=()):
        ids = torch.tensor([[0, *prefix, *language_model.tokenizer.encode(text)]])
        states = language_model.hidden_states(language_model.embed_tokens(ids), torch.ones_like(ids))
        logits = language_model.lm_head(states)[0, len(prefix) : -1]
        return torch.nn.functional.cross_entropy(logits, ids[0, len(prefix) + 1 :]).item()

    caption, shuffled = (
        "a small striped red circle left of a blue square",
        "blue a of left circle red striped small a square",
    )
    assert language_model.tokenizer.decode(language_model.tokenizer.encode(caption)) == caption
    assert compute_loss(caption) < 1.5 < compute_loss(shuffled)
    assert compute_loss(caption, language_model.tokenizer.encode(shuffled)) < 0.5 * compute_loss(caption)


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_folder_is_small_and_has_its_card(name):
    folder = PRETRAINED / name
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_FOLDER_BYTES
    facts = read_config(folder)["training"]
    card = (folder / "README.md").read_text("utf-8")
    assert card == render_card(name, facts)
    assert CAMVID_TERMS in card
    assert facts["cpu_seconds"] <= 20 * 60


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(name, marks=() if name in ("masks", "language-model") else pytest.mark.all)
        for name in pretrain.OBJECTIVES
    ],
)
def test_objective_reduces_its_loss(objective):
    torch.manual_seed(0)
    steps = 120 if objective == "self-distillation" else 40  # its loss rises first, while the center is estimated
    objective_class = pretrain.OBJECTIVES[objective]
    build_model, _ = pretrain.MODELS[objective_class.kind]
    module = objective_class(build_model(**get_options(objective)), PretrainingData())
    lines = []
    final_losses = train_objective(module, steps, 0, lines.append)
    assert len(lines) == 20
    first_losses = [float(re.search(r": \S+ ([\d.]+)", line)[1]) for line in lines[:10]]
    assert next(iter(final_losses.values())) < 0.97 * max(first_losses)
    assert not module.training


@pytest.mark.slow
def test_pretrained_crop_captioner_captions_regions(tmp_path):
    pretrain.train_and_save("crop-captions", tmp_path / "git", steps=2, options=get_options("crop-captions"))
    (tmp_path / "git").rename(tmp_path / "moved")
    encoder = {"name": "tiny-vit", **TINY_VIT_OPTIONS}
    captioner = load_captioner({"name": "crop-captioner", "weights": str(tmp_path / "moved"), "encoder": encoder})
    result = evaluate(captioner, {"name": "scenes", "num_images": 2}, "val", metrics=["cider-d"])
    assert result.scores["cider-d"] >= 0


@pytest.mark.slow
@pytest.mark.all
def test_pretrain_repeats_exactly_for_a_seed(tmp_path):
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        pretrain.train_and_save("self-distillation", tmp_path / name, steps=2, seed=seed, options=TINY_VIT_OPTIONS)
    first, second, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second", "other")
    )
    assert first == second
    assert first != other


@pytest.mark.slow
def test_probe_measures_all_folders(tmp_path):
    for objective in ("masks", "image-text", "language-model", "crop-captions"):
        facts = pretrain.train_and_save(objective, tmp_path / objective, steps=2, options=get_options(objective))
        assert facts["steps"] == 2
        assert facts == read_config(tmp_path / objective)["training"]
    results = probe_folders(tmp_path, None, num_scenes=6)
    assert results["accuracies"].keys() == {"image-text", "masks", "random weights", "most frequent value"}
    assert results["mask_iou"]["masks"].keys() == {"scenes/box", "scenes/mask-point"}
    assert results["token_loss"].keys() == {"language-model"}
    low, difference, high = (results["differences"]["masks"]["scenes/color"][index] for index in (1, 0, 2))
    assert low <= difference <= high
    table = render_results(results)
    assert "| encoder | scenes: color | scenes: shape | scenes: size | scenes: texture |" in table
    assert "| masks | scenes: box | scenes: mask-point |" in table


def test_pretrain_rejects_a_missing_street_folder_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="error: no data for split 'train'") as raised:
        pretrain.main(["masks", "--out", str(tmp_path / "out"), "--street", str(tmp_path)])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_pretrain_keeps_a_folder_with_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="error: "):
        pretrain.main(["language-model", "--steps", "1", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_training_rejects_a_loss_that_is_not_finite():
    class DivergingObjective(Objective):
        learning_rate = 1e-3

        def __init__(self):
            super().__init__()
            self.value = torch.nn.Parameter(torch.zeros(1))

        def draw_batch(self, step, rng):
            return None

        def compute_losses(self, batch):
            return {"loss": self.value.sum() * float("nan")}

    with pytest.raises(InputError, match="the loss of step 1 is nan; use a lower learning rate"):
        train_objective(DivergingObjective(), 3, 0, lambda line: None)


def test_linear_probe_finds_a_linear_attribute():
    features = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    values = np.where(features[:, 2].numpy() > 0, "high", "low")
    assert np.mean(fit_and_predict(features[:200], values[:200], features[200:]) == values[200:]) > 0.95


def test_patch_masks_hide_the_same_number_of_pixels_in_each_image():
    masks = draw_patch_masks(3, 64, np.random.default_rng(0))
    assert masks.shape == (3, 1, 64, 64)
    assert masks.flatten(1).float().mean(1).tolist() == [round(MASKED_FRACTION * 16) / 16] * 3
    assert not torch.equal(masks[0], masks[1])


def test_crop_region_contains_the_region():
    rng = np.random.default_rng(0)
    for x1, y1, x2, y2 in ((0, 0, 10, 10), (30, 20, 70, 30), (60, 5, 95, 90)):
        image = Image.new("L", (120, 96))
        image.paste(255, (x1, y1, x2, y2))
        crop = crop_region(image, Region(0, (x1, y1, x2, y2)), 40, rng)
        assert np.asarray(crop).sum() == np.asarray(image).sum()
        assert crop.width == crop.height >= 40


def test_crop_square_stays_inside_the_image(scene: Sample):
    assert crop_square(scene.image, (0, 0), 30).tobytes() == scene.image.crop((0, 0, 30, 30)).tobytes()
    assert crop_square(scene.image, (96, 50), 500).size == (96, 96)


def test_draw_texts_keeps_the_texts_of_a_region_together_and_shuffled_ones_before_their_phrase():
    region = Scenes("test")[0].regions[0]
    texts = [text for seed in range(20) for text in draw_texts(region, np.random.default_rng(seed))]
    phrases = {region.name, *region.phrases}
    shuffled = [(text, after) for text, after in pairwise(texts) if text not in phrases]
    assert {text for text in texts if text in phrases} == phrases
    assert 0.3 < len(shuffled) / (20 * len(region.phrases)) < 0.7
    assert all(sorted(text.split()) == sorted(phrase.split()) for text, phrase in shuffled)
