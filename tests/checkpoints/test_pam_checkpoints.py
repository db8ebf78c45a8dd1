"""Checkpoints in PAM's layout: every combination of files, bad input, downloads, and export."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from pam_tiny import GOLDEN_FOLDER, copy_pam_checkpoint, save_pam_tokenizer
from safetensors.torch import load_file, save_file
from sca_registry import zoo
from sca_registry.contracts import PromptBatch
from sca_registry.spec import ModelSpec
from transformers import Sam2Config, Sam2Model

import sca
from sca.checkpoints.pam import build_published_pam_spec
from sca.checkpoints.pam_export import write_pam_checkpoint
from sca.checkpoints.pam_names import SAM_PREFIX, convert_to_native_name, convert_to_pam_name, is_video_tensor
from sca.io.errors import InputError
from sca.io.json import read_json
from sca.io.weight_files import require_weight_files
from sca.language_models.pam_prompts import PROMPT_TEMPLATE, TASK_PROMPTS

PAM_PROMPTS = {  # of PAM's notebooks
    "recognition": "Classify this subject and provide its label.",
    "caption": "Provide a concise caption for this subject.",
    "explain": "Classify this subject and provide the label and its definition.",
    "detail": "Provide a comprehensive and detailed description for this subject.",
    "recognition-zh": "对该目标对象进行分类并提供标签",
    "caption-zh": "对该目标对象提供一个概括的描述",
    "explain-zh": "对该目标对象进行分类并提供标签和名词功能解释",
    "detail-zh": "对该目标对象提供一个全面且详细的描述",
}
PROMPTS = PromptBatch(torch.tensor([0, 0]), boxes=torch.tensor([[10.0, 10, 60, 60], [50, 40, 120, 110]]))
pytestmark = pytest.mark.filterwarnings("ignore:.* has no tokenizer")


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden checkpoint, without its recorded outputs."""
    return copy_pam_checkpoint(tmp_path / "pam")


@pytest.fixture(scope="module")
def golden_logits():
    return compute_logits(sca.load(GOLDEN_FOLDER))


@torch.no_grad()
def compute_logits(model):
    features = model.encode(torch.linspace(-1, 1, 3 * 128 * 128).view(1, 3, 128, 128))
    prefix = model.build_prefix(model.mix(model.segment(features, PROMPTS)), torch.tensor([1, 1]))
    states = model.language_model.hidden_states(prefix, torch.ones(prefix.shape[:2], dtype=torch.long))
    return model.language_model.lm_head(states)


def rewrite_tensors(folder, change):
    """Replace the tensors of a checkpoint with the result of `change(tensors)`."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


def rewrite_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def rewrite_sizes(folder, table, **fields):
    """Change fields of a table of `sizes.json`, or of the file itself without a table."""
    sizes = json.loads((folder / "sizes.json").read_text())
    sizes = sizes | {table: sizes[table] | fields} if table else sizes | fields
    (folder / "sizes.json").write_text(json.dumps(sizes))


def test_every_tensor_is_loaded_or_used_for_videos_only():
    names = load_file(GOLDEN_FOLDER / "model.safetensors").keys()
    native_names = set(sca.load(GOLDEN_FOLDER).state_dict())
    ignored = {name for name in names if is_video_tensor(name)}
    assert {"model.frame_newline", "model.vision_resampler.proj.weight", f"{SAM_PREFIX}no_mem_pos_enc"} <= ignored
    special = {name for name in names if "point_embeddings" in name or "sam_prompt_encoder.pe_layer" in name}
    assert all(convert_to_native_name(name) in native_names for name in names - ignored - special)
    assert all(convert_to_pam_name(convert_to_native_name(name)) == name for name in names - ignored - special)


def test_spec_has_the_prompts_of_pam():
    spec = sca.load(GOLDEN_FOLDER).spec
    assert spec.task_names[:4] == ("recognition", "caption", "explain", "detail")
    assert spec.tasks == PAM_PROMPTS
    assert spec.prompt_template == PROMPT_TEMPLATE
    before, after = PROMPT_TEMPLATE.split("{image}")
    assert before == "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    assert after == "\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def test_tied_output_layer_can_be_absent(folder, golden_logits):
    rewrite_tensors(folder, lambda tensors: {name: each for name, each in tensors.items() if name != "lm_head.weight"})
    assert torch.equal(compute_logits(sca.load(folder)), golden_logits)


def test_untied_output_layer_is_loaded(folder):
    def scale_head(tensors):
        return tensors | {"lm_head.weight": 2 * tensors["lm_head.weight"]}

    rewrite_tensors(folder, scale_head)
    with pytest.raises(InputError, match=r"has tied embeddings, but lm_head\.weight differs from them"):
        sca.load(folder)
    rewrite_config(folder, tie_word_embeddings=False)
    model = sca.load(folder).language_model.model
    assert torch.equal(model.lm_head.weight, 2 * model.get_input_embeddings().weight)


def test_shards_are_loaded(folder, golden_logits):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert torch.equal(compute_logits(sca.load(folder)), golden_logits)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"no model-00002-of-00002\.safetensors; copy or download it again") as caught:
        sca.load(folder)
    assert "\n" not in str(caught.value)


def test_missing_shards_of_a_prefix_are_listed_alone(tmp_path):
    (tmp_path / "part").mkdir()
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "part" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "part" / weight_map["a"]).touch()
    with pytest.raises(InputError, match=r"incomplete weights: no model-00002-of-00002\.safetensors;"):
        require_weight_files(tmp_path, tmp_path, "part/")


def test_bfloat16_language_model_keeps_its_dtype(folder):
    rewrite_tensors(folder, lambda tensors: {name: each.bfloat16() for name, each in tensors.items()})
    model = sca.load(folder)
    assert model.language_model.model.dtype == torch.bfloat16
    assert {each.dtype for each in model.mixer.parameters()} == {torch.float32}
    expected = load_file(folder / "model.safetensors")["model.image_newline"]
    assert torch.equal(model.mixer.image_newline, expected.float())
    assert compute_logits(model).isfinite().all()


def test_subfolder_of_a_repository_is_found(folder, tmp_path, golden_logits):
    repository = tmp_path / "PAM-1.5B"
    folder.rename(repository.with_name("moved"))
    repository.mkdir()
    shutil.move(tmp_path / "moved", repository / "PAM-1.5B")
    (repository / "README.md").write_text("model card")
    assert torch.equal(compute_logits(sca.load(repository)), golden_logits)
    shutil.rmtree(repository / "PAM-1.5B")
    expected = "has no checkpoint; expected spec.json, config.json, or one sub-folder with a PAM checkpoint"
    with pytest.raises(InputError, match=expected):
        sca.load(repository)
    for name in ("one", "two"):
        copy_pam_checkpoint(repository / name)
    with pytest.raises(InputError, match=expected):
        sca.load(repository)


@pytest.mark.parametrize("linked", ["PAM", "PAM/config.json"])
def test_linked_subfolder_outside_the_repository_requires_allow_external(
    folder, tmp_path, golden_logits, linked, monkeypatch
):
    repository = tmp_path / "repository"
    (repository / linked).parent.mkdir(parents=True)
    if linked != "PAM":
        shutil.copytree(folder, repository / "PAM", dirs_exist_ok=True)
        (repository / linked).unlink()
    target = folder if linked == "PAM" else folder / "config.json"
    (repository / linked).symlink_to(target)
    read_files = []

    def record_read(path, *args, **kwargs):
        read_files.append(path.resolve())
        return read_json(path, *args, **kwargs)

    monkeypatch.setattr("sca.checkpoints.layout.read_json", record_read)
    with pytest.raises(InputError, match="is a link to outside its folder; pass allow_external=True"):
        sca.load(repository)
    assert folder / "config.json" not in read_files
    assert torch.equal(compute_logits(sca.load(repository, allow_external=True)), golden_logits)


def test_linked_subfolder_inside_the_repository_is_loaded(folder, tmp_path, golden_logits):
    (tmp_path / "repository" / "files").mkdir(parents=True)
    shutil.move(folder, tmp_path / "repository" / "files" / "pam")
    (tmp_path / "repository" / "PAM").symlink_to(tmp_path / "repository" / "files" / "pam")
    assert torch.equal(compute_logits(sca.load(tmp_path / "repository")), golden_logits)


def test_model_without_sam_uses_the_published_weights(folder, tmp_path, golden_logits, monkeypatch):
    save_sam(sca.load(folder), tmp_path / "sam")
    rewrite_tensors(
        folder, lambda tensors: {name: each for name, each in tensors.items() if not name.startswith(SAM_PREFIX)}
    )
    monkeypatch.setattr("sca.io.hub.download_model_files", lambda *args, **kwargs: tmp_path / "sam")
    monkeypatch.setattr("sca.io.hub._find_cached_folder", lambda *args: None)
    model = sca.load(folder)
    assert model.spec.encoder.name == "sam2.1-hiera-large"
    assert model.encoder.checkpoint == "facebook/sam2.1-hiera-large"
    torch.testing.assert_close(compute_logits(model), golden_logits)


def save_sam(model, folder):
    """Save the SAM 2 of a model in the format of transformers."""
    config = Sam2Config(**model.spec.encoder.options["config"])
    sam = Sam2Model(config)
    tensors = sam.state_dict()
    for name, tensor in model.state_dict().items():
        for native, target in (
            ("encoder.vision.", "vision_encoder."),
            ("encoder.no_memory_embedding", "no_memory_embedding"),
            ("encoder.high_res_projections.0.", "mask_decoder.conv_s1."),
            ("encoder.high_res_projections.1.", "mask_decoder.conv_s0."),
            ("segmenter.prompt_encoder.", "prompt_encoder."),
            ("segmenter.decoder.", "mask_decoder."),
            ("segmenter.grid_embedding.", "shared_image_embedding."),
        ):
            if name.startswith(native):
                tensors[target + name.removeprefix(native)] = tensor
    sam.load_state_dict(tensors)
    sam.save_pretrained(folder)


def test_tokenizer_of_the_folder_is_loaded(folder):
    save_pam_tokenizer(folder)
    model = sca.load(folder)
    tokenizer = model.language_model.tokenizer
    assert tokenizer.eos_token_id == 96  # <|im_end|>
    prompt = model.encode_task_prompt("caption")
    assert prompt.before[0] == prompt.after[-2] == 95  # <|im_start|>
    captions = sca.Predictor(model)
    assert captions.engine.tasks == tuple(TASK_PROMPTS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: rewrite_config(folder, mm_vision_tower="openai/clip-vit-large"),
            "LLaVA checkpoint without SAM 2",
        ),
        (lambda folder: rewrite_config(folder, mm_vision_tower=None), "LLaVA checkpoint without SAM 2"),
        (lambda folder: rewrite_config(folder, mm_projector_type="linear"), "only 'mlp2x_gelu' is supported"),
        (lambda folder: (folder / "model.safetensors").unlink(), "incomplete weights"),
        (lambda folder: (folder / "sizes.json").unlink(), "add a sizes.json with hiera.num_heads"),
        (
            lambda folder: save_pam_tokenizer(folder, special_tokens=("<|im_end|>",)),
            "lacks the special tokens <|im_start|>",
        ),
        (
            lambda folder: save_pam_tokenizer(folder, size=98),
            "the tokenizer has 98 tokens, but the language model has 97",
        ),
        (
            lambda folder: rewrite_tensors(folder, lambda tensors: tensors | {"model.extra": torch.zeros(1)}),
            "unexpected model.extra",
        ),
        (
            lambda folder: rewrite_tensors(
                folder, lambda tensors: {name: each for name, each in tensors.items() if "semT_newline" not in name}
            ),
            "missing model.semT_newline",
        ),
        (
            lambda folder: rewrite_tensors(
                folder, lambda tensors: {name: each for name, each in tensors.items() if "sem_tokens" not in name}
            ),
            "has no tensor model.vision_resampler.sem_tokens.weight",
        ),
        (
            lambda folder: rewrite_tensors(
                folder, lambda tensors: tensors | {"mixer.image_newline": tensors["model.image_newline"]}
            ),
            "unexpected mixer.image_newline",
        ),
        (
            lambda folder: rewrite_tensors(
                folder, lambda tensors: tensors | {"model.vision_resampler.layers.0.layer_norm1.weight": torch.ones(32)}
            ),
            "unexpected model.vision_resampler.layers.0.layer_norm1.weight",
        ),
        (
            lambda folder: rewrite_tensors(
                folder, lambda tensors: {name: each for name, each in tensors.items() if "embeddings.2" not in name}
            ),
            f"missing {SAM_PREFIX}sam_prompt_encoder.point_embeddings.2.weight",
        ),
        (
            lambda folder: rewrite_tensors(folder, lambda tensors: tensors | {"model.semT_newline": torch.ones(9)}),
            "model.semT_newline is (9,) and the config.json requires (48,)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_checkpoint_is_rejected_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError) as caught:
        sca.load(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "field", "value", "message"),
    [
        *(
            (None, "image_size", value, f"image_size is {value!r}; expected a multiple of 32 from 32 to 4096")
            for value in (-128, 0, 100, 8192, 128.0, True, "128", [128])
        ),
        (None, "extra", 1, "unknown field 'extra'; use image_size, hiera"),
        (None, "hiera", [1], "hiera is [1]; expected an object"),
        *(
            ("perceiver", "heads", value, f"perceiver.heads is {value!r}; expected an integer of at least 1")
            for value in (0, -1, 1.0, True)
        ),
        ("perceiver", "heads", 7, "perceiver.heads is 7; expected a divisor of 16"),
        ("perceiver", "queries", 6, "perceiver.queries is 6; expected 5, as the tensors have"),
        ("perceiver", "downsample", 4, "perceiver.downsample is 4; expected 2, the only supported value"),
        ("perceiver", "extra", 4, "unknown field 'perceiver.extra'; use heads, "),
        ("sam_decoder", "heads", None, "sam_decoder.heads is None; expected an integer of at least 1"),
        ("hiera", "num_heads", 3, "hiera.num_heads is 3; expected a divisor of 8"),
        ("hiera", "window_spec", [8, 4, 16], "hiera.window_spec is [8, 4, 16]; expected 4 sizes of at least 1"),
        ("hiera", "window_spec", [8, 4, 16, 0], "hiera.window_spec is [8, 4, 16, 0]; expected 4 sizes of at least 1"),
        ("hiera", "window_spec", 8, "hiera.window_spec is 8; expected a list of integers"),
        ("hiera", "global_att_blocks", [7], "hiera.global_att_blocks is [7]; expected indices less than 7"),
        ("neck", "scalp", 0, "neck.scalp is 0; expected 1, the only supported value"),
    ],
)
def test_sizes_are_validated(folder, table, field, value, message):
    rewrite_sizes(folder, table, **{field: value})
    with pytest.raises(InputError) as caught:
        sca.load(folder)
    assert str(caught.value).startswith(f"{folder / 'sizes.json'}: {message}")


def test_sizes_must_be_an_object(folder):
    (folder / "sizes.json").write_text("[1]")
    with pytest.raises(InputError, match=r"sizes\.json contains no JSON object"):
        sca.load(folder)


def test_rope_scaling_of_the_configuration_is_not_used(folder, golden_logits):
    rewrite_config(folder, rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16})
    assert torch.equal(compute_logits(sca.load(folder)), golden_logits)


def test_native_checkpoint_round_trips(folder, tmp_path, golden_logits):
    sca.save(sca.load(folder), tmp_path / "native")
    assert torch.equal(compute_logits(sca.load(tmp_path / "native")), golden_logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_writes_the_same_tensors(folder, tmp_path, dtype):
    rewrite_tensors(folder, lambda tensors: {name: each.to(dtype) for name, each in tensors.items()})
    save_pam_tokenizer(folder)
    model = sca.load(folder)
    write_pam_checkpoint(model, tmp_path / "out")
    original, exported = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "out"))
    assert exported.keys() == {name for name in original if not is_video_tensor(name)}
    for name, tensor in exported.items():
        assert tensor.dtype == original[name].dtype
        assert torch.equal(tensor, original[name])
    reloaded = sca.load(tmp_path / "out")
    assert reloaded.spec == model.spec
    assert reloaded.language_model.tokenizer.eos_token_id == 96
    assert torch.equal(compute_logits(reloaded), compute_logits(model))


def test_export_rejects_another_mixer(build_small_model, tmp_path):
    with pytest.raises(InputError, match="does not support the mixer 'query'; supported is semantic-perceiver"):
        write_pam_checkpoint(build_small_model(), tmp_path / "out")


def test_export_merges_lora(folder, tmp_path):
    model = sca.load(folder)
    model.language_model.add_lora(rank=2, alpha=4)
    model.spec = dataclasses.replace(model.spec, lora=2)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    expected = compute_logits(model.eval())
    write_pam_checkpoint(model, tmp_path / "out")
    reloaded = sca.load(tmp_path / "out")
    assert reloaded.spec.lora is None
    torch.testing.assert_close(compute_logits(reloaded), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, compute_logits(sca.load(folder)), rtol=1e-2)
    torch.testing.assert_close(compute_logits(model), expected, rtol=0, atol=0)  # unchanged by the export


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        (None, {"tasks": {**PAM_PROMPTS, "caption": "Describe this."}}, "other tasks, prompts or prompt templates"),
        (None, {"prompt_template": "{image} {prompt}"}, "other tasks, prompts or prompt templates"),
        ("encoder", {"resample": "bilinear"}, "the interpolation 'bilinear'"),
        ("segmenter", {"single_mask": False}, "several masks per region"),
        ("config", {"rope_parameters": YARN}, "the rope scaling 'yarn'"),
        (
            "config",
            {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
            "sliding windows",
        ),
    ],
)
def test_export_rejects_what_the_layout_cannot_express(folder, tmp_path, section, fields, message):
    table = sca.load(folder).spec.to_dict()
    if section == "config":
        table["language_model"]["config"] |= fields
    elif section:
        table[section] |= fields
    else:
        table |= fields
    with pytest.raises(InputError, match=f"^the layout of PAM does not support {re.escape(message)}"):
        write_pam_checkpoint(sca.build(ModelSpec.from_dict(table)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pam-1.5b", "pam-3b"])
def test_zoo_entry_has_the_parameters_of_the_published_model(name):
    entry = zoo.get_entry(name)
    model = sca.build(build_published_pam_spec(entry.config), device="meta")
    assert sum(each.numel() for each in model.parameters()) == entry.parameters
    assert model.prefix_length == 1042
