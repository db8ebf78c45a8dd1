"""No command overwrites an input, what somebody else wrote, or another run that it was not told to replace."""

import json
import os

import pytest
from PIL import Image

from sca.io.run_folder import MARKER_FILE, RunFolder

pytestmark = pytest.mark.slow

BOX = ("--box", "4,4,40,40")


@pytest.fixture
def captioned(shell, checkpoint, picture, here):
    """`captioned("--out", "out")` captions the pictures of the folder photos."""
    for number in range(3):
        picture(f"photos/{number}.png")

    def caption(*arguments):
        return shell("caption", "photos", *BOX, "--model", checkpoint, "--quiet", *arguments)

    return caption


@pytest.fixture
def interrupted(captioned, here, monkeypatch):
    """A folder out whose run was ended after two images."""
    from sca.output.caption_journal import CaptionJournal

    add, count = CaptionJournal.add, []

    def end(self, *rest):
        add(self, *rest)
        count.append(rest)
        if len(count) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CaptionJournal, "add", end)
        assert captioned("--out", "out", "--batch-size", 1).status == 130
    return here / "out"


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_convert_refuses_its_input_as_output(captioned, refused, here):
    assert captioned("--out", "out", "--format", "jsonl,coco,labelme").status == 0
    before = content(here / "out")
    os.link("out/captions.jsonl", "linked.jsonl")
    os.symlink("out", "other")
    for source, target, formats in (
        ("out/captions.jsonl", "out", "jsonl,html"),
        ("out/captions.jsonl", "other", "jsonl"),
        ("linked.jsonl", "out", "jsonl"),
        ("out/coco.json", "out/../out", "coco"),
        ("out/labelme", "out", "labelme"),
    ):
        line = refused(2, "convert", source, target, "--format", formats)
        assert "would be overwritten and is an input of this command" in line, (source, target)
    assert content(here / "out") == before


def test_convert_replaces_only_what_it_converted(captioned, shell, refused, here):
    assert captioned("--out", "out").status == 0
    (here / "mine").mkdir()
    (here / "mine/coco.json").write_text("precious")
    assert "was not written by `sca convert`" in refused(2, "convert", "out/captions.jsonl", "mine")
    assert "was not written" in refused(2, "convert", "out/captions.jsonl", "mine", "--overwrite")
    assert (here / "mine/coco.json").read_text() == "precious"
    for formats in ("coco", "coco", "geojson"):
        assert shell("convert", "out/captions.jsonl", "out", "--format", formats).status == 0
    (here / "second.jsonl").write_bytes((here / "out/captions.jsonl").read_bytes())
    assert "contains another run (captions:" in refused(2, "convert", "second.jsonl", "out")
    assert shell("convert", "second.jsonl", "out", "--overwrite").status == 0
    assert not (here / "out/captions.geojson").exists()
    assert (here / "out/captions.jsonl").exists(), "which `sca caption` wrote"


def test_pages_replace_pages_only(captioned, shell, refused, here):
    assert captioned("--out", "out").status == 0
    before = (here / "out/captions.jsonl").read_bytes()
    line = refused(2, "view", "out/captions.jsonl", "--out", "out/captions.jsonl")
    assert "is an input of this command" in line
    (here / "view.html").write_text("<!DOCTYPE html><p>precious")
    line = refused(2, "view", "out/captions.jsonl")
    assert line == "view.html exists and is not a page written by `sca`; choose another --out"
    (here / "data.html").write_text("precious")
    assert "is not a page" in refused(2, "data", "view", "scenes", "num_images=2")
    (here / "data.html").unlink()
    for _ in range(2):
        assert shell("view", "out/captions.jsonl", "--out", "page.html").status == 0
        assert shell("data", "view", "scenes", "num_images=2").status == 0
    assert (here / "out/captions.jsonl").read_bytes() == before


def test_caption_refuses_its_prompts_as_output(captioned, refused, here):
    (here / "out").mkdir()
    line = json.dumps({"image": "photos/0.png", "box": [4, 4, 40, 40]})
    (here / "out/captions.jsonl").write_text(line)
    said = refused(2, "caption", "photos/0.png", "--prompts", "out/captions.jsonl", "--out", "out", "--quiet")
    assert "is an input" in said
    assert (here / "out/captions.jsonl").read_text() == line
    assert "was not written by `sca caption`" in refused(
        2, "caption", "photos", *BOX, "--out", "out", "--quiet", "--overwrite"
    )


@pytest.mark.parametrize("out", ["photos/out", "photos"])
def test_caption_repeated_skips_its_own_drawings(captioned, shell, checkpoint, here, out):
    for _ in range(3):
        assert captioned("--out", out, "--format", "jsonl,png").status == 0
        assert len((here / out / "captions.jsonl").read_text().splitlines()) == 3
    result = shell("caption", "photos", *BOX, "--model", checkpoint, "--out", "elsewhere")
    assert result.err[0].startswith(f"sca: skipped 3 images that `sca` wrote, such as {out}/0.captions.png")
    Image.new("RGB", (64, 48)).save(here / "photos/mine.captions.jpg")
    assert captioned("--out", "again").status == 0
    assert len((here / "again/captions.jsonl").read_text().splitlines()) == 4
    drawn = shell("caption", f"{out}/0.captions.png", *BOX, "--model", checkpoint, "--out", "drawn", "--quiet")
    assert drawn.status == 0, "what is named is captioned"


def test_caption_does_not_discard_an_unfinished_run(interrupted, captioned, shell, here):
    before = content(interrupted)
    assert len(before["captions.journal"].splitlines()) == 3
    for arguments in (("--batch-size", 1), ("--max-new-tokens", 2)):
        result = captioned("--out", "out", *arguments)
        assert result.status == 2
        assert result.err == [
            "sca: out contains an unfinished run with 2 images captioned; resume it with --resume, choose another "
            "--out, or replace it with --overwrite"
        ]
        assert content(interrupted) == before
    assert (
        "another run (max_new_tokens: null there" in captioned("--out", "out", "--max-new-tokens", 2, "--resume").err[0]
    )
    assert content(interrupted) == before
    assert captioned("--out", "out", "--batch-size", 1, "--resume").status == 0
    assert captioned("--out", "whole", "--batch-size", 1).status == 0
    assert content(interrupted) == content(here / "whole")


def test_caption_resumes_with_another_batch_size(interrupted, captioned):
    assert captioned("--out", "out", "--batch-size", 2, "--resume").status == 0
    assert len((interrupted / "captions.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("option", ["--mask", "--region"])
def test_caption_refuses_to_resume_with_an_edited_mask(shell, checkpoint, picture, here, option):
    picture("a.png")
    asked = ("caption", "a.png", "--model", checkpoint, "--out", "out", "--quiet")
    mask = ("mask=m.png" if option == "--region" else "m.png",)
    Image.new("L", (64, 48), 255).save(here / "m.png")
    assert shell(*asked, option, *mask).status == 0
    before = content(here / "out")
    Image.new("L", (64, 48), 254).save(here / "m.png")
    for more in ((), ("--resume",)):
        assert 'another run (files: {"m.png": ' in shell(*asked, option, *mask, *more).err[0]
    assert content(here / "out") == before


def test_caption_overwrites_an_unfinished_run_when_told(interrupted, captioned, here):
    assert captioned("--out", "out", "--batch-size", 2, "--overwrite").status == 0
    assert captioned("--out", "whole", "--batch-size", 2).status == 0
    assert content(interrupted) == content(here / "whole")
    assert captioned("--overwrite").err == [
        "sca: --overwrite replaces the run of a folder; name it with --out, and omit --resume"
    ]


def test_caption_repeats_a_finished_run_and_refuses_another(captioned, picture, here):
    for _ in range(2):
        assert captioned("--out", "out").status == 0
    before = content(here / "out")
    picture("more/a.png")
    for other in (("--max-new-tokens", 3), ("more",)):
        assert "contains another run" in captioned("--out", "out", *other).err[0]
    assert content(here / "out") == before


def test_caption_interrupted_while_it_repeats_leaves_the_finished_files(captioned, here, monkeypatch):
    formats = "jsonl,coco,html,geojson,label-studio,parquet"
    assert captioned("--out", "out", "--format", formats, "--batch-size", 1).status == 0
    before = content(here / "out")
    from sca.output.caption_journal import CaptionJournal

    def end(self, *rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CaptionJournal, "add", end)
        assert captioned("--out", "out", "--format", formats, "--batch-size", 1).status == 130
    after = content(here / "out")
    assert {name: after[name] for name in before if name != MARKER_FILE} == {
        name: text for name, text in before.items() if name != MARKER_FILE
    }


def test_commands_refuse_a_folder_that_is_being_written(captioned, shell, refused, here):
    assert captioned("--out", "out").status == 0
    before = content(here / "out")
    with RunFolder("out", "caption"):
        assert captioned("--out", "out").err[0].startswith("sca: out is being written by another process")
        assert "is being written" in refused(2, "convert", "out/captions.jsonl", "out")
        assert "is being written" in refused(2, "evaluate", "sca-tiny", "scenes", "num_images=1", "--out", "out")
        assert "is being written" in refused(2, "train", "sca-tiny", "train.num_processes=1", "--out", "out")
    assert content(here / "out") == before


def test_import_replaces_only_the_same_checkpoint(shell, refused, checkpoint, here):
    (here / "repo").mkdir()
    (here / "repo/spec.json").write_text('{"openapi": "3.0"}')
    assert "its content is unchanged" in refused(2, "import", "sca-tiny", "repo")
    (here / "repo/README.md").write_text("my model card")
    (here / "repo/.git").mkdir()
    before = content(here / "repo")
    for more in ((), ("--overwrite",)):
        assert "it contains .git, README.md" in refused(2, "import", "sca-tiny", "repo", *more)
    assert content(here / "repo") == before
    for _ in range(2):
        assert shell("import", "sca-tiny", "model").status == 0
    before = content(here / "model")
    line = refused(2, "import", checkpoint, "model")
    assert line == "model contains another checkpoint; choose another folder, or replace it with --overwrite"
    assert content(here / "model") == before
    assert "is an input" in refused(2, "import", "model/", "./model")
    (here / "model/README.md").write_text("my model card")
    assert "it contains README.md" in refused(2, "import", "sca-tiny", "model")
    (here / "model/README.md").unlink()
    assert shell("import", checkpoint, "model", "--overwrite").status == 0
    assert content(here / "model")["weights.safetensors"] == (checkpoint / "weights.safetensors").read_bytes()
    assert sorted(path.name for path in here.iterdir()) == ["model", "repo"]


def test_evaluate_refuses_another_run_and_foreign_scores(shell, refused, here):
    asked = ("evaluate", "sca-tiny", "scenes", "num_images=1", "--metrics", "class", "--quiet", "--out")
    (here / "mine").mkdir()
    (here / "mine/scores.json").write_text("precious")
    assert "was not written by `sca evaluate`" in refused(2, *asked, "mine")
    assert (here / "mine/scores.json").read_text() == "precious"
    for _ in range(2):
        assert shell(*asked, "out").status == 0
    before = content(here / "out")
    line = refused(2, *asked, "out", "--prompt", "center")
    assert 'another run (prompt: "box" there, "center" now)' in line
    assert "--overwrite" in line
    assert content(here / "out") == before
    assert shell(*asked, "out", "--prompt", "center", "--overwrite").status == 0
    assert b'"prompt": "center"' in (here / "out/predictions.jsonl").read_bytes()
    (here / "mine/predictions.jsonl").write_text('{"image_id": 1}\n')
    (here / "mine/scores.json").unlink()
    assert "without their run" in refused(2, *asked, "mine", "--overwrite")
    assert (here / "mine/predictions.jsonl").read_text() == '{"image_id": 1}\n'


def test_report_does_not_overwrite_what_it_reads(shell, refused, here):
    asked = ("evaluate", "sca-tiny", "scenes", "num_images=1", "--metrics", "class", "--quiet", "--out", "out")
    assert shell(*asked).status == 0
    before = content(here / "out")
    assert "is an input" in refused(2, "report", "out/predictions.jsonl", "--out", "out/predictions.jsonl")
    assert "is not a page" in refused(2, "report", "out", "--out", "out/predictions.jsonl")
    assert "is not a page" in refused(2, "compare", "out", "out", "--out", "out/scores.json")
    assert content(here / "out") == before


def test_bench_report_does_not_overwrite_results_or_foreign_files(shell, refused, here):
    (here / "bench").mkdir()
    row = {"key": "a", "label": "a", "sweep": "s", "state": "failed", "reason": "r", "seconds": {}, "config": {}}
    (here / "bench/results.jsonl").write_text(json.dumps(row) + "\n")
    before = content(here / "bench")
    assert "is an input" in refused(2, "bench", "report", "bench", "--out", "bench/results.jsonl")
    (here / "README.md").write_text("precious")
    assert "README.md exists" in refused(2, "bench", "report", "bench", "--out", "README.html")
    assert content(here / "bench") == before
