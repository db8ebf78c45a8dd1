"""Combinations of encoders, mixers and language models: one training step, saving and loading."""

import tomllib
from pathlib import Path

import pytest
import sca_registry
import torch
from sca_registry import RegistryError
from sca_registry.contracts import Batch, PromptBatch
from tiny import LANGUAGE_MODEL_FAMILIES

import sca
from sca.testing.tiny import get_tiny_options

MIXER_OPTIONS = {
    "query": {"num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
    "split": {"num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
    "mask-tokens": {"depth": 1, "num_heads": 4, "mlp_dim": 48},
    "semantic-perceiver": {"num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
    "resampler": {"num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48},
    "roi-query": {"num_queries": 2, "depth": 1, "num_heads": 4, "mlp_dim": 48, "output_size": 3},
    "roi-pool": {"output_size": 2},
    "masked-pool": {"num_queries": 2, "mlp_dim": 48},
}


ENCODERS = (  # in addition to SAM's, which needs a folder of weights
    *("tiny-vit", "clip-vit-b-16", "siglip-b-16", "clip-rn50", "dinov2-vit-b-14", "dinov3-vit-b-16", "mae-vit-b-16"),
    *("samvit-b-16", "convnext-b", "swin-b", "hiera-b"),
    *("sam-hq-vit-b", "sam2.1-hiera-tiny", "edgetam", "sam3-tracker"),
)


def make_combination(encoder, mixer, family, lora):
    """`make test-all` tests all combinations; `make test` tests every encoder, mixer and family at least once."""
    mixer_index, family_index = (
        list(MIXER_OPTIONS).index(mixer),
        list(LANGUAGE_MODEL_FAMILIES).index(family) % len(MIXER_OPTIONS),
    )
    if encoder == "sam":
        runs_by_default = (
            family_index == mixer_index
            if not lora
            else family_index in (mixer_index, (mixer_index + 1) % len(MIXER_OPTIONS))
        )
    else:
        runs_by_default = (mixer_index, list(LANGUAGE_MODEL_FAMILIES).index(family)) == (
            list(ENCODERS).index(encoder) % len(MIXER_OPTIONS),
            mixer_index,
        )
    test_id = f"{encoder}-{mixer}-{family}-{'lora' if lora else 'frozen'}"
    return pytest.param(encoder, mixer, family, lora, id=test_id, marks=() if runs_by_default else pytest.mark.all)


COMBINATIONS = [
    *(
        make_combination("sam", mixer, family, lora)
        for mixer in MIXER_OPTIONS
        for family in LANGUAGE_MODEL_FAMILIES
        for lora in (0, 2)
    ),
    *(
        make_combination(encoder, mixer, family, 2 * (number % 2))
        for encoder in ENCODERS
        for mixer in MIXER_OPTIONS
        for number, family in enumerate(LANGUAGE_MODEL_FAMILIES)
    ),
]
MMDET_CONFIGS = (
    *("rtmdet_tiny_8xb32-300e_coco", "yolox_tiny_8xb8-300e_coco", "retinanet_r18_fpn_1x_coco"),
    *("faster-rcnn_r50_fpn_1x_coco", "detr_r50_8xb2-150e_coco"),
)
MMDET_MIXERS, MMDET_FAMILIES = ("query", "mask-tokens", "roi-pool"), ("gpt2", "llama", "qwen3")
BOXES = torch.tensor([[4.0, 4, 30, 30], [8, 8, 60, 50], [0, 0, 19, 29]])


def test_combinations_contain_every_registered_mixer():
    assert set(sca_registry.mixers.list_names()) == set(MIXER_OPTIONS)


def make_batch(image_size):
    generator = torch.Generator().manual_seed(0)
    return Batch(
        pixel_values=torch.randn(2, 3, image_size, image_size, generator=generator),
        prompts=PromptBatch(torch.tensor([0, 1, 1]), boxes=BOXES * image_size / 64),
        task_ids=torch.tensor([0, 1, 1]),
        input_ids=torch.tensor([[5, 6, 2], [8, 2, 0], [9, 3, 2]]),
        attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]]),
    )


def make_component_tables(encoder, mixer, sam_folder):
    if encoder == "sam":
        encoder_table, card = {"name": "sam", "weights": str(sam_folder)}, sca_registry.encoders.get_card("sam")
    else:
        card = sca_registry.encoders.get_card(encoder)
        encoder_table = {"name": encoder, **get_tiny_options("encoder", encoder)}
    if card.extra and sca_registry.encoders.load_entry(encoder).state != "ok":
        pytest.skip(f"the extra {card.extra} is not installed")
    return encoder_table, {"name": mixer, **MIXER_OPTIONS[mixer]}


@pytest.mark.parametrize(("encoder", "mixer", "family", "lora"), COMBINATIONS)
@pytest.mark.slow
def test_model_of_every_combination_trains_and_reloads(
    encoder, mixer, family, lora, sam_folder, save_language_model, tmp_path, monkeypatch
):
    encoder_table, mixer_table = make_component_tables(encoder, mixer, sam_folder)
    language_model_table = {"name": "hf", "weights": str(save_language_model(family))}
    check_training_and_reloading(encoder_table, mixer_table, language_model_table, lora, tmp_path, monkeypatch)


@pytest.fixture
def mmdet_plugin(tmp_path, monkeypatch):
    """The plugin sca-mmdet, as if it were installed."""
    pytest.importorskip("mmdet", reason="mmdet is not installed", exc_type=Exception)
    plugin_folder = Path(__file__).resolve().parents[2] / "plugins/sca-mmdet"
    project = tomllib.loads((plugin_folder / "pyproject.toml").read_text())["project"]
    dist_info = tmp_path / "sca_mmdet.dist-info"
    dist_info.mkdir()
    (dist_info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1\n")
    lines = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()))
    ]
    (dist_info / "entry_points.txt").write_text("\n".join(lines))
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        patch.syspath_prepend(plugin_folder)
        sca_registry.refresh_plugins()
        yield
    sca_registry.refresh_plugins()


@pytest.mark.parametrize(
    ("config", "mixer", "family"),
    [
        (config, mixer, MMDET_FAMILIES[(config_index + mixer_index) % len(MMDET_FAMILIES)])
        for config_index, config in enumerate(MMDET_CONFIGS)
        for mixer_index, mixer in enumerate(MMDET_MIXERS)
    ],
)
@pytest.mark.all
@pytest.mark.usefixtures("mmdet_plugin")
def test_model_with_an_mmdet_encoder_trains_and_reloads(
    config, mixer, family, save_language_model, tmp_path, monkeypatch
):
    encoder_table = {"name": "mmdet", "config": config, "pretrained": False, "image_size": 64}
    language_model_table = {"name": "hf", "weights": str(save_language_model(family))}
    mixer_table = {"name": mixer, **MIXER_OPTIONS[mixer]}
    check_training_and_reloading(encoder_table, mixer_table, language_model_table, 2, tmp_path, monkeypatch)


def check_training_and_reloading(encoder_table, mixer_table, language_model_table, lora, folder, monkeypatch):
    """Check that the loss decreases after one step, and that the saved model returns the same logits."""
    encoder, mixer = encoder_table["name"], mixer_table["name"]
    options = {"lora": lora, "task_tokens": 2}
    torch.manual_seed(0)
    uses_box_segmenter = sca_registry.encoders.get_declared(encoder, "default_segmenter") == "box"
    if uses_box_segmenter and "masks" in (sca_registry.mixers.get_declared(mixer, "requires") or ()):
        with monkeypatch.context() as patch:
            patch.setattr(sca_registry.encoders, "build", None)  # refused before anything is built
            with pytest.raises(RegistryError, match=rf"'{mixer}'.*segmenter=sam"):
                sca.compose(encoder_table, mixer_table, language_model_table, **options)
        options["segmenter"] = {
            "name": "sam",
            "depth": 1,
            "mlp_dim": 48,
            "num_heads": 4,
            "hidden_size": 32,
        }  # the way out
    model = sca.compose(encoder_table, mixer_table, language_model_table, **options)
    batch = make_batch(model.encoder.image_format.size)
    trainable_parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = ("mixer", "projection", "task_tokens")
    assert all(name.split(".")[0] in groups or "lora_" in name or ".neck." in name for name in trainable_parameters)
    model.train()
    optimizer = torch.optim.AdamW(trainable_parameters.values(), lr=1e-2)
    first_loss = model(batch).loss
    first_loss.backward()
    names_without_gradient = [
        name for name, p in trainable_parameters.items() if p.grad is None and not (lora and "lora_A" in name)
    ]
    assert not names_without_gradient
    optimizer.step()
    model.eval()
    with torch.no_grad():
        trained_output = model(batch)
        assert trained_output.loss < first_loss
        generated = model.generate(model.encode(batch.pixel_values), batch.prompts, batch.task_ids, max_new_tokens=3)
        assert generated.sequences.shape[:2] == (3, 1)
        sca.save(model, folder / "model")
        reloaded = sca.load(folder / "model", allow_external=True)
        assert torch.equal(reloaded(batch).logits, trained_output.logits)
    stored_bytes = (folder / "model" / "weights.safetensors").stat().st_size
    assert (
        encoder != "sam" or stored_bytes < 4 * sum(p.numel() for p in trainable_parameters.values()) + 20_000
    )  # nothing of what lies elsewhere
