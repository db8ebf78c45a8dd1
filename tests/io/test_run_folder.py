"""Run folders: a command replaces and deletes only outputs of the same type of run, never an input."""

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
def alarm_timeout():
    """Raise an error in code that blocks on a FIFO."""
    previous_handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous_handler)


PATTERNS = ("a.txt", "b.txt", "*.part.txt", "step-#/*", "sub/*")


def write_run(folder, settings=None, outputs=("a.txt", "*.part.txt"), **options):
    """Write the outputs of a run and finish it; return the previous run."""
    with RunFolder(folder, "test", PATTERNS) as run_folder:
        earlier_run = run_folder.begin_run(settings or {"x": 1}, outputs, **options)
        (folder / "a.txt").write_text("new")
        (folder / "1.part.txt").write_text("new")
        run_folder.finish()
    return earlier_run


def list_names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_run_folder_records_settings_and_completion_of_a_run(tmp_path):
    assert write_run(tmp_path / "out") is None
    earlier_run = write_run(tmp_path / "out")
    assert earlier_run.finished
    assert earlier_run.settings == {"x": 1}
    assert list_names(tmp_path / "out") == ["1.part.txt", "a.txt", MARKER_FILE]


@pytest.mark.parametrize("name", ["a.txt", "my.part.txt"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_run_folder_rejects_outputs_that_it_did_not_write(tmp_path, name, overwrite):
    (tmp_path / name).write_text("precious")
    with pytest.raises(OutputError, match=r"exists and was not written by `sca test`; choose another folder"):
        write_run(tmp_path, overwrite=overwrite)
    assert (tmp_path / name).read_text() == "precious"
    assert list_names(tmp_path) == [name]


def test_run_folder_rejects_a_dangling_symlink_at_an_output_path(tmp_path):
    (tmp_path / "a.txt").symlink_to("nowhere")
    with pytest.raises(OutputError, match="was not written"):
        write_run(tmp_path)


def test_run_folder_rejects_changed_settings_and_suggests_fixes(tmp_path):
    write_run(tmp_path, {"x": 1, "y": [1, 2]})
    with pytest.raises(OutputError, match=r"a different run \(x: 1 there, 2 now\); choose .* replace the run"):
        write_run(tmp_path, {"x": 2, "y": (1, 2)})
    write_run(tmp_path, {"x": 2, "y": (1, 2)}, ignored_settings=["x"])


def test_run_folder_overwrite_deletes_only_outputs_of_the_earlier_run(tmp_path):
    write_run(tmp_path)
    (tmp_path / "notes").write_text("precious")
    with RunFolder(tmp_path, "test", PATTERNS) as run_folder:
        assert run_folder.begin_run({"x": 2}, ["b.txt"], overwrite=True) is None
        assert list_names(tmp_path) == [LOCK_FILE, "notes", MARKER_FILE]


def test_run_folder_overwrite_does_not_follow_symlinks_out_of_the_folder(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.txt").write_text("precious")
    with RunFolder(tmp_path / "out", "test", PATTERNS) as run_folder:
        run_folder.begin_run({"x": 1}, ["sub/*"])
        (tmp_path / "out/sub").symlink_to(tmp_path / "other")
        run_folder.begin_run({"x": 2}, ["sub/*"], overwrite=True)
    assert (tmp_path / "other/a.txt").read_text() == "precious"


def test_run_folder_rename_earlier_moves_the_earlier_run_aside(tmp_path):
    out = tmp_path / "out"
    write_run(out)
    (tmp_path / "out-1").mkdir()
    with RunFolder(out, "test", PATTERNS) as run_folder:
        run_folder.begin_run({"x": 2}, ["a.txt"], rename_earlier=True)
        assert run_folder.earlier_run_path == tmp_path / "out-2"
        assert list_names(out) == [LOCK_FILE, MARKER_FILE]
        with pytest.raises(LockedError), RunFolder(out, "test", PATTERNS):
            pass
    assert list_names(tmp_path / "out-2") == ["1.part.txt", "a.txt", MARKER_FILE]
    assert write_run(tmp_path / "out-2") is not None


def test_run_folder_commands_share_a_folder_but_not_files(tmp_path):
    write_run(tmp_path)
    with RunFolder(tmp_path, "other", PATTERNS) as run_folder:
        run_folder.begin_run({}, ["b.txt"])
        with pytest.raises(OutputError, match="not written by `sca other`"):
            run_folder.begin_run({}, ["a.txt"])
    assert write_run(tmp_path) is not None


def test_run_folder_is_locked_to_one_process(tmp_path):
    expect_locked = pytest.raises(LockedError, match="is being written by another process; wait for it")
    with RunFolder(tmp_path, "test", PATTERNS), expect_locked:
        write_run(tmp_path)
    write_run(tmp_path)
    assert LOCK_FILE not in list_names(tmp_path)


@pytest.mark.parametrize("lock_kind", ["fifo", "fifo with reader", "folder", "symlink", "dangling symlink"])
def test_run_folder_rejects_an_irregular_lock_file_without_waiting(tmp_path, alarm_timeout, lock_kind):
    path, read_descriptor = tmp_path / "out" / LOCK_FILE, None
    path.parent.mkdir()
    (tmp_path / "mine").write_text("precious")
    if "fifo" in lock_kind:
        os.mkfifo(path)
        read_descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK) if lock_kind == "fifo with reader" else None
    elif lock_kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / ("mine" if lock_kind == "symlink" else "absent"))
    with pytest.raises(OutputError, match="lock is not a regular file; remove it or choose another folder"):
        write_run(tmp_path / "out")
    if read_descriptor is not None:
        os.close(read_descriptor)
    assert list_names(tmp_path) == ["mine", "out"]
    assert list_names(tmp_path / "out") == [LOCK_FILE]


def test_run_folder_does_not_block_on_fifos_named_like_drafts(tmp_path, alarm_timeout):
    fifo_names = [f".sca-{'0' * 16}.part", ".sca-x.part", f".out.{'0' * 16}"]
    for name in fifo_names:
        os.mkfifo(tmp_path / name)
    write_run(tmp_path)
    with write_folder(tmp_path / "out"):
        pass
    assert all((tmp_path / name).is_fifo() for name in fifo_names)


def test_run_folder_removes_stale_drafts_only_in_its_own_folders(tmp_path):
    draft_name = f".sca-{'0' * 16}.part"
    for name in ("out", "out/step-7", "out/step-x", "out/sub", "out/sub/below", "out/other", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / draft_name).touch()
    (tmp_path / "out" / "step-8").symlink_to(tmp_path / "elsewhere")
    write_run(tmp_path / "out")
    remaining_folders = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob(draft_name))
    assert remaining_folders == ["elsewhere", "out/other", "out/step-x", "out/sub/below"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.slow
def test_run_folder_lock_ends_with_its_process_despite_forked_workers(tmp_path):
    pipe, worker_pid = os.pipe(), None
    pid = os.fork()
    if pid == 0:
        with RunFolder(tmp_path, "test", PATTERNS):
            worker_pid = os.fork()
            if worker_pid == 0:
                time.sleep(30)
                os._exit(0)
            os.write(pipe[1], str(worker_pid).encode())
            time.sleep(30)
        os._exit(0)
    worker_pid = int(os.read(pipe[0], 20))
    time.sleep(0.2)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        write_run(tmp_path)
    finally:
        os.kill(worker_pid, signal.SIGKILL)


@pytest.mark.parametrize("alias_kind", ["same", "dot segments", "relative", "symlink", "hardlink", "symlinked folder"])
def test_check_not_inputs_rejects_aliases_of_an_input_path(tmp_path, monkeypatch, alias_kind):
    folder = tmp_path / "data"
    folder.mkdir()
    input_path = folder / "a.jsonl"
    input_path.write_text("precious")
    output_path = input_path
    if alias_kind == "dot segments":
        output_path = folder / ".." / "data" / "." / "a.jsonl"
    elif alias_kind == "relative":
        monkeypatch.chdir(folder)
        output_path = "a.jsonl"
    elif alias_kind == "symlink":
        output_path = tmp_path / "symlink"
        output_path.symlink_to(input_path)
    elif alias_kind == "hardlink":
        output_path = tmp_path / "symlink"
        os.link(input_path, output_path)
    elif alias_kind == "symlinked folder":
        (tmp_path / "linked").symlink_to(folder)
        output_path = tmp_path / "linked" / "a.jsonl"
    with pytest.raises(OutputError, match="would be overwritten and is an input of this command"):
        check_not_inputs([output_path], [input_path])
    check_not_inputs([tmp_path / "other"], [input_path])


def test_check_not_inputs_rejects_a_folder_that_contains_an_input(tmp_path):
    (tmp_path / "runs/model").mkdir(parents=True)
    (tmp_path / "runs/model/spec.json").touch()
    with pytest.raises(OutputError, match="is an input"):
        check_not_inputs([tmp_path / "runs"], [tmp_path / "runs/model/spec.json"])
    with pytest.raises(OutputError, match="is an input"):  # an input folder of the run folder itself
        check_not_inputs([tmp_path / "runs/model/spec.json"], [tmp_path / "runs/model"], tmp_path / "runs")
    check_not_inputs([tmp_path / "runs/model/spec.json"], [tmp_path], tmp_path / "runs")


HOSTILE_PATTERNS = ["../*", "../*/*", "*", "**/*", "/etc/*", "{tmp}/*", "./../*", "sub/../../*", "*/*", "notes"]


@pytest.mark.parametrize("pattern", HOSTILE_PATTERNS)
def test_run_folder_keeps_files_that_only_a_forged_marker_claims(tmp_path, pattern):
    out = tmp_path / "data/out"
    user_files = [tmp_path / "notes", tmp_path / "data/notes", out / "notes", out / "sub-2/notes"]
    (out / "sub-2").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for path in user_files:
        path.write_text("precious")
    forged_run = {"settings": {"x": 0}, "outputs": [pattern.format(tmp=tmp_path)], "finished": True, "version": ""}
    (out / MARKER_FILE).write_text(json.dumps({"format": 1, "runs": {"test": forged_run}}))
    write_run(out, overwrite=True)
    write_run(out, {"x": 2}, overwrite=True)
    assert all(path.read_text() == "precious" for path in user_files)
    assert (tmp_path / "empty").is_dir()


def test_find_outputs_matches_hash_sign_with_decimal_numbers_only(tmp_path):
    relative_paths = ["step-5/a", "step-500/a", "step-5-good/a", "step-x/a", "step-#/a", "step-/a"]
    for name in relative_paths:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    assert [str(path.relative_to(tmp_path)) for path in find_outputs(tmp_path, ["step-#/*"])] == relative_paths[:2]


def test_make_exact_pattern_matches_only_the_literal_name(tmp_path):
    file_names = ["a#1.txt", "a51.txt", "a[1].txt", "a1.txt", "a*.txt"]
    for name in file_names:
        (tmp_path / name).touch()
    for name in file_names:
        assert find_outputs(tmp_path, [make_exact_pattern(name)]) == [tmp_path / name]
    with RunFolder(tmp_path / "out", "test", ["*.txt"]) as run_folder:
        run_folder.begin_run({}, map(make_exact_pattern, file_names))
        assert set(run_folder.last_run.outputs) == set(map(make_exact_pattern, file_names))


def test_run_folder_reports_a_damaged_marker_file(tmp_path):
    (tmp_path / MARKER_FILE).write_text("{")
    with pytest.raises(InputError, match="is damaged; choose another folder, or remove the file"):
        write_run(tmp_path)


def test_output_filter_separates_outputs_from_other_files(tmp_path):
    write_run(tmp_path)
    is_output = OutputFilter(PATTERNS)
    assert [name for name in ("a.txt", "1.part.txt", "mine.txt") if is_output(tmp_path / name)] == [
        "a.txt",
        "1.part.txt",
    ]
    assert not OutputFilter(["b.txt"])(tmp_path / "a.txt")
    assert is_output.skipped_paths == [tmp_path / "a.txt", tmp_path / "1.part.txt"]


def test_iter_existing_paths_finds_paths_at_any_depth(tmp_path):
    (tmp_path / "a").touch()
    settings = {"model": str(tmp_path / "a"), "more": [{"x": tmp_path, "y": "no such", "z": 3}], "long": "x" * 9999}
    assert list(iter_existing_paths(settings)) == [tmp_path / "a", tmp_path]
