"""Create .venv with this checkout installed: `python3 tools/environment.py [--lowest] [GROUP...]`.

A group is an entry of [dependency-groups] in pyproject.toml. Without groups, only the package's own requirements are
installed. An up-to-date .venv stays unchanged and an outdated one is updated; one that is incomplete, was moved, or
does not run is recreated. Requires only Python and a package index.

With --lowest, the folder is .venv-lowest and Python is the oldest supported version. Every requirement of the package,
its extras and the groups is installed at its lower bound in pyproject.toml; constraints.txt is not used.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
KEPT_PIP_SETTINGS = {  # machine-specific pip settings; all others would change what is installed
    *("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_CONFIG_FILE", "PIP_CACHE_DIR"),
    *("PIP_NO_CACHE_DIR", "PIP_CERT", "PIP_CLIENT_CERT", "PIP_PROXY", "PIP_TRUSTED_HOST", "PIP_DEFAULT_TIMEOUT"),
    *("PIP_TIMEOUT", "PIP_RETRIES", "PIP_KEYRING_PROVIDER"),
}


def main(groups, lowest):
    check_python(lowest)
    venv = VirtualEnvironment(ROOT / (".venv-lowest" if lowest else ".venv"))
    stamp = venv.read_stamp()
    sources_hash = hash_sources()
    if venv.is_usable(stamp):
        groups = sorted({*groups, *stamp.get("groups", ())})
        current = {"place": str(venv.folder), "from": sources_hash, "groups": groups}
        if stamp == current and venv.run_pip("check", "--quiet") == 0:
            return
    else:
        venv.create()
    group_names = "".join(f", {group}" for group in groups)
    print_message(f"installing into {venv.folder.name}: the package{group_names}; the first time takes a while")
    venv.unfinished_path.touch()
    get_versions = get_lowest_versions if lowest else get_tested_versions
    exit_status = venv.run_pip("install", "-qq", "-e", ".", *get_versions(groups))
    venv.unfinished_path.unlink()  # pip rolls back a failed installation; only a kill leaves a partial one
    if exit_status:
        exit_with_error(
            "pip could not install the requirements; its message is above. Without access to a package index, set "
            "PIP_FIND_LINKS to a folder of wheels and PIP_NO_INDEX=1, then repeat the command"
        )
    doctor_command = [venv.python, "-I", "-m", "sca", "doctor", "--fix"]
    if subprocess.run(doctor_command, stdout=subprocess.DEVNULL, check=False).returncode:
        print_message("continuing without torchvision, and without timm and open_clip, which need it")
        venv.run_pip("uninstall", "-qq", "-y", "torchvision", "timm", "open_clip_torch")
    venv.stamp_path.write_text(json.dumps({"place": str(venv.folder), "from": sources_hash, "groups": groups}), "utf-8")


def check_python(lowest):
    """Exit with an error if this Python cannot create the environment."""
    current_version, oldest_version = (".".join(map(str, version[:2])) for version in (sys.version_info, OLDEST_PYTHON))
    if sys.version_info < OLDEST_PYTHON:
        exit_with_error(
            f"Python {current_version} is too old, {oldest_version} or newer is required; "
            f"run: make PYTHON=python{oldest_version} demo"
        )
    if lowest and sys.version_info[:2] != OLDEST_PYTHON:
        exit_with_error(
            f"the lowest versions need Python {oldest_version}, not {current_version}; "
            f"run: make PYTHON=python{oldest_version} test-lowest"
        )


class VirtualEnvironment:
    """A virtual environment in a folder of the checkout."""

    def __init__(self, folder):
        self.folder = folder
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.stamp_path = folder / "installed.json"  # its path, a hash of the sources, and its groups
        self.unfinished_path = folder / "unfinished"  # exists during an installation

    def is_usable(self, stamp):
        """Return whether it runs, has pip, was not moved, and has no interrupted installation."""
        if self.unfinished_path.exists() or stamp.get("place", str(self.folder)) != str(self.folder):
            return False
        program = f"import pip, sys; sys.exit(sys.version_info < {OLDEST_PYTHON})"
        try:
            command = [self.python, "-I", "-c", program]
            return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
        except OSError:
            return False

    def create(self):
        """Create the environment, replacing one that does not work."""
        if self.folder.is_symlink() or self.folder.is_file():
            self.folder.unlink()
        elif self.folder.exists():
            print_message(f"{self.folder.name} does not work; creating a new one")
            shutil.rmtree(self.folder)
        self.folder.mkdir()
        self.unfinished_path.touch()
        if subprocess.run([sys.executable, "-I", "-m", "venv", self.folder], check=False).returncode != 0:
            exit_with_error(
                f"Python could not create {self.folder.name}; its message is above. "
                "On Debian and Ubuntu: apt-get install python3-venv"
            )

    def run_pip(self, *arguments):
        """Run pip in the environment, ignoring the user's other pip and Python settings; returns the exit status."""
        variables = {
            name: value
            for name, value in os.environ.items()
            if name in KEPT_PIP_SETTINGS or not name.startswith(("PIP_", "PYTHON"))
        }
        command = [self.python, "-I", "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
        stdout = subprocess.DEVNULL if arguments[0] == "check" else None
        return subprocess.run(command, cwd=ROOT, env=variables, stdout=stdout, check=False).returncode

    def read_stamp(self):
        """Return the record of the last installation; empty without one."""
        try:
            return json.loads(self.stamp_path.read_text("utf-8"))
        except (OSError, ValueError):
            return {}


def get_tested_versions(groups):
    """Return pip's arguments for the groups, at the versions in constraints.txt.

    A group refers to extras of the package as package[extra]; pip needs .[extra] to use this checkout.
    """
    pyproject = read_pyproject()
    package = pyproject["project"]["name"]
    arguments = ["-c", "constraints.txt"]
    for requirement in iter_group_requirements(groups, pyproject["dependency-groups"]):
        is_own_extra = requirement.startswith(package)
        arguments += ["-e", requirement.replace(package, ".", 1)] if is_own_extra else [requirement]
    return arguments


def get_lowest_versions(groups):
    """Return pip's arguments for the package, its extras and the groups, each requirement at its lower bound."""
    pyproject = read_pyproject()
    requirements = [*pyproject["project"]["dependencies"]]
    for extra in pyproject["project"]["optional-dependencies"].values():
        requirements += extra
    requirements += iter_group_requirements(groups, pyproject["dependency-groups"])
    return [pin_lowest(requirement) for requirement in requirements]


def iter_group_requirements(groups, dependency_groups):
    """Yield the requirements of groups and of the groups that they include; older versions of pip cannot read them."""
    for group in groups:
        for entry in dependency_groups[group]:
            if isinstance(entry, dict):
                yield from iter_group_requirements([entry["include-group"]], dependency_groups)
            else:
                yield entry


def pin_lowest(requirement):
    """Replace the version range of a requirement by its lower bound: `name[extra]>=1.2,<3` -> `name[extra]==1.2`."""
    match = re.fullmatch(r"([\w.-]+(?:\[[\w,.-]+\])?)>=([\w.]+)(?:,[^;]*)?", requirement)
    if match is None:
        exit_with_error(f"{requirement!r} in pyproject.toml has no lower bound; write it as name>=version")
    return f"{match[1]}=={match[2]}"


def read_pyproject():
    import tomllib  # new in Python 3.11

    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def hash_sources():
    """Return a hash of the files that determine what is installed."""
    files = (ROOT / "pyproject.toml", ROOT / "constraints.txt", Path(__file__), ROOT / "sca/torchvision_fix.py")
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def print_message(message):
    print(message, flush=True)


def exit_with_error(message):
    sys.exit(f"error: {message}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lowest", action="store_true", help="Install every requirement at its lower bound.")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="Groups of [dependency-groups] to install.")
    main(**vars(parser.parse_args()))
