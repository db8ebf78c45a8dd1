"""Folders and files that only look like weights or images are refused with what to do about them."""

import pytest
from PIL import Image

import sca
from sca.checkpoints.load import load
from sca.checkpoints.native import save
from sca.io.errors import InputError
from sca.io.hub import suggest_path
from sca.io.images import open_image
from sca.io.prompt_files import read_region_prompts
from sca.io.prompts import read_mask_file
from sca.language_models.hf import HfLanguageModel

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n"
REMEDY = "is a Git LFS pointer, not the file itself; run `git lfs pull`"


@pytest.fixture
def fetched(lm_folder, tmp_path):
    """A folder of a language model whose weights are a Git LFS pointer."""
    import shutil

    folder = shutil.copytree(lm_folder("gpt2"), tmp_path / "lfs")
    (folder / "model.safetensors").write_text(POINTER)
    return folder


def test_language_model_of_pointers_is_refused_with_the_remedy(fetched, monkeypatch):
    with pytest.raises(InputError, match=REMEDY):
        HfLanguageModel(fetched)
    monkeypatch.chdir(fetched.parent)
    assert REMEDY.split(";")[0] in suggest_path("lfs")


def test_peft_adapter_is_refused_with_the_remedy(lm_folder, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(lm_folder("gpt2"))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"peft adapter of other weights .*merge_and_unload"):
        HfLanguageModel(tmp_path / "adapter")


def test_checkpoint_of_pointers_is_refused_with_the_remedy(small, tmp_path):
    folder = save(small(), tmp_path / "small")
    (folder / "weights.safetensors").write_text(POINTER)
    with pytest.raises(InputError, match=REMEDY):
        load(folder)


@pytest.mark.parametrize(
    ("name", "read", "refusal"),
    [
        ("a.png", open_image, InputError),
        ("a.png", read_mask_file, InputError),
        ("a.npy", read_mask_file, InputError),
        ("a.json", read_region_prompts, InputError),
        ("a.jsonl", read_region_prompts, InputError),
    ],
)
def test_file_of_a_user_that_is_a_pointer_is_refused_with_the_remedy(tmp_path, name, read, refusal):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(refusal, match=REMEDY):
        read(tmp_path / name)


def test_image_that_is_no_pointer_is_opened(tmp_path):
    Image.new("RGB", (3, 3)).save(tmp_path / "a.png")
    assert sca.open_image(tmp_path / "a.png").size == (3, 3)
