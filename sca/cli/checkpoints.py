"""`sca pull`, `push`, `import` and `export`: download, upload and convert checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sca.cli.options import (
    AllowExternal,
    TrustRemoteCode,
    check_option_choice,
    print_document,
    print_line,
    print_stderr,
)

if TYPE_CHECKING:
    from sca_registry.spec import ComponentSpec


def pull(
    name: Annotated[str, typer.Argument(help="Model or component name, or a Hub repository OWNER/NAME.")],
    revision: Annotated[
        str | None,
        typer.Option(
            help="Hub revision. Defaults to the revision of the model or component, as `sca show` prints it.",
            rich_help_panel="Model",
        ),
    ] = None,
    allow_external: AllowExternal = False,
) -> None:
    """Download weights to the Hub cache and pin their commit.

    Files in the cache are not downloaded again, and interrupted downloads resume. Prints the commit and pins it: later
    loads use this commit until you pull a different one. Uses the environment variables HF_TOKEN and HF_ENDPOINT.
    """
    from sca.checkpoints.layout import find_tokenizer_source
    from sca.checkpoints.trust import Trust, TrustError
    from sca.io.hub import download_model_files, pin_commit

    def fetch_and_pin(source: str, revision: str | None = None, **options: Any) -> Path:
        folder = download_model_files(source, revision, **options)
        commit = pin_commit(source, folder)
        print_line(f"{source}{f' at {commit}' if commit else ''}: {folder}")
        return folder

    for source, card_revision, prefix in _find_weight_sources(name):
        if "://" in source:
            raise ValueError(
                f"the weights of {name} are at {source} and are downloaded when the model is first built; `sca pull` "
                "supports only the Hub"
            )
        folder = fetch_and_pin(source, revision or card_revision, prefix=prefix)
        try:
            tokenizer = find_tokenizer_source(folder, Trust(external=allow_external))
        except TrustError as error:
            print_stderr(f"the tokenizer was not downloaded: {error}")
            continue
        if tokenizer:  # an original SCA checkpoint has the tokenizer of its language model elsewhere
            fetch_and_pin(tokenizer, include_weights=False)


def push(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or model name.")],
    repo_id: Annotated[str, typer.Argument(help="Hub repository: OWNER/NAME.")],
    scores: Annotated[
        list[Path] | None,
        typer.Option(
            help="Scores file (scores.json) written by `sca evaluate`, to include in the model card. Repeatable.",
            rich_help_panel="Model card",
        ),
    ] = None,
    trained_on: Annotated[
        str | None,
        typer.Option(help="Description of the training data for the model card.", rich_help_panel="Model card"),
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="SPDX license identifier for the model card.", rich_help_panel="Model card")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Create a new repository as private.", rich_help_panel="Output")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the model card and upload nothing.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Upload a checkpoint and its model card to the Hub.

    Uses the environment variables HF_TOKEN and HF_ENDPOINT.
    """
    from sca.checkpoints.load import locate_checkpoint
    from sca.checkpoints.push import push_checkpoint, render_card

    if dry_run:
        print_document(render_card(locate_checkpoint(checkpoint), repo_id, scores or (), trained_on, license))
    else:
        print_line(push_checkpoint(checkpoint, repo_id, scores or (), private, trained_on, license))


def import_(
    source: Annotated[
        str,
        typer.Argument(help="Checkpoint in the original SCA layout: a folder, model name or Hub repository."),
    ],
    out: Annotated[Path, typer.Argument(help="Output folder.")],
    encoder: Annotated[
        str,
        typer.Option(
            help="SAM encoder (name or folder) whose weights match SOURCE. The checkpoint refers to it instead of "
            "storing a copy.",
            rich_help_panel="Model",
        ),
    ] = "",
    language_model: Annotated[
        str,
        typer.Option(
            help="Language model (name or folder) whose weights match SOURCE. The checkpoint refers to it instead of "
            "storing a copy.",
            rich_help_panel="Model",
        ),
    ] = "",
    tokenizer: Annotated[
        str,
        typer.Option(help="Tokenizer for a model without one: a Hub repository or folder.", rich_help_panel="Model"),
    ] = "",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing checkpoint in OUT.", rich_help_panel="Output")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_external: AllowExternal = False,
) -> None:
    """Import a checkpoint in the layout of the original SCA or PAM.

    With --encoder and --language-model, the command checks that the weights of these models match SOURCE. The imported
    checkpoint then refers to them instead of storing a copy. Without these options, it stores all weights.
    """
    from sca.checkpoints.load import locate_checkpoint
    from sca.checkpoints.native import check_writable
    from sca.io.file_lock import hold_lock
    from sca.io.run_folder import check_not_inputs, iter_existing_paths

    check_writable(out)
    check_not_inputs([out], [locate_checkpoint(source), *iter_existing_paths([encoder, language_model, tokenizer])])
    out.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(out.parent / f".{out.name}.sca-lock", str(out)):
        trust_options = {"trust_remote_code": trust_remote_code, "allow_external": allow_external}
        _import_checkpoint(source, out, encoder, language_model, tokenizer, overwrite, trust_options)
    print_stderr(f"wrote {out}")


def _import_checkpoint(
    source: str,
    out: Path,
    encoder: str,
    language_model: str,
    tokenizer: str,
    overwrite: bool,
    trust_options: Mapping[str, Any],
) -> None:
    from sca.checkpoints.export import attach_sources
    from sca.checkpoints.load import load
    from sca.checkpoints.native import is_saved, save
    from sca.io.errors import OutputError
    from sca.io.hub import fetch_model_folder
    from sca.language_models.hf import load_tokenizer

    model = load(source, **trust_options)
    if encoder or language_model:
        sources = {"encoder": _make_part("encoder", encoder, "sam")} if encoder else {}
        sources |= {"language_model": _make_part("language_model", language_model, "hf")} if language_model else {}
        model = attach_sources(model, **sources)
    if tokenizer:
        loaded_tokenizer = load_tokenizer(fetch_model_folder(tokenizer))
        if loaded_tokenizer is None:
            raise ValueError(f"no tokenizer in {tokenizer}; pass a folder or Hub id with a tokenizer")
        model.language_model.tokenizer = loaded_tokenizer
    if out.is_dir() and any(out.iterdir()) and not (overwrite or is_saved(model, out)):
        raise OutputError(
            f"{out} contains a different checkpoint; choose a different folder, or replace it with --overwrite"
        )
    save(model, out)


def export(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, model name or Hub repository.")],
    out: Annotated[Path, typer.Argument(help="New or empty output folder.")],
    layout: Annotated[
        str,
        typer.Option(
            help="Layout: published (the original SCA layout), pam (that of Perceive Anything), portable (the native "
            "layout with copies of external weights), lm (language model only, LoRA merged) or onnx (graphs for ONNX "
            "Runtime).",
            rich_help_panel="Output",
        ),
    ] = "published",
    trust_remote_code: TrustRemoteCode = False,
    allow_external: AllowExternal = False,
) -> None:
    """Export a checkpoint to another layout.

    The layout published is that of the original SCA, and the layout pam that of Perceive Anything. A portable
    checkpoint loads without --allow-external on any machine. The layout lm contains the language model only. The layout
    onnx requires the extra onnx, and runs without torch.
    """
    from sca.checkpoints.export import write_language_model, write_published_checkpoint
    from sca.checkpoints.load import load
    from sca.checkpoints.onnx_export import write_onnx_graphs
    from sca.checkpoints.pam_export import write_pam_checkpoint
    from sca.checkpoints.portable import write_portable_checkpoint
    from sca.io.atomic import check_folder_replaceable

    writers = {
        "published": write_published_checkpoint,
        "pam": write_pam_checkpoint,
        "portable": write_portable_checkpoint,
        "lm": write_language_model,
        "onnx": write_onnx_graphs,
    }
    check_option_choice("layout", layout, list(writers))
    check_folder_replaceable(out)
    precision = "float32" if layout == "onnx" else None  # the only one of the graphs
    model = load(checkpoint, precision=precision, trust_remote_code=trust_remote_code, allow_external=allow_external)
    writers[layout](model, out)
    print_stderr(f"wrote {out}")


def _find_weight_sources(name: str) -> list[tuple[str, str | None, str]]:
    """Return the Hub ids of a name, each with its revision and the prefix of its files."""
    from sca_registry import REGISTRIES, zoo
    from sca_registry.errors import make_unknown_name_error

    if name in zoo.list_names():
        entry = zoo.get_entry(name)
        if entry.folder:
            raise ValueError(f"{name} is included in the package; no download is needed")
        return [(entry.checkpoint, entry.revision, f"{entry.subfolder}/" if entry.subfolder else "")]
    sources = []
    for registry in REGISTRIES.values():
        options = registry.get_card(name).options if name in registry else {}
        if options.get("weights"):
            prefix = registry.get_declared(name, "file_prefix") or ""
            sources.append((options["weights"], options.get("revision"), prefix))
    if sources:
        return [*dict.fromkeys(sources)]  # a captioner and a proposer can have the same weights
    if "/" in name:
        return [(name, None, "")]
    names = [
        each
        for registry in REGISTRIES.values()
        for each in registry.list_names()
        if registry.get_card(each).options.get("weights")
    ]
    raise make_unknown_name_error(f"no downloadable weights named {name!r}", name, [*zoo.list_names(), *names])


def _make_part(kind: str, name: str, fallback_name: str) -> ComponentSpec:
    """Build a registered component, or `fallback_name` with weights from a folder or Hub id."""
    from sca_registry import get_registry
    from sca_registry.spec import ComponentSpec

    return ComponentSpec(name) if name in get_registry(kind) else ComponentSpec(fallback_name, {"weights": name})
