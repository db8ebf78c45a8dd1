"""Untrusted text is printed as plain text: no control sequences, markup or additional lines."""

import json
from dataclasses import replace

import pytest

from sca.io.text import UNSAFE_PATTERN

HOSTILE_TEXT = "\x1b[31mred\x1b]0;title\x07\x9b2J\u202eevil\nsca: all good [bold]x[/bold]"
HOSTILE_FILE_NAME = HOSTILE_TEXT.replace("/", "")  # of a file


@pytest.fixture
def run_and_check_output(run_sca):
    """Function that runs a command and checks its output."""

    def run_and_check(status, *arguments):
        result = run_sca(*arguments)
        assert result.status == status, result
        output_lines = [*result.out.split("\n"), *result.err]
        assert not [line for line in output_lines if UNSAFE_PATTERN.search(line)]
        assert not [line for line in output_lines if line.startswith("sca: all good")]
        assert "Traceback" not in "".join(output_lines)
        return result.out + "\n".join(result.err)

    return run_and_check


@pytest.fixture
def captions_file(working_folder, write_image):
    """A file of captions of an image with a hostile name."""
    write_image(f"{HOSTILE_FILE_NAME}.png")
    record = {
        "image": f"{HOSTILE_FILE_NAME}.png",
        "width": 64,
        "height": 48,
        "region": 0,
        "prompt": {"box": [1, 1, 9, 9]},
    }
    record |= {"box": [1, 1, 9, 9], "caption": HOSTILE_TEXT, "score": 0.5, "model": HOSTILE_TEXT}
    (working_folder / "captions.jsonl").write_text(json.dumps(record) + "\n")
    return "captions.jsonl"


@pytest.mark.slow
def test_caption_escapes_hostile_file_name(run_and_check_output, checkpoint, write_image, working_folder):
    write_image(f"{HOSTILE_FILE_NAME}.png")
    (working_folder / f"broken {HOSTILE_FILE_NAME}.png").write_bytes(b"no image")
    output = run_and_check_output(1, "caption", ".", "--box", "1,1,40,40", "--model", checkpoint)
    assert "\\x1b[31mred" in output
    output = run_and_check_output(
        1, "caption", ".", "--box", "1,1,40,40", "--model", checkpoint, "--out", f"out {HOSTILE_FILE_NAME}"
    )
    assert "wrote out \\x1b[31mred" in output
    (line,) = (working_folder / f"out {HOSTILE_FILE_NAME}" / "captions.jsonl").read_text().splitlines()
    assert json.loads(line)["image"] == f"{HOSTILE_FILE_NAME}.png", "what is stored is exact"
    run_and_check_output(
        0, "caption", f"{HOSTILE_FILE_NAME}.png", "--box", "1,1,40,40", "--model", checkpoint, "--out", "-", "--quiet"
    )
    run_and_check_output(2, "caption", f"no {HOSTILE_FILE_NAME}", "--box", HOSTILE_TEXT, "--model", checkpoint)
    run_and_check_output(2, "caption", "--box", "1,1,40,40", "--model", HOSTILE_TEXT, f"{HOSTILE_FILE_NAME}.png")
    run_and_check_output(2, "caption", f"--{HOSTILE_TEXT}")


def test_caption_table_escapes_hostile_caption(run_and_check_output, checkpoint, write_image, monkeypatch):
    from sca.inference.engine import Engine

    caption_batch = Engine.caption_batch

    def return_hostile_captions(*arguments, **options):
        captions_per_image = caption_batch(*arguments, **options)
        return [
            [replace(each, text=HOSTILE_TEXT, alternatives=((HOSTILE_TEXT, 0.1),)) for each in captions]
            for captions in captions_per_image
        ]

    monkeypatch.setattr(Engine, "caption_batch", return_hostile_captions)
    write_image("a.png")
    output = run_and_check_output(0, "caption", "a.png", "--box", "1,1,40,40", "--model", checkpoint, "--quiet")
    assert output.count("[bold]x[/bold]") == 2


def test_convert_and_view_escape_hostile_text_and_store_it_unchanged(
    run_and_check_output, captions_file, working_folder
):
    run_and_check_output(0, "convert", captions_file, "out", "--format", "jsonl,coco,geojson,label-studio,labelme")
    records = [json.loads(line) for line in (working_folder / "out/captions.jsonl").read_text().splitlines()]
    assert records[0]["caption"] == HOSTILE_TEXT
    run_and_check_output(0, "view", captions_file, "--out", f"{HOSTILE_FILE_NAME}.html")
    page = (working_folder / f"{HOSTILE_FILE_NAME}.html").read_text()
    assert "[bold]" in page
    assert not any(character in page for character in "\x1b\x9b\u202e")
    (working_folder / "bad.jsonl").write_text(
        json.dumps({"image": HOSTILE_TEXT, "width": HOSTILE_TEXT, "height": 1}) + "\n"
    )
    run_and_check_output(2, "convert", "bad.jsonl", "out2")


def test_score_compare_and_report_escape_hostile_text(run_and_check_output, working_folder):
    for name in ("one", "two"):
        (working_folder / name).mkdir()
        record = {"image_id": 1, "region_id": 2, "caption": HOSTILE_TEXT, "references": [HOSTILE_TEXT, "a red car"]}
        (working_folder / name / "predictions.jsonl").write_text(json.dumps(record) + "\n")
    run_and_check_output(0, "score", "one", "--metrics", "rouge-l", "tokenizer=plain")
    run_and_check_output(0, "score", "one", "--metrics", "rouge-l", "tokenizer=plain", "--json")
    run_and_check_output(
        0, "compare", "one", "two", "--metrics", "rouge-l", "tokenizer=plain", "--out", f"{HOSTILE_FILE_NAME}.html"
    )
    run_and_check_output(0, "report", "one", "--metrics", "rouge-l", "tokenizer=plain", "--out", "r.html")
    page = (working_folder / "r.html").read_text()
    assert not any(character in page for character in "\x1b\x9b\u202e")
    run_and_check_output(2, "score", f"no {HOSTILE_FILE_NAME}")
    run_and_check_output(2, "score", "one", "--metrics", HOSTILE_TEXT)


def test_data_stats_escapes_hostile_class_names_and_phrases(run_and_check_output, working_folder, write_image):
    pytest.importorskip("datasets", reason="the extra data is not installed")
    names = [write_image(f"{index}.png") for index in range(2)]
    records = [{"image": name, "box": [1, 1, 9, 9], "caption": HOSTILE_TEXT, "name": HOSTILE_TEXT} for name in names]
    records.append({"image": f"{HOSTILE_FILE_NAME}.png", "box": [1, 1, 9, 9], "caption": "x", "name": "y"})
    (working_folder / "data.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in records))
    output = run_and_check_output(0, "data", "stats", "jsonl", "--split", "train", "file=data.jsonl")
    assert "\\u202e" in output
    json_output = run_and_check_output(0, "data", "stats", "jsonl", "--split", "train", "file=data.jsonl", "--json")
    assert HOSTILE_TEXT.replace("\n", " ").split()[0] in "".join(json.loads(json_output)["most_common_classes"])


@pytest.mark.slow
def test_commands_escape_hostile_text_in_recipes_sweeps_and_names(run_and_check_output, working_folder):
    (working_folder / "r.toml").write_text(f"{json.dumps(HOSTILE_TEXT)} = 1\n")
    run_and_check_output(2, "train", "r.toml")
    run_and_check_output(2, "bench", "status", "r.toml")
    (working_folder / "c.toml").write_text('summary = "a"\n# \x1b[31m\n', "utf-8")
    run_and_check_output(0, "show", "recipe", "c.toml")
    run_and_check_output(2, "train", "c.toml")
    for command in (("show", "mixer"), ("show",), ("list",), ("train",), ("pull",), ("check", "mixer"), ("plan",)):
        run_and_check_output(2, *command, HOSTILE_TEXT, *(["x"] if command == ("show",) else []))
    run_and_check_output(2, "doctor", HOSTILE_TEXT)


def test_bench_report_and_diff_escape_hostile_text(run_and_check_output, working_folder):
    row = {"key": "a", "label": HOSTILE_TEXT, "state": "failed", "reason": HOSTILE_TEXT, "sweep": HOSTILE_TEXT}
    row |= {"config": {"model": {}, "seed": 0}, "seconds": {}}
    for name, state in (("one", "failed"), ("two", "crashed")):
        (working_folder / name).mkdir()
        (working_folder / name / "results.jsonl").write_text(json.dumps(row | {"state": state}) + "\n")
    run_and_check_output(0, "bench", "report", "one", "--out", f"{HOSTILE_FILE_NAME}.html")
    output = run_and_check_output(0, "bench", "diff", "one", "two")
    assert "\\x1b[31mred" in output
    run_and_check_output(2, "bench", "report", f"no {HOSTILE_FILE_NAME}")
