"""What `sca caption` answers, and that every format can be read back."""

import contextlib
import io
import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

KEYS = ["image", "width", "height", "region_id", "prompt", "box", "mask", "caption", "score", "predicted_iou", "model"]


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def captioned(shell, checkpoint):
    """`captioned("a.png", ...)` gives the records of a run that must go well and say nothing else."""

    def call(*arguments):
        result = shell("caption", "--model", checkpoint, "--max-new-tokens", 3, "--out", "-", *arguments)
        assert result.status == 0, result.err
        assert all(re.fullmatch(r"sca: \S+: \d+ regions?, \d+ images?", line) for line in result.err)  # of --prompts
        return lines(result.out)

    return call


def coco(path):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


# --- what is asked


def test_each_flag_is_one_region_in_order(captioned, picture):
    records = captioned(picture("a.png"), "--point", "5,6", "--box", "1,2,30,40", "--box", "0,0,9,9")
    assert [list(record) for record in records] == [KEYS] * 3
    assert [record["region_id"] for record in records] == [0, 1, 2]
    asked = [{"box": [1, 2, 30, 40]}, {"box": [0, 0, 9, 9]}, {"points": [[5, 6, 1]]}]
    assert [record["prompt"] for record in records] == asked
    for record in records:
        assert (record["image"], record["width"], record["height"]) == ("a.png", 64, 48)
        assert record["mask"]["size"] == [48, 64]
        assert 0 <= record["score"] <= 1
        assert 0 <= record["predicted_iou"] <= 1


@pytest.mark.slow
def test_several_captions_a_region_are_written_when_they_are_asked_for(captioned, picture):
    (record,) = captioned(picture("a.png"), "--box", "0,0,9,9", "--num-captions", 2)
    assert len(record["alternatives"]) == 1
    assert set(record["alternatives"][0]) == {"caption", "score"}
    (drawn,) = captioned("a.png", "--box", "0,0,9,9", "--do-sample", "--temperature", 2, "--num-captions", 3)
    assert len(drawn["alternatives"]) == 2
    (plain,) = captioned("a.png", "--box", "0,0,9,9")
    assert "alternatives" not in plain


def test_a_mask_is_a_region_of_its_own(captioned, picture, here):
    mask = np.zeros((48, 64), bool)
    mask[10:30, 20:40] = True
    np.save(here / "mask.npy", mask)
    records = captioned(picture("a.png"), "--box", "0,0,9,9", "--mask", "mask.npy")
    assert [sorted(record["prompt"]) for record in records] == [["box"], ["mask"]]


@pytest.mark.slow
def test_everything_takes_proposals_by_name(captioned, picture, here):
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}],
        "annotations": [{"id": 1, "image_id": 1, "bbox": [3, 4, 20, 10]}],
    }
    (here / "my boxes.json").write_text(json.dumps(content))
    proposer = "boxes-from-coco annotations='my boxes.json'"
    (record,) = captioned(picture("a.png"), "--everything", "--proposer", proposer)
    assert record["prompt"] == {"box": [3, 4, 23, 14]}
    with pytest.raises(AssertionError):  # the file has boxes for another picture of that name
        captioned("a.png", picture("other/a.png"), "--everything", "--proposer", proposer)
    found = captioned(
        *("a.png", "--everything", "--proposer", "grid points_per_side=2"),
        *("--pred-iou-thresh", 0, "--stability-score-thresh", 0),
    )
    assert all(len(record["prompt"]["points"]) == 1 for record in found)


@pytest.mark.slow
def test_a_region_joins_box_points_and_mask_file(captioned, picture, here):
    mask = np.zeros((48, 64), np.uint8)
    mask[5:20, 5:30] = 255
    Image.fromarray(mask).save(here / "mask.png")
    np.save(here / "mask.npy", mask > 0)
    both = "box=1,1,40,40;point=3,3,1;point=4,4,0;mask=mask.png"
    records = captioned(picture("a.png"), "--region", both, "--region", "mask=mask.npy", "--region", "point=9,9")
    assert records[0]["prompt"]["box"] == [1, 1, 40, 40]
    assert records[0]["prompt"]["points"] == [[3, 3, 1], [4, 4, 0]]
    assert records[0]["prompt"]["mask"] == records[1]["prompt"]["mask"]
    assert records[2]["prompt"] == {"points": [[9, 9, 1]]}


def test_caption_clips_boxes_over_the_edge_and_counts_them(shell, checkpoint, picture, here):
    picture("a.png"), picture("b.png")
    call = ("caption", "--model", checkpoint, "--max-new-tokens", 3, "--out", "-")
    result = shell(*call, "a.png", "b.png", "--box", "-1,-1,65,49", "--box", "0,0,9,9")
    assert [record["box"] for record in lines(result.out)][::2] == [[0, 0, 64, 48]] * 2
    assert result.err == ["sca: changed or skipped: box clipped: 2 (first: a.png)"]
    asked = [{"image": "a.png", "box": box} for box in ([1, 2, 9, 9], [60, 40, 66, 50])]
    (here / "asked.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in asked))
    result = shell(*call, "a.png", "--prompts", "asked.jsonl")
    assert result.err[1:] == ["sca: changed or skipped: box clipped: 1 (first: asked.jsonl, line 2)"]


def test_prompts_of_many_images_come_from_json_lines_and_from_coco(captioned, picture, here):
    picture("in/a.png"), picture("in/b.png")
    asked = [
        {"image": "in/b.png", "points": [[4, 5, 1]]},
        {"image": "in/a.png", "box": [1, 2, 9, 9]},
        {"image": "in/a.png", "box": [3, 3, 9, 9]},
    ]
    (here / "asked.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in asked))
    records = captioned("in", "--prompts", "asked.jsonl")
    assert [(record["image"], record["region_id"]) for record in records] == [
        ("in/a.png", 0),
        ("in/a.png", 1),
        ("in/b.png", 0),
    ]
    table = {
        "images": [{"id": 7, "file_name": "b.png"}, {"id": 8, "file_name": "a.png"}],
        "annotations": [{"id": 1, "image_id": 7, "bbox": [1, 2, 8, 7]}],
    }
    (here / "asked.json").write_text(json.dumps(table))
    (record,) = captioned("in", "--prompts", "asked.json")
    assert (record["image"], record["box"]) == ("in/b.png", [1, 2, 9, 9])


def test_what_was_written_can_be_asked_again(captioned, picture, shell, checkpoint, here):
    first = captioned(picture("a.png"), "--box", "1,2,30,40", "--point", "5,6")
    (here / "again.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in first))
    assert captioned("a.png", "--prompts", "again.jsonl") == first


def test_everything_finds_its_regions_and_can_find_none(captioned, shell, picture, checkpoint):
    picture("a.png")
    records = captioned(
        "a.png", "--everything", "--points-per-side", 3, "--pred-iou-thresh", 0, "--stability-score-thresh", 0
    )
    assert records
    assert all(record["mask"] and record["box"] for record in records)
    result = shell(
        "caption", "a.png", "--everything", "--points-per-side", 3, "--pred-iou-thresh", 1, "--model", checkpoint
    )
    assert result.status == 0
    assert result.err == [
        "sca: no region found in a.png; lower --pred-iou-thresh or --stability-score-thresh, or raise --points-per-side"
    ]


def test_files_folders_and_patterns_are_found_and_a_picture_comes_once(captioned, picture):
    for name in ("a.png", "in/b.png", "in/deep/c.jpg", "d.png"):
        picture(name)
    records = captioned("d.png", "in", "*.png", "./d.png", "in/b.png", "--box", "0,0,9,9")
    assert [record["image"] for record in records] == ["d.png", "in/b.png", "in/deep/c.jpg", "a.png"]


@pytest.mark.parametrize("name", ["two words.png", "new\nline.png", "日本 é.png", "[x]*.png", "'q\".png", "-dash.png"])
@pytest.mark.slow
def test_unusual_names_are_names(shell, checkpoint, picture, here, name):
    picture(name)
    arguments = ["--model", checkpoint, "--box", "0,0,9,9", "--max-new-tokens", 2, "--out", "out", "--format"]
    result = shell("caption", *arguments, "jsonl,coco,png,html", "--", name)
    assert result.status == 0, result.err
    (record,) = lines((here / "out/captions.jsonl").read_text())
    assert record["image"] == name
    assert coco("out/coco.json").loadImgs([1])[0]["file_name"] == name
    assert len(list((here / "out").glob("*.captions.png"))) == 1


def test_a_name_that_is_not_unicode_is_a_name(shell, checkpoint, picture, here):
    picture("a.png")
    os.rename("a.png", b"\xff.png")
    arguments = ["--model", checkpoint, "--box", "0,0,9,9", "--out", "out", "--format", "jsonl,coco,png,html"]
    result = shell("caption", ".", *arguments)
    assert result.status == 0, result.err


def test_pictures_of_every_shape_and_mode_are_captioned(captioned, here):
    Image.new("RGB", (2, 1)).save(here / "1.png")
    Image.new("RGB", (20000, 10)).save(here / "2.png")
    Image.new("P", (9, 9)).save(here / "3.png")
    Image.new("I;16", (9, 9)).save(here / "4.png")
    Image.new("CMYK", (9, 9)).save(here / "5.jpg")
    Image.new("RGBA", (9, 9)).save(here / "6.png")
    turned = Image.Exif()
    turned[0x112] = 6
    Image.new("RGB", (9, 5)).save(here / "7.jpg", exif=turned)
    records = captioned(".", "--box", "0,0,2,1")
    sizes = [(record["width"], record["height"]) for record in records]
    assert sizes == [(2, 1), (20000, 10), (9, 9), (9, 9), (9, 9), (9, 9), (5, 9)]


def test_the_number_of_images_in_a_batch_changes_nothing(captioned, picture):
    for name in ("a.png", "b.png", "c.png"):
        picture(name, width=30 + ord(name[0]))
    one, all_of_them = (captioned(".", "--box", "0,0,9,9", "--point", "4,4", "--batch-size", n) for n in (1, 8))
    assert [record["caption"] for record in one] == [record["caption"] for record in all_of_them]
    assert [record["mask"] for record in one] == [record["mask"] for record in all_of_them]


def test_numbers_may_be_smaller(captioned, picture):
    for dtype in ("bfloat16", "float16"):
        assert len(captioned(picture("a.png"), "--box", "0,0,9,9", "--dtype", dtype)) == 1


def test_more_words_than_the_model_has_room_for_are_not_said(captioned, picture):
    assert len(captioned(picture("a.png"), "--box", "0,0,9,9", "--max-new-tokens", 4000)) == 1


def test_without_masks_there_is_no_mask_and_no_iou(shell, maskless, picture):
    result = shell("caption", picture("a.png"), "--box", "0,0,9,9", "--model", maskless, "--out", "-")
    (record,) = lines(result.out)
    assert (record["mask"], record["predicted_iou"]) == (None, None)
    assert record["box"] == [0, 0, 9, 9]


# --- what is said and written


def test_all_formats_read_back(shell, checkpoint, picture, here):
    picture("a.png"), picture("in/a.png", 40, 80)
    result = shell(
        "caption", "a.png", "in", "--box", "1,2,30,40", "--point", "5,6", "--max-new-tokens", 3, "--model", checkpoint,
        "--out", "out", "--format", "jsonl,coco,png,html",
    )  # fmt: skip
    assert result.status == 0
    assert result.err == [
        "sca: wrote out/captions.jsonl",
        "sca: wrote out/coco.json",
        "sca: wrote out",
        "sca: wrote out/captions.html",
    ]
    assert result.out.splitlines()[0].split() == ["image", "region", "caption", "score", "iou", "box"]
    assert sorted(path.name for path in (here / "out").iterdir()) == [
        "a-2.captions.png",
        "a.captions.png",
        "captions.html",
        "captions.jsonl",
        "coco.json",
        "sca-run.json",
    ]
    records = lines((here / "out/captions.jsonl").read_text())
    read = coco("out/coco.json")
    assert [(read.loadImgs([a["image_id"]])[0]["file_name"], a["region_id"]) for a in read.dataset["annotations"]] == [
        (record["image"], record["region_id"]) for record in records
    ]
    for record, annotation in zip(records, read.dataset["annotations"], strict=True):
        assert read.annToMask(annotation).shape == (record["height"], record["width"])
        assert annotation["caption"] == record["caption"]
    for name in ("a-2.captions.png", "a.captions.png"):
        with Image.open(here / "out" / name) as drawn:
            drawn.load()
    page = (here / "out/captions.html").read_text()
    assert page.count("<section") == 2
    assert "://" not in page  # nothing to load


def test_quiet_leaves_the_result_alone(shell, checkpoint, picture, here):
    arguments = ["caption", picture("a.png"), "--box", "0,0,9,9", "--model", checkpoint, "--quiet"]
    written = shell(*arguments, "--out", "out")
    assert (written.out, written.err) == ("", [])
    assert (here / "out/captions.jsonl").exists()
    printed = shell(*arguments)  # the table is all there is
    assert "a.png" in printed.out
    assert printed.err == []


@pytest.mark.parametrize(("name", "domain"), [("sca-tiny", "drawn scenes"), ("sca-street", "street photographs")])
@pytest.mark.slow
def test_caption_remarks_once_on_a_model_of_a_narrow_domain(shell, picture, monkeypatch, checkpoint, name, domain):
    from sca.inference.caption_job import CaptionJob

    load = CaptionJob.load_captioner
    monkeypatch.setattr(CaptionJob, "load_captioner", lambda job: load(replace(job, model=str(checkpoint))))
    arguments = ["caption", picture("a.png"), picture("b.png"), "--box", "0,0,9,9", "--model", name]
    (remark,) = shell(*arguments).err
    assert remark.startswith(f"sca: {name} is trained on {domain} only; for photographs: ")
    assert "sca-gpt2-large-vg (5.7 GB)" in remark
    assert "`sca pull sca-gpt2-large-pretrain-vg`" in remark
    assert "--model sca-gpt2-large-pretrain-vg`" in remark
    assert shell(*arguments, "--quiet").err == []


def test_ambiguous_prompts_leave_an_earlier_run_unchanged(shell, checkpoint, picture, here):
    for name in ("a/x.png", "b/x.png"):
        picture(name)
    assert shell("caption", "a", "--box", "1,1,9,9", "--model", checkpoint, "--out", "out", "--quiet").status == 0
    before = (here / "out/captions.jsonl").read_bytes()
    (here / "p.jsonl").write_text(json.dumps({"image": "x.png", "box": [1, 1, 9, 9]}) + "\n")
    asked = ("caption", "a/x.png", "b/x.png", "--prompts", "p.jsonl", "--model", checkpoint, "--overwrite")
    result = shell(*asked, "--out", "out")
    assert result.status == 2
    assert "could mean 2 images" in result.err[-1]
    assert (here / "out/captions.jsonl").read_bytes() == before


def test_a_second_run_replaces_the_files_of_the_first_when_told(shell, checkpoint, picture, here):
    for box, status, *more in (("0,0,9,9", 0), ("1,1,5,5", 2), ("1,1,5,5", 0, "--overwrite")):
        arguments = ["--model", checkpoint, "--out", "out", "--format", "jsonl,coco", *more]
        assert shell("caption", picture("a.png"), "--box", box, *arguments).status == status
    (record,) = lines((here / "out/captions.jsonl").read_text())
    assert record["box"] == [1, 1, 5, 5]
    assert len(coco("out/coco.json").getAnnIds()) == 1


def test_caption_reports_a_bad_region_and_keeps_the_others(shell, checkpoint, picture, here):
    picture("a.png")
    boxes = [[1, 1, 20, 20], [5, 5, 0, 9], [2, 2, 9, 9], [90, 90, 5, 5], [1, 2, 3]]
    (here / "c.json").write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "a.png"}],
                "annotations": [{"image_id": 1, "bbox": box} for box in boxes],
            }
        )
    )
    (here / "l.jsonl").write_text(
        '{"image": "a.png", "box": [1, 1, 20, 20]}\n{"image": "a.png", "box": [9, 9, 2, 2]}\nno JSON\n'
    )
    for file, done, places, total in (
        ("c.json", 2, ["annotations[1], 'bbox'", "annotations[4], 'bbox'", "annotations[3]"], "3 regions, 1 image; 2"),
        ("l.jsonl", 1, ["line 3", "line 2"], "2 regions, 1 image; 1"),
    ):
        result = shell(
            "caption", "a.png", "--prompts", file, "--max-new-tokens", 2, "--model", checkpoint, "--out", "-"
        )
        assert result.status == 2
        assert len(lines(result.out)) == done
        assert result.err[0].startswith(f"sca: {file}: {total} record")
        assert len(result.err) == 1 + len(places)
        for place, line in zip(places, result.err[1:], strict=True):
            assert f"{file}, {place}" in line
    assert "would be" not in " ".join(shell("caption", "a.png", "--prompts", "c.json", "--model", checkpoint).err)


@pytest.mark.slow
def test_caption_in_shards_keeps_the_regions_beside_a_bad_one(shell, checkpoint, picture, here):
    picture("a.png"), picture("b.png")
    regions = [{"image": "a.png", "box": [1, 1, 9, 9]}, {"image": "a.png", "box": [90, 90, 99, 99]}]
    regions.append({"image": "b.png", "box": [1, 1, 9, 9]})
    (here / "r.jsonl").write_text("\n".join(map(json.dumps, [*regions, {"image": "b.png"}])))
    asked = ("a.png", "b.png", "--prompts", "r.jsonl", "--max-new-tokens", 2, "--model", checkpoint, "--out", "out")
    result = shell("caption", *asked, "--launcher", "local num_workers=1")
    assert len(lines((here / "out/shard-00000.jsonl").read_text())) == 2
    assert sum("line 4" in line for line in result.err) == 1
    assert sum("line 2" in line for line in result.err) == 1
    assert result.status == 2


@pytest.mark.slow
def test_max_regions_keeps_the_best_regions(captioned, shell, picture, checkpoint):
    from sca.inference.automatic import caption_everything
    from sca.inference.factory import load_captioner
    from sca.inference.predictor import Predictor

    thresholds = ("--pred-iou-thresh", 0, "--stability-score-thresh", 0, "--box-nms-thresh", 1)
    search = ("--everything", *thresholds, "--points-per-side", 3)
    every = captioned(picture("a.png"), *search)
    assert len(every) > 2
    best = [{**each, "score": pytest.approx(each["score"], rel=1e-4)} for each in every[:2]]  # of another batch size
    assert captioned("a.png", *search, "--max-regions", 2) == best
    assert captioned("a.png", *search, "--max-regions", 1000) == every
    grid = "grid points_per_side=2"
    assert len(captioned("a.png", *search[:-2], "--proposer", grid, "--max-regions", 1)) == 1
    result = shell("caption", "a.png", "--box", "1,1,9,9", "--max-regions", 2, "--model", checkpoint)
    assert (result.status, result.err) == (2, ["sca: --max-regions can only be used with --everything"])
    predictor = Predictor(load_captioner(checkpoint))
    predictor.set_image(Image.open("a.png").convert("RGB"))
    with pytest.raises(ValueError, match="max_regions is 0; give an integer of at least 1"):
        caption_everything(predictor, max_regions=0)


@pytest.mark.parametrize("quiet", [False, True])
def test_search_for_everything_shows_its_progress_on_a_terminal(shell, picture, checkpoint, monkeypatch, quiet):
    from rich.console import Console

    from sca.cli.caption import ProgressBars

    seen = []
    original = ProgressBars.show_search
    monkeypatch.setattr(ProgressBars, "show_search", lambda self, *step: (original(self, *step), seen.append(step)))
    monkeypatch.setattr(Console, "is_terminal", True)
    arguments = ("caption", picture("a.png"), "--everything", "--points-per-side", 3, "--model", checkpoint)
    result = shell(*arguments, *(["--quiet"] if quiet else []))
    assert result.status == 0
    assert seen[-1] == (9, 9)
    assert any("points" in line for line in result.err) != quiet
    assert "9/9" not in result.out
