"""Images, prompts and captions come from pipes, or are refused in one line."""

import io
import json
import os
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes have names on POSIX only")
BOX = ("--box", "0,0,20,20", "--max-new-tokens", 2)
RECORD = {"image": "a.png", "width": 64, "height": 48, "box": [1, 1, 9, 9], "caption": "a cat", "score": 0.5}


@contextmanager
def pipe(content: bytes, number: int | None = None):
    """A pipe that ends after its content, by its name; with a number, in place of that descriptor."""
    read, write = os.pipe()

    def fill():
        with os.fdopen(write, "wb") as stream:
            stream.write(content)

    writer = threading.Thread(target=fill)
    writer.start()
    before = None
    if number is not None:
        before = os.dup(number)
        os.dup2(read, number)
    try:
        yield f"/dev/fd/{read}"
    finally:
        os.close(read)
        if before is not None:
            os.dup2(before, number)
            os.close(before)
        writer.join()


@contextmanager
def stdin(content: bytes):
    with pipe(content, 0):
        yield "-"


def _lines(*records):
    return "".join(f"{json.dumps(record)}\n" for record in records).encode()


def _coco():
    images = [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}]
    annotations = [{"id": 1, "image_id": 1, "bbox": [1, 1, 8, 8], "caption": "a cat"}]
    return json.dumps({"images": images, "annotations": annotations}).encode()


@pytest.mark.parametrize("source", [pipe, stdin])
@pytest.mark.slow
def test_caption_reads_an_image_from_a_pipe(shell, picture, checkpoint, here, source):
    expected = shell("caption", picture("a.png"), *BOX, "--model", checkpoint, "--out", "-", "--quiet").out
    with source((here / "a.png").read_bytes()) as name:
        result = shell("caption", name, *BOX, "--model", checkpoint, "--out", "-", "--quiet")
    assert (result.status, result.err) == (0, [])
    assert json.loads(result.out) | {"image": "a.png"} == json.loads(expected)


@pytest.mark.parametrize("content", [_lines(RECORD), _coco()], ids=["lines", "coco"])
@pytest.mark.parametrize("source", [pipe, stdin])
@pytest.mark.slow
def test_caption_reads_prompts_from_a_pipe(shell, picture, checkpoint, content, source):
    picture("a.png")
    with source(content) as name:
        result = shell(
            "caption", "a.png", "--prompts", name, "--model", checkpoint, "--out", "-", "--quiet", "--max-new-tokens", 2
        )
    assert (result.status, result.err) == (0, [])
    assert json.loads(result.out)["prompt"] == {"box": [1, 1, 9, 9]}


@pytest.mark.parametrize("kind", ["png", "npy"])
def test_caption_reads_a_mask_from_a_pipe(shell, picture, checkpoint, kind):
    picture("a.png")
    mask, content = np.zeros((48, 64), np.uint8), io.BytesIO()
    mask[4:9, 5:20] = 255
    np.save(content, mask) if kind == "npy" else Image.fromarray(mask).save(content, "PNG")
    with pipe(content.getvalue()) as name:
        result = shell(
            "caption", "a.png", "--mask", name, "--model", checkpoint, "--out", "-", "--quiet", "--max-new-tokens", 2
        )
    assert (result.status, result.err) == (0, [])


@pytest.mark.parametrize("kind", ["jsonl", "coco", "parquet", "geojson", "label-studio"])
def test_convert_reads_captions_from_a_pipe(shell, here, kind):
    (here / "captions.jsonl").write_bytes(_lines(RECORD))
    assert shell("convert", "captions.jsonl", "made", "--format", kind).status == 0
    (file,) = (path for path in (here / "made").iterdir() if path.name != "sca-run.json" and path.name[0] != ".")
    with stdin(file.read_bytes()) as name:
        result = shell("convert", name, "again", "--format", "jsonl")
    assert result.status == 0, result.err
    found = json.loads((here / "again/captions.jsonl").read_text())
    assert (found["image"], found["caption"]) == ("a.png", "a cat")
    assert found["box"] == pytest.approx([1, 1, 9, 9])


@pytest.mark.slow
def test_view_and_score_read_standard_input(shell, picture, here):
    picture("a.png")
    with stdin(_lines(RECORD)) as name:
        assert shell("view", name).err == ["sca: wrote view.html, 1 region"]
    predictions = {"image_id": 1, "region_id": 2, "caption": "a red car", "references": ["the red car"]}
    with stdin(_lines(predictions)) as name:
        assert shell("score", name, "--metrics", "bleu").status == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("caption", "-", "-", *BOX), "/dev/stdin is named 2 times"),
        (("caption", "-", "--prompts", "/dev/stdin"), "/dev/stdin is named 2 times"),
        (("caption", "-", *BOX, "--launcher", "local", "--out", "out"), "--launcher needs files"),
        (("caption", "-", *BOX, "--resume", "--out", "out"), "--resume needs files"),
        (("compare", "-", "-"), "/dev/stdin is named 2 times"),
        (("view", "-", "-"), "/dev/stdin is named 2 times"),
    ],
)
def test_cli_rejects_a_pipe_that_would_be_read_twice(refused, here, arguments, told):
    with stdin(b""):
        assert told in refused(2, *arguments)


def test_cli_reports_an_empty_pipe(refused, here):
    with stdin(b"") as name:
        assert refused(1, "caption", name, *BOX) == "/dev/stdin is empty (0 bytes); copy or download it again"


def test_cli_limits_the_bytes_of_a_pipe(refused, here, monkeypatch):
    monkeypatch.setattr("sca.io.json.MAX_PIPE_BYTES", 10)
    with stdin(b"x" * 11) as name:
        assert "/dev/stdin has more than 10 bytes" in refused(1, "caption", name, *BOX)


@pytest.mark.slow
def test_caption_reports_a_fifo_in_a_folder(shell, picture, checkpoint, here):
    picture("in/a.png")
    os.mkfifo(here / "in/b.png")
    for images in ("in", "in/*.png"):
        result = shell("caption", images, *BOX, "--model", checkpoint, "--out", "-")
        assert result.status == 0
        assert result.err == ["sca: skipped in/b.png, which is a pipe or a device, not an image file"]
        assert [json.loads(line)["image"] for line in result.out.splitlines()] == ["in/a.png"]


def test_cli_rejects_a_fifo_without_waiting(refused, here):
    os.mkfifo(here / "b.png")
    assert refused(1, "caption", "b.png", *BOX).startswith("b.png is a pipe or a device, not an image file")


@pytest.mark.slow
def test_a_closed_pipe_behind_the_table_does_not_undo_the_run(started, picture, checkpoint, here):
    arguments = ("caption", picture("a.png"), *BOX, "--model", checkpoint, "--out", "out", "--overwrite")
    for words in (2, 3):  # the second run replaces the first
        process = started(*arguments, "--max-new-tokens", words)
        process.stdout.close()
        assert process.stderr.read() == "sca: wrote out/captions.jsonl\n"
        assert process.wait() == 0
        assert json.loads((here / "out/sca-run.json").read_text())["runs"]["caption"]["finished"]
    assert (here / "out/captions.jsonl").exists()


@pytest.mark.parametrize("command", [["--help"], ["list"], ["show", "mixer", "query"]], ids=" ".join)
@pytest.mark.slow
def test_output_to_a_closed_pipe_ends_quietly(started, command):
    process = started(*command)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
