"""A table is made once, whole or not at all, and is the same wherever its data lies."""

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
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def write(tmp_path):
    """Writes a dataset of some gray pictures with a region each, and gives its folder."""

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
def conversions(monkeypatch):
    """A list with an entry for each time that source files were read."""
    found, entries = [], Coco._iter_entries
    monkeypatch.setattr(Coco, "_iter_entries", lambda self, bars: found.append(self) or entries(self, bars))
    return found


def test_a_second_opening_reads_no_source_and_is_the_same(write, conversions):
    root = write(bbox=[-4, 5, 20, 10])
    one, two = Coco("val", root=root), Coco("val", root=root)
    assert len(conversions) == 1
    assert [sample[1:] for sample in one] == [sample[1:] for sample in two]
    assert (one.content_hash, one.attribute_values, one.examples) == (
        two.content_hash,
        two.attribute_values,
        two.examples,
    )
    assert two.skipped == {"box clipped": 1}
    assert two.attribute_values == {"name": ("cat", "dog")}


def test_a_changed_source_is_converted_again(write, conversions):
    before = Coco("val", root=write())
    after = Coco("val", root=write(caption=["another cat"]))
    assert len(conversions) == 2
    assert before[0].regions[0].phrases == ("a cat",)  # who has the old table open can read it on
    assert after[0].regions[0].phrases == ("another cat",)


def test_what_was_made_of_files_before_they_changed_is_removed(write, cache):
    Coco("val", root=write("other"))
    Coco("val", root=write())
    before = set(cache.glob("coco-*/metadata.json"))
    Coco("val", root=write(iscrowd=1))
    after = set(cache.glob("coco-*/metadata.json"))
    assert (len(before), len(before & after), len(after)) == (2, 1, 2)


def test_pictures_that_were_missing_count_when_they_are_there(write, conversions):
    root = write()
    (root / "val" / "1.png").rename(root / "1.png")
    without = Coco("val", root=root)
    assert (len(without), without.skipped) == (2, {"image missing": 1})
    with pytest.raises(ValueError, match=r"1 images .* more than max_bad=0; image missing: 1, such as 1\.png"):
        Coco("val", root=root, max_bad=0)
    assert len(conversions) == 1
    (root / "1.png").rename(root / "val" / "1.png")
    assert len(Coco("val", root=root)) == 3


def test_the_hash_is_that_of_the_content_and_of_nothing_else(write):
    here = Coco("val", root=write("here")).content_hash
    assert len(bytes.fromhex(here)) == 32
    assert here == Coco("val", root=write("there")).content_hash
    changes = {"id": 7, "bbox": [4, 5, 20, 10], "segmentation": [], "category_id": 2, "caption": ["a cat."]}
    others = {Coco("val", root=write(key, **{key: value})).content_hash for key, value in changes.items()}
    assert len(others - {here}) == len(changes)


def test_an_index_can_be_read_exactly(write):
    root = write()
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


def test_about_a_table_stands_beside_it(write, cache):
    dataset = Coco("val", root=write(iscrowd=1))
    (file,) = cache.glob("coco-*/metadata.json")
    metadata = json.loads(file.read_text())
    assert (metadata["images"], metadata["regions"], metadata["phrases"]) == (2, 2, 2)
    assert metadata["hash"] == dataset.content_hash
    assert metadata["skipped"] == {"crowd": 1, "image without regions": 1}
    assert metadata["examples"]["image without regions"] == ["0.png"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.slow
def test_other_processes_read_the_same_table(write, method):
    dataset = Coco("val", root=write())
    expected = [sample[1:] for sample in dataset]
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert [sample[1:] for sample in pool.map(dataset.read_sample, range(3))] == expected
    assert len(pickle.dumps(dataset)) < 10_000


SCRIPT = """
import os, signal, sys, time
from sca.data.coco import Coco
{}
entries = Coco._iter_entries
def noted(self, bars):
    open(sys.argv[2], "a").write("read\\n")
    for entry in entries(self, bars):
        yield entry
        {}
Coco._iter_entries = noted
dataset = Coco("val", root=sys.argv[1])
open(sys.argv[2], "a").write(dataset.content_hash + "\\n")
"""


def start(root, log, after_each, first=""):
    command = [sys.executable, "-c", SCRIPT.format(first, after_each), str(root), str(log)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ)


@pytest.mark.slow
def test_of_two_processes_one_converts_and_neither_prints(write, tmp_path):
    root, log = write(), tmp_path / "log"
    both = [start(root, log, "time.sleep(0.5)") for _ in range(2)]
    assert [process.communicate()[0] for process in both] == [b"", b""]
    assert sorted(log.read_text().split()) == sorted(["read", *[Coco("val", root=root).content_hash] * 2])


@pytest.mark.slow
def test_a_conversion_that_is_killed_leaves_nothing_that_counts(write, tmp_path, cache):
    root = write()
    process = start(root, tmp_path / "log", "os.kill(os.getpid(), signal.SIGKILL)")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [path.name.startswith(".coco-") for path in cache.iterdir() if path.is_dir()] == [True]
    assert len(Coco("val", root=root)) == 3
    assert [path.name.startswith("coco-") for path in cache.iterdir() if path.is_dir()] == [True]


def killed_after(root, log, entries):
    """Converts with two images a shard until so many entries are made, and is killed there."""
    count = f"count = globals().get('count', 0) + 1; globals()['count'] = count; count == {entries} and os.kill"
    process = start(
        root, log, f"{count}(os.getpid(), signal.SIGKILL)", "import sca.data.conversion as c; c.IMAGES_PER_SHARD = 2"
    )
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("entries", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.slow
def test_a_conversion_that_is_killed_goes_on_where_it_was(write, tmp_path, cache, monkeypatch, entries):
    root = write(images=7, bbox=[-4, 5, 20, 10], iscrowd=0)
    (root / "val" / "1.png").unlink()
    monkeypatch.setattr("sca.data.conversion.IMAGES_PER_SHARD", 2)
    whole = Coco("val", root=root)
    shutil.rmtree(cache)
    killed_after(root, tmp_path / "log", entries)
    converted, record = [], Coco._build_row
    monkeypatch.setattr(Coco, "_build_row", lambda self, entry: converted.append(entry) or record(self, entry))
    resumed = Coco("val", root=root)
    assert len(converted) == 7 - entries // 2 * 2
    assert (resumed.content_hash, resumed.skipped, resumed.examples) == (
        whole.content_hash,
        whole.skipped,
        whole.examples,
    )
    assert resumed.metadata == whole.metadata
    assert [sample[1:] for sample in resumed] == [sample[1:] for sample in whole]
    assert whole.skipped == {"box clipped": 1, "image missing": 1}


@pytest.mark.slow
def test_a_beginning_is_worth_nothing_when_its_missing_pictures_are_there(write, tmp_path):
    root = write(images=5)
    picture = (root / "val" / "1.png").rename(tmp_path / "1.png")
    killed_after(root, tmp_path / "log", 5)
    picture.rename(root / "val" / "1.png")
    dataset = Coco("val", root=root)
    assert len(dataset) == 5
    assert not dataset.skipped


def test_an_interrupt_keeps_what_is_done_and_a_mistake_does_not(write, cache, monkeypatch):
    monkeypatch.setattr("sca.data.conversion.IMAGES_PER_SHARD", 2)
    root, record = write(), Coco._build_row
    for error, kept in ((KeyboardInterrupt, 1), (RuntimeError, 0)):

        def stop(self, entry, error=error):
            if entry[1] == 2:
                raise error
            return record(self, entry)

        monkeypatch.setattr(Coco, "_build_row", stop)
        with pytest.raises(error):
            Coco("val", root=root)
        assert len(list(cache.glob(".coco-*/metadata.json"))) == kept


@pytest.mark.slow
def test_a_terminal_shows_how_far_a_conversion_is(write, tmp_path):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    pytest.importorskip("termios").tcsetwinsize(theirs, (24, 80))
    command = [sys.executable, "-c", SCRIPT.format("", "time.sleep(0.2)"), str(write()), str(tmp_path / "log")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # what Linux says at the end
        while piece := os.read(ours, 4096):
            shown += piece
    assert process.communicate()[0] == b""
    assert b" images" in shown
    assert b"val.json" in shown


def test_a_conversion_that_fails_leaves_nothing(write, cache):
    root = write()
    (root / "val.json").write_text((root / "val.json").read_text()[:-9])
    with pytest.raises(ValueError, match="is not valid JSON"):
        Coco("val", root=root)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_cache_that_cannot_be_written_is_named(write, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SCA_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match=r"cannot write .*file.data.coco-[-\w]+: .*; SCA_CACHE names another"):
        Coco("val", root=write())


def test_a_missing_extra_is_told_with_the_command_that_installs_it(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'segment-caption-anything\[data\]'") as caught:
        Coco("val", root=write())
    assert caught.value.name == "datasets"


@pytest.mark.slow
def test_a_reader_imports_datasets_only_when_it_is_used():
    modules = "sca.data.coco, sca.data.visual_genome, sca.data.refcoco, sca.data.jsonl"
    code = f"import sys, {modules}; sys.exit('datasets' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
