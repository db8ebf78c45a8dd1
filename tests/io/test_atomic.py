"""Atomic writes: files and folders appear complete or not at all."""

import os
import signal
from contextlib import contextmanager

import pytest

from sca.io import atomic
from sca.io.atomic import AtomicFile, remove_drafts, write_file, write_folder
from sca.io.errors import OutputError

resource = pytest.importorskip("resource")


@contextmanager
def limit_file_size(max_bytes):
    """Limit the size of files; writing fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous_handler)


def list_names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_file_on_a_full_disk_keeps_old_content(tmp_path):
    path = tmp_path / "a.txt"
    write_file(path, "old")
    with limit_file_size(100), pytest.raises(OutputError, match=r"cannot write .*a\.txt: .*; free some space"):
        write_file(path, "x" * 1000)
    assert path.read_text() == "old"
    assert list_names(tmp_path) == ["a.txt"]


def test_write_file_syncs_before_renaming(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda handle, sync=os.fsync: (calls.append("sync"), sync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda *paths, move=os.replace: (calls.append("rename"), move(*paths))[1])
    write_file(tmp_path / "a.txt", "new")
    assert calls == ["sync", "rename", "sync"]
    write_file(tmp_path / "b.txt", "one of many", sync_folder=False)
    assert calls[3:] == ["sync", "rename"]


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_atomic_file_rejects_devices_pipes_and_folders(tmp_path, kind):
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


def test_write_file_replaces_a_symlink_and_keeps_its_target(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "target").read_text() == "precious"
    assert (tmp_path / "link").read_text() == "new"


def test_visible_atomic_file_keeps_an_older_file_until_commit(tmp_path):
    for content, visible_content in (("first\n", "first\n"), ("second\n", "first\n")):
        file = AtomicFile(tmp_path / "lines", visible=True)
        file.write(content)
        assert (tmp_path / "lines").read_text() == visible_content
        file.commit()
        assert (tmp_path / "lines").read_text() == content


def test_remove_drafts_keeps_drafts_of_running_processes(tmp_path):
    open_file = AtomicFile(tmp_path / "a.txt")
    (tmp_path / ".sca-0123456789abcdef.part").write_text("left by a kill")
    (tmp_path / ".0123456789abcdef.part").write_text("of somebody else")
    remove_drafts(tmp_path)
    assert len(list_names(tmp_path)) == 2
    open_file.write("a")
    open_file.commit()
    assert list_names(tmp_path) == [".0123456789abcdef.part", "a.txt"]


def test_write_folder_takes_brackets_in_its_name_literally(tmp_path):
    (tmp_path / ".run[1].0123456789abcdef").mkdir()
    (tmp_path / ".run1.0123456789abcdef").mkdir()
    with write_folder(tmp_path / "run[1]"):
        pass
    assert list_names(tmp_path) == [".run1.0123456789abcdef", "run[1]"]


def test_write_folder_removes_only_its_own_drafts_of_killed_processes(tmp_path):
    (tmp_path / ".out.0123456789abcdef").mkdir()
    (tmp_path / ".out.notes").mkdir()
    with write_folder(tmp_path / "out") as draft:
        with pytest.raises(OutputError, match="x"), write_folder(tmp_path / "out"):
            raise OutputError("x")
        assert draft.is_dir()  # of a running process
        (draft / "a").touch()
    assert list_names(tmp_path) == [".out.notes", "out"]


def test_write_folder_replaces_only_replaceable_content(tmp_path):
    folder = tmp_path / "out"
    for number in range(2):
        with write_folder(folder, replaceable=["a"]) as draft:
            (draft / "a").write_text(str(number))
    assert (folder / "a").read_text() == "1"
    (folder / "README.md").write_text("mine")
    with pytest.raises(OutputError, match=r"it contains README\.md"), write_folder(folder, replaceable=["a"]) as draft:
        pytest.fail("filled in vain")
    (folder / "README.md").unlink()
    with (
        pytest.raises(OutputError, match=r"it contains README\.md"),
        write_folder(folder, replaceable=["a"]) as draft,
    ):
        (folder / "README.md").write_text("put there meanwhile")
    assert list_names(folder) == ["README.md", "a"]
    assert list_names(tmp_path) == ["out"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_write_folder_works_with_and_without_atomic_exchange(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(atomic, "_exchange_folders", lambda *_: False)
    for number in range(3):
        with write_folder(tmp_path / "out", replaceable=["a"]) as draft:
            (draft / "a").write_text(str(number))
    assert list_names(tmp_path) == ["out"]
    assert (tmp_path / "out/a").read_text() == "2"
