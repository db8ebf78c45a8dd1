"""Encoders of open_clip and timm: outputs equal those of the libraries, with weights in their layouts."""

import json
import pickle

import pytest
import sca_registry
import torch
from safetensors.torch import load_file, save_file
from sca_registry import RegistryError
from sca_registry.contracts import PromptBatch

import sca
from sca.io.errors import InputError
from sca.testing.tiny import get_tiny_options

open_clip = pytest.importorskip("open_clip", reason="the extra clip is not installed", exc_type=Exception)
timm = pytest.importorskip("timm", reason="the extra timm is not installed", exc_type=Exception)

VISION_CONFIG = {"image_size": 64, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16}
TEXT_CONFIG = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
PREPROCESS_CONFIG = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}
VIT_CONFIG = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 64}


@pytest.fixture
def clip(tmp_path):
    """Folder and model of a small CLIP in open_clip's layout."""
    torch.manual_seed(0)
    folder = tmp_path / "clip"
    folder.mkdir()
    config = {"embed_dim": 24, "vision_cfg": VISION_CONFIG, "text_cfg": TEXT_CONFIG}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS_CONFIG})
    )
    model = open_clip.CLIP(**config).eval()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder, model


@pytest.fixture
def vit(tmp_path):
    """Folder and model of a small ViT in timm's layout, with its head."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **VIT_CONFIG).eval()
    timm.models.save_for_hf(model, tmp_path / "vit", model_args=VIT_CONFIG, safe_serialization=True)
    return tmp_path / "vit", model


def build_encoder(name, **options):
    return sca_registry.encoders.build(name, **options).eval()


@torch.no_grad()
def test_open_clip_encoder_returns_patch_features_of_the_image_tower(clip):
    folder, model = clip
    pixels = torch.randn(2, 3, 64, 64)
    clip_encoder = build_encoder("open-clip", weights=str(folder))
    assert (
        clip_encoder.channels,
        clip_encoder.stride,
        clip_encoder.image_format.size,
        clip_encoder.image_format.mean,
    ) == (32, 16, 64, (0.5, 0.4, 0.3))
    assert clip_encoder.image_format.resample == "bilinear"
    model.visual.output_tokens, model.visual.proj = True, None
    torch.testing.assert_close(clip_encoder(pixels).flatten(2).mT, model.visual(pixels)[1], rtol=1e-5, atol=1e-5)
    layer_features = model.visual.forward_intermediates(pixels, indices=[1], intermediates_only=True)[
        "image_intermediates"
    ][0]
    torch.testing.assert_close(build_encoder("open-clip", weights=str(folder), feature_layer=1)(pixels), layer_features)
    assert len(build_encoder("open-clip", weights=str(folder), feature_layer=1).visual.tower.transformer.resblocks) == 2


@torch.no_grad()
def test_timm_encoder_returns_normalized_patch_features(vit):
    folder, model = vit
    pixels = torch.randn(2, 3, 64, 64)
    tokens = model.forward_features(pixels)[:, 1:]
    timm_encoder = build_encoder("timm", weights=str(folder))
    torch.testing.assert_close(timm_encoder(pixels).flatten(2).mT, tokens, rtol=1e-5, atol=1e-5)
    encoder_by_model_name = build_encoder(
        "timm", model="vit_tiny_patch16_224", weights=str(folder / "model.safetensors"), config=VIT_CONFIG
    )
    torch.testing.assert_close(encoder_by_model_name(pixels), timm_encoder(pixels))
    assert build_encoder("timm", weights=str(folder), feature_layer=-2)(pixels).shape == (2, 32, 4, 4)


@torch.no_grad()
def test_encoders_resize_position_embeddings_like_open_clip_and_timm(clip, vit):
    folder, _ = clip
    reference = open_clip.create_model(f"local-dir:{folder}", force_image_size=96).visual
    resized_encoder = build_encoder("open-clip", weights=str(folder), image_size=96)
    assert resized_encoder(torch.zeros(1, 3, 96, 96)).shape == (1, 32, 6, 6)
    assert torch.equal(resized_encoder.visual.tower.positional_embedding, reference.positional_embedding)
    resized_encoder = build_encoder("timm", weights=str(vit[0]), image_size=96)
    reference = timm.create_model(f"local-dir:{vit[0]}", pretrained=True, img_size=96)
    assert torch.equal(resized_encoder.backbone.network.pos_embed, reference.pos_embed)


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_save_references_frozen_encoder_weights_and_records_their_origin(kind, request, tmp_path):
    folder, _ = request.getfixturevalue(kind)
    encoder_table = {"name": {"clip": "open-clip", "vit": "timm"}[kind], "weights": str(folder)}
    mixer = {"name": "query", "depth": 1, "mlp_dim": 64, "num_heads": 4}
    model = sca.compose(encoder_table, mixer, {"name": "tiny-gpt2", "hidden_size": 32})
    sca.save(model, tmp_path / "model")
    reloaded = sca.load(tmp_path / "model", allow_external=True)
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(reloaded.encode(pixels), model.encode(pixels))
    origin = json.loads((tmp_path / "model" / "origin.json").read_text())["components"]["encoder"]
    assert origin["weights"] == str(folder)
    assert all(len(digest) == 64 for digest in origin["sha256"].values())
    assert len(origin["sha256"]) == 1


def test_compose_adds_a_trainable_neck_for_a_segmenter_of_another_width(clip):
    folder, _ = clip
    segmenter = {"name": "box", "hidden_size": 48}
    model = sca.compose(
        {"name": "open-clip", "weights": str(folder)}, "query", "tiny-gpt2", segmenter=segmenter, task_tokens=1
    )
    trainable_names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(name.startswith("segmenter.neck.") for name in trainable_names)
    assert not any(name.startswith("encoder.") for name in trainable_names)


class MaliciousPickle:
    def __reduce__(self):
        return print, ("this must not run",)


def damage_weights(folder, file_name, damage):
    file = folder / file_name
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "pickle":
        file.unlink()
        (folder / file_name.replace("model.safetensors", "pytorch_model.bin")).write_bytes(
            pickle.dumps({"a": MaliciousPickle()})
        )
    elif damage == "missing":
        file.unlink()
    else:
        tensors = load_file(file)
        tensors["foreign"] = tensors.pop(
            next(file_name for file_name in tensors if "norm1" in file_name or "ln_1" in file_name)
        )
        save_file(tensors, file)


@pytest.mark.parametrize("damage", ["truncated", "pickle", "missing", "foreign"])
@pytest.mark.parametrize(
    ("kind", "name", "file_name"),
    [("clip", "open-clip", "open_clip_model.safetensors"), ("vit", "timm", "model.safetensors")],
)
def test_encoder_rejects_damaged_weights_in_one_line(kind, name, file_name, damage, request, capsys):
    folder, _ = request.getfixturevalue(kind)
    damage_weights(folder, file_name, damage)
    with pytest.raises((InputError, RegistryError)) as caught:
        build_encoder(name, weights=str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "this must not run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm", {"model": "vit_tiny_patch16_22", "pretrained": False}, "Did you mean 'vit_tiny_patch16_224'"),
        ("open-clip", {"model": "ViT-B-61", "pretrained": False}, "Did you mean 'ViT-B-16'"),
        ("open-clip", {"model": "ViT-B-16", "pretrained": "opnai"}, "Did you mean 'openai'"),
        ("timm", {}, "no weights; set"),
        ("open-clip", {}, "no weights; set"),
        (
            "timm",
            {"model": "vit_tiny_patch16_224", "pretrained": False, "feature_layer": 12},
            "layer 12 is out of range; .* has 12",
        ),
        (
            "open-clip",
            {"model": "ViT-B-16", "pretrained": False, "feature_layer": -13},
            "layer -13 is out of range; .* has 12",
        ),
        ("timm", {"model": "vit_tiny_patch16_224", "pretrained": False, "image_size": 70}, "70"),
        ("timm", {"model": "vit_tiny_patch16_224", "pretrained": False, "config": {"dept": 2}}, "dept"),
        ("timm", {"model": "vit_tiny_patch16_224", "pretrained": False, "config": {"num_classes": 2}}, "omit it"),
        ("timm", {"model": "vit_tiny_patch16_224", "pretrained": "augreg"}, "NAME.TAG"),
        ("open-clip", {"model": "ViT-B-16", "pretrained": "openai", "weights": "a/b"}, "are mutually exclusive"),
        ("open-clip", {"model": "ViT-B-16", "pretrained": False, "image_size": 68}, "multiple of the stride 16"),
    ],
)
@pytest.mark.slow
def test_encoder_rejects_invalid_models_layers_and_sizes(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(name, **options)


def test_open_clip_encoder_leaves_root_logging_unchanged():
    import logging

    logging_before = (list(logging.root.handlers), logging.root.level, logging.root.disabled)
    build_encoder("open-clip", **get_tiny_options("encoder", "open-clip"))
    assert (list(logging.root.handlers), logging.root.level, logging.root.disabled) == logging_before


def test_encoder_cards_state_license_source_and_extra():
    names = sca_registry.encoders.list_names()
    assert len(names) >= 40
    for name in names:
        card = sca_registry.encoders.get_card(name)
        assert card.license
        assert "arXiv" in card.source or name in ("open-clip", "timm")
        module = card.factory.split(".")[2].partition(":")[0]
        expected_extra = {"open_clip": "clip", "timm": "timm"}.get(module, "")
        assert card.extra == ("timm" if name == "edgetam" else expected_extra)  # its backbone is a timm model


@torch.no_grad()
def test_sam_segmenter_works_with_an_encoder_of_another_width_and_grid(clip, sam_folder):
    folder, _ = clip
    model = sca.compose(
        {"name": "open-clip", "weights": str(folder), "image_size": 96, "feature_layer": 1},
        {"name": "mask-tokens", "depth": 1, "mlp_dim": 64, "num_heads": 4},
        {"name": "tiny-gpt2", "hidden_size": 32},
        segmenter={"name": "sam", "weights": str(sam_folder)},
    )
    features = model.encode(torch.randn(1, 3, 96, 96))
    image_index = torch.zeros(2, dtype=torch.long)
    boxes, masks = torch.tensor([[5.0, 5, 60, 60], [20, 30, 90, 95]]), torch.randn(2, 1, 24, 24)
    for prompts in (
        PromptBatch(image_index, boxes=boxes),
        PromptBatch(image_index, points=boxes[:, None, :2], labels=torch.ones(2, 1)),
        PromptBatch(image_index, boxes=boxes, masks=masks),
    ):
        regions = model.segment(features, prompts)
        assert regions.masks.shape == (2, 3, 24, 24)
        assert model.mix(regions).isfinite().all()
    assert not torch.equal(model.segment(features, PromptBatch(image_index, boxes=boxes)).masks, regions.masks)


@pytest.mark.parametrize("segmenter", ["box", "sam"])
@pytest.mark.slow
def test_compose_reduces_wide_encoder_features_to_256_channels(segmenter):
    """All encoders have the same output channels, so that mixers have equal sizes."""
    wide_model, narrow_model = (
        sca.compose(encoder, "query", "gpt2", segmenter=segmenter, device="meta")
        for encoder in ("clip-vit-b-16", "tiny-vit")
    )
    assert (wide_model.encoder.channels, wide_model.segmenter.channels) == (768, 256)
    assert any("segmenter.neck." in name for name, p in wide_model.named_parameters() if p.requires_grad)
    assert narrow_model.segmenter.channels == narrow_model.encoder.channels


def test_open_clip_config_uses_the_activation_of_the_pretrained_tag():
    from sca.encoders.open_clip import resolve_pretrained_config

    assert resolve_pretrained_config("ViT-B-16", "openai", None)["quick_gelu"]
    assert resolve_pretrained_config("ViT-B-16", True, "timm/vit_base_patch16_clip_224.openai")["quick_gelu"]
    assert not resolve_pretrained_config("ViT-B-16", True, "laion/CLIP-ViT-B-16-laion2B-s34B-b88K").get("quick_gelu")
    assert not resolve_pretrained_config("ViT-B-16", "file.pt", None).get("quick_gelu")


@pytest.mark.parametrize(
    ("name", "model"),
    [
        *(("open-clip", model) for model in ("coca_ViT-B-32", "RN50", "convnext_base_w", "MobileCLIP2-S2")),
        *(("timm", model) for model in ("rexnet_100", "resnest50d", "coat_lite_mini", "efficientnet_b0", "pvt_v2_b2")),
    ],
)
@pytest.mark.slow
def test_encoder_supports_diverse_open_clip_and_timm_architectures(name, model):
    if model == "coat_lite_mini" and not hasattr(timm.models.CoaT, "forward_intermediates"):
        pytest.skip("CoaT has no intermediate features before timm 1.0.31")
    with torch.device("meta"):
        built_encoder = build_encoder(name, model=model, pretrained=False)
    assert built_encoder.channels > 0
    assert built_encoder.stride in (16, 32)


def test_timm_encoder_prefers_model_args_over_the_original_pretrained_cfg(vit):
    folder, _ = vit
    config = json.loads((folder / "config.json").read_text())
    config["num_classes"], config["model_args"] = 5, VIT_CONFIG
    config["pretrained_cfg"] |= {"num_classes": 1000, "input_size": [3, 224, 224]}  # as timm before 1.0.31 writes it
    (folder / "config.json").write_text(json.dumps(config))
    assert build_encoder("timm", weights=str(folder)).image_format.size == 64
    assert (
        build_encoder("timm", weights=str(folder), model="vit_tiny_patch16_224", config=VIT_CONFIG).image_format.size
        == 64
    )


@torch.no_grad()
def test_timm_encoder_reads_the_image_mean_from_the_weights_folder(vit):
    folder, _ = vit
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
    (folder / "config.json").write_text(json.dumps(config))
    for options in ({}, {"model": "vit_tiny_patch16_224", "config": VIT_CONFIG}):
        assert build_encoder("timm", weights=str(folder), **options).image_format.mean == (0.1, 0.2, 0.3)
