"""Fault injection: kills, full disks, torn files and concurrent runs: `fault_injection.py COMMAND,COMMAND COUNTS`.

Each command is forked from this process, which has imported everything and run no torch operations. COUNTS are the
numbers of kills, full disks, torn journals and concurrent pairs. The exit status is 0 if no finished result was lost
and every folder equals that of an uninterrupted run byte for byte.
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
BOX_ARGUMENTS = ("--box", "4,4,40,40", "--box", "10,10,30,30")
COMMAND_ARGUMENTS = {  # OUT is replaced by a run folder
    "caption": (
        *("caption", "photos", *BOX_ARGUMENTS, "--batch-size", 2),
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
QUIET_COMMANDS = ("caption", "evaluate", "train", "bench")
RESULT_PATTERNS = {  # files that must be equal
    "caption": ("captions.jsonl", "coco.json", "*.captions.png"),
    "evaluate": ("predictions.jsonl",),
    "train": ("model/*.safetensors", "model/spec.json"),
    "bench": ("results.jsonl",),
    "convert": ("captions.jsonl", "coco.json", "captions.geojson", "labelme/*.json"),
    "import": ("*.safetensors", "*.json"),
}
JOURNAL_FILES = {"caption": "captions.journal", "evaluate": "predictions.jsonl", "bench": "results.jsonl"}


class FaultInjection:
    """Faults in runs of one command, compared with an uninterrupted run."""

    def __init__(self, command_name):
        self.command_name, self.rng = command_name, random.Random(f"{command_name} 1")
        start = time.monotonic()
        assert self.finish_run("uninterrupted") == 0
        self.duration = time.monotonic() - start
        self.expected_results = self.read_results("uninterrupted")
        assert self.expected_results

    def start_run(self, out, max_file_bytes=None):
        pid = os.fork()
        if pid:
            return pid
        null = os.open(os.devnull, os.O_RDWR)
        log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for target, source in ((0, null), (1, null), (2, log)):
            os.dup2(source, target)
        if max_file_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, resource.RLIM_INFINITY))
        status = 99
        try:
            arguments = [str(each) if each != "OUT" else str(out) for each in COMMAND_ARGUMENTS[self.command_name]]
            status = run_command([*arguments, *["--quiet"] * (self.command_name in QUIET_COMMANDS)])
        finally:
            os._exit(status)

    def finish_run(self, out, max_file_bytes=None):
        return os.waitstatus_to_exitcode(os.waitpid(self.start_run(out, max_file_bytes), 0)[1])

    def kill_run(self, out):
        """Kill a run at a random moment; return whether it was still running."""
        pid = self.start_run(out)
        time.sleep(self.rng.uniform(0, 1.1) * self.duration)
        os.kill(pid, signal.SIGKILL)
        return os.WIFSIGNALED(os.waitpid(pid, 0)[1])

    def read_results(self, out):
        results = {}
        for path in sorted(path for pattern in RESULT_PATTERNS[self.command_name] for path in Path(out).glob(pattern)):
            results[str(path.relative_to(out))] = (
                _read_rows_without_timings(path) if self.command_name == "bench" else path.read_bytes()
            )
        return results

    def check_run(self, out, situation):
        assert self.finish_run(out) == 0, (situation, Path(f"{out}.log").read_text()[-3000:])
        assert self.read_results(out) == self.expected_results, situation
        drafts = list(Path(out).rglob(".sca-*"))
        assert not drafts, (situation, drafts)
        assert not list(Path().glob(f".{out}.*")), situation

    def kill_runs(self, num_kills):
        num_killed = 0
        for number in range(num_kills):
            num_killed += self.kill_run("killed")
            if number % 4 == 3:
                self.check_run("killed", "kill")
                if number % 8 == 3:  # otherwise repeat the finished run and kill it
                    shutil.rmtree("killed")
                else:
                    self.kill_run("killed")
                    self.check_run("killed", "kill of a repeated run")
        self.check_run("killed", "kill")
        assert num_killed or num_kills < 3, "no run was killed"

    def fill_disks(self, num_runs):
        largest_file_bytes = max(path.stat().st_size for path in Path("uninterrupted").rglob("*") if path.is_file())
        for number in range(num_runs):
            out = f"disk{number}"
            max_file_bytes = round(self.rng.uniform(0.02, 0.95) * largest_file_bytes)
            assert self.finish_run(out, max_file_bytes) != 0, (max_file_bytes, largest_file_bytes)
            log = Path(f"{out}.log").read_text()
            assert "Traceback" not in log, log[-3000:]
            self.check_run(out, "full disk")
            assert self.finish_run(out, max_file_bytes) is not None
            assert self.read_results(out) == self.expected_results, "a finished run, repeated on a full disk"

    def tear_journals(self, num_runs):
        for number in range(num_runs):
            out = f"tail{number}"
            while not Path(out, JOURNAL_FILES[self.command_name]).exists():
                self.kill_run(out)
            path = Path(out, JOURNAL_FILES[self.command_name])
            content = path.read_bytes()
            kept_content = content[: -self.rng.randint(1, 30)] if number % 2 else content
            path.write_bytes(kept_content + (b"", b"\0" * 4096, b'{"ima', b"\0\0{\n", b"\xff")[number % 5])
            self.check_run(out, "torn tail")

    def run_pairs(self, num_pairs):
        for number in range(num_pairs):
            out = f"pair{number}"
            pids = [self.start_run(out)]
            time.sleep(self.rng.uniform(0, 0.5) * self.duration * (number > 0))
            pids.append(self.start_run(out))
            statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
            assert sorted(statuses) in ([0, 0], [0, 2]), (statuses, Path(f"{out}.log").read_text()[-3000:])
            assert self.read_results(out) == self.expected_results, "pair"


def _read_rows_without_timings(path):
    """Return the rows without timings."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted((row["key"], row["state"], json.dumps(row.get("scores"))) for row in rows)


def main(command_names, *counts):
    for command_name in command_names.split(","):
        os.mkdir(command_name)
        os.chdir(command_name)
        try_command(command_name, *map(int, counts))
        os.chdir("..")
    print("nothing was lost")


def try_command(command_name, *counts):
    for number, sample in enumerate(Scenes("test", num_images=12, image_size=64)):
        Path("photos").mkdir(exist_ok=True)
        sample.image.save(f"photos/{number:02d}.png")
    Path("recipe.toml").write_text(RECIPE)
    Path("sweep.toml").write_text(SWEEP)
    record_fields = {
        "width": 64,
        "height": 64,
        "region_id": 0,
        "box": [4, 4, 40, 40],
        "caption": "a thing",
        "score": 0.5,
    }
    records = [{"image": f"{number:04d}.png", **record_fields} for number in range(300)]
    Path("many.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    fault_injection = FaultInjection(command_name)
    for method_name, count in zip(("kill_runs", "fill_disks", "tear_journals", "run_pairs"), counts, strict=True):
        if count and (method_name != "tear_journals" or command_name in JOURNAL_FILES):
            getattr(fault_injection, method_name)(count)
    assert not list(Path().rglob(LOCK_FILE))


if __name__ == "__main__":
    main(*sys.argv[1:])
