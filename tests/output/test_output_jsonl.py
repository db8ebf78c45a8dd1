import io
import json
import os
from dataclasses import replace

import pytest

from sca.io import masks
from sca.io.errors import OutputError
from sca.io.prompt_files import read_region_prompts
from sca.output.formats import MultiFormatWriter


def test_jsonl_writer_stores_prompt_and_caption_of_each_region(tmp_path, noise_image, captions):
    with MultiFormatWriter(tmp_path, ("jsonl",), model="m") as writers:
        writers.add("pics/a.png", noise_image, captions)
        writers.add("b.png", noise_image, [])
        writers.add("b.png", noise_image, captions[:1])
    lines = [json.loads(line) for line in writers.paths["jsonl"].open()]
    expected_regions = [("pics/a.png", n) for n in range(4)] + [("b.png", 0)]
    assert [(line["image"], line["region_id"]) for line in lines] == expected_regions
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


def test_jsonl_writer_writes_hostile_captions_as_one_ascii_line_each(tmp_path, noise_image, hostile_captions):
    with MultiFormatWriter(tmp_path) as writers:
        writers.add("a\n\udcff.png", noise_image, hostile_captions)
    content = (tmp_path / "captions.jsonl").read_bytes()
    assert content.isascii()
    lines = [json.loads(line) for line in content.decode().splitlines()]
    assert [line["caption"] for line in lines] == [caption.text for caption in hostile_captions]
    assert lines[0]["image"] == "a\n\udcff.png"


def test_jsonl_writer_writes_lines_after_each_image(tmp_path, noise_image, captions):
    with MultiFormatWriter(tmp_path) as writers:
        for num_images in (1, 2, 3):
            writers.add(f"{num_images}.png", noise_image, captions)
            assert len((tmp_path / "captions.jsonl").read_text().splitlines()) == 4 * num_images


def test_jsonl_writer_writes_non_finite_numbers_as_null(tmp_path, noise_image, captions):
    with MultiFormatWriter(tmp_path) as writers:
        writers.add("a.png", noise_image, [replace(captions[0], score=float("nan"), predicted_iou=float("inf"))])
    line = json.loads((tmp_path / "captions.jsonl").read_text(), parse_constant=pytest.fail)
    assert (line["score"], line["predicted_iou"]) == (None, None)


def test_read_region_prompts_reads_jsonl_writer_output(tmp_path, noise_image, captions):
    with MultiFormatWriter(tmp_path) as writers:
        writers.add("a.png", noise_image, captions)
    prompts = read_region_prompts(tmp_path / "captions.jsonl")["a.png"]
    for prompt, caption in zip(prompts, captions, strict=True):
        assert (prompt.box, prompt.points) == (caption.prompt.box, caption.prompt.points)
    assert (prompts[3].mask == captions[3].prompt.mask).all()


def test_jsonl_writer_to_a_stream_writes_equal_lines_and_keeps_it_open(
    tmp_path, noise_image, captions, hostile_captions
):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with (
        MultiFormatWriter(tmp_path, model="m") as file_writer,
        MultiFormatWriter.from_stream(stream, model="m") as stream_writer,
    ):
        for writers in (file_writer, stream_writer):
            writers.add("a.png", noise_image, captions + hostile_captions)
    assert stream.buffer.getvalue() == (tmp_path / "captions.jsonl").read_bytes()
    assert not stream.closed


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_jsonl_writer_reports_a_full_stream(noise_image, captions):
    with open("/dev/full", "w") as full_device:
        with pytest.raises(OutputError, match="cannot write /dev/full: No space"):
            MultiFormatWriter.from_stream(full_device).add("a.png", noise_image, captions)
        os.dup2(os.open(os.devnull, os.O_WRONLY), full_device.fileno())  # so that closing has nothing to complain about


def test_jsonl_writer_raises_broken_pipe_if_the_reader_closed(noise_image, captions):
    read_descriptor, write_descriptor = os.pipe()
    os.close(read_descriptor)
    with open(write_descriptor, "w", closefd=False) as pipe:
        with pytest.raises(BrokenPipeError):
            MultiFormatWriter.from_stream(pipe).add("a.png", noise_image, captions)
        os.dup2(os.open(os.devnull, os.O_WRONLY), write_descriptor)
