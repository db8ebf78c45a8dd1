"""Many pictures in shards: what one command does is what many processes do, and what is there is not made again."""

import io
import json
import tarfile

import pytest


@pytest.fixture
def pictures(picture):
    return [picture(f"photos/{name}.png") for name in "abcde"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


BOXES = ("--box", "4,4,40,40", "--box", "10,10,30,30", "--batch", "1")  # one at a time: all batches are equally large


def test_shards_say_what_one_command_says(shell, checkpoint, pictures, here):
    assert shell("caption", "photos", *BOXES, "--model", checkpoint, "--out", "whole", "--quiet").status == 0
    result = shell(
        *("caption", "photos", *BOXES, "--model", checkpoint, "--out", "parts"),
        *("--launcher", "local workers=2", "--shard", 2),
    )
    assert result.status == 0, result.err
    parts = sorted((here / "parts").glob("*.jsonl"))
    assert [path.name for path in parts] == [f"shard-0000{n}.jsonl" for n in range(3)]
    made, whole = [line for path in parts for line in lines(path)], lines(here / "whole/captions.jsonl")
    for line in whole:  # a worker has fewer threads, which may move the last bits
        line |= {name: pytest.approx(line[name], rel=1e-4) for name in ("score", "iou")}
    assert made == whole
    assert len(result.err) == 3


def test_what_is_there_is_not_made_again_and_another_run_is_refused(shell, checkpoint, pictures, here):
    asked = ("caption", "photos", *BOXES, "--model", checkpoint, "--out", "parts", "--launcher", "local workers=1")
    assert shell(*asked, "--shard", 3).status == 0
    (here / "parts/shard-00001.jsonl").unlink()
    kept = (here / "parts/shard-00000.jsonl").stat().st_mtime_ns
    again = shell(*asked, "--shard", 3)
    assert again.status == 0
    assert again.err[0] == "sca: 1 of 2 shards are there already"
    assert (here / "parts/shard-00000.jsonl").stat().st_mtime_ns == kept
    other = shell(*asked, "--shard", 3, "--words", 2)
    assert other.status == 2
    assert "other options: choose another --out" in other.err[0]


def test_an_archive_is_a_shard_and_a_broken_picture_is_named(shell, checkpoint, pictures, here):
    (here / "photos/broken.jpg").write_bytes(b"\xff\xd8 no picture")
    with tarfile.open(here / "set-7.tar", "w") as tar:
        for path in sorted((here / "photos").iterdir()):
            tar.add(path, path.name)
        tar.add(here / "photos/a.png", "a.txt")
    result = shell(
        *("caption", "set-7.tar", *BOXES, "--model", checkpoint, "--out", "parts", "--launcher", "local workers=1")
    )
    assert result.status == 1
    assert any("set-7: " in line and "broken.jpg" in line for line in result.err)
    found = lines(here / "parts/set-7.jsonl")
    assert len(found) == 10
    assert {line["image"] for line in found} == {f"{here / 'set-7.tar'}/{name}.png" for name in "abcde"}


def test_shard_captions_images_whose_names_mean_something_to_a_command_line(shell, checkpoint, picture, here):
    (here / "~").mkdir()
    names = ["--task=recognition.png", "-x.png", "[a-z].png", "a.png", "~/a.png"]
    for name in names:
        picture(name)
    asked = ("--model", checkpoint, "--out", "out", "--launcher", "local workers=1", "--quiet")
    assert shell("caption", *BOXES, *asked, "--", ".").status == 0
    assert sorted({line["image"] for line in lines(here / "out/shard-00000.jsonl")}) == sorted(names)


def test_shard_of_files_that_have_gone_captions_no_others(shell, checkpoint, picture, here):
    from sca.cli.shards import caption_shard

    picture("a.png")
    flags = ["--box=4,4,40,40", f"--model={checkpoint}"]
    config = {"flags": flags, "content": {"images": ["[a-z].png", "*.png"]}, "folder": str(here), "device": "cpu"}
    made = caption_shard(config, str(here / "work"))
    assert made["captions"] == ""
    assert all("there is no such file" in line for line in made["problems"])
    assert len(made["problems"]) == 2


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
    asked = ("--model", checkpoint, "--out", "out", "--launcher", "local workers=1", "--quiet")
    result = shell("caption", "set.tar", *BOXES, *asked)
    assert result.status == 1
    assert sum("cannot be unpacked" in line for line in result.err) == 2
    assert not any("not read" in line or "damaged" in line for line in result.err)
    inside = (f"{str(here)[1:]}/secret.png", "*.png", "--task=x.png", "~/b.png")
    found = {line["image"] for line in lines(here / "out/set.jsonl")}
    assert found == {f"{here / 'set.tar'}/{name}" for name in inside}


def test_failed_shard_tells_its_reason(shell, checkpoint, here, monkeypatch):
    (here / "broken.tar").write_bytes(b"no archive")
    with tarfile.open(here / "empty.tar", "w"):
        pass
    asked = ("--model", checkpoint, "--out", "out", "--launcher", "local workers=1", "--quiet")
    result = shell("caption", "broken.tar", "empty.tar", *BOXES, *asked)
    assert result.status == 1
    assert any(line.startswith("sca: broken: failed: cannot read") for line in result.err)
    assert any("empty.tar contains no images" in line for line in result.err)


def end_badly(config, folder):
    raise RuntimeError(f"the reason of {config['device']}")


def test_crashed_task_tells_the_last_line_of_its_log(tmp_path):
    from sca.launchers.local import Local
    from sca.launchers.task import Task

    task = Task("a", f"{__name__}:end_badly", {"device": "cpu"}, str(tmp_path / "a"))
    (outcome,) = Local(workers=1).map([task])
    assert outcome.made["state"] == "crashed"
    assert outcome.made["reason"] == "ended with status 1: RuntimeError: the reason of cpu"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--launcher", "local"), "name a folder with --out"),
        (("--launcher", "local", "--out", "x", "--format", "png"), "writes JSON lines"),
        (("--launcher", "locl", "--out", "x"), "Did you mean 'local'"),
        (("--launcher", "local workers=-1", "--out", "x"), "workers is -1"),
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
            *("--launcher", f'ray address="{cluster.address}"', "--shard", 2),
        )
        assert result.status == 0, result.err
    finally:
        ray.shutdown()
        cluster.shutdown()
    found = [line for path in sorted((here / "parts").glob("*.jsonl")) for line in lines(path)]
    kept = ("image", "region", "caption", "box")  # other threads add up otherwise, which an untrained mask shows
    assert [[line[key] for key in kept] for line in found] == [
        [line[key] for key in kept] for line in lines(here / "whole/captions.jsonl")
    ]
