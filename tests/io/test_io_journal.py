"""A journal loses nothing that can be decoded."""

import json
import os
import signal
from contextlib import contextmanager

import pytest

from sca.io.errors import InputError, LockedError, OutputError
from sca.io.journal import Journal, read_journal

resource = pytest.importorskip("resource")
ENTRIES = [{"number": number, "text": "x" * number} for number in range(50)]
TAILS = [b'{"number": 50, "te', b"\0" * 5000, b'{"number"\0\0\0\0\0', b"\0\0\n\0", b"[1, 2]\n", b"\xff\xfe\n", b"\n"]


@contextmanager
def full_disk(size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.fixture
def path(tmp_path):
    with Journal(tmp_path / "journal") as journal:
        journal.append(*ENTRIES)
    return tmp_path / "journal"


def test_journal_entries_come_back(path):
    assert list(read_journal(path)) == ENTRIES
    assert list(read_journal(path.with_name("absent"))) == []


@pytest.mark.parametrize("tail", TAILS)
def test_journal_drops_an_undecodable_tail_and_nothing_else(path, tail):
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert list(read_journal(path)) == ENTRIES
    with Journal(path) as journal:
        assert journal.dropped_bytes == len(tail)
        journal.append({"number": 50})
    assert path.read_bytes() == whole + b'{"number": 50}\n'


@pytest.mark.parametrize("cut", range(1, 40, 7))
def test_journal_drops_a_torn_line(path, cut):
    path.write_bytes(path.read_bytes()[:-cut])
    assert list(read_journal(path)) == ENTRIES[:-1]


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b'{"number": 0, "te', b'{"number"\0\0{\n'])
def test_journal_begins_anew_where_the_first_line_is_torn(tmp_path, content):
    (tmp_path / "journal").write_bytes(content)
    with Journal(tmp_path / "journal") as journal:
        assert journal.is_empty
        journal.append({"number": 0})
    assert list(read_journal(tmp_path / "journal")) == [{"number": 0}]


@pytest.mark.parametrize(
    "content",
    [
        b"my notes\n",
        b"my notes",
        b"[1]\n[2]\n",
        b"\x89PNG\r\n\x1a\n",
        b"{\n ",
        b"\0\0\0\x18ftypmp42",
        b"\0" * 16 + b"notes\n",
    ],
)
def test_journal_does_not_touch_a_file_that_is_none(tmp_path, content):
    (tmp_path / "notes").write_bytes(content)
    with pytest.raises(InputError, match="is not a journal; choose another folder"):
        Journal(tmp_path / "notes")
    assert (tmp_path / "notes").read_bytes() == content


@pytest.mark.parametrize("content", [b'{"a": 1}', b"{}", b'{"a": "\xc3\xa9"}'])
def test_journal_keeps_a_first_line_that_lacks_only_its_newline(tmp_path, content):
    (tmp_path / "journal").write_bytes(content)
    assert list(read_journal(tmp_path / "journal")) == [json.loads(content)]
    with Journal(tmp_path / "journal") as journal:
        assert not journal.is_empty
        assert journal.dropped_bytes == 0
        journal.append({"b": 2})
    assert (tmp_path / "journal").read_bytes() == content + b'\n{"b": 2}\n'


def test_journal_does_not_touch_a_whole_first_line_that_completes_no_group(tmp_path):
    (tmp_path / "journal").write_bytes(b'{"a": 1}')
    for read in (Journal, lambda path, completes: list(read_journal(path, completes))):
        with pytest.raises(InputError, match="is not a journal"):
            read(tmp_path / "journal", lambda entry: "done" in entry)
    assert (tmp_path / "journal").read_bytes() == b'{"a": 1}'


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_journal_finds_its_end_whatever_the_size_of_a_block(path, monkeypatch, block):
    monkeypatch.setattr("sca.io.journal.BLOCK_BYTES", block)
    whole = path.read_bytes()
    for tail in (b"", b"\0" * 9, b'{"number": 50, "te', b"\n\n[1]\n"):
        path.write_bytes(whole + tail)
        with Journal(path) as journal:
            assert journal.dropped_bytes == len(tail)
        assert list(read_journal(path, lambda entry: entry["number"] == 30)) == ENTRIES[:31]


def test_read_journal_survives_that_another_process_truncates_the_file(path, monkeypatch):
    """A memory map of the file would end this process with SIGBUS."""
    monkeypatch.setattr("sca.io.journal.BLOCK_BYTES", 100)

    def completes(entry):
        os.truncate(path, 0)
        return False

    assert list(read_journal(path, completes)) == []


def test_journal_names_a_line_that_is_damaged_before_its_end(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:10], b"\0\0\0\n", *lines[11:]]))
    with pytest.raises(InputError, match="line 11, is damaged"):
        list(read_journal(path))


def test_journal_on_a_full_disk_keeps_what_it_has(path):
    size = path.stat().st_size
    for limit in (size + 10, size, size // 2):
        with Journal(path) as journal, full_disk(limit), pytest.raises(OutputError, match="free some space"):
            journal.append({"number": 50, "text": "y" * 100})
        assert list(read_journal(path)) == ENTRIES
    with Journal(path) as journal:
        journal.append({"number": 50})
    assert len(list(read_journal(path))) == 51


def test_journal_keeps_complete_groups_only(path):
    def ends(entry):
        return entry["number"] % 20 == 19

    assert len(list(read_journal(path, ends))) == 40
    Journal(path, ends).close()
    assert list(read_journal(path)) == ENTRIES[:40]


def test_journal_is_open_once(path):
    with Journal(path), pytest.raises(LockedError, match="is being written by another process"):
        Journal(path)
    Journal(path).close()


def test_journal_syncs_every_few_seconds_and_at_its_end(tmp_path, monkeypatch):
    synced, clock = [], [0.0]
    monkeypatch.setattr(os, "fsync", synced.append)
    monkeypatch.setattr("sca.io.journal.time.monotonic", lambda: clock[0])
    journal = Journal(tmp_path / "journal", sync_seconds=3.0)
    synced.clear()
    for _ in range(10):
        clock[0] += 1.0
        journal.append({"a": 1})
    assert len(synced) == 3
    journal.close()
    assert len(synced) == 4
    synced.clear()
    with Journal(tmp_path / "other", sync_seconds=0) as each:
        synced.clear()
        each.append({"a": 1})
        assert len(synced) == 1
