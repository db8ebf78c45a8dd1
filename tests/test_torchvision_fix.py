"""`sca doctor --fix`: torchvision built for CUDA beside a torch without it; what it leaves harms no other torch."""

import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest

from sca import torchvision_fix
from sca.io.errors import InputError

WATCHED = """
import ctypes, site, sys
ctypes.CDLL = lambda path, *_: print("loaded", path.rpartition("/")[2])
site.addsitedir(sys.argv[1])
sys.path.insert(0, sys.argv[1])
print("started", "torch" in sys.modules)
import importlib.util
importlib.util.find_spec("torchvision")
print("looked for", "torch" in sys.modules)
import torchvision
print("imported")
"""


@pytest.fixture
def site(tmp_path):
    """A folder of packages with torch, torchvision and what `fix` writes, but for the compiler."""

    def make(cuda):
        for name in ("torch", "torchvision"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("")
        (tmp_path / "torch/version.py").write_text(f"from typing import Optional\ncuda: Optional[str] = {cuda!r}\n")
        stubs = tmp_path / torchvision_fix.STUB_PACKAGE
        stubs.mkdir()
        (stubs / "__init__.py").write_text(torchvision_fix.LOADER_SOURCE)
        (stubs / "libcudart.so.13").write_bytes(b"")
        (tmp_path / f"{torchvision_fix.STUB_PACKAGE}.pth").write_text(torchvision_fix.PTH_CONTENT)
        return tmp_path

    return make


def start(site):
    done = subprocess.run([sys.executable, "-I", "-S", "-c", WATCHED, str(site)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.slow
def test_stubs_are_loaded_with_torchvision_where_torch_has_no_cuda(site):
    lines = start(site(None))
    assert lines == ["started False", "loaded libcudart.so.13", "looked for False", "imported"]


@pytest.mark.slow
def test_stubs_do_nothing_where_a_torch_with_cuda_was_installed_later(site):
    assert start(site("13.0")) == ["started False", "looked for False", "imported"]


@pytest.mark.parametrize("damage", ["no folder", "broken loader", "no torch", "broken version"])
@pytest.mark.slow
def test_stubs_never_break_the_start_of_python(site, damage):
    folder = site(None)
    if damage == "no folder":
        shutil.rmtree(folder / torchvision_fix.STUB_PACKAGE)
    elif damage == "broken loader":
        (folder / torchvision_fix.STUB_PACKAGE / "__init__.py").write_text("raise SystemError\n")
    elif damage == "no torch":
        shutil.rmtree(folder / "torch")
    else:
        (folder / "torch/version.py").write_text("cuda = (")
    assert start(folder) == ["started False", "looked for False", "imported"]


def test_unfix_removes_what_fix_wrote(site):
    folder = site(None)
    assert f"removed {folder / torchvision_fix.STUB_PACKAGE}.pth and" in torchvision_fix.remove_torchvision_fix(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["torch", "torchvision"]
    assert torchvision_fix.remove_torchvision_fix(folder) == "nothing to remove"


@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("nm")), reason="needs gcc and nm")
@pytest.mark.slow
def test_install_stubs_makes_a_library_of_operators_for_cuda_loadable(tmp_path):
    def compile(target, code, *flags):
        command = ["gcc", "-shared", "-fPIC", "-o", target, "-x", "c", "-", *flags]
        subprocess.run([*map(str, command)], input=code, text=True, check=True)

    for folder in ("torch/lib", "torchvision"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "torch/version.py").write_text("cuda = None\n")
    (tmp_path / "map").write_text("libcudart.so.99 { global: *; };\n")
    runtime = tmp_path / "libcudart.so.99"
    compile(
        runtime,
        "int cudaFree(void) { return 0; }",
        f"-Wl,--version-script={tmp_path / 'map'}",
        "-Wl,-soname,libcudart.so.99",
    )
    operators = tmp_path / "torchvision/_C.so"
    compile(
        operators,
        "int cudaFree(void); int c10_cuda(void); int used(void) { return cudaFree() + (c10_cuda != 0); }",
        "-x",
        "none",
        runtime,
    )
    runtime.unlink()
    load = f"import ctypes; print(ctypes.CDLL({str(operators)!r}).used())"
    alone = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)
    assert "OSError" in alone.stderr
    torchvision_fix.install_stubs(tmp_path)
    fitted = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torchvision_stubs; torchvision_stubs.load(); {load}"
    )
    (tmp_path / "torch/__init__.py").write_text("")
    done = subprocess.run([sys.executable, "-S", "-c", fitted], capture_output=True, text=True)
    assert done.stdout.strip() == "101", done.stderr
    assert not list(tmp_path.glob(".*"))


def test_doctor_fix_and_unfix_are_one_line_each(monkeypatch, capsys):
    from sca.cli import run_command

    monkeypatch.setattr(torchvision_fix, "fix_torchvision", lambda: "fixed")
    assert run_command(["doctor", "--fix"]) == 0
    assert capsys.readouterr().out == "fixed\n"

    def fail():
        raise InputError("no gcc")

    monkeypatch.setattr(torchvision_fix, "fix_torchvision", fail)
    assert run_command(["doctor", "--fix"]) == 1
    assert capsys.readouterr().err == "sca: no gcc\n"
    assert run_command(["doctor", "--fix", "--undo-fix"]) == 2


@pytest.fixture
def processes(monkeypatch):
    """`processes(torchvision, cuda)`: how imports end in another process, without one."""

    def end(torchvision, cuda):
        def run(program):
            failed = torchvision if "torchvision" in program else "AssertionError" if cuda else ""
            return subprocess.CompletedProcess([], int(bool(failed)), "", f"Traceback\n{failed}\n")

        monkeypatch.setattr(torchvision_fix, "_run_python", run)

    return end


@pytest.mark.parametrize(
    ("error", "cuda", "remedy"),
    [
        ("OSError: libcudart.so.13", False, "run `sca doctor --fix`"),
        ("RuntimeError: operator torchvision::nms does not exist", True, "install torch and torchvision again"),
        ("", False, ""),
    ],
)
def test_diagnose_names_the_error_and_the_remedy(processes, site, error, cuda, remedy):
    processes(error, cuda)
    told = torchvision_fix.diagnose_torchvision(site(None))
    assert remedy in told
    assert error in told
    assert bool(told) == bool(error)


def test_diagnose_passes_where_torchvision_is_not_installed(processes, tmp_path):
    processes("ModuleNotFoundError: No module named 'torchvision'", False)
    assert torchvision_fix.diagnose_torchvision(tmp_path) == ""


def test_doctor_reports_a_broken_torchvision_before_it_tries_a_part(monkeypatch, capsys):
    from sca.cli import run_command

    problem = "torchvision cannot be imported; run `sca doctor --fix`"
    monkeypatch.setattr(torchvision_fix, "diagnose_torchvision", lambda: problem)
    monkeypatch.setattr("sca.testing.subprocess_checks.check_components", lambda *_: pytest.fail("a part was tried"))
    assert run_command(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("to repair:") + 1] == "  torchvision cannot be imported; run `sca doctor --fix`"


BROKEN_IMPORTS = """
import os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "sca.mixers.split_mixer":
            raise OSError("libcudart.so.13: no such file")
        if name == "sca.mixers.query":
            os.abort()

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.slow
def test_doctor_reports_built_in_components_that_raise_or_abort_on_import(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BROKEN_IMPORTS)
    command = [sys.executable, "-m", "sca", "doctor", "segment-caption-anything"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"mixer query +broken: the process of its checks", done.stdout)
    assert re.search(r"mixer split +broken: OSError: libcudart.so.13: no such file", done.stdout)
    assert re.search(r"4 of kind mixer +ok", done.stdout)
    assert "pip install --force-reinstall -c constraints.txt PACKAGE" in done.stdout
    assert "pip install -U segment-caption-anything" not in done.stdout


@pytest.mark.parametrize("error", ["OSError('libcudart.so.13: no such file')", "RuntimeError('no operator nms')"])
def test_a_command_that_a_broken_torchvision_stops_names_the_doctor(monkeypatch, capsys, tmp_path, error):
    from sca.cli import listing, run_command

    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text(f"raise {error}\n")

    def list_rows(kind):
        try:
            importlib.import_module("torchvision")
        except (OSError, RuntimeError) as failure:
            raise ImportError("as transformers raises it") from failure

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(listing, "_collect_rows", list_rows)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    assert run_command(["list", "mixers"]) == 2
    reason = error.partition("('")[2].removesuffix("')")
    assert capsys.readouterr().err == f"sca: torchvision cannot be imported ({reason}); run `sca doctor`\n"


def test_a_defect_elsewhere_keeps_its_traceback(monkeypatch):
    from sca.cli import listing, run_command

    monkeypatch.setattr(listing, "_collect_rows", lambda kind: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_command(["list", "mixers"])
