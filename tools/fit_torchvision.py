"""Lets a torchvision that was built for CUDA be imported beside a torch that was built without it.

Package indexes often offer torch for CPUs alone, but torchvision only with CUDA; its compiled operators then look for
names that no library has, although those for the CPU call none of them. This writes small libraries that have the
names, and loads them when Python starts. Nothing is done where torch has CUDA, or where torchvision is absent or can be
imported. Run it with the Python whose packages are meant; it needs gcc and nm. Exit status 1 if torchvision still
cannot be imported.
"""

import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

SITE = Path(sysconfig.get_paths()["purelib"])
STUBS = SITE / "torchvision_stubs"
LOADER = f"""\
import ctypes
from pathlib import Path

for library in sorted(Path(__file__).with_name({STUBS.name!r}).glob("*.so*")):
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
"""
REGISTER = "__cudaRegisterFatBinary"  # called when a library with kernels is loaded; it must give a handle
NO_DEVICE = 100  # cudaErrorNoDevice


def main():
    torchvision = SITE / "torchvision"
    if not torchvision.is_dir() or runs("import torchvision"):
        return 0
    if not runs("import torch; assert torch.version.cuda is None"):
        return complain("torchvision cannot be imported, and not because torch is without CUDA")
    try:
        write_stubs(torchvision, SITE / "torch/lib")
    except (OSError, subprocess.CalledProcessError) as error:
        return complain(f"torchvision is built for CUDA, and fitting it to this torch failed: {error}")
    (SITE / f"{STUBS.name}_loader.py").write_text(LOADER, "utf-8")
    (SITE / f"{STUBS.name}.pth").write_text(f"import {STUBS.name}_loader\n", "utf-8")
    return 0 if runs("import torchvision") else complain("torchvision cannot be imported even with CUDA's names given")


def write_stubs(torchvision, torch_libraries):
    """One library for the CUDA runtime, whose names carry a version, and one for torch's own CUDA libraries."""
    present = {name for library in torch_libraries.glob("*.so") for name, _ in symbols(library, "--defined-only")}
    runtime, torch_cuda = {}, set()
    for library in torchvision.glob("_C*.so"):
        for name, version in symbols(library, "--undefined-only"):
            if version.startswith("libcudart"):
                runtime[name] = version
            elif not version and name not in present and ("cuda" in name.lower() or name.startswith("aoti_torch")):
                torch_cuda.add(name)
    STUBS.mkdir(exist_ok=True)
    (soname,) = set(runtime.values())
    compile_library("libtorch_cuda.so", ["int torchvision_stub;"])
    compile_library("libc10_cuda.so", ["#include <stdlib.h>", *map(aborting, sorted(torch_cuda))])
    names = sorted(set(runtime) - {REGISTER})
    answers = [f"int {name}(void) {{ return {0 if name.startswith('__cuda') else NO_DEVICE}; }}" for name in names]
    handle = f"void *{REGISTER}(void *binary) {{ static void *handle[4]; return handle; }}"
    compile_library(soname, [handle, *answers], version=soname)


def aborting(name):
    """A function that must not be called; or, as the name tells, an object that is only pointed to."""
    return f"void *{name}[8];" if name.endswith("9allocatorE") else f"void {name}(void) {{ abort(); }}"


def symbols(library, which):
    """The dynamic symbols of a library, each with its version or ''."""
    listed = subprocess.run(["nm", "-D", which, library], capture_output=True, text=True, check=True).stdout
    found = [line.split() for line in listed.splitlines()]
    for fields in found:
        if fields[-2].upper() not in ("W", "V") or which == "--defined-only":
            name, _, version = fields[-1].partition("@")
            yield name, version.lstrip("@")


def compile_library(soname, lines, version=None):
    command = ["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{soname}", "-o", STUBS / soname, "-x", "c", "-"]
    with tempfile.NamedTemporaryFile("w", suffix=".map") as script:
        if version:
            script.write(f"{version} {{ global: *; }};\n")
            script.flush()
            command.insert(1, f"-Wl,--version-script={script.name}")
        subprocess.run(command, input="\n".join(lines) + "\n", text=True, check=True)


def runs(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


def complain(reason):
    print(f"{Path(__file__).name}: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
