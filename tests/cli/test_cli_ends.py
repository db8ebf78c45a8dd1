"""However a run ends, what is finished is whole and kept."""

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
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits are POSIX")


@pytest.fixture
def many(picture, here):
    """A folder of more pictures than are captioned in the time of a test."""
    picture("many/0.png")
    for number in range(1, 2000):
        shutil.copyfile(here / "many/0.png", here / f"many/{number}.png")
    return here / "many"


@posix
def test_an_interrupt_keeps_what_is_finished(started, many, checkpoint, here):
    arguments = ("--box", "0,0,9,9", "--model", checkpoint, "--batch-size", 1, "--max-new-tokens", 2)
    process = started("caption", many, *arguments, "--out", "out", *FORMATS)
    lines = here / "out/captions.jsonl"
    while process.poll() is None and not (lines.exists() and lines.read_text().count("\n") > 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert err.splitlines() == ["sca: interrupted; what was finished is kept"]
    done = [json.loads(line)["image"] for line in lines.read_text().splitlines()]
    assert 2 < len(done) < 2000
    assert len(out.splitlines()) in (len(done), len(done) + 1)  # the table, and its header
    assert abs(len(json.loads((here / "out/coco.json").read_text())["images"]) - len(done)) <= 1
    page = (here / "out/captions.html").read_text()
    assert page.rstrip().endswith("</html>")
    assert not [path for path in (here / "out").iterdir() if path.name.startswith(".")]


@posix
def test_interrupt_that_a_library_replaces_is_still_an_interrupt(monkeypatch, capsys):
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
    assert capsys.readouterr().err.splitlines() == ["sca: interrupted; what was finished is kept"]
    assert final_handler is signal.default_int_handler


def test_a_reader_that_has_seen_enough_ends_the_run_quietly(started, many, checkpoint):
    arguments = ("--box", "0,0,9,9", "--model", checkpoint, "--batch-size", 1, "--max-new-tokens", 2)
    process = started("caption", many, *arguments, "--out", "-")
    assert json.loads(process.stdout.readline())["region_id"] == 0
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0


@pytest.mark.parametrize("command", [["list", "--json"], ["--version"]], ids=" ".join)
def test_an_answer_that_nobody_reads_is_quiet(started, command):
    process = started(*command)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux")
@pytest.mark.parametrize("command", [["list", "--json"], ["--version"]], ids=" ".join)
def test_a_full_standard_output_is_one_line(started, command):
    with open("/dev/full", "w") as full:
        process = started(*command, stdout=full)
        _, err = process.communicate()
    assert process.returncode == 2
    assert err.splitlines() == ["sca: No space left on device"]


@posix
def test_a_full_disk_is_one_line_and_leaves_whole_files(shell, picture, checkpoint, here, monkeypatch):
    import resource

    for number in range(20):
        picture(f"in/{number}.png")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
        result = shell("caption", "in", "--box", "0,0,9,9", "--model", checkpoint, "--out", "out", *FORMATS, "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.status == 2
    assert len(result.err) == 1
    assert "free some space or choose another folder" in result.err[0]
    for line in (here / "out/captions.jsonl").read_text().splitlines():
        json.loads(line)
    for path in (here / "out").iterdir():
        assert not path.name.startswith(".")
        if path.name == "coco.json":
            json.loads(path.read_text())
        if path.name == "captions.html":
            assert path.read_text().rstrip().endswith("</html>")


@posix
def test_a_full_disk_leaves_no_half_checkpoint(checkpoint, here):
    import resource

    import sca

    model = sca.load(checkpoint)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
        with pytest.raises(OutputError, match="File too large"):
            sca.save(model, here / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(here.iterdir()) == []


def test_a_terminal_that_lacks_letters_still_gets_the_captions(checkpoint, picture, monkeypatch):
    command = [
        *("sca", "caption", picture("日本.png"), "--box", "0,0,9,9", "--model", str(checkpoint)),
        *("--max-new-tokens", "2"),
    ]
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit, match="0"):
        main()
    assert b"\\u65e5\\u672c.png" in terminal.buffer.getvalue()
