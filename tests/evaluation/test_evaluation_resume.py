"""Predictions are on disk at once, and a killed evaluation resumes with the same result."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from sca.data.scenes import Scenes
from sca.evaluation import evaluate as evaluation
from sca.evaluation.evaluate import evaluate, score_file
from sca.evaluation.predictions import PromptingOptions
from sca.evaluation.predictions_file import PREDICTIONS_NAME, read_predictions
from sca.io import journal
from sca.io.errors import DifferentRunError, InputError, OutputError

EVALUATION_SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
from sca.evaluation.evaluate import evaluate
print("ready", flush=True)
dataset = {"name": "scenes", "num_images": 24}
evaluate("sca-tiny", dataset, "val", batch_size=3, metrics=["attributes"], folder=sys.argv[1])
"""


@pytest.fixture
def dataset():
    return Scenes("val", num_images=7)


def count_lines(file):
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def read_prediction_lines(folder):
    return [json.loads(line) for line in (folder / PREDICTIONS_NAME).read_text().splitlines()]


def test_predictions_file_starts_with_run_and_ends_with_summary(make_oracle_captioner, dataset, tmp_path):
    report = evaluate(make_oracle_captioner(dataset), dataset, batch_size=2, folder=tmp_path, metrics=["class"])
    run, *records, last = read_prediction_lines(tmp_path)
    assert run["run"]["dataset"] == "Scenes"
    assert run["run"]["num_images"] == last["summary"]["num_images"] == 7
    assert last["summary"]["num_records"] == len(records) == len(report.records)
    assert [record["index"] for record in records] == sorted(record["index"] for record in records)


def test_evaluate_writes_predictions_before_the_next_batch(make_oracle_captioner, dataset, tmp_path):
    record_counts = []

    class CountingCaptioner(type(make_oracle_captioner(dataset))):
        def caption(self, image, prompts, task="caption"):
            record_counts.append(
                sum(line.startswith('{"index"') for line in (tmp_path / PREDICTIONS_NAME).read_text().splitlines())
            )
            return super().caption(image, prompts, task)

    evaluate(CountingCaptioner(dataset), dataset, batch_size=1, folder=tmp_path, metrics=["class"])
    records_per_image = [2 * len(sample.regions) for sample in dataset]
    assert record_counts == [sum(records_per_image[:image]) for image in range(7) for _ in ("caption", "recognition")]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_evaluate_resumes_stopped_run(make_oracle_captioner, dataset, tmp_path, batch_size):
    """Only the records of a truncated line are predicted again."""
    uninterrupted, stopped = tmp_path / "whole", tmp_path / "cut"
    uninterrupted.mkdir()
    stopped.mkdir()
    evaluate(make_oracle_captioner(dataset), dataset, batch_size=2, folder=uninterrupted, metrics=["class"])
    captioned_images = []

    class FailingCaptioner(type(make_oracle_captioner(dataset))):
        calls_left = 8

        def caption(self, image, prompts, task="caption"):
            captioned_images.append(image.tobytes())
            type(self).calls_left -= 1
            if not type(self).calls_left:
                raise RuntimeError("tired")
            return super().caption(image, prompts, task)

    captioner = FailingCaptioner(dataset)
    with pytest.raises(RuntimeError):
        evaluate(captioner, dataset, batch_size=2, folder=stopped, metrics=["class"])
    with pytest.raises(InputError, match=r"unfinished run with \d+ records; evaluate into the same folder"):
        score_file(stopped)
    with (stopped / PREDICTIONS_NAME).open("ab") as file:
        file.write(b'{"index": 6, "image_id": 12, "reg')
    type(captioner).calls_left = 1000
    num_calls_before = len(captioned_images)
    evaluate(captioner, dataset, batch_size=batch_size, folder=stopped, metrics=["class"])
    _, *records, end = read_prediction_lines(stopped)
    assert [records, end] == [read_prediction_lines(uninterrupted)[1:-1], read_prediction_lines(uninterrupted)[-1]]
    assert len(captioned_images) - num_calls_before < 2 * len(dataset)  # not all of them again
    captioned_images.clear()
    evaluate(captioner, dataset, batch_size=batch_size, folder=stopped, metrics=["class"])
    assert not captioned_images  # all records are complete


@pytest.mark.parametrize("num_kills", [1, pytest.param(20, marks=pytest.mark.all)])
@pytest.mark.slow
def test_evaluate_killed_repeatedly_ends_with_the_same_predictions(tmp_path, num_kills):
    uninterrupted, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (uninterrupted, killed):
        folder.mkdir()
    subprocess.run([sys.executable, "-c", EVALUATION_SCRIPT, uninterrupted], check=True, capture_output=True)
    rng, num_killed = random.Random(0), 0
    for _ in range(num_kills):
        lines_before = count_lines(killed / PREDICTIONS_NAME)
        child = subprocess.Popen(
            [sys.executable, "-c", EVALUATION_SCRIPT, killed], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        child.stdout.readline()
        lines_before_kill = lines_before + rng.randrange(20)
        while child.poll() is None and count_lines(killed / PREDICTIONS_NAME) < lines_before_kill:
            time.sleep(0.001)
        if child.poll() is None:
            num_killed += 1
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        child.stdout.close()
        if (killed / PREDICTIONS_NAME).is_file() and '"summary"' in (killed / PREDICTIONS_NAME).read_text():
            assert (killed / PREDICTIONS_NAME).read_bytes() == (uninterrupted / PREDICTIONS_NAME).read_bytes()
            (killed / PREDICTIONS_NAME).unlink()  # again from the beginning
    assert num_killed
    subprocess.run([sys.executable, "-c", EVALUATION_SCRIPT, killed], check=True, capture_output=True)
    assert (killed / PREDICTIONS_NAME).read_bytes() == (uninterrupted / PREDICTIONS_NAME).read_bytes()
    records = read_predictions(killed).records
    assert len({(each["region_id"], each["task"]) for each in records}) == len(records)


@pytest.mark.all
def test_evaluate_in_two_processes_writes_the_same_predictions(tmp_path):
    single_process, two_processes = tmp_path / "one", tmp_path / "two"
    for folder in (single_process, two_processes):
        folder.mkdir()
    subprocess.run([sys.executable, "-c", EVALUATION_SCRIPT, single_process], check=True, capture_output=True)
    (tmp_path / "run.py").write_text(EVALUATION_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", tmp_path / "run.py", two_processes]
    completed = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    assert read_prediction_lines(two_processes) == read_prediction_lines(single_process)
    assert sorted(path.name for path in two_processes.iterdir()) == [PREDICTIONS_NAME, "sca-run.json"]


def test_evaluate_rejects_folder_of_another_run(make_oracle_captioner, dataset, tmp_path):
    evaluate(make_oracle_captioner(dataset), dataset, folder=tmp_path, metrics=["class"])
    original_bytes = (tmp_path / PREDICTIONS_NAME).read_bytes()
    with pytest.raises(
        DifferentRunError, match=r"a different run .*prompt_type: \"box\" there, \"center\" now.*a different folder"
    ):
        evaluate(make_oracle_captioner(dataset), dataset, folder=tmp_path, prompting=PromptingOptions("center"))
    assert (tmp_path / PREDICTIONS_NAME).read_bytes() == original_bytes
    (tmp_path / PREDICTIONS_NAME).write_text('{"image_id": 1}\n')
    with pytest.raises(InputError, match="was not written by `sca evaluate`"):
        evaluate(make_oracle_captioner(dataset), dataset, folder=tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "content", ['{"image_id": 1}', '{"image_id": 1, "reg', '{"image_id": 1}\n', '{"run": 5}\n', "notes"]
)
@pytest.mark.slow
def test_evaluate_keeps_handmade_predictions_unchanged(make_oracle_captioner, dataset, tmp_path, content, overwrite):
    evaluate(make_oracle_captioner(dataset), dataset, folder=tmp_path, metrics=["class"])
    (tmp_path / "predictions.1.jsonl").write_text(content)
    original_files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"predictions\.1\.jsonl"):
        evaluate(
            make_oracle_captioner(dataset),
            dataset,
            folder=tmp_path,
            prompting=PromptingOptions("center"),
            overwrite=overwrite,
        )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == original_files


def test_evaluate_overwrite_rejects_foreign_file_before_deleting(make_oracle_captioner, dataset, tmp_path):
    evaluate(make_oracle_captioner(dataset), dataset, folder=tmp_path, metrics=["class"])
    original_bytes = (tmp_path / PREDICTIONS_NAME).read_bytes()
    (tmp_path / "sca-run.json").unlink()
    with pytest.raises(OutputError, match="was not written by"):
        evaluate(
            make_oracle_captioner(dataset),
            dataset,
            folder=tmp_path,
            prompting=PromptingOptions("center"),
            overwrite=True,
        )
    assert (tmp_path / PREDICTIONS_NAME).read_bytes() == original_bytes


def test_evaluate_overwrites_only_its_own_numbered_predictions(make_oracle_captioner, dataset, tmp_path):
    evaluate(make_oracle_captioner(dataset), dataset, folder=tmp_path, metrics=["class"])
    copies = [tmp_path / f"predictions{each}.jsonl" for each in ("-backup", "-gpt4", ".old", ".1a", "1")]
    for path in copies:
        path.write_bytes((tmp_path / PREDICTIONS_NAME).read_bytes())
    (tmp_path / PREDICTIONS_NAME).unlink()
    report = evaluate(make_oracle_captioner(dataset), dataset, folder=tmp_path, metrics=["class"])
    assert report.records
    evaluate(make_oracle_captioner(dataset), dataset, folder=tmp_path, max_images=3, overwrite=True, metrics=["class"])
    assert all(path.is_file() for path in copies)


@pytest.mark.parametrize("header_length", [0, 1, 5, 9, 30, None])
@pytest.mark.slow
def test_evaluate_restarts_if_the_header_is_truncated(make_oracle_captioner, dataset, tmp_path, header_length):
    evaluate(make_oracle_captioner(dataset), dataset, folder=tmp_path, metrics=["class"])
    complete_bytes = (tmp_path / PREDICTIONS_NAME).read_bytes()
    header = complete_bytes.splitlines()[0]
    for tail in (b"", b"\0" * 50, b"\0\0{\n"):
        (tmp_path / PREDICTIONS_NAME).write_bytes(header[:header_length] + tail)
        evaluate(make_oracle_captioner(dataset), dataset, folder=tmp_path, metrics=["class"])
        assert (tmp_path / PREDICTIONS_NAME).read_bytes() == complete_bytes


def test_evaluate_closes_predictions_of_every_process_before_merging(
    make_oracle_captioner, dataset, tmp_path, monkeypatch
):
    events = []
    close = journal.Journal.close
    monkeypatch.setattr(journal.Journal, "close", lambda self: (events.append("close"), close(self))[1])
    monkeypatch.setattr(evaluation, "_get_process_group", lambda: (1, 2, lambda: events.append("wait")))
    assert evaluate(make_oracle_captioner(dataset), dataset, folder=tmp_path, metrics=["class"]) is None
    assert events == ["wait", "wait", "close", "wait", "wait"]


@pytest.mark.parametrize("tail", [b'{"ima', b"\0" * 100, b"\0\0{\n", b"\xff"])
def test_evaluate_drops_truncated_tail_of_a_finished_file(make_oracle_captioner, dataset, tmp_path, tail):
    evaluate(make_oracle_captioner(dataset), dataset, folder=tmp_path, metrics=["class"])
    path = tmp_path / "predictions.jsonl"
    content = path.read_bytes()
    path.write_bytes(content + tail)
    evaluate(make_oracle_captioner(dataset), dataset, folder=tmp_path, metrics=["class"])
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1 is not valid JSON"),
        ("[]", r"line 1 is \[\]; expected an object"),
        ("\xff", "line 1"),
        ('{"caption": "a \\ud800 cat"}', r"line 1, 'caption' contains '\\ud800', half of a surrogate pair"),
        ('{"truth": {"phrases": ["\\udc80"]}}', r"line 1, 'truth' contains '\\udc80', half of a surrogate pair"),
    ],
)
def test_read_predictions_reports_line_of_invalid_file(tmp_path, content, message):
    path = tmp_path / "made.jsonl"
    path.write_bytes(content.encode("latin1"))
    with pytest.raises(InputError, match=message):
        read_predictions(path)
    with pytest.raises(InputError, match="cannot read"):
        read_predictions(tmp_path / "absent.jsonl")
