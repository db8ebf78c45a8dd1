"""Images, prompts and captions are read from pipes, or rejected in one line."""

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
BOX_ARGUMENTS = ("--box", "0,0,20,20", "--max-new-tokens", 2)
RECORD = {"image": "a.png", "width": 64, "height": 48, "box": [1, 1, 9, 9], "caption": "a cat", "score": 0.5}


@contextmanager
def open_pipe(content: bytes, descriptor: int | None = None):
    """Open a pipe with the given content and return its path; `descriptor` replaces a file descriptor with it."""
    read_descriptor, write_descriptor = os.pipe()

    def write_content():
        with os.fdopen(write_descriptor, "wb") as stream:
            stream.write(content)

    writer = threading.Thread(target=write_content)
    writer.start()
    original_descriptor = None
    if descriptor is not None:
        original_descriptor = os.dup(descriptor)
        os.dup2(read_descriptor, descriptor)
    try:
        yield f"/dev/fd/{read_descriptor}"
    finally:
        os.close(read_descriptor)
        if original_descriptor is not None:
            os.dup2(original_descriptor, descriptor)
            os.close(original_descriptor)
        writer.join()


@contextmanager
def replace_stdin(content: bytes):
    with open_pipe(content, 0):
        yield "-"


def encode_jsonl(*records):
    return "".join(f"{json.dumps(record)}\n" for record in records).encode()


def encode_coco():
    images = [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}]
    annotations = [{"id": 1, "image_id": 1, "bbox": [1, 1, 8, 8], "caption": "a cat"}]
    return json.dumps({"images": images, "annotations": annotations}).encode()


@pytest.mark.parametrize("open_source", [open_pipe, replace_stdin])
@pytest.mark.slow
def test_caption_reads_image_from_pipe(run_sca, write_image, checkpoint, working_folder, open_source):
    expected = run_sca(
        "caption", write_image("a.png"), *BOX_ARGUMENTS, "--model", checkpoint, "--out", "-", "--quiet"
    ).out
    with open_source((working_folder / "a.png").read_bytes()) as name:
        result = run_sca("caption", name, *BOX_ARGUMENTS, "--model", checkpoint, "--out", "-", "--quiet")
    assert (result.status, result.err) == (0, [])
    assert json.loads(result.out) | {"image": "a.png"} == json.loads(expected)


@pytest.mark.parametrize("content", [encode_jsonl(RECORD), encode_coco()], ids=["lines", "coco"])
@pytest.mark.parametrize("open_source", [open_pipe, replace_stdin])
@pytest.mark.slow
def test_caption_reads_prompts_from_pipe(run_sca, write_image, checkpoint, content, open_source):
    write_image("a.png")
    with open_source(content) as name:
        result = run_sca(
            "caption", "a.png", "--prompts", name, "--model", checkpoint, "--out", "-", "--quiet", "--max-new-tokens", 2
        )
    assert (result.status, result.err) == (0, [])
    assert json.loads(result.out)["prompt"] == {"box": [1, 1, 9, 9]}


@pytest.mark.parametrize("file_format", ["png", "npy"])
def test_caption_reads_mask_from_pipe(run_sca, write_image, checkpoint, file_format):
    write_image("a.png")
    mask, content = np.zeros((48, 64), np.uint8), io.BytesIO()
    mask[4:9, 5:20] = 255
    np.save(content, mask) if file_format == "npy" else Image.fromarray(mask).save(content, "PNG")
    with open_pipe(content.getvalue()) as name:
        result = run_sca(
            "caption", "a.png", "--mask", name, "--model", checkpoint, "--out", "-", "--quiet", "--max-new-tokens", 2
        )
    assert (result.status, result.err) == (0, [])


@pytest.mark.parametrize("file_format", ["jsonl", "coco", "parquet", "geojson", "label-studio"])
def test_convert_reads_captions_from_stdin(run_sca, working_folder, file_format):
    (working_folder / "captions.jsonl").write_bytes(encode_jsonl(RECORD))
    assert run_sca("convert", "captions.jsonl", "made", "--format", file_format).status == 0
    (file,) = (
        path for path in (working_folder / "made").iterdir() if path.name != "sca-run.json" and path.name[0] != "."
    )
    with replace_stdin(file.read_bytes()) as name:
        result = run_sca("convert", name, "again", "--format", "jsonl")
    assert result.status == 0, result.err
    record = json.loads((working_folder / "again/captions.jsonl").read_text())
    assert (record["image"], record["caption"]) == ("a.png", "a cat")
    assert record["box"] == pytest.approx([1, 1, 9, 9])


@pytest.mark.slow
def test_view_and_score_read_stdin(run_sca, write_image, working_folder):
    write_image("a.png")
    with replace_stdin(encode_jsonl(RECORD)) as name:
        assert run_sca("view", name).err == ["sca: wrote view.html, 1 region"]
    predictions = {"image_id": 1, "region_id": 2, "caption": "a red car", "references": ["the red car"]}
    with replace_stdin(encode_jsonl(predictions)) as name:
        assert run_sca("score", name, "--metrics", "bleu").status == 0


@pytest.mark.parametrize(
    ("arguments", "expected_message"),
    [
        (
            ("caption", "-", "-", *BOX_ARGUMENTS),
            "/dev/stdin is given 2 times, but a pipe can be read only once; save it to a file",
        ),
        (
            ("caption", "-", "--prompts", "/dev/stdin"),
            "/dev/stdin is given 2 times, but a pipe can be read only once; save it to a file",
        ),
        (
            ("caption", "-", *BOX_ARGUMENTS, "--launcher", "local", "--out", "out"),
            "--launcher requires files, but /dev/stdin can be read only once; save it to a file",
        ),
        (
            ("caption", "-", *BOX_ARGUMENTS, "--resume", "--out", "out"),
            "--resume requires files, but /dev/stdin can be read only once; save it to a file",
        ),
        (("compare", "-", "-"), "/dev/stdin is given 2 times, but a pipe can be read only once; save it to a file"),
        (("view", "-", "-"), "/dev/stdin is given 2 times, but a pipe can be read only once; save it to a file"),
    ],
)
def test_commands_reject_pipes_that_would_be_read_twice(get_sca_error, working_folder, arguments, expected_message):
    with replace_stdin(b""):
        assert expected_message in get_sca_error(2, *arguments)


def test_caption_reports_empty_stdin(get_sca_error, working_folder):
    with replace_stdin(b"") as name:
        assert (
            get_sca_error(1, "caption", name, *BOX_ARGUMENTS)
            == "/dev/stdin is empty (0 bytes); copy or download it again"
        )


def test_caption_rejects_stdin_above_size_limit(get_sca_error, working_folder, monkeypatch):
    monkeypatch.setattr("sca.io.json.MAX_PIPE_BYTES", 10)
    with replace_stdin(b"x" * 11) as name:
        assert "/dev/stdin has more than 10 bytes" in get_sca_error(1, "caption", name, *BOX_ARGUMENTS)


@pytest.mark.slow
def test_caption_skips_fifo_in_folder_and_reports_it(run_sca, write_image, checkpoint, working_folder):
    write_image("in/a.png")
    os.mkfifo(working_folder / "in/b.png")
    for images in ("in", "in/*.png"):
        result = run_sca("caption", images, *BOX_ARGUMENTS, "--model", checkpoint, "--out", "-")
        assert result.status == 0
        assert result.err == ["sca: skipped in/b.png, which is a pipe or a device, not an image file"]
        assert [json.loads(line)["image"] for line in result.out.splitlines()] == ["in/a.png"]


def test_caption_rejects_fifo_without_blocking(get_sca_error, working_folder):
    os.mkfifo(working_folder / "b.png")
    assert get_sca_error(1, "caption", "b.png", *BOX_ARGUMENTS).startswith(
        "b.png is a pipe or a device, not an image file"
    )


@pytest.mark.slow
def test_caption_with_closed_stdout_still_writes_results(start_sca, write_image, checkpoint, working_folder):
    arguments = ("caption", write_image("a.png"), *BOX_ARGUMENTS, "--model", checkpoint, "--out", "out", "--overwrite")
    for max_new_tokens in (2, 3):  # the second run replaces the first
        process = start_sca(*arguments, "--max-new-tokens", max_new_tokens)
        process.stdout.close()
        assert process.stderr.read() == "sca: wrote out/captions.jsonl\n"
        assert process.wait() == 0
        assert json.loads((working_folder / "out/sca-run.json").read_text())["runs"]["caption"]["finished"]
    assert (working_folder / "out/captions.jsonl").exists()


@pytest.mark.parametrize("command", [["--help"], ["list"], ["show", "mixer", "query"]], ids=" ".join)
@pytest.mark.slow
def test_command_with_closed_stdout_exits_silently(start_sca, command):
    process = start_sca(*command)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
