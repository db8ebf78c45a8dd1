"""Makes .venv, with this checkout installed in it: `python3 tools/environment.py [GROUP...]`.

A group is one of [dependency-groups] in pyproject.toml; without any, only what the package itself needs is installed.
Works from any state: a .venv that is whole and up to date is left alone; one that is older is brought up to date; one
that was left half made, was moved here, or does not run is made anew. Needs nothing but Python and a package index.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "installed.json"  # where .venv was made, from what, and which groups it has
UNFINISHED = VENV / "unfinished"  # there while something is being installed
OLDEST = (3, 11)
WHERE_PIP_LOOKS = {  # the settings of pip that are the machine's business; the others would change what is installed
    *("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_CONFIG_FILE", "PIP_CACHE_DIR"),
    *("PIP_NO_CACHE_DIR", "PIP_CERT", "PIP_CLIENT_CERT", "PIP_PROXY", "PIP_TRUSTED_HOST", "PIP_DEFAULT_TIMEOUT"),
    *("PIP_TIMEOUT", "PIP_RETRIES", "PIP_KEYRING_PROVIDER"),
}


def main(groups):
    if sys.version_info < OLDEST:
        found, wanted = (".".join(map(str, version[:2])) for version in (sys.version_info, OLDEST))
        fail(f"this is Python {found}, and {wanted} or newer is needed; name one: make PYTHON=python{wanted} demo")
    stamp = read_stamp()
    made_from = digest()
    if usable(stamp):
        groups = sorted({*groups, *stamp.get("groups", ())})
        if stamp == {"place": str(VENV), "from": made_from, "groups": groups} and pip("check", "--quiet") == 0:
            return
    else:
        make_venv()
    say(f"installing into .venv: the package{''.join(f', {group}' for group in groups)}; the first time takes a while")
    UNFINISHED.touch()
    failed = pip("install", "-qq", "-c", "constraints.txt", "-e", ".", *requirements(groups))
    UNFINISHED.unlink()  # what pip gives up it also takes back; only a kill leaves something half installed
    if failed:
        fail(
            "pip could not install what is needed; its reason stands above. If there is no package index in reach, "
            "connect, or set PIP_FIND_LINKS to a folder of wheels and PIP_NO_INDEX=1; then give the same command again"
        )
    if subprocess.run([PYTHON, "-I", ROOT / "tools/fit_torchvision.py"], check=False).returncode:
        say("going on without torchvision, and without timm and open_clip, which need it")
        pip("uninstall", "-qq", "-y", "torchvision", "timm", "open_clip_torch")
    STAMP.write_text(json.dumps({"place": str(VENV), "from": made_from, "groups": groups}), "utf-8")


def usable(stamp):
    """Whether .venv runs, has pip, lies where it was made, and no installation in it was cut short."""
    if UNFINISHED.exists() or stamp.get("place", str(VENV)) != str(VENV):
        return False
    program = f"import pip, sys; sys.exit(sys.version_info < {OLDEST})"
    try:
        return subprocess.run([PYTHON, "-I", "-c", program], stderr=subprocess.DEVNULL, check=False).returncode == 0
    except OSError:
        return False


def make_venv():
    if VENV.is_symlink() or VENV.is_file():
        VENV.unlink()
    elif VENV.exists():
        say("the .venv that is there does not work; making a new one")
        shutil.rmtree(VENV)
    VENV.mkdir()
    UNFINISHED.touch()
    if subprocess.run([sys.executable, "-I", "-m", "venv", VENV], check=False).returncode != 0:
        fail("python could not make .venv; its reason stands above. On Debian and Ubuntu: apt-get install python3-venv")


def pip(*arguments):
    """The exit status of pip in .venv; what a person set for other installations has no say in it."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in WHERE_PIP_LOOKS or not name.startswith(("PIP_", "PYTHON"))
    }
    command = [PYTHON, "-I", "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    quiet = subprocess.DEVNULL if arguments[0] == "check" else None
    return subprocess.run(command, cwd=ROOT, env=kept, stdout=quiet, check=False).returncode


def requirements(groups):
    """What the groups ask for, as pip takes it; reading it here spares a newer pip."""
    import tomllib  # new in Python 3.11

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["dependency-groups"]
    return [requirement for group in groups for requirement in listed[group]]


def digest():
    """Changes whenever what is to be installed does."""
    files = (ROOT / "pyproject.toml", ROOT / "constraints.txt", Path(__file__), ROOT / "tools/fit_torchvision.py")
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def read_stamp():
    try:
        return json.loads(STAMP.read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def say(message):
    print(message, flush=True)


def fail(message):
    sys.exit(f"error: {message}.")


if __name__ == "__main__":
    main(sys.argv[1:])
