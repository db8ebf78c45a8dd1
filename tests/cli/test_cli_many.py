"""Long runs that go on after whatever ended them; captions in other formats, and as a page."""

import json
import random
import time

import pytest
from PIL import Image
from viewer_page import ViewerPage

pytestmark = pytest.mark.slow

BOXES = ("--box", "4,4,40,40", "--box", "10,10,30,30")


@pytest.fixture
def pictures(picture):
    return [picture(f"photos/{number:03d}.png") for number in range(12)]


def made(here, folder):
    return sorted((path.name, path.read_bytes()) for path in (here / folder).rglob("*") if path.is_file())


@pytest.mark.parametrize("formats", ["jsonl", "jsonl,coco,html,png"])
def test_a_run_that_was_ended_goes_on_to_the_same_files(shell, checkpoint, pictures, here, monkeypatch, formats):
    (here / "photos/004x.png").write_bytes(b"none")
    asked = ("caption", "photos", *BOXES, "--model", checkpoint, "--batch-size", 3, "--format", formats, "--quiet")
    assert shell(*asked, "--out", "whole").status == 1
    from sca.output.caption_journal import CaptionJournal

    add, count = CaptionJournal.add, [0]

    def end(self, *rest):
        add(self, *rest)
        count[0] += 1
        if count[0] == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(CaptionJournal, "add", end)
    assert shell(*asked, "--out", "parts").status == 130
    monkeypatch.setattr(CaptionJournal, "add", add)
    journal = here / "parts/captions.journal"
    assert len(journal.read_bytes().splitlines()) == 6
    with journal.open("ab") as file:
        file.write(b'{"image": "photos/00')  # what a kill leaves
    from sca.inference.engine import Engine

    answer, seen = Engine.caption_batch, []
    monkeypatch.setattr(
        Engine,
        "caption_batch",
        lambda self, encoded, *a, **b: (seen.append(len(encoded.images)), answer(self, encoded, *a, **b))[1],
    )
    assert shell(*asked, "--out", "parts", "--resume").status == 1
    assert seen == [3, 3, 3], "the batch that was not whole, and those after it"
    assert made(here, "parts") == made(here, "whole")


def test_everything_is_resumed_too(shell, checkpoint, pictures, here, monkeypatch):
    asked = (
        *("caption", "photos", "--everything", "--points-per-side", 2, "--model", checkpoint),
        *("--pred-iou-thresh", 0, "--stability-score-thresh", 0),
    )
    assert shell(*asked, "--out", "whole", "--quiet").status == 0
    from sca.inference import batch

    repeat, used = batch._reuse_captions, []
    monkeypatch.setattr(batch, "_reuse_captions", lambda path, *rest: (used.append(path), repeat(path, *rest))[1])
    from sca.output.caption_journal import CaptionJournal

    close = CaptionJournal.close
    monkeypatch.setattr(CaptionJournal, "close", lambda self, finished: close(self, False))
    assert shell(*asked, "--out", "parts", "--quiet").status == 0
    monkeypatch.setattr(CaptionJournal, "close", close)
    assert shell(*asked, "--out", "parts", "--quiet", "--resume").status == 0
    assert len(used) == 12
    assert made(here, "parts") == made(here, "whole")


def test_a_run_with_other_options_is_not_gone_on_with(shell, refused, checkpoint, pictures, here):
    asked = ("caption", "photos/000.png", "--model", checkpoint, "--out", "out")
    assert shell(*asked, *BOXES, "--quiet").status == 0
    (here / "out/captions.journal").write_text(json.dumps({"model": "another"}) + "\n")
    line = refused(2, *asked, *BOXES, "--quiet", "--resume", "--max-new-tokens", 2)
    assert 'contains another run (max_new_tokens: null there, "2" now)' in line
    assert shell(*asked, *BOXES, "--quiet").status == 0
    assert not (here / "out/captions.journal").exists()
    line = refused(2, "caption", "photos", *BOXES, "--resume")
    assert line == "--resume requires --out, the folder of the interrupted run"


@pytest.mark.parametrize(("count", "kills"), [pytest.param(500, 10, marks=pytest.mark.all)])
def test_a_run_that_is_killed_again_and_again_has_each_image_once(shell, started, picture, here, count, kills):
    for number in range(count):
        picture(f"many/{number:03d}.png", 96 + number % 7, 96)
    asked = (
        *("caption", "many", "--box", "4,4,60,60", "--box", "1,1,30,30"),
        *("--batch-size", "4", "--format", "jsonl,coco"),
    )
    whole = started(*asked, "--out", "whole", "--quiet")
    start = time.monotonic()
    assert whole.wait() == 0
    took, draw = time.monotonic() - start, random.Random(1)
    for _ in range(kills):
        process = started(*asked, "--out", "parts", "--quiet", "--resume")
        time.sleep(draw.uniform(0.5, 1) * took)
        process.kill()
        process.wait()
    assert started(*asked, "--out", "parts", "--quiet", "--resume").wait() == 0
    assert made(here, "parts") == made(here, "whole")
    lines = [json.loads(line) for line in (here / "parts/captions.jsonl").open()]
    assert len(lines) == 2 * count


def test_what_failed_is_named_at_the_end(shell, checkpoint, pictures, here):
    for name in ("photos/a.png", "photos/b.png"):
        (here / name).write_bytes(b"none")
    result = shell("caption", "photos", *BOXES, "--model", checkpoint, "--out", "out")
    assert result.status == 1
    assert result.err[-1] == "sca: 12 of 14 done; not done: photos/a.png, photos/b.png"


def test_captions_are_converted_and_come_back(shell, checkpoint, pictures, here):
    assert shell("caption", "photos", *BOXES, "--model", checkpoint, "--out", "out", "--quiet").status == 0
    all_of_them = "jsonl,coco,parquet,geojson,label-studio,labelme,png,html"
    result = shell("convert", "out/captions.jsonl", "all", "--format", all_of_them)
    assert result.status == 0, result.err
    assert result.err[-1] == "sca: 24 regions"
    assert (here / "all/captions.jsonl").read_bytes() == (here / "out/captions.jsonl").read_bytes()
    for name in ("captions.parquet", "captions.geojson"):
        assert shell("convert", f"all/{name}", f"from-{name}", "--format", "jsonl").status == 0
        assert (here / f"from-{name}/captions.jsonl").read_bytes() == (here / "out/captions.jsonl").read_bytes()
    for name in ("coco.json", "label-studio.json", "labelme"):
        assert shell("convert", f"all/{name}", f"from-{name}", "--format", "coco").status == 0
        first, again = (json.loads((here / f"{folder}/coco.json").read_text()) for folder in ("all", f"from-{name}"))
        for one, other in zip(first["annotations"], again["annotations"], strict=True):
            assert one["caption"] == other["caption"]
            assert one["segmentation"] == other["segmentation"]


def test_the_help_names_every_format():
    from sca.cli.options import OUTPUT_FORMATS_HELP
    from sca.output.formats import OUTPUT_FORMATS

    assert ", ".join(OUTPUT_FORMATS) == OUTPUT_FORMATS_HELP


def test_a_picture_that_is_gone_is_said_when_it_is_to_be_drawn(shell, refused, checkpoint, pictures, here):
    assert shell("caption", "photos", *BOXES, "--model", checkpoint, "--out", "out", "--quiet").status == 0
    (here / "photos/003.png").unlink()
    Image.new("RGB", (9, 9)).save(here / "photos/004.png")
    assert shell("convert", "out/captions.jsonl", "coco").status == 0
    result = shell("convert", "out/captions.jsonl", "drawn", "--format", "png")
    assert result.status == 1
    assert "photos/003.png" in result.err[0]
    assert "photos/004.png: the file records 64 x 48 and the image is 9 x 9" in result.err[1]
    assert len(list((here / "drawn").glob("*.png"))) == 10
    line = refused(2, "convert", "out/captions.jsonl", "again", "--format", "pdf")
    assert line.startswith("no format 'pdf'.")


def test_convert_draws_on_an_image_that_was_resized_since(shell, checkpoint, pictures, here):
    call = ("caption", "photos/004.png", "--box", "8,8,40,40", "--model", checkpoint, "--quiet")
    assert shell(*call, "--format", "jsonl,png", "--out", "out").status == 0
    Image.open("photos/004.png").resize((128, 96), Image.Resampling.NEAREST).save("photos/004.png")
    assert shell("convert", "out/captions.jsonl", "drawn", "--format", "png").status == 0
    drawn, before = (Image.open(here / folder / "004.captions.png") for folder in ("drawn", "out"))
    assert drawn.size == before.size
    result = shell("view", "out/captions.jsonl")
    assert not any("not shown" in line for line in result.err)


def test_a_page_shows_and_compares(shell, checkpoint, pictures, here):
    for words in (3, 5):
        asked = ("caption", "photos", *BOXES, "--model", checkpoint, "--max-new-tokens", words, "--quiet")
        assert shell(*asked, "--out", f"out{words}").status == 0
    (here / "photos/000.png").unlink()
    result = shell("view", "out3/captions.jsonl", "out5/captions.jsonl", "--out", "pages/view.html")
    assert result.status == 0, result.err
    assert result.err[-1] == "sca: wrote pages/view.html, 48 regions"
    assert "1 image not shown" in result.err[-2]
    page = (here / "pages/view.html").read_text()
    images = ViewerPage(page).images
    assert len(images) == 12
    assert all(len(image["regions"]) == len(image["other_regions"]) == 2 for image in images)
    assert "http://" not in page
