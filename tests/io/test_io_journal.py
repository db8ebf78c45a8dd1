"""Journals: every complete line is recovered."""

import json
import os
import signal
from contextlib import contextmanager

import pytest

from sca.io.errors import InputError, LockedError, OutputError
from sca.io.journal import Journal, read_journal

resource = pytest.importorskip("resource")
ENTRIES = [{"number": number, "text": "x" * number} for number in range(50)]
UNDECODABLE_TAILS = [
    b'{"number": 50, "te',
    b"\0" * 5000,
    b'{"number"\0\0\0\0\0',
    b"\0\0\n\0",
    b"[1, 2]\n",
    b"\xff\xfe\n",
    b"\n",
]


@contextmanager
def limit_file_size(max_bytes):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous_handler)


@pytest.fixture
def journal_path(tmp_path):
    with Journal(tmp_path / "journal") as journal:
        journal.append(*ENTRIES)
    return tmp_path / "journal"


def test_read_journal_returns_the_appended_entries(journal_path):
    assert list(read_journal(journal_path)) == ENTRIES
    assert list(read_journal(journal_path.with_name("absent"))) == []


@pytest.mark.parametrize("tail", UNDECODABLE_TAILS)
def test_journal_drops_only_an_undecodable_tail(journal_path, tail):
    complete_bytes = journal_path.read_bytes()
    journal_path.write_bytes(complete_bytes + tail)
    assert list(read_journal(journal_path)) == ENTRIES
    with Journal(journal_path) as journal:
        assert journal.dropped_bytes == len(tail)
        journal.append({"number": 50})
    assert journal_path.read_bytes() == complete_bytes + b'{"number": 50}\n'


@pytest.mark.parametrize("num_missing_bytes", range(1, 40, 7))
def test_read_journal_drops_a_truncated_last_line(journal_path, num_missing_bytes):
    journal_path.write_bytes(journal_path.read_bytes()[:-num_missing_bytes])
    assert list(read_journal(journal_path)) == ENTRIES[:-1]


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b'{"number": 0, "te', b'{"number"\0\0{\n'])
def test_journal_restarts_if_its_first_line_is_truncated(tmp_path, content):
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
def test_journal_rejects_and_keeps_files_that_are_not_journals(tmp_path, content):
    (tmp_path / "notes").write_bytes(content)
    with pytest.raises(InputError, match="was not written by sca; choose another folder"):
        Journal(tmp_path / "notes")
    assert (tmp_path / "notes").read_bytes() == content


@pytest.mark.parametrize("content", [b'{"a": 1}', b"{}", b'{"a": "\xc3\xa9"}'])
def test_journal_keeps_a_first_line_without_newline(tmp_path, content):
    (tmp_path / "journal").write_bytes(content)
    assert list(read_journal(tmp_path / "journal")) == [json.loads(content)]
    with Journal(tmp_path / "journal") as journal:
        assert not journal.is_empty
        assert journal.dropped_bytes == 0
        journal.append({"b": 2})
    assert (tmp_path / "journal").read_bytes() == content + b'\n{"b": 2}\n'


def test_journal_rejects_a_first_line_without_newline_or_complete_group(tmp_path):
    (tmp_path / "journal").write_bytes(b'{"a": 1}')
    for open_or_read in (Journal, lambda path, completes: list(read_journal(path, completes))):
        with pytest.raises(InputError, match="was not written by sca"):
            open_or_read(tmp_path / "journal", lambda entry: "done" in entry)
    assert (tmp_path / "journal").read_bytes() == b'{"a": 1}'


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 64])
def test_journal_finds_its_end_with_any_block_size(journal_path, monkeypatch, block_bytes):
    monkeypatch.setattr("sca.io.journal.BLOCK_BYTES", block_bytes)
    complete_bytes = journal_path.read_bytes()
    for tail in (b"", b"\0" * 9, b'{"number": 50, "te', b"\n\n[1]\n"):
        journal_path.write_bytes(complete_bytes + tail)
        with Journal(journal_path) as journal:
            assert journal.dropped_bytes == len(tail)
        assert list(read_journal(journal_path, lambda entry: entry["number"] == 30)) == ENTRIES[:31]


def test_read_journal_survives_truncation_by_another_process(journal_path, monkeypatch):
    """A memory map of the file would end the process with SIGBUS."""
    monkeypatch.setattr("sca.io.journal.BLOCK_BYTES", 100)

    def truncate_file(entry):
        os.truncate(journal_path, 0)
        return False

    assert list(read_journal(journal_path, truncate_file)) == []


def test_read_journal_names_a_damaged_line_before_the_end(journal_path):
    lines = journal_path.read_bytes().splitlines(keepends=True)
    journal_path.write_bytes(b"".join([*lines[:10], b"\0\0\0\n", *lines[11:]]))
    with pytest.raises(InputError, match="line 11, is damaged"):
        list(read_journal(journal_path))


def test_journal_on_a_full_disk_keeps_its_entries(journal_path):
    size = journal_path.stat().st_size
    for max_bytes in (size + 10, size, size // 2):
        with (
            Journal(journal_path) as journal,
            limit_file_size(max_bytes),
            pytest.raises(OutputError, match="free some space"),
        ):
            journal.append({"number": 50, "text": "y" * 100})
        assert list(read_journal(journal_path)) == ENTRIES
    with Journal(journal_path) as journal:
        journal.append({"number": 50})
    assert len(list(read_journal(journal_path))) == 51


def test_journal_keeps_only_complete_groups(journal_path):
    def completes_group(entry):
        return entry["number"] % 20 == 19

    assert len(list(read_journal(journal_path, completes_group))) == 40
    Journal(journal_path, completes_group).close()
    assert list(read_journal(journal_path)) == ENTRIES[:40]


def test_journal_is_locked_while_open(journal_path):
    with Journal(journal_path), pytest.raises(LockedError, match="is being written by another process"):
        Journal(journal_path)
    Journal(journal_path).close()


def test_journal_syncs_every_sync_seconds_and_on_close(tmp_path, monkeypatch):
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
    with Journal(tmp_path / "other", sync_seconds=0) as other_journal:
        synced.clear()
        other_journal.append({"a": 1})
        assert len(synced) == 1
