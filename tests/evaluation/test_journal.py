"""What was answered is on disk at once, and a run that was killed ends as if it had not been."""

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

RUN = """
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


def lines(folder):
    return [json.loads(line) for line in (folder / PREDICTIONS_NAME).read_text().splitlines()]


def test_a_file_begins_with_the_run_and_ends_with_its_end(teller, dataset, tmp_path):
    report = evaluate(teller(dataset), dataset, batch_size=2, folder=tmp_path, metrics=["class"])
    run, *records, end = lines(tmp_path)
    assert run["run"]["dataset"] == "Scenes"
    assert run["run"]["images"] == end["end"]["images"] == 7
    assert end["end"]["records"] == len(records) == len(report.records)
    assert [record["index"] for record in records] == sorted(record["index"] for record in records)


def test_answers_are_on_disk_before_the_next_batch_is_asked(teller, dataset, tmp_path):
    seen = []

    class Watches(type(teller(dataset))):
        def caption(self, image, prompts, task="caption"):
            seen.append(
                sum(line.startswith('{"index"') for line in (tmp_path / PREDICTIONS_NAME).read_text().splitlines())
            )
            return super().caption(image, prompts, task)

    evaluate(Watches(dataset), dataset, batch_size=1, folder=tmp_path, metrics=["class"])
    regions = [2 * len(sample.regions) for sample in dataset]
    assert seen == [sum(regions[:image]) for image in range(7) for _ in ("caption", "recognition")]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_run_that_stops_goes_on_where_it_was(teller, dataset, tmp_path, batch):
    """Whatever was cut off in the middle of a line is asked again, and nothing else."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    evaluate(teller(dataset), dataset, batch_size=2, folder=whole, metrics=["class"])
    asked = []

    class Tires(type(teller(dataset))):
        left = 8

        def caption(self, image, prompts, task="caption"):
            asked.append(image.tobytes())
            type(self).left -= 1
            if not type(self).left:
                raise RuntimeError("tired")
            return super().caption(image, prompts, task)

    tires = Tires(dataset)
    with pytest.raises(RuntimeError):
        evaluate(tires, dataset, batch_size=2, folder=cut, metrics=["class"])
    with pytest.raises(InputError, match=r"has not ended: .* records so far"):
        score_file(cut)
    with (cut / PREDICTIONS_NAME).open("ab") as file:
        file.write(b'{"index": 6, "image_id": 12, "reg')
    type(tires).left = 1000
    before = len(asked)
    evaluate(tires, dataset, batch_size=batch, folder=cut, metrics=["class"])
    _, *records, end = lines(cut)
    assert [records, end] == [lines(whole)[1:-1], lines(whole)[-1]]
    assert len(asked) - before < 2 * len(dataset)  # not everything again
    asked.clear()
    evaluate(tires, dataset, batch_size=batch, folder=cut, metrics=["class"])
    assert not asked  # all is there


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.all)])
@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_what_an_uninterrupted_run_leaves(tmp_path, kills):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    subprocess.run([sys.executable, "-c", RUN, whole], check=True, capture_output=True)
    draw, hits = random.Random(0), 0
    for _ in range(kills):
        before = count_lines(killed / PREDICTIONS_NAME)
        child = subprocess.Popen([sys.executable, "-c", RUN, killed], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        child.stdout.readline()
        enough = before + draw.randrange(20)
        while child.poll() is None and count_lines(killed / PREDICTIONS_NAME) < enough:
            time.sleep(0.001)
        if child.poll() is None:
            hits += 1
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        child.stdout.close()
        if (killed / PREDICTIONS_NAME).is_file() and '"end"' in (killed / PREDICTIONS_NAME).read_text():
            assert (killed / PREDICTIONS_NAME).read_bytes() == (whole / PREDICTIONS_NAME).read_bytes()
            (killed / PREDICTIONS_NAME).unlink()  # once more from the beginning
    assert hits
    subprocess.run([sys.executable, "-c", RUN, killed], check=True, capture_output=True)
    assert (killed / PREDICTIONS_NAME).read_bytes() == (whole / PREDICTIONS_NAME).read_bytes()
    records = read_predictions(killed).records
    assert len({(each["region_id"], each["task"]) for each in records}) == len(records)


@pytest.mark.all
def test_several_processes_write_what_one_writes(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    subprocess.run([sys.executable, "-c", RUN, one], check=True, capture_output=True)
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", tmp_path / "run.py", two]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert lines(two) == lines(one)
    assert sorted(path.name for path in two.iterdir()) == [PREDICTIONS_NAME, "sca-run.json"]


def test_a_folder_with_another_run_is_left_as_it_is(teller, dataset, tmp_path):
    evaluate(teller(dataset), dataset, folder=tmp_path, metrics=["class"])
    before = (tmp_path / PREDICTIONS_NAME).read_bytes()
    with pytest.raises(DifferentRunError, match=r"another run .*prompt: \"box\" there, \"center\" now.*another folder"):
        evaluate(teller(dataset), dataset, folder=tmp_path, prompting=PromptingOptions("center"))
    assert (tmp_path / PREDICTIONS_NAME).read_bytes() == before
    (tmp_path / PREDICTIONS_NAME).write_text('{"image_id": 1}\n')
    with pytest.raises(InputError, match="without their run"):
        evaluate(teller(dataset), dataset, folder=tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "content", ['{"image_id": 1}', '{"image_id": 1, "reg', '{"image_id": 1}\n', '{"run": 5}\n', "notes"]
)
@pytest.mark.slow
def test_evaluate_leaves_predictions_made_by_hand_unchanged(teller, dataset, tmp_path, content, overwrite):
    evaluate(teller(dataset), dataset, folder=tmp_path, metrics=["class"])
    (tmp_path / "predictions.1.jsonl").write_text(content)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"predictions\.1\.jsonl"):
        evaluate(teller(dataset), dataset, folder=tmp_path, prompting=PromptingOptions("center"), overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_overwrite_deletes_nothing_before_a_foreign_file_is_refused(teller, dataset, tmp_path):
    evaluate(teller(dataset), dataset, folder=tmp_path, metrics=["class"])
    before = (tmp_path / PREDICTIONS_NAME).read_bytes()
    (tmp_path / "sca-run.json").unlink()
    with pytest.raises(OutputError, match="was not written by"):
        evaluate(teller(dataset), dataset, folder=tmp_path, prompting=PromptingOptions("center"), overwrite=True)
    assert (tmp_path / PREDICTIONS_NAME).read_bytes() == before


def test_evaluate_takes_only_numbered_predictions_for_its_own(teller, dataset, tmp_path):
    evaluate(teller(dataset), dataset, folder=tmp_path, metrics=["class"])
    copies = [tmp_path / f"predictions{each}.jsonl" for each in ("-backup", "-gpt4", ".old", ".1a", "1")]
    for path in copies:
        path.write_bytes((tmp_path / PREDICTIONS_NAME).read_bytes())
    (tmp_path / PREDICTIONS_NAME).unlink()
    report = evaluate(teller(dataset), dataset, folder=tmp_path, metrics=["class"])
    assert report.records
    evaluate(teller(dataset), dataset, folder=tmp_path, limit=3, overwrite=True, metrics=["class"])
    assert all(path.is_file() for path in copies)


@pytest.mark.parametrize("cut", [0, 1, 5, 9, 30, None])
@pytest.mark.slow
def test_evaluate_begins_anew_where_its_header_is_torn(teller, dataset, tmp_path, cut):
    evaluate(teller(dataset), dataset, folder=tmp_path, metrics=["class"])
    whole = (tmp_path / PREDICTIONS_NAME).read_bytes()
    header = whole.splitlines()[0]
    for tail in (b"", b"\0" * 50, b"\0\0{\n"):
        (tmp_path / PREDICTIONS_NAME).write_bytes(header[:cut] + tail)
        evaluate(teller(dataset), dataset, folder=tmp_path, metrics=["class"])
        assert (tmp_path / PREDICTIONS_NAME).read_bytes() == whole


def test_every_process_syncs_its_predictions_before_the_first_merges_them(teller, dataset, tmp_path, monkeypatch):
    events = []
    close = journal.Journal.close
    monkeypatch.setattr(journal.Journal, "close", lambda self: (events.append("close"), close(self))[1])
    monkeypatch.setattr(evaluation, "_get_process_group", lambda: (1, 2, lambda: events.append("wait")))
    assert evaluate(teller(dataset), dataset, folder=tmp_path, metrics=["class"]) is None
    assert events == ["wait", "wait", "close", "wait", "wait"]


@pytest.mark.parametrize("tail", [b'{"ima', b"\0" * 100, b"\0\0{\n", b"\xff"])
def test_evaluate_drops_a_torn_tail_of_a_finished_file(teller, dataset, tmp_path, tail):
    evaluate(teller(dataset), dataset, folder=tmp_path, metrics=["class"])
    path = tmp_path / "predictions.jsonl"
    content = path.read_bytes()
    path.write_bytes(content + tail)
    evaluate(teller(dataset), dataset, folder=tmp_path, metrics=["class"])
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "line 1 is not valid JSON"),
        ("[]", r"line 1 is \[\]; give an object"),
        ("\xff", "line 1"),
        ('{"caption": "a \\ud800 cat"}', r"line 1, 'caption' contains '\\ud800', half of a surrogate pair"),
        ('{"truth": {"phrases": ["\\udc80"]}}', r"line 1, 'truth' contains '\\udc80', half of a surrogate pair"),
    ],
)
def test_a_file_that_is_none_is_told_by_its_line(tmp_path, content, said):
    path = tmp_path / "made.jsonl"
    path.write_bytes(content.encode("latin1"))
    with pytest.raises(InputError, match=said):
        read_predictions(path)
    with pytest.raises(InputError, match="cannot read"):
        read_predictions(tmp_path / "absent.jsonl")
