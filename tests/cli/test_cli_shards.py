"""Shards: one command and many processes write the same captions, and a resumed run skips finished shards."""

import errno
import io
import json
import os
import tarfile
from pathlib import Path

import pytest


@pytest.fixture
def image_paths(write_image):
    return [write_image(f"photos/{name}.png") for name in "abcde"]


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


BOX_ARGUMENTS = (
    "--box",
    "4,4,40,40",
    "--box",
    "10,10,30,30",
    "--batch-size",
    "1",
)  # all batches have the same size


@pytest.mark.slow
def test_caption_in_shards_matches_unsharded_captions(run_sca, checkpoint, image_paths, working_folder):
    assert run_sca("caption", "photos", *BOX_ARGUMENTS, "--model", checkpoint, "--out", "whole", "--quiet").status == 0
    result = run_sca(
        *("caption", "photos", *BOX_ARGUMENTS, "--model", checkpoint, "--out", "parts"),
        *("--launcher", "local num_workers=2", "--shard-size", 2),
    )
    assert result.status == 0, result.err
    shard_files = sorted((working_folder / "parts").glob("*.jsonl"))
    assert [path.name for path in shard_files] == [f"shard-0000{n}.jsonl" for n in range(3)]
    sharded_records, unsharded_records = (
        [record for path in shard_files for record in read_jsonl(path)],
        read_jsonl(working_folder / "whole/captions.jsonl"),
    )
    for record in unsharded_records:  # workers have fewer threads, which may change the last bits
        record |= {name: pytest.approx(record[name], rel=1e-4) for name in ("score", "predicted_iou")}
    assert sharded_records == unsharded_records
    assert len(result.err) == 3


@pytest.mark.slow
def test_caption_in_shards_skips_finished_shards_and_rejects_other_options(
    run_sca, checkpoint, image_paths, working_folder
):
    arguments = (
        "caption",
        "photos",
        *BOX_ARGUMENTS,
        "--model",
        checkpoint,
        "--out",
        "parts",
        "--launcher",
        "local num_workers=1",
    )
    assert run_sca(*arguments, "--shard-size", 3).status == 0
    (working_folder / "parts/shard-00001.jsonl").unlink()
    modification_time = (working_folder / "parts/shard-00000.jsonl").stat().st_mtime_ns
    repeated_result = run_sca(*arguments, "--shard-size", 3)
    assert repeated_result.status == 0
    assert repeated_result.err[0] == "sca: 1 of 2 shards are already captioned"
    assert (working_folder / "parts/shard-00000.jsonl").stat().st_mtime_ns == modification_time
    other_options_result = run_sca(*arguments, "--shard-size", 3, "--max-new-tokens", 2)
    assert other_options_result.status == 2
    assert 'contains a different run (max_new_tokens: null there, "2" now)' in other_options_result.err[0]
    (working_folder / "parts/shard-00001.jsonl").unlink()
    resumed_result = run_sca(*arguments, "--shard-size", 3, "--resume", "--batch-size", 2)  # same captions
    assert resumed_result.status == 0
    assert resumed_result.err[0] == "sca: 1 of 2 shards are already captioned"


@pytest.mark.slow
def test_repeated_shards_report_images_that_failed_before(run_sca, checkpoint, image_paths, working_folder):
    (working_folder / "photos/b.png").write_bytes(b"no image")
    arguments = (
        "caption",
        "photos",
        *BOX_ARGUMENTS,
        "--model",
        checkpoint,
        "--out",
        "parts",
        "--launcher",
        "local num_workers=1",
    )
    for _ in range(2):
        result = run_sca(*arguments, "--shard-size", 3)
        assert result.status == 1
        assert sum(line.startswith("sca: shard-00000: photos/b.png") for line in result.err) == 1
    assert "--overwrite" in result.err[-1]
    assert len(read_jsonl(working_folder / "parts/shard-00000.jsonl")) == 4


@pytest.mark.slow
def test_shards_match_prompts_to_images_like_unsharded_run(run_sca, checkpoint, write_image, working_folder):
    for name in ("a/x.png", "b/x.png"):
        write_image(name)
    (working_folder / "p.jsonl").write_text(json.dumps({"image": "a/x.png", "box": [4, 4, 40, 40]}) + "\n")
    arguments = ("caption", "a/x.png", "b/x.png", "--prompts", "p.jsonl", "--model", checkpoint, "--quiet")
    unsharded_result = run_sca(*arguments, "--out", "whole")
    sharded_result = run_sca(*arguments, "--out", "parts", "--launcher", "local num_workers=1", "--shard-size", 2)
    assert unsharded_result.status == sharded_result.status == 2
    assert "b/x.png: p.jsonl has no regions for it" in unsharded_result.err[0]
    assert "b/x.png: p.jsonl has no regions for it" in sharded_result.err[0]
    assert {line["image"] for line in read_jsonl(working_folder / "parts/shard-00000.jsonl")} == {"a/x.png"}


@pytest.mark.slow
def test_failed_archive_shard_names_archive_and_image(run_sca, checkpoint, image_paths, working_folder):
    with tarfile.open(working_folder / "set.tar", "w") as tar:
        tar.add(working_folder / "photos/a.png", "a.png")
    arguments = ("--model", checkpoint, "--out", "parts", "--launcher", "local num_workers=1", "--quiet")
    result = run_sca("caption", "set.tar", "--box", "9000,9000,9100,9100", *arguments)
    assert result.err[0].startswith(f"sca: set: failed: {working_folder / 'set.tar'}/a.png: the box")


@pytest.mark.slow
def test_shard_without_valid_prompt_fails_and_is_reported_missing(run_sca, checkpoint, image_paths, working_folder):
    arguments = (
        "--box",
        "9000,9000,9100,9100",
        "--model",
        checkpoint,
        "--out",
        "parts",
        "--launcher",
        "local num_workers=1",
    )
    result = run_sca("caption", "photos", *arguments, "--quiet")
    assert result.status == 1
    assert "shard-00000: failed: photos/a.png: the box" in result.err[0]
    assert result.err[-1] == "sca: 1 shard missing; repeat the command to resume"
    assert not (working_folder / "parts/shard-00000.jsonl").exists()


SHARD_NAMES = ("set-0", "shard-00000")
RUN_SETTINGS = {"images": ["x"], "max_new_tokens": "2"}


def begin_run(folder, contents, finished_names=(), settings=RUN_SETTINGS, inputs=(), overwrite=False):
    """Begin a run of shards, and finish some of them."""
    from sca.inference.shards import JOURNAL_NAME, OUTPUT_PATTERNS, RUN_KIND, begin_sharded_run
    from sca.io.journal import Journal
    from sca.io.run_folder import RunFolder

    with RunFolder(folder, RUN_KIND, OUTPUT_PATTERNS) as run_folder:
        earlier_names = begin_sharded_run(run_folder, settings, contents, inputs, overwrite)
        with Journal(folder / JOURNAL_NAME) as journal:
            for name in finished_names:
                (folder / f"{name}.jsonl").write_text(f"{name}\n")
                journal.append({"shard": name, "content": contents[name]})
    return set(earlier_names)


@pytest.mark.parametrize("name", ["photos.jsonl", "shards.journal"])
def test_sharded_run_rejects_folder_with_files_it_did_not_write(tmp_path, name):
    from sca.io.errors import OutputError

    (tmp_path / name).write_text("precious")
    (tmp_path / "shards.json").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="was not written by `sca caption --launcher`"):
            begin_run(tmp_path, {"photos": "1"}, overwrite=overwrite)
    with pytest.raises(OutputError, match="is an input of this command"):
        begin_run(tmp_path, {"photos": "1"}, inputs=[tmp_path / name])
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["precious"] * 2


def test_sharded_run_rejects_its_prompts_file_as_output(get_sca_error, write_image, working_folder):
    write_image("photos/a.png")
    record = json.dumps({"image": "photos/a.png", "box": [4, 4, 40, 40]})
    (working_folder / "shard-00000.jsonl").write_text(record)
    arguments = ("caption", "photos", "--prompts", "shard-00000.jsonl", "--out", ".", "--launcher", "local", "--quiet")
    assert "is an input of this command" in get_sca_error(2, *arguments)
    assert (working_folder / "shard-00000.jsonl").read_text() == record


def test_sharded_run_counts_only_shards_in_journal_as_finished(tmp_path):
    contents = dict.fromkeys(SHARD_NAMES, "1")
    assert begin_run(tmp_path, contents, ["set-0"]) == set()
    (tmp_path / "shard-00000.jsonl").write_text("of a run that was killed before it was recorded")
    assert begin_run(tmp_path, {"set-0": "1"}) == {"set-0"}
    assert not (tmp_path / "shard-00000.jsonl").exists()
    assert begin_run(tmp_path, contents, ["shard-00000"]) == {"set-0"}
    assert begin_run(tmp_path, {**contents, "set-1": "2"}) == set(SHARD_NAMES), "more archives"
    (tmp_path / "set-0.jsonl").unlink()
    assert begin_run(tmp_path, contents) == {"shard-00000"}


def test_sharded_run_of_other_images_or_options_requires_overwrite(tmp_path):
    from sca.io.errors import OutputError

    contents = dict.fromkeys(SHARD_NAMES, "1")
    begin_run(tmp_path, contents, ["set-0"])
    changed_contents = {**contents, "shard-00000": "2"}
    assert begin_run(tmp_path, changed_contents) == {"set-0"}, "what is not finished may change"
    for other_contents, settings in (
        ({**contents, "set-0": "2"}, RUN_SETTINGS),
        (contents, {**RUN_SETTINGS, "max_new_tokens": "3"}),
    ):
        with pytest.raises(OutputError, match=r"contains a different run \(.*or replace the run"):
            begin_run(tmp_path, other_contents, settings=settings)
    assert (tmp_path / "set-0.jsonl").read_text() == "set-0\n"
    (tmp_path / "mine.jsonl").write_text("precious")
    for replacement_contents in (changed_contents, {"set-1": "1"}):
        assert begin_run(tmp_path, replacement_contents, replacement_contents, overwrite=True) == set()
        file_stems = {path.stem for path in tmp_path.glob("*.jsonl")}
        assert file_stems == {*replacement_contents, "mine"}


def test_name_shards_avoids_archive_names_and_fingerprints_depend_on_content(tmp_path):
    from sca.inference.shards import _compute_fingerprint, name_shards

    archive = tmp_path / "shard-00000.tar"
    shards = name_shards([str(archive)], [Path("a.png"), Path("b.png")], 1)
    assert list(shards) == ["shard-00000", "shard-00001", "shard-00002"]
    assert shards["shard-00000"] == {"tar": str(archive)}
    fingerprint_without_archive = _compute_fingerprint(shards["shard-00000"])
    archive.write_bytes(b"one")
    fingerprint_of_archive = _compute_fingerprint(shards["shard-00000"])
    archive.write_bytes(b"three")
    assert (
        len(
            {
                fingerprint_without_archive,
                fingerprint_of_archive,
                _compute_fingerprint(shards["shard-00000"]),
                _compute_fingerprint(shards["shard-00001"]),
            }
        )
        == 4
    )


@pytest.mark.parametrize(
    ("error_number", "is_image_error"), [(errno.ENOSPC, False), (errno.EIO, False), (errno.EISDIR, True)]
)
def test_disk_error_fails_whole_shard_and_image_error_only_the_image(
    tmp_path, monkeypatch, error_number, is_image_error
):
    from sca.inference.shards import caption_shard

    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))

    def raise_os_error(*arguments, **options):
        raise OSError(error_number, os.strerror(error_number))

    monkeypatch.setattr(tarfile.TarFile, "extract", raise_os_error)
    monkeypatch.chdir(tmp_path)  # `caption_shard` changes the current folder
    config = {
        "job": {"model": "sca-tiny", "everything": True},
        "content": {"tar": str(tmp_path / "set.tar")},
        "folder": str(tmp_path),
        "device": "cpu",
    }
    outcome = caption_shard(config, str(tmp_path / "work"))
    if is_image_error:
        assert outcome["state"] == "done"
        assert "a.png of " in outcome["problems"][0][0]
    else:
        reason = f"cannot unpack {tmp_path}/set.tar: {os.strerror(error_number)}"
        assert outcome == {"state": "failed", "reason": reason}


def test_sharded_run_with_missing_image_exits_with_1(run_sca, working_folder, monkeypatch):
    launcher_arguments = (*BOX_ARGUMENTS, "--out", "out", "--launcher", "local")
    assert run_sca("caption", "gone.png", *launcher_arguments).status == 1
    assert not (working_folder / "out").exists()
    monkeypatch.setattr("sca.inference.shards.ShardedRun.caption_shards", lambda *arguments: iter(()))
    assert run_sca("caption", "gone.png", "set.tar", *launcher_arguments).status == 1


@pytest.mark.slow
def test_archive_is_one_shard_and_damaged_image_in_it_is_reported(run_sca, checkpoint, image_paths, working_folder):
    (working_folder / "photos/broken.jpg").write_bytes(b"\xff\xd8 not an image")
    with tarfile.open(working_folder / "set-7.tar", "w") as tar:
        for path in sorted((working_folder / "photos").iterdir()):
            tar.add(path, path.name)
        tar.add(working_folder / "photos/a.png", "a.txt")
    result = run_sca(
        *(
            "caption",
            "set-7.tar",
            *BOX_ARGUMENTS,
            "--model",
            checkpoint,
            "--out",
            "parts",
            "--launcher",
            "local num_workers=1",
        )
    )
    assert result.status == 1
    assert any("set-7: " in line and "broken.jpg" in line for line in result.err)
    records = read_jsonl(working_folder / "parts/set-7.jsonl")
    assert len(records) == 10
    assert {line["image"] for line in records} == {f"{working_folder / 'set-7.tar'}/{name}.png" for name in "abcde"}


@pytest.mark.slow
def test_shard_captions_images_with_names_that_look_like_options_or_patterns(
    run_sca, checkpoint, write_image, working_folder
):
    (working_folder / "~").mkdir()
    names = ["--task=recognition.png", "-x.png", "[a-z].png", "a.png", "~/a.png"]
    for name in names:
        write_image(name)
    arguments = ("--model", checkpoint, "--out", "out", "--launcher", "local num_workers=1", "--quiet")
    assert run_sca("caption", *BOX_ARGUMENTS, *arguments, "--", ".").status == 0
    assert sorted({line["image"] for line in read_jsonl(working_folder / "out/shard-00000.jsonl")}) == sorted(names)


def test_shard_with_deleted_files_captions_no_other_files(run_sca, checkpoint, write_image, working_folder):
    from sca.inference.shards import caption_shard

    write_image("a.png")
    job = {"model": str(checkpoint), "boxes": ["4,4,40,40"]}
    config = {
        "job": job,
        "content": {"images": ["[a-z].png", "*.png"]},
        "keys": {},
        "folder": str(working_folder),
        "device": "cpu",
    }
    outcome = caption_shard(config, str(working_folder / "work"))
    assert outcome["captions"] == ""
    assert all("there is no such file" in line for line, _ in outcome["problems"])
    assert len(outcome["problems"]) == 2


@pytest.mark.slow
def test_archive_members_cannot_refer_to_files_outside_the_archive(run_sca, checkpoint, write_image, working_folder):
    write_image("secret.png")
    write_image("packed/a.png")
    with tarfile.open(working_folder / "set.tar", "w") as tar:
        outside_names = (f"{working_folder}/secret.png", "../secret.png", "x/../../../secret.png")
        for name in (*outside_names, "*.png", "--task=x.png", "~/b.png"):
            member = tarfile.TarInfo(name)
            member.size = (working_folder / "packed/a.png").stat().st_size
            tar.addfile(member, io.BytesIO((working_folder / "packed/a.png").read_bytes()))
        symbolic_link = tarfile.TarInfo("link.png")
        symbolic_link.type, symbolic_link.linkname = tarfile.SYMTYPE, str(working_folder / "secret.png")
        tar.addfile(symbolic_link)
    (working_folder / "secret.png").write_bytes(b"not read")
    arguments = ("--model", checkpoint, "--out", "out", "--launcher", "local num_workers=1", "--quiet")
    result = run_sca("caption", "set.tar", *BOX_ARGUMENTS, *arguments)
    assert result.status == 1
    assert sum("cannot be unpacked" in line for line in result.err) == 2
    assert not any("not read" in line or "damaged" in line for line in result.err)
    inside_names = (f"{str(working_folder)[1:]}/secret.png", "*.png", "--task=x.png", "~/b.png")
    image_names = {line["image"] for line in read_jsonl(working_folder / "out/set.jsonl")}
    assert image_names == {f"{working_folder / 'set.tar'}/{name}" for name in inside_names}


@pytest.mark.slow
def test_failed_shard_reports_reason(run_sca, checkpoint, working_folder, monkeypatch):
    (working_folder / "broken.tar").write_bytes(b"no archive")
    with tarfile.open(working_folder / "empty.tar", "w"):
        pass
    arguments = ("--model", checkpoint, "--out", "out", "--launcher", "local num_workers=1", "--quiet")
    result = run_sca("caption", "broken.tar", "empty.tar", *BOX_ARGUMENTS, *arguments)
    assert result.status == 1
    assert any(line.startswith("sca: broken: failed: cannot read") for line in result.err)
    assert any("empty.tar contains no images" in line for line in result.err)


def raise_device_error(config, folder):
    raise RuntimeError(f"the reason of {config['device']}")


@pytest.mark.slow
def test_crashed_task_reports_last_line_of_its_log(tmp_path):
    from sca.launchers.local import LocalLauncher
    from sca.launchers.task import Task

    task = Task("a", f"{__name__}:raise_device_error", {"device": "cpu"}, str(tmp_path / "a"))
    (outcome,) = LocalLauncher(num_workers=1).run_tasks([task])
    assert outcome.result["state"] == "crashed"
    assert outcome.result["reason"] == "exited with status 1: RuntimeError: the reason of cpu"


@pytest.mark.parametrize(
    ("arguments", "expected_message"),
    [
        (("--launcher", "local"), "pass an output folder with --out"),
        (("--launcher", "local", "--out", "x", "--format", "png"), "writes one JSONL file per shard"),
        (("--launcher", "locl", "--out", "x"), "Did you mean 'local'"),
        (("--launcher", "local num_workers=-1", "--out", "x"), "workers is -1"),
    ],
)
def test_caption_reports_invalid_launcher_options_in_one_line(get_sca_error, image_paths, arguments, expected_message):
    assert expected_message in get_sca_error(2, "caption", "photos", *BOX_ARGUMENTS, *arguments)


@pytest.mark.all
def test_caption_on_ray_cluster_matches_unsharded_captions(run_sca, checkpoint, image_paths, working_folder):
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    try:
        assert (
            run_sca("caption", "photos", *BOX_ARGUMENTS, "--model", checkpoint, "--out", "whole", "--quiet").status == 0
        )
        result = run_sca(
            *("caption", "photos", *BOX_ARGUMENTS, "--model", checkpoint, "--out", "parts", "--quiet"),
            *("--launcher", f'ray address="{cluster.address}"', "--shard-size", 2),
        )
        assert result.status == 0, result.err
    finally:
        ray.shutdown()
        cluster.shutdown()
    sharded_records = [line for path in sorted((working_folder / "parts").glob("*.jsonl")) for line in read_jsonl(path)]
    compared_fields = (
        "image",
        "region_id",
        "caption",
        "box",
    )  # another number of threads changes the order of sums, which is visible in untrained masks
    assert [[line[key] for key in compared_fields] for line in sharded_records] == [
        [line[key] for key in compared_fields] for line in read_jsonl(working_folder / "whole/captions.jsonl")
    ]
