"""`sca pull`, `push`, `import` and `export`: weights fetched, given away, and taken from one layout to another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sca.cli.options import (
    AllowExternal,
    TrustRemoteCode,
    check_option_choice,
    print_document,
    print_line,
    print_stderr,
)

LAYOUTS = ("published", "lm")


def pull(
    name: Annotated[str, typer.Argument(help="a model or a part by name, or a hub id OWNER/NAME")],
    revision: Annotated[str | None, typer.Option(help="of a hub id; by name, what the card says")] = None,
    allow_external: AllowExternal = False,
) -> None:
    """Fetches weights into the cache, so that they are there without a network.

    What is there already is not fetched again, and what was cut off goes on. HF_TOKEN and HF_ENDPOINT are heeded.
    Prints the commit that was taken and stores it: from then on the same commit is loaded, until another is pulled.
    """
    from sca.checkpoints.layout import find_tokenizer_source
    from sca.checkpoints.trust import Trust, TrustError
    from sca.io.hub import download_model_files as fetch
    from sca.io.hub import pin_commit

    def fetch_and_pin(source: str, revision: str | None = None, **options: Any) -> Path:
        folder = fetch(source, revision, **options)
        commit = pin_commit(source, folder)
        print_line(f"{source}{f' at {commit}' if commit else ''}: {folder}")
        return folder

    for source, card_revision, prefix in _find_weight_sources(name):
        if "://" in source:
            raise ValueError(f"{name} has its weights at {source}, from where they are fetched when it is first built")
        folder = fetch_and_pin(source, revision or card_revision, prefix=prefix)
        try:
            tokenizer = find_tokenizer_source(folder, Trust(external=allow_external))
        except TrustError as error:
            print_stderr(f"its tokenizer was not fetched: {error}")
            continue
        if tokenizer:  # a published checkpoint has its language model's tokenizer elsewhere
            fetch_and_pin(tokenizer, weights=False)


def push(
    checkpoint: Annotated[str, typer.Argument(help="a checkpoint folder, or a name of the zoo")],
    name: Annotated[str, typer.Argument(help="on the hub: OWNER/NAME")],
    scores: Annotated[
        list[Path] | None, typer.Option(help="scores.json of `sca evaluate`, for the card; as often as wanted")
    ] = None,
    trained_on: Annotated[str | None, typer.Option(help="what the card says of the data")] = None,
    license: Annotated[str | None, typer.Option(help="an SPDX name, for the card")] = None,
    private: Annotated[bool, typer.Option("--private", help="a new repository is not shown to others")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the card, and write nothing")] = False,
) -> None:
    """Writes a checkpoint to a hub, with a model card from what is known of it; `sca.load` reads it back by that name.

    HF_TOKEN and HF_ENDPOINT are heeded.
    """
    from sca.checkpoints.load import locate_checkpoint
    from sca.checkpoints.push import push_checkpoint as give
    from sca.checkpoints.push import render_card

    if dry_run:
        print_document(render_card(locate_checkpoint(checkpoint), name, scores or (), trained_on, license))
    else:
        print_line(give(checkpoint, name, scores or (), private, trained_on, license))


def import_(
    folder: Annotated[str, typer.Argument(help="a folder in the published layout, or a model by name or hub id")],
    out: Annotated[Path, typer.Argument(help="folder to write to")],
    encoder: Annotated[str, typer.Option(help="a SAM by name or folder whose weights the model has")] = "",
    language_model: Annotated[str, typer.Option(help="a language model by name or folder, likewise")] = "",
    tokenizer: Annotated[str, typer.Option(help="a hub id or folder with a tokenizer, for a model that has none")] = "",
    trust_remote_code: TrustRemoteCode = False,
    allow_external: AllowExternal = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another checkpoint in OUT.")] = False,
) -> None:
    """Writes a model in this package's own layout.

    What --encoder and --language-model name is compared to the last bit and then referred to, so that the checkpoint
    holds little more than what was trained; without them it holds everything.
    """
    from sca.checkpoints.load import locate_checkpoint
    from sca.checkpoints.native import check_writable
    from sca.io.file_lock import hold_lock
    from sca.io.run_folder import check_not_inputs, iter_existing_paths

    check_writable(out)
    check_not_inputs([out], [locate_checkpoint(folder), *iter_existing_paths([encoder, language_model, tokenizer])])
    out.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(out.parent / f".{out.name}.sca-lock", str(out)):
        trust_options = {"trust_remote_code": trust_remote_code, "allow_external": allow_external}
        _import_checkpoint(folder, out, encoder, language_model, tokenizer, overwrite, trust_options)
    print_stderr(f"wrote {out}")


def _import_checkpoint(
    folder: str,
    out: Path,
    encoder: str,
    language_model: str,
    tokenizer: str,
    overwrite: bool,
    trust_options: Mapping[str, bool],
) -> None:
    from sca.checkpoints.export import attach_sources
    from sca.checkpoints.load import load
    from sca.checkpoints.native import is_saved, save
    from sca.io.errors import OutputError
    from sca.io.hub import fetch_model_folder
    from sca.language_models.hf import load_tokenizer

    model = load(folder, **trust_options)
    if encoder or language_model:
        model = attach_sources(
            model,
            **({"encoder": _make_part("encoder", encoder, "sam")} if encoder else {}),
            **({"language_model": _make_part("language_model", language_model, "hf")} if language_model else {}),
        )
    if tokenizer:
        loaded_tokenizer = load_tokenizer(fetch_model_folder(tokenizer))
        if loaded_tokenizer is None:
            raise ValueError(f"there is no tokenizer in {tokenizer}")
        model.language_model.tokenizer = loaded_tokenizer
    if out.is_dir() and any(out.iterdir()) and not (overwrite or is_saved(model, out)):
        raise OutputError(f"{out} contains another checkpoint; choose another folder, or replace it with --overwrite")
    save(model, out)


def export(
    checkpoint: Annotated[str, typer.Argument(help="a checkpoint folder, a model by name, or a hub id")],
    out: Annotated[Path, typer.Argument(help="a new or empty folder")],
    layout: Annotated[
        str, typer.Option(help="published: SCA's own; lm: the language model alone, LoRA merged")
    ] = "published",
    trust_remote_code: TrustRemoteCode = False,
    allow_external: AllowExternal = False,
) -> None:
    """Writes a model in a layout that other programs read."""
    from sca.checkpoints.export import write_language_model, write_published_checkpoint
    from sca.checkpoints.load import load
    from sca.io.atomic import check_folder_replaceable

    check_option_choice("layout", layout, LAYOUTS)
    check_folder_replaceable(out)
    model = load(checkpoint, trust_remote_code=trust_remote_code, allow_external=allow_external)
    if layout == "published":
        write_published_checkpoint(model, out)
    else:
        write_language_model(model, out)
    print_stderr(f"wrote {out}")


def _find_weight_sources(name: str) -> list[tuple[str, str | None, str]]:
    """The hub ids of what a name stands for, each with its revision and with what the names of its files begin with."""
    from sca_registry import REGISTRIES, zoo
    from sca_registry.errors import make_unknown_name_error

    if name in zoo.list_names():
        entry = zoo.get_entry(name)
        if entry.folder:
            raise ValueError(f"{name} comes with the package: there is nothing to fetch")
        return [(entry.checkpoint, entry.revision, "")]
    sources = []
    for registry in REGISTRIES.values():
        options = registry.get_card(name).options if name in registry else {}
        if options.get("weights"):
            prefix = registry.get_declared(name, "prefix") or ""
            sources.append((options["weights"], options.get("revision"), prefix))
    if sources:
        return sources
    if "/" in name:
        return [(name, None, "")]
    names = [
        each
        for registry in REGISTRIES.values()
        for each in registry.list_names()
        if registry.get_card(each).options.get("weights")
    ]
    raise make_unknown_name_error(f"nothing that can be fetched is named {name!r}", name, [*zoo.list_names(), *names])


def _make_part(kind: str, name: str, fallback_name: str) -> object:
    """A registered name, or a folder or hub id as the weights of the part `factory`."""
    from sca_registry import get_registry
    from sca_registry.spec import Part

    return Part(name) if name in get_registry(kind) else Part(fallback_name, {"weights": name})
