"""Runs that resume, conversion of captions to other formats, and viewer pages."""

import json
import random
import time

import pytest
from PIL import Image
from viewer_page import ViewerPage

pytestmark = pytest.mark.slow

BOX_ARGUMENTS = ("--box", "4,4,40,40", "--box", "10,10,30,30")


@pytest.fixture
def image_paths(write_image):
    return [write_image(f"photos/{index:03d}.png") for index in range(12)]


def read_folder(here, folder):
    return sorted((path.name, path.read_bytes()) for path in (here / folder).rglob("*") if path.is_file())


@pytest.mark.parametrize("formats", ["jsonl", "jsonl,coco,html,png"])
def test_caption_resume_after_interrupt_writes_same_files_as_full_run(
    run_sca, checkpoint, image_paths, working_folder, monkeypatch, formats
):
    (working_folder / "photos/004x.png").write_bytes(b"none")
    arguments = (
        "caption",
        "photos",
        *BOX_ARGUMENTS,
        "--model",
        checkpoint,
        "--batch-size",
        3,
        "--format",
        formats,
        "--quiet",
    )
    assert run_sca(*arguments, "--out", "whole").status == 1
    from sca.output.caption_journal import CaptionJournal

    add_to_journal, num_added = CaptionJournal.add, [0]

    def add_and_interrupt(self, *rest):
        add_to_journal(self, *rest)
        num_added[0] += 1
        if num_added[0] == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(CaptionJournal, "add", add_and_interrupt)
    assert run_sca(*arguments, "--out", "parts").status == 130
    monkeypatch.setattr(CaptionJournal, "add", add_to_journal)
    journal = working_folder / "parts/captions.journal"
    assert len(journal.read_bytes().splitlines()) == 6
    with journal.open("ab") as file:
        file.write(b'{"image": "photos/00')  # a line cut off by a kill
    from sca.inference.engine import Engine

    caption_batch, batch_sizes = Engine.caption_batch, []
    monkeypatch.setattr(
        Engine,
        "caption_batch",
        lambda self, encoded, *a, **b: (batch_sizes.append(len(encoded.images)), caption_batch(self, encoded, *a, **b))[
            1
        ],
    )
    assert run_sca(*arguments, "--out", "parts", "--resume").status == 1
    assert batch_sizes == [3, 3, 3], "the batch that was not whole, and those after it"
    assert read_folder(working_folder, "parts") == read_folder(working_folder, "whole")


def test_caption_everything_resume_writes_same_files_as_full_run(
    run_sca, checkpoint, image_paths, working_folder, monkeypatch
):
    arguments = (
        *("caption", "photos", "--everything", "--points-per-side", 2, "--model", checkpoint),
        *("--pred-iou-thresh", 0, "--stability-score-thresh", 0),
    )
    assert run_sca(*arguments, "--out", "whole", "--quiet").status == 0
    from sca.inference import batch

    reuse_captions, reused_paths = batch._reuse_captions, []
    monkeypatch.setattr(
        batch, "_reuse_captions", lambda path, *rest: (reused_paths.append(path), reuse_captions(path, *rest))[1]
    )
    from sca.output.caption_journal import CaptionJournal

    close_journal = CaptionJournal.close
    monkeypatch.setattr(CaptionJournal, "close", lambda self, finished: close_journal(self, False))
    assert run_sca(*arguments, "--out", "parts", "--quiet").status == 0
    monkeypatch.setattr(CaptionJournal, "close", close_journal)
    assert run_sca(*arguments, "--out", "parts", "--quiet", "--resume").status == 0
    assert len(reused_paths) == 12
    assert read_folder(working_folder, "parts") == read_folder(working_folder, "whole")


def test_caption_resume_rejects_run_with_other_options(run_sca, get_sca_error, checkpoint, image_paths, working_folder):
    arguments = ("caption", "photos/000.png", "--model", checkpoint, "--out", "out")
    assert run_sca(*arguments, *BOX_ARGUMENTS, "--quiet").status == 0
    (working_folder / "out/captions.journal").write_text(json.dumps({"model": "another"}) + "\n")
    message = get_sca_error(2, *arguments, *BOX_ARGUMENTS, "--quiet", "--resume", "--max-new-tokens", 2)
    assert 'contains a different run (max_new_tokens: null there, "2" now)' in message
    assert run_sca(*arguments, *BOX_ARGUMENTS, "--quiet").status == 0
    assert not (working_folder / "out/captions.journal").exists()
    message = get_sca_error(2, "caption", "photos", *BOX_ARGUMENTS, "--resume")
    assert message == "--resume requires --out, the folder of the interrupted run"


@pytest.mark.parametrize(("num_images", "num_kills"), [pytest.param(500, 10, marks=pytest.mark.all)])
def test_caption_resume_after_repeated_kills_captions_each_image_once(
    run_sca, start_sca, write_image, working_folder, num_images, num_kills
):
    for index in range(num_images):
        write_image(f"many/{index:03d}.png", 96 + index % 7, 96)
    arguments = (
        *("caption", "many", "--box", "4,4,60,60", "--box", "1,1,30,30"),
        *("--batch-size", "4", "--format", "jsonl,coco"),
    )
    full_run = start_sca(*arguments, "--out", "whole", "--quiet")
    start = time.monotonic()
    assert full_run.wait() == 0
    run_seconds, rng = time.monotonic() - start, random.Random(1)
    for _ in range(num_kills):
        process = start_sca(*arguments, "--out", "parts", "--quiet", "--resume")
        time.sleep(rng.uniform(0.5, 1) * run_seconds)
        process.kill()
        process.wait()
    assert start_sca(*arguments, "--out", "parts", "--quiet", "--resume").wait() == 0
    assert read_folder(working_folder, "parts") == read_folder(working_folder, "whole")
    lines = [json.loads(line) for line in (working_folder / "parts/captions.jsonl").open()]
    assert len(lines) == 2 * num_images


def test_caption_lists_failed_images_in_last_line(run_sca, checkpoint, image_paths, working_folder):
    for name in ("photos/a.png", "photos/b.png"):
        (working_folder / name).write_bytes(b"none")
    result = run_sca("caption", "photos", *BOX_ARGUMENTS, "--model", checkpoint, "--out", "out")
    assert result.status == 1
    assert result.err[-1] == "sca: 12 of 14 images captioned; not captioned: photos/a.png, photos/b.png"


def test_convert_round_trips_captions_through_all_formats(run_sca, checkpoint, image_paths, working_folder):
    assert run_sca("caption", "photos", *BOX_ARGUMENTS, "--model", checkpoint, "--out", "out", "--quiet").status == 0
    all_formats = "jsonl,coco,parquet,geojson,label-studio,labelme,cvat,fiftyone,yolo,png,html"
    result = run_sca("convert", "out/captions.jsonl", "all", "--format", all_formats)
    assert result.status == 0, result.err
    assert result.err[-1] == "sca: 24 regions"
    assert (working_folder / "all/captions.jsonl").read_bytes() == (working_folder / "out/captions.jsonl").read_bytes()
    for name in ("captions.parquet", "captions.geojson"):
        assert run_sca("convert", f"all/{name}", f"from-{name}", "--format", "jsonl").status == 0
        assert (working_folder / f"from-{name}/captions.jsonl").read_bytes() == (
            working_folder / "out/captions.jsonl"
        ).read_bytes()
    for name in ("coco.json", "label-studio.json", "labelme"):
        assert run_sca("convert", f"all/{name}", f"from-{name}", "--format", "coco").status == 0
        converted_content, reconverted_content = (
            json.loads((working_folder / f"{folder}/coco.json").read_text()) for folder in ("all", f"from-{name}")
        )
        for converted, reconverted in zip(
            converted_content["annotations"], reconverted_content["annotations"], strict=True
        ):
            assert converted["caption"] == reconverted["caption"]
            assert converted["segmentation"] == reconverted["segmentation"]


def test_output_formats_help_lists_every_format():
    from sca.cli.options import OUTPUT_FORMATS_HELP
    from sca.output.formats import OUTPUT_FORMATS

    assert ", ".join(OUTPUT_FORMATS) == OUTPUT_FORMATS_HELP


def test_convert_to_png_reports_missing_and_resized_images(
    run_sca, get_sca_error, checkpoint, image_paths, working_folder
):
    assert run_sca("caption", "photos", *BOX_ARGUMENTS, "--model", checkpoint, "--out", "out", "--quiet").status == 0
    (working_folder / "photos/003.png").unlink()
    Image.new("RGB", (9, 9)).save(working_folder / "photos/004.png")
    assert run_sca("convert", "out/captions.jsonl", "coco").status == 0
    result = run_sca("convert", "out/captions.jsonl", "drawn", "--format", "png")
    assert result.status == 1
    assert "photos/003.png" in result.err[0]
    assert (
        "photos/004.png: the annotation file records 64 x 48 (width x height), but the image is 9 x 9" in result.err[1]
    )
    assert len(list((working_folder / "drawn").glob("*.png"))) == 10
    message = get_sca_error(2, "convert", "out/captions.jsonl", "again", "--format", "pdf")
    assert message.startswith("unknown format 'pdf'. ")


def test_convert_draws_on_image_resized_after_captioning(run_sca, checkpoint, image_paths, working_folder):
    arguments = ("caption", "photos/004.png", "--box", "8,8,40,40", "--model", checkpoint, "--quiet")
    assert run_sca(*arguments, "--format", "jsonl,png", "--out", "out").status == 0
    Image.open("photos/004.png").resize((128, 96), Image.Resampling.NEAREST).save("photos/004.png")
    assert run_sca("convert", "out/captions.jsonl", "drawn", "--format", "png").status == 0
    converted_drawing, original_drawing = (
        Image.open(working_folder / folder / "004.captions.png") for folder in ("drawn", "out")
    )
    assert converted_drawing.size == original_drawing.size
    result = run_sca("view", "out/captions.jsonl")
    assert not any("not shown" in line for line in result.err)


def test_view_writes_page_that_compares_two_caption_files(run_sca, checkpoint, image_paths, working_folder):
    for max_new_tokens in (3, 5):
        arguments = (
            "caption",
            "photos",
            *BOX_ARGUMENTS,
            "--model",
            checkpoint,
            "--max-new-tokens",
            max_new_tokens,
            "--quiet",
        )
        assert run_sca(*arguments, "--out", f"out{max_new_tokens}").status == 0
    (working_folder / "photos/000.png").unlink()
    result = run_sca("view", "out3/captions.jsonl", "out5/captions.jsonl", "--out", "pages/view.html")
    assert result.status == 0, result.err
    assert result.err[-1] == "sca: wrote pages/view.html, 48 regions"
    assert "1 image not shown" in result.err[-2]
    page = (working_folder / "pages/view.html").read_text()
    images = ViewerPage(page).images
    assert len(images) == 12
    assert all(len(image["regions"]) == len(image["other_regions"]) == 2 for image in images)
    assert "http://" not in page
