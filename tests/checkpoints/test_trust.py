"""Trust: references in checkpoints, resolution of bare names, and pinned commits."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from sca_registry import REGISTRIES, get_registry, zoo
from sca_registry.spec import ModelSpec

import sca
from sca.checkpoints.layout import WEIGHTS_FILE
from sca.checkpoints.load import load, locate_checkpoint
from sca.checkpoints.native import save
from sca.checkpoints.trust import NO_TRUST, Trust, TrustError, check_folder, confine_spec, is_settable, resolve_source
from sca.io.errors import InputError
from sca.io.hub import find_local_folder, get_known_sources, get_pinned_commit, pin_commit, resolve_local_path


@pytest.fixture
def folder(build_small_model, tmp_path):
    return save(build_small_model(), tmp_path / "model")


def edit_json(folder, file="spec.json", **fields):
    table = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({**table, **fields}))
    return folder


UNTRUSTED_CODE = (
    "open({marker!r}, 'w').close()\n"
    "from transformers import PreTrainedConfig, PreTrainedModel\n"
    "class AttackerConfig(PreTrainedConfig):\n    model_type = 'attacker'\n"
    "class Attacker(PreTrainedModel):\n    config_class = AttackerConfig\n"
)


@pytest.fixture
def untrusted_checkpoint(folder, tmp_path):
    """A checkpoint whose language model is code in its folder, and the file that the code writes."""
    language_model_folder, marker = folder / "lm", tmp_path / "ran"
    language_model_folder.mkdir()
    auto_map = {"AutoConfig": "attacker.AttackerConfig", "AutoModelForCausalLM": "attacker.Attacker"}
    config = {"model_type": "attacker", "architectures": ["Attacker"], "auto_map": auto_map}
    (language_model_folder / "config.json").write_text(json.dumps(config))
    (language_model_folder / "attacker.py").write_text(UNTRUSTED_CODE.format(marker=str(marker)))
    save_file({"a": torch.zeros(1)}, language_model_folder / "model.safetensors", metadata={"format": "pt"})
    return edit_json(folder, language_model={"name": "hf", "weights": "lm", "trust_remote_code": True}), marker


@pytest.mark.parametrize("options", [{}, {"allow_external": True}])
def test_load_runs_no_code_of_an_untrusted_checkpoint(untrusted_checkpoint, options):
    folder, marker = untrusted_checkpoint
    with pytest.raises(InputError, match="--trust-remote-code"):
        load(folder, **options)
    assert not marker.exists()


@pytest.mark.parametrize("value", [None, "true", 1])
def test_load_runs_no_code_if_trust_remote_code_is_not_a_boolean(untrusted_checkpoint, value):
    folder, marker = untrusted_checkpoint
    edit_json(folder, language_model={"name": "hf", "weights": "lm", "trust_remote_code": value})
    with pytest.raises(InputError, match="which runs code"):
        load(folder)
    edit_json(folder, language_model={"name": "hf", "weights": "lm"})
    with pytest.raises(InputError, match="cannot be built"):
        load(folder)  # no prompt on the terminal
    assert not marker.exists()


def test_load_runs_checkpoint_code_with_trust_remote_code(untrusted_checkpoint):
    folder, marker = untrusted_checkpoint
    with pytest.raises(InputError):  # its code defines no language model
        load(folder, trust_remote_code=True)
    assert marker.exists()


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("language_model", {"name": "hf", "weights": "attacker/model"}, "weights of the language model 'hf'"),
        ("language_model", {"name": "hf", "weights": "/somewhere/else"}, "--allow-external"),
        ("language_model", {"name": "hf", "weights": "../else"}, "--allow-external"),
        ("language_model", {"name": "hf", "weights": "bare"}, "--allow-external"),
        ("language_model", {"name": "gguf", "weights": "~/a.gguf"}, "--allow-external"),
        ("language_model", {"name": "gpt2", "tokenizer": "attacker/words"}, "--allow-external"),
        ("language_model", {"name": "hf", "config": {"x": ["a/b"]}}, "--allow-external"),
        ("encoder", {"name": "sam", "weights": "https://example.org/a.pth"}, "--allow-external"),
        ("encoder", {"name": "timm", "model": "hf-hub:attacker/model"}, "--allow-external"),
        ("encoder", {"name": "open-clip", "model": "ViT-B-32", "pretrained": "./a.pt"}, "--allow-external"),
        ("encoder", {"name": "tiny-vit", "hidden_size": 10**12}, "hidden_size is 1000000000000, which is larger"),
        ("encoder", {"name": "tiny-vit", "trust_remote_code": True}, "--trust-remote-code"),
        ("encoder", {"name": "sam-vit-b", "revision": "0" * 40}, "revision=.*, not that of its card; .*--allow-ext"),
        ("encoder", {"name": "sam-vit-b", "revision": None}, "revision=None, not that of its card"),
        ("language_model", {"name": "hf", "config": {"_attn_implementation": {"": "a"}}}, "--trust-remote-code"),
        ("encoder", {"name": "attacker"}, "no encoders named"),
        ("segmenter", {"name": "sam", "weights": "a\0b"}, "contains the invalid path"),
    ],
)
@pytest.mark.slow
def test_load_rejects_untrusted_values_in_a_spec(folder, part, value, message):
    with pytest.raises(InputError, match=message) as caught:
        load(edit_json(folder, **{part: value}))
    assert "\n" not in str(caught.value)


def test_confine_spec_rejects_options_that_run_code_according_to_a_card(folder, monkeypatch):
    card = REGISTRIES["mixers"].get_card("query")
    monkeypatch.setitem(card.__dict__, "code_options", ("script",))
    spec = ModelSpec.from_dict({**json.loads((folder / "spec.json").read_text()), "mixer": {"name": "query"}})
    for value in ("./a.py", "/a.py", True, ["a"], "http://a/b.py"):
        with pytest.raises(TrustError, match=r"script=.*which runs code; .*--trust-remote-code"):
            confine_spec(
                ModelSpec.from_dict({**spec.to_dict(), "mixer": {"name": "query", "script": value}}), folder, NO_TRUST
            )
    spec_with_config_name = ModelSpec.from_dict(
        {**spec.to_dict(), "mixer": {"name": "query", "script": "rtmdet_tiny_8xb32"}}
    )
    assert confine_spec(spec_with_config_name, folder, NO_TRUST).mixer == spec_with_config_name.mixer


def test_resolve_source_accepts_inner_paths_and_known_weights(folder, tmp_path):
    (folder / "lm").mkdir()
    (folder / "way_out").symlink_to(tmp_path)
    assert resolve_source("lm", folder, NO_TRUST) == str(folder / "lm")
    assert resolve_source(str(folder / "lm"), folder, NO_TRUST) == str(folder / "lm")
    assert resolve_source("gpt2", folder, NO_TRUST) == "openai-community/gpt2"
    assert resolve_source("facebook/sam-vit-base", folder, NO_TRUST) == "facebook/sam-vit-base"
    assert resolve_source("attacker/model", folder, Trust(external=True)) == "attacker/model"
    for external_source in ("way_out", "lm/../../model/lm", "attacker/model", str(tmp_path), "x" * 5000):
        with pytest.raises(TrustError, match="--allow-external"):
            resolve_source(external_source, folder, NO_TRUST)


def test_load_accepts_external_weights_with_allow_external(build_small_model, save_language_model, tmp_path):
    folder = save(
        build_small_model(language_model={"name": "hf", "weights": str(save_language_model("gpt2"))}),
        tmp_path / "model",
    )
    with pytest.raises(InputError, match=r"allow_external=True \(--allow-external\)"):
        load(folder)
    assert load(folder, allow_external=True).spec.language_model.name == "hf"


@pytest.mark.slow
def test_check_folder_rejects_links_fifos_and_external_references_in_configs(folder, tmp_path):
    (tmp_path / "secret").write_text("{}")
    (folder / "link.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="link to outside"):
        load(folder)
    load(folder, allow_external=True)
    (folder / "link.json").unlink()
    os.mkfifo(folder / "fifo")
    with pytest.raises(InputError, match="not a regular file"):
        load(folder)
    (folder / "fifo").unlink()
    for field in ({"tokenizer_file": "/etc/passwd"}, {"text_config": {"_attn_implementation": "attacker/kernel"}}):
        edit_json(folder, "tokenizer_config.json", **field)
        with pytest.raises(TrustError):
            check_folder(folder, NO_TRUST)
        (folder / "tokenizer_config.json").unlink()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation_internal", "experts_implementation"])
@pytest.mark.parametrize("value", ["flash_attention_2", "attacker/kernel", {"": "attacker/kernel"}, [{"a": "sdpa|b"}]])
@pytest.mark.slow
def test_check_folder_rejects_attention_kernels_other_than_those_of_torch(folder, key, value):
    edit_json(folder, "tokenizer_config.json", text_config={key: value})
    with pytest.raises(TrustError, match=r"can download and run code; .*--trust-remote-code"):
        check_folder(folder, Trust(external=True))
    check_folder(folder, Trust(remote_code=True))
    for harmless_value in (None, "", True, "eager", {"": "sdpa", "vision_config": None}):
        edit_json(folder, "tokenizer_config.json", text_config={key: harmless_value})
        check_folder(folder, NO_TRUST)


def test_check_folder_rejects_deeply_nested_folders(folder, tmp_path):
    deepest = folder / "a" / "b" / "c" / "d" / "e" / "f"
    deepest.mkdir(parents=True)
    check_folder(folder, NO_TRUST)
    (deepest / "g").mkdir()
    with pytest.raises(InputError, match="nested deeper than 6 folders"):
        load(folder)


@pytest.mark.parametrize("name", ["spec.json", "config.json", "origin.json"])
def test_load_and_plan_check_links_before_reading_files(folder, tmp_path, name):
    from sca.cli.plan import _resolve_spec

    (tmp_path / "secret").write_text('{"secret": 1}')
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    for read_model in (load, lambda path: _resolve_spec(str(path), False, False)):
        with pytest.raises(InputError, match=f"{name} is a link to outside its folder"):
            read_model(folder)


def test_load_rejects_a_spec_far_larger_than_its_weights(folder):
    for encoder in ({"name": "tiny-vit", "hidden_size": 2**12}, {"name": "tiny-vit", "hidden_size": 1024, "depth": 99}):
        with pytest.raises(InputError, match="far more memory than its weight files contain"):
            load(edit_json(folder, encoder=encoder))
    with pytest.raises(InputError, match="depth is 1000000, which is larger than in any model"):
        load(edit_json(folder, encoder={"name": "tiny-vit", "depth": 10**6}))


@pytest.mark.parametrize(
    "file", ["spec.json", "config.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
)
def test_load_rejects_deeply_nested_json_in_one_line(folder, file):
    (folder / file).write_text('{"encoder":' + "[" * 200_000)
    with pytest.raises(InputError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("value", "kind"), [(torch.nan, "encoder"), (torch.inf, "mixer")])
def test_load_rejects_weights_that_are_not_finite(folder, value, kind):
    tensors = load_file(folder / WEIGHTS_FILE)
    name = next(each for each in tensors if each.startswith(kind) and tensors[each].is_floating_point())
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(InputError, match=f"has NaN or infinite weights: {name}"):
        load(folder)


def test_load_rejects_weights_that_overflow_float16(folder):
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors["task_tokens"].fill_(1e6)
    save_file(tensors, folder / WEIGHTS_FILE)
    load(folder, precision=torch.bfloat16)
    with pytest.raises(InputError, match=r"float16, which is too small for it .*task_tokens"):
        load(folder, precision=torch.float16)


# --- a bare name is a name --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sca-tiny", ".sca-tiny.previous", "xk-huang"])
def test_load_never_reads_a_bare_name_as_a_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(zoo.get_entry("sca-tiny").folder, tmp_path / name)
    (tmp_path / name / "spec.json").write_text('{"encoder": "of-an-attacker"}')
    assert locate_checkpoint("sca-tiny") == zoo.get_entry("sca-tiny").folder
    assert (tmp_path / name).is_dir()
    if name == "xk-huang":
        with pytest.raises(InputError, match=r"for the local path, write \./xk-huang"):
            load(name)
        with pytest.raises(ValueError, match=r"for the local path, write \./xk-huang"):
            sca.load_captioner(name)
    elif name == "sca-tiny":
        for path in ("./sca-tiny", tmp_path / "sca-tiny"):
            with pytest.raises(InputError, match=r"spec\.json"):
                load(path)


def test_find_local_folder_never_reads_a_known_hub_id_as_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("facebook/sam-vit-base", "xk-huang/segment-caption-anything-gpt2_large-vg", "gpt2", "runs/model"):
        (tmp_path / name).mkdir(parents=True)
    assert "facebook/sam-vit-base" in get_known_sources()
    assert resolve_local_path("gpt2") is None
    assert find_local_folder("facebook/sam-vit-base") is None
    assert find_local_folder("xk-huang/segment-caption-anything-gpt2_large-vg") is None
    assert find_local_folder("./facebook/sam-vit-base").is_dir()
    assert find_local_folder("runs/model").is_dir()


def test_locate_checkpoint_returns_the_previous_checkpoint_after_a_killed_save(folder):
    previous_folder = folder.rename(folder.parent / f".{folder.name}.previous")
    assert locate_checkpoint(folder) == previous_folder
    load(folder)
    assert previous_folder.is_dir()
    assert not folder.exists()


# --- revisions --------------------------------------------------------------------------------------------------------


def test_pin_commit_stores_the_pulled_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "cache"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert get_pinned_commit("owner/model") is None
    assert pin_commit("owner/model", tmp_path / commit) == commit
    assert pin_commit("owner/other", tmp_path / "no-commit") is None
    assert (get_pinned_commit("owner/model"), get_pinned_commit("owner/other")) == (commit, None)


def test_pin_commit_stores_all_concurrent_pins(tmp_path, monkeypatch):
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "cache"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    names = [f"owner/model-{number}" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: pin_commit(name, tmp_path / commit), names))
    assert [get_pinned_commit(name) for name in names] == [commit] * len(names)


def test_cards_pin_full_commits_unless_weights_are_replaced(save_language_model):
    revisions = [
        card.options["revision"]
        for registry in REGISTRIES.values()
        for name in registry.list_names()
        if "revision" in (card := registry.get_card(name)).options
    ]
    assert revisions
    assert all(len(pin) == 40 and int(pin, 16) for pin in revisions)
    model = REGISTRIES["language_models"].build("gpt2", weights=str(save_language_model("gpt2")))
    assert model.revision is None


GPT2_OPTIONS = get_registry("language_model").get_card("gpt2").options


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("dtype", "float32", True),
        ("gradient_checkpointing", False, True),
        ("depth", 2, True),
        ("stem_channels", (8, 16), True),
        ("trust_remote_code", False, True),
        ("trust_remote_code", True, False),
        ("weights", GPT2_OPTIONS["weights"], False),
        ("weights", "plain", False),
        ("revision", GPT2_OPTIONS["revision"], False),
        ("file", "a/b.json", False),
        ("attn_implementation", "flash_attention_2", False),
        ("depth", 2**30, False),
        ("rate", float("nan"), False),
        ("eos_token", None, False),
        ("config", {"model_type": "gpt2"}, False),
    ],
)
def test_is_settable_accepts_only_options_that_a_checkpoint_may_set(option, value, expected):
    assert is_settable("language_model", "gpt2", option, value) == expected
