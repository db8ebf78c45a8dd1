"""Upload of a checkpoint with a model card to a hub: `sca push`."""

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

from sca.checkpoints.layout import ORIGIN_FILE, SPEC_FILE, UNCERTAINTY_FILE, WEIGHTS_FILE
from sca.checkpoints.load import locate_checkpoint
from sca.checkpoints.native import read_spec
from sca.checkpoints.trust import resolve_real_root
from sca.io.errors import InputError, OutputError
from sca.io.json import read_json
from sca.io.score_format import format_interval, format_score
from sca.io.text import escape_markdown
from sca.io.weight_files import describe_run_folder

DENIED_STATUSES = (401, 403)  # HTTP statuses for a missing token, or one without write access
CARD_FILE = "README.md"
CHECKPOINT_FILES = (SPEC_FILE, WEIGHTS_FILE, ORIGIN_FILE, UNCERTAINTY_FILE, "tokenizer")


def push_checkpoint(
    source: str | Path,
    repo_id: str,
    scores: Sequence[str | Path] = (),
    private: bool = False,
    trained_on: str | None = None,
    license: str | None = None,
) -> str:
    """Upload a checkpoint with a model card to a hub.

    `HF_TOKEN` and `HF_ENDPOINT` are used as in huggingface_hub.

    Args:
        source: Checkpoint folder or model name.
        repo_id: Repository on the Hub, OWNER/NAME.
        scores: `scores.json` files of `sca evaluate`; the card lists their scores and protocols.
        private: Create a private repository.
        trained_on: Text about the training data for the card.
        license: License for the card.

    Returns:
        The URL of the repository.

    Raises:
        InputError: The source is not a checkpoint, or a scores file cannot be read.
        OutputError: The hub rejects the upload.
    """
    folder = locate_checkpoint(source)
    card = render_card(folder, repo_id, scores, trained_on, license)
    with tempfile.TemporaryDirectory(prefix="sca-") as draft:
        _copy_checkpoint(folder, Path(draft))
        Path(draft, CARD_FILE).write_text(card, "utf-8")
        api = HfApi()
        try:
            repo_url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo_url.repo_id, folder_path=draft, commit_message="Upload a segment-caption-anything model"
            )
        except HFValidationError as error:
            raise OutputError(f"{repo_id!r} is not a repository name; expected OWNER/NAME") from error
        except (HfHubHTTPError, HTTPError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in DENIED_STATUSES:
                fix = "set HF_TOKEN to a token with write access"
            else:
                fix = "try again" if status else "check the network and HF_ENDPOINT"
            raise OutputError(f"cannot upload to {repo_id} ({reason}); {fix}") from error
    return str(repo_url)


def _copy_checkpoint(folder: Path, draft: Path) -> None:
    """Copy the files of a checkpoint; InputError for damaged weights."""
    for path in _list_checkpoint_files(folder):
        target = draft / path.relative_to(folder)
        if path.is_dir():
            target.mkdir()
        else:
            shutil.copyfile(path, target)
    try:
        safe_open(draft / WEIGHTS_FILE, framework="pt").keys()
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS_FILE} is damaged ({error}); copy it again") from error


def _list_checkpoint_files(folder: Path) -> list[Path]:
    """List the files and folders of a checkpoint, outer ones first; InputError for missing or irregular ones."""
    if description := describe_run_folder(folder):
        raise InputError(description)
    real_root = resolve_real_root(folder)
    paths = []
    for name in CHECKPOINT_FILES:
        for path in (folder / name, *sorted((folder / name).rglob("*"))):
            if path.is_symlink() and not path.resolve().is_relative_to(real_root):
                raise InputError(f"{path} is a link to outside the checkpoint; replace it with the file itself")
            if path.is_dir() or path.is_file():
                paths.append(path)
            elif path.exists():
                raise InputError(f"{path} is not a regular file; remove it")
    for name in (SPEC_FILE, WEIGHTS_FILE):
        if folder / name not in paths:
            raise InputError(f"{folder} has no {name}; copy or download the checkpoint again")
    return paths


def render_card(
    folder: Path,
    repo_id: str,
    scores: Sequence[str | Path] = (),
    trained_on: str | None = None,
    license: str | None = None,
) -> str:
    """Render the model card of a checkpoint.

    Args:
        folder: Checkpoint folder.
        repo_id: Repository on the Hub, OWNER/NAME.
        scores: `scores.json` files of `sca evaluate`.
        trained_on: Text about the training data.
        license: License.

    Returns:
        Markdown with the Hub's metadata.

    Raises:
        InputError: A file of the checkpoint or a scores file cannot be read.
    """
    origin_path = folder / ORIGIN_FILE
    origin = read_json(origin_path) if origin_path in _list_checkpoint_files(folder) else {}
    spec = read_spec(folder)
    if not isinstance(origin, dict):
        raise InputError(f"{origin_path} does not contain a JSON object; save the checkpoint again")
    score_files = [_read_scores(path) for path in scores]
    return "\n".join(
        [
            _render_metadata(repo_id, score_files, license),
            f"# {escape_markdown(repo_id)}",
            "",
            "A model that segments and captions any prompted region of an image, built with "
            "[segment-caption-anything](https://pypi.org/project/segment-caption-anything/) after "
            "[Segment and Caption Anything](https://arxiv.org/abs/2312.00869).",
            "",
            "```python",
            "import sca",
            "",
            f"predictor = sca.Predictor(sca.load({json.dumps(repo_id)}))",
            'predictor.set_image(sca.open_image("photo.jpg"))',
            "for caption in predictor.predict(boxes=[(10, 20, 200, 300)]):",
            "    print(caption.text)",
            "```",
            "",
            *_render_components(spec, origin),
            *(["## Training data", "", trained_on, ""] if trained_on else []),
            *_render_scores(score_files),
            "## License",
            "",
            license or "Not specified. The components above keep their licenses.",
            "",
        ]
    )


def _render_metadata(repo_id: str, score_files: Sequence[Mapping[str, Any]], license: str | None) -> str:
    """Render the YAML metadata of the card."""
    results = [
        EvalResult(
            task_type="image-to-text",
            dataset_type=str(file.get("dataset")),
            dataset_name=str(file.get("dataset")),
            dataset_split=file.get("split"),
            metric_type=each["name"],
            metric_value=each["value"],
        )
        for file in score_files
        for each in _select_reported_scores(file)
    ]
    data = ModelCardData(
        library_name="segment-caption-anything",
        pipeline_tag="image-to-text",
        tags=["image-segmentation", "image-captioning", "segment-anything"],
        license=license.lower() if license else None,
        model_name=repo_id if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _render_components(spec: ModelSpec, origin: Mapping[str, Any]) -> list[str]:
    lines = ["## Components", "", "| component | name | weights | license |", "| --- | --- | --- | --- |"]
    component_origins = origin.get("components")
    for kind in ("encoder", "segmenter", "mixer", "language_model"):
        component = getattr(spec, kind)
        component_origin = component_origins.get(kind) if isinstance(component_origins, dict) else None
        component_origin = component_origin if isinstance(component_origin, dict) else {}
        if component is not None or component_origin:
            name = component_origin.get("name") or (component.name if component is not None else "")
            lines.append(
                _format_table_row(
                    kind.replace("_", " "), name, component_origin.get("weights"), component_origin.get("license")
                )
            )
    if origin.get("written_by"):
        lines += ["", f"Written by {escape_markdown(str(origin['written_by']))}."]
    return [*lines, ""]


def _render_scores(score_files: Sequence[Mapping[str, Any]]) -> list[str]:
    if not score_files:
        return []
    lines = [
        "## Scores",
        "",
        "Scores times 100.",
        "",
        "| dataset | metric | value | 95% CI | protocol |",
        "| --- | --- | ---: | --- | --- |",
    ]
    for file in score_files:
        for each in _select_reported_scores(file):
            value, interval = format_score(each["value"]), format_interval(each.get("ci_low"), each.get("ci_high"))
            lines.append(_format_table_row(file.get("dataset"), each["name"], value, interval, each.get("protocol_id")))
    return [*lines, ""]


def _format_table_row(*cells: Any) -> str:
    """Format a row of a Markdown table with escaped cells."""
    return f"| {' | '.join(escape_markdown(str(cell or '')) for cell in cells)} |"


def _select_reported_scores(file: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Select the scores that exist and do not belong to controls (deliberately wrong prompts)."""
    return [each for each in file["score_details"] if each["control"] is None and each["value"] is not None]


def _read_scores(path: str | Path) -> Mapping[str, Any]:
    """Read a `scores.json` of `sca evaluate`; InputError for any other file."""
    try:
        content = read_json(path)
        for each in _select_reported_scores(content):
            float(each["value"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a scores.json of `sca evaluate`: {error}") from error
    return content
