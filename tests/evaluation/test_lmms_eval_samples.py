"""Samples of lmms-eval: their format, and a run of lmms-eval with the adapter in plugins/sca-lmms-eval."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from tool_environment import create_tool_environment

from sca.data.scenes import Scenes
from sca.evaluation.evaluate import score_file
from sca.evaluation.predictions_file import read_predictions
from sca.io.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
TASK = """dataset_path: parquet
dataset_kwargs:
  data_files:
    val: {file}
task: local_refcoco
test_split: val
output_type: generate_until
doc_to_visual: !function utils.refcoco_bbox_doc_to_visual
doc_to_text: !function utils.refcoco_doc_to_text
doc_to_target: "answer"
generation_kwargs:
  until:
    - "ASSISTANT:"
process_results: !function utils.refcoco_process_result
metric_list:
  - metric: refcoco_CIDEr
    aggregation: !function utils.refcoco_cider
    higher_is_better: true
metadata:
  version: "0.0"
"""


def make_sample(doc_id, text, answer=("the red car",), **fields):
    """Return a sample of a RefCOCO task as lmms-eval 0.7 logs it, without most of its metrics."""
    answer = list(answer)
    result = {"answer": answer, "pred": text, "ann_id": f"q{doc_id}"}
    sample = {"doc_id": doc_id, "target": str(answer), "filtered_resps": text, "token_counts": [None], "doc_hash": "7f"}
    return {**sample, "refcoco_CIDEr": result, "input": "Provide a short description for this region.", **fields}


def write_samples(path, *samples):
    path.write_text("".join(f"{json.dumps(sample)}\n" for sample in samples))
    return path


def test_read_predictions_reads_samples_of_lmms_eval(tmp_path):
    names = ["COCO_train2014_000000380440_0.jpg", "/data/COCO_val2014_000000000007.jpg", "a.png"]
    answers = ["a car", 'it\'s "it"']
    samples = [make_sample(index, f"car {index}", answers, input_media=[name]) for index, name in enumerate(names)]
    samples.append(make_sample(3, "car 3", target="a car"))
    records = read_predictions(write_samples(tmp_path / "samples.jsonl", *samples)).records
    assert [(each["image_id"], each["region_id"]) for each in records] == [(380440, 0), (7, 1), (2, 2), (3, 3)]
    assert [each["caption"] for each in records] == ["car 0", "car 1", "car 2", "car 3"]
    assert [each["references"] for each in records] == [answers, answers, answers, ["a car"]]
    assert {each["task"] for each in records} == {"caption"}


def test_response_may_be_a_list_of_one_text(tmp_path):
    path = write_samples(tmp_path / "samples.jsonl", make_sample(0, ["a red car"]))
    assert [each["caption"] for each in read_predictions(path).records] == ["a red car"]


def test_score_file_scores_samples_of_lmms_eval(tmp_path):
    samples = [make_sample(number, text) for number, text in enumerate(["the red car", "nothing at all"])]
    path = write_samples(tmp_path / "samples.jsonl", *samples)
    report = score_file(path, ["bleu"], {"tokenizer": "plain"})
    assert report.scores["bleu-1"] == pytest.approx(0.5)


INVALID_SAMPLES = {
    "several responses": ({"filtered_resps": ["a", "b"]}, "'filtered_resps' is ['a', 'b']; expected a string"),
    "no text": ({"filtered_resps": [3]}, "'filtered_resps' is 3; expected a string"),
    "a number": ({"target": 3}, "'target' is 3; expected a string"),
    "no list": ({"target": "[a car"}, "'target' is '[a car'; expected a list of references"),
    "numbers": ({"target": "[1, 2]"}, "'target' is '[1, 2]'; expected a list of references"),
    "no id": ({"doc_id": "x"}, "'doc_id' is 'x'; expected an integer"),
}


@pytest.mark.parametrize("case_name", INVALID_SAMPLES)
def test_read_predictions_rejects_invalid_samples_in_one_line(tmp_path, case_name):
    fields, message = INVALID_SAMPLES[case_name]
    path = write_samples(tmp_path / "samples.jsonl", make_sample(0, "x"), {**make_sample(1, "x"), **fields})
    with pytest.raises(InputError) as error_info:
        read_predictions(path)
    assert message in str(error_info.value)
    assert "samples.jsonl, line 2" in str(error_info.value)
    assert "\n" not in str(error_info.value)


def write_task(folder, num_regions):
    """Write a task with regions in the layout of lmms-eval's RefCOCO, and return each image file with its boxes."""
    datasets = pytest.importorskip("datasets", reason="the extra data is not installed")
    rows, boxes_by_file = [], {}
    for index, sample in enumerate(Scenes("test", num_images=num_regions, image_size=128)):
        path = folder / f"COCO_train2014_{index:012d}.png"
        sample.image.save(path)
        for region in sample.regions[: num_regions - len(rows)]:
            x1, y1, x2, y2 = region.box
            boxes_by_file.setdefault(path, []).append(region.box)
            row = {"question_id": str(region.id), "image": {"path": None, "bytes": path.read_bytes()}}
            row |= {"question": "Please carefully observe the area circled in the image.", "iscrowd": 0}
            row |= {"answer": list(region.phrases), "bbox": [x1, y1, x2 - x1, y2 - y1]}
            rows.append(row | {"segmentation": [x1, y1, x2, y1, x2, y2, x1, y2], "file_name": path.name})
        if len(rows) == num_regions:
            break
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(folder / "val.parquet")
    (folder / "utils.py").write_text("from lmms_eval.tasks.refcoco.utils import *  # noqa: F403\n")
    (folder / "local_refcoco.yaml").write_text(TASK.format(file=folder / "val.parquet"))
    return boxes_by_file


def caption_boxes(boxes_by_file, prompts_file):
    """Return the captions that `sca caption` writes for boxes of images."""
    prompts = [{"image": str(path), "box": box} for path, boxes in boxes_by_file.items() for box in boxes]
    prompts_file.write_text("".join(f"{json.dumps(prompt)}\n" for prompt in prompts))
    command = [sys.executable, "-m", "sca", "caption", *boxes_by_file, "--prompts", prompts_file, "--out", "-"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [json.loads(line)["caption"] for line in lines]


@pytest.mark.all
def test_lmms_eval_returns_the_texts_of_sca_caption(tmp_path, tmp_path_factory):
    site_packages = sysconfig.get_path("purelib")  # torch and transformers of this environment are used
    interpreter = create_tool_environment(
        tmp_path_factory.mktemp("lmms-eval"),
        "lmms-eval",
        ROOT / "plugins/sca-lmms-eval",
        path_file=f"import site; site.addsitedir({site_packages!r})\n",
    )
    task_folder = tmp_path / "task"
    task_folder.mkdir()
    boxes_by_file = write_task(task_folder, 20)
    arguments = ["--model", "sca", "--model_args", "model=sca-tiny", "--device", "cpu", "--batch_size", "8"]
    arguments += ["--tasks", "local_refcoco", "--include_path", task_folder, "--log_samples", "--predict_only"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [interpreter, "-m", "lmms_eval", *arguments, "--output_path", tmp_path / "out"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    (samples_file,) = (tmp_path / "out").rglob("*_samples_local_refcoco.jsonl")
    records = read_predictions(samples_file).records
    assert len(records) == 20
    expected = caption_boxes(boxes_by_file, tmp_path / "prompts.jsonl")
    assert [record["caption"] for record in sorted(records, key=lambda each: each["region_id"])] == expected
    command = [sys.executable, "-m", "sca", "score", samples_file, "--metrics", "bleu", "tokenizer=plain"]
    scored = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["scores"]
