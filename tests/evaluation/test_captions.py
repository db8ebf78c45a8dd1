"""Caption metrics: equal to pycocoevalcap, which is what everybody reports, and to cases worked by hand."""

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

WORDS = """
a the red blue small large man woman dog dogs running runs sitting on in of with car street grass sky tree trees's
don't white-striped (left) behind , . ! 2 shirt holding holds ball frisbee wearing hat
""".split()  # noqa: SIM905
needs_java = pytest.mark.skipif(bool(find_java_problem()), reason=str(find_java_problem()))


def drawn(count, seed=0):
    """Records of captions that are like their references, more or less."""
    draw = random.Random(seed)

    def sentence():
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 12)))

    records = []
    for number in range(count):
        references = [sentence() for _ in range(draw.randint(1, 4))]
        words = draw.choice(references).split()
        caption = " ".join(word if draw.random() < 0.7 else draw.choice(WORDS) for word in words)
        truth = {"phrases": references}
        records.append(
            {"image_id": number // 3, "region_id": number, "task": "caption", "caption": caption, "truth": truth}
        )
    return records


@pytest.fixture(scope="module", params=[300, pytest.param(5000, marks=pytest.mark.all)])
def records(request):
    return drawn(request.param)


@pytest.fixture(scope="module")
def reference(records):
    """What pycocoevalcap makes of them: tokenized captions and references."""
    captions = {r["region_id"]: [{"caption": r["caption"]}] for r in records}
    references = {r["region_id"]: [{"caption": each} for each in r["truth"]["phrases"]] for r in records}
    tokenizer = PTBTokenizer()
    return tokenizer.tokenize(references), tokenizer.tokenize(captions)


def scored(name, records, **options):
    return sca_registry.metrics.build(name, **options)(records)


@needs_java
@pytest.mark.slow
def test_words_are_those_of_pycocoevalcap(records, reference):
    references, captions = reference
    about, ours, theirs = tokenize_pairs(records, "any", tokenizer="ptb")
    assert ours == [captions[record["region_id"]][0] for record in about]
    assert theirs == [references[record["region_id"]] for record in about]


@needs_java
@pytest.mark.parametrize(("name", "theirs"), [("cider-d", Cider), ("rouge-l", Rouge)])
@pytest.mark.slow
def test_means_are_those_of_pycocoevalcap(records, reference, name, theirs):
    whole, single = theirs().compute_score(*reference)
    found = scored(name, records, tokenizer="ptb")
    assert found.values[name] == pytest.approx(whole, abs=1e-9)
    assert np.allclose(found.per_record[name], single, atol=1e-9)


@needs_java
@pytest.mark.slow
def test_bleu_is_that_of_pycocoevalcap(records, reference):
    whole, single = Bleu(4).compute_score(*reference, verbose=0)
    found = scored("bleu", records, tokenizer="ptb")
    assert list(found.values.values()) == pytest.approx(whole, abs=1e-9)
    for n in range(4):
        assert np.allclose(found.per_record[f"bleu-{n + 1}"], single[n], atol=1e-9)


@needs_java
@pytest.mark.slow
def test_meteor_is_that_of_pycocoevalcap(records, reference):
    program = Meteor()
    whole, single = program.compute_score(*reference)
    found = scored("meteor", records, tokenizer="ptb")
    assert found.values["meteor"] == pytest.approx(whole, abs=1e-4)
    assert np.allclose(found.per_record["meteor"], single, atol=1e-4)


def test_cider_without_the_d_is_the_mean_of_cosines():
    told = [("a b", ["a b"]), ("a c", ["d e", "a c c"]), ("", ["x y"])]
    records = [
        {"image_id": n, "region_id": n, "task": "caption", "caption": caption, "truth": {"phrases": references}}
        for n, (caption, references) in enumerate(told)
    ]
    found = scored("cider", records, tokenizer="plain").per_record["cider"]
    # a stands in the references of two regions of three, every other word in those of one
    rare, common = math.log(3), math.log(3 / 2)
    assert found[0] == pytest.approx(10 * 2 / 4)  # words and pairs are the same; nobody has three words in a row
    words = (common**2 + rare * 2 * rare) / (math.hypot(common, rare) * math.hypot(common, 2 * rare))
    pair = 1 / math.sqrt(2)  # "a c" of "a c" and "c c"
    assert found[1] == pytest.approx(10 * (0 + (words + pair) / 4) / 2)
    assert found[2] == 0


@pytest.mark.parametrize("name", ["bleu", "meteor", "cider-d", "rouge-l"])
@pytest.mark.slow
def test_the_score_of_resampled_regions_is_the_score_of_those_regions(name):
    if name == "meteor" and find_java_problem():
        pytest.skip(find_java_problem())
    records = drawn(40, seed=3)
    found = scored(name, records, tokenizer="plain")
    for score, (sums, groups) in get_bootstrap_inputs(found).items():
        everything = sums.compute_scores(sums.rows.sum(0))
        assert everything == pytest.approx(found.values[score], abs=1e-9)
        assert len(groups) == len(records)
        if name in ("bleu", "meteor"):  # of the others, rarity stays that of all regions
            some = [record for record in records if record["image_id"] % 2]
            rows = sums.rows[[record["image_id"] % 2 == 1 for record in records]]
            assert sums.compute_scores(rows.sum(0)) == pytest.approx(
                scored(name, some, tokenizer="plain").values[score], abs=1e-9
            )
        assert bootstrap_scores(ScoreStatistics(*sums), groups, num_resamples=10).shape == (10,)


def test_the_first_reference_is_all_that_counts_if_that_is_asked():
    record = {
        "image_id": 1,
        "region_id": 1,
        "task": "caption",
        "caption": "a dog",
        "truth": {"phrases": ["a cat", "a dog"]},
    }
    assert scored("rouge-l", [record], tokenizer="plain").values["rouge-l"] == 1
    assert scored("rouge-l", [record], tokenizer="plain", references="first").values["rouge-l"] == pytest.approx(0.5)


@pytest.mark.parametrize("tokenizer", ["plain", pytest.param("ptb", marks=needs_java)])
@pytest.mark.slow
def test_text_of_any_kind_keeps_its_place(tokenizer):
    texts = ("two\nlines", "", "a \u2028 b", "dog 😀 cat", "tab\tand\x0bmore", " ", "||| bars |||", "\u00e9t\u00e9")
    cut = tokenize_texts(texts, tokenizer)
    assert len(cut) == len(texts)
    assert cut[0] == "two lines"
    assert cut[1] == cut[5] == ""
    assert cut[2] == "a b"
    assert cut[4] == "tab and more"
    assert cut[7] == "\u00e9t\u00e9"
    assert not {word for text in cut for word in text.split()} & PUNCTUATION


@needs_java
@pytest.mark.slow
def test_meteor_takes_empty_captions_bars_and_emoji():
    told = [("", "a dog"), ("a ||| dog", "a dog"), ("a dog 😀", "a dog"), ("a\ndog", "a dog")]
    records = [
        {"image_id": n, "region_id": n, "task": "caption", "caption": caption, "truth": {"phrases": [reference]}}
        for n, (caption, reference) in enumerate(told)
    ]
    found = scored("meteor", records).per_record["meteor"]
    assert found[0] == 0
    assert found[3] == pytest.approx(1)
    assert (found[1:3] > 0.2).all()


@needs_java
@pytest.mark.slow
def test_meteor_program_is_kept_until_it_ends_or_a_call_is_interrupted(monkeypatch):
    expected = align_captions(["a dog"], [["a dog"]])
    kept = METEOR_PROGRAM._process
    assert np.array_equal(align_captions(["a dog"], [["a dog"]]), expected)
    assert METEOR_PROGRAM._process is kept

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(METEOR_PROGRAM, "_exchange_lines", interrupt)
        with pytest.raises(KeyboardInterrupt):
            align_captions(["a cat"], [["a dog"]])
    assert kept.poll() is not None
    assert np.array_equal(align_captions(["a dog"], [["a dog"]]), expected)
    with pytest.raises(ValueError, match="METEOR returned 0 results for 1 captions: "):
        METEOR_PROGRAM.score_lines(["no such command"])
    assert METEOR_PROGRAM._process is None


def test_wrong_words_for_the_protocol_are_refused():
    record = drawn(1)
    with pytest.raises(ValueError, match="no references 'best': there are all, first"):
        scored("cider", record, references="best")
    with pytest.raises(ValueError, match="no tokenizer 'spacy': there are ptb, plain"):
        scored("cider", record, tokenizer="spacy")


def test_without_java_the_metrics_that_need_it_say_so_and_the_others_run(monkeypatch):
    from sca.evaluation.scoring import score_records

    monkeypatch.setattr("shutil.which", lambda name: None)
    scored = score_records(drawn(5))
    assert {"cider", "cider-d", "bleu-1", "rouge-l"} <= set(scored.get_values())
    assert "needs Java" in scored.skipped_metrics["meteor"]
    assert {each.tokenizer for each in scored.scores if each.metric == "cider-d"} == {"plain"}
