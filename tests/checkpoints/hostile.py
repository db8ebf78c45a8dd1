"""Hostile checkpoints: what a stranger could write into the files of a model, and a process that watches what happens.

Run as a program, it loads or otherwise uses the checkpoints of a folder and prints a line of JSON for each: whether it
ended in one line, and what the audit hook saw.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MARKER = "ran"  # a file that hostile code writes
DEEP = "[" * 100_000 + "]" * 100_000
CODE = (
    "open({marker!r}, 'w').close()\nclass Stranger: ...\nmodel = dict(type='Stranger', backbone=dict(type='ResNet'))\n"
)


def hostile_values(outside: Path, inner: str) -> list[Any]:
    """What a string field may hold instead: paths, URLs, hub ids, code, escapes, wrong types and sizes."""
    return [
        str(outside / "secret"),
        str(outside / "stranger.py"),
        "../outside/secret",
        f"{inner}/../../outside/secret",
        "~/secret",
        "\\\\server\\share\\model",
        "C:\\Users\\model",
        "a\0b",
        "http://127.0.0.1:9/weights.pth",
        "file:///etc/passwd",
        "hf-hub:stranger/model",
        "local-dir:/etc",
        "stranger/model",
        "bare-stranger",
        "gpt2-of-a-stranger",
        "__import__('os').system('true')",
        "stranger:Stranger",
        "os.system",
        "{{ ''.__class__.__mro__ }}",
        "\x1b[2J\x1b]0;title\x07\r\nsecond line\u2028\u202e",
        "x" * 100_000,
        "",
        None,
        True,
        -1,
        2**63,
        10**400,
        1e308,
        [],
        ["stranger/model"] * 3,
        {"name": "stranger/model", "trust_remote_code": True},
        Raw(DEEP),
        Raw("NaN"),
        Raw('"\\ud800"'),
    ]


class Raw(str):
    """JSON text that is written unchanged."""


def write_json(path: Path, content: Any) -> None:
    """Write JSON in which `Raw` values stand for themselves."""
    raws: list[str] = []

    def encode(value: Any) -> Any:
        if isinstance(value, Raw):
            raws.append(str(value))
            return f"<<raw {len(raws) - 1}>>"
        if isinstance(value, dict):
            return {key: encode(each) for key, each in value.items()}
        return [encode(each) for each in value] if isinstance(value, list) else value

    text = json.dumps(encode(content))
    for number, raw in enumerate(raws):
        text = text.replace(f'"<<raw {number}>>"', raw)
    path.write_text(text, "utf-8")


def fields(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all strings in JSON content."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from fields(value, (*path, key))
    elif isinstance(content, list):
        for place, value in enumerate(content[:2]):
            yield from fields(value, (*path, place))
    elif isinstance(content, str):
        yield path


def replaced(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of JSON content with another value at a path; keys that do not exist are added."""
    if not path:
        return value
    key, *rest = path
    if isinstance(content, list):
        return [replaced(each, tuple(rest), value) if place == key else each for place, each in enumerate(content)]
    table = content if isinstance(content, dict) else {}
    return {**table, key: replaced(table.get(key), tuple(rest), value)}


ADDED = {  # fields that a stranger would add, by file
    "spec.json": [
        ("language_model", "weights"),
        ("language_model", "tokenizer"),
        ("language_model", "trust_remote_code"),
        ("language_model", "config"),
        ("language_model", "revision"),
        ("encoder", "weights"),
        ("encoder", "config"),
        ("encoder", "pretrained"),
        ("encoder", "model"),
        ("segmenter", "weights"),
        ("lora", "target_modules"),
        ("generation", "custom_generate"),
        ("stranger",),
    ],
    "config.json": [
        ("auto_map", "AutoConfig"),
        ("auto_map", "AutoModelForCausalLM"),
        ("_attn_implementation",),
        ("attn_implementation",),
        ("quantization_config", "quant_method"),
        ("_name_or_path",),
        ("dtype",),
        ("text_config", "_name_or_path"),
        ("text_config", "attn_implementation"),
        ("text_config", "model_type"),
        ("text_config", "auto_map"),
    ],
    "tokenizer_config.json": [
        ("tokenizer_class",),
        ("auto_map", "AutoTokenizer"),
        ("tokenizer_file",),
        ("vocab_file",),
        ("chat_template",),
        ("processor_class",),
    ],
    "adapter_config.json": [("base_model_name_or_path",)],
    "generation_config.json": [("eos_token_id",), ("custom_generate",)],
    "origin.json": [],
    "tokenizer.json": [],
    "model.safetensors.index.json": [("weight_map", "a")],
}
COMPONENTS = ("hf", "gguf", "sam", "timm", "open-clip", "mmdet", "stranger", "sca-mmdet:mmdet", "../sam", "os:system")


def make(base: Path, where: Path, number: int, outside: Path) -> str:
    """Write one hostile checkpoint, by its number always the same, and say what is hostile about it."""
    draw = random.Random(number)
    folder = where / f"model-{number}"
    shutil.copytree(base, folder)
    for program in ("stranger.py", "modeling_stranger.py", "conftest.py", "sitecustomize.py"):
        (folder / program).write_text(CODE.format(marker=str(where / MARKER)))
    files = sorted(path for path in folder.rglob("*.json") if path.name in ADDED)
    new = [
        folder / "lm" / name for name in ("adapter_config.json", "generation_config.json") if (folder / "lm").is_dir()
    ]
    file = draw.choice([*files, *[path for path in files if path.name in ("spec.json", "config.json")] * 2, *new])
    content = json.loads(file.read_text("utf-8")) if file.exists() else {}
    known = list(fields(content))
    known = known if len(known) < 40 else draw.sample(known, 40)
    values = hostile_values(outside, str(folder))
    said = []
    if file.name == "spec.json" and draw.random() < 0.5:
        kind = draw.choice(("encoder", "language_model", "segmenter"))
        content = replaced(content, (kind,), {"name": draw.choice(COMPONENTS)})
        said.append(f"{kind}={content[kind]['name']}")
    for _ in range(draw.choice((1, 1, 2))):
        path, value = draw.choice([*known, *ADDED[file.name] * 3] or [("stranger",)]), draw.choice(values)
        content = replaced(content, path, value)
        said.append(f"{'.'.join(map(str, path))}={str(value)[:60]!r}")
    write_json(file, content)
    return f"{file.relative_to(folder)}: {', '.join(said)}"


# --- the process that watches -----------------------------------------------------------------------------------------

SEEN: list[str] = []
WATCHED = (
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
)


def watch(allowed: list[Path], folder: Path) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that keeps what a checkpoint must not cause; the model's own folder is only read."""
    reads = tuple(f"{path}/" for path in (*allowed, folder))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen" and arguments[1] == ["git", "rev-parse", "HEAD"]:
            return  # which commit of this package writes a checkpoint
        if event in WATCHED:
            SEEN.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], str):
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & 3
            full = str(Path(path).absolute()) if "\0" not in path else path
            if writes and full.startswith(f"{folder}/"):
                SEEN.append(f"write {full}")
            elif not f"{full}/".startswith((*reads, "/proc/", "/sys/", "/dev/")):
                SEEN.append(f"open {full!r:.200} {mode}")
        elif event in ("import", "compile", "exec"):
            text = f"{arguments!r:.4000}"
            if str(folder) in text or "stranger" in text.lower():
                SEEN.append(f"{event} {text:.200}")

    return hook


def use(folder: Path, how: str, out: Path) -> None:
    """Use a checkpoint the way a command does."""
    import sca
    from sca.cli import run_command

    if how == "load":
        sca.load(folder)
        return
    arguments = {
        "caption": ["caption", str(out / "a.png"), "--box", "1,2,60,60", "--model", str(folder), "--quiet"],
        "export": ["export", str(folder), str(out / f"export-{folder.name}")],
        "import": ["import", str(folder), str(out / f"import-{folder.name}")],
        "plan": ["plan", str(folder)],
        "show": ["show", "model", str(folder)],
        "push": ["push", str(folder), "owner/name", "--dry-run"],
        "demo": [],
    }[how]
    if how == "demo":
        from sca.demo.app import ModelPool

        models = ModelPool("cpu", None, (), allow_any_model=True)
        with models.acquire_scheduler(str(folder)):
            pass
        models.close()
        return
    status = run_command(arguments)
    if status:
        raise ValueError("refused")


def main(folder: Path, hows: list[str], allowed: list[str]) -> None:
    """Use every checkpoint in a folder and print what happened."""
    import contextlib
    import io
    import warnings

    import sca

    warnings.simplefilter("ignore")
    out = folder.parent / "out"
    out.mkdir(exist_ok=True)
    sca.load("sca-tiny")  # what a first load imports
    if "demo" in hows:
        import sca.demo.app
    places = [Path(each) for each in (*allowed, sys.prefix, sys.base_prefix, str(Path(sca.__file__).parents[1]), out)]
    for number, model in enumerate(sorted(folder.glob("model-*"))):
        how = hows[number % len(hows)]
        SEEN.clear()
        hook = watch(places, model)
        HOOKS[:] = [hook]
        said, errors = "", io.StringIO()
        try:
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                use(model, how, out)
            said = "used"
        except ValueError as error:
            said = f"{error}" if how in ("load", "demo") else errors.getvalue()
        except BaseException as error:
            said = f"Traceback: {type(error).__name__}: {error}"
        HOOKS.clear()
        print("##" + json.dumps({"model": model.name, "how": how, "said": said, "seen": SEEN[:5]}), flush=True)


HOOKS: list[Callable[[str, tuple[Any, ...]], None]] = []


def _dispatch(event: str, arguments: tuple[Any, ...]) -> None:
    for hook in HOOKS:
        hook(event, arguments)


if __name__ == "__main__":
    sys.addaudithook(_dispatch)
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:])
