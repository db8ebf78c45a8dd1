"""`sca caption`: prompts, captions, output formats and messages."""

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

RECORD_KEYS = [
    "image",
    "width",
    "height",
    "region_id",
    "prompt",
    "box",
    "mask",
    "caption",
    "score",
    "predicted_iou",
    "model",
]


def parse_json_lines(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def caption_to_records(run_sca, checkpoint):
    """`caption_to_records("a.png", ...)` returns the records of a run that must succeed without messages."""

    def caption(*arguments):
        result = run_sca("caption", "--model", checkpoint, "--max-new-tokens", 3, "--out", "-", *arguments)
        assert result.status == 0, result.err
        assert all(re.fullmatch(r"sca: \S+: \d+ regions?, \d+ images?", line) for line in result.err)  # of --prompts
        return parse_json_lines(result.out)

    return caption


def load_coco(path):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


# --- prompts


def test_caption_writes_one_region_per_prompt_flag_boxes_first(caption_to_records, write_image):
    records = caption_to_records(write_image("a.png"), "--point", "5,6", "--box", "1,2,30,40", "--box", "0,0,9,9")
    assert [list(record) for record in records] == [RECORD_KEYS] * 3
    assert [record["region_id"] for record in records] == [0, 1, 2]
    expected_prompts = [{"box": [1, 2, 30, 40]}, {"box": [0, 0, 9, 9]}, {"points": [[5, 6, 1]]}]
    assert [record["prompt"] for record in records] == expected_prompts
    for record in records:
        assert (record["image"], record["width"], record["height"]) == ("a.png", 64, 48)
        assert record["mask"]["size"] == [48, 64]
        assert 0 <= record["score"] <= 1
        assert 0 <= record["predicted_iou"] <= 1


@pytest.mark.slow
def test_caption_writes_alternatives_only_with_num_captions(caption_to_records, write_image):
    (record,) = caption_to_records(write_image("a.png"), "--box", "0,0,9,9", "--num-captions", 2)
    assert len(record["alternatives"]) == 1
    assert set(record["alternatives"][0]) == {"caption", "score"}
    (sampled_record,) = caption_to_records(
        "a.png", "--box", "0,0,9,9", "--do-sample", "--temperature", 2, "--num-captions", 3
    )
    assert len(sampled_record["alternatives"]) == 2
    (default_record,) = caption_to_records("a.png", "--box", "0,0,9,9")
    assert "alternatives" not in default_record


def test_caption_treats_mask_file_as_separate_region(caption_to_records, write_image, working_folder):
    mask = np.zeros((48, 64), bool)
    mask[10:30, 20:40] = True
    np.save(working_folder / "mask.npy", mask)
    records = caption_to_records(write_image("a.png"), "--box", "0,0,9,9", "--mask", "mask.npy")
    assert [sorted(record["prompt"]) for record in records] == [["box"], ["mask"]]


@pytest.mark.slow
def test_caption_everything_uses_proposer_by_name_with_options(caption_to_records, write_image, working_folder):
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}],
        "annotations": [{"id": 1, "image_id": 1, "bbox": [3, 4, 20, 10]}],
    }
    (working_folder / "my boxes.json").write_text(json.dumps(content))
    proposer = "boxes-from-coco annotations='my boxes.json'"
    (record,) = caption_to_records(write_image("a.png"), "--everything", "--proposer", proposer)
    assert record["prompt"] == {"box": [3, 4, 23, 14]}
    with pytest.raises(AssertionError):  # the file has boxes for another image of that name
        caption_to_records("a.png", write_image("other/a.png"), "--everything", "--proposer", proposer)
    records = caption_to_records(
        *("a.png", "--everything", "--proposer", "grid points_per_side=2"),
        *("--pred-iou-thresh", 0, "--stability-score-thresh", 0),
    )
    assert all(len(record["prompt"]["points"]) == 1 for record in records)


@pytest.mark.slow
def test_caption_with_detector_keeps_names_and_scores(
    caption_to_records, run_sca, write_image, working_folder, save_tiny_proposer
):
    proposer = f"detector weights={save_tiny_proposer('detr')} score_thresh=0 max_regions=3"
    records = caption_to_records(write_image("a.png"), "--proposer", proposer)
    names = [record["name"] for record in records]
    assert [record["region_id"] for record in records] == [0, 1, 2]
    assert {*names} <= {"LABEL_0", "LABEL_1"}
    scores = [record["proposal_score"] for record in records]
    assert scores == sorted(scores, reverse=True)
    assert len(caption_to_records("a.png", "--proposer", proposer, "--max-regions", 1)) == 1
    assert run_sca("caption", "a.png", "--proposer", proposer).out.count("LABEL_") == 3
    arguments = ("--proposer", proposer, "--out", "shards", "--launcher", "local num_workers=1")
    assert run_sca("caption", "a.png", *arguments).status == 0
    (shard,) = (working_folder / "shards").glob("*.jsonl")
    assert [record["name"] for record in parse_json_lines(shard.read_text())] == names


@pytest.mark.slow
def test_caption_text_equals_the_text_option_of_the_proposer(caption_to_records, write_image, save_tiny_proposer):
    weights = save_tiny_proposer("grounding-dino")
    proposer = f"grounding-dino weights={weights} score_thresh=0 text_thresh=0 max_regions=2"
    image = write_image("a.png")
    records = caption_to_records(image, "--proposer", proposer, "--text", "Red car", "--text", "dog")
    assert len(records) == 2
    assert all(record["name"].startswith("red car. dog.") for record in records)  # each word exceeds text_thresh
    assert records == caption_to_records(image, "--proposer", f'{proposer} text=["Red car","dog"]')


@pytest.mark.slow
def test_caption_masks_of_proposer_become_mask_prompts(caption_to_records, write_image, save_tiny_proposer):
    pytest.importorskip("torchvision", reason="SAM 3 requires torchvision")
    proposer = f"sam3 weights={save_tiny_proposer('sam3')} score_thresh=0 max_regions=2"
    records = caption_to_records(write_image("a.png"), "--proposer", proposer, "--text", "car")
    assert [[*record["prompt"]] for record in records] == [["mask"]] * 2
    assert [record["name"] for record in records] == ["car"] * 2


@pytest.mark.slow
def test_caption_region_flag_combines_box_points_and_mask(caption_to_records, write_image, working_folder):
    mask = np.zeros((48, 64), np.uint8)
    mask[5:20, 5:30] = 255
    Image.fromarray(mask).save(working_folder / "mask.png")
    np.save(working_folder / "mask.npy", mask > 0)
    combined_region = "box=1,1,40,40;point=3,3,1;point=4,4,0;mask=mask.png"
    records = caption_to_records(
        write_image("a.png"), "--region", combined_region, "--region", "mask=mask.npy", "--region", "point=9,9"
    )
    assert records[0]["prompt"]["box"] == [1, 1, 40, 40]
    assert records[0]["prompt"]["points"] == [[3, 3, 1], [4, 4, 0]]
    assert records[0]["prompt"]["mask"] == records[1]["prompt"]["mask"]
    assert records[2]["prompt"] == {"points": [[9, 9, 1]]}


def test_caption_clips_boxes_to_image_and_reports_their_number(run_sca, checkpoint, write_image, working_folder):
    write_image("a.png"), write_image("b.png")
    arguments = ("caption", "--model", checkpoint, "--max-new-tokens", 3, "--out", "-")
    result = run_sca(*arguments, "a.png", "b.png", "--box", "-1,-1,65,49", "--box", "0,0,9,9")
    assert [record["box"] for record in parse_json_lines(result.out)][::2] == [[0, 0, 64, 48]] * 2
    assert result.err == ["sca: changed or skipped: box clipped: 2 (first: a.png)"]
    prompts = [{"image": "a.png", "box": box} for box in ([1, 2, 9, 9], [60, 40, 66, 50])]
    (working_folder / "prompts.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in prompts))
    result = run_sca(*arguments, "a.png", "--prompts", "prompts.jsonl")
    assert result.err[1:] == ["sca: changed or skipped: box clipped: 1 (first: prompts.jsonl, line 2)"]


def test_caption_reads_prompts_of_several_images_from_jsonl_and_coco(caption_to_records, write_image, working_folder):
    write_image("in/a.png"), write_image("in/b.png")
    prompts = [
        {"image": "in/b.png", "points": [[4, 5, 1]]},
        {"image": "in/a.png", "box": [1, 2, 9, 9]},
        {"image": "in/a.png", "box": [3, 3, 9, 9]},
    ]
    (working_folder / "prompts.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in prompts))
    records = caption_to_records("in", "--prompts", "prompts.jsonl")
    assert [(record["image"], record["region_id"]) for record in records] == [
        ("in/a.png", 0),
        ("in/a.png", 1),
        ("in/b.png", 0),
    ]
    coco_content = {
        "images": [{"id": 7, "file_name": "b.png"}, {"id": 8, "file_name": "a.png"}],
        "annotations": [{"id": 1, "image_id": 7, "bbox": [1, 2, 8, 7]}],
    }
    (working_folder / "prompts.json").write_text(json.dumps(coco_content))
    (record,) = caption_to_records("in", "--prompts", "prompts.json")
    assert (record["image"], record["box"]) == ("in/b.png", [1, 2, 9, 9])


def test_caption_accepts_its_own_output_as_prompts_with_same_result(
    caption_to_records, write_image, run_sca, checkpoint, working_folder
):
    records = caption_to_records(write_image("a.png"), "--box", "1,2,30,40", "--point", "5,6")
    (working_folder / "again.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in records))
    assert caption_to_records("a.png", "--prompts", "again.jsonl") == records


def test_caption_everything_finds_regions_and_reports_when_none_found(
    caption_to_records, run_sca, write_image, checkpoint
):
    write_image("a.png")
    records = caption_to_records(
        "a.png", "--everything", "--points-per-side", 3, "--pred-iou-thresh", 0, "--stability-score-thresh", 0
    )
    assert records
    assert all(record["mask"] and record["box"] for record in records)
    result = run_sca(
        "caption", "a.png", "--everything", "--points-per-side", 3, "--pred-iou-thresh", 1, "--model", checkpoint
    )
    assert result.status == 0
    assert result.err == [
        "sca: no region found in a.png; lower --pred-iou-thresh or --stability-score-thresh, or raise --points-per-side"
    ]


def test_caption_expands_files_folders_and_patterns_without_duplicates(caption_to_records, write_image):
    for name in ("a.png", "in/b.png", "in/deep/c.jpg", "d.png"):
        write_image(name)
    records = caption_to_records("d.png", "in", "*.png", "./d.png", "in/b.png", "--box", "0,0,9,9")
    assert [record["image"] for record in records] == ["d.png", "in/b.png", "in/deep/c.jpg", "a.png"]


@pytest.mark.parametrize("name", ["two words.png", "new\nline.png", "日本 é.png", "[x]*.png", "'q\".png", "-dash.png"])
@pytest.mark.slow
def test_caption_accepts_unusual_image_names_in_all_formats(run_sca, checkpoint, write_image, working_folder, name):
    write_image(name)
    arguments = ["--model", checkpoint, "--box", "0,0,9,9", "--max-new-tokens", 2, "--out", "out", "--format"]
    result = run_sca("caption", *arguments, "jsonl,coco,png,html", "--", name)
    assert result.status == 0, result.err
    (record,) = parse_json_lines((working_folder / "out/captions.jsonl").read_text())
    assert record["image"] == name
    assert load_coco("out/coco.json").loadImgs([1])[0]["file_name"] == name
    assert len(list((working_folder / "out").glob("*.captions.png"))) == 1


def test_caption_accepts_image_name_that_is_not_valid_unicode(run_sca, checkpoint, write_image, working_folder):
    write_image("a.png")
    os.rename("a.png", b"\xff.png")
    arguments = ["--model", checkpoint, "--box", "0,0,9,9", "--out", "out", "--format", "jsonl,coco,png,html"]
    result = run_sca("caption", ".", *arguments)
    assert result.status == 0, result.err


def test_caption_reads_images_of_all_modes_sizes_and_exif_orientations(caption_to_records, working_folder):
    Image.new("RGB", (2, 1)).save(working_folder / "1.png")
    Image.new("RGB", (20000, 10)).save(working_folder / "2.png")
    Image.new("P", (9, 9)).save(working_folder / "3.png")
    Image.new("I;16", (9, 9)).save(working_folder / "4.png")
    Image.new("CMYK", (9, 9)).save(working_folder / "5.jpg")
    Image.new("RGBA", (9, 9)).save(working_folder / "6.png")
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (9, 5)).save(working_folder / "7.jpg", exif=exif)
    records = caption_to_records(".", "--box", "0,0,2,1")
    sizes = [(record["width"], record["height"]) for record in records]
    assert sizes == [(2, 1), (20000, 10), (9, 9), (9, 9), (9, 9), (9, 9), (5, 9)]


def test_caption_results_do_not_depend_on_batch_size(caption_to_records, write_image):
    for name in ("a.png", "b.png", "c.png"):
        write_image(name, width=30 + ord(name[0]))
    unbatched, batched = (
        caption_to_records(".", "--box", "0,0,9,9", "--point", "4,4", "--batch-size", n) for n in (1, 8)
    )
    assert [record["caption"] for record in unbatched] == [record["caption"] for record in batched]
    assert [record["mask"] for record in unbatched] == [record["mask"] for record in batched]


def test_caption_supports_half_precision_dtypes(caption_to_records, write_image):
    for dtype in ("bfloat16", "float16"):
        assert len(caption_to_records(write_image("a.png"), "--box", "0,0,9,9", "--precision", dtype)) == 1


def test_caption_caps_max_new_tokens_at_model_context(caption_to_records, write_image):
    assert len(caption_to_records(write_image("a.png"), "--box", "0,0,9,9", "--max-new-tokens", 4000)) == 1


def test_caption_without_mask_output_writes_null_mask_and_iou(run_sca, maskless_checkpoint, write_image):
    result = run_sca("caption", write_image("a.png"), "--box", "0,0,9,9", "--model", maskless_checkpoint, "--out", "-")
    (record,) = parse_json_lines(result.out)
    assert (record["mask"], record["predicted_iou"]) == (None, None)
    assert record["box"] == [0, 0, 9, 9]


# --- output and messages


def test_caption_writes_all_formats_with_matching_content(run_sca, checkpoint, write_image, working_folder):
    write_image("a.png"), write_image("in/a.png", 40, 80)
    result = run_sca(
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
    assert sorted(path.name for path in (working_folder / "out").iterdir()) == [
        "a-2.captions.png",
        "a.captions.png",
        "captions.html",
        "captions.jsonl",
        "coco.json",
        "sca-run.json",
    ]
    records = parse_json_lines((working_folder / "out/captions.jsonl").read_text())
    coco_dataset = load_coco("out/coco.json")
    assert [
        (coco_dataset.loadImgs([a["image_id"]])[0]["file_name"], a["region_id"])
        for a in coco_dataset.dataset["annotations"]
    ] == [(record["image"], record["region_id"]) for record in records]
    for record, annotation in zip(records, coco_dataset.dataset["annotations"], strict=True):
        assert coco_dataset.annToMask(annotation).shape == (record["height"], record["width"])
        assert annotation["caption"] == record["caption"]
    for name in ("a-2.captions.png", "a.captions.png"):
        with Image.open(working_folder / "out" / name) as drawing:
            drawing.load()
    page = (working_folder / "out/captions.html").read_text()
    assert page.count("<section") == 2
    assert "://" not in page  # nothing to load


def test_caption_quiet_suppresses_log_lines_but_not_the_result(run_sca, checkpoint, write_image, working_folder):
    arguments = ["caption", write_image("a.png"), "--box", "0,0,9,9", "--model", checkpoint, "--quiet"]
    result_with_folder = run_sca(*arguments, "--out", "out")
    assert (result_with_folder.out, result_with_folder.err) == ("", [])
    assert (working_folder / "out/captions.jsonl").exists()
    result_on_stdout = run_sca(*arguments)  # only the table
    assert "a.png" in result_on_stdout.out
    assert result_on_stdout.err == []


@pytest.mark.parametrize(("name", "domain"), [("sca-tiny", "synthetic scenes"), ("sca-street", "street photographs")])
@pytest.mark.slow
def test_caption_notes_narrow_training_domain_once(run_sca, write_image, monkeypatch, checkpoint, name, domain):
    from sca.inference.caption_job import CaptionJob

    load_captioner = CaptionJob.load_captioner
    monkeypatch.setattr(CaptionJob, "load_captioner", lambda job: load_captioner(replace(job, model=str(checkpoint))))
    arguments = ["caption", write_image("a.png"), write_image("b.png"), "--box", "0,0,9,9", "--model", name]
    (line,) = run_sca(*arguments).err
    assert line.startswith(f"sca: {name} is trained on {domain} only; for photographs: ")
    assert "sca-gpt2-large-vg (5.7 GB)" in line
    assert "`sca pull pam-1.5b`" in line
    assert "--model pam-1.5b`" in line
    assert run_sca(*arguments, "--quiet").err == []


def test_caption_with_ambiguous_prompts_keeps_earlier_results(run_sca, checkpoint, write_image, working_folder):
    for name in ("a/x.png", "b/x.png"):
        write_image(name)
    assert run_sca("caption", "a", "--box", "1,1,9,9", "--model", checkpoint, "--out", "out", "--quiet").status == 0
    original_content = (working_folder / "out/captions.jsonl").read_bytes()
    (working_folder / "p.jsonl").write_text(json.dumps({"image": "x.png", "box": [1, 1, 9, 9]}) + "\n")
    arguments = ("caption", "a/x.png", "b/x.png", "--prompts", "p.jsonl", "--model", checkpoint, "--overwrite")
    result = run_sca(*arguments, "--out", "out")
    assert result.status == 2
    assert "matches 2 images" in result.err[-1]
    assert (working_folder / "out/captions.jsonl").read_bytes() == original_content


def test_caption_replaces_earlier_results_only_with_overwrite(run_sca, checkpoint, write_image, working_folder):
    for box, status, *overwrite_flags in (("0,0,9,9", 0), ("1,1,5,5", 2), ("1,1,5,5", 0, "--overwrite")):
        arguments = ["--model", checkpoint, "--out", "out", "--format", "jsonl,coco", *overwrite_flags]
        assert run_sca("caption", write_image("a.png"), "--box", box, *arguments).status == status
    (record,) = parse_json_lines((working_folder / "out/captions.jsonl").read_text())
    assert record["box"] == [1, 1, 5, 5]
    assert len(load_coco("out/coco.json").getAnnIds()) == 1


def test_caption_reports_invalid_regions_and_captions_the_rest(run_sca, checkpoint, write_image, working_folder):
    write_image("a.png")
    boxes = [[1, 1, 20, 20], [5, 5, 0, 9], [2, 2, 9, 9], [90, 90, 5, 5], [1, 2, 3]]
    (working_folder / "c.json").write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "a.png"}],
                "annotations": [{"image_id": 1, "bbox": box} for box in boxes],
            }
        )
    )
    (working_folder / "l.jsonl").write_text(
        '{"image": "a.png", "box": [1, 1, 20, 20]}\n{"image": "a.png", "box": [9, 9, 2, 2]}\nno JSON\n'
    )
    for file, num_captioned, positions, summary in (
        ("c.json", 2, ["annotations[1], 'bbox'", "annotations[4], 'bbox'", "annotations[3]"], "3 regions, 1 image; 2"),
        ("l.jsonl", 1, ["line 3", "line 2"], "2 regions, 1 image; 1"),
    ):
        result = run_sca(
            "caption", "a.png", "--prompts", file, "--max-new-tokens", 2, "--model", checkpoint, "--out", "-"
        )
        assert result.status == 2
        assert len(parse_json_lines(result.out)) == num_captioned
        assert result.err[0].startswith(f"sca: {file}: {summary} record")
        assert len(result.err) == 1 + len(positions)
        for position, line in zip(positions, result.err[1:], strict=True):
            assert f"{file}, {position}" in line
    assert "x,y,width,height" not in " ".join(
        run_sca("caption", "a.png", "--prompts", "c.json", "--model", checkpoint).err
    )


@pytest.mark.slow
def test_caption_in_shards_captions_valid_regions_beside_invalid_ones(run_sca, checkpoint, write_image, working_folder):
    write_image("a.png"), write_image("b.png")
    regions = [{"image": "a.png", "box": [1, 1, 9, 9]}, {"image": "a.png", "box": [90, 90, 99, 99]}]
    regions.append({"image": "b.png", "box": [1, 1, 9, 9]})
    (working_folder / "r.jsonl").write_text("\n".join(map(json.dumps, [*regions, {"image": "b.png"}])))
    arguments = ("a.png", "b.png", "--prompts", "r.jsonl", "--max-new-tokens", 2, "--model", checkpoint, "--out", "out")
    result = run_sca("caption", *arguments, "--launcher", "local num_workers=1")
    assert len(parse_json_lines((working_folder / "out/shard-00000.jsonl").read_text())) == 2
    assert sum("line 4" in line for line in result.err) == 1
    assert sum("line 2" in line for line in result.err) == 1
    assert result.status == 2


@pytest.mark.slow
def test_caption_max_regions_keeps_highest_ranked_regions(caption_to_records, run_sca, write_image, checkpoint):
    from sca.inference.automatic import caption_everything
    from sca.inference.factory import load_captioner
    from sca.inference.predictor import Predictor

    thresholds = ("--pred-iou-thresh", 0, "--stability-score-thresh", 0, "--box-nms-thresh", 1)
    search_arguments = ("--everything", *thresholds, "--points-per-side", 3)
    all_records = caption_to_records(write_image("a.png"), *search_arguments)
    assert len(all_records) > 2
    best_records = [
        {**each, "score": pytest.approx(each["score"], rel=1e-4)} for each in all_records[:2]
    ]  # a different batch size
    assert caption_to_records("a.png", *search_arguments, "--max-regions", 2) == best_records
    assert caption_to_records("a.png", *search_arguments, "--max-regions", 1000) == all_records
    proposer = "grid points_per_side=2"
    assert len(caption_to_records("a.png", *search_arguments[:-2], "--proposer", proposer, "--max-regions", 1)) == 1
    result = run_sca("caption", "a.png", "--box", "1,1,9,9", "--max-regions", 2, "--model", checkpoint)
    assert (result.status, result.err) == (2, ["sca: --max-regions can only be used with --everything"])
    predictor = Predictor(load_captioner(checkpoint))
    predictor.set_image(Image.open("a.png").convert("RGB"))
    with pytest.raises(ValueError, match="max_regions is 0; expected an integer of at least 1"):
        caption_everything(predictor, max_regions=0)


@pytest.mark.parametrize("quiet", [False, True])
def test_caption_everything_shows_search_progress_on_terminal_unless_quiet(
    run_sca, write_image, checkpoint, monkeypatch, quiet
):
    from rich.console import Console

    from sca.cli.image_runs import ProgressBars

    steps = []
    show_search = ProgressBars.show_search
    monkeypatch.setattr(ProgressBars, "show_search", lambda self, *step: (show_search(self, *step), steps.append(step)))
    monkeypatch.setattr(Console, "is_terminal", True)
    arguments = ("caption", write_image("a.png"), "--everything", "--points-per-side", 3, "--model", checkpoint)
    result = run_sca(*arguments, *(["--quiet"] if quiet else []))
    assert result.status == 0
    assert steps[-1] == (9, 9)
    assert any("points" in line for line in result.err) != quiet
    assert "9/9" not in result.out


def test_caption_zooms_into_small_regions(caption_to_records, write_image):
    write_image("a.png", 256, 192)
    arguments = ("a.png", "--box", "100,100,108,108", "--box", "0,0,256,192")
    off, auto, zoomed = (caption_to_records(*arguments, "--zoom", zoom) for zoom in ("off", "auto", "4"))
    assert off == auto == caption_to_records(*arguments)  # the model has no measured options
    assert zoomed[0] != off[0]
    assert zoomed[0]["mask"]["size"] == [192, 256]
    assert [zoomed[1][key] for key in ("caption", "mask")] == [off[1][key] for key in ("caption", "mask")]


@pytest.mark.parametrize("value", ["on", "0", "nan"])
def test_caption_rejects_other_values_of_zoom(get_sca_error, write_image, value):
    error = get_sca_error(2, "caption", write_image("a.png"), "--box", "1,1,9,9", "--zoom", value)
    assert error == f"zoom is '{value}'; expected auto, off, or a number of grid cells above 0"
