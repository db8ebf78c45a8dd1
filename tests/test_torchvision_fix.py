"""`sca doctor --fix`: torchvision built for CUDA beside a torch without it; the fix does not affect another torch."""

import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest

from sca import torchvision_fix
from sca.io.errors import InputError

TRACED_START_PROGRAM = """
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
def make_site_packages(tmp_path):
    """A folder of packages with torch, torchvision and the files of `fix` except its compiler output."""

    def write_site_packages(cuda):
        for name in ("torch", "torchvision"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("")
        (tmp_path / "torch/version.py").write_text(f"from typing import Optional\ncuda: Optional[str] = {cuda!r}\n")
        stub_folder = tmp_path / torchvision_fix.STUB_PACKAGE
        stub_folder.mkdir()
        (stub_folder / "__init__.py").write_text(torchvision_fix.LOADER_SOURCE)
        (stub_folder / "libcudart.so.13").write_bytes(b"")
        (tmp_path / f"{torchvision_fix.STUB_PACKAGE}.pth").write_text(torchvision_fix.PTH_CONTENT)
        return tmp_path

    return write_site_packages


def trace_python_start(site):
    completed = subprocess.run(
        [sys.executable, "-I", "-S", "-c", TRACED_START_PROGRAM, str(site)], capture_output=True, text=True
    )
    assert (completed.returncode, completed.stderr) == (0, "")
    return completed.stdout.splitlines()


@pytest.mark.slow
def test_stubs_load_with_torchvision_when_torch_has_no_cuda(make_site_packages):
    lines = trace_python_start(make_site_packages(None))
    assert lines == ["started False", "loaded libcudart.so.13", "looked for False", "imported"]


@pytest.mark.slow
def test_stubs_are_not_loaded_when_torch_has_cuda(make_site_packages):
    assert trace_python_start(make_site_packages("13.0")) == ["started False", "looked for False", "imported"]


@pytest.mark.parametrize("damage", ["no folder", "broken loader", "no torch", "broken version"])
@pytest.mark.slow
def test_stubs_do_not_break_python_startup_when_damaged(make_site_packages, damage):
    site_packages = make_site_packages(None)
    if damage == "no folder":
        shutil.rmtree(site_packages / torchvision_fix.STUB_PACKAGE)
    elif damage == "broken loader":
        (site_packages / torchvision_fix.STUB_PACKAGE / "__init__.py").write_text("raise SystemError\n")
    elif damage == "no torch":
        shutil.rmtree(site_packages / "torch")
    else:
        (site_packages / "torch/version.py").write_text("cuda = (")
    assert trace_python_start(site_packages) == ["started False", "looked for False", "imported"]


def test_remove_torchvision_fix_deletes_stub_files(make_site_packages):
    site_packages = make_site_packages(None)
    assert f"removed {site_packages / torchvision_fix.STUB_PACKAGE}.pth and" in torchvision_fix.remove_torchvision_fix(
        site_packages
    )
    assert sorted(path.name for path in site_packages.iterdir()) == ["torch", "torchvision"]
    assert torchvision_fix.remove_torchvision_fix(site_packages) == "nothing to remove"


@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("nm")), reason="needs gcc and nm")
@pytest.mark.slow
def test_install_stubs_makes_cuda_operator_library_loadable(tmp_path):
    def compile_library(target, code, *flags):
        command = ["gcc", "-shared", "-fPIC", "-o", target, "-x", "c", "-", *flags]
        subprocess.run([*map(str, command)], input=code, text=True, check=True)

    for folder in ("torch/lib", "torchvision"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "torch/version.py").write_text("cuda = None\n")
    (tmp_path / "map").write_text("libcudart.so.99 { global: *; };\n")
    runtime_library = tmp_path / "libcudart.so.99"
    compile_library(
        runtime_library,
        "int cudaFree(void) { return 0; }",
        f"-Wl,--version-script={tmp_path / 'map'}",
        "-Wl,-soname,libcudart.so.99",
    )
    operator_library = tmp_path / "torchvision/_C.so"
    compile_library(
        operator_library,
        "int cudaFree(void); int c10_cuda(void); int used(void) { return cudaFree() + (c10_cuda != 0); }",
        "-x",
        "none",
        runtime_library,
    )
    runtime_library.unlink()
    load_program = f"import ctypes; print(ctypes.CDLL({str(operator_library)!r}).used())"
    run_without_stubs = subprocess.run([sys.executable, "-c", load_program], capture_output=True, text=True)
    assert "OSError" in run_without_stubs.stderr
    torchvision_fix.install_stubs(tmp_path)
    load_with_stubs_program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torchvision_stubs; torchvision_stubs.load(); "
        f"{load_program}"
    )
    (tmp_path / "torch/__init__.py").write_text("")
    run_with_stubs = subprocess.run(
        [sys.executable, "-S", "-c", load_with_stubs_program], capture_output=True, text=True
    )
    assert run_with_stubs.stdout.strip() == "101", run_with_stubs.stderr
    assert not list(tmp_path.glob(".*"))


def test_doctor_fix_prints_one_line_and_rejects_undo_fix_at_once(monkeypatch, capsys):
    from sca.cli import run_command

    monkeypatch.setattr(torchvision_fix, "fix_torchvision", lambda: "fixed")
    assert run_command(["doctor", "--fix"]) == 0
    assert capsys.readouterr().out == "fixed\n"

    def raise_missing_compiler():
        raise InputError("no gcc")

    monkeypatch.setattr(torchvision_fix, "fix_torchvision", raise_missing_compiler)
    assert run_command(["doctor", "--fix"]) == 1
    assert capsys.readouterr().err == "sca: no gcc\n"
    assert run_command(["doctor", "--fix", "--undo-fix"]) == 2


@pytest.fixture
def fake_import_results(monkeypatch):
    """`fake_import_results(torchvision, cuda)` sets how imports end in another process, without starting one."""

    def set_import_results(torchvision, cuda):
        def run_python(program):
            error = torchvision if "torchvision" in program else "AssertionError" if cuda else ""
            return subprocess.CompletedProcess([], int(bool(error)), "", f"Traceback\n{error}\n")

        monkeypatch.setattr(torchvision_fix, "_run_python", run_python)

    return set_import_results


@pytest.mark.parametrize(
    ("error", "cuda", "remedy"),
    [
        ("OSError: libcudart.so.13", False, "run `sca doctor --fix`"),
        (
            "RuntimeError: operator torchvision::nms does not exist",
            True,
            "install matching versions of torch and torchvision",
        ),
        ("", False, ""),
    ],
)
def test_diagnose_torchvision_reports_error_and_fix(fake_import_results, make_site_packages, error, cuda, remedy):
    fake_import_results(error, cuda)
    diagnosis = torchvision_fix.diagnose_torchvision(make_site_packages(None))
    assert remedy in diagnosis
    assert error in diagnosis
    assert bool(diagnosis) == bool(error)


def test_diagnose_torchvision_passes_when_not_installed(fake_import_results, tmp_path):
    fake_import_results("ModuleNotFoundError: No module named 'torchvision'", False)
    assert torchvision_fix.diagnose_torchvision(tmp_path) == ""


def test_doctor_reports_broken_torchvision_before_trying_components(monkeypatch, capsys):
    from sca.cli import run_command

    problem = "torchvision cannot be imported; run `sca doctor --fix`"
    monkeypatch.setattr(torchvision_fix, "diagnose_torchvision", lambda: problem)
    monkeypatch.setattr("sca.testing.subprocess_checks.check_components", lambda *_: pytest.fail("a part was tried"))
    assert run_command(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("to fix:") + 1] == "  torchvision cannot be imported; run `sca doctor --fix`"


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
    completed = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert completed.returncode == 1
    assert re.search(r"mixer query +broken: the process of its checks", completed.stdout)
    assert re.search(r"mixer split +broken: OSError: libcudart.so.13: no such file", completed.stdout)
    assert re.search(r"6 of kind mixer +ok", completed.stdout)
    assert "pip install --force-reinstall -c constraints.txt PACKAGE" in completed.stdout
    assert "pip install -U segment-caption-anything" not in completed.stdout


@pytest.mark.parametrize("error", ["OSError('libcudart.so.13: no such file')", "RuntimeError('no operator nms')"])
def test_list_with_broken_torchvision_recommends_sca_doctor(monkeypatch, capsys, tmp_path, error):
    from sca.cli import listing, run_command

    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text(f"raise {error}\n")

    def import_torchvision(kind):
        try:
            importlib.import_module("torchvision")
        except (OSError, RuntimeError) as failure:
            raise ImportError("as transformers raises it") from failure

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(listing, "_collect_rows", import_torchvision)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    assert run_command(["list", "mixers"]) == 2
    reason = error.partition("('")[2].removesuffix("')")
    assert capsys.readouterr().err == f"sca: torchvision cannot be imported ({reason}); run `sca doctor`\n"


def test_run_command_does_not_hide_unexpected_exception(monkeypatch):
    from sca.cli import listing, run_command

    monkeypatch.setattr(listing, "_collect_rows", lambda kind: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_command(["list", "mixers"])
