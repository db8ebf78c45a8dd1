"""What a run has captioned outlives a resume that cannot write."""

import resource
import signal

import pytest
from PIL import Image
from sca_registry.contracts import Caption, Prompt

from sca.io.errors import DifferentRunError, OutputError
from sca.output.caption_journal import CAPTION_JOURNAL_NAME, CaptionJournal, count_journal_images

RUN = {"model": "x"}
IMAGE = Image.new("RGB", (8, 8))
CAPTION = Caption("a thing", 0.5, (0.0, 0.0, 4.0, 4.0), None, None, Prompt(box=(0.0, 0.0, 4.0, 4.0)), 0)


def add(folder, names, resume):
    journal = CaptionJournal(folder, RUN, resume)
    try:
        for name in names:
            journal.add(name, IMAGE, [CAPTION])
    finally:
        journal.close(finished=False)
    return journal


def test_journal_keeps_its_images_when_a_resume_finds_a_full_disk(tmp_path):
    add(tmp_path, [f"{number}.png" for number in range(50)], resume=False)
    before = (tmp_path / CAPTION_JOURNAL_NAME).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (len(before), len(before) // 2):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises(OutputError, match="free some space"):
                add(tmp_path, ["new.png"], resume=True)
            assert (tmp_path / CAPTION_JOURNAL_NAME).read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert len(add(tmp_path, ["new.png"], resume=True).completed) == 50
    assert count_journal_images(tmp_path) == 51


@pytest.mark.parametrize("tail", [b"\0" * 4096, b'{"image": "2', b'{"image": "2.png"\0\0\0'])
def test_journal_resumes_after_a_torn_or_zeroed_tail(tmp_path, tail):
    add(tmp_path, ["0.png", "1.png"], resume=False)
    with (tmp_path / CAPTION_JOURNAL_NAME).open("ab") as file:
        file.write(tail)
    assert list(add(tmp_path, ["2.png"], resume=True).completed) == ["0.png", "1.png"]
    assert list(CaptionJournal(tmp_path, RUN, resume=True).completed) == ["0.png", "1.png", "2.png"]


def test_journal_of_another_run_is_refused(tmp_path):
    add(tmp_path, ["0.png"], resume=False)
    with pytest.raises(
        DifferentRunError, match=r"journal contains another run \(model: .*x.* there, .*y.* now\); choose"
    ):
        CaptionJournal(tmp_path, {"model": "y"}, resume=True)


def test_journal_is_removed_when_its_run_has_finished(tmp_path):
    add(tmp_path, ["0.png"], resume=False)
    CaptionJournal(tmp_path, RUN, resume=True).close(finished=True)
    assert not (tmp_path / CAPTION_JOURNAL_NAME).exists()
