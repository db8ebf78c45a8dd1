"""Text from elsewhere reaches the terminal as text: no control sequences, no markup, no second line of its own."""

import json
from dataclasses import replace

import pytest

from sca.io.text import UNSAFE_PATTERN

HOSTILE = "\x1b[31mred\x1b]0;title\x07\x9b2J\u202eevil\nsca: all good [bold]x[/bold]"
NAME = HOSTILE.replace("/", "")  # of a file


@pytest.fixture
def safe(shell):
    """Runs a command and checks what it prints."""

    def call(status, *arguments):
        result = shell(*arguments)
        assert result.status == status, result
        printed = [*result.out.split("\n"), *result.err]
        assert not [line for line in printed if UNSAFE_PATTERN.search(line)]
        assert not [line for line in printed if line.startswith("sca: all good")]
        assert "Traceback" not in "".join(printed)
        return result.out + "\n".join(result.err)

    return call


@pytest.fixture
def captions(here, picture):
    """A file of captions of a picture with a hostile name."""
    picture(f"{NAME}.png")
    line = {"image": f"{NAME}.png", "width": 64, "height": 48, "region": 0, "prompt": {"box": [1, 1, 9, 9]}}
    line |= {"box": [1, 1, 9, 9], "caption": HOSTILE, "score": 0.5, "model": HOSTILE}
    (here / "captions.jsonl").write_text(json.dumps(line) + "\n")
    return "captions.jsonl"


@pytest.mark.slow
def test_caption_shows_a_hostile_file_name_as_text(safe, checkpoint, picture, here):
    picture(f"{NAME}.png")
    (here / f"broken {NAME}.png").write_bytes(b"no image")
    shown = safe(1, "caption", ".", "--box", "1,1,40,40", "--model", checkpoint)
    assert "\\x1b[31mred" in shown
    shown = safe(1, "caption", ".", "--box", "1,1,40,40", "--model", checkpoint, "--out", f"out {NAME}")
    assert "wrote out \\x1b[31mred" in shown
    (line,) = (here / f"out {NAME}" / "captions.jsonl").read_text().splitlines()
    assert json.loads(line)["image"] == f"{NAME}.png", "what is stored is exact"
    safe(0, "caption", f"{NAME}.png", "--box", "1,1,40,40", "--model", checkpoint, "--out", "-", "--quiet")
    safe(2, "caption", f"no {NAME}", "--box", HOSTILE, "--model", checkpoint)
    safe(2, "caption", "--box", "1,1,40,40", "--model", HOSTILE, f"{NAME}.png")
    safe(2, "caption", f"--{HOSTILE}")


def test_caption_table_shows_a_hostile_caption_as_text(safe, checkpoint, picture, monkeypatch):
    from sca.inference.engine import Engine

    answer = Engine.caption_batch

    def hostile(*arguments, **options):
        found = answer(*arguments, **options)
        return [
            [replace(each, text=HOSTILE, alternatives=((HOSTILE, 0.1),)) for each in captions] for captions in found
        ]

    monkeypatch.setattr(Engine, "caption_batch", hostile)
    picture("a.png")
    shown = safe(0, "caption", "a.png", "--box", "1,1,40,40", "--model", checkpoint, "--quiet")
    assert shown.count("[bold]x[/bold]") == 2


def test_convert_and_view_show_hostile_text_as_text_and_keep_it(safe, captions, here):
    safe(0, "convert", captions, "out", "--format", "jsonl,coco,geojson,label-studio,labelme")
    stored = [json.loads(line) for line in (here / "out/captions.jsonl").read_text().splitlines()]
    assert stored[0]["caption"] == HOSTILE
    safe(0, "view", captions, "--out", f"{NAME}.html")
    page = (here / f"{NAME}.html").read_text()
    assert "[bold]" in page
    assert not any(character in page for character in "\x1b\x9b\u202e")
    (here / "bad.jsonl").write_text(json.dumps({"image": HOSTILE, "width": HOSTILE, "height": 1}) + "\n")
    safe(2, "convert", "bad.jsonl", "out2")


def test_score_compare_and_report_show_hostile_text_as_text(safe, here):
    for name in ("one", "two"):
        (here / name).mkdir()
        record = {"image_id": 1, "region_id": 2, "caption": HOSTILE, "references": [HOSTILE, "a red car"]}
        (here / name / "predictions.jsonl").write_text(json.dumps(record) + "\n")
    safe(0, "score", "one", "--metrics", "rouge-l", "tokenizer=plain")
    safe(0, "score", "one", "--metrics", "rouge-l", "tokenizer=plain", "--json")
    safe(0, "compare", "one", "two", "--metrics", "rouge-l", "tokenizer=plain", "--out", f"{NAME}.html")
    safe(0, "report", "one", "--metrics", "rouge-l", "tokenizer=plain", "--out", "r.html")
    page = (here / "r.html").read_text()
    assert not any(character in page for character in "\x1b\x9b\u202e")
    safe(2, "score", f"no {NAME}")
    safe(2, "score", "one", "--metrics", HOSTILE)


def test_data_stats_shows_hostile_classes_and_phrases_as_text(safe, here, picture):
    pytest.importorskip("datasets", reason="the extra data is not installed")
    names = [picture(f"{number}.png") for number in range(2)]
    lines = [{"image": name, "box": [1, 1, 9, 9], "caption": HOSTILE, "name": HOSTILE} for name in names]
    lines.append({"image": f"{NAME}.png", "box": [1, 1, 9, 9], "caption": "x", "name": "y"})
    (here / "data.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    shown = safe(0, "data", "stats", "jsonl", "--split", "train", "file=data.jsonl")
    assert "\\u202e" in shown
    as_json = safe(0, "data", "stats", "jsonl", "--split", "train", "file=data.jsonl", "--json")
    assert HOSTILE.replace("\n", " ").split()[0] in "".join(json.loads(as_json)["commonest_classes"])


@pytest.mark.slow
def test_recipes_sweeps_and_names_show_hostile_text_as_text(safe, here):
    (here / "r.toml").write_text(f"{json.dumps(HOSTILE)} = 1\n")
    safe(2, "train", "r.toml")
    safe(2, "bench", "status", "r.toml")
    (here / "c.toml").write_text('summary = "a"\n# \x1b[31m\n', "utf-8")
    safe(0, "show", "recipe", "c.toml")
    safe(2, "train", "c.toml")
    for command in (("show", "mixer"), ("show",), ("list",), ("train",), ("pull",), ("check", "mixer"), ("plan",)):
        safe(2, *command, HOSTILE, *(["x"] if command == ("show",) else []))
    safe(2, "doctor", HOSTILE)


def test_bench_report_and_diff_show_hostile_text_as_text(safe, here):
    row = {"key": "a", "label": HOSTILE, "state": "failed", "reason": HOSTILE, "sweep": HOSTILE}
    row |= {"config": {"model": {}, "seed": 0}, "seconds": {}}
    for name, state in (("one", "failed"), ("two", "crashed")):
        (here / name).mkdir()
        (here / name / "results.jsonl").write_text(json.dumps(row | {"state": state}) + "\n")
    safe(0, "bench", "report", "one", "--out", f"{NAME}.html")
    shown = safe(0, "bench", "diff", "one", "two")
    assert "\\x1b[31mred" in shown
    safe(2, "bench", "report", f"no {NAME}")
