"""The command line in this process, since starting torch for every line would take minutes, and in a real one."""

import os
import signal
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import sca
from sca.cli import run_command

SMALL = {
    "encoder": {"name": "tiny-vit", "image_size": 64},
    "language_model": "tiny-gpt2",
    "task_tokens": 2,
    "trainable": ["encoder", "segmenter", "mixer", "projection", "task_tokens", "language_model"],
}


class Result(NamedTuple):
    status: int
    out: str
    err: list[str]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A small model that was never trained: its words mean nothing."""
    torch.manual_seed(0)
    model = sca.compose(
        mixer={"name": "query", "num_queries": 4, "depth": 1, "num_heads": 4, "mlp_dim": 64, "mask_pooling": True},
        segmenter={"name": "sam", "num_heads": 4, "mlp_dim": 64, "box_masks": True},
        **SMALL,
    )
    return sca.save(model, tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def maskless(tmp_path_factory):
    """A model whose segmenter gives no masks."""
    torch.manual_seed(0)
    mixer = {"name": "query", "num_queries": 4, "depth": 1, "num_heads": 4, "mlp_dim": 64}
    return sca.save(sca.compose(mixer=mixer, segmenter="box", **SMALL), tmp_path_factory.mktemp("models") / "maskless")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working folder, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def picture(here):
    """`picture("a.png")` writes 64 x 48 pixels of noise and gives the name."""

    def write(name, width=64, height=48):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(len(name)).integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(here / name)
        return name

    return write


@pytest.fixture
def shell(here, capfd):
    """`shell("list", "mixers")` runs one command in this process."""

    def call(*arguments):
        capfd.readouterr()
        status = run_command([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Result(status, out, err.splitlines())

    return call


@pytest.fixture
def refused(shell):
    """`refused(status, ...)` runs a command that must fail with that status and one line, which is given back."""

    def call(status, *arguments):
        result = shell(*arguments)
        assert result.status == status, result
        assert result.out == ""
        assert len(result.err) == 1, result.err
        assert result.err[0].startswith("sca: ")
        return result.err[0].removeprefix("sca: ")

    return call


@pytest.fixture
def started(here):
    """`started(...)` begins a command in a process of its own."""
    processes = []

    def start(*arguments, **options):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        if os.name == "posix":  # where the tests run in the background, an interrupt is ignored, and that is inherited
            pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        processes.append(subprocess.Popen([sys.executable, "-m", "sca", *map(str, arguments)], **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        for pipe in filter(None, (process.stdout, process.stderr)):
            pipe.close()
