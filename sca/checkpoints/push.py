"""A checkpoint on a hub, with a card that says what it is: `sca push`."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from safetensors import SafetensorError, safe_open
from sca_registry.spec import ModelSpec

from sca.checkpoints.layout import ORIGIN, SPEC, WEIGHTS
from sca.checkpoints.load import locate
from sca.checkpoints.native import read_spec
from sca.checkpoints.trust import find_real_root
from sca.io.errors import InputError, OutputError
from sca.io.json import read_json
from sca.io.text import escape_markdown

CARD = "README.md"
KEPT = (SPEC, WEIGHTS, ORIGIN, "tokenizer")


def push(
    source: str | Path,
    name: str,
    scores: Sequence[str | Path] = (),
    private: bool = False,
    trained_on: str | None = None,
    licence: str | None = None,
) -> str:
    """Writes a checkpoint (a folder, or a name of the zoo) to a hub under `name`, OWNER/NAME, and gives its address.

    scores: files `scores.json` of `sca evaluate`, whose figures the card repeats with their protocols. trained_on,
    licence: what the card is to say of the data and the terms. `HF_TOKEN` and `HF_ENDPOINT` have their usual meaning.

    InputError for what is no checkpoint, OutputError for what the hub refuses.
    """
    folder = locate(source)
    card = card_of(folder, name, scores, trained_on, licence)
    with tempfile.TemporaryDirectory(prefix="sca-") as draft:
        _copy_checkpoint(folder, Path(draft))
        Path(draft, CARD).write_text(card, "utf-8")
        api = HfApi()
        try:
            made = api.create_repo(name, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=made.repo_id, folder_path=draft, commit_message="A segment-caption-anything model"
            )
        except HFValidationError as error:
            raise OutputError(f"{name!r} is no name for a model on a hub: give OWNER/NAME") from error
        except (HfHubHTTPError, HTTPError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise OutputError(f"cannot write {name} ({reason}): is HF_TOKEN a token that may write it?") from error
    return str(made)


def _copy_checkpoint(folder: Path, draft: Path) -> None:
    """Copy the files of a checkpoint. Raises InputError for weights that are damaged."""
    for path in _find_files(folder):
        target = draft / path.relative_to(folder)
        if path.is_dir():
            target.mkdir()
        else:
            shutil.copyfile(path, target)
    try:
        safe_open(draft / WEIGHTS, framework="pt").keys()
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS} is damaged ({error}); copy it again") from error


def _find_files(folder: Path) -> list[Path]:
    """The files and folders of a checkpoint, outer ones first.

    Raises:
        InputError: For one that is missing, a link that leads out of it, or what is no file.
    """
    inside = find_real_root(folder)
    found = []
    for name in KEPT:
        for path in (folder / name, *sorted((folder / name).rglob("*"))):
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise InputError(f"{path} is a link out of the checkpoint; replace it with the file itself")
            if path.is_dir() or path.is_file():
                found.append(path)
            elif path.exists():
                raise InputError(f"{path} is no regular file; a checkpoint has only files and folders")
    for name in (SPEC, WEIGHTS):
        if folder / name not in found:
            raise InputError(f"{folder} has no {name}, so it is not a whole checkpoint; copy it again")
    return found


def card_of(
    folder: Path,
    name: str,
    scores: Sequence[str | Path] = (),
    trained_on: str | None = None,
    licence: str | None = None,
) -> str:
    """The model card, Markdown with the hub's metadata, from what a checkpoint says of itself."""
    origin = folder / ORIGIN
    written = read_json(origin) if origin in _find_files(folder) else {}
    spec = read_spec(folder)
    if not isinstance(written, dict):
        raise InputError(f"{origin} is not an object; copy the checkpoint again")
    found = [_read_scores(path) for path in scores]
    return "\n".join(
        [
            _metadata(name, found, licence),
            f"# {escape_markdown(name)}",
            "",
            "A model that segments and captions any region a person points at, made with "
            "[segment-caption-anything](https://pypi.org/project/segment-caption-anything/) after "
            "[Segment and Caption Anything](https://arxiv.org/abs/2312.00869).",
            "",
            "```python",
            "import sca",
            "",
            f"predictor = sca.Predictor(sca.load({json.dumps(name)}))",
            'predictor.set_image(sca.open_image("photo.jpg"))',
            "for caption in predictor.predict(boxes=[(10, 20, 200, 300)]):",
            "    print(caption.text)",
            "```",
            "",
            *_parts(spec, written),
            *(["## Trained on", "", trained_on, ""] if trained_on else []),
            *_scores(found),
            "## Licence",
            "",
            licence or "Not stated. The parts above keep theirs.",
            "",
        ]
    )


def _metadata(name: str, found: Sequence[Mapping[str, Any]], licence: str | None) -> str:
    """The head of the card, for the hub."""
    results = [
        EvalResult(
            task_type="image-to-text",
            dataset_type=str(file.get("dataset")),
            dataset_name=str(file.get("dataset")),
            dataset_split=file.get("split"),
            metric_type=each["name"],
            metric_value=each["value"],
        )
        for file in found
        for each in _told(file)
    ]
    data = ModelCardData(
        library_name="segment-caption-anything",
        pipeline_tag="image-to-text",
        tags=["image-segmentation", "image-captioning", "segment-anything"],
        license=licence.lower() if licence else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _parts(spec: ModelSpec, origin: Mapping[str, Any]) -> list[str]:
    lines = ["## Parts", "", "| part | name | weights | licence |", "| --- | --- | --- | --- |"]
    known = origin.get("parts")
    for kind in ("encoder", "segmenter", "mixer", "language_model"):
        part = getattr(spec, kind)
        given = known.get(kind) if isinstance(known, dict) else None
        given = given if isinstance(given, dict) else {}
        if part is not None or given:
            name = given.get("name") or (part.name if part is not None else "")
            lines.append(_table_row(kind.replace("_", " "), name, given.get("weights"), given.get("licence")))
    if origin.get("written_by"):
        lines += ["", f"Written by {escape_markdown(str(origin['written_by']))}."]
    return [*lines, ""]


def _scores(found: Sequence[Mapping[str, Any]]) -> list[str]:
    if not found:
        return []
    lines = [
        "## Scores",
        "",
        "| dataset | metric | value | 95 % interval | protocol |",
        "| --- | --- | ---: | --- | --- |",
    ]
    for file in found:
        for each in _told(file):
            between = f"{each['low']:.3f} to {each['high']:.3f}" if each.get("low") is not None else ""
            value = f"{each['value']:.3f}"
            lines.append(_table_row(file.get("dataset"), each["name"], value, between, each.get("protocol")))
    return [*lines, ""]


def _table_row(*cells: Any) -> str:
    """A row of a Markdown table, with what a file says as plain text."""
    return f"| {' | '.join(escape_markdown(str(cell or '')) for cell in cells)} |"


def _told(file: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The scores of what was asked, without those of misleading prompts."""
    return [each for each in file["rows"] if each["control"] is None and each["value"] is not None]


def _read_scores(path: str | Path) -> Mapping[str, Any]:
    """What `sca evaluate` wrote. InputError for another file."""
    try:
        content = read_json(path)
        for each in _told(content):
            float(each["value"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no scores.json of `sca evaluate`: {error}") from error
    return content
