"""The metric `judged-answers`: what the judge reads, scores by kind, orders of the options, and missing letters."""

import re

import pytest
import sca_registry
from chat_server import make_completion, run_chat_server

pytestmark = pytest.mark.slow  # connects to servers
PAIRS = [("the car is to the left of the house", "left of"), ("a red car", "car in front of house"), ("???", "dog")]


def make_record(*pairs, kinds=("simple", "detailed", "detailed")):
    questions = [
        {"text": f"Describe <region {index}>.", "kind": kind, "answer": answer}
        for index, ((_, answer), kind) in enumerate(zip(pairs, kinds, strict=False), 1)
    ]
    answers = [{"text": text, "score": -1.0} for text, _ in pairs]
    truth = {"box": [0, 0, 4, 4], "questions": questions}
    return {"image_id": 1, "region_id": 0, "task": "question", "control": None, "answers": answers, "truth": truth}


def make_fault(choose):
    """Return a fault of the chat server that responds with `choose(prompt, options by letter)`."""

    def send_letter(handler):
        text = handler.server.bodies[-1]["messages"][0]["content"]
        handler.send_json(make_completion(choose(text, dict(re.findall(r"^([A-Z])\. (.*)$", text, re.MULTILINE)))))

    return lambda text, number: send_letter


def find_letter(options, text):
    return next(letter for letter, option in options.items() if option == text)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "cache"))


def build_metric(server, **options):
    return sca_registry.metrics.build("judged-answers", model=f"openai url={server.url} max_concurrency=1", **options)


def test_judged_answers_are_scored_by_kind_from_question_answer_and_response():
    def choose_letter(text, options):
        return "???" if "???" in text else find_letter(options, "Yes" if "left of" in text else "No")

    with run_chat_server(make_fault(choose_letter)) as server:
        output = build_metric(server)([make_record(*PAIRS)])
    assert output.values == {
        "judged-answers/accuracy": pytest.approx(1 / 3),
        "judged-answers/simple": 1,
        "judged-answers/detailed": 0,
        "judged-answers/questions": 3,
        "judged-answers/unanswered": 2,
        "judged-answers/order-variance": 0,
    }
    assert len(server.bodies) == 6  # both orders of the options
    prompt = server.bodies[0]["messages"][0]["content"]
    for line in ("Request: Describe <region 1>.", "Correct answer: left of", f"Response: {PAIRS[0][0]}"):
        assert line in prompt.splitlines()


def test_judge_of_answers_that_always_chooses_a_letter_has_a_variance():
    with run_chat_server(make_fault(lambda text, options: "A")) as server:
        output = build_metric(server)([make_record(*PAIRS[:2])])
        first = build_metric(server, option_orders="first")([make_record(*PAIRS[:2])])
    assert output.values["judged-answers/order-variance"] == 0.25
    assert "judged-answers/order-variance" not in first.values
    assert first.values["judged-answers/accuracy"] == 1


def test_judged_answers_need_a_judge():
    with pytest.raises(ValueError, match=r"needs a judge; set judged-answers\.model=NAME"):
        sca_registry.metrics.build("judged-answers")
