"""Readers of untrusted files: one-line errors for deeply nested JSON and for paths that are not regular files."""

import json
import os
import signal
from functools import partial

import pytest
from sca_bench.store import ResultStore
from sca_bench.sweep import Sweep
from sca_registry import RegistryError, datasets
from sca_registry.overrides import parse_assignments

from sca.checkpoints.push import _read_scores
from sca.data import json_stream, record_index, record_parsing
from sca.evaluation.evaluate import score_file
from sca.evaluation.predictions_file import read_predictions
from sca.io.errors import InputError
from sca.io.images import open_image
from sca.io.json import read_regular_file
from sca.io.prompt_files import read_region_prompts
from sca.io.prompts import read_mask_file
from sca.output.reader import read_captions
from sca.training.recipe import Recipe

HOSTILE_JSON = {
    "brackets": "[" * 200_000,
    "objects": '{"a":' * 200_000,
    "closed": "[" * 900 + "]" * 900,
    "inside": '{"images": [{"id": 1, "x": ' + "[" * 500 + "]" * 500 + "}]}",
    "digits": '{"images": [' + "9" * 5000 + "]}",
}


def read_dataset(path):
    return datasets.build("jsonl", "train", file=str(path), image_root=str(path.parent), max_bad_records=0)


def read_index(path):
    return record_index.index_json_lists(path, {"images": ["id"]}, (), "should be COCO")


JSON_READERS = {  # by the name of the file
    "prompts.json": read_region_prompts,
    "prompts.jsonl": read_region_prompts,
    "captions.json": lambda path: list(read_captions(path)),
    "captions.jsonl": lambda path: list(read_captions(path)),
    "predictions.jsonl": read_predictions,
    "scored.jsonl": score_file,
    "scores.json": _read_scores,
    "lines.jsonl": lambda path: list(record_index.read_jsonl_records(path)),
    "list.json": lambda path: list(json_stream.iter_list_elements(path)),
    "index.json": read_index,
    "whole.json": record_parsing.read_dataset_json,
    "data.jsonl": read_dataset,
    "results.jsonl": lambda path: ResultStore(path.parent).read_rows(),
}
OTHER_READERS = {
    "captions.parquet": lambda path: list(read_captions(path)),
    "mask.png": read_mask_file,
    "mask.npy": read_mask_file,
    "image.png": open_image,
    "recipe.toml": lambda path: Recipe.read(str(path)),
    "sweep.toml": lambda path: Sweep.read(str(path)),
}


@pytest.fixture
def alarm_timeout():
    """Raise an error in a reader that blocks."""
    previous_handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous_handler)


def get_error_message(read_file, path):
    with pytest.raises(ValueError, match=r".") as error_info:
        read_file(path)
    assert "\n" not in str(error_info.value)
    assert len(str(error_info.value)) < 500
    return str(error_info.value)


@pytest.mark.parametrize("content", HOSTILE_JSON)
@pytest.mark.parametrize("file_name", JSON_READERS)
def test_reader_rejects_deep_json_in_one_line(alarm_timeout, tmp_path, file_name, content):
    path = tmp_path / file_name
    path.write_text(HOSTILE_JSON[content] + "\n")
    assert file_name.partition(".")[0] in get_error_message(JSON_READERS[file_name], path)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
@pytest.mark.parametrize("file_name", [*JSON_READERS, *OTHER_READERS])
def test_reader_rejects_fifos_devices_and_folders_without_waiting(alarm_timeout, tmp_path, file_name, kind):
    path = tmp_path / file_name
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    get_error_message({**JSON_READERS, **OTHER_READERS}[file_name], path)


@pytest.mark.parametrize("read_file", [Recipe.read, Sweep.read])
@pytest.mark.parametrize("text", ["x = " + "[" * 100_000, "x = " + "[" * 300 + "]" * 300, ".".join("a" * 300) + " = 1"])
def test_recipe_and_sweep_reject_deep_toml_in_one_line(alarm_timeout, tmp_path, read_file, text):
    path = tmp_path / "deep.toml"
    path.write_text(text)
    assert "nested deeper than 100 levels" in get_error_message(read_file, str(path))


def test_parse_assignments_rejects_deep_toml():
    with pytest.raises(RegistryError, match="the value is not valid TOML"):
        parse_assignments(["lora=" + "[" * 2000])


@pytest.mark.parametrize(
    "read_file",
    [
        partial(read_regular_file, allow_pipe=True),
        read_predictions,
        lambda path: read_region_prompts(path).match_images,
    ],
)
def test_reader_accepts_a_pipe_opened_by_a_shell(alarm_timeout, read_file):
    content = b'{"images": [{"id": 1, "file_name": "a.png"}], "annotations": []}'
    read_end, write_end = os.pipe()
    os.write(write_end, content)
    os.close(write_end)
    try:
        assert read_file(f"/dev/fd/{read_end}")
    finally:
        os.close(read_end)


@pytest.fixture
def open_pipe():
    """Path of a pipe with an open writer: readers block."""
    read_end, write_end = os.pipe()
    yield f"/dev/fd/{read_end}"
    os.close(read_end)
    os.close(write_end)


def open_images_of_captions(path, content):
    path.write_text(json.dumps(content))
    for captioned_image in read_captions(path):
        with pytest.raises(InputError):
            captioned_image.open([path.parent])


def test_readers_do_not_read_pipes_named_inside_files(alarm_timeout, tmp_path, open_pipe):
    record = {"image": open_pipe, "width": 9, "height": 9, "box": [0, 0, 5, 5], "caption": "a cat"}
    open_images_of_captions(tmp_path / "captions.jsonl", record)
    get_error_message(
        partial(open_images_of_captions, content={"shapes": [], "imagePath": open_pipe}), tmp_path / "labelme.json"
    )
    images = [{"id": 1, "file_name": open_pipe}]
    get_error_message(
        partial(open_images_of_captions, content={"images": images, "annotations": []}), tmp_path / "coco.json"
    )
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"image": "a.png", "mask": open_pipe}))
    get_error_message(lambda path: read_region_prompts(path)["a.png"], tmp_path / "prompts.jsonl")
    get_error_message(read_regular_file, open_pipe)
    get_error_message(open_image, open_pipe)
    get_error_message(read_mask_file, open_pipe)
