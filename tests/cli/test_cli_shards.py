"""Many pictures in shards: what one command does is what many processes do, and what is there is not made again."""

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
