"""Git LFS pointers and other files without weights or pixels: the error contains the fix."""

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

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n"
LFS_MESSAGE = "is a Git LFS pointer, not the file itself; run `git lfs pull`"


@pytest.fixture
def lfs_pointer_folder(save_language_model, tmp_path):
    """Folder of a language model whose weights are a Git LFS pointer."""
    import shutil

    folder = shutil.copytree(save_language_model("gpt2"), tmp_path / "lfs")
    (folder / "model.safetensors").write_text(LFS_POINTER)
    return folder


def test_language_model_rejects_lfs_pointers_with_a_fix(lfs_pointer_folder, monkeypatch):
    with pytest.raises(InputError, match=LFS_MESSAGE):
        HfLanguageModel(lfs_pointer_folder)
    monkeypatch.chdir(lfs_pointer_folder.parent)
    assert LFS_MESSAGE.split(";")[0] in suggest_path("lfs")


def test_language_model_rejects_peft_adapters_with_a_fix(save_language_model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(save_language_model("gpt2"))
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    peft_model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"peft adapter of other weights .*merge_and_unload"):
        HfLanguageModel(tmp_path / "adapter")


def test_load_rejects_lfs_pointers_with_a_fix(build_small_model, tmp_path):
    folder = save(build_small_model(), tmp_path / "small")
    (folder / "weights.safetensors").write_text(LFS_POINTER)
    with pytest.raises(InputError, match=LFS_MESSAGE):
        load(folder)


@pytest.mark.parametrize(
    ("name", "read", "error_type"),
    [
        ("a.png", open_image, InputError),
        ("a.png", read_mask_file, InputError),
        ("a.npy", read_mask_file, InputError),
        ("a.json", read_region_prompts, InputError),
        ("a.jsonl", read_region_prompts, InputError),
    ],
)
def test_file_readers_reject_lfs_pointers_with_a_fix(tmp_path, name, read, error_type):
    (tmp_path / name).write_text(LFS_POINTER)
    with pytest.raises(error_type, match=LFS_MESSAGE):
        read(tmp_path / name)


def test_open_image_reads_a_file_that_is_not_an_lfs_pointer(tmp_path):
    Image.new("RGB", (3, 3)).save(tmp_path / "a.png")
    assert sca.open_image(tmp_path / "a.png").size == (3, 3)
