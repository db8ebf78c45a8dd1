"""Checkpoints in PAM's layout: every combination of files, bad input, downloads, and export."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sca_registry import zoo
from sca_registry.contracts import PromptBatch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Sam2Config, Sam2Model

import sca
from sca.checkpoints.pam import build_published_pam_spec
from sca.checkpoints.pam_export import write_pam_checkpoint
from sca.checkpoints.pam_names import SAM_PREFIX, convert_to_native_name, convert_to_pam_name, is_video_tensor
from sca.io.errors import InputError
from sca.language_models.pam_prompts import PROMPT_TEMPLATE, TASK_PROMPTS

GOLDEN_FOLDER = Path(__file__).resolve().parents[1] / "data" / "golden" / "pam-tiny"
PROMPTS = PromptBatch(torch.tensor([0, 0]), boxes=torch.tensor([[10.0, 10, 60, 60], [50, 40, 120, 110]]))
pytestmark = pytest.mark.filterwarnings("ignore:.* has no tokenizer")


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden checkpoint, without its recorded outputs."""
    copy = tmp_path / "pam"
    shutil.copytree(GOLDEN_FOLDER, copy, ignore=shutil.ignore_patterns("golden.safetensors"))
    return copy


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


def save_tokenizer(folder, size=97, special_tokens=("<|im_start|>", "<|im_end|>")):
    """Save a tokenizer, whose special tokens are the last of its tokens."""
    tokens = ["system", "user", "assistant", "You", "are", "a", "helpful", "this", "subject", ".", *special_tokens]
    fillers = [f"w{index}" for index in range(size - len(tokens))]
    vocabulary = {word: index for index, word in enumerate([*fillers, *tokens])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="w2", additional_special_tokens=[*special_tokens]
    )
    wrapped.save_pretrained(folder)


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
    assert spec.tasks == TASK_PROMPTS
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
    with pytest.raises(InputError, match=r"PAM-1.5B"):
        sca.load(repository)


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
    save_tokenizer(folder)
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
            lambda folder: save_tokenizer(folder, special_tokens=("<|im_end|>",)),
            "lacks the special tokens <|im_start|>",
        ),
        (lambda folder: save_tokenizer(folder, size=98), "the tokenizer has 98 tokens, but the language model has 97"),
        (
            lambda folder: rewrite_tensors(folder, lambda tensors: tensors | {"model.extra": torch.zeros(1)}),
            "unexpected language_model.model.model.extra",
        ),
        (
            lambda folder: rewrite_tensors(
                folder, lambda tensors: {name: each for name, each in tensors.items() if "semT_newline" not in name}
            ),
            "missing mixer.query_newline",
        ),
        (
            lambda folder: rewrite_tensors(
                folder, lambda tensors: {name: each for name, each in tensors.items() if "sem_tokens" not in name}
            ),
            "has no tensor model.vision_resampler.sem_tokens.weight",
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


def test_native_checkpoint_round_trips(folder, tmp_path, golden_logits):
    sca.save(sca.load(folder), tmp_path / "native")
    assert torch.equal(compute_logits(sca.load(tmp_path / "native")), golden_logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_writes_the_same_tensors(folder, tmp_path, dtype):
    rewrite_tensors(folder, lambda tensors: {name: each.to(dtype) for name, each in tensors.items()})
    save_tokenizer(folder)
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


@pytest.mark.parametrize("name", ["pam-1.5b", "pam-3b"])
def test_zoo_entry_has_the_parameters_of_the_published_model(name):
    entry = zoo.get_entry(name)
    model = sca.build(build_published_pam_spec(entry.config), device="meta")
    assert sum(each.numel() for each in model.parameters()) == entry.parameters
    assert model.prefix_length == 1042
