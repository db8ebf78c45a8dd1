"""Lock files: exclusive, waited for, and removed after use."""

import threading

import pytest

from sca.io.file_lock import LockedError, hold_lock, wait_for_lock


def test_hold_lock_rejects_a_second_holder_and_removes_the_file(tmp_path):
    path = tmp_path / "model.lock"
    with (
        hold_lock(path, "the model"),
        pytest.raises(LockedError, match="the model is being written"),
        hold_lock(path, "the model"),
    ):
        pass
    assert not path.exists()


def test_wait_for_lock_waits_for_its_holder(tmp_path):
    path, events = tmp_path / "model.lock", []

    def wait_for_holder():
        with wait_for_lock(path):
            events.append("waited")

    thread = threading.Thread(target=wait_for_holder)
    with hold_lock(path, "the model"):
        thread.start()
        thread.join(timeout=0.5)
        events.append("released")
    thread.join()
    assert events == ["released", "waited"]
    assert not path.exists()


def test_wait_for_lock_keeps_an_error_of_its_block(tmp_path):
    path = tmp_path / "model.lock"
    with pytest.raises(LockedError, match="inner"), wait_for_lock(path):
        raise LockedError("inner")
    assert not path.exists()
