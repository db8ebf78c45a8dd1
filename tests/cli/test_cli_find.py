"""`sca find`: the best matches of all images, their output, and errors in one line."""

import json
import shutil

import pytest
from PIL import Image

import sca
from sca.cli.image_runs import collect_run_settings
from sca.data.export import export_dataset
from sca.data.scenes import Scenes
from sca.inference.proposer import build_proposer
from sca.output.captioned_image import ImageSize
from sca.output.formats import MultiFormatWriter

BOXES = [(15, 270, 99, 354), (186, 357, 323, 500)]


@pytest.fixture
def photos(working_folder, request):
    """Two images, and prompts for both: the example scene, and another one without a cyan star."""
    (working_folder / "photos").mkdir()
    shutil.copy(request.config.rootpath / "examples" / "scene.png", working_folder / "photos" / "a.png")
    scene = Scenes("test", num_images=1, image_size=256)[0]
    scene.image.save(working_folder / "photos" / "b.png")
    boxes = {"a.png": BOXES, "b.png": [region.box for region in scene.regions]}
    lines = [json.dumps({"image": name, "box": box}) for name, each in boxes.items() for box in each]
    (working_folder / "prompts.jsonl").write_text("\n".join(lines))
    return working_folder / "photos"


def test_find_prints_the_best_matches_of_all_images(run_sca, photos):
    result = run_sca("find", "a cyan star", "photos", "--prompts", "prompts.jsonl", "--top", 2, "--threshold=-100")
    assert result.status == 0, result.err
    header, best, second = result.out.splitlines()
    assert header.split() == ["image", "region", "text", "score", "caption", "iou", "box"]
    assert best.split()[:3] == ["a.png", "1", "0.96"]
    assert "a medium striped cyan star" in best
    assert float(second.split()[2]) < 0.96


def test_find_writes_matches_with_text_and_score(run_sca, photos):
    arguments = ("find", "a cyan star", "photos", "--prompts", "prompts.jsonl", "--threshold", 0.9)
    result = run_sca(*arguments, "--out", "out", "--format", "jsonl,png,html")
    assert result.status == 0, result.err
    (line,) = (photos.parent / "out" / "captions.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["image"], record["region_id"], record["name"]) == ("photos/a.png", 1, "a cyan star")
    assert 0.6 < record["proposal_score"] <= 1
    assert record["caption"].startswith("a medium striped cyan star")
    assert sorted(path.name for path in (photos.parent / "out").glob("*.*")) >= ["a.captions.png", "captions.html"]
    (streamed,) = run_sca(*arguments, "--out", "-").out.splitlines()
    assert json.loads(streamed) == record
    other = run_sca("find", "a cross", *arguments[2:], "--out", "out")
    assert other.status == 2
    assert "--overwrite" in other.err[-1]
    assert run_sca("find", "a cross", *arguments[2:], "--out", "out", "--overwrite").status == 0


def test_find_writes_the_matches_of_readable_images(run_sca, photos):
    arguments = ("find", "a cyan star", "photos/a.png", "missing.png", "--prompts", "prompts.jsonl", "--out", "out")
    result = run_sca(*arguments)
    assert result.status == 1
    assert "sca: 1 of 2 images searched" in result.err
    assert "a medium striped cyan star" in result.out
    output = photos.parent / "out" / "captions.jsonl"
    assert json.loads(output.read_text())["region_id"] == 1
    (photos / "a.png").write_text("no image")
    result = run_sca(*arguments, "--overwrite")
    assert (result.status, result.out) == (1, "")
    assert output.exists()


def test_find_never_overwrites_its_prompts_file(run_sca, photos):
    arguments = ("find", "a cyan star", "photos/a.png", "--out", "out", "--prompts")
    assert run_sca(*arguments, "prompts.jsonl").status == 0
    output = photos.parent / "out" / "captions.jsonl"
    content = output.read_text()
    result = run_sca(*arguments, "out/captions.jsonl", "--overwrite")
    assert result.status == 2
    assert "would be overwritten and is an input of this command" in result.err[-1]
    assert output.read_text() == content


def test_find_returns_exactly_top_matches_of_equal_scores(run_sca, photos):
    for name in ("b.png", "c.png"):
        shutil.copy(photos / "a.png", photos / name)
    lines = [json.dumps({"image": f"{name}.png", "box": BOXES[1]}) for name in "abc"]
    (photos.parent / "prompts.jsonl").write_text("\n".join(lines))
    result = run_sca("find", "a cyan star", "photos", "--prompts", "prompts.jsonl", "--top", 2, "--out", "-")
    assert [json.loads(line)["image"] for line in result.out.splitlines()] == ["photos/a.png", "photos/b.png"]


@pytest.mark.parametrize(("formats", "image_type"), [("jsonl", ImageSize), ("jsonl,png", Image.Image)])
def test_find_keeps_images_only_for_drawn_formats(run_sca, photos, monkeypatch, formats, image_type):
    images = []
    monkeypatch.setattr(MultiFormatWriter, "add", lambda _, path, image, captions: images.append(image))
    run_sca("find", "a star", "photos", "--prompts", "prompts.jsonl", "--out", "out", "--format", formats)
    assert images
    assert all(isinstance(image, image_type) for image in images)


def test_collect_run_settings_records_zeros_and_omits_unset_options(working_folder):
    (working_folder / "a.json").write_text("[]")
    options = {"images": ["a.png"], "text": "a", "threshold": 0.0, "seed": 0, "top": 10, "prompts": None, "quiet": True}
    settings = collect_run_settings({**options, "everything": False, "box": []}, ["a.json"])
    file_hash = settings.pop("files")["a.json"]
    assert settings == {"images": ["a.png"], "text": "a", "threshold": "0.0", "seed": "0", "top": "10"}
    assert len(file_hash) == 64


def test_find_uses_the_scores_of_the_predictor(run_sca, photos):
    result = run_sca("find", "a star", "photos/a.png", "--prompts", "prompts.jsonl", "--threshold=-100", "--out", "-")
    predictor = sca.Predictor(sca.load("sca-tiny"))
    predictor.set_image(sca.open_image(photos / "a.png"))
    expected = [match.proposal_score for match in predictor.find("a star", boxes=BOXES)]
    assert [json.loads(line)["proposal_score"] for line in result.out.splitlines()] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_find_searches_everything_by_default(run_sca, photos):
    (line,) = run_sca("find", "a striped circle", "photos/a.png", "--out", "-").out.splitlines()
    assert json.loads(line)["caption"].startswith("a small striped red circle")
    with_proposer = run_sca("find", "a striped circle", "photos/a.png", "--proposer", "grid", "--out", "-")
    assert json.loads(with_proposer.out)["name"] == "a striped circle"


@pytest.mark.slow
def test_find_passes_its_text_to_a_proposer(run_sca, photos, save_tiny_proposer, monkeypatch):
    proposer = f"grounding-dino weights={save_tiny_proposer('grounding-dino')} score_thresh=0 max_regions=3"
    texts = []
    monkeypatch.setattr(
        "sca.inference.caption_job.build_proposer",
        lambda component, device: texts.append(component.options["text"]) or build_proposer(component, device),
    )
    for text, options in (("a disc", ""), ("a star", " text=disc")):
        result = run_sca("find", text, "photos/a.png", "--proposer", f"{proposer}{options}", "--threshold=-100")
        assert result.status == 0, result.err
    assert texts == [["a disc"], "disc"]


def test_find_reports_that_nothing_matches(run_sca, photos):
    result = run_sca("find", "a plain cross", "photos/a.png", "--prompts", "prompts.jsonl")
    assert (result.status, result.out) == (0, "")
    assert "sca: no region matches 'a plain cross' with a score of at least 0.6; lower --threshold" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", "photos"), "the text is empty; pass a word or a phrase, such as 'a red circle'"),
        (("a star " * 60, "photos"), "the text has 120 tokens, but the model reads at most 91; shorten it"),
        (("a star", "photos", "--model", "sca-tiny+none"), "'sca-tiny+none' cannot score a text; use a model with a"),
        (
            ("a star", "photos", "--everything", "--points-per-side", 4, "--prompts", "prompts.jsonl"),
            "--everything and --points-per-side cannot be combined with --prompts; omit one of them",
        ),
        (("a star", "photos", "--proposer", "grid", "--points-per-side", 4), "--proposer replaces the point grid"),
        (("a \udcff", "photos"), r"the text contains '\udcff', half of a surrogate pair, which is not text; remove it"),
        (("a star", "photos", "--threshold", "nan"), "threshold is nan; expected a number"),
        (("a star", "photos", "--overwrite"), "--overwrite requires --out; add it, or omit --overwrite"),
    ],
)
def test_find_rejects_invalid_input(run_sca, photos, arguments, message):
    result = run_sca("find", *arguments)
    assert result.status == 2
    assert message in result.err[-1]


@pytest.mark.slow
def test_evaluate_runs_refcoco_comprehension(run_sca, working_folder):
    root = export_dataset(Scenes("val", num_images=5), working_folder / "files", "refcoco")
    arguments = ("evaluate", "sca-tiny", "refcoco-comprehension", f"root={root}")
    result = run_sca(*arguments, "--runs", "refcoco-val", "--json", "--quiet")
    assert result.status == 0, result.err
    (report,) = json.loads(result.out)
    assert report["scores"]["comprehension/accuracy"] > 0.9
    result = run_sca(*arguments, "--runs", "refcoco-val", "--proposer", "grid", "--json", "--quiet")
    (report,) = json.loads(result.out)
    assert report["run"]["proposer"] == {"name": "grid"}
    assert report["scores"]["comprehension/accuracy"] > 0.8
    arguments = ("referring-scenes-comprehension", "--runs", "refcocog-val", "--max-images", 3, "--json", "--quiet")
    (report,) = json.loads(run_sca("evaluate", "sca-tiny", *arguments).out)
    assert report["run"]["dataset_options"] == {"collection": "refcocog"}
    assert 0 < report["scores"]["comprehension/accuracy"] <= 1
    assert "--runs selects runs of a protocol" in run_sca("evaluate", "sca-tiny", "scenes", "--runs", "a").err[-1]
