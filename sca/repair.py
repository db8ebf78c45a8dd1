"""What `sca doctor --fix` repairs: a torchvision built for CUDA beside a torch built without it.

Package indexes often offer torch for CPUs alone, but torchvision only with CUDA; its compiled operators then look for
names that no library has, although those for the CPU call none of them. The fix compiles small libraries that have the
names and loads them when torchvision is imported. Where torch has CUDA they are left alone, so that a torch installed
later is not disturbed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import shorten
from traceback import walk_tb

from sca.io.errors import InputError

SITE = Path(sysconfig.get_paths()["purelib"])
NAME = "torchvision_stubs"  # the folder of the libraries, a package that loads them
REGISTER = "__cudaRegisterFatBinary"  # called when a library with kernels is loaded; it must return a handle
NO_DEVICE = 100  # cudaErrorNoDevice
INSTALL_BOTH = "install torch and torchvision again, in matching versions"
STARTER = f"""\
import sys; exec("try:\\n    import {NAME}\\nexcept Exception:\\n    pass")
"""  # runs whenever Python starts, also after the folder is gone
LOADER = '''\
"""Loads the libraries beside this file when torchvision is imported and torch has no CUDA; see `sca doctor --unfix`."""

import sys


class Loader:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            try:
                load()
            except Exception:  # torchvision then tells what is missing
                pass
        return None


def load():
    import ctypes
    import importlib.util
    import runpy
    from pathlib import Path

    torch = Path(importlib.util.find_spec("torch").origin).parent  # without importing it, which takes seconds
    version = runpy.run_path(str(torch / "version.py"))
    if version["cuda"] is None and version.get("hip") is None:
        for library in sorted(Path(__file__).parent.glob("*.so*")):
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


sys.meta_path.insert(0, Loader())
'''


def diagnose(site: Path = SITE) -> str:
    """Return what is wrong with the installed torchvision, with the remedy, in one line; "" if nothing is."""
    error = _import_error("torchvision") if (site / "torchvision").is_dir() else ""
    if not error:
        return ""
    if _is_torch_without_cuda():
        return f"torchvision cannot be imported beside a torch without CUDA ({error}); run `sca doctor --fix`"
    return f"torchvision cannot be imported ({error}); {INSTALL_BOTH}"


def find_torchvision_error(error: BaseException) -> BaseException | None:
    """Return the error that ended an import of torchvision: `error` itself or what led to it; None if there is none."""
    current: BaseException | None = error
    while current is not None:
        frames = [frame for frame, _ in walk_tb(current.__traceback__)]
        names = [frame.f_globals.get("__name__", "") for frame in frames if frame.f_code.co_name == "<module>"]
        if any(name.partition(".")[0] == "torchvision" for name in names):
            return current
        current = current.__cause__ or current.__context__
    return None


def fix(site: Path = SITE) -> str:
    """Make torchvision importable beside a torch without CUDA, and return a line that says what was done.

    Raises:
        InputError: If torchvision cannot be imported and this does not help. It needs gcc and nm.
    """
    if not (site / "torchvision").is_dir():
        return "nothing to fix: torchvision is not installed"
    error = _import_error("torchvision")
    if not error:
        return "nothing to fix: torchvision can be imported"
    if not _is_torch_without_cuda():
        raise InputError(f"torchvision cannot be imported ({error}), and torch has CUDA; {INSTALL_BOTH}")
    try:
        install_stubs(site)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise InputError(f"torchvision is built for CUDA, and fitting it to this torch failed: {error}") from error
    error = _import_error("torchvision")
    if error:
        unfix(site)
        raise InputError(f"torchvision cannot be imported even with CUDA's names present ({error}); {INSTALL_BOTH}")
    return f"torchvision can be imported now; `sca doctor --unfix` removes {site / NAME} and {NAME}.pth"


def unfix(site: Path = SITE) -> str:
    """Remove what `fix` wrote, and return a line that says so."""
    written = [path for path in (site / f"{NAME}.pth", site / NAME) if path.exists()]
    for path in written:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return f"removed {' and '.join(map(str, written))}" if written else "nothing to remove"


def install_stubs(site: Path) -> None:
    """Compile the libraries and write what loads them; each is complete or not there."""
    with tempfile.TemporaryDirectory(dir=site, prefix=f".{NAME}-") as draft:
        folder = Path(draft, NAME)
        folder.mkdir()
        compile_stubs(site / "torchvision", site / "torch/lib", folder)
        (folder / "__init__.py").write_text(LOADER, "utf-8")
        Path(draft, "starter").write_text(STARTER, "utf-8")
        unfix(site)
        os.rename(folder, site / NAME)
        os.rename(Path(draft, "starter"), site / f"{NAME}.pth")


def compile_stubs(torchvision: Path, torch_libraries: Path, folder: Path) -> None:
    """Compile one library for the CUDA runtime, whose names carry a version, and one for torch's CUDA libraries."""
    present = {name for library in torch_libraries.glob("*.so") for name, _ in _symbols(library, "--defined-only")}
    runtime, torch_cuda = {}, set()
    for library in torchvision.glob("_C*.so"):
        for name, version in _symbols(library, "--undefined-only"):
            if version.startswith("libcudart"):
                runtime[name] = version
            elif not version and name not in present and ("cuda" in name.lower() or name.startswith("aoti_torch")):
                torch_cuda.add(name)
    versions = set(runtime.values())
    if len(versions) != 1:
        raise ValueError(f"its operators name {len(versions)} versions of the CUDA runtime, not one")
    (soname,) = versions
    _compile(folder / "libtorch_cuda.so", ["int torchvision_stub;"])
    _compile(folder / "libc10_cuda.so", ["#include <stdlib.h>", *map(_aborting, sorted(torch_cuda))])
    names = sorted(set(runtime) - {REGISTER})
    returns = [f"int {name}(void) {{ return {0 if name.startswith('__cuda') else NO_DEVICE}; }}" for name in names]
    handle = f"void *{REGISTER}(void *binary) {{ static void *handle[4]; return handle; }}"
    _compile(folder / soname, [handle, *returns], version=soname)


def _aborting(name: str) -> str:
    """A function that must not be called; or, as the name says, an object that is only pointed to."""
    return f"void *{name}[8];" if name.endswith("9allocatorE") else f"void {name}(void) {{ abort(); }}"


def _symbols(library: Path, which: str) -> Iterator[tuple[str, str]]:
    """The dynamic symbols of a library, each with its version or ""."""
    listed = subprocess.run(["nm", "-D", which, library], capture_output=True, text=True, check=True).stdout
    for fields in map(str.split, listed.splitlines()):
        if fields[-2].upper() not in ("W", "V") or which == "--defined-only":
            name, _, version = fields[-1].partition("@")
            yield name, version.lstrip("@")


def _compile(library: Path, lines: Iterable[str], version: str | None = None) -> None:
    command = ["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}", "-o", str(library), "-x", "c", "-"]
    with tempfile.NamedTemporaryFile("w", suffix=".map") as script:
        if version:
            script.write(f"{version} {{ global: *; }};\n")
            script.flush()
            command.insert(1, f"-Wl,--version-script={script.name}")
        subprocess.run(command, input="\n".join(lines) + "\n", text=True, check=True, capture_output=True)


def _import_error(package: str) -> str:
    """Return the last line of what importing a package in a new process ends with; "" if it succeeds."""
    done = _run(f"import {package}")
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return shorten(lines[-1], 200) if done.returncode else ""


def _is_torch_without_cuda() -> bool:
    return _run("import torch; assert torch.version.cuda is None").returncode == 0


def _run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
