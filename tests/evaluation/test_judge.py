"""The metric `judge`: judges by likelihood and on a server, orders of options, datasets, and invalid questions."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import sca_registry
import torch
from chat_server import make_completion, run_chat_server
from judged_benchmarks import SIZE, write_images, write_judge
from sca_registry.contracts import JUDGE_QUESTIONS, JudgeQuestion, Region

import sca
from sca.evaluation.evaluate import score_file, score_stored_records
from sca.evaluation.judges import JudgePrompt, build_judge, parse_answer
from sca.evaluation.requirements import check_metric_needs

KEY = "sk-planted-judge-0123456789"
COLOR_QUESTION = {
    "text": "Which statement about the color is correct?",
    "options": ["It is red.", "It is not mentioned.", "It is another color."],
    "scores": [1, 0, -1],
    "kind": "positive",
}
WHEEL_QUESTION = {
    "text": "Are wheels mentioned?",
    "options": ["Wheels are mentioned.", "No wheels."],
    "scores": [-1, 1],
    "kind": "negative",
}


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory):
    return write_judge(tmp_path_factory.mktemp("judge"))


@pytest.fixture
def judged_record(make_record):
    def make(caption, *questions, region=1, **truth):
        return make_record(caption, region=region, attributes={JUDGE_QUESTIONS: list(questions)}, **truth)

    return make


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_API_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "cache"))


def make_letter_response(choose):
    """Return a fault of the chat server that responds with `choose(options of the question)`."""

    def send_letter(handler):
        text = handler.server.bodies[-1]["messages"][0]["content"]
        handler.send_json(make_completion(choose(dict(re.findall(r"^([A-Z])\. (.*)$", text, re.MULTILINE)))))

    return lambda text, number: send_letter


# --- language models


def compute_reference_probabilities(folder, text, num_options):
    """Normalize the log-probabilities of the whole sequences, computed by transformers one at a time."""
    language_model = sca_registry.language_models.build("hf", weights=str(folder))
    sums = []
    for letter in "ABCDE"[:num_options]:
        ids = torch.tensor([language_model.tokenizer.encode(f"{text}\nAnswer: {letter}")[:-1]])
        log_probs = language_model.model.eval()(ids).logits.double().log_softmax(-1)
        sums.append(log_probs[0, :-1].gather(-1, ids[0, 1:, None]).sum())
    return torch.stack(sums).softmax(0).detach().numpy()


def test_probabilities_are_those_of_whole_sequences_in_transformers(judge_folder):
    prompts = [JudgePrompt(f"Is it {word}?", ("yes",) * number) for word, number in (("red", 2), ("not so small", 5))]
    judge = build_judge(f"hf weights={judge_folder}", batch_size=3)
    for prompt, probabilities in zip(prompts, judge.compute_probabilities(prompts), strict=True):
        expected = compute_reference_probabilities(judge_folder, prompt.text, len(prompt.options))
        assert probabilities == pytest.approx(expected, abs=1e-5)
        assert max(probabilities) > 1.2 / len(probabilities)  # the letters differ


def test_letters_of_several_tokens_are_summed(judge_folder, monkeypatch):
    judge = build_judge(f"hf weights={judge_folder}")
    encode = judge.language_model.tokenizer.encode
    monkeypatch.setattr(judge.language_model.tokenizer, "encode", lambda text: encode(f"{text}. done"))
    (probabilities,) = judge.compute_probabilities([JudgePrompt("Which?", ("a", "b", "c"))])
    sums = []
    for letter in "ABC":
        ids = torch.tensor([encode(f"Which?\nAnswer: {letter}. done")[:-1]])
        log_probs = judge.language_model.model(ids).logits.double().log_softmax(-1)
        sums.append(log_probs[0, :-1].gather(-1, ids[0, 1:, None]).sum())
    assert probabilities == pytest.approx(torch.stack(sums).softmax(0).detach().numpy(), abs=1e-5)


def test_chat_template_presents_the_prompt_as_a_turn_of_the_user(judge_folder):
    judge = build_judge(f"hf weights={judge_folder}")
    judge.language_model.tokenizer.tokenizer.chat_template = "USER {{ messages[0].content }} ASSISTANT "
    ((first, *_), start) = judge._encode_options(JudgePrompt("Which?", ("a", "b")))
    assert judge.language_model.tokenizer.decode(first) == "USER Which? ASSISTANT A"
    assert judge.language_model.tokenizer.decode(first[:start]) == "USER Which? ASSISTANT"


def test_judge_is_deterministic_and_independent_of_the_batch_size(judge_folder, judged_record):
    records = [
        judged_record(caption, COLOR_QUESTION, WHEEL_QUESTION, region=n, name="car")
        for n, caption in enumerate(("a red car", "a car with four large wheels"))
    ]
    outputs = [
        sca_registry.metrics.build("judge", model=f"hf weights={judge_folder}", batch_size=size)(records)
        for size in (1, 1, 8)
    ]
    assert outputs[0].values == outputs[1].values == outputs[2].values
    assert outputs[0].values["judge/questions"] == 6
    assert outputs[0].values["judge/unanswered"] == 0
    assert outputs[0].values["judge/order-variance"] > 0
    assert outputs[0].per_record["judge/order-variance"].shape == (2,)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "needs a judge; set judge.model=NAME"),
        ("tiny-gpt2", "'tiny-gpt2' has random weights; use a pretrained one"),
        ("gpt3", "gpt3"),
        ("openai", "no server; set url="),
        ("openai uri=x", "no option 'uri'"),
        ("openai url=http://localhost:1 extra_body={model='x'}", "extra_body.model is set by the client"),
    ],
)
def test_judge_rejects_unusable_models(model, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sca_registry.metrics.build("judge", model=model)


def test_judge_reports_a_question_longer_than_its_context(judge_folder, judged_record):
    record = judged_record("red " * 2000, COLOR_QUESTION)
    with pytest.raises(ValueError, match="reads at most 1,024 tokens, and a question has"):
        score_stored_records([record], ["judge"], {"judge.model": f"hf weights={judge_folder}"})


# --- servers


@pytest.mark.slow
def test_server_judge_chooses_by_content_in_every_order(judged_record):
    choose = make_letter_response(
        lambda options: next(
            f"{letter}\nas stated" for letter, text in options.items() if text in ("It is red.", "No wheels.", "Yes")
        )
    )
    with run_chat_server(choose) as server:
        metric = sca_registry.metrics.build("judge", model=f"openai url={server.url} max_concurrency=1")
        output = metric([judged_record("a red car", COLOR_QUESTION, WHEEL_QUESTION, name="car")])
    assert output.values["judge/mean"] == output.values["judge/recognition"] == 1
    assert output.values["judge/order-variance"] == 0
    assert len(server.bodies) == 3 + 2 + 2  # rotations of each question
    body = server.bodies[0]
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0, 16, "stub")
    assert "Text: a red car" in body["messages"][0]["content"]
    assert metric.implementation == "sca, judged by stub on a server, all rotations of the options"


@pytest.mark.slow
def test_protocol_of_scores_depends_on_the_request_and_not_on_the_url(judged_record):
    scores = []
    for options in ("", "", " extra_body={seed=1}"):
        with run_chat_server(make_letter_response(lambda options: "A")) as server:
            model = f"openai url={server.url}{options}"
            records = [judged_record("a car", WHEEL_QUESTION)]
            report = score_stored_records(records, ["judge"], {"judge.model": model})
        assert report.to_dict()["metric_details"]["judge"]["url"] == server.url
        scores.append(report.scoring.scores[0])
    assert scores[0].protocol_id == scores[1].protocol_id != scores[2].protocol_id


@pytest.mark.slow
def test_preference_for_a_letter_is_reported_as_variance_over_orders(judged_record):
    record = judged_record("a red car", COLOR_QUESTION)
    with run_chat_server(make_letter_response(lambda options: "A")) as server:
        model = f"openai url={server.url} max_concurrency=1"
        output = sca_registry.metrics.build("judge", model=model)([record])
        first = sca_registry.metrics.build("judge", model=model, option_orders="first")([record])
    assert output.values["judge/order-variance"] == pytest.approx(np.var([1, 0, -1]))
    assert "judge/order-variance" not in first.values
    assert first.values["judge/positive"] == 1
    assert len(server.bodies) == 3  # the first order is cached


@pytest.mark.slow
def test_wrong_class_limits_the_scores_and_missing_letters_are_counted(judged_record):
    records = [
        judged_record("a red car", COLOR_QUESTION, name="dog", region=1),
        judged_record("a blue car", WHEEL_QUESTION, region=2),
    ]
    answers = {"Yes": "No", "It is red.": "It is red.", "No wheels.": "I cannot see the image."}
    choose = make_letter_response(lambda options: next(answers[each] for each in answers if each in options.values()))
    with run_chat_server(choose) as server:
        output = sca_registry.metrics.build("judge", model=f"openai url={server.url} max_concurrency=1")(records)
    assert output.per_record["judge/positive"][0] == 0
    assert output.per_record["judge/recognition"][0] == 0
    assert math.isnan(output.per_record["judge/recognition"][1])  # a region without a name
    assert output.values["judge/negative"] == 0
    assert output.values["judge/unanswered"] == 2


def echo_key(handler):
    """Reject a request with a message that contains its key."""
    handler.send_json({"error": {"message": f"unknown key {handler.headers['Authorization']}"}}, 401)


@pytest.mark.slow
def test_key_of_the_server_judge_is_written_nowhere(monkeypatch, tmp_path, caplog, capfd):
    from sca.cli import main

    pytest.importorskip("datasets", reason="requires the extra data")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    write_images(tmp_path / "images", 1)
    judged = {"name": "car", "attributes": {JUDGE_QUESTIONS: [COLOR_QUESTION]}}
    file = write_jsonl_benchmark(tmp_path, judged, judged)["file"]
    command = ["sca", "evaluate", "sca-tiny", "jsonl", f"file={file}", "--metrics", "judge", "judge.model=openai"]
    outputs = []
    for fault, code in ((make_letter_response(lambda options: "A"), 0), (lambda text, number: echo_key, 2)):
        monkeypatch.setattr("sys.argv", [*command, "--out", str(tmp_path / f"out-{code}")])
        with run_chat_server(fault) as server:
            monkeypatch.setenv("OPENAI_BASE_URL", server.url)
            with pytest.raises(SystemExit) as ended:
                main()
        assert (ended.value.code or 0) == code
        assert f"Bearer {KEY}" in server.keys
        outputs += capfd.readouterr()
    assert "responded with status 401 (unknown key Bearer ***)" in outputs[-1]
    files = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"out-0/scores.json", "out-0/predictions.jsonl", "out-2/predictions.jsonl"} <= files.keys()
    assert any(name.startswith("cache/responses/") for name in files)
    assert not any(KEY.encode() in content for content in files.values())
    assert not any(KEY in text for text in (*outputs, caplog.text))


@pytest.mark.slow
def test_unavailable_server_is_reported_in_one_line(judged_record):
    with pytest.raises(ValueError, match=r"judge.*http://127\.0\.0\.1:9/v1 failed") as caught:
        score_stored_records(
            [judged_record("a car", WHEEL_QUESTION)],
            ["judge"],
            {"judge.model": "openai url=http://127.0.0.1:9 model=m max_retries=0"},
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((text, 1) for text in ("B", "b", "(B)", "**B**", "B.", "B) blue", "B. A red one", "the answer is B.")),
        *((text, 1) for text in ("Answer: **B**", "<think>A or B?</think>\nB", "blue", "Blue.")),
        *(
            (text, 1)
            for text in ("B\n\nThe text states so", "B The text does not mention red", "B, because of the sky")
        ),
        *(
            (text, 1)
            for text in ("The answer is B. It is not red", "Answer: B. It is red", "Option B: it is", "B.It is")
        ),
        *(
            (text, 1)
            for text in (
                "\\boxed{B}",
                "The final answer is $\\boxed{\\text{B}}$.",
                "\\(B\\)",
                "B - The sky",
                "**B** is it",
            )
        ),
        *(
            (text, 1)
            for text in ("It is either. The answer is B, as A is red.", "A blue one", "A dog, and it is blue.")
        ),
        *((text, 1) for text in ("B is correct.", "Option B is the best one", "I think the answer B is right")),
        *((text, 0) for text in ("A\nIt is red.", "A The text", "A: blue")),
        ("A is not correct", None),
        *((text, None) for text in ("", "D", "A big dog", "I do not know", "both", "A or B", "A, B or C", "A.I. is")),
        *((text, None) for text in ("red or blue", "redder", "<think> Okay, is it option A", "<think>\nA")),
    ],
)
def test_parse_answer(text, expected):
    assert parse_answer(text, ("red", "blue", "green")) == expected


def test_parse_answer_chooses_the_longest_option_that_a_text_contains():
    options = ("The color is mentioned.", "It is not true that the color is mentioned.")
    assert parse_answer(f"I think that {options[1]}", options) == 1
    assert parse_answer(f"I think that {options[0]}", options) == 0


def test_parse_answer_reads_only_the_start_of_a_truncated_text():
    text = "Okay, the question is whether it is option A"
    assert parse_answer(text, ("red", "blue")) == 0
    assert parse_answer(text, ("red", "blue"), is_truncated=True) is None
    assert parse_answer("B\n\nThe text does not mention", ("red", "blue"), is_truncated=True) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "finish_reason", "fix"),
    [
        ("<think> Okay, the question is whether it is option A", "length", 'extra_body={reasoning_effort="none"}'),
        ("", "length", "extra_body={max_completion_tokens=N}"),
        ("I cannot see\nthe image.", "stop", "use a model that responds with the letter of an option"),
    ],
)
def test_server_judge_that_chooses_no_option_is_reported(judged_record, text, finish_reason, fix):
    completion = make_completion(text)
    completion["choices"][0]["finish_reason"] = finish_reason
    with run_chat_server(lambda text, number: lambda handler: handler.send_json(completion)) as server:
        metric = sca_registry.metrics.build("judge", model=f"openai url={server.url}")
        with pytest.raises(ValueError, match="the judge 'stub' chose no option in 3 of 3 responses") as caught:
            metric([judged_record("a red car", COLOR_QUESTION)])
    assert fix in str(caught.value)
    assert "\n" not in str(caught.value)


# --- datasets

BOXES = ([4, 4, 20, 16], [24, 8, 40, 28])


def write_jsonl_benchmark(folder, *regions):
    lines = [{"image": "images/0.png", "box": box, **region} for box, region in zip(BOXES, regions, strict=True)]
    (folder / "mine.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return {"name": "jsonl", "file": str(folder / "mine.jsonl")}


def write_coco_benchmark(folder, *regions):
    annotations = [
        {"id": n, "image_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1], **region}
        for n, ((x1, y1, x2, y2), region) in enumerate(zip(BOXES, regions, strict=True))
    ]
    images = [{"id": 1, "file_name": "0.png", "width": SIZE[0], "height": SIZE[1]}]
    (folder / "mine.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return {"name": "coco-json", "annotations": str(folder / "mine.json"), "image_root": str(folder / "images")}


@pytest.mark.slow
@pytest.mark.parametrize("write_benchmark", [write_jsonl_benchmark, write_coco_benchmark])
def test_own_benchmark_may_have_regions_with_only_judge_questions(tmp_path, judge_folder, write_benchmark):
    pytest.importorskip("datasets", reason="requires the extra data")
    write_images(tmp_path / "images", 1)
    judged = {"attributes": {JUDGE_QUESTIONS: [COLOR_QUESTION]}}
    dataset = write_benchmark(tmp_path, judged, {**judged, "caption": "a red car"})
    options = {"judge.model": f"hf weights={judge_folder}", "tokenizer": "plain"}
    metrics = ["judge", "rouge-l"]
    report = sca.evaluate(
        "sca-tiny", dataset, metrics=metrics, metric_options=options, folder=tmp_path / "out", max_images=1
    )
    assert report.scores["judge/questions"] == 2
    counts = {each.name: each.num_samples for each in report.scoring.scores}
    assert (counts["judge/positive"], counts["rouge-l"]) == (2, 1)
    assert score_file(tmp_path / "out", metrics, options).scores == pytest.approx(report.scores, nan_ok=True)


# --- questions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [1, 0]}, "3 options and 2 scores"),
        ({"scores": [1, 0, 2]}, "has the score 2; choose from -1, 0, 0.5, 1"),
        ({"kind": "neutral"}, "is of kind 'neutral'; choose from positive, negative"),
        ({"text": " "}, "a question for the judge is empty"),
        ({"options": ["one"], "scores": [1]}, "1 options and 1 scores"),
        ({"options": "yes"}, "has the options 'yes'; expected a list of strings"),
        ({"options": [1, 2, 3]}, r"has the options \(1, 2, 3\); expected a list of strings"),
        ({"options": ["red", " ", "blue"]}, "has an empty option; set its text"),
        ({"scores": 1}, "has the scores 1; expected a list of numbers"),
        ({"scores": [True, False, -1]}, "has the score True; choose from -1, 0, 0.5, 1"),
        ({"text": 3}, "the text of a question for the judge is 3; expected a string"),
        ({"kind": 3}, "is of kind 3; choose from positive, negative"),
    ],
)
def test_judge_question_rejects_invalid_fields(change, message):
    fields = {
        key: tuple(value) if isinstance(value, list) else value for key, value in (COLOR_QUESTION | change).items()
    }
    with pytest.raises(ValueError, match=message):
        JudgeQuestion(**fields)


INVALID_QUESTIONS = ({"text": "?"}, COLOR_QUESTION | {"kind": "neutral"}, COLOR_QUESTION | {"extra": 1}, "?", 3, None)


@pytest.mark.parametrize("question", INVALID_QUESTIONS)
def test_judge_names_the_region_of_an_invalid_question(judge_folder, judged_record, question):
    record = judged_record("a car", COLOR_QUESTION, question, region=7)
    with pytest.raises(ValueError, match=r"region 7 of image 1: judge_questions\[1\]"):
        score_stored_records([record], ["judge"], {"judge.model": f"hf weights={judge_folder}"})


def test_invalid_questions_are_reported_before_the_predictions():
    for questions, message in (([COLOR_QUESTION | {"options": "yes"}], r"\[0\]: .* options 'yes'"), ("?", " is '?'")):
        region = Region(7, (0, 0, 4, 4), name="car", attributes={JUDGE_QUESTIONS: questions})
        dataset = SimpleNamespace(iter_annotations=lambda region=region: iter([(region,)]))
        with pytest.raises(ValueError, match=f"region 7: judge_questions{message}"):
            check_metric_needs(["judge"], dataset)
