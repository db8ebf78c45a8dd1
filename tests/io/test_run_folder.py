"""A command replaces and deletes only what the same kind of run wrote, and never an input."""

import json
import os
import signal
import time

import pytest

from sca.io.atomic import write_folder
from sca.io.errors import InputError, LockedError, OutputError
from sca.io.output_patterns import find_outputs, make_exact_pattern
from sca.io.run_folder import LOCK_FILE, MARKER_FILE, OutputFilter, RunFolder, check_not_inputs, iter_existing_paths


@pytest.fixture
def limited():
    """Code that waits for a FIFO fails instead of hanging."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


PATTERNS = ("a.txt", "b.txt", "*.part.txt", "step-#/*", "sub/*")


def run(folder, settings=None, outputs=("a.txt", "*.part.txt"), **options):
    """A run that writes its outputs and comes to its end; gives the run before it."""
    with RunFolder(folder, "test", PATTERNS) as run_folder:
        earlier = run_folder.begin(settings or {"x": 1}, outputs, **options)
        (folder / "a.txt").write_text("new")
        (folder / "1.part.txt").write_text("new")
        run_folder.finish()
    return earlier


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_run_folder_records_what_made_it(tmp_path):
    assert run(tmp_path / "out") is None
    earlier = run(tmp_path / "out")
    assert earlier.finished
    assert earlier.settings == {"x": 1}
    assert names(tmp_path / "out") == ["1.part.txt", "a.txt", MARKER_FILE]


@pytest.mark.parametrize("name", ["a.txt", "my.part.txt"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_run_folder_refuses_files_that_it_did_not_write(tmp_path, name, overwrite):
    (tmp_path / name).write_text("precious")
    with pytest.raises(OutputError, match=r"exists and was not written by `sca test`; choose another folder"):
        run(tmp_path, overwrite=overwrite)
    assert (tmp_path / name).read_text() == "precious"
    assert names(tmp_path) == [name]


def test_run_folder_refuses_a_dangling_link_in_place_of_an_output(tmp_path):
    (tmp_path / "a.txt").symlink_to("nowhere")
    with pytest.raises(OutputError, match="was not written"):
        run(tmp_path)


def test_run_folder_refuses_other_settings_with_the_ways_out(tmp_path):
    run(tmp_path, {"x": 1, "y": [1, 2]})
    with pytest.raises(OutputError, match=r"another run \(x: 1 there, 2 now\); choose .* replace the run"):
        run(tmp_path, {"x": 2, "y": (1, 2)})
    run(tmp_path, {"x": 2, "y": (1, 2)}, ignored_settings=["x"])


def test_overwrite_deletes_what_the_run_wrote_and_nothing_else(tmp_path):
    run(tmp_path)
    (tmp_path / "notes").write_text("precious")
    with RunFolder(tmp_path, "test", PATTERNS) as folder:
        assert folder.begin({"x": 2}, ["b.txt"], overwrite=True) is None
        assert names(tmp_path) == [LOCK_FILE, "notes", MARKER_FILE]


def test_overwrite_follows_no_link_out_of_the_folder(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.txt").write_text("precious")
    with RunFolder(tmp_path / "out", "test", PATTERNS) as folder:
        folder.begin({"x": 1}, ["sub/*"])
        (tmp_path / "out/sub").symlink_to(tmp_path / "other")
        folder.begin({"x": 2}, ["sub/*"], overwrite=True)
    assert (tmp_path / "other/a.txt").read_text() == "precious"


def test_set_aside_renames_the_folder_of_another_run(tmp_path):
    out = tmp_path / "out"
    run(out)
    (tmp_path / "out-1").mkdir()
    with RunFolder(out, "test", PATTERNS) as folder:
        folder.begin({"x": 2}, ["a.txt"], rename_earlier=True)
        assert folder.earlier_run_path == tmp_path / "out-2"
        assert names(out) == [LOCK_FILE, MARKER_FILE]
        with pytest.raises(LockedError), RunFolder(out, "test", PATTERNS):
            pass
    assert names(tmp_path / "out-2") == ["1.part.txt", "a.txt", MARKER_FILE]
    assert run(tmp_path / "out-2") is not None


def test_kinds_of_runs_share_a_folder_but_no_files(tmp_path):
    run(tmp_path)
    with RunFolder(tmp_path, "other", PATTERNS) as folder:
        folder.begin({}, ["b.txt"])
        with pytest.raises(OutputError, match="not written by `sca other`"):
            folder.begin({}, ["a.txt"])
    assert run(tmp_path) is not None


def test_one_process_at_a_time(tmp_path):
    held = pytest.raises(LockedError, match="is being written by another process; wait for it")
    with RunFolder(tmp_path, "test", PATTERNS), held:
        run(tmp_path)
    run(tmp_path)
    assert LOCK_FILE not in names(tmp_path)


@pytest.mark.parametrize("kind", ["fifo", "read fifo", "folder", "link", "dangling link"])
def test_run_folder_refuses_an_irregular_lock_file_without_waiting(tmp_path, limited, kind):
    path, reader = tmp_path / "out" / LOCK_FILE, None
    path.parent.mkdir()
    (tmp_path / "mine").write_text("precious")
    if "fifo" in kind:
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK) if kind == "read fifo" else None
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / ("mine" if kind == "link" else "absent"))
    with pytest.raises(OutputError, match="lock is not a regular file; remove it or choose another folder"):
        run(tmp_path / "out")
    if reader is not None:
        os.close(reader)
    assert names(tmp_path) == ["mine", "out"]
    assert names(tmp_path / "out") == [LOCK_FILE]


def test_run_folder_does_not_wait_for_fifos_with_the_names_of_drafts(tmp_path, limited):
    names = [f".sca-{'0' * 16}.part", ".sca-x.part", f".out.{'0' * 16}"]
    for name in names:
        os.mkfifo(tmp_path / name)
    run(tmp_path)
    with write_folder(tmp_path / "out"):
        pass
    assert all((tmp_path / name).is_fifo() for name in names)


def test_run_folder_removes_what_a_kill_left_in_its_own_folders_and_nowhere_else(tmp_path):
    draft = f".sca-{'0' * 16}.part"
    for name in ("out", "out/step-7", "out/step-x", "out/sub", "out/sub/below", "out/other", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / draft).touch()
    (tmp_path / "out" / "step-8").symlink_to(tmp_path / "elsewhere")
    run(tmp_path / "out")
    left = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob(draft))
    assert left == ["elsewhere", "out/other", "out/step-x", "out/sub/below"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.slow
def test_lock_ends_with_its_process_and_is_not_kept_by_forked_workers(tmp_path):
    ready, worker = os.pipe(), None
    pid = os.fork()
    if pid == 0:
        with RunFolder(tmp_path, "test", PATTERNS):
            worker = os.fork()
            if worker == 0:
                time.sleep(30)
                os._exit(0)
            os.write(ready[1], str(worker).encode())
            time.sleep(30)
        os._exit(0)
    worker = int(os.read(ready[0], 20))
    time.sleep(0.2)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        run(tmp_path)
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("way", ["same", "spelling", "relative", "symlink", "hardlink", "linked folder"])
def test_check_not_inputs_sees_through_names(tmp_path, monkeypatch, way):
    folder = tmp_path / "data"
    folder.mkdir()
    given = folder / "a.jsonl"
    given.write_text("precious")
    output = given
    if way == "spelling":
        output = folder / ".." / "data" / "." / "a.jsonl"
    elif way == "relative":
        monkeypatch.chdir(folder)
        output = "a.jsonl"
    elif way == "symlink":
        output = tmp_path / "link"
        output.symlink_to(given)
    elif way == "hardlink":
        output = tmp_path / "link"
        os.link(given, output)
    elif way == "linked folder":
        (tmp_path / "linked").symlink_to(folder)
        output = tmp_path / "linked" / "a.jsonl"
    with pytest.raises(OutputError, match="would be overwritten and is an input of this command"):
        check_not_inputs([output], [given])
    check_not_inputs([tmp_path / "other"], [given])


def test_check_not_inputs_refuses_a_folder_that_contains_an_input(tmp_path):
    (tmp_path / "runs/model").mkdir(parents=True)
    (tmp_path / "runs/model/spec.json").touch()
    with pytest.raises(OutputError, match="is an input"):
        check_not_inputs([tmp_path / "runs"], [tmp_path / "runs/model/spec.json"])
    with pytest.raises(OutputError, match="is an input"):  # an input folder of the run folder itself
        check_not_inputs([tmp_path / "runs/model/spec.json"], [tmp_path / "runs/model"], tmp_path / "runs")
    check_not_inputs([tmp_path / "runs/model/spec.json"], [tmp_path], tmp_path / "runs")


HOSTILE_PATTERNS = ["../*", "../*/*", "*", "**/*", "/etc/*", "{tmp}/*", "./../*", "sub/../../*", "*/*", "notes"]


@pytest.mark.parametrize("pattern", HOSTILE_PATTERNS)
def test_run_folder_deletes_nothing_that_only_a_marker_claims(tmp_path, pattern):
    out = tmp_path / "data/out"
    mine = [tmp_path / "notes", tmp_path / "data/notes", out / "notes", out / "sub-2/notes"]
    (out / "sub-2").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for path in mine:
        path.write_text("precious")
    claimed = {"settings": {"x": 0}, "outputs": [pattern.format(tmp=tmp_path)], "finished": True, "version": ""}
    (out / MARKER_FILE).write_text(json.dumps({"format": 1, "runs": {"test": claimed}}))
    run(out, overwrite=True)
    run(out, {"x": 2}, overwrite=True)
    assert all(path.read_text() == "precious" for path in mine)
    assert (tmp_path / "empty").is_dir()


def test_run_folder_counts_only_decimal_numbers_as_its_own(tmp_path):
    names = ["step-5/a", "step-500/a", "step-5-good/a", "step-x/a", "step-#/a", "step-/a"]
    for name in names:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    assert [str(path.relative_to(tmp_path)) for path in find_outputs(tmp_path, ["step-#/*"])] == names[:2]


def test_exact_pattern_matches_one_name(tmp_path):
    names = ["a#1.txt", "a51.txt", "a[1].txt", "a1.txt", "a*.txt"]
    for name in names:
        (tmp_path / name).touch()
    for name in names:
        assert find_outputs(tmp_path, [make_exact_pattern(name)]) == [tmp_path / name]
    with RunFolder(tmp_path / "out", "test", ["*.txt"]) as folder:
        folder.begin({}, map(make_exact_pattern, names))
        assert set(folder.last_run.outputs) == set(map(make_exact_pattern, names))


def test_a_damaged_marker_is_one_line(tmp_path):
    (tmp_path / MARKER_FILE).write_text("{")
    with pytest.raises(InputError, match="is damaged; choose another folder, or remove the file"):
        run(tmp_path)


def test_output_filter_tells_outputs_from_other_files(tmp_path):
    run(tmp_path)
    written = OutputFilter(PATTERNS)
    assert [name for name in ("a.txt", "1.part.txt", "mine.txt") if written(tmp_path / name)] == ["a.txt", "1.part.txt"]
    assert not OutputFilter(["b.txt"])(tmp_path / "a.txt")
    assert written.skipped_paths == [tmp_path / "a.txt", tmp_path / "1.part.txt"]


def test_existing_paths_are_found_at_any_depth(tmp_path):
    (tmp_path / "a").touch()
    settings = {"model": str(tmp_path / "a"), "more": [{"x": tmp_path, "y": "no such", "z": 3}], "long": "x" * 9999}
    assert list(iter_existing_paths(settings)) == [tmp_path / "a", tmp_path]
