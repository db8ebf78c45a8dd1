"""Environments for the packages of other tools, which tests run outside of .venv."""

import subprocess
import sys

import pytest


def create_tool_environment(folder, *requirements, pip_options=(), path_file=None):
    """Create an environment with packages from the package index; skip the test if they cannot be installed.

    `path_file` is the content of a .pth file. Returns the interpreter.
    """
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    interpreter = folder / "bin/python"
    if path_file:
        (site_packages,) = folder.glob("lib/python*/site-packages")
        (site_packages / "tool_environment.pth").write_text(path_file)
    installation = subprocess.run(
        [interpreter, "-m", "pip", "install", "--quiet", *pip_options, *requirements], capture_output=True, text=True
    )
    if installation.returncode:
        reason = installation.stderr.strip().splitlines()[-1]
        pytest.skip(f"{' '.join(map(str, requirements))} cannot be installed here: {reason}")
    return interpreter
