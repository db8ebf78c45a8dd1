"""Files and folders appear complete, or not at all."""

import os
import signal
from contextlib import contextmanager

import pytest

from sca.io import atomic
from sca.io.atomic import AtomicFile, remove_drafts, write_file, write_folder
from sca.io.errors import OutputError

resource = pytest.importorskip("resource")


@contextmanager
def full_disk(size):
    """A limit on the size of files, which writing reaches as it reaches the end of a disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_file_on_a_full_disk_keeps_the_old_content(tmp_path):
    path = tmp_path / "a.txt"
    write_file(path, "old")
    with full_disk(100), pytest.raises(OutputError, match=r"cannot write .*a\.txt: .*; free some space"):
        write_file(path, "x" * 1000)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_write_file_syncs_before_it_renames(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda handle, sync=os.fsync: (done.append("sync"), sync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda *names, move=os.replace: (done.append("rename"), move(*names))[1])
    write_file(tmp_path / "a.txt", "new")
    assert done == ["sync", "rename", "sync"]
    write_file(tmp_path / "b.txt", "one of many", sync_folder=False)
    assert done[3:] == ["sync", "rename"]


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_atomic_file_does_not_replace_what_is_no_file(tmp_path, kind):
    path = tmp_path / "out"
    if kind == "device":
        path = atomic.Path("/dev/null")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(OutputError, match="choose another folder"):
        AtomicFile(path)
    assert path.exists()
    assert not path.is_file()


def test_atomic_file_replaces_a_link_and_not_its_target(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "target").read_text() == "precious"
    assert (tmp_path / "link").read_text() == "new"


def test_visible_file_grows_hidden_where_an_older_file_exists(tmp_path):
    for content, shown in (("first\n", "first\n"), ("second\n", "first\n")):
        file = AtomicFile(tmp_path / "lines", visible=True)
        file.write(content)
        assert (tmp_path / "lines").read_text() == shown
        file.commit()
        assert (tmp_path / "lines").read_text() == content


def test_remove_drafts_leaves_those_of_running_processes(tmp_path):
    running = AtomicFile(tmp_path / "a.txt")
    (tmp_path / ".sca-0123456789abcdef.part").write_text("left by a kill")
    (tmp_path / ".0123456789abcdef.part").write_text("of somebody else")
    remove_drafts(tmp_path)
    assert len(names(tmp_path)) == 2
    running.write("a")
    running.commit()
    assert names(tmp_path) == [".0123456789abcdef.part", "a.txt"]


def test_new_folder_takes_brackets_in_its_name_literally(tmp_path):
    (tmp_path / ".run[1].0123456789abcdef").mkdir()
    (tmp_path / ".run1.0123456789abcdef").mkdir()
    with write_folder(tmp_path / "run[1]"):
        pass
    assert names(tmp_path) == [".run1.0123456789abcdef", "run[1]"]


def test_new_folder_removes_only_its_own_drafts_of_killed_processes(tmp_path):
    (tmp_path / ".out.0123456789abcdef").mkdir()
    (tmp_path / ".out.notes").mkdir()
    with write_folder(tmp_path / "out") as draft:
        with pytest.raises(OutputError, match="x"), write_folder(tmp_path / "out"):
            raise OutputError("x")
        assert draft.is_dir()  # of a running process
        (draft / "a").touch()
    assert names(tmp_path) == [".out.notes", "out"]


def test_new_folder_replaces_only_what_it_is_told(tmp_path):
    out = tmp_path / "out"
    for number in range(2):
        with write_folder(out, replaceable=["a"]) as draft:
            (draft / "a").write_text(str(number))
    assert (out / "a").read_text() == "1"
    (out / "README.md").write_text("mine")
    with pytest.raises(OutputError, match=r"it contains README\.md"), write_folder(out, replaceable=["a"]) as draft:
        pytest.fail("filled in vain")
    (out / "README.md").unlink()
    with (
        pytest.raises(OutputError, match=r"it contains README\.md"),
        write_folder(out, replaceable=["a"]) as draft,
    ):
        (out / "README.md").write_text("put there meanwhile")
    assert names(out) == ["README.md", "a"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_new_folder_works_with_and_without_exchange(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(atomic, "_exchange_folders", lambda *_: False)
    for number in range(3):
        with write_folder(tmp_path / "out", replaceable=["a"]) as draft:
            (draft / "a").write_text(str(number))
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out/a").read_text() == "2"
