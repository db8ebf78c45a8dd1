"""Every mistake is one clear line and an exit status, and harms nothing but itself."""

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

BOX = ("--box", "0,0,9,9")


@pytest.fixture
def model(checkpoint):
    return ("--model", checkpoint, "--max-new-tokens", 2)


# --- what is asked: status 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    {
        ("--box", "1,2,x,9"): "'x' in '1,2,x,9' is not a finite number; a box is 4 numbers x1,y1,x2,y2",
        ("--box", "nan,2,3,9"): "'nan' in 'nan,2,3,9' is not a finite number",
        ("--box", "1,2,3"): "a box is 4 numbers x1,y1,x2,y2 in pixels, not '1,2,3'",
        ("--point", "1"): "a point is x,y",
        ("--point", "1,2,7"): "is not 1 or 0",
        ("--region", "bax=1,2,3,4"): "'bax' is no part of a region",
        ("--region", "mask=none.png"): "cannot read the mask none.png",
        ("--region", ""): "is empty",
        ("--prompts", "none.json"): "cannot read the prompts none.json",
        ("--prompts", "a.png"): "not UTF-8 text",
        (): "no region to caption",
        (*BOX, "--everything"): "--everything excludes --box",
        (*BOX, "--prompts", "none.json"): "--prompts excludes --box",
        (*BOX, "--points-per-side", 3): "--points-per-side can only be used with --everything",
        (*BOX, "--proposer", "grid"): "--proposer can only be used with --everything",
        ("--everything", "--proposer", "grid", "--points-per-side", 3): "omit --points-per-side and --crop-n-layers",
        (*BOX, "--temperature", 2): "--temperature can only be used with --do-sample",
        (*BOX, "--top-p", 0.9): "--top-p can only be used with --do-sample",
        ("--everything", "--proposer", "gird"): "Did you mean 'grid'?",
        ("--everything", "--proposer", "grid 'points"): "proposer is 'NAME [key=value]...'",
        ("--everything", "--caption-from", "boxes"): "no prompt to caption from 'boxes'",
        (*BOX, "--pred-iou-thresh", 0.5, "--min-area", 0.5): (
            "--pred-iou-thresh and --min-area can only be used with --everything"
        ),
        ("--everything", "--pred-iou-thresh", 2): "--pred-iou-thresh",
        ("--everything", "--points-per-side", 0): "--points-per-side",
        (*BOX, "--format", "png"): "--format png needs --out",
        (*BOX, "--out", "o", "--format", "pgn"): "Did you mean 'png'?",
        (*BOX, "--out", "o", "--format", ""): "Choose from: jsonl, coco, parquet",
        (*BOX, "--out", "-", "--format", "coco"): "--out - writes JSONL only",
        (*BOX, "--out", "a.png"): "cannot write a.png: File exists; choose another folder",
        (*BOX, "--out", "a.png/o"): "cannot write a.png/o: Not a directory",
        (*BOX, "--task", "recogntion"): "Did you mean 'recognition'?",
        (*BOX, "--dtype", "bfloat61"): "Did you mean 'bfloat16'?",
        (*BOX, "--device", "gpu"): "device 'gpu' is not available",
        (*BOX, "--device", "cuda:99"): "device 'cuda:99' is not available",
        (*BOX, "--device", "meta"): "device 'meta' is not available",
        (*BOX, "--batch-size", "many"): "'--batch-size'",
        (*BOX, "--batch-size", 0): "'--batch-size'",
        (*BOX, "--num-beams", 0): "'--num-beams'",
        (*BOX, "--seed", -1): "'--seed'",
        (*BOX, "--bax", "1"): "--box",
        ("--box", "20,20,10,30"): "a.png: the box 20,20,10,30 is reversed",
        ("--box", "20,20,20,30"): "a.png: the box 20,20,20,30 is empty",
        ("--box", "70,0,80,9"): "a.png: the box 70,0,80,9 is outside the 64 x 48 image",
        ("--point", "64,0"): "a.png: the point 64,0,1 is outside the 64 x 48 image",
        ("--region", "mask=small.png"): "a.png: the mask is 3 x 3, the image 64 x 48",
        ("--region", "mask=black.png"): "a.png: the mask is empty",
    }.items(),
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
@pytest.mark.slow
def test_a_mistake_in_the_options_is_one_line(refused, picture, model, here, wrong, said):
    picture("a.png")
    Image.new("L", (3, 3), 255).save(here / "small.png")
    Image.new("L", (64, 48)).save(here / "black.png")
    assert said in refused(2, "caption", "a.png", *model, *wrong)


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
def test_mistakes_of_caption_are_reported_before_torch_is_imported(picture, options):
    program = "import sys; from sca.cli import run_command; print(run_command(sys.argv[1:]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", program, "caption", picture("a.png"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n", done.stderr


def test_no_image_at_all_is_a_mistake(refused, model):
    assert "IMAGE" in refused(2, "caption", *model, *BOX)


def test_everything_and_mask_prompts_need_a_model_with_masks(refused, picture, maskless, here):
    Image.new("L", (64, 48), 255).save(here / "mask.png")
    picture("a.png")
    assert "segmenter=sam" in refused(2, "caption", "a.png", "--everything", "--model", maskless)
    assert "segmenter=sam" in refused(2, "caption", "a.png", "--region", "mask=mask.png", "--model", maskless)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.jsonl", '{"image": "a.png", "box": [1, 2, 3]}', "p.jsonl, line 1, 'box'"),
        ("p.jsonl", '{"image": "a.png"}', "p.jsonl, line 1: no 'box', 'points' or 'mask'"),
        ("p.jsonl", "{", "p.jsonl, line 1 is not valid JSON"),
        ("p.json", "[]", "no list 'images'"),
        ("p.json", '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 2}]}', "'image_id'"),
        ("p.jsonl", '{"image": "b.png", "box": [1, 2, 3, 4]}', "a.png: p.jsonl has no regions for it"),
        ("p.jsonl", '{"image": "x/a.png", "box": [1, 2, 3, 4]}\n{"image": "y/a.png", "box": [1, 2, 3, 4]}', "could"),
        ("p.jsonl", '{"image": "a.png", "box": [90, 0, 99, 9]}', "p.jsonl, line 1: the box 90,0,99,9 is outside"),
        ("p.jsonl", '{"image": "a.png", "mask": "p.jsonl"}', "p.jsonl, line 1, 'mask': cannot read the mask"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_prompts_file_is_named_with_its_place(refused, picture, model, here, name, content, said):
    (here / name).write_text(content)
    assert said in refused(2, "caption", picture("a.png"), "--prompts", name, "--quiet", *model)


# --- images: status 1


@pytest.fixture
def bad(picture, here):
    """Files that are no pictures, and words that their line must have."""
    picture("whole.jpg", 300, 300)
    whole = (here / "whole.jpg").read_bytes()
    (here / "whole.jpg").unlink()
    (here / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (here / "zero.png").touch()
    (here / "text.png").write_text("no picture")
    (here / "empty").mkdir()
    (here / "lost.png").symlink_to("nowhere")
    return {
        "missing.png": "no file or folder missing.png",
        "*.webp": "nothing matches the pattern",
        "empty": "no images in empty",
        "cut.jpg": "truncated or damaged",
        "zero.png": "is empty (0 bytes)",
        "text.png": "is not an image",
        "lost.png": "no such file",
    }


@pytest.mark.slow
def test_a_bad_image_is_one_line_and_leaves_no_file(refused, bad, model, here):
    before = sorted(path.name for path in here.iterdir())
    for name, said in bad.items():
        assert said in refused(1, "caption", name, *BOX, *model, "--out", "-")
    assert sorted(path.name for path in here.iterdir()) == before


def test_good_images_among_bad_ones_are_captioned_and_written(shell, bad, picture, model, here):
    picture("good.png"), picture("also good.png")
    formats = ("--out", "out", "--format", "jsonl,coco,png,html")
    result = shell("caption", "good.png", *bad, "also good.png", *BOX, *model, *formats, "--quiet")
    assert result.status == 1
    assert len(result.err) == len(bad)
    for said in bad.values():
        assert sum(said in line for line in result.err) == 1
    records = [json.loads(line) for line in (here / "out/captions.jsonl").read_text().splitlines()]
    assert [record["image"] for record in records] == ["good.png", "also good.png"]
    assert len(json.loads((here / "out/coco.json").read_text())["images"]) == 2
    assert [path.name for path in (here / "out").iterdir() if path.name.startswith(".")] == []


def test_of_a_bad_image_and_a_wrong_request_the_request_decides(shell, picture, model, here):
    picture("a.png"), picture("small.png", 5, 5)
    (here / "bad.png").touch()
    result = shell("caption", "a.png", "small.png", "bad.png", "--box", "6,6,9,9", *model, "--out", "-")
    assert result.status == 2
    assert len(result.out.splitlines()) == 1
    assert [line.split()[1] for line in result.err] == ["small.png:", "bad.png", "1"]
    assert result.err[-1] == "sca: 1 of 3 done; not done: small.png, bad.png"


def test_when_no_image_is_good_older_results_stay(shell, picture, model, here):
    asked = ("caption", picture("a.png"), *BOX, *model, "--out", "out", "--format", "jsonl,coco")
    assert shell(*asked).status == 0
    before = {path.name: path.read_bytes() for path in (here / "out").iterdir()}
    (here / "a.png").write_bytes(b"")
    assert shell(*asked).status == 1
    assert {path.name: path.read_bytes() for path in (here / "out").iterdir()} == before


# --- permissions


@pytest.fixture
def nobody(checkpoint, shell, monkeypatch):
    """A folder for all, and an account without rights in others; a test's own rights are given up until its end."""
    import shutil

    if os.name != "posix":
        pytest.skip("accounts are tried on POSIX only")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(checkpoint, folder / "model")
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "a.png")
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "secret.png")
        (folder / "locked").mkdir()
        shell("caption", folder / "a.png", *BOX, "--model", folder / "model")  # imports all that is needed
        (folder / "secret.png").chmod(0)
        (folder / "locked").chmod(0o555)
        folder.chmod(0o755)
        monkeypatch.chdir(folder)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        yield folder
        if root:
            os.seteuid(0)
        (folder / "locked").chmod(0o755)


@pytest.mark.slow
def test_cli_reports_permission_errors(refused, shell, nobody):
    arguments = (*BOX, "--model", "./model")
    assert "locked: Permission denied; choose a folder that you may write in" in refused(
        2, "caption", "a.png", *arguments, "--out", "locked"
    )
    assert "locked/new: Permission denied; choose a folder that you may write in" in refused(
        2, "caption", "a.png", *arguments, "--out", "locked/new"
    )
    assert "permission denied (secret.png)" in refused(1, "caption", "secret.png", *arguments)
    exported = shell("data", "export", "scenes", "locked/new", "num_images=1")
    assert exported.status == 2
    assert exported.err == [
        "sca: scenes val: 1 image",
        "sca: cannot write locked/new: Permission denied; choose a folder that you may write in",
    ]
    assert list((nobody / "locked").iterdir()) == []


def test_a_defect_keeps_its_traceback(shell, monkeypatch):
    from sca_registry import Registry

    monkeypatch.setattr(Registry, "list_entries", lambda self: [][0])
    with pytest.raises(IndexError):
        shell("list", "mixers")


def test_a_message_is_always_one_line(refused):
    assert re.fullmatch(r"unknown kind .*", refused(2, "list", "two\nlines"))
