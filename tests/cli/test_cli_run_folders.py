"""No command overwrites its inputs, foreign files, or another run without --overwrite."""

import json
import os

import pytest
from PIL import Image

from sca.io.run_folder import MARKER_FILE, RunFolder

pytestmark = pytest.mark.slow

BOX_ARGUMENTS = ("--box", "4,4,40,40")


@pytest.fixture
def caption_photos(run_sca, checkpoint, write_image, working_folder):
    """`caption_photos("--out", "out")` captions the images of the folder `photos`."""
    for index in range(3):
        write_image(f"photos/{index}.png")

    def caption(*arguments):
        return run_sca("caption", "photos", *BOX_ARGUMENTS, "--model", checkpoint, "--quiet", *arguments)

    return caption


@pytest.fixture
def interrupted_run_folder(caption_photos, working_folder, monkeypatch):
    """A folder `out` whose run was interrupted after two images."""
    from sca.output.caption_journal import CaptionJournal

    add_to_journal, added_entries = CaptionJournal.add, []

    def add_and_interrupt(self, *rest):
        add_to_journal(self, *rest)
        added_entries.append(rest)
        if len(added_entries) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patcher:
        patcher.setattr(CaptionJournal, "add", add_and_interrupt)
        assert caption_photos("--out", "out", "--batch-size", 1).status == 130
    return working_folder / "out"


def read_folder(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_convert_rejects_its_input_as_output(caption_photos, get_sca_error, working_folder):
    assert caption_photos("--out", "out", "--format", "jsonl,coco,labelme").status == 0
    original_content = read_folder(working_folder / "out")
    os.link("out/captions.jsonl", "linked.jsonl")
    os.symlink("out", "other")
    for source, target, formats in (
        ("out/captions.jsonl", "out", "jsonl,html"),
        ("out/captions.jsonl", "other", "jsonl"),
        ("linked.jsonl", "out", "jsonl"),
        ("out/coco.json", "out/../out", "coco"),
        ("out/labelme", "out", "labelme"),
    ):
        message = get_sca_error(2, "convert", source, target, "--format", formats)
        assert "would be overwritten and is an input of this command" in message, (source, target)
    assert read_folder(working_folder / "out") == original_content


def test_convert_replaces_only_its_own_earlier_output(caption_photos, run_sca, get_sca_error, working_folder):
    assert caption_photos("--out", "out").status == 0
    (working_folder / "mine").mkdir()
    (working_folder / "mine/coco.json").write_text("precious")
    assert "was not written by `sca convert`" in get_sca_error(2, "convert", "out/captions.jsonl", "mine")
    assert "was not written" in get_sca_error(2, "convert", "out/captions.jsonl", "mine", "--overwrite")
    assert (working_folder / "mine/coco.json").read_text() == "precious"
    for formats in ("coco", "coco", "geojson"):
        assert run_sca("convert", "out/captions.jsonl", "out", "--format", formats).status == 0
    (working_folder / "second.jsonl").write_bytes((working_folder / "out/captions.jsonl").read_bytes())
    assert "contains a different run (captions:" in get_sca_error(2, "convert", "second.jsonl", "out")
    assert run_sca("convert", "second.jsonl", "out", "--overwrite").status == 0
    assert not (working_folder / "out/captions.geojson").exists()
    assert (working_folder / "out/captions.jsonl").exists(), "which `sca caption` wrote"


def test_view_replaces_only_pages_that_sca_wrote(caption_photos, run_sca, get_sca_error, working_folder):
    assert caption_photos("--out", "out").status == 0
    original_captions = (working_folder / "out/captions.jsonl").read_bytes()
    message = get_sca_error(2, "view", "out/captions.jsonl", "--out", "out/captions.jsonl")
    assert "is an input of this command" in message
    (working_folder / "view.html").write_text("<!DOCTYPE html><p>precious")
    message = get_sca_error(2, "view", "out/captions.jsonl")
    assert message == "view.html exists and is not a page written by `sca`; choose another --out"
    (working_folder / "data.html").write_text("precious")
    assert "is not a page" in get_sca_error(2, "data", "view", "scenes", "num_images=2")
    (working_folder / "data.html").unlink()
    for _ in range(2):
        assert run_sca("view", "out/captions.jsonl", "--out", "page.html").status == 0
        assert run_sca("data", "view", "scenes", "num_images=2").status == 0
    assert (working_folder / "out/captions.jsonl").read_bytes() == original_captions


def test_caption_rejects_its_prompts_file_as_output(caption_photos, get_sca_error, working_folder):
    (working_folder / "out").mkdir()
    record = json.dumps({"image": "photos/0.png", "box": [4, 4, 40, 40]})
    (working_folder / "out/captions.jsonl").write_text(record)
    message = get_sca_error(2, "caption", "photos/0.png", "--prompts", "out/captions.jsonl", "--out", "out", "--quiet")
    assert "is an input" in message
    assert (working_folder / "out/captions.jsonl").read_text() == record
    assert "was not written by `sca caption`" in get_sca_error(
        2, "caption", "photos", *BOX_ARGUMENTS, "--out", "out", "--quiet", "--overwrite"
    )


@pytest.mark.parametrize("out", ["photos/out", "photos"])
def test_caption_skips_drawings_that_earlier_runs_wrote(caption_photos, run_sca, checkpoint, working_folder, out):
    for _ in range(3):
        assert caption_photos("--out", out, "--format", "jsonl,png").status == 0
        assert len((working_folder / out / "captions.jsonl").read_text().splitlines()) == 3
    result = run_sca("caption", "photos", *BOX_ARGUMENTS, "--model", checkpoint, "--out", "elsewhere")
    assert result.err[0].startswith(f"sca: skipped 3 images that `sca` wrote, such as {out}/0.captions.png")
    Image.new("RGB", (64, 48)).save(working_folder / "photos/mine.captions.jpg")
    assert caption_photos("--out", "again").status == 0
    assert len((working_folder / "again/captions.jsonl").read_text().splitlines()) == 4
    drawing_result = run_sca(
        "caption", f"{out}/0.captions.png", *BOX_ARGUMENTS, "--model", checkpoint, "--out", "drawn", "--quiet"
    )
    assert drawing_result.status == 0, "what is named is captioned"


def test_caption_keeps_unfinished_run_without_overwrite_or_resume(
    interrupted_run_folder, caption_photos, run_sca, working_folder
):
    original_content = read_folder(interrupted_run_folder)
    assert len(original_content["captions.journal"].splitlines()) == 3
    for arguments in (("--batch-size", 1), ("--max-new-tokens", 2)):
        result = caption_photos("--out", "out", *arguments)
        assert result.status == 2
        assert result.err == [
            "sca: out contains an unfinished run with 2 images captioned; resume it with --resume, choose another "
            "--out, or replace it with --overwrite"
        ]
        assert read_folder(interrupted_run_folder) == original_content
    assert (
        "a different run (max_new_tokens: null there"
        in caption_photos("--out", "out", "--max-new-tokens", 2, "--resume").err[0]
    )
    assert read_folder(interrupted_run_folder) == original_content
    assert caption_photos("--out", "out", "--batch-size", 1, "--resume").status == 0
    assert caption_photos("--out", "whole", "--batch-size", 1).status == 0
    assert read_folder(interrupted_run_folder) == read_folder(working_folder / "whole")


def test_caption_resume_accepts_another_batch_size(interrupted_run_folder, caption_photos):
    assert caption_photos("--out", "out", "--batch-size", 2, "--resume").status == 0
    assert len((interrupted_run_folder / "captions.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("option", ["--mask", "--region"])
def test_caption_rejects_resume_with_edited_mask(run_sca, checkpoint, write_image, working_folder, option):
    write_image("a.png")
    arguments = ("caption", "a.png", "--model", checkpoint, "--out", "out", "--quiet")
    mask_arguments = ("mask=m.png" if option == "--region" else "m.png",)
    Image.new("L", (64, 48), 255).save(working_folder / "m.png")
    assert run_sca(*arguments, option, *mask_arguments).status == 0
    original_content = read_folder(working_folder / "out")
    Image.new("L", (64, 48), 254).save(working_folder / "m.png")
    for resume_flags in ((), ("--resume",)):
        assert (
            'a different run (files: {"m.png": ' in run_sca(*arguments, option, *mask_arguments, *resume_flags).err[0]
        )
    assert read_folder(working_folder / "out") == original_content


def test_caption_overwrite_replaces_unfinished_run(interrupted_run_folder, caption_photos, working_folder):
    assert caption_photos("--out", "out", "--batch-size", 2, "--overwrite").status == 0
    assert caption_photos("--out", "whole", "--batch-size", 2).status == 0
    assert read_folder(interrupted_run_folder) == read_folder(working_folder / "whole")
    assert caption_photos("--overwrite").err == [
        "sca: --overwrite requires --out and cannot be combined with --resume; omit one of them"
    ]


def test_caption_repeats_finished_run_and_rejects_different_run(caption_photos, write_image, working_folder):
    for _ in range(2):
        assert caption_photos("--out", "out").status == 0
    original_content = read_folder(working_folder / "out")
    write_image("more/a.png")
    for other_arguments in (("--max-new-tokens", 3), ("more",)):
        assert "contains a different run" in caption_photos("--out", "out", *other_arguments).err[0]
    assert read_folder(working_folder / "out") == original_content


def test_caption_interrupted_during_repeat_keeps_finished_files(caption_photos, working_folder, monkeypatch):
    formats = "jsonl,coco,html,geojson,label-studio,parquet"
    assert caption_photos("--out", "out", "--format", formats, "--batch-size", 1).status == 0
    original_content = read_folder(working_folder / "out")
    from sca.output.caption_journal import CaptionJournal

    def raise_interrupt(self, *rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patcher:
        patcher.setattr(CaptionJournal, "add", raise_interrupt)
        assert caption_photos("--out", "out", "--format", formats, "--batch-size", 1).status == 130
    final_content = read_folder(working_folder / "out")
    assert {name: final_content[name] for name in original_content if name != MARKER_FILE} == {
        name: file_content for name, file_content in original_content.items() if name != MARKER_FILE
    }


def test_commands_reject_folder_that_another_process_writes(caption_photos, run_sca, get_sca_error, working_folder):
    assert caption_photos("--out", "out").status == 0
    original_content = read_folder(working_folder / "out")
    with RunFolder("out", "caption"):
        assert caption_photos("--out", "out").err[0].startswith("sca: out is being written by another process")
        assert "is being written" in get_sca_error(2, "convert", "out/captions.jsonl", "out")
        assert "is being written" in get_sca_error(2, "evaluate", "sca-tiny", "scenes", "num_images=1", "--out", "out")
        assert "is being written" in get_sca_error(2, "train", "sca-tiny", "train.num_processes=1", "--out", "out")
    assert read_folder(working_folder / "out") == original_content


def test_import_replaces_other_content_only_with_overwrite(run_sca, get_sca_error, checkpoint, working_folder):
    (working_folder / "repo").mkdir()
    (working_folder / "repo/spec.json").write_text('{"openapi": "3.0"}')
    assert "its content is unchanged" in get_sca_error(2, "import", "sca-tiny", "repo")
    (working_folder / "repo/README.md").write_text("my model card")
    (working_folder / "repo/.git").mkdir()
    original_content = read_folder(working_folder / "repo")
    for overwrite_flags in ((), ("--overwrite",)):
        assert "it contains .git, README.md" in get_sca_error(2, "import", "sca-tiny", "repo", *overwrite_flags)
    assert read_folder(working_folder / "repo") == original_content
    for _ in range(2):
        assert run_sca("import", "sca-tiny", "model").status == 0
    original_content = read_folder(working_folder / "model")
    message = get_sca_error(2, "import", checkpoint, "model")
    assert message == "model contains a different checkpoint; choose a different folder, or replace it with --overwrite"
    assert read_folder(working_folder / "model") == original_content
    assert "is an input" in get_sca_error(2, "import", "model/", "./model")
    (working_folder / "model/README.md").write_text("my model card")
    assert "it contains README.md" in get_sca_error(2, "import", "sca-tiny", "model")
    (working_folder / "model/README.md").unlink()
    assert run_sca("import", checkpoint, "model", "--overwrite").status == 0
    assert (
        read_folder(working_folder / "model")["weights.safetensors"]
        == (checkpoint / "weights.safetensors").read_bytes()
    )
    assert sorted(path.name for path in working_folder.iterdir()) == ["model", "repo"]


def test_evaluate_rejects_folder_of_another_run_or_with_other_files(run_sca, get_sca_error, working_folder):
    arguments = ("evaluate", "sca-tiny", "scenes", "num_images=1", "--metrics", "class", "--quiet", "--out")
    (working_folder / "mine").mkdir()
    (working_folder / "mine/scores.json").write_text("precious")
    assert "was not written by `sca evaluate`" in get_sca_error(2, *arguments, "mine")
    assert (working_folder / "mine/scores.json").read_text() == "precious"
    for _ in range(2):
        assert run_sca(*arguments, "out").status == 0
    original_content = read_folder(working_folder / "out")
    message = get_sca_error(2, *arguments, "out", "--prompt-type", "center")
    assert 'a different run (prompt_type: "box" there, "center" now)' in message
    assert "--overwrite" in message
    assert read_folder(working_folder / "out") == original_content
    assert run_sca(*arguments, "out", "--prompt-type", "center", "--overwrite").status == 0
    assert b'"prompt_type": "center"' in (working_folder / "out/predictions.jsonl").read_bytes()
    (working_folder / "mine/predictions.jsonl").write_text('{"image_id": 1}\n')
    (working_folder / "mine/scores.json").unlink()
    message = get_sca_error(2, *arguments, "mine", "--overwrite")
    assert message == "mine/predictions.jsonl was not written by `sca evaluate`; choose a different output folder"
    assert (working_folder / "mine/predictions.jsonl").read_text() == '{"image_id": 1}\n'


def test_report_and_compare_do_not_overwrite_their_input(run_sca, get_sca_error, working_folder):
    arguments = ("evaluate", "sca-tiny", "scenes", "num_images=1", "--metrics", "class", "--quiet", "--out", "out")
    assert run_sca(*arguments).status == 0
    original_content = read_folder(working_folder / "out")
    assert "is an input" in get_sca_error(2, "report", "out/predictions.jsonl", "--out", "out/predictions.jsonl")
    assert "is not a page" in get_sca_error(2, "report", "out", "--out", "out/predictions.jsonl")
    assert "is not a page" in get_sca_error(2, "compare", "out", "out", "--out", "out/scores.json")
    assert read_folder(working_folder / "out") == original_content


def test_bench_report_does_not_overwrite_results_or_other_files(run_sca, get_sca_error, working_folder):
    (working_folder / "bench").mkdir()
    row = {"key": "a", "label": "a", "sweep": "s", "state": "failed", "reason": "r", "seconds": {}, "config": {}}
    (working_folder / "bench/results.jsonl").write_text(json.dumps(row) + "\n")
    original_content = read_folder(working_folder / "bench")
    assert "is an input" in get_sca_error(2, "bench", "report", "bench", "--out", "bench/results.jsonl")
    (working_folder / "README.md").write_text("precious")
    assert "README.md exists" in get_sca_error(2, "bench", "report", "bench", "--out", "README.html")
    assert read_folder(working_folder / "bench") == original_content
