"""Files of DLC-Bench and ParaDLC-Bench: regions, questions for the judge, and incomplete benchmarks."""

import json

import pytest
from judged_benchmarks import make_mask, write_dlc_bench, write_paradlc_bench
from sca_registry.contracts import JUDGE_QUESTIONS

from sca.data.dlc_bench import DlcBench
from sca.io.errors import InputError

pytest.importorskip("datasets", reason="requires the extra data")


EMPTY_MASK = make_mask(0, 0, 0, 0)


def edit_json(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_dlc_bench_reads_masks_class_names_and_questions(tmp_path):
    dataset = DlcBench("test", write_dlc_bench(tmp_path))
    assert not dataset.skipped
    first, second = dataset
    assert [(sample.image_id, [region.id for region in sample.regions]) for sample in dataset] == [
        (10, [2391781]),
        (11, [2391782]),
    ]
    (region,) = first.regions
    assert (region.name, region.phrases, region.box) == ("car", (), (4, 4, 20, 16))
    assert region.mask == second.regions[0].mask == make_mask(4, 4, 20, 16)
    positive, negative = region.attributes[JUDGE_QUESTIONS]
    assert positive["scores"] == [1, 0, -1]
    assert negative == {
        "text": "Which of these statements fits the description?",
        "options": ["Wheels are mentioned.", "Wheels are not mentioned."],
        "scores": [-1, 1],
        "kind": "negative",
    }


@pytest.mark.parametrize("folder", ["", "annotations"])
def test_paradlc_bench_reads_several_regions_per_image(tmp_path, folder):
    write_paradlc_bench(tmp_path / folder)
    samples = [*DlcBench("test", tmp_path)]
    assert [(sample.image_id, [region.id for region in sample.regions]) for sample in samples] == [
        (1592437, [0, 10]),
        (1592438, [0, 10]),
    ]
    assert samples[0].regions[1].box == (24, 8, 40, 28)
    assert len(samples[0].regions[1].attributes[JUDGE_QUESTIONS]) == 2


def test_max_bad_records_permits_an_incomplete_benchmark(tmp_path):
    write_dlc_bench(tmp_path)
    edit_json(tmp_path / "qa.json", lambda content: content.update({"7": content.pop("2391782")}))
    dataset = DlcBench("test", tmp_path, max_bad_records=2)
    assert len(dataset) == 1
    assert dataset.skipped["unusable region"] == 2
    with pytest.raises(InputError, match=r"2 regions of .* cannot be used, more than max_bad_records=1"):
        DlcBench("test", tmp_path, max_bad_records=1)


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("qa.json", lambda c: c["2391781"][0].update(type="neutral"), r"2391781\[0\]: .* is of kind 'neutral'"),
        (
            "qa.json",
            lambda c: c["2391781"][1].update(choices=["yes", "no"]),
            "choice 'yes' is not a list of a text and",
        ),
        ("qa.json", lambda c: c.pop("2391782"), "qa.json has no questions of 2391782"),
        ("qa.json", lambda c: c.update({"2391782": []}), "qa.json has no questions of 2391782"),
        ("qa.json", lambda c: c.update({"2391782": {"a": 1}}), "'2391782' is {'a': 1}; expected a list"),
        ("qa.json", lambda c: c.update({"7": c["2391782"]}), "qa.json: 7 is not a region of .*annotations.json"),
        ("annotations.json", lambda c: c["annotations"][0].update(segmentation=EMPTY_MASK), "the mask is empty"),
        ("class_names.json", lambda c: c.pop("2391782"), "class_names.json: no '2391782'"),
        ("annotations.json", lambda c: c["annotations"][0].update(image_id=9), "image_id 9 is not among the images"),
        ("annotations.json", lambda c: c["images"][0].update(file_name="x.png"), "image missing: 1, such as x.png"),
    ],
)
def test_incomplete_benchmark_is_rejected(tmp_path, file, edit, message):
    write_dlc_bench(tmp_path)
    edit_json(tmp_path / file, edit)
    with pytest.raises(InputError, match=message):
        DlcBench("test", tmp_path)


def test_dlc_bench_reports_missing_files_and_splits(tmp_path):
    write_dlc_bench(tmp_path)
    with pytest.raises(InputError, match="no split 'val'; use test"):
        DlcBench("val", tmp_path)
    (tmp_path / "qa.json").unlink()
    with pytest.raises(InputError, match=r"no qa\.json next to .*annotations\.json; copy it from the benchmark"):
        DlcBench("test", tmp_path)
    with pytest.raises(InputError, match=r"missing: .*annotations\.json"):
        DlcBench("test", tmp_path / "images")
