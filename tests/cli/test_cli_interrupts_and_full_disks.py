"""Runs that are interrupted or fill the disk keep what is finished, and leave no partial files."""

import io
import json
import shutil
import signal
import sys
import time

import pytest

from sca.cli import listing, main, run_command
from sca.io.errors import OutputError

pytestmark = pytest.mark.slow

FORMATS = ("--format", "jsonl,coco,html,png")
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits are POSIX")


@pytest.fixture
def folder_with_2000_images(write_image, working_folder):
    """A folder of more images than are captioned during a test."""
    write_image("many/0.png")
    for index in range(1, 2000):
        shutil.copyfile(working_folder / "many/0.png", working_folder / f"many/{index}.png")
    return working_folder / "many"


@posix_only
def test_caption_interrupt_keeps_finished_captions(start_sca, folder_with_2000_images, checkpoint, working_folder):
    arguments = ("--box", "0,0,9,9", "--model", checkpoint, "--batch-size", 1, "--max-new-tokens", 2)
    process = start_sca("caption", folder_with_2000_images, *arguments, "--out", "out", *FORMATS)
    jsonl_path = working_folder / "out/captions.jsonl"
    while process.poll() is None and not (jsonl_path.exists() and jsonl_path.read_text().count("\n") > 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert err.splitlines() == ["sca: interrupted; finished results are kept"]
    finished_images = [json.loads(line)["image"] for line in jsonl_path.read_text().splitlines()]
    assert 2 < len(finished_images) < 2000
    assert len(out.splitlines()) in (len(finished_images), len(finished_images) + 1)  # the table, and its header
    assert abs(len(json.loads((working_folder / "out/coco.json").read_text())["images"]) - len(finished_images)) <= 1
    page = (working_folder / "out/captions.html").read_text()
    assert page.rstrip().endswith("</html>")
    assert not [path for path in (working_folder / "out").iterdir() if path.name.startswith(".")]


@posix_only
def test_cli_reports_interrupt_that_a_library_replaced_by_its_own_error(monkeypatch, capsys):
    def replace_interrupt(kind):
        try:
            signal.raise_signal(signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise TypeError("__array__() got an unexpected keyword argument 'copy'") from None

    monkeypatch.setattr(listing, "_collect_rows", replace_interrupt)
    original_handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = run_command(["list", "mixer"])
        final_handler = signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, original_handler)
    assert status == 130
    assert capsys.readouterr().err.splitlines() == ["sca: interrupted; finished results are kept"]
    assert final_handler is signal.default_int_handler


def test_caption_stops_silently_when_stdout_is_closed(start_sca, folder_with_2000_images, checkpoint):
    arguments = ("--box", "0,0,9,9", "--model", checkpoint, "--batch-size", 1, "--max-new-tokens", 2)
    process = start_sca("caption", folder_with_2000_images, *arguments, "--out", "-")
    assert json.loads(process.stdout.readline())["region_id"] == 0
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0


@pytest.mark.parametrize("command", [["list", "--json"], ["--version"]], ids=" ".join)
def test_command_exits_silently_when_stdout_is_closed(start_sca, command):
    process = start_sca(*command)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux")
@pytest.mark.parametrize("command", [["list", "--json"], ["--version"]], ids=" ".join)
def test_command_reports_full_stdout_in_one_line(start_sca, command):
    with open("/dev/full", "w") as full_device:
        process = start_sca(*command, stdout=full_device)
        _, err = process.communicate()
    assert process.returncode == 2
    assert err.splitlines() == ["sca: No space left on device"]


@posix_only
def test_caption_reports_full_disk_and_leaves_complete_files(
    run_sca, write_image, checkpoint, working_folder, monkeypatch
):
    import resource

    for index in range(20):
        write_image(f"in/{index}.png")
    original_limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, original_limits[1]))
        result = run_sca(
            "caption", "in", "--box", "0,0,9,9", "--model", checkpoint, "--out", "out", *FORMATS, "--quiet"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, original_limits)
    assert result.status == 2
    assert len(result.err) == 1
    assert "free some space or choose another folder" in result.err[0]
    for line in (working_folder / "out/captions.jsonl").read_text().splitlines():
        json.loads(line)
    for path in (working_folder / "out").iterdir():
        assert not path.name.startswith(".")
        if path.name == "coco.json":
            json.loads(path.read_text())
        if path.name == "captions.html":
            assert path.read_text().rstrip().endswith("</html>")


@posix_only
def test_save_on_full_disk_leaves_no_partial_checkpoint(checkpoint, working_folder):
    import resource

    import sca

    model = sca.load(checkpoint)
    original_limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, original_limits[1]))
        with pytest.raises(OutputError, match="File too large"):
            sca.save(model, working_folder / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, original_limits)
    assert list(working_folder.iterdir()) == []


def test_caption_escapes_characters_missing_from_stdout_encoding(checkpoint, write_image, monkeypatch):
    command = [
        *("sca", "caption", write_image("日本.png"), "--box", "0,0,9,9", "--model", str(checkpoint)),
        *("--max-new-tokens", "2"),
    ]
    latin1_stdout = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(sys, "stdout", latin1_stdout)
    with pytest.raises(SystemExit, match="0"):
        main()
    assert b"\\u65e5\\u672c.png" in latin1_stdout.buffer.getvalue()
