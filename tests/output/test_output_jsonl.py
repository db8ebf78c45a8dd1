import io
import json
import os
from dataclasses import replace

import pytest

from sca.io import masks
from sca.io.errors import OutputError
from sca.io.prompt_files import read_region_prompts
from sca.output.formats import MultiFormatWriter


def test_a_line_says_what_was_asked_and_what_was_found(tmp_path, picture, captions):
    with MultiFormatWriter(tmp_path, ("jsonl",), model="m") as writers:
        writers.add("pics/a.png", picture, captions)
        writers.add("b.png", picture, [])
        writers.add("b.png", picture, captions[:1])
    lines = [json.loads(line) for line in writers.paths["jsonl"].open()]
    regions = [("pics/a.png", n) for n in range(4)] + [("b.png", 0)]
    assert [(line["image"], line["region_id"]) for line in lines] == regions
    assert lines[0] == {
        "image": "pics/a.png",
        "width": 40,
        "height": 30,
        "region_id": 0,
        "prompt": {"points": [[15.0, 12.0, 1], [1.0, 1.0, 0]]},
        "box": list(captions[0].box),
        "mask": captions[0].mask,
        "caption": "a disc",
        "score": 0.75,
        "predicted_iou": 0.5,
        "model": "m",
    }
    assert lines[1]["prompt"] == {"box": [1.5, 2.0, 10.0, 12.25]}
    assert (lines[1]["mask"], lines[1]["predicted_iou"]) == (None, None)
    assert lines[2]["box"] is None
    assert lines[3]["prompt"] == {"mask": captions[3].mask}
    assert masks.decode_rle(lines[3]["mask"]).sum() == 64


def test_hostile_captions_stay_one_ascii_line_each(tmp_path, picture, hostile):
    with MultiFormatWriter(tmp_path) as writers:
        writers.add("a\n\udcff.png", picture, hostile)
    content = (tmp_path / "captions.jsonl").read_bytes()
    assert content.isascii()
    lines = [json.loads(line) for line in content.decode().splitlines()]
    assert [line["caption"] for line in lines] == [caption.text for caption in hostile]
    assert lines[0]["image"] == "a\n\udcff.png"


def test_lines_are_there_as_soon_as_an_image_is_done(tmp_path, picture, captions):
    with MultiFormatWriter(tmp_path) as writers:
        for done in (1, 2, 3):
            writers.add(f"{done}.png", picture, captions)
            assert len((tmp_path / "captions.jsonl").read_text().splitlines()) == 4 * done


def test_what_is_not_a_number_is_null(tmp_path, picture, captions):
    with MultiFormatWriter(tmp_path) as writers:
        writers.add("a.png", picture, [replace(captions[0], score=float("nan"), predicted_iou=float("inf"))])
    line = json.loads((tmp_path / "captions.jsonl").read_text(), parse_constant=pytest.fail)
    assert (line["score"], line["predicted_iou"]) == (None, None)


def test_what_was_asked_can_be_asked_again(tmp_path, picture, captions):
    with MultiFormatWriter(tmp_path) as writers:
        writers.add("a.png", picture, captions)
    again = read_region_prompts(tmp_path / "captions.jsonl")["a.png"]
    for prompt, caption in zip(again, captions, strict=True):
        assert (prompt.box, prompt.points) == (caption.prompt.box, caption.prompt.points)
    assert (again[3].mask == captions[3].prompt.mask).all()


def test_a_stream_gets_the_same_lines_and_stays_open(tmp_path, picture, captions, hostile):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with (
        MultiFormatWriter(tmp_path, model="m") as to_file,
        MultiFormatWriter.from_stream(stream, model="m") as to_stream,
    ):
        for writers in (to_file, to_stream):
            writers.add("a.png", picture, captions + hostile)
    assert stream.buffer.getvalue() == (tmp_path / "captions.jsonl").read_bytes()
    assert not stream.closed


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_stream_is_one_clear_line(picture, captions):
    with open("/dev/full", "w") as full:
        with pytest.raises(OutputError, match="cannot write /dev/full: No space"):
            MultiFormatWriter.from_stream(full).add("a.png", picture, captions)
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # so that closing has nothing to complain about


def test_a_reader_that_has_gone_is_a_broken_pipe(picture, captions):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", closefd=False) as pipe:
        with pytest.raises(BrokenPipeError):
            MultiFormatWriter.from_stream(pipe).add("a.png", picture, captions)
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)
