"""Repair of `sca doctor --fix`: a torchvision built for CUDA with a torch built without CUDA.

Package indexes often have a CPU-only torch but only a CUDA build of torchvision. Its compiled operators then require
symbols that no library defines, although the CPU operators call none of them. The fix compiles stub libraries that
define these symbols, and loads them when torchvision is imported. They are not loaded if torch has CUDA, so that they
do not interfere with a torch that is installed later.
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

SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])
STUB_PACKAGE = "torchvision_stubs"  # package that contains and loads the stub libraries
REGISTER_SYMBOL = "__cudaRegisterFatBinary"  # called when a library with kernels is loaded; must return a handle
CUDA_ERROR_NO_DEVICE = 100  # cudaErrorNoDevice
REINSTALL_HINT = "install matching versions of torch and torchvision"
# runs at every start of Python, even after the package is deleted
PTH_CONTENT = f"""\
import sys; exec("try:\\n    import {STUB_PACKAGE}\\nexcept Exception:\\n    pass")
"""
LOADER_SOURCE = '''\
"""Loads the libraries in this folder when torchvision is imported and torch has no CUDA.

See `sca doctor --undo-fix`.
"""

import sys


class Loader:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            try:
                load()
            except Exception:  # torchvision then reports what is missing
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


def diagnose_torchvision(site: Path = SITE_PACKAGES) -> str:
    """Return the problem of the installed torchvision and its fix in one line; "" if it can be imported."""
    error = _find_import_error("torchvision") if (site / "torchvision").is_dir() else ""
    if not error:
        return ""
    if _is_torch_without_cuda():
        return f"torchvision cannot be imported with a torch without CUDA ({error}); run `sca doctor --fix`"
    return f"torchvision cannot be imported ({error}); {REINSTALL_HINT}"


def find_torchvision_error(error: BaseException) -> BaseException | None:
    """Return the first error in a chain that was raised by an import of torchvision.

    Args:
        error: Exception; its causes and contexts are searched, too.

    Returns:
        The error; None if no error of the chain was raised by such an import.
    """
    current: BaseException | None = error
    while current is not None:
        frames = [frame for frame, _ in walk_tb(current.__traceback__)]
        names = [frame.f_globals.get("__name__", "") for frame in frames if frame.f_code.co_name == "<module>"]
        if any(name.partition(".")[0] == "torchvision" for name in names):
            return current
        current = current.__cause__ or current.__context__
    return None


def fix_torchvision(site: Path = SITE_PACKAGES) -> str:
    """Make torchvision importable with a torch without CUDA.

    The fix needs gcc and nm.

    Args:
        site: Folder of the installed packages.

    Returns:
        The result in one line.

    Raises:
        InputError: torchvision cannot be imported and the fix fails or does not help.
    """
    if not (site / "torchvision").is_dir():
        return "nothing to fix: torchvision is not installed"
    problem = _find_import_error("torchvision")
    if not problem:
        return "nothing to fix: torchvision can be imported"
    if not _is_torch_without_cuda():
        raise InputError(
            f"torchvision cannot be imported ({problem}), and --fix works only with a CPU build of torch; "
            f"{REINSTALL_HINT}"
        )
    try:
        install_stubs(site)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise InputError(
            f"torchvision is built for CUDA, and the stubs for this torch cannot be installed ({error}); "
            f"{REINSTALL_HINT}"
        ) from error
    problem = _find_import_error("torchvision")
    if problem:
        remove_torchvision_fix(site)
        raise InputError(f"torchvision cannot be imported even with the CUDA stubs ({problem}); {REINSTALL_HINT}")
    stub_paths = f"{site / STUB_PACKAGE} and {STUB_PACKAGE}.pth"
    return f"torchvision can be imported now; `sca doctor --undo-fix` removes {stub_paths}"


def remove_torchvision_fix(site: Path = SITE_PACKAGES) -> str:
    """Remove the files of `fix_torchvision` and return the result in one line."""
    stub_paths = [path for path in (site / f"{STUB_PACKAGE}.pth", site / STUB_PACKAGE) if path.exists()]
    for path in stub_paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return f"removed {' and '.join(map(str, stub_paths))}" if stub_paths else "nothing to remove"


def install_stubs(site: Path) -> None:
    """Compile the stub libraries and install their loader; both are moved into place atomically.

    Args:
        site: Folder of the installed packages.

    Raises:
        OSError: A tool is missing, or a file cannot be written.
        ValueError: torchvision requires several versions of the CUDA runtime, or none.
        subprocess.CalledProcessError: gcc or nm fails.
    """
    with tempfile.TemporaryDirectory(dir=site, prefix=f".{STUB_PACKAGE}-") as draft:
        folder = Path(draft, STUB_PACKAGE)
        folder.mkdir()
        compile_stubs(site / "torchvision", site / "torch/lib", folder)
        (folder / "__init__.py").write_text(LOADER_SOURCE, "utf-8")
        Path(draft, "starter").write_text(PTH_CONTENT, "utf-8")
        remove_torchvision_fix(site)
        os.rename(folder, site / STUB_PACKAGE)
        os.rename(Path(draft, "starter"), site / f"{STUB_PACKAGE}.pth")


def compile_stubs(torchvision: Path, torch_libraries: Path, folder: Path) -> None:
    """Compile stub libraries for the CUDA runtime, whose symbols have a version, and for torch's CUDA libraries.

    Args:
        torchvision: Package folder of torchvision.
        torch_libraries: Folder of torch's shared libraries.
        folder: Output folder.

    Raises:
        ValueError: torchvision requires several versions of the CUDA runtime, or none.
    """
    torch_symbols = {
        name for library in torch_libraries.glob("*.so") for name, _ in _iter_symbols(library, "--defined-only")
    }
    runtime_versions, torch_cuda_symbols = {}, set()
    for library in torchvision.glob("_C*.so"):
        for name, version in _iter_symbols(library, "--undefined-only"):
            if version.startswith("libcudart"):
                runtime_versions[name] = version
            elif (
                not version and name not in torch_symbols and ("cuda" in name.lower() or name.startswith("aoti_torch"))
            ):
                torch_cuda_symbols.add(name)
    versions = set(runtime_versions.values())
    if len(versions) != 1:
        raise ValueError(f"the torchvision libraries require {len(versions)} versions of the CUDA runtime; expected 1")
    (soname,) = versions
    _compile_library(folder / "libtorch_cuda.so", ["int torchvision_stub;"])
    _compile_library(
        folder / "libc10_cuda.so", ["#include <stdlib.h>", *map(_format_aborting_stub, sorted(torch_cuda_symbols))]
    )
    names = sorted(set(runtime_versions) - {REGISTER_SYMBOL})
    stub_definitions = [
        f"int {name}(void) {{ return {0 if name.startswith('__cuda') else CUDA_ERROR_NO_DEVICE}; }}" for name in names
    ]
    register_definition = f"void *{REGISTER_SYMBOL}(void *binary) {{ static void *handle[4]; return handle; }}"
    _compile_library(folder / soname, [register_definition, *stub_definitions], version=soname)


def _format_aborting_stub(name: str) -> str:
    """Return C code for a function that aborts when called, or for an object of which only the address is used."""
    return f"void *{name}[8];" if name.endswith("9allocatorE") else f"void {name}(void) {{ abort(); }}"


def _iter_symbols(library: Path, filter_option: str) -> Iterator[tuple[str, str]]:
    """Yield the dynamic symbols of a library, each with its version or ""."""
    nm_output = subprocess.run(["nm", "-D", filter_option, library], capture_output=True, text=True, check=True).stdout
    for fields in map(str.split, nm_output.splitlines()):
        if fields[-2].upper() not in ("W", "V") or filter_option == "--defined-only":
            name, _, version = fields[-1].partition("@")
            yield name, version.lstrip("@")


def _compile_library(library: Path, lines: Iterable[str], version: str | None = None) -> None:
    command = ["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}", "-o", str(library), "-x", "c", "-"]
    with tempfile.NamedTemporaryFile("w", suffix=".map") as script:
        if version:
            script.write(f"{version} {{ global: *; }};\n")
            script.flush()
            command.insert(1, f"-Wl,--version-script={script.name}")
        subprocess.run(command, input="\n".join(lines) + "\n", text=True, check=True, capture_output=True)


def _find_import_error(package: str) -> str:
    """Return the last error line of importing a package in a new process; "" if it succeeds."""
    process = _run_python(f"import {package}")
    lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
    return shorten(lines[-1], 200) if process.returncode else ""


def _is_torch_without_cuda() -> bool:
    return _run_python("import torch; assert torch.version.cuda is None").returncode == 0


def _run_python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
