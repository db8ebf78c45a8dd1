"""Hostile checkpoints: hostile values in the files of a model, and a process that records the effects.

Run as a program, it loads or otherwise uses the checkpoints of a folder and prints a line of JSON for each: the
outcome, and the events that the audit hook observed.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MARKER_FILE = "ran"  # a file that hostile code writes
DEEP_JSON = "[" * 100_000 + "]" * 100_000
HOSTILE_CODE = (
    "open({marker!r}, 'w').close()\nclass Attacker: ...\nmodel = dict(type='Attacker', backbone=dict(type='ResNet'))\n"
)


def list_hostile_values(outside_folder: Path, model_folder: str) -> list[Any]:
    """Return hostile values for a string field: paths, URLs, Hub ids, code, escapes, wrong types and sizes."""
    return [
        str(outside_folder / "secret"),
        str(outside_folder / "attacker.py"),
        "../outside/secret",
        f"{model_folder}/../../outside/secret",
        "~/secret",
        "\\\\server\\share\\model",
        "C:\\Users\\model",
        "a\0b",
        "http://127.0.0.1:9/weights.pth",
        "file:///etc/passwd",
        "hf-hub:attacker/model",
        "local-dir:/etc",
        "attacker/model",
        "bare-attacker",
        "gpt2-of-an-attacker",
        "__import__('os').system('true')",
        "attacker:Attacker",
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
        ["attacker/model"] * 3,
        {"name": "attacker/model", "trust_remote_code": True},
        RawJson(DEEP_JSON),
        RawJson("NaN"),
        RawJson('"\\ud800"'),
    ]


class RawJson(str):
    """JSON text that is written unchanged."""


def write_json(path: Path, content: Any) -> None:
    """Write JSON content; values of type `RawJson` are written unchanged."""
    raw_texts: list[str] = []

    def encode(value: Any) -> Any:
        if isinstance(value, RawJson):
            raw_texts.append(str(value))
            return f"<<raw {len(raw_texts) - 1}>>"
        if isinstance(value, dict):
            return {key: encode(each) for key, each in value.items()}
        return [encode(each) for each in value] if isinstance(value, list) else value

    text = json.dumps(encode(content))
    for number, raw in enumerate(raw_texts):
        text = text.replace(f'"<<raw {number}>>"', raw)
    path.write_text(text, "utf-8")


def iter_string_paths(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all strings in JSON content."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from iter_string_paths(value, (*path, key))
    elif isinstance(content, list):
        for index, value in enumerate(content[:2]):
            yield from iter_string_paths(value, (*path, index))
    elif isinstance(content, str):
        yield path


def replace_at_path(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of JSON content with another value at a path; add missing keys."""
    if not path:
        return value
    key, *rest = path
    if isinstance(content, list):
        return [
            replace_at_path(each, tuple(rest), value) if index == key else each for index, each in enumerate(content)
        ]
    table = content if isinstance(content, dict) else {}
    return {**table, key: replace_at_path(table.get(key), tuple(rest), value)}


ADDED_FIELDS = {  # fields that an attacker would add, by file
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
        ("attacker",),
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
    "uncertainty.json": [("weights_hash",), ("calibrations", "caption"), ("domain", "mean")],
    "tokenizer.json": [],
    "model.safetensors.index.json": [("weight_map", "a")],
}
COMPONENT_NAMES = (
    "hf",
    "gguf",
    "sam",
    "timm",
    "open-clip",
    "mmdet",
    "attacker",
    "sca-mmdet:mmdet",
    "../sam",
    "os:system",
)


def write_hostile_checkpoint(base_checkpoint: Path, models_folder: Path, seed: int, outside_folder: Path) -> str:
    """Write the hostile checkpoint of a seed; return a description of the changes."""
    rng = random.Random(seed)
    folder = models_folder / f"model-{seed}"
    shutil.copytree(base_checkpoint, folder)
    for program in ("attacker.py", "modeling_attacker.py", "conftest.py", "sitecustomize.py"):
        (folder / program).write_text(HOSTILE_CODE.format(marker=str(models_folder / MARKER_FILE)))
    files = sorted(path for path in folder.rglob("*.json") if path.name in ADDED_FIELDS)
    addable_files = [
        folder / "lm" / name for name in ("adapter_config.json", "generation_config.json") if (folder / "lm").is_dir()
    ]
    file = rng.choice(
        [*files, *[path for path in files if path.name in ("spec.json", "config.json")] * 2, *addable_files]
    )
    content = json.loads(file.read_text("utf-8")) if file.exists() else {}
    string_paths = list(iter_string_paths(content))
    string_paths = string_paths if len(string_paths) < 40 else rng.sample(string_paths, 40)
    values = list_hostile_values(outside_folder, str(folder))
    changes = []
    if file.name == "spec.json" and rng.random() < 0.5:
        kind = rng.choice(("encoder", "language_model", "segmenter"))
        content = replace_at_path(content, (kind,), {"name": rng.choice(COMPONENT_NAMES)})
        changes.append(f"{kind}={content[kind]['name']}")
    for _ in range(rng.choice((1, 1, 2))):
        path, value = rng.choice([*string_paths, *ADDED_FIELDS[file.name] * 3] or [("attacker",)]), rng.choice(values)
        content = replace_at_path(content, path, value)
        changes.append(f"{'.'.join(map(str, path))}={str(value)[:60]!r}")
    write_json(file, content)
    return f"{file.relative_to(folder)}: {', '.join(changes)}"


# --- the process that uses the checkpoints ----------------------------------------------------------------------------

OBSERVED_EVENTS: list[str] = []
WATCHED_EVENTS = (
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
)


def make_audit_hook(allowed_paths: list[Path], folder: Path) -> Callable[[str, tuple[Any, ...]], None]:
    """Return an audit hook that records forbidden events; the folder of the model is read-only."""
    readable_prefixes = tuple(f"{path}/" for path in (*allowed_paths, folder))

    def record_event(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen" and arguments[1] == ["git", "rev-parse", "HEAD"]:
            return  # recorded in checkpoints
        if event in WATCHED_EVENTS:
            OBSERVED_EVENTS.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], str):
            path, mode, flags = arguments
            is_write = isinstance(flags, int) and flags & 3
            absolute_path = str(Path(path).absolute()) if "\0" not in path else path
            if is_write and absolute_path.startswith(f"{folder}/"):
                OBSERVED_EVENTS.append(f"write {absolute_path}")
            elif not f"{absolute_path}/".startswith((*readable_prefixes, "/proc/", "/sys/", "/dev/")):
                OBSERVED_EVENTS.append(f"open {absolute_path!r:.200} {mode}")
        elif event in ("import", "compile", "exec"):
            text = f"{arguments!r:.4000}"
            if str(folder) in text or "attacker" in text.lower():
                OBSERVED_EVENTS.append(f"{event} {text:.200}")

    return record_event


def use_checkpoint(folder: Path, command: str, out: Path) -> None:
    """Use a checkpoint as a command does."""
    import sca
    from sca.cli import run_command

    if command == "load":
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
    }[command]
    if command == "demo":
        from sca.demo.app import ModelPool

        models = ModelPool("cpu", None, (), allow_any_model=True)
        with models.acquire_scheduler(str(folder)):
            pass
        models.close()
        return
    status = run_command(arguments)
    if status:
        raise ValueError("refused")


def main(folder: Path, commands: list[str], allowed_paths: list[str]) -> None:
    """Use every checkpoint in a folder and print the outcomes."""
    import contextlib
    import io
    import warnings

    import sca

    warnings.simplefilter("ignore")
    out = folder.parent / "out"
    out.mkdir(exist_ok=True)
    sca.load("sca-tiny")  # what a first load imports
    if "demo" in commands:
        import sca.demo.app
    readable_paths = [
        Path(each) for each in (*allowed_paths, sys.prefix, sys.base_prefix, str(Path(sca.__file__).parents[1]), out)
    ]
    for index, model in enumerate(sorted(folder.glob("model-*"))):
        command = commands[index % len(commands)]
        OBSERVED_EVENTS.clear()
        hook = make_audit_hook(readable_paths, model)
        ACTIVE_HOOKS[:] = [hook]
        message, errors = "", io.StringIO()
        try:
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                use_checkpoint(model, command, out)
            message = "completed"
        except ValueError as error:
            message = f"{error}" if command in ("load", "demo") else errors.getvalue()
        except BaseException as error:
            message = f"Traceback: {type(error).__name__}: {error}"
        ACTIVE_HOOKS.clear()
        print(
            "##"
            + json.dumps({"model": model.name, "command": command, "message": message, "events": OBSERVED_EVENTS[:5]}),
            flush=True,
        )


ACTIVE_HOOKS: list[Callable[[str, tuple[Any, ...]], None]] = []


def _run_active_hooks(event: str, arguments: tuple[Any, ...]) -> None:
    for hook in ACTIVE_HOOKS:
        hook(event, arguments)


if __name__ == "__main__":
    sys.addaudithook(_run_active_hooks)
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:])
