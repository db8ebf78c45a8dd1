"""Many pictures in shards: what one command does is what many processes do, and what is there is not made again."""

import errno
import io
import json
import os
import tarfile
from pathlib import Path

import pytest


@pytest.fixture
def pictures(picture):
    return [picture(f"photos/{name}.png") for name in "abcde"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


BOXES = ("--box", "4,4,40,40", "--box", "10,10,30,30", "--batch-size", "1")  # so that all batches are equally large


@pytest.mark.slow
def test_shards_say_what_one_command_says(shell, checkpoint, pictures, here):
    assert shell("caption", "photos", *BOXES, "--model", checkpoint, "--out", "whole", "--quiet").status == 0
    result = shell(
        *("caption", "photos", *BOXES, "--model", checkpoint, "--out", "parts"),
        *("--launcher", "local num_workers=2", "--shard-size", 2),
    )
    assert result.status == 0, result.err
    parts = sorted((here / "parts").glob("*.jsonl"))
    assert [path.name for path in parts] == [f"shard-0000{n}.jsonl" for n in range(3)]
    made, whole = [line for path in parts for line in lines(path)], lines(here / "whole/captions.jsonl")
    for line in whole:  # a worker has fewer threads, which may move the last bits
        line |= {name: pytest.approx(line[name], rel=1e-4) for name in ("score", "predicted_iou")}
    assert made == whole
    assert len(result.err) == 3


@pytest.mark.slow
def test_what_is_there_is_not_made_again_and_another_run_is_refused(shell, checkpoint, pictures, here):
    asked = ("caption", "photos", *BOXES, "--model", checkpoint, "--out", "parts", "--launcher", "local num_workers=1")
    assert shell(*asked, "--shard-size", 3).status == 0
    (here / "parts/shard-00001.jsonl").unlink()
    kept = (here / "parts/shard-00000.jsonl").stat().st_mtime_ns
    again = shell(*asked, "--shard-size", 3)
    assert again.status == 0
    assert again.err[0] == "sca: 1 of 2 shards are already captioned"
    assert (here / "parts/shard-00000.jsonl").stat().st_mtime_ns == kept
    other = shell(*asked, "--shard-size", 3, "--max-new-tokens", 2)
    assert other.status == 2
    assert 'contains another run (max_new_tokens: null there, "2" now)' in other.err[0]
    (here / "parts/shard-00001.jsonl").unlink()
    same = shell(*asked, "--shard-size", 3, "--resume", "--batch-size", 2)  # neither changes a caption
    assert same.status == 0
    assert same.err[0] == "sca: 1 of 2 shards are already captioned"


@pytest.mark.slow
def test_repeated_shards_report_the_images_that_were_not_captioned(shell, checkpoint, pictures, here):
    (here / "photos/b.png").write_bytes(b"no image")
    asked = ("caption", "photos", *BOXES, "--model", checkpoint, "--out", "parts", "--launcher", "local num_workers=1")
    for _ in range(2):
        result = shell(*asked, "--shard-size", 3)
        assert result.status == 1
        assert sum(line.startswith("sca: shard-00000: photos/b.png") for line in result.err) == 1
    assert "--overwrite" in result.err[-1]
    assert len(lines(here / "parts/shard-00000.jsonl")) == 4


@pytest.mark.slow
def test_shards_match_a_prompts_file_with_all_images_as_one_command_does(shell, checkpoint, picture, here):
    for name in ("a/x.png", "b/x.png"):
        picture(name)
    (here / "p.jsonl").write_text(json.dumps({"image": "a/x.png", "box": [4, 4, 40, 40]}) + "\n")
    asked = ("caption", "a/x.png", "b/x.png", "--prompts", "p.jsonl", "--model", checkpoint, "--quiet")
    whole = shell(*asked, "--out", "whole")
    parts = shell(*asked, "--out", "parts", "--launcher", "local num_workers=1", "--shard-size", 2)
    assert whole.status == parts.status == 2
    assert "b/x.png: p.jsonl has no regions for it" in whole.err[0]
    assert "b/x.png: p.jsonl has no regions for it" in parts.err[0]
    assert {line["image"] for line in lines(here / "parts/shard-00000.jsonl")} == {"a/x.png"}


@pytest.mark.slow
def test_archive_whose_prompts_all_fail_is_named(shell, checkpoint, pictures, here):
    with tarfile.open(here / "set.tar", "w") as tar:
        tar.add(here / "photos/a.png", "a.png")
    asked = ("--model", checkpoint, "--out", "parts", "--launcher", "local num_workers=1", "--quiet")
    result = shell("caption", "set.tar", "--box", "9000,9000,9100,9100", *asked)
    assert result.err[0].startswith(f"sca: set: failed: {here / 'set.tar'}/a.png: the box")


@pytest.mark.slow
def test_shard_whose_prompts_all_fail_is_not_finished(shell, checkpoint, pictures, here):
    far = ("--box", "9000,9000,9100,9100", "--model", checkpoint, "--out", "parts", "--launcher", "local num_workers=1")
    result = shell("caption", "photos", *far, "--quiet")
    assert result.status == 1
    assert "shard-00000: failed: photos/a.png: the box" in result.err[0]
    assert result.err[-1] == "sca: 1 shard missing; repeat the command to resume"
    assert not (here / "parts/shard-00000.jsonl").exists()


NAMES = ("set-0", "shard-00000")
SETTINGS = {"images": ["x"], "max_new_tokens": "2"}


def begin(folder, contents, done=(), settings=SETTINGS, inputs=(), overwrite=False):
    """Begin a run of shards, and finish some of them."""
    from sca.inference.shards import JOURNAL_NAME, OUTPUT_PATTERNS, RUN_KIND, begin_sharded_run
    from sca.io.journal import Journal
    from sca.io.run_folder import RunFolder

    with RunFolder(folder, RUN_KIND, OUTPUT_PATTERNS) as run_folder:
        earlier = begin_sharded_run(run_folder, settings, contents, inputs, overwrite)
        with Journal(folder / JOURNAL_NAME) as journal:
            for name in done:
                (folder / f"{name}.jsonl").write_text(f"{name}\n")
                journal.append({"shard": name, "content": contents[name]})
    return set(earlier)


@pytest.mark.parametrize("name", ["photos.jsonl", "shards.journal"])
def test_shards_refuse_files_that_they_did_not_write(tmp_path, name):
    from sca.io.errors import OutputError

    (tmp_path / name).write_text("precious")
    (tmp_path / "shards.json").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="was not written by `sca caption --launcher`"):
            begin(tmp_path, {"photos": "1"}, overwrite=overwrite)
    with pytest.raises(OutputError, match="is an input of this command"):
        begin(tmp_path, {"photos": "1"}, inputs=[tmp_path / name])
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["precious"] * 2


def test_shards_refuse_an_output_that_is_their_prompts_file(refused, picture, here):
    picture("photos/a.png")
    line = json.dumps({"image": "photos/a.png", "box": [4, 4, 40, 40]})
    (here / "shard-00000.jsonl").write_text(line)
    asked = ("caption", "photos", "--prompts", "shard-00000.jsonl", "--out", ".", "--launcher", "local", "--quiet")
    assert "is an input of this command" in refused(2, *asked)
    assert (here / "shard-00000.jsonl").read_text() == line


def test_shards_are_done_only_if_the_journal_lists_them(tmp_path):
    contents = dict.fromkeys(NAMES, "1")
    assert begin(tmp_path, contents, ["set-0"]) == set()
    (tmp_path / "shard-00000.jsonl").write_text("of a run that was killed before it was recorded")
    assert begin(tmp_path, {"set-0": "1"}) == {"set-0"}
    assert not (tmp_path / "shard-00000.jsonl").exists()
    assert begin(tmp_path, contents, ["shard-00000"]) == {"set-0"}
    assert begin(tmp_path, {**contents, "set-1": "2"}) == set(NAMES), "more archives"
    (tmp_path / "set-0.jsonl").unlink()
    assert begin(tmp_path, contents) == {"shard-00000"}


def test_shards_of_other_images_or_options_are_refused_and_overwritten_when_told(tmp_path):
    from sca.io.errors import OutputError

    contents = dict.fromkeys(NAMES, "1")
    begin(tmp_path, contents, ["set-0"])
    repaired = {**contents, "shard-00000": "2"}
    assert begin(tmp_path, repaired) == {"set-0"}, "what is not finished may change"
    for other, settings in (({**contents, "set-0": "2"}, SETTINGS), (contents, {**SETTINGS, "max_new_tokens": "3"})):
        with pytest.raises(OutputError, match=r"contains another run \(.*or replace the run"):
            begin(tmp_path, other, settings=settings)
    assert (tmp_path / "set-0.jsonl").read_text() == "set-0\n"
    (tmp_path / "mine.jsonl").write_text("precious")
    for overwritten in (repaired, {"set-1": "1"}):
        assert begin(tmp_path, overwritten, overwritten, overwrite=True) == set()
        shards = {path.stem for path in tmp_path.glob("*.jsonl")}
        assert shards == {*overwritten, "mine"}


def test_shard_numbers_are_names_that_no_archive_has(tmp_path):
    from sca.inference.shards import _compute_fingerprint, name_shards

    archive = tmp_path / "shard-00000.tar"
    shards = name_shards([str(archive)], [Path("a.png"), Path("b.png")], 1)
    assert list(shards) == ["shard-00000", "shard-00001", "shard-00002"]
    assert shards["shard-00000"] == {"tar": str(archive)}
    absent = _compute_fingerprint(shards["shard-00000"])
    archive.write_bytes(b"one")
    one = _compute_fingerprint(shards["shard-00000"])
    archive.write_bytes(b"three")
    assert (
        len({absent, one, _compute_fingerprint(shards["shard-00000"]), _compute_fingerprint(shards["shard-00001"])})
        == 4
    )


@pytest.mark.parametrize(("number", "is_of_image"), [(errno.ENOSPC, False), (errno.EIO, False), (errno.EISDIR, True)])
def test_full_disk_fails_a_shard_and_not_its_images(tmp_path, monkeypatch, number, is_of_image):
    from sca.inference.shards import caption_shard

    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))

    def extract(*arguments, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tarfile.TarFile, "extract", extract)
    config = {
        "job": {"model": "sca-tiny", "everything": True},
        "content": {"tar": str(tmp_path / "set.tar")},
        "folder": str(tmp_path),
        "device": "cpu",
    }
    made = caption_shard(config, str(tmp_path / "work"))
    if is_of_image:
        assert made["state"] == "done"
        assert "a.png of " in made["problems"][0][0]
    else:
        reason = f"cannot unpack {tmp_path}/set.tar: {os.strerror(number)}"
        assert made == {"state": "failed", "reason": reason}


def test_images_that_do_not_exist_exit_with_1_beside_shards(shell, here, monkeypatch):
    asked = (*BOXES, "--out", "out", "--launcher", "local")
    assert shell("caption", "gone.png", *asked).status == 1
    assert not (here / "out").exists()
    monkeypatch.setattr("sca.inference.shards.ShardedRun.caption_shards", lambda *arguments: iter(()))
    assert shell("caption", "gone.png", "set.tar", *asked).status == 1


@pytest.mark.slow
def test_an_archive_is_a_shard_and_a_broken_picture_is_named(shell, checkpoint, pictures, here):
    (here / "photos/broken.jpg").write_bytes(b"\xff\xd8 no picture")
    with tarfile.open(here / "set-7.tar", "w") as tar:
        for path in sorted((here / "photos").iterdir()):
            tar.add(path, path.name)
        tar.add(here / "photos/a.png", "a.txt")
    result = shell(
        *("caption", "set-7.tar", *BOXES, "--model", checkpoint, "--out", "parts", "--launcher", "local num_workers=1")
    )
    assert result.status == 1
    assert any("set-7: " in line and "broken.jpg" in line for line in result.err)
    found = lines(here / "parts/set-7.jsonl")
    assert len(found) == 10
    assert {line["image"] for line in found} == {f"{here / 'set-7.tar'}/{name}.png" for name in "abcde"}


@pytest.mark.slow
def test_shard_captions_images_whose_names_mean_something_to_a_command_line(shell, checkpoint, picture, here):
    (here / "~").mkdir()
    names = ["--task=recognition.png", "-x.png", "[a-z].png", "a.png", "~/a.png"]
    for name in names:
        picture(name)
    asked = ("--model", checkpoint, "--out", "out", "--launcher", "local num_workers=1", "--quiet")
    assert shell("caption", *BOXES, *asked, "--", ".").status == 0
    assert sorted({line["image"] for line in lines(here / "out/shard-00000.jsonl")}) == sorted(names)


def test_shard_of_files_that_have_gone_captions_no_others(shell, checkpoint, picture, here):
    from sca.inference.shards import caption_shard

    picture("a.png")
    job = {"model": str(checkpoint), "boxes": ["4,4,40,40"]}
    config = {
        "job": job,
        "content": {"images": ["[a-z].png", "*.png"]},
        "keys": {},
        "folder": str(here),
        "device": "cpu",
    }
    made = caption_shard(config, str(here / "work"))
    assert made["captions"] == ""
    assert all("there is no such file" in line for line, _ in made["problems"])
    assert len(made["problems"]) == 2


@pytest.mark.slow
def test_archive_members_are_read_from_the_archive_and_nowhere_else(shell, checkpoint, picture, here):
    picture("secret.png")
    picture("packed/a.png")
    with tarfile.open(here / "set.tar", "w") as tar:
        outside = (f"{here}/secret.png", "../secret.png", "x/../../../secret.png")
        for name in (*outside, "*.png", "--task=x.png", "~/b.png"):
            member = tarfile.TarInfo(name)
            member.size = (here / "packed/a.png").stat().st_size
            tar.addfile(member, io.BytesIO((here / "packed/a.png").read_bytes()))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(here / "secret.png")
        tar.addfile(link)
    (here / "secret.png").write_bytes(b"not read")
    asked = ("--model", checkpoint, "--out", "out", "--launcher", "local num_workers=1", "--quiet")
    result = shell("caption", "set.tar", *BOXES, *asked)
    assert result.status == 1
    assert sum("cannot be unpacked" in line for line in result.err) == 2
    assert not any("not read" in line or "damaged" in line for line in result.err)
    inside = (f"{str(here)[1:]}/secret.png", "*.png", "--task=x.png", "~/b.png")
    found = {line["image"] for line in lines(here / "out/set.jsonl")}
    assert found == {f"{here / 'set.tar'}/{name}" for name in inside}


@pytest.mark.slow
def test_failed_shard_tells_its_reason(shell, checkpoint, here, monkeypatch):
    (here / "broken.tar").write_bytes(b"no archive")
    with tarfile.open(here / "empty.tar", "w"):
        pass
    asked = ("--model", checkpoint, "--out", "out", "--launcher", "local num_workers=1", "--quiet")
    result = shell("caption", "broken.tar", "empty.tar", *BOXES, *asked)
    assert result.status == 1
    assert any(line.startswith("sca: broken: failed: cannot read") for line in result.err)
    assert any("empty.tar contains no images" in line for line in result.err)


def end_badly(config, folder):
    raise RuntimeError(f"the reason of {config['device']}")


@pytest.mark.slow
def test_crashed_task_tells_the_last_line_of_its_log(tmp_path):
    from sca.launchers.local import Local
    from sca.launchers.task import Task

    task = Task("a", f"{__name__}:end_badly", {"device": "cpu"}, str(tmp_path / "a"))
    (outcome,) = Local(num_workers=1).run_tasks([task])
    assert outcome.result["state"] == "crashed"
    assert outcome.result["reason"] == "ended with status 1: RuntimeError: the reason of cpu"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--launcher", "local"), "give a folder with --out"),
        (("--launcher", "local", "--out", "x", "--format", "png"), "writes one JSONL file per shard"),
        (("--launcher", "locl", "--out", "x"), "Did you mean 'local'"),
        (("--launcher", "local num_workers=-1", "--out", "x"), "workers is -1"),
    ],
)
def test_a_wrong_launcher_is_one_line(refused, pictures, arguments, said):
    assert said in refused(2, "caption", "photos", *BOXES, *arguments)


@pytest.mark.all
def test_a_cluster_says_what_one_command_says(shell, checkpoint, pictures, here):
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    try:
        assert shell("caption", "photos", *BOXES, "--model", checkpoint, "--out", "whole", "--quiet").status == 0
        result = shell(
            *("caption", "photos", *BOXES, "--model", checkpoint, "--out", "parts", "--quiet"),
            *("--launcher", f'ray address="{cluster.address}"', "--shard-size", 2),
        )
        assert result.status == 0, result.err
    finally:
        ray.shutdown()
        cluster.shutdown()
    found = [line for path in sorted((here / "parts").glob("*.jsonl")) for line in lines(path)]
    kept = ("image", "region_id", "caption", "box")  # other threads add up otherwise, which an untrained mask shows
    assert [[line[key] for key in kept] for line in found] == [
        [line[key] for key in kept] for line in lines(here / "whole/captions.jsonl")
    ]
