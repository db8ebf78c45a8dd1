"""Single-process, distributed and sharded training make the same steps and reduce only trainable gradients."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

RECIPE = """
[model]
encoder = { name = "tiny-vit", image_size = 64, hidden_size = 32, depth = 1, output_channels = 32, \
stem_channels = [8, 16] }
segmenter = { name = "sam", depth = 1, num_heads = 2, mlp_dim = 64 }
mixer = { name = "query", num_queries = 2, depth = 1, num_heads = 2, mlp_dim = 64 }
language_model = { name = "tiny-gpt2", hidden_size = 32, depth = 1, num_heads = 2, max_positions = 40 }
task_tokens = 2
lora = { rank = 2 }
[data.scenes]
name = "scenes"
num_images = 40
image_size = 64
[train]
steps = 50
batch_size = 8
warmup_steps = 5
learning_rate = 1e-2
prompt_weights = { box = 0.5, point = 0.3, mask = 0.2 }
class_name_prob = 0.5
captions_per_region = 2
save_steps = 20
"""
GRADIENT_REPORT_SCRIPT = """
import json, os, sys
import sca.training.train as trainer
from sca.training.recipe import Recipe

report, training_step = {}, trainer.CaptionTrainer.training_step

def step_and_report(self, model, *rest, **more):
    loss = training_step(self, model, *rest, **more)
    names_with_gradient = {name for name, p in self.model.named_parameters() if p.grad is not None}
    trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
    report.update(without=sorted(set(trainable) - names_with_gradient))
    report.update(frozen=sorted(names_with_gradient - set(trainable)))
    report["trainable"] = sum(p.numel() * p.element_size() for p in trainable.values())
    report["reduced"] = sum(map(int, model._get_ddp_logging_data()["bucket_sizes"].split(",")))
    return loss

trainer.CaptionTrainer.training_step = step_and_report
trainer.train(Recipe.read(sys.argv[1], ["train.steps=3"]), sys.argv[2], quiet=True)
with open(f"{sys.argv[2]}/gradients-{os.environ['RANK']}.json", "w") as file:
    json.dump(report, file)
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture
def run_python(tmp_path):
    """Return a function that runs a command of this Python in a folder with the recipe."""
    (tmp_path / "recipe.toml").write_text(RECIPE)

    def start(*command, **environment):
        full_environment = {**os.environ, "OMP_NUM_THREADS": "1", "SCA_CACHE": str(tmp_path / "cache"), **environment}
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=tmp_path,
            env=full_environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(*command, **environment):
        process = start(*command, **environment)
        try:
            output = process.communicate(timeout=300)[0]
        except subprocess.TimeoutExpired:  # the processes wait for each other
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert process.returncode == 0, output
        return output

    finish.start = start
    return finish


def read_loss_history(folder):
    (checkpoint,) = folder.glob("checkpoint-*")
    lines = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [[line[name] for name in ("loss", "caption", "mask", "iou")] for line in lines if "caption" in line]


TRAIN_COMMAND = ("-m", "sca", "train", "recipe.toml", "--quiet", "--out")
LAUNCH_COMMANDS = {
    "gradient accumulation": (*TRAIN_COMMAND, "other", "train.gradient_accumulation_steps=4"),
    "chunk size": (*TRAIN_COMMAND, "other", "train.chunk_size=3"),
    "two processes": (*TRAIN_COMMAND, "other", "train.num_processes=2"),
    "accelerate": (
        *("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", *TRAIN_COMMAND, "other"),
    ),
    "two processes, sharded": (*TRAIN_COMMAND, "other", "train.num_processes=2", "train.fsdp=true"),
    "two processes, sharded, gradient accumulation": (
        *TRAIN_COMMAND,
        "other",
        "train.num_processes=2",
        "train.gradient_accumulation_steps=2",
        "train.fsdp=true",
    ),
}


@pytest.fixture(scope="module")
def single_process_result(tmp_path_factory):
    """Train the recipe in one process and return its losses and weights."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "recipe.toml").write_text(RECIPE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SCA_CACHE": str(folder / "cache")}
    command = [sys.executable, *TRAIN_COMMAND, "one"]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return read_loss_history(folder / "one"), load_file(folder / "one/model/weights.safetensors")


DEFAULT_LAUNCHES = ("gradient accumulation",)  # the others run in `make test-all`


@pytest.mark.parametrize(
    "launch",
    [
        launch if launch in DEFAULT_LAUNCHES else pytest.param(launch, marks=pytest.mark.all)
        for launch in LAUNCH_COMMANDS
    ],
)
def test_training_launches_make_the_same_steps(run_python, single_process_result, tmp_path, launch):
    output = run_python(*LAUNCH_COMMANDS[launch])
    assert launch == "accelerate" or "Warning" not in output  # of torch, in every process
    losses, weights = single_process_result
    loss_history = torch.tensor(read_loss_history(tmp_path / "other"))
    assert len(loss_history) == 10
    assert (loss_history - torch.tensor(losses)).abs().max() < 1e-4
    model = load_file(tmp_path / "other/model/weights.safetensors")
    assert model.keys() == weights.keys()
    assert all(torch.allclose(model[name], weights[name], atol=2e-3) for name in weights)


@pytest.mark.all
def test_distributed_training_reduces_gradients_of_exactly_the_trainable_parameters(run_python, tmp_path):
    (tmp_path / "report_gradients.py").write_text(GRADIENT_REPORT_SCRIPT)
    run_python(*TORCHRUN, "report_gradients.py", "recipe.toml", "out")
    for rank in range(2):
        gradient_report = json.loads((tmp_path / f"out/gradients-{rank}.json").read_text())
        assert gradient_report["without"] == gradient_report["frozen"] == []
        assert gradient_report["reduced"] == gradient_report["trainable"] > 0


@pytest.mark.all
def test_sharded_training_resumes_after_kill(run_python, single_process_result, tmp_path):
    command = LAUNCH_COMMANDS["two processes, sharded"]
    process = run_python.start(*command)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "other").glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    run_python(*command)
    assert (
        torch.tensor(read_loss_history(tmp_path / "other")) - torch.tensor(single_process_result[0])
    ).abs().max() < 1e-4


@pytest.mark.parametrize(("num_kills", "num_steps"), [(1, 40), pytest.param(20, 600, marks=pytest.mark.all)])
def test_training_killed_repeatedly_ends_with_the_same_weights(run_python, tmp_path, num_kills, num_steps):
    options = (f"train.steps={num_steps}", "train.save_steps=5", "train.batch_size=2")
    run_python(*TRAIN_COMMAND, "whole", *options)
    rng, num_killed = random.Random(num_kills), 0
    while num_killed < num_kills:
        process = run_python.start(*TRAIN_COMMAND, "killed", *options)
        try:
            process.wait(rng.uniform(1, 9))
            break  # training ended before the kill
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            num_killed += 1
        for checkpoint in (tmp_path / "killed").glob("checkpoint-*"):
            for file in ("training_module.pt", "optimizer.pt"):
                torch.load(checkpoint / file, weights_only=True)
            json.loads((checkpoint / "trainer_state.json").read_text())
    run_python(*TRAIN_COMMAND, "killed", *options)
    uninterrupted, killed = (load_file(tmp_path / name / "model/weights.safetensors") for name in ("whole", "killed"))
    assert uninterrupted.keys() == killed.keys()
    assert all(torch.equal(uninterrupted[name], killed[name]) for name in uninterrupted)


@pytest.mark.all
def test_distributed_training_validates_encoder_with_batch_statistics(run_python, tmp_path):
    (tmp_path / "recipe.toml").write_text(f"{RECIPE}[validate]\neval_steps = 2\nmax_images = 4\n")
    trainable_option = 'trainable=["encoder", "mixer", "projection", "task_tokens"]'
    run_python(*TRAIN_COMMAND, "other", "train.num_processes=2", "train.steps=4", "lora=0", trainable_option)
    assert sorted(path.name for path in (tmp_path / "other/validation").iterdir()) == ["step-2", "step-4"]
    assert json.loads((tmp_path / "other/best.json").read_text())["step"] in (2, 4)


def test_sharded_training_rejects_validation(run_python, tmp_path):
    (tmp_path / "recipe.toml").write_text(f"{RECIPE}[validate]\neval_steps = 5\n")
    process = run_python.start(*LAUNCH_COMMANDS["two processes, sharded"])
    output = process.communicate()[0]
    assert process.returncode == 2
    assert (
        output == "sca: a sharded model cannot be validated during training; remove [validate], or train without FSDP\n"
    )


@pytest.mark.parametrize(("omp_num_threads", "num_threads"), [("", 4), ("1", 1), ("8", 4), ("4,2", 4), ("0", 4)])
def test_count_threads_per_process_limits_omp_num_threads_to_share_of_cores(monkeypatch, omp_num_threads, num_threads):
    from sca.training.processes import count_threads_per_process

    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", omp_num_threads)
    assert count_threads_per_process(2) == num_threads


def find_listening_addresses(process_id):
    """Return the hexadecimal addresses at which a process and its children listen."""
    children, inodes = {}, set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children.setdefault(int(stat.read_text().rsplit(")", 1)[1].split()[1]), []).append(int(stat.parent.name))
    process_ids, pending_ids = [], [process_id]
    while pending_ids:
        process_ids.append(pending_ids.pop())
        pending_ids += children.get(process_ids[-1], [])
    for each in process_ids:
        with contextlib.suppress(OSError):
            inodes |= {os.readlink(link) for link in Path(f"/proc/{each}/fd").iterdir() if os.path.islink(link)}
    tables = [Path(f"/proc/net/{kind}").read_text().splitlines()[1:] for kind in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table]
    return {line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in inodes}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.all
def test_training_processes_listen_on_loopback_only(run_python, tmp_path):
    cluster_environment = {
        "GLOO_SOCKET_IFNAME": "elsewhere0",
        "NCCL_SOCKET_IFNAME": "elsewhere0",
    }  # a machine in a cluster
    process = run_python.start(
        *TRAIN_COMMAND, "other", "train.num_processes=2", "train.steps=10", **cluster_environment
    )
    addresses = set()
    while process.poll() is None:
        addresses |= find_listening_addresses(process.pid)
        time.sleep(0.1)
    assert process.returncode == 0, process.communicate()[0]
    assert (tmp_path / "other/model/weights.safetensors").exists()
    assert addresses <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert addresses, "the processes meet on loopback: nothing was seen"
