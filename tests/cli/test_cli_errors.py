"""Errors print one clear line and exit with a status; the other images of a run are still captioned."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BOX_ARGUMENTS = ("--box", "0,0,9,9")


@pytest.fixture
def model_arguments(checkpoint):
    return ("--model", checkpoint, "--max-new-tokens", 2)


# --- usage errors: status 2


@pytest.mark.parametrize(
    ("options", "expected_message"),
    {
        ("--box", "1,2,x,9"): "'x' in '1,2,x,9' is not a finite number; write a box as 4 numbers x1,y1,x2,y2",
        ("--box", "nan,2,3,9"): "'nan' in 'nan,2,3,9' is not a finite number",
        ("--box", "1,2,3"): "cannot parse '1,2,3'; write a box as 4 numbers x1,y1,x2,y2 in pixels",
        ("--point", "1"): "cannot parse '1'; write a point as x,y",
        ("--point", "1,2,7"): "must be 1 or 0",
        ("--region", "bax=1,2,3,4"): "'bax' is not a field of a region; write any of box=",
        ("--region", "mask=none.png"): "cannot read the mask none.png",
        ("--region", ""): "is empty",
        ("--prompts", "none.json"): "cannot read the prompts none.json",
        ("--prompts", "a.png"): "not UTF-8 text",
        (): "no regions to caption; pass --box, --point, --mask, --region or --prompts",
        (*BOX_ARGUMENTS, "--everything"): "--everything cannot be combined with --box",
        (*BOX_ARGUMENTS, "--prompts", "none.json"): "--prompts cannot be combined with --box",
        (*BOX_ARGUMENTS, "--points-per-side", 3): "--points-per-side can only be used with --everything",
        (*BOX_ARGUMENTS, "--proposer", "grid"): "--proposer can only be used with --everything",
        ("--everything", "--proposer", "grid", "--points-per-side", 3): "omit --points-per-side and --crop-n-layers",
        ("--text", "car"): "--text requires --proposer with a proposer that takes text, such as owlv2-base",
        ("--proposer", "grid", "--text", "car"): "the proposer 'grid' takes no text; omit it, or use another one",
        ("--proposer", "owlv2-base"): "no text to find; pass --text PHRASE",
        ("--proposer", "owlv2-base", "--text", " "): "text contains ' ', which is not a phrase",
        ("--proposer", "owlv2-base text=car", "--text", "dog"): "has its text twice; omit the option text or --text",
        (*BOX_ARGUMENTS, "--temperature", 2): "--temperature can only be used with --do-sample",
        (*BOX_ARGUMENTS, "--top-p", 0.9): "--top-p can only be used with --do-sample",
        ("--everything", "--proposer", "gird"): "Did you mean 'grid'?",
        ("--everything", "--proposer", "grid 'points"): "proposer must have the form 'NAME [key=value]...'",
        (
            "--everything",
            "--caption-from",
            "boxes",
        ): "unknown --caption-from 'boxes'. Did you mean 'box'? Choose from: ",
        (*BOX_ARGUMENTS, "--pred-iou-thresh", 0.5, "--min-area", 0.5): (
            "--pred-iou-thresh and --min-area can only be used with --everything"
        ),
        ("--everything", "--pred-iou-thresh", 2): "--pred-iou-thresh",
        ("--everything", "--points-per-side", 0): "--points-per-side",
        (*BOX_ARGUMENTS, "--format", "png"): "--format png requires --out; pass an output folder",
        (*BOX_ARGUMENTS, "--out", "o", "--format", "pgn"): "Did you mean 'png'?",
        (*BOX_ARGUMENTS, "--out", "o", "--format", ""): "Choose from: jsonl, coco, parquet",
        (*BOX_ARGUMENTS, "--out", "-", "--format", "coco"): "--out - writes JSONL only",
        (*BOX_ARGUMENTS, "--out", "a.png"): "cannot write a.png: File exists; choose another folder",
        (*BOX_ARGUMENTS, "--out", "a.png/o"): "cannot write a.png/o: Not a directory",
        (*BOX_ARGUMENTS, "--task", "recogntion"): "Did you mean 'recognition'?",
        (*BOX_ARGUMENTS, "--precision", "bfloat61"): "Did you mean 'bfloat16'?",
        (*BOX_ARGUMENTS, "--device", "gpu"): "device 'gpu' is not available",
        (*BOX_ARGUMENTS, "--device", "cuda:99"): "device 'cuda:99' is not available",
        (*BOX_ARGUMENTS, "--device", "meta"): "device 'meta' is not available",
        (*BOX_ARGUMENTS, "--batch-size", "many"): "'--batch-size'",
        (*BOX_ARGUMENTS, "--batch-size", 0): "'--batch-size'",
        (*BOX_ARGUMENTS, "--num-beams", 0): "'--num-beams'",
        (*BOX_ARGUMENTS, "--seed", -1): "'--seed'",
        (*BOX_ARGUMENTS, "--bax", "1"): "--box",
        ("--box", "20,20,10,30"): "a.png: the box 20,20,10,30 is reversed",
        ("--box", "20,20,20,30"): "a.png: the box 20,20,20,30 is empty",
        ("--box", "70,0,80,9"): "a.png: the box 70,0,80,9 is outside the 64 x 48 image",
        ("--point", "64,0"): "a.png: the point 64,0,1 is outside the 64 x 48 image",
        ("--region", "mask=small.png"): "a.png: the mask is 3 x 3, but the image is 64 x 48",
        ("--region", "mask=black.png"): "a.png: the mask is empty",
    }.items(),
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
@pytest.mark.slow
def test_caption_reports_invalid_options_in_one_line(
    get_sca_error, write_image, model_arguments, working_folder, options, expected_message
):
    write_image("a.png")
    Image.new("L", (3, 3), 255).save(working_folder / "small.png")
    Image.new("L", (64, 48)).save(working_folder / "black.png")
    assert expected_message in get_sca_error(2, "caption", "a.png", *model_arguments, *options)


@pytest.mark.parametrize(
    "options",
    [
        ("--box", "1,2"),
        ("--everything", "--proposer", "nothing"),
        ("--box", "1,1,9,9", "--launcher", "nothing", "--out", "out"),
        ("--box", "1,1,9,9", "--prompts", "p.jsonl"),
    ],
)
@pytest.mark.slow
def test_caption_reports_invalid_options_before_importing_torch(write_image, options):
    program = "import sys; from sca.cli import run_command; print(run_command(sys.argv[1:]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", program, "caption", write_image("a.png"), *options]
    completed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert completed.stdout == "2 False\n", completed.stderr


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["caption", "x.png", "--num-return-sequences", "3"], "--num-return-sequences. Use --num-captions."),
        (["train", "own-data", "--lora-r=8"], "--lora-r. Set the rank with lora=8."),
        (["train", "sca-tiny", "--depth", "3"], "key=value arguments, without dashes."),
        (["train", "own-data", "--model", "x"], "No such option: --model. Use model=VALUE after the recipe: "),
        (["train", "own-data", "--data=x"], "No such option: --data. Use data=VALUE after the recipe: "),
        (["train", "own-data", "--max-steps=3"], "option: --max-steps. Use train.steps=VALUE after the recipe: "),
        (["train", "own-data", "--batch-size=3"], "--batch-size. Use train.batch_size=VALUE after the recipe: "),
        (["train", "own-data", "--lr", "0.1"], "--lr. Use train.learning_rate=VALUE after the recipe: "),
        (["train", "own-data", "--output-dir", "x"], "No such option: --output-dir. Use --out. See: "),
        (["train", "own-data", "--over-write"], "(Possible options: --overwrite). Settings other than options are key"),
        (["serve", "--max-request-size", "3"], "No such option: --max-request-size. Use --max-body-mb. See: "),
        (["serve", "--limit-request-size", "3"], "option: --limit-request-size. Use --max-body-mb. See: "),
        (["push", "x", "--repo-id", "a/b"], "--repo-id. Give the repository as the second argument: sca push FOLDER"),
        (["serve", "--max-body-size", "3"], "(Possible options: --max-body-mb). See: sca serve --help"),
    ],
)
def test_command_reports_unknown_option_with_what_to_use_instead(get_sca_error, arguments, hint):
    assert hint in get_sca_error(2, *arguments)


def test_train_reports_a_missing_recipe(get_sca_error):
    error = get_sca_error(2, "train", "model=sca-tiny", "data=photos")
    assert error.startswith("the recipe is missing before 'model=sca-tiny'; write: sca train own-data model=NAME")


def test_caption_without_images_is_a_usage_error(get_sca_error, model_arguments):
    assert "IMAGE" in get_sca_error(2, "caption", *model_arguments, *BOX_ARGUMENTS)


def test_caption_everything_and_mask_prompts_require_model_with_masks(
    get_sca_error, write_image, maskless_checkpoint, working_folder
):
    Image.new("L", (64, 48), 255).save(working_folder / "mask.png")
    write_image("a.png")
    assert "segmenter=sam" in get_sca_error(2, "caption", "a.png", "--everything", "--model", maskless_checkpoint)
    assert "segmenter=sam" in get_sca_error(
        2, "caption", "a.png", "--region", "mask=mask.png", "--model", maskless_checkpoint
    )


@pytest.mark.parametrize(
    ("name", "content", "expected_message"),
    [
        ("p.jsonl", '{"image": "a.png", "box": [1, 2, 3]}', "p.jsonl, line 1, 'box'"),
        ("p.jsonl", '{"image": "a.png"}', "p.jsonl, line 1: no 'box', 'points' or 'mask'"),
        ("p.jsonl", "{", "p.jsonl, line 1 is not valid JSON"),
        ("p.json", "[]", "no list 'images'"),
        ("p.json", '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 2}]}', "'image_id'"),
        ("p.jsonl", '{"image": "b.png", "box": [1, 2, 3, 4]}', "a.png: p.jsonl has no regions for it"),
        ("p.jsonl", '{"image": "x/a.png", "box": [1, 2, 3, 4]}\n{"image": "y/a.png", "box": [1, 2, 3, 4]}', "the keys"),
        ("p.jsonl", '{"image": "a.png", "box": [90, 0, 99, 9]}', "p.jsonl, line 1: the box 90,0,99,9 is outside"),
        ("p.jsonl", '{"image": "a.png", "mask": "p.jsonl"}', "p.jsonl, line 1, 'mask': cannot read the mask"),
    ],
)  # fmt: skip
def test_caption_reports_file_and_position_of_invalid_prompt(
    get_sca_error, write_image, model_arguments, working_folder, name, content, expected_message
):
    (working_folder / name).write_text(content)
    assert expected_message in get_sca_error(
        2, "caption", write_image("a.png"), "--prompts", name, "--quiet", *model_arguments
    )


# --- images: status 1


@pytest.fixture
def message_by_invalid_image(write_image, working_folder):
    """Files that are not images, with text that their error line must contain."""
    write_image("whole.jpg", 300, 300)
    jpeg_content = (working_folder / "whole.jpg").read_bytes()
    (working_folder / "whole.jpg").unlink()
    (working_folder / "cut.jpg").write_bytes(jpeg_content[: len(jpeg_content) // 2])
    (working_folder / "zero.png").touch()
    (working_folder / "text.png").write_text("not an image")
    (working_folder / "empty").mkdir()
    (working_folder / "lost.png").symlink_to("nowhere")
    return {
        "missing.png": "no file or folder missing.png",
        "*.webp": "nothing matches the pattern",
        "empty": "no images in empty",
        "cut.jpg": "truncated or damaged",
        "zero.png": "is empty (0 bytes)",
        "text.png": "is not a readable image; convert it to JPEG or PNG",
        "lost.png": "no such file",
    }


@pytest.mark.slow
def test_caption_reports_invalid_image_in_one_line_and_writes_no_file(
    get_sca_error, message_by_invalid_image, model_arguments, working_folder
):
    original_names = sorted(path.name for path in working_folder.iterdir())
    for name, expected_message in message_by_invalid_image.items():
        assert expected_message in get_sca_error(1, "caption", name, *BOX_ARGUMENTS, *model_arguments, "--out", "-")
    assert sorted(path.name for path in working_folder.iterdir()) == original_names


def test_caption_writes_results_of_valid_images_beside_invalid_ones(
    run_sca, message_by_invalid_image, write_image, model_arguments, working_folder
):
    write_image("good.png"), write_image("also good.png")
    formats = ("--out", "out", "--format", "jsonl,coco,png,html")
    result = run_sca(
        "caption",
        "good.png",
        *message_by_invalid_image,
        "also good.png",
        *BOX_ARGUMENTS,
        *model_arguments,
        *formats,
        "--quiet",
    )
    assert result.status == 1
    assert len(result.err) == len(message_by_invalid_image)
    for expected_message in message_by_invalid_image.values():
        assert sum(expected_message in line for line in result.err) == 1
    records = [json.loads(line) for line in (working_folder / "out/captions.jsonl").read_text().splitlines()]
    assert [record["image"] for record in records] == ["good.png", "also good.png"]
    assert len(json.loads((working_folder / "out/coco.json").read_text())["images"]) == 2
    assert [path.name for path in (working_folder / "out").iterdir() if path.name.startswith(".")] == []


def test_caption_exits_with_2_if_both_image_and_prompt_are_invalid(
    run_sca, write_image, model_arguments, working_folder
):
    write_image("a.png"), write_image("small.png", 5, 5)
    (working_folder / "bad.png").touch()
    result = run_sca("caption", "a.png", "small.png", "bad.png", "--box", "6,6,9,9", *model_arguments, "--out", "-")
    assert result.status == 2
    assert len(result.out.splitlines()) == 1
    assert [line.split()[1] for line in result.err] == ["small.png:", "bad.png", "1"]
    assert result.err[-1] == "sca: 1 of 3 images captioned; not captioned: small.png, bad.png"


def test_caption_keeps_earlier_results_when_every_image_is_invalid(
    run_sca, write_image, model_arguments, working_folder
):
    arguments = (
        "caption",
        write_image("a.png"),
        *BOX_ARGUMENTS,
        *model_arguments,
        "--out",
        "out",
        "--format",
        "jsonl,coco",
    )
    assert run_sca(*arguments).status == 0
    original_files = {path.name: path.read_bytes() for path in (working_folder / "out").iterdir()}
    (working_folder / "a.png").write_bytes(b"")
    assert run_sca(*arguments).status == 1
    assert {path.name: path.read_bytes() for path in (working_folder / "out").iterdir()} == original_files


# --- permissions


@pytest.fixture
def folder_as_unprivileged_user(checkpoint, run_sca, monkeypatch):
    """A shared folder; the test runs as an account without permissions elsewhere."""
    import shutil

    if os.name != "posix":
        pytest.skip("accounts are tried on POSIX only")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(checkpoint, folder / "model")
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "a.png")
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "secret.png")
        (folder / "locked").mkdir()
        run_sca("caption", folder / "a.png", *BOX_ARGUMENTS, "--model", folder / "model")  # imports every needed module
        (folder / "secret.png").chmod(0)
        (folder / "locked").chmod(0o555)
        folder.chmod(0o755)
        monkeypatch.chdir(folder)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        yield folder
        if is_root:
            os.seteuid(0)
        (folder / "locked").chmod(0o755)


@pytest.mark.slow
def test_caption_and_data_export_report_permission_errors(get_sca_error, run_sca, folder_as_unprivileged_user):
    arguments = (*BOX_ARGUMENTS, "--model", "./model")
    assert "locked: Permission denied; choose a folder that you may write in" in get_sca_error(
        2, "caption", "a.png", *arguments, "--out", "locked"
    )
    assert "locked/new: Permission denied; choose a folder that you may write in" in get_sca_error(
        2, "caption", "a.png", *arguments, "--out", "locked/new"
    )
    assert "permission denied (secret.png)" in get_sca_error(1, "caption", "secret.png", *arguments)
    export_result = run_sca("data", "export", "scenes", "locked/new", "num_images=1")
    assert export_result.status == 2
    assert export_result.err == [
        "sca: scenes val: 1 image",
        "sca: cannot write locked/new: Permission denied; choose a folder that you may write in",
    ]
    assert list((folder_as_unprivileged_user / "locked").iterdir()) == []


def test_list_does_not_hide_unexpected_exception(run_sca, monkeypatch):
    from sca_registry import Registry

    monkeypatch.setattr(Registry, "list_entries", lambda self: [][0])
    with pytest.raises(IndexError):
        run_sca("list", "mixers")


def test_list_reports_name_with_line_break_in_one_line(get_sca_error):
    assert re.fullmatch(r"unknown kind .*", get_sca_error(2, "list", "two\nlines"))
