"""Weights of tiny-vit in a folder: they load exactly with or without the segmenter `sam`, or raise a one-line error."""

import json
import re

import pytest
import sca_registry
import torch
from safetensors.torch import load_file, save_file
from sca_registry import RegistryError
from sca_registry.contracts import PromptBatch
from tiny import TINY_VIT_OPTIONS, TRAINING_FACTS

import sca
from pretrained_folder import save_encoder
from sca.checkpoints.tensors import list_stored_tensors
from sca.encoders.tiny_vit import TinyVit
from sca.plan import plan_model
from sca.segmenters.sam import SamSegmenter

MIXER = {"name": "query", "depth": 1, "num_heads": 2, "mlp_dim": 32}
LANGUAGE_MODEL = {"name": "tiny-gpt2", "hidden_size": 32, "depth": 1, "num_heads": 2}
PROMPTS = PromptBatch(torch.tensor([0, 1]), boxes=torch.tensor([[4.0, 4, 30, 40], [10, 10, 60, 50]]))


def build_trained_encoder(seed):
    """Return an encoder in eval mode whose batch norms have seen images."""
    torch.manual_seed(seed)
    encoder = TinyVit(**TINY_VIT_OPTIONS)
    encoder(torch.randn(4, 3, 64, 64))
    return encoder.eval()


@pytest.fixture
def encoder_folder(tmp_path):
    """Folder and encoder without a segmenter."""
    encoder = build_trained_encoder(1)
    save_encoder(tmp_path / "vit", TINY_VIT_OPTIONS, encoder, None, TRAINING_FACTS)
    return tmp_path / "vit", encoder


@pytest.fixture
def segmenter_folder(tmp_path):
    """Folder, encoder and segmenter."""
    encoder = build_trained_encoder(2)
    segmenter = SamSegmenter(encoder, depth=1, num_heads=2, mlp_dim=48, box_masks=True).eval()
    save_encoder(tmp_path / "sam", TINY_VIT_OPTIONS, encoder, segmenter, TRAINING_FACTS)
    return tmp_path / "sam", encoder, segmenter


@torch.no_grad()
def test_tiny_vit_loads_the_tensors_and_options_of_a_folder(encoder_folder):
    folder, encoder = encoder_folder
    loaded = TinyVit(weights=str(folder)).eval()
    pixel_values = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(pixel_values), encoder(pixel_values))
    assert loaded.image_format == encoder.image_format
    assert loaded.checkpoint == str(folder)
    assert loaded.default_segmenter == "box"
    random = TinyVit(weights=str(folder), pretrained=False)
    assert random.checkpoint is None
    assert random.image_format == encoder.image_format
    assert not torch.equal(random.position, encoder.position)


@torch.no_grad()
def test_sam_segmenter_uses_the_weights_and_box_masks_of_its_tiny_vit(segmenter_folder):
    folder, encoder, segmenter = segmenter_folder
    loaded_encoder = TinyVit(weights=str(folder)).eval()
    assert loaded_encoder.default_segmenter == "sam"
    loaded = SamSegmenter(loaded_encoder).eval()
    assert loaded.checkpoint == str(folder)
    assert loaded.box_masks
    pixel_values = torch.randn(2, 3, 64, 64)
    expected = segmenter(encoder(pixel_values), PROMPTS)
    output = loaded(loaded_encoder(pixel_values), PROMPTS)
    torch.testing.assert_close(output.masks, expected.masks)
    torch.testing.assert_close(output.iou_scores, expected.iou_scores)
    assert not SamSegmenter(loaded_encoder, box_masks=False).box_masks


def test_sam_segmenter_has_random_weights_for_a_tiny_vit_without_a_segmenter(encoder_folder):
    segmenter = SamSegmenter(TinyVit(weights=str(encoder_folder[0])), num_heads=2)
    assert segmenter.checkpoint is None
    assert not segmenter.box_masks


@torch.no_grad()
@pytest.mark.parametrize("segmenter", ["box", "sam"])
def test_checkpoint_with_a_frozen_tiny_vit_stores_only_what_trains(segmenter, request, tmp_path):
    folder = request.getfixturevalue({"box": "encoder_folder", "sam": "segmenter_folder"}[segmenter])[0]
    model = sca.compose({"name": "tiny-vit", "weights": str(folder)}, MIXER, LANGUAGE_MODEL, task_tokens=1)
    stored = {name for name in list_stored_tensors(model) if name.startswith(("encoder.", "segmenter."))}
    assert {name.split(".")[0] for name in stored} == ({"segmenter"} if segmenter == "box" else set())
    sca.save(model, tmp_path / "model")
    reloaded = sca.load(tmp_path / "model", allow_external=True)
    pixel_values = torch.randn(2, 3, 64, 64)
    features = model.encode(pixel_values)
    assert torch.equal(reloaded.encode(pixel_values), features)
    assert torch.equal(reloaded.mix(reloaded.segment(features, PROMPTS)), model.mix(model.segment(features, PROMPTS)))
    origin = json.loads((tmp_path / "model" / "origin.json").read_text())["components"]["encoder"]
    assert origin["weights"] == str(folder)
    assert [len(digest) for digest in origin["sha256"].values()] == [64]


def test_plan_counts_the_parameters_of_a_tiny_vit_folder(encoder_folder):
    spec = sca.ModelSpec.from_dict(
        {
            "encoder": {"name": "tiny-vit", "weights": str(encoder_folder[0])},
            "mixer": MIXER,
            "language_model": LANGUAGE_MODEL,
        }
    )
    plan = plan_model(spec)
    assert plan.parameters["encoder"] == sum(each.numel() for each in encoder_folder[1].parameters())


def test_random_segmenter_has_the_sizes_and_box_masks_stored_with_the_weights_of_its_encoder(segmenter_folder):
    folder, _, segmenter = segmenter_folder
    encoder = TinyVit(weights=str(folder), pretrained=False)
    random = SamSegmenter(encoder, pretrained=False)
    expected = segmenter.state_dict()
    assert {name: tensor.shape for name, tensor in random.state_dict().items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    assert random.box_masks
    assert not torch.equal(random.decoder.iou_token.weight, segmenter.decoder.iou_token.weight)
    wider = SamSegmenter(encoder, pretrained=False, mlp_dim=64, box_masks=False)
    assert wider.decoder.transformer.layers[0].mlp.lin1.out_features == 64
    assert wider.decoder.transformer.layers[0].self_attn.num_attention_heads == 2
    assert not wider.box_masks


def test_random_segmenter_of_another_encoder_has_the_sizes_stored_with_its_own_weights(segmenter_folder):
    folder, _, segmenter = segmenter_folder
    random = SamSegmenter(TinyVit(**TINY_VIT_OPTIONS), weights=str(folder), pretrained=False)
    assert {name: tensor.shape for name, tensor in random.state_dict().items()} == {
        name: tensor.shape for name, tensor in segmenter.state_dict().items()
    }


def test_plan_counts_the_segmenter_of_a_tiny_vit_folder(segmenter_folder):
    folder, _, segmenter = segmenter_folder
    spec = sca.ModelSpec.from_dict(
        {
            "encoder": {"name": "tiny-vit", "weights": str(folder)},
            "mixer": MIXER,
            "language_model": LANGUAGE_MODEL,
        }
    )
    assert plan_model(spec).parameters["segmenter"] == sum(each.numel() for each in segmenter.parameters())


def test_mixer_that_needs_masks_is_rejected_for_a_tiny_vit_without_a_segmenter(encoder_folder):
    message = "mixer 'mask-tokens' needs masks and grid, but segmenter 'box' provides only boxes"
    with pytest.raises(RegistryError, match=message):
        sca.compose({"name": "tiny-vit", "weights": str(encoder_folder[0])}, "mask-tokens", LANGUAGE_MODEL)


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def remove_tensor(folder):
    change_tensors(folder, lambda tensors: tensors.pop("encoder.position"))


def add_tensor(folder):
    change_tensors(folder, lambda tensors: tensors.update({"encoder.extra": torch.zeros(1)}))


def change_shape(folder):
    change_tensors(folder, lambda tensors: tensors.update({"encoder.position": torch.zeros(1, 3, 32)}))


def replace_with_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncate_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def remove_options(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "sam"}))


def remove_config(folder):
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_tensor, r"does not fit a TinyVitModel: it lacks encoder\.position"),
        (add_tensor, r"does not fit a TinyVitModel: it has unexpected tensors encoder\.extra"),
        (change_shape, r"does not fit a TinyVitModel: it has other shapes for encoder\.position"),
        (replace_with_pickle, "model.safetensors"),
        (truncate_weights, "cannot be read"),
        (remove_options, "its config.json requires a table encoder with the options image_size, hidden_size"),
        (remove_config, "config.json"),
    ],
)
def test_tiny_vit_rejects_a_damaged_folder_in_one_line(damage, message, encoder_folder):
    folder, _ = encoder_folder
    damage(folder)
    with pytest.raises(ValueError, match=message) as raised:
        sca_registry.encoders.build("tiny-vit", weights=str(folder))
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


def test_tiny_vit_rejects_an_option_that_differs_from_that_of_its_weights(encoder_folder):
    folder, _ = encoder_folder
    message = f"{re.escape(str(folder))} was trained with image_size=64; remove image_size=96"
    with pytest.raises(ValueError, match=message):
        TinyVit(image_size=96, weights=str(folder))
    assert TinyVit(image_size=64, stem_channels=[8, 16], weights=str(folder)).image_format.size == 64
