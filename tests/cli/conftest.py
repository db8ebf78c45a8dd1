"""Fixtures that run `sca` in this process, which saves the import of torch, or in a process of its own."""

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

SMALL_MODEL_PARTS = {
    "encoder": {"name": "tiny-vit", "image_size": 64},
    "language_model": "tiny-gpt2",
    "task_tokens": 2,
    "trainable": ["encoder", "segmenter", "mixer", "projection", "task_tokens", "language_model"],
}


class CommandResult(NamedTuple):
    status: int
    out: str
    err: list[str]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """An untrained small model: its captions are meaningless."""
    torch.manual_seed(0)
    model = sca.compose(
        mixer={"name": "query", "num_queries": 4, "depth": 1, "num_heads": 4, "mlp_dim": 64, "mask_pooling": True},
        segmenter={"name": "sam", "num_heads": 4, "mlp_dim": 64, "box_masks": True},
        **SMALL_MODEL_PARTS,
    )
    return sca.save(model, tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def maskless_checkpoint(tmp_path_factory):
    """A model whose segmenter predicts no masks."""
    torch.manual_seed(0)
    mixer = {"name": "query", "num_queries": 4, "depth": 1, "num_heads": 4, "mlp_dim": 64}
    return sca.save(
        sca.compose(mixer=mixer, segmenter="box", **SMALL_MODEL_PARTS), tmp_path_factory.mktemp("models") / "maskless"
    )


@pytest.fixture
def working_folder(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write_image(working_folder):
    """`write_image("a.png")` writes 64 x 48 pixels of noise and returns the name."""

    def write_noise_image(name, width=64, height=48):
        (working_folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(len(name)).integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(working_folder / name)
        return name

    return write_noise_image


@pytest.fixture
def run_sca(working_folder, capfd):
    """`run_sca("list", "mixers")` runs one command in this process."""

    def call_sca(*arguments):
        capfd.readouterr()
        status = run_command([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return CommandResult(status, out, err.splitlines())

    return call_sca


@pytest.fixture
def get_sca_error(run_sca):
    """`get_sca_error(status, ...)` runs a command that must fail with that status, and returns its one error line."""

    def call_failing_sca(status, *arguments):
        result = run_sca(*arguments)
        assert result.status == status, result
        assert result.out == ""
        assert len(result.err) == 1, result.err
        assert result.err[0].startswith("sca: ")
        return result.err[0].removeprefix("sca: ")

    return call_failing_sca


@pytest.fixture
def start_sca(working_folder):
    """`start_sca(...)` starts a command in a process of its own."""
    processes = []

    def start_process(*arguments, **options):
        popen_options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        if os.name == "posix":  # background jobs of a shell inherit an ignored SIGINT
            popen_options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        processes.append(subprocess.Popen([sys.executable, "-m", "sca", *map(str, arguments)], **popen_options))
        return processes[-1]

    yield start_process
    for process in processes:
        process.kill()
        process.wait()
        for pipe in filter(None, (process.stdout, process.stderr)):
            pipe.close()
