"""Factory: region captioners are loaded by name."""

import json

import pytest
import sca_registry
import torch
from sca_registry import RegistryError
from sca_registry.contracts import Captioner, Prompt
from sca_registry.spec import ComponentSpec, ModelSpec
from transformers import AutoModelForImageTextToText

import sca
from sca.cli import run_command
from sca.inference.engine import Engine
from sca.io.hub import initialize_model, make_config

CAPTIONERS_WITH_PARAMETERS = [
    name for name in sca_registry.captioners.list_names() if sca_registry.captioners.get_card(name).parameters
]
RESTRICTED_CAPTIONERS = (
    *("blip2-opt", "fastvlm", "gemma3", "paligemma2", "perception-lm"),
    *("qwen2.5-vl-3b", "qwen2.5-vl-72b"),
)  # prefixes of names


@pytest.mark.slow
def test_captioner_factory_returns_an_engine_for_models_by_name_or_folder(build_small_model, tmp_path):
    assert isinstance(sca.load_captioner("sca-tiny"), Engine)
    folder = sca.save(build_small_model(), tmp_path / "a+b model")
    for source in (folder, str(folder)):
        assert isinstance(sca.load_captioner(source, precision="bfloat16", region_batch_size=3), Engine)


def test_captioner_factory_accepts_options_as_text_table_or_keywords(weights_folder):
    blip_folder = weights_folder("blip")
    sources = (
        f"crop-captioner weights={blip_folder} batch_size=3",
        {"name": "crop-captioner", "weights": blip_folder, "batch_size": 3},
    )
    for source in sources:
        captioner = sca.load_captioner(source)
        assert isinstance(captioner, Captioner)
        assert captioner.image_text_model.batch_size == 3
        assert captioner.model is None
    assert sca.load_captioner(sources[0], batch_size=5).image_text_model.batch_size == 5
    assert sca.load_captioner(sources[0]).metadata["weights"] == blip_folder


def test_captioner_factory_combines_an_encoder_and_a_captioner(weights_folder, image):
    captioner = sca.load_captioner(f"sca-tiny+crop-captioner weights={weights_folder('blip')}")
    (caption,) = captioner.caption(image, [Prompt(points=((20, 20, 1),))])
    assert caption.mask["size"] == [60, 80]


def test_captioner_factory_builds_most_frequent_on_any_device():
    baseline = sca.load_captioner("most-frequent dataset=scenes dataset_options={num_images=2}", device="meta")
    assert isinstance(baseline, Captioner)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("sca-tinny", "no model, captioner or folder named 'sca-tinny'.* Did you mean 'sca-tiny'"),
        ("blip-bass", "Did you mean 'blip-base'.*encoder.captioner"),
        ("sam-vit-b+blip-bass", "no captioner is named 'blip-bass'. Did you mean 'blip-base'"),
        ("sam-vit-c+blip-base", "no encoders named 'sam-vit-c'. Did you mean 'sam-vit-"),
        ("sam-vit-b+query+gpt2", "mixer is untrained; pass a checkpoint folder"),
        ("sam-vit-b+most-frequent dataset=scenes", "no option 'encoder'"),
        ("nearest-neighbor dataset=scenes", "requires the option 'encoder'"),
        ("blip-base vcott=true", "no option 'vcott'. Did you mean 'vcot'"),
        ("sca-tiny vcot=true", "the model 'sca-tiny' has no option 'vcot'"),
        ("sca-tiny precision=float33", "unknown precision 'float33'. Did you mean 'float32'"),
        ("blip-base 'batch_size", "a captioner must have the form 'NAME"),
    ],
)
def test_captioner_factory_rejects_unknown_names_and_options_with_suggestions(source, message):
    with pytest.raises(ValueError, match=message):
        sca.load_captioner(source)


def test_model_spec_parse_of_two_names_points_to_the_captioner_factory():
    with pytest.raises(RegistryError, match=r"for encoder\+captioner, use sca.load_captioner"):
        ModelSpec.parse("sam-vit-b+blip-base")


def test_part_parse_keeps_quoted_values_together():
    assert ComponentSpec.parse("a b='x y' c=[1,2] d=true") == ComponentSpec("a", {"b": "x y", "c": [1, 2], "d": True})


@pytest.mark.parametrize("name", CAPTIONERS_WITH_PARAMETERS)
def test_captioner_card_parameters_match_the_built_model(name):
    card = sca_registry.captioners.get_card(name)
    if card.extra and sca_registry.captioners.load_entry(name).state != "ok":
        pytest.skip(f"the extra {card.extra} is not installed")
    with torch.device("meta"):
        model = initialize_model(AutoModelForImageTextToText, make_config(None, None, card.config))
    assert sum(parameter.numel() for parameter in model.parameters()) == card.parameters


def test_captioner_cards_state_summary_source_license_and_terms():
    for name in sca_registry.captioners.list_names():
        card = sca_registry.captioners.get_card(name)
        assert card.summary.endswith(".")
        assert card.source
        assert card.license
        assert bool(card.terms) == name.startswith(RESTRICTED_CAPTIONERS)


# --- on the command line


@pytest.fixture
def run_cli(tmp_path, monkeypatch, capfd, image):
    monkeypatch.chdir(tmp_path)
    image.save("a.png")

    def run(*arguments):
        capfd.readouterr()
        status = run_command([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return status, out, err

    return run


def parse_json_lines(out):
    return [json.loads(line) for line in out.splitlines()]


CAPTION_ARGUMENTS = ("caption", "a.png", "--out", "-", "--max-new-tokens", 4, "--num-beams", 2)


@pytest.mark.slow
def test_caption_command_writes_the_same_records_for_captioners_as_for_models(run_cli, weights_folder, sam_folder):
    encoder = f"encoder={{name=\"sam\",weights='{sam_folder}'}}"
    for model in (
        f"sca-tiny+crop-captioner weights={weights_folder('git')}",
        f"crop-captioner weights={weights_folder('blip')} {encoder}",
    ):
        status, out, err = run_cli(*CAPTION_ARGUMENTS, "--model", model, "--box", "10,10,40,30", "--point", "60,45")
        assert (status, err) == (0, "")
        assert [record["region_id"] for record in parse_json_lines(out)] == [0, 1]
        assert all(record["mask"]["size"] == [60, 80] for record in parse_json_lines(out))
        assert parse_json_lines(out)[0]["box"] == [10, 10, 40, 30]
        assert parse_json_lines(out)[0]["model"] == model


def test_caption_command_everything_mode_requires_masks(run_cli, weights_folder):
    crop_captioner = f"crop-captioner weights={weights_folder('git')}"
    everything_arguments = (
        "--everything",
        "--points-per-side",
        3,
        "--pred-iou-thresh",
        0,
        "--stability-score-thresh",
        0,
    )
    status, out, err = run_cli(*CAPTION_ARGUMENTS, "--model", f"sca-tiny+{crop_captioner}", *everything_arguments)
    assert (status, err) == (0, "")
    assert parse_json_lines(out)
    for model in (crop_captioner, "most-frequent dataset=scenes dataset_options={num_images=2}"):
        status, out, err = run_cli(*CAPTION_ARGUMENTS, "--model", model, *everything_arguments)
        assert (status, out) == (2, "")
        assert "for everything mode, use a model, or encoder+captioner" in err


def test_caption_command_runs_the_most_frequent_baseline(run_cli):
    status, out, err = run_cli(
        *CAPTION_ARGUMENTS, "--model", "most-frequent dataset=scenes dataset_options={num_images=2}", "--point", "3,3"
    )
    assert (status, err) == (0, "")
    assert parse_json_lines(out)[0]["caption"]


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("crop-captioner weights={blip}", ("--point", "3,3"), "sam-vit-b+NAME"),
        (
            "crop-captioner weights={blip}",
            ("--box", "1,1,9,9", "--do-sample"),
            "does not support the generation option 'do_sample'",
        ),
        (
            "crop-captioner weights={blip}",
            ("--box", "1,1,9,9", "--num-captions", "2"),
            "generation option 'num_captions'",
        ),
        ("sam-vit-b+query+gpt2", ("--box", "1,1,9,9"), "pass a checkpoint folder"),
    ],
)
def test_caption_command_reports_invalid_requests_in_one_line(run_cli, weights_folder, model, arguments, message):
    status, out, err = run_cli(*CAPTION_ARGUMENTS, "--model", model.format(blip=weights_folder("blip")), *arguments)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert message in err


def test_list_show_and_check_commands_accept_captioners(run_cli):
    status, out, _ = run_cli("list", "captioners", "--json")
    assert status == 0
    assert {"blip-base", "vlm", "most-frequent"} <= {row["name"] for row in json.loads(out)}
    status, out, _ = run_cli("show", "captioner", "blip2-opt-2.7b")
    assert status == 0
    assert "not commercial use" in out
    assert "vcot = False" in out
    status, out, _ = run_cli("check", "captioner", "most-frequent")
    assert status == 0
    assert "captions-match-prompts" in out
