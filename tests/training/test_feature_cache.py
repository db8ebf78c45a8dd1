"""The feature cache of a frozen encoder: the same training steps without running the encoder."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sca_registry import RegistryError

from sca.io.errors import OutputError
from sca.training.feature_cache import FeatureCache, open_feature_cache, use_feature_cache
from sca.training.recipe import Recipe
from sca.training.train import prepare_training, train


@pytest.fixture
def make_recipe(small_model_table):
    def make(model=None, scenes=None, **options):
        table = {
            "model": {**small_model_table, "trainable": ["mixer", "projection", "task_tokens"], **(model or {})},
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


def record_encoded_images(monkeypatch):
    """Record the images that any encoder encodes."""
    from sca.model import SegmentationModel

    encode, encoded_images = SegmentationModel.encode, []
    monkeypatch.setattr(
        SegmentationModel, "encode", lambda self, pixels: (encoded_images.extend(pixels), encode(self, pixels))[1]
    )
    return encoded_images


@pytest.mark.slow
def test_feature_cache_encodes_each_image_once_and_preserves_trained_weights(make_recipe, tmp_path, monkeypatch):
    uncached = train(make_recipe(), tmp_path / "plain", quiet=True)
    encoded_images = record_encoded_images(monkeypatch)
    cached = train(make_recipe(feature_cache_dir=str(tmp_path / "kept")), tmp_path / "cached", quiet=True)
    assert len(encoded_images) == 9  # of the 12 that six steps with batch size 2 draw
    for name, tensor in uncached.state_dict().items():
        assert torch.allclose(tensor, cached.state_dict()[name], atol=2e-3), name
    train(
        make_recipe({"mixer": "mask-tokens"}, feature_cache_dir=str(tmp_path / "kept")), tmp_path / "other", quiet=True
    )
    assert len(encoded_images) == 9
    train(
        make_recipe({"encoder": "tiny-vit"}, feature_cache_dir=str(tmp_path / "kept")), tmp_path / "another", quiet=True
    )
    assert len(encoded_images) == 18  # features depend on the encoder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "num_encoded"),
    [
        ({"steps": 10}, 10),  # each of 9 images, and first one for the size of its features
        ({"steps": 10, "feature_cache_dir": "none"}, 20),
        ({"steps": 8}, 16),  # images are used less than twice
    ],
)
def test_automatic_feature_cache_is_for_runs_that_repeat_images(
    make_recipe, tmp_path, monkeypatch, options, num_encoded
):
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "cache"))
    encoded_images, messages = record_encoded_images(monkeypatch), []
    train(make_recipe(**options), tmp_path / "run", quiet=True, report=messages.append)
    assert len(encoded_images) == num_encoded
    expected = f"caching the features of 9 images (0.0 MiB) in {tmp_path}/cache/features; set train.feature_cache_dir"
    assert [message.startswith(expected) for message in messages] == ([True] if num_encoded == 10 else [])


@pytest.mark.slow
@pytest.mark.parametrize(("missing_bytes", "num_encoded"), [(0, 10), (1, 21)])
def test_automatic_feature_cache_takes_at_most_a_quarter_of_the_free_disk_space(
    make_recipe, tmp_path, monkeypatch, missing_bytes, num_encoded
):
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "cache"))
    free_bytes = 4 * 9 * 32 * 8 * 8 * 2 - missing_bytes  # 9 images with float16 features of 32 x 8 x 8
    monkeypatch.setattr("sca.training.feature_cache._count_free_bytes", lambda folder: free_bytes)
    encoded_images = record_encoded_images(monkeypatch)
    train(make_recipe(steps=10), tmp_path / "run", quiet=True)
    assert len(encoded_images) == num_encoded


@pytest.mark.parametrize("is_first", [True, False])
def test_only_the_first_process_reports_an_automatic_feature_cache(make_recipe, tmp_path, monkeypatch, is_first):
    monkeypatch.setenv("SCA_CACHE", str(tmp_path))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    trainer = SimpleNamespace(args=SimpleNamespace(world_size=2), is_world_process_zero=lambda: is_first)
    recipe, messages = make_recipe(steps=10), []
    model, mixture, *_ = prepare_training(recipe)
    assert open_feature_cache(recipe, model, mixture, trainer, messages.append).folder.parent == tmp_path / "features"
    assert len(messages) == is_first
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # two machines, which may not share the folder
    assert open_feature_cache(recipe, model, mixture, trainer, messages.append) is None


def use_cache(recipe, messages):
    """Use the feature cache of a recipe in one process; return the cache of its examples, or None."""
    trainer = SimpleNamespace(args=SimpleNamespace(world_size=1, process_index=0), is_world_process_zero=lambda: True)
    torch.manual_seed(0)
    model, mixture, *_ = prepare_training(recipe)
    use_feature_cache(recipe, model, mixture, trainer, messages.append, quiet=True)
    return mixture.streams[0].cache


def test_training_continues_without_an_automatic_feature_cache_that_cannot_be_written(
    make_recipe, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "file" / "cache"))
    messages = []
    assert use_cache(make_recipe(steps=10), messages) is None
    assert messages[1].startswith("not caching features, because they cannot be stored: cannot write ")
    with pytest.raises(OutputError, match="choose another folder"):
        use_cache(make_recipe(steps=10, feature_cache_dir=str(tmp_path / "file" / "cache")), messages)


def test_automatic_feature_cache_of_a_resumed_run_needs_no_more_disk_space(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("SCA_CACHE", str(tmp_path))
    cache = use_cache(make_recipe(steps=10), [])
    monkeypatch.setattr("sca.training.feature_cache._count_free_bytes", lambda folder: 0)
    assert use_cache(make_recipe(steps=10), []).folder == cache.folder
    next(cache.folder.rglob("*.npy")).unlink()
    assert use_cache(make_recipe(steps=10), []) is None


def test_training_continues_without_an_automatic_feature_cache_if_features_exceed_float16(
    make_recipe, tmp_path, monkeypatch
):
    monkeypatch.setenv("SCA_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "sca.model.SegmentationModel.encode", lambda self, pixels: torch.full((len(pixels), 32, 8, 8), 1e9)
    )
    messages = []
    assert use_cache(make_recipe(steps=10), messages) is None
    assert "the features exceed the range of float16" in messages[1]


def test_recipe_rejects_empty_feature_cache_dir(make_recipe):
    with pytest.raises(RegistryError, match="feature_cache_dir is empty; use a folder"):
        make_recipe(feature_cache_dir="")


@pytest.mark.slow
def test_feature_cache_encodes_only_sampled_images(make_recipe, tmp_path, monkeypatch):
    encoded_images = record_encoded_images(monkeypatch)
    train(make_recipe(steps=2, feature_cache_dir=str(tmp_path / "kept")), tmp_path / "run", quiet=True)
    assert len(encoded_images) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": {"trainable": ["encoder", "mixer"]}},
            "requires a frozen encoder; remove it, or remove 'encoder' from trainable",
        ),
        (
            {"scenes": {"augment": {"flip_prob": 0.5}}},
            "requires images without augmentation; remove it, or data.scenes.augment",
        ),
    ],
)
def test_feature_cache_rejects_trainable_encoder_and_augmentation(make_recipe, tmp_path, change, message):
    with pytest.raises(RegistryError, match=message):
        train(make_recipe(**change, feature_cache_dir=str(tmp_path / "kept")), tmp_path / "run", quiet=True)


def test_feature_cache_reports_missing_broken_and_overflowing_features(build_small_model, tmp_path):
    model, image = build_small_model(), Image.new("RGB", (64, 48), "red")
    cache = FeatureCache(tmp_path, model)
    with pytest.raises(KeyError, match="no cached features of an image"):
        cache[image]
    cache.encode_missing(model, [image, image], lambda: None)
    assert cache[image].shape == model.encode(torch.zeros(1, 3, 64, 64)).shape[1:]
    assert np.load(cache.get_path(image)).dtype == np.float16
    for content in (b"", b"half", cache.get_path(image).read_bytes()[:-1]):
        cache.get_path(image).write_bytes(content)
        with pytest.raises(ValueError, match=r"is damaged .* delete the file"):
            cache[image]
        cache.encode_missing(model, [image], lambda: None)
        assert cache[image].isfinite().all()
    model.encode = lambda pixels: torch.full((len(pixels), 4, 8, 8), 1e9)
    cache.get_path(image).unlink()
    with pytest.raises(ValueError, match="exceed the range of float16"):
        cache.encode_missing(model, [image], lambda: None)


def test_feature_cache_removes_drafts_of_killed_processes(build_small_model, tmp_path):
    model, image = build_small_model(), Image.new("RGB", (64, 48), "red")
    cache = FeatureCache(tmp_path, model)
    draft = cache.get_path(image).with_name(f".sca-{'0' * 16}.part")
    draft.parent.mkdir(parents=True)
    draft.touch()
    cache.encode_missing(model, [image], lambda: None)
    assert [path.name for path in draft.parent.iterdir()] == [cache.get_path(image).name]
