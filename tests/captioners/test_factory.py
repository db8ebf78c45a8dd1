"""Whatever captions regions is loaded by name."""

import json

import pytest
import sca_registry
import torch
from sca_registry import RegistryError
from sca_registry.contracts import Captioner, Prompt
from sca_registry.spec import ComponentSpec, ModelSpec

import sca
from sca.cli import run_command
from sca.inference.engine import Engine

COUNTED = [name for name in sca_registry.captioners.list_names() if sca_registry.captioners.get_card(name).parameters]


@pytest.mark.slow
def test_models_are_predictors_by_name_and_by_folder(small, tmp_path):
    assert isinstance(sca.load_captioner("sca-tiny"), Engine)
    folder = sca.save(small(), tmp_path / "a+b model")
    for source in (folder, str(folder)):
        assert isinstance(sca.load_captioner(source, dtype="bfloat16", region_batch_size=3), Engine)


def test_captioners_are_built_with_options_from_text_a_table_and_keywords(weights):
    blip = weights("blip")
    written = (
        f"crop-captioner weights={blip} batch_size=3",
        {"name": "crop-captioner", "weights": blip, "batch_size": 3},
    )
    for source in written:
        captioner = sca.load_captioner(source)
        assert isinstance(captioner, Captioner)
        assert captioner.image_text_model.batch_size == 3
        assert captioner.model is None
    assert sca.load_captioner(written[0], batch_size=5).image_text_model.batch_size == 5
    assert sca.load_captioner(written[0]).metadata["weights"] == blip


def test_two_names_are_an_encoder_and_a_captioner(weights, image):
    captioner = sca.load_captioner(f"sca-tiny+crop-captioner weights={weights('blip')}")
    (caption,) = captioner.caption(image, [Prompt(points=((20, 20, 1),))])
    assert caption.mask["size"] == [60, 80]


def test_what_looks_at_nothing_needs_no_device():
    floor = sca.load_captioner("most-frequent dataset=scenes dataset_options={num_images=2}", device="meta")
    assert isinstance(floor, Captioner)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("sca-tinny", "no model, captioner or folder named 'sca-tinny'.* Did you mean 'sca-tiny'"),
        ("blip-bass", "Did you mean 'blip-base'.*encoder.captioner"),
        ("sam-vit-b+blip-bass", "no captioner is named 'blip-bass'. Did you mean 'blip-base'"),
        ("sam-vit-c+blip-base", "no encoders named 'sam-vit-c'. Did you mean 'sam-vit-"),
        ("sam-vit-b+query+gpt2", "no trained weights; give a checkpoint folder"),
        ("sam-vit-b+most-frequent dataset=scenes", "no option 'encoder'"),
        ("nearest-neighbor dataset=scenes", "requires the option 'encoder'"),
        ("blip-base vcott=true", "no option 'vcott'. Did you mean 'vcot'"),
        ("sca-tiny vcot=true", "the model 'sca-tiny' has no option 'vcot'"),
        ("sca-tiny dtype=float33", "unknown dtype 'float33'. Did you mean 'float32'"),
        ("blip-base 'batch_size", "a captioner is 'NAME"),
    ],
)
def test_what_there_is_not_is_said_with_what_there_is(source, message):
    with pytest.raises(ValueError, match=message):
        sca.load_captioner(source)


def test_a_model_of_two_names_is_pointed_to_the_door():
    with pytest.raises(RegistryError, match=r"for encoder\+captioner, use sca.load_captioner"):
        ModelSpec.parse("sam-vit-b+blip-base")


def test_a_part_on_one_line_keeps_quoted_values_together():
    assert ComponentSpec.parse("a b='x y' c=[1,2] d=true") == ComponentSpec("a", {"b": "x y", "c": [1, 2], "d": True})


@pytest.mark.parametrize("name", COUNTED)
def test_a_card_counts_the_parameters_of_its_model(name):
    with torch.device("meta"):
        captioner = sca_registry.captioners.build(name, pretrained=False, device="meta")
    counted = sum(parameter.numel() for parameter in captioner.image_text_model.model.parameters())
    assert counted == sca_registry.captioners.get_card(name).parameters


def test_every_card_says_where_it_comes_from_and_on_what_terms():
    for name in sca_registry.captioners.list_names():
        card = sca_registry.captioners.get_card(name)
        assert card.summary.endswith(".")
        assert card.source
        assert card.license
        assert bool(card.terms) == ("opt" in name or name == "qwen2.5-vl-3b")


# --- on the command line


@pytest.fixture
def shell(tmp_path, monkeypatch, capfd, image):
    monkeypatch.chdir(tmp_path)
    image.save("a.png")

    def call(*arguments):
        capfd.readouterr()
        status = run_command([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return status, out, err

    return call


def records(out):
    return [json.loads(line) for line in out.splitlines()]


ASKED = ("caption", "a.png", "--out", "-", "--max-new-tokens", 4, "--num-beams", 2)


@pytest.mark.slow
def test_a_captioner_answers_on_the_command_line_as_a_model_does(shell, weights, sam_folder):
    encoder = f"encoder={{name=\"sam\",weights='{sam_folder}'}}"
    for model in (
        f"sca-tiny+crop-captioner weights={weights('git')}",
        f"crop-captioner weights={weights('blip')} {encoder}",
    ):
        status, out, err = shell(*ASKED, "--model", model, "--box", "10,10,40,30", "--point", "60,45")
        assert (status, err) == (0, "")
        assert [record["region_id"] for record in records(out)] == [0, 1]
        assert all(record["mask"]["size"] == [60, 80] for record in records(out))
        assert records(out)[0]["box"] == [10, 10, 40, 30]
        assert records(out)[0]["model"] == model


def test_everything_on_the_command_line_needs_masks(shell, weights):
    crops = f"crop-captioner weights={weights('git')}"
    search = ("--everything", "--points-per-side", 3, "--pred-iou-thresh", 0, "--stability-score-thresh", 0)
    status, out, err = shell(*ASKED, "--model", f"sca-tiny+{crops}", *search)
    assert (status, err) == (0, "")
    assert records(out)
    for model in (crops, "most-frequent dataset=scenes dataset_options={num_images=2}"):
        status, out, err = shell(*ASKED, "--model", model, *search)
        assert (status, out) == (2, "")
        assert "for everything mode, use a model, or encoder+captioner" in err


def test_a_floor_answers_on_the_command_line(shell):
    status, out, err = shell(
        *ASKED, "--model", "most-frequent dataset=scenes dataset_options={num_images=2}", "--point", "3,3"
    )
    assert (status, err) == (0, "")
    assert records(out)[0]["caption"]


@pytest.mark.parametrize(
    ("model", "more", "message"),
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
        ("sam-vit-b+query+gpt2", ("--box", "1,1,9,9"), "give a checkpoint folder"),
    ],
)
def test_a_mistake_is_one_line(shell, weights, model, more, message):
    status, out, err = shell(*ASKED, "--model", model.format(blip=weights("blip")), *more)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert message in err


def test_captioners_are_listed_shown_and_checked(shell):
    status, out, _ = shell("list", "captioners", "--json")
    assert status == 0
    assert {"blip-base", "vlm", "most-frequent"} <= {row["name"] for row in json.loads(out)}
    status, out, _ = shell("show", "captioner", "blip2-opt-2.7b")
    assert status == 0
    assert "not commercial use" in out
    assert "vcot = False" in out
    status, out, _ = shell("check", "captioner", "most-frequent")
    assert status == 0
    assert "captions-match-prompts" in out
