"""`sca caption --question` and `--length`: answers, images that lack a region, and options that exclude each other."""

import json

import pytest

import sca

LANGUAGE_MODEL = {"name": "tiny-gpt2", "hidden_size": 32, "depth": 1, "num_heads": 2, "max_positions": 96}
RELATION = "is <region 1> left of <region 2>?"


@pytest.fixture
def model_folder(build_small_model, working_folder):
    """Folder of a model that supports questions and lengths."""
    sca.save(build_small_model(questions=True, lengths=True, language_model=LANGUAGE_MODEL), working_folder / "model")
    return "./model"


@pytest.fixture
def two_images(write_image, working_folder):
    """Two images, and a prompts file with two regions of the first and one region of the second."""
    lines = [
        {"image": "a.png", "box": [1, 1, 9, 9]},
        {"image": "a.png", "box": [5, 5, 20, 20]},
        {"image": "b.png", "box": [1, 1, 9, 9]},
    ]
    (working_folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [write_image("a.png"), write_image("b.png")]


def test_caption_writes_answers_with_their_question(run_sca, model_folder, two_images):
    result = run_sca(
        *("caption", "a.png", "--box", "1,1,9,9", "--box", "5,5,20,20", "--model", model_folder, "--out", "-"),
        *("--question", "what color is it?"),
    )
    assert result.status == 0, result
    records = [json.loads(line) for line in result.out.splitlines()]
    assert [(record["region_id"], record["question"]) for record in records] == [
        (0, "what color is it?"),
        (1, "what color is it?"),
    ]


def test_caption_reports_images_without_the_regions_of_a_question_and_answers_the_others(
    run_sca, model_folder, two_images
):
    result = run_sca(
        *("caption", "a.png", "b.png", "--prompts", "prompts.jsonl", "--model", model_folder, "--out", "-"),
        *("--question", RELATION),
    )
    assert result.status == 2  # as for other prompts that do not fit
    assert [json.loads(line)["image"] for line in result.out.splitlines()] == ["a.png"]
    assert any("b.png: the question refers to <region 2>, but the image has 1 region" in line for line in result.err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--question", "what is it?", "--length", "short"), "length and question are mutually exclusive"),
        (("--question", "what is it?", "--task", "recognition"), "cannot be combined with a question or a length"),
        (("--length", "long"), "length is 'long'"),
        (("--question", ""), "the question is empty"),
        (("--question", RELATION), "the question refers to <region 2>, but the image has 1 region"),
    ],
)
def test_caption_rejects_questions_and_lengths(run_sca, model_folder, two_images, arguments, message):
    result = run_sca("caption", "a.png", "--box", "1,1,9,9", "--model", model_folder, *arguments)
    assert result.status in (1, 2)
    assert message in "".join(result.err)
    assert not any("Traceback" in line for line in result.err)


def test_caption_generates_lengths_in_everything_mode(run_sca, model_folder, two_images):
    search = ("--points-per-side", "2", "--pred-iou-thresh", "0", "--stability-score-thresh", "0")
    result = run_sca(
        "caption", "a.png", "--everything", *search, "--model", model_folder, "--length", "short", "--out", "-"
    )
    assert result.status == 0, result
    assert all("describe it" in json.loads(line)["question"] for line in result.out.splitlines())
