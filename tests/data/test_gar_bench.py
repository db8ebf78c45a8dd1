"""Questions of GAR-Bench: regions, references and invalid files."""

import json
from dataclasses import replace

import pytest
import sca_registry
from judged_benchmarks import make_mask, write_gar_bench, write_judge
from sca_registry import RegistryError

import sca
from sca.data.gar_bench import GarBenchQuestions
from sca.evaluation.protocol import read_protocol
from sca.io.errors import InputError

pytest.importorskip("datasets", reason="requires the extra data")


def test_gar_bench_reads_a_question_with_references_to_its_masks(tmp_path):
    dataset = GarBenchQuestions("test", write_gar_bench(tmp_path / "annotations").parent)
    assert not dataset.skipped
    first, second = dataset
    assert [(region.id, region.name, region.mask) for region in second.regions] == [
        (0, None, make_mask(4, 4, 20, 16)),
        (1, None, make_mask(24, 8, 40, 28)),
    ]
    (question,) = second.questions
    assert question.text.startswith(
        "What is the relation of <region 2> and <region 1>? Options: A. <region 2> is right of"
    )
    assert (question.answer, question.kind, question.region_ids) == ("A", "relation", (0, 1))
    assert first.questions[0].text.count("<region 1>") == 1


@pytest.mark.parametrize(
    ("part", "text", "answer"),
    [
        ("simple", "What is the relation of <region 1> and <region 2>?", "left of"),
        (
            "detailed",
            "Describe <region 1> in detail, including the relationship with <region 2>.",
            "car in front of house",
        ),
    ],
)
def test_gar_bench_reads_requests_for_captions(tmp_path, part, text, answer):
    (sample,) = GarBenchQuestions("test", write_gar_bench(tmp_path), part=part)
    assert len(sample.regions) == 2
    (question,) = sample.questions
    assert (question.text, question.answer, question.kind, question.region_ids) == (text, answer, part, (0, 1))


def test_gar_bench_rejects_an_unknown_part_and_an_empty_relation(tmp_path):
    path = write_gar_bench(tmp_path) / "GAR-Bench-Caption-Detailed.json"
    with pytest.raises(RegistryError, match=r"part is 'caption'.*vqa, simple, detailed"):
        GarBenchQuestions("test", tmp_path, part="caption")
    (record,) = json.loads(path.read_text())
    path.write_text(json.dumps([record | {"predicate_name": " "}]))
    with pytest.raises(InputError, match="the subject, predicate or object is empty; remove the record"):
        GarBenchQuestions("test", tmp_path, part="detailed")


@pytest.mark.slow
def test_gar_bench_captions_are_judged(tmp_path, build_small_model):
    language_model = {"name": "tiny-gpt2", "hidden_size": 32, "depth": 1, "num_heads": 2, "max_positions": 1024}
    model = build_small_model(questions=True, language_model=language_model)
    root, judge = write_gar_bench(tmp_path / "gar"), write_judge(tmp_path / "judge")
    for run in read_protocol("gar-bench-captions").runs:
        report = sca.evaluate(
            model,
            {"name": run.dataset, "root": root, **run.dataset_options},
            run.split,
            prompting=replace(run.prompting, generation={"max_new_tokens": 8}),
            metrics=["judged-answers"],
            metric_options={"judged-answers.model": f"hf weights={judge}"},
        )
        assert report.scores["judged-answers/questions"] == 1
        assert report.scores["judged-answers/accuracy"] == report.scores[f"judged-answers/{run.name}"]


@pytest.mark.slow
def test_gar_bench_protocol_measures_the_accuracy_by_type(tmp_path, build_small_model):
    language_model = {"name": "tiny-gpt2", "hidden_size": 32, "depth": 1, "num_heads": 2, "max_positions": 1024}
    model = build_small_model(questions=True, language_model=language_model)
    (run,) = read_protocol("gar-bench").runs
    report = sca.evaluate(
        model,
        {"name": run.dataset, "root": write_gar_bench(tmp_path)},
        run.split,
        prompting=run.prompting,
        metrics=["questions"],
    )
    assert report.scores["questions/questions"] == 2
    assert {"questions/color", "questions/relation"} <= report.scores.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_rles": []}, "mask_rles is empty; remove the question"),
        ({"mask_rles": [{"size": [0, 4], "counts": "0"}]}, r"has the size \[0, 4\]; expected its height and width"),
        ({"choices": ["A. red"]}, "'choices' is .*; expected a list of 2 or more strings"),
        ({"question": "What is <Prompt3>?"}, "refers to <region 4>, but the number of its regions is 1"),
        ({"answer": " "}, "a question or its answer is empty"),
        ({"image": "images/9.png"}, r"image missing: 1, such as images/9\.png"),
    ],
)
def test_gar_bench_rejects_invalid_questions(tmp_path, change, message):
    path = write_gar_bench(tmp_path) / "GAR-Bench-VQA.json"
    records = json.loads(path.read_text())
    path.write_text(json.dumps([records[0] | change, records[1]]))
    with pytest.raises(InputError, match=message):
        sca_registry.datasets.get("gar-bench-questions")("test", tmp_path)


def test_gar_bench_reports_missing_files_and_splits(tmp_path):
    with pytest.raises(InputError, match=r"no GAR-Bench-VQA\.json in .* or .*annotations; set root=FOLDER"):
        GarBenchQuestions("test", tmp_path)
    with pytest.raises(InputError, match="no split 'val'; use test"):
        GarBenchQuestions("val", write_gar_bench(tmp_path))
