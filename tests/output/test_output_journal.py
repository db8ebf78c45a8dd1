"""Journals: finished captions survive a resume that cannot write."""

import resource
import signal

import pytest
from PIL import Image
from sca_registry.contracts import Caption, Prompt

from sca.io.errors import DifferentRunError, OutputError
from sca.output.caption_journal import CAPTION_JOURNAL_NAME, CaptionJournal, count_journal_images

RUN_SETTINGS = {"model": "x"}
IMAGE = Image.new("RGB", (8, 8))
CAPTION = Caption("a thing", 0.5, (0.0, 0.0, 4.0, 4.0), None, None, Prompt(box=(0.0, 0.0, 4.0, 4.0)), 0)


def add_images(folder, image_names, resume):
    journal = CaptionJournal(folder, RUN_SETTINGS, resume)
    try:
        for name in image_names:
            journal.add(name, IMAGE, [CAPTION])
    finally:
        journal.close(finished=False)
    return journal


def test_caption_journal_keeps_its_images_if_a_resume_finds_a_full_disk(tmp_path):
    add_images(tmp_path, [f"{number}.png" for number in range(50)], resume=False)
    journal_bytes = (tmp_path / CAPTION_JOURNAL_NAME).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for max_bytes in (len(journal_bytes), len(journal_bytes) // 2):
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, limits[1]))
            with pytest.raises(OutputError, match="free some space"):
                add_images(tmp_path, ["new.png"], resume=True)
            assert (tmp_path / CAPTION_JOURNAL_NAME).read_bytes() == journal_bytes
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous_handler)
    assert len(add_images(tmp_path, ["new.png"], resume=True).completed) == 50
    assert count_journal_images(tmp_path) == 51


@pytest.mark.parametrize("tail", [b"\0" * 4096, b'{"image": "2', b'{"image": "2.png"\0\0\0'])
def test_caption_journal_resumes_after_a_truncated_or_zeroed_tail(tmp_path, tail):
    add_images(tmp_path, ["0.png", "1.png"], resume=False)
    with (tmp_path / CAPTION_JOURNAL_NAME).open("ab") as file:
        file.write(tail)
    assert list(add_images(tmp_path, ["2.png"], resume=True).completed) == ["0.png", "1.png"]
    assert list(CaptionJournal(tmp_path, RUN_SETTINGS, resume=True).completed) == ["0.png", "1.png", "2.png"]


def test_caption_journal_rejects_the_journal_of_another_run(tmp_path):
    add_images(tmp_path, ["0.png"], resume=False)
    with pytest.raises(
        DifferentRunError, match=r"journal contains a different run \(model: .*x.* there, .*y.* now\); choose"
    ):
        CaptionJournal(tmp_path, {"model": "y"}, resume=True)


def test_caption_journal_is_removed_when_its_run_has_finished(tmp_path):
    add_images(tmp_path, ["0.png"], resume=False)
    CaptionJournal(tmp_path, RUN_SETTINGS, resume=True).close(finished=True)
    assert not (tmp_path / CAPTION_JOURNAL_NAME).exists()
