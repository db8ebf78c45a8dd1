"""Conversion writes a table once and atomically, and its content does not depend on the data folder."""

import contextlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys

import pytest
from PIL import Image

from sca.data.coco import Coco
from sca.io.errors import OutputError

SIDE = 64


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def write_dataset(tmp_path):
    """Return a function that writes a dataset of gray images with one region each and returns its folder."""

    def write(name="set", images=3, **changes):
        root = tmp_path / name
        (root / "val").mkdir(parents=True, exist_ok=True)
        for number in range(images):
            Image.new("RGB", (SIDE, SIDE), (number, 0, 0)).save(root / "val" / f"{number}.png")
        region = {
            "category_id": 1,
            "bbox": [4, 5, 20, 10.5],
            "caption": ["a cat"],
            "segmentation": [[4, 5, 24, 5, 9, 9]],
        }
        content = {
            "images": [{"id": 9 - n, "file_name": f"{n}.png", "width": SIDE, "height": SIDE} for n in range(images)],
            "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
            "annotations": [{"id": n, "image_id": 9 - n, **region} for n in range(images)],
        }
        content["annotations"][0] |= changes
        (root / "val.json").write_text(json.dumps(content))
        return root

    return write


@pytest.fixture
def conversion_calls(monkeypatch):
    """Return a list with one entry per pass over the source files."""
    calls, iter_entries = [], Coco._iter_entries
    monkeypatch.setattr(Coco, "_iter_entries", lambda self, bars: calls.append(self) or iter_entries(self, bars))
    return calls


def test_conversion_is_reused_when_dataset_is_reopened(write_dataset, conversion_calls):
    root = write_dataset(bbox=[-4, 5, 20, 10])
    first, second = Coco("val", root=root), Coco("val", root=root)
    assert len(conversion_calls) == 1
    assert [sample[1:] for sample in first] == [sample[1:] for sample in second]
    assert (first.content_hash, first.attribute_values, first.examples) == (
        second.content_hash,
        second.attribute_values,
        second.examples,
    )
    assert second.skipped == {"box clipped": 1}
    assert second.attribute_values == {"name": ("cat", "dog")}


def test_conversion_is_repeated_for_changed_source(write_dataset, conversion_calls):
    original = Coco("val", root=write_dataset())
    updated = Coco("val", root=write_dataset(caption=["another cat"]))
    assert len(conversion_calls) == 2
    assert original[0].regions[0].phrases == ("a cat",)  # an open table stays readable
    assert updated[0].regions[0].phrases == ("another cat",)


def test_conversion_removes_table_of_changed_source(write_dataset, cache_folder):
    Coco("val", root=write_dataset("other"))
    Coco("val", root=write_dataset())
    tables_before = set(cache_folder.glob("coco-*/metadata.json"))
    Coco("val", root=write_dataset(iscrowd=1))
    tables_after = set(cache_folder.glob("coco-*/metadata.json"))
    assert (len(tables_before), len(tables_before & tables_after), len(tables_after)) == (2, 1, 2)


def test_conversion_is_repeated_when_missing_images_appear(write_dataset, conversion_calls):
    root = write_dataset()
    (root / "val" / "1.png").rename(root / "1.png")
    incomplete = Coco("val", root=root)
    assert (len(incomplete), incomplete.skipped) == (2, {"image missing": 1})
    with pytest.raises(ValueError, match=r"1 images .* more than max_bad_records=0; image missing: 1, such as 1\.png"):
        Coco("val", root=root, max_bad_records=0)
    assert len(conversion_calls) == 1
    (root / "1.png").rename(root / "val" / "1.png")
    assert len(Coco("val", root=root)) == 3


def test_dataset_hash_depends_on_content_only(write_dataset):
    original_hash = Coco("val", root=write_dataset("here")).content_hash
    assert len(bytes.fromhex(original_hash)) == 32
    assert original_hash == Coco("val", root=write_dataset("there")).content_hash
    changes = {"id": 7, "bbox": [4, 5, 20, 10], "segmentation": [], "category_id": 2, "caption": ["a cat."]}
    changed_hashes = {
        Coco("val", root=write_dataset(key, **{key: value})).content_hash for key, value in changes.items()
    }
    assert len(changed_hashes - {original_hash}) == len(changes)


def test_dataset_read_does_not_skip_unreadable_images(write_dataset):
    root = write_dataset()
    dataset = Coco("val", root=root)
    assert dataset.image_ids == [9, 8, 7]
    (root / "val" / "1.png").write_bytes(b"")
    assert dataset[1].image_id == 7
    assert dataset.read_sample(1) is dataset.read_sample(1) is None
    assert dataset.read_sample(0).image_id == 9
    assert dataset.skipped == {"image unreadable": 1}
    for index in (-1, 3):
        with pytest.raises(IndexError):
            dataset.read_sample(index)


def test_conversion_writes_about_json_next_to_table(write_dataset, cache_folder):
    dataset = Coco("val", root=write_dataset(iscrowd=1))
    (file,) = cache_folder.glob("coco-*/metadata.json")
    metadata = json.loads(file.read_text())
    assert (metadata["images"], metadata["regions"], metadata["phrases"]) == (2, 2, 2)
    assert metadata["hash"] == dataset.content_hash
    assert metadata["skipped"] == {"crowd": 1, "image without regions": 1}
    assert metadata["examples"]["image without regions"] == ["0.png"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.slow
def test_dataset_is_readable_from_other_processes(write_dataset, method):
    dataset = Coco("val", root=write_dataset())
    expected = [sample[1:] for sample in dataset]
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert [sample[1:] for sample in pool.map(dataset.read_sample, range(3))] == expected
    assert len(pickle.dumps(dataset)) < 10_000


CONVERSION_SCRIPT = """
import os, signal, sys, time
from sca.data.coco import Coco
{}
iter_entries = Coco._iter_entries
def iter_and_log(self, bars):
    open(sys.argv[2], "a").write("read\\n")
    for entry in iter_entries(self, bars):
        yield entry
        {}
Coco._iter_entries = iter_and_log
dataset = Coco("val", root=sys.argv[1])
open(sys.argv[2], "a").write(dataset.content_hash + "\\n")
"""


def start_conversion(root, log, code_after_entry, setup_code=""):
    command = [sys.executable, "-c", CONVERSION_SCRIPT.format(setup_code, code_after_entry), str(root), str(log)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ)


@pytest.mark.slow
def test_conversion_runs_in_one_of_two_processes_without_output(write_dataset, tmp_path):
    root, log = write_dataset(), tmp_path / "log"
    processes = [start_conversion(root, log, "time.sleep(0.5)") for _ in range(2)]
    assert [process.communicate()[0] for process in processes] == [b"", b""]
    assert sorted(log.read_text().split()) == sorted(["read", *[Coco("val", root=root).content_hash] * 2])


@pytest.mark.slow
def test_killed_conversion_leaves_only_a_draft_folder(write_dataset, tmp_path, cache_folder):
    root = write_dataset()
    process = start_conversion(root, tmp_path / "log", "os.kill(os.getpid(), signal.SIGKILL)")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [path.name.startswith(".coco-") for path in cache_folder.iterdir() if path.is_dir()] == [True]
    assert len(Coco("val", root=root)) == 3
    assert [path.name.startswith("coco-") for path in cache_folder.iterdir() if path.is_dir()] == [True]


def kill_conversion_after(root, log, num_entries):
    """Convert with two images per shard and kill the process after N entries."""
    counting_code = (
        f"count = globals().get('count', 0) + 1; globals()['count'] = count; count == {num_entries} and os.kill"
    )
    process = start_conversion(
        root,
        log,
        f"{counting_code}(os.getpid(), signal.SIGKILL)",
        "import sca.data.conversion as c; c.IMAGES_PER_SHARD = 2",
    )
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("num_entries", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.slow
def test_killed_conversion_resumes_from_last_complete_shard(
    write_dataset, tmp_path, cache_folder, monkeypatch, num_entries
):
    root = write_dataset(images=7, bbox=[-4, 5, 20, 10], iscrowd=0)
    (root / "val" / "1.png").unlink()
    monkeypatch.setattr("sca.data.conversion.IMAGES_PER_SHARD", 2)
    uninterrupted = Coco("val", root=root)
    shutil.rmtree(cache_folder)
    kill_conversion_after(root, tmp_path / "log", num_entries)
    converted_entries, build_row = [], Coco._build_row
    monkeypatch.setattr(
        Coco, "_build_row", lambda self, entry: converted_entries.append(entry) or build_row(self, entry)
    )
    resumed = Coco("val", root=root)
    assert len(converted_entries) == 7 - num_entries // 2 * 2
    assert (resumed.content_hash, resumed.skipped, resumed.examples) == (
        uninterrupted.content_hash,
        uninterrupted.skipped,
        uninterrupted.examples,
    )
    assert resumed.metadata == uninterrupted.metadata
    assert [sample[1:] for sample in resumed] == [sample[1:] for sample in uninterrupted]
    assert uninterrupted.skipped == {"box clipped": 1, "image missing": 1}


@pytest.mark.slow
def test_killed_conversion_restarts_when_missing_images_appear(write_dataset, tmp_path):
    root = write_dataset(images=5)
    image_path = (root / "val" / "1.png").rename(tmp_path / "1.png")
    kill_conversion_after(root, tmp_path / "log", 5)
    image_path.rename(root / "val" / "1.png")
    dataset = Coco("val", root=root)
    assert len(dataset) == 5
    assert not dataset.skipped


def test_conversion_keeps_shards_after_interrupt_but_not_after_error(write_dataset, cache_folder, monkeypatch):
    monkeypatch.setattr("sca.data.conversion.IMAGES_PER_SHARD", 2)
    root, build_row = write_dataset(), Coco._build_row
    for error, num_kept in ((KeyboardInterrupt, 1), (RuntimeError, 0)):

        def build_row_or_raise(self, entry, error=error):
            if entry[1] == 2:
                raise error
            return build_row(self, entry)

        monkeypatch.setattr(Coco, "_build_row", build_row_or_raise)
        with pytest.raises(error):
            Coco("val", root=root)
        assert len(list(cache_folder.glob(".coco-*/metadata.json"))) == num_kept


@pytest.mark.slow
def test_conversion_shows_progress_on_a_terminal(write_dataset, tmp_path):
    pty = pytest.importorskip("pty")
    parent_fd, terminal_fd = pty.openpty()
    pytest.importorskip("termios").tcsetwinsize(terminal_fd, (24, 80))
    command = [
        sys.executable,
        "-c",
        CONVERSION_SCRIPT.format("", "time.sleep(0.2)"),
        str(write_dataset()),
        str(tmp_path / "log"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal_fd, env={**os.environ, "TERM": "xterm"})
    os.close(terminal_fd)
    terminal_output = b""
    with contextlib.suppress(OSError):  # Linux raises this at the end of the terminal's output
        while chunk := os.read(parent_fd, 4096):
            terminal_output += chunk
    assert process.communicate()[0] == b""
    assert b" images" in terminal_output
    assert b"val.json" in terminal_output


def test_failed_conversion_leaves_no_folders(write_dataset, cache_folder):
    root = write_dataset()
    (root / "val.json").write_text((root / "val.json").read_text()[:-9])
    with pytest.raises(ValueError, match="is not valid JSON"):
        Coco("val", root=root)
    assert not [path for path in cache_folder.iterdir() if path.is_dir()]


def test_conversion_reports_unwritable_cache(write_dataset, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match=r"cannot write .*file.data.coco-[-\w]+: .*; set SCA_CACHE to another folder"):
        Coco("val", root=write_dataset())


def test_dataset_reports_install_command_of_missing_extra(write_dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'segment-caption-anything\[data\]'") as caught:
        Coco("val", root=write_dataset())
    assert caught.value.name == "datasets"


@pytest.mark.slow
def test_dataset_readers_import_datasets_lazily():
    modules = "sca.data.coco, sca.data.visual_genome, sca.data.refcoco, sca.data.jsonl"
    code = f"import sys, {modules}; sys.exit('datasets' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
