"""Commands that are killed, run into a full disk, find torn files, or run twice at once: `chaos.py KIND,KIND COUNTS`.

Every command is forked from this process, which has imported everything; torch has computed nothing before. COUNTS are
the numbers of kills, full disks, torn tails and pairs. Exit status 0 if nothing finished was lost and every folder ends
byte for byte as that of an uninterrupted run.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

from sca.cli import run_command
from sca.data.scenes import Scenes
from sca.io.run_folder import LOCK_FILE
from sca.training.recipe import Recipe  # noqa: F401 (imported before forking)
from sca.training.train import train  # noqa: F401

RECIPE = """
[model]
segmenter = { name = "sam", depth = 1, num_heads = 2, mlp_dim = 64 }
mixer = { name = "query", num_queries = 2, depth = 1, num_heads = 2, mlp_dim = 64 }
language_model = { name = "tiny-gpt2", hidden_size = 32, depth = 1, num_heads = 2, max_positions = 40 }
task_tokens = 2
trainable = ["encoder", "segmenter", "mixer", "projection", "task_tokens", "language_model"]
[model.encoder]
name = "tiny-vit"
image_size = 64
hidden_size = 32
depth = 1
output_channels = 32
stem_channels = [8, 16]
[data.scenes]
name = "scenes"
num_images = 10
image_size = 64
[train]
steps = 12
batch_size = 2
warmup_steps = 2
save_steps = 2
"""
SWEEP = """
seeds = [0, 1]
[model]
language_model = { name = "tiny-gpt2", hidden_size = 32, depth = 1, num_heads = 2, max_positions = 40 }
task_tokens = 2
[model.encoder]
name = "tiny-vit"
image_size = 64
hidden_size = 32
depth = 1
output_channels = 32
stem_channels = [8, 16]
[axes]
mixer = [{ name = "query", num_queries = 2, depth = 1, num_heads = 2, mlp_dim = 64 }, "roi-pool"]
"""
BOXES = ("--box", "4,4,40,40", "--box", "10,10,30,30")
COMMANDS = {  # what OUT stands for is a run folder
    "caption": (
        *("caption", "photos", *BOXES, "--batch-size", 2),
        *("--format", "jsonl,coco,png", "--out", "OUT", "--resume"),
    ),
    "evaluate": (
        "evaluate",
        "sca-tiny",
        "scenes",
        "num_images=12",
        "--batch-size",
        2,
        "--metrics",
        "class",
        "--out",
        "OUT",
    ),
    "train": ("train", "recipe.toml", "--out", "OUT"),
    "bench": ("bench", "run", "sweep.toml", "num_workers=1", "--out", "OUT"),
    "convert": ("convert", "many.jsonl", "OUT", "--format", "jsonl,coco,geojson,labelme"),
    "import": ("import", "sca-tiny", "OUT"),
}
QUIET = ("caption", "evaluate", "train", "bench")
RESULTS = {  # what is to be equal, by patterns
    "caption": ("captions.jsonl", "coco.json", "*.captions.png"),
    "evaluate": ("predictions.jsonl",),
    "train": ("model/*.safetensors", "model/spec.json"),
    "bench": ("results.jsonl",),
    "convert": ("captions.jsonl", "coco.json", "captions.geojson", "labelme/*.json"),
    "import": ("*.safetensors", "*.json"),
}
JOURNALS = {"caption": "captions.journal", "evaluate": "predictions.jsonl", "bench": "results.jsonl"}


class Chaos:
    """One kind of command, with the folder of an uninterrupted run."""

    def __init__(self, kind):
        self.kind, self.draw = kind, random.Random(f"{kind} 1")
        start = time.monotonic()
        assert self.finish("whole") == 0
        self.lasts = time.monotonic() - start
        self.whole = self.results("whole")
        assert self.whole

    def begin(self, out, limit=None):
        pid = os.fork()
        if pid:
            return pid
        null = os.open(os.devnull, os.O_RDWR)
        log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for target, source in ((0, null), (1, null), (2, log)):
            os.dup2(source, target)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        status = 99
        try:
            arguments = [str(each) if each != "OUT" else str(out) for each in COMMANDS[self.kind]]
            status = run_command([*arguments, *["--quiet"] * (self.kind in QUIET)])
        finally:
            os._exit(status)

    def finish(self, out, limit=None):
        return os.waitstatus_to_exitcode(os.waitpid(self.begin(out, limit), 0)[1])

    def kill(self, out):
        """Kill a run at a random moment. Whether it was not finished before."""
        pid = self.begin(out)
        time.sleep(self.draw.uniform(0, 1.1) * self.lasts)
        os.kill(pid, signal.SIGKILL)
        return os.WIFSIGNALED(os.waitpid(pid, 0)[1])

    def results(self, out):
        found = {}
        for path in sorted(path for pattern in RESULTS[self.kind] for path in Path(out).glob(pattern)):
            found[str(path.relative_to(out))] = _lasting(path) if self.kind == "bench" else path.read_bytes()
        return found

    def check(self, out, how):
        assert self.finish(out) == 0, (how, Path(f"{out}.log").read_text()[-3000:])
        assert self.results(out) == self.whole, how
        left = list(Path(out).rglob(".sca-*"))
        assert not left, (how, left)
        assert not list(Path().glob(f".{out}.*")), how

    def kills(self, count):
        hits = 0
        for number in range(count):
            hits += self.kill("killed")
            if number % 4 == 3:
                self.check("killed", "kill")
                if number % 8 == 3:  # else a finished run is repeated and killed
                    shutil.rmtree("killed")
                else:
                    self.kill("killed")
                    self.check("killed", "kill of a repeated run")
        self.check("killed", "kill")
        assert hits or count < 3, "no run was killed"

    def disks(self, count):
        largest = max(path.stat().st_size for path in Path("whole").rglob("*") if path.is_file())
        for number in range(count):
            out = f"disk{number}"
            limit = round(self.draw.uniform(0.02, 0.95) * largest)
            assert self.finish(out, limit) != 0, (limit, largest)
            log = Path(f"{out}.log").read_text()
            assert "Traceback" not in log, log[-3000:]
            self.check(out, "full disk")
            assert self.finish(out, limit) is not None
            assert self.results(out) == self.whole, "a finished run, repeated on a full disk"

    def tails(self, count):
        for number in range(count):
            out = f"tail{number}"
            while not Path(out, JOURNALS[self.kind]).exists():
                self.kill(out)
            path = Path(out, JOURNALS[self.kind])
            content = path.read_bytes()
            cut = content[: -self.draw.randint(1, 30)] if number % 2 else content
            path.write_bytes(cut + (b"", b"\0" * 4096, b'{"ima', b"\0\0{\n", b"\xff")[number % 5])
            self.check(out, "torn tail")

    def pairs(self, count):
        for number in range(count):
            out = f"pair{number}"
            both = [self.begin(out)]
            time.sleep(self.draw.uniform(0, 0.5) * self.lasts * (number > 0))
            both.append(self.begin(out))
            statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in both]
            assert sorted(statuses) in ([0, 0], [0, 2]), (statuses, Path(f"{out}.log").read_text()[-3000:])
            assert self.results(out) == self.whole, "pair"


def _lasting(path):
    """What of rows is no timing."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted((row["key"], row["state"], json.dumps(row.get("scores"))) for row in rows)


def main(kinds, *counts):
    for kind in kinds.split(","):
        os.mkdir(kind)
        os.chdir(kind)
        try_kind(kind, *map(int, counts))
        os.chdir("..")
    print("nothing was lost")


def try_kind(kind, *counts):
    for number, sample in enumerate(Scenes("test", num_images=12, image_size=64)):
        Path("photos").mkdir(exist_ok=True)
        sample.image.save(f"photos/{number:02d}.png")
    Path("recipe.toml").write_text(RECIPE)
    Path("sweep.toml").write_text(SWEEP)
    box = {"width": 64, "height": 64, "region_id": 0, "box": [4, 4, 40, 40], "caption": "a thing", "score": 0.5}
    lines = [{"image": f"{number:04d}.png", **box} for number in range(300)]
    Path("many.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    chaos = Chaos(kind)
    for way, count in zip(("kills", "disks", "tails", "pairs"), counts, strict=True):
        if count and (way != "tails" or kind in JOURNALS):
            getattr(chaos, way)(count)
    assert not list(Path().rglob(LOCK_FILE))


if __name__ == "__main__":
    main(*sys.argv[1:])
