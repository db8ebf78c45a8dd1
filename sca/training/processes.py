"""Training processes on one machine, with all ports on loopback only.

torchrun's TCPStore listens on every interface without authentication and unpickles what it receives. Here the
rendezvous is a file in a folder that only the current user can read.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from sca.launchers.signals import block_interrupts, kill_process_tree

STORE_VARIABLE = "SCA_PROCESS_STORE"  # rendezvous file of the processes of one run
LOOPBACK_INTERFACES = ("lo", "lo0")  # Linux; macOS and BSD


def run_processes(count: int, arguments: Sequence[str]) -> int:
    """Run one `sca` command in several processes on this machine.

    Ctrl+C kills all of them at once; stored files are complete at any moment.

    Args:
        count: Number of processes.
        arguments: Arguments of `sca`.

    Returns:
        The exit status.
    """
    with tempfile.TemporaryDirectory(prefix="sca-") as folder:
        launcher = ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(count)]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file", "--local-addr", "127.0.0.1"]
        launcher += ["--rdzv-endpoint", str(Path(folder, "launcher")), "-m", "sca"]
        environment = {**os.environ, **build_process_environment(count), STORE_VARIABLE: str(Path(folder, "processes"))}
        with block_interrupts():
            process = subprocess.Popen([sys.executable, *launcher, *arguments], env=environment)
        try:
            return process.wait()
        except BaseException:
            kill_process_tree(process.pid)
            process.wait()
            raise


def build_process_environment(count: int) -> Mapping[str, str]:
    """Return environment variables that restrict processes to loopback and to their share of the CPU cores.

    They override those of the shell, where NCCL_SOCKET_IFNAME is often set for multi-node training. Every process would
    repeat the warnings of torch's C++ code, and one of them refers to an option that is not the user's. They are shown
    if TORCH_CPP_LOG_LEVEL is set.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name in LOOPBACK_INTERFACES), None)
    interfaces = {f"{library}_SOCKET_IFNAME": loopback for library in ("GLOO", "NCCL")} if loopback else {}
    return {
        **interfaces,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": str(count_threads_per_process(count)),
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }


@contextmanager
def join_processes() -> Iterator[None]:
    """Initialize the process group of `run_processes`, and destroy that of any launcher at the end.

    Without this, threads of the group can abort the process at exit. After an error the group is destroyed only with
    gloo, because NCCL would wait for the other processes.
    """
    import torch

    if STORE_VARIABLE in os.environ:
        torch.distributed.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            init_method=f"file://{os.environ[STORE_VARIABLE]}",
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
    is_finished = False
    try:
        yield
        is_finished = True
    finally:
        is_joined = torch.distributed.is_available() and torch.distributed.is_initialized()
        if is_joined and (is_finished or torch.distributed.get_backend() == "gloo"):
            torch.distributed.destroy_process_group()


def count_threads_per_process(processes: int) -> int:
    """Return OMP_NUM_THREADS, limited to the process's share of the cores: threads on one core block each other."""
    max_threads = max(1, (os.cpu_count() or 1) // processes)
    requested = os.environ.get("OMP_NUM_THREADS", "")
    return min(max_threads, int(requested)) if requested.isdecimal() and int(requested) else max_threads
