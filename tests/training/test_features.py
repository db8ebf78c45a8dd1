"""A frozen encoder's features, kept: the same steps without the encoder."""

import numpy as np
import pytest
import torch
from PIL import Image
from sca_registry import RegistryError

from sca.training.feature_cache import FeatureCache
from sca.training.recipe import Recipe
from sca.training.train import train


@pytest.fixture
def plan(small_table):
    def make(model=None, scenes=None, **options):
        table = {
            "model": {**small_table, "trainable": ["mixer", "projection", "task_tokens"], **(model or {})},
            "data": {"scenes": {"name": "scenes", "num_images": 9, "image_size": 64, **(scenes or {})}},
            "train": {
                "steps": 6,
                "batch_size": 2,
                "warmup_steps": 2,
                "save_steps": 100,
                "learning_rate": 1e-2,
                **options,
            },
        }
        return Recipe.from_dict("cached", table)

    return make


def counted(monkeypatch):
    """Counts the pictures that go through any encoder."""
    from sca.model import SegmentationModel

    encode, seen = SegmentationModel.encode, []
    monkeypatch.setattr(
        SegmentationModel, "encode", lambda self, pixels: (seen.extend(pixels), encode(self, pixels))[1]
    )
    return seen


@pytest.mark.slow
def test_a_picture_is_encoded_once_for_all_epochs_and_mixers_and_the_weights_are_alike(plan, tmp_path, monkeypatch):
    plain = train(plan(), tmp_path / "plain", quiet=True)
    seen = counted(monkeypatch)
    cached = train(plan(cache_features=str(tmp_path / "kept")), tmp_path / "cached", quiet=True)
    assert len(seen) == 9  # of the 12 that six steps of two draw
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(tensor, cached.state_dict()[name], atol=2e-3), name
    train(plan({"mixer": "mask-tokens"}, cache_features=str(tmp_path / "kept")), tmp_path / "other", quiet=True)
    assert len(seen) == 9
    train(plan({"encoder": "tiny-vit"}, cache_features=str(tmp_path / "kept")), tmp_path / "another", quiet=True)
    assert len(seen) == 18  # another encoder has features of its own


@pytest.mark.slow
def test_only_pictures_that_are_drawn_are_encoded(plan, tmp_path, monkeypatch):
    seen = counted(monkeypatch)
    train(plan(steps=2, cache_features=str(tmp_path / "kept")), tmp_path / "run", quiet=True)
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"trainable": ["encoder", "mixer"]}}, "keeps what a frozen encoder makes, and this one trains"),
        ({"scenes": {"augment": {"flip": 0.5}}}, "needs pictures as they are, and data.scenes.augment changes them"),
    ],
)
def test_features_that_change_are_not_kept(plan, tmp_path, change, message):
    with pytest.raises(RegistryError, match=message):
        train(plan(**change, cache_features=str(tmp_path / "kept")), tmp_path / "run", quiet=True)


def test_a_cache_says_what_is_wrong_with_it(small, tmp_path):
    model, picture = small(), Image.new("RGB", (64, 48), "red")
    cache = FeatureCache(tmp_path, model)
    with pytest.raises(KeyError, match="no features of this"):
        cache[picture]
    cache.encode_missing(model, [picture, picture], lambda: None)
    assert cache[picture].shape == model.encode(torch.zeros(1, 3, 64, 64)).shape[1:]
    assert np.load(cache.get_path(picture)).dtype == np.float16
    cache.get_path(picture).write_bytes(b"half")
    with pytest.raises(ValueError, match=r"is broken .* remove it"):
        cache[picture]
    model.encode = lambda pixels: torch.full((len(pixels), 4, 8, 8), 1e9)
    cache.get_path(picture).unlink()
    with pytest.raises(ValueError, match="float16 does not hold"):
        cache.encode_missing(model, [picture], lambda: None)


def test_feature_cache_removes_what_a_kill_left(small, tmp_path):
    model, picture = small(), Image.new("RGB", (64, 48), "red")
    cache = FeatureCache(tmp_path, model)
    draft = cache.get_path(picture).with_name(f".sca-{'0' * 16}.part")
    draft.parent.mkdir(parents=True)
    draft.touch()
    cache.encode_missing(model, [picture], lambda: None)
    assert [path.name for path in draft.parent.iterdir()] == [cache.get_path(picture).name]
