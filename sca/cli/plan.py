"""`sca plan`: what a combination costs, before anything is fetched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sca.cli.options import AllowExternal, TrustRemoteCode, print_json, print_line, print_table, settle

if TYPE_CHECKING:
    from sca_registry.spec import ModelSpec

    from sca.plan import Plan
    from sca.trust import Trust

DTYPES = ("float32", "bfloat16", "float16")


def plan(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="encoder+mixer+language-model, a checkpoint folder or a model by name"),
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="such as lora=16")] = None,
    gpu: Annotated[str | None, typer.Option(help="h200, a100-80, rtx4090, ..., or GiB: what fits it")] = None,
    images: Annotated[int, typer.Option(help="in a batch", min=1)] = 1,
    regions: Annotated[int, typer.Option(help="of an image", min=1)] = 32,
    words: Annotated[int, typer.Option(help="of a caption, in tokens", min=1)] = 20,
    train: Annotated[bool, typer.Option("--train", help="a step of training instead of captioning")] = False,
    dtype: Annotated[
        str, typer.Option(help="of the weights; in training, of what autocast computes in: " + ", ".join(DTYPES))
    ] = "float32",
    trust_remote_code: TrustRemoteCode = False,
    allow_external: AllowExternal = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Parameters, sizes of weights, operations and memory of a model, and what fits a GPU.

    Nothing is fetched or computed: the model is built without weights and run on tensors without content.
    """
    settle("dtype", dtype, DTYPES)
    import torch

    from sca.plan import plan as make_plan
    from sca.trust import Trust

    spec = _read(model, Trust(trust_remote_code, allow_external)).override(overrides or ())
    planned = make_plan(spec, images, regions, words, train, getattr(torch, dtype), gpu)
    if as_json:
        print_json(planned.to_dict())
    else:
        _print(planned)


def _read(model: str, trust: Trust) -> ModelSpec:
    """The spec of what was named. Raises RegistryError for what is none of these."""
    from sca_registry import zoo
    from sca_registry.messages import unknown
    from sca_registry.spec import ModelSpec

    from sca.checkpoint import SPEC, read_local_spec
    from sca.hub import suggest_path

    if "+" in model:
        return ModelSpec.parse(model)
    spec = read_local_spec(model, trust)
    if spec is not None:
        return spec
    if model in zoo.names():
        raise ValueError(f"{model} lies on the hub: plan its parts, such as sam-vit-h+query+gpt2-large")
    local = [name for name in zoo.names() if zoo.get(name).folder]
    raise unknown(
        f"{model!r} is neither a folder with a {SPEC} nor encoder+mixer+language-model{suggest_path(model)}",
        model,
        local,
    )


def _print(planned: Plan) -> None:
    from sca.io.terminal import Table
    from sca.plan import LIMIT

    what = "a step of training" if planned.train else "captioning"
    asked = f"{what} of {planned.images} x {planned.regions} regions, {planned.words} tokens, {planned.dtype}"
    print_line(f"{planned.model}: {asked}")
    table = Table(("stage", "GFLOP", "most memory"), right=("GFLOP", "most memory"), framed=False)
    for stage, flops in planned.flops.items():
        table.add_row(stage, f"{flops / 1e9:,.1f}", _size(planned.memory[stage]))
    table.add_row("in all", f"{sum(planned.flops.values()) / 1e9:,.1f}", _size(planned.peak))
    print_table(table)
    for part, count in planned.parameters.items():
        print_line(f"{part:<16}{count:>15,}")
    print_line(f"{'parameters':<16}{sum(planned.parameters.values()):>15,}  {planned.trainable:,} train")
    print_line(f"{'in float32':<16}{_size(planned.weights):>15}  a checkpoint of it {_size(planned.checkpoint)}")
    if planned.room is not None:
        most = planned.most_regions
        fits = "fits" if planned.fits else "does not fit"
        upto = f"{LIMIT:,} regions an image do, too" if most is None else f"up to {most:,} regions an image do"
        told = upto if most != 0 else "not one region does"
        print_line(f"{planned.gpu:<16}{_size(planned.room):>15}  to plan with: this {fits}; {told}")


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
