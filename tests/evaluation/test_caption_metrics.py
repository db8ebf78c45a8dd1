"""Caption metrics equal pycocoevalcap, the common reference, and cases computed by hand."""

import math
import random

import numpy as np
import pytest
import sca_registry
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from sca.evaluation.bootstrap import ScoreStatistics, bootstrap_scores
from sca.evaluation.metrics.meteor import METEOR_PROGRAM, align_captions
from sca.evaluation.scoring import get_bootstrap_inputs
from sca.evaluation.tokenization import PUNCTUATION, find_java_problem, tokenize_pairs, tokenize_texts

VOCABULARY = """
a the red blue small large man woman dog dogs running runs sitting on in of with car street grass sky tree trees's
don't white-striped (left) behind , . ! 2 shirt holding holds ball frisbee wearing hat
""".split()  # noqa: SIM905
needs_java = pytest.mark.skipif(bool(find_java_problem()), reason=str(find_java_problem()))


def make_random_records(count, seed=0):
    """Return records of captions that resemble their references to different degrees."""
    rng = random.Random(seed)

    def make_sentence():
        return " ".join(rng.choice(VOCABULARY) for _ in range(rng.randint(1, 12)))

    records = []
    for number in range(count):
        references = [make_sentence() for _ in range(rng.randint(1, 4))]
        reference_words = rng.choice(references).split()
        caption = " ".join(word if rng.random() < 0.7 else rng.choice(VOCABULARY) for word in reference_words)
        truth = {"phrases": references}
        records.append(
            {"image_id": number // 3, "region_id": number, "task": "caption", "caption": caption, "truth": truth}
        )
    return records


@pytest.fixture(scope="module", params=[300, pytest.param(5000, marks=pytest.mark.all)])
def records(request):
    return make_random_records(request.param)


@pytest.fixture(scope="module")
def pycocoevalcap_tokens(records):
    """Tokenize captions and references with pycocoevalcap."""
    captions = {record["region_id"]: [{"caption": record["caption"]}] for record in records}
    references = {
        record["region_id"]: [{"caption": phrase} for phrase in record["truth"]["phrases"]] for record in records
    }
    tokenizer = PTBTokenizer()
    return tokenizer.tokenize(references), tokenizer.tokenize(captions)


def compute_metric(name, records, **options):
    return sca_registry.metrics.build(name, **options)(records)


@needs_java
@pytest.mark.slow
def test_ptb_tokenizer_matches_pycocoevalcap(records, pycocoevalcap_tokens):
    references, captions = pycocoevalcap_tokens
    tokenized_records, caption_texts, reference_texts = tokenize_pairs(records, "any", tokenizer="ptb")
    assert caption_texts == [captions[record["region_id"]][0] for record in tokenized_records]
    assert reference_texts == [references[record["region_id"]] for record in tokenized_records]


@needs_java
@pytest.mark.parametrize(("name", "scorer"), [("cider-d", Cider), ("rouge-l", Rouge)])
@pytest.mark.slow
def test_cider_d_and_rouge_l_match_pycocoevalcap(records, pycocoevalcap_tokens, name, scorer):
    expected_mean, expected_per_record = scorer().compute_score(*pycocoevalcap_tokens)
    output = compute_metric(name, records, tokenizer="ptb")
    assert output.values[name] == pytest.approx(expected_mean, abs=1e-9)
    assert np.allclose(output.per_record[name], expected_per_record, atol=1e-9)


@needs_java
@pytest.mark.slow
def test_bleu_matches_pycocoevalcap(records, pycocoevalcap_tokens):
    expected_means, expected_per_record = Bleu(4).compute_score(*pycocoevalcap_tokens, verbose=0)
    output = compute_metric("bleu", records, tokenizer="ptb")
    assert list(output.values.values()) == pytest.approx(expected_means, abs=1e-9)
    for n in range(4):
        assert np.allclose(output.per_record[f"bleu-{n + 1}"], expected_per_record[n], atol=1e-9)


@needs_java
@pytest.mark.slow
def test_meteor_matches_pycocoevalcap(records, pycocoevalcap_tokens):
    program = Meteor()
    expected_mean, expected_per_record = program.compute_score(*pycocoevalcap_tokens)
    output = compute_metric("meteor", records, tokenizer="ptb")
    assert output.values["meteor"] == pytest.approx(expected_mean, abs=1e-4)
    assert np.allclose(output.per_record["meteor"], expected_per_record, atol=1e-4)


def test_cider_is_the_mean_of_cosines():
    captions_and_references = [("a b", ["a b"]), ("a c", ["d e", "a c c"]), ("", ["x y"])]
    records = [
        {"image_id": n, "region_id": n, "task": "caption", "caption": caption, "truth": {"phrases": references}}
        for n, (caption, references) in enumerate(captions_and_references)
    ]
    scores = compute_metric("cider", records, tokenizer="plain").per_record["cider"]
    # "a" occurs in the references of two of three regions, every other word in those of one
    rare_idf, common_idf = math.log(3), math.log(3 / 2)
    assert scores[0] == pytest.approx(10 * 2 / 4)  # equal unigrams and bigrams; no caption has a trigram
    unigram_cosine = (common_idf**2 + rare_idf * 2 * rare_idf) / (
        math.hypot(common_idf, rare_idf) * math.hypot(common_idf, 2 * rare_idf)
    )
    bigram_cosine = 1 / math.sqrt(2)  # "a c" of "a c" and "c c"
    assert scores[1] == pytest.approx(10 * (0 + (unigram_cosine + bigram_cosine) / 4) / 2)
    assert scores[2] == 0


@pytest.mark.parametrize("name", ["bleu", "meteor", "cider-d", "rouge-l"])
@pytest.mark.slow
def test_bootstrap_inputs_of_subset_give_scores_of_subset(name):
    if name == "meteor" and find_java_problem():
        pytest.skip(find_java_problem())
    records = make_random_records(40, seed=3)
    output = compute_metric(name, records, tokenizer="plain")
    for score, (statistics, groups) in get_bootstrap_inputs(output).items():
        total = statistics.compute_scores(statistics.rows.sum(0))
        assert total == pytest.approx(output.values[score], abs=1e-9)
        assert len(groups) == len(records)
        if name in ("bleu", "meteor"):  # document frequencies of the others are still those of all regions
            subset = [record for record in records if record["image_id"] % 2]
            rows = statistics.rows[[record["image_id"] % 2 == 1 for record in records]]
            assert statistics.compute_scores(rows.sum(0)) == pytest.approx(
                compute_metric(name, subset, tokenizer="plain").values[score], abs=1e-9
            )
        assert bootstrap_scores(ScoreStatistics(*statistics), groups, num_resamples=10).shape == (10,)


def test_rouge_l_can_use_only_the_first_reference():
    record = {
        "image_id": 1,
        "region_id": 1,
        "task": "caption",
        "caption": "a dog",
        "truth": {"phrases": ["a cat", "a dog"]},
    }
    assert compute_metric("rouge-l", [record], tokenizer="plain").values["rouge-l"] == 1
    assert compute_metric("rouge-l", [record], tokenizer="plain", references="first").values[
        "rouge-l"
    ] == pytest.approx(0.5)


@pytest.mark.parametrize("tokenizer", ["plain", pytest.param("ptb", marks=needs_java)])
@pytest.mark.slow
def test_tokenize_texts_returns_one_line_per_text_in_order(tokenizer):
    texts = ("two\nlines", "", "a \u2028 b", "dog 😀 cat", "tab\tand\x0bmore", " ", "||| bars |||", "\u00e9t\u00e9")
    tokenized = tokenize_texts(texts, tokenizer)
    assert len(tokenized) == len(texts)
    assert tokenized[0] == "two lines"
    assert tokenized[1] == tokenized[5] == ""
    assert tokenized[2] == "a b"
    assert tokenized[4] == "tab and more"
    assert tokenized[7] == "\u00e9t\u00e9"
    assert not {word for text in tokenized for word in text.split()} & PUNCTUATION


@needs_java
@pytest.mark.slow
def test_meteor_accepts_empty_captions_bars_and_emoji():
    captions_and_references = [("", "a dog"), ("a ||| dog", "a dog"), ("a dog 😀", "a dog"), ("a\ndog", "a dog")]
    records = [
        {"image_id": n, "region_id": n, "task": "caption", "caption": caption, "truth": {"phrases": [reference]}}
        for n, (caption, reference) in enumerate(captions_and_references)
    ]
    scores = compute_metric("meteor", records).per_record["meteor"]
    assert scores[0] == 0
    assert scores[3] == pytest.approx(1)
    assert (scores[1:3] > 0.2).all()


@needs_java
@pytest.mark.slow
def test_meteor_program_is_reused_until_it_ends_or_is_interrupted(monkeypatch):
    expected = align_captions(["a dog"], [["a dog"]])
    process = METEOR_PROGRAM._process
    assert np.array_equal(align_captions(["a dog"], [["a dog"]]), expected)
    assert METEOR_PROGRAM._process is process

    def raise_keyboard_interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(METEOR_PROGRAM, "_exchange_lines", raise_keyboard_interrupt)
        with pytest.raises(KeyboardInterrupt):
            align_captions(["a cat"], [["a dog"]])
    assert process.poll() is not None
    assert np.array_equal(align_captions(["a dog"], [["a dog"]]), expected)
    with pytest.raises(ValueError, match="METEOR returned 0 results for 1 captions: "):
        METEOR_PROGRAM.score_lines(["no such command"])
    assert METEOR_PROGRAM._process is None


def test_cider_rejects_unknown_references_and_tokenizer():
    records_of_one_caption = make_random_records(1)
    with pytest.raises(ValueError, match="unknown references 'best'; choose from all, first"):
        compute_metric("cider", records_of_one_caption, references="best")
    with pytest.raises(ValueError, match="unknown tokenizer 'spacy'; choose from ptb, plain"):
        compute_metric("cider", records_of_one_caption, tokenizer="spacy")


def test_score_records_skips_java_metrics_without_java(monkeypatch):
    from sca.evaluation.scoring import score_records

    monkeypatch.setattr("shutil.which", lambda name: None)
    report = score_records(make_random_records(5))
    assert {"cider", "cider-d", "bleu-1", "rouge-l"} <= set(report.get_values())
    assert "needs Java" in report.skipped_metrics["meteor"]
    assert {score.tokenizer for score in report.scores if score.metric == "cider-d"} == {"plain"}
