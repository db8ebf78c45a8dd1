"""Questions of GAR-Bench: regions, references and invalid files."""

import json

import pytest
import sca_registry
from judged_benchmarks import make_mask, write_gar_bench

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
