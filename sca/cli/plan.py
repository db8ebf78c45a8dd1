"""`sca plan`: estimate the cost of a model without downloading weights."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sca.cli.options import AllowExternal, TrustRemoteCode, check_precision, print_json, print_line, print_table

if TYPE_CHECKING:
    from sca_registry.spec import ModelSpec

    from sca.plan_cache import Plan


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Model: ENCODER+MIXER+LANGUAGE-MODEL, a checkpoint folder or a model name."
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Model overrides, such as lora=16.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="GPU whose memory the model must fit in: h200, a100-80, rtx4090, ..., or memory in GiB.",
            rich_help_panel="Workload",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per batch.", min=1, rich_help_panel="Workload")] = 1,
    regions_per_image: Annotated[
        int,
        typer.Option("--regions-per-image", "--regions", help="Regions per image.", min=1, rich_help_panel="Workload"),
    ] = 32,
    max_new_tokens: Annotated[
        int, typer.Option(help="Number of tokens per caption.", min=1, rich_help_panel="Workload")
    ] = 20,
    zoom_crops: Annotated[
        int,
        typer.Option(
            help="Crops per image that zoom encodes; at most one per region.", min=0, rich_help_panel="Workload"
        ),
    ] = 0,
    train: Annotated[
        bool,
        typer.Option("--train", help="Plan a training step instead of captioning.", rich_help_panel="Workload"),
    ] = False,
    chunk_size: Annotated[
        int,
        typer.Option(
            help="With --train: regions per forward pass, as train.chunk_size of a recipe; 0 for all at once.",
            min=0,
            rich_help_panel="Workload",
        ),
    ] = 0,
    precision: Annotated[
        str,
        typer.Option(
            help="Precision of the model: float32, bfloat16, float16 or int8; with --train, that of autocast.",
            callback=check_precision,
            rich_help_panel="Workload",
        ),
    ] = "float32",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object instead of a table.", rich_help_panel="Output")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_external: AllowExternal = False,
) -> None:
    """Estimate the parameter count, FLOPs and memory use of a model.

    Downloads no weights: the model is built without weights and run on the meta device.
    """
    from sca.plan_cache import resolve_gpu_memory

    if gpu is not None:
        resolve_gpu_memory(gpu)  # raises for an unknown GPU
    workload = {
        "batch_size": batch_size,
        "regions_per_image": regions_per_image,
        "max_new_tokens": max_new_tokens,
        "training": train,
        "gpu": gpu,
        "zoom_crops": zoom_crops,
        "precision": precision,
        "chunk_size": chunk_size,
    }
    with _without_garbage_collection():
        model_plan = _load_or_compute_plan(model, overrides or (), trust_remote_code, allow_external, workload)
    if as_json:
        print_json(model_plan.to_dict())
    else:
        print_plan(model_plan)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Disable garbage collection, which uses an eighth of the time of this short process and frees little memory."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _load_or_compute_plan(
    model: str,
    overrides: Sequence[str],
    trust_remote_code: bool,
    allow_external: bool,
    workload: dict[str, Any],
) -> Plan:
    """Return the plan of a model, from the cache if it was computed before."""
    from sca.plan_cache import compute_plan_key, read_plan, write_plan

    spec = _resolve_spec(model, trust_remote_code, allow_external).apply_overrides(overrides)
    key = compute_plan_key(spec, workload)
    model_plan = read_plan(key) if key else None
    if model_plan is None:
        from sca.plan import plan_model

        model_plan = plan_model(spec, **workload)
        if key:
            write_plan(key, model_plan)
    return model_plan


def _resolve_spec(model: str, trust_remote_code: bool, allow_external: bool) -> ModelSpec:
    """Return the spec of a model, see `resolve_spec`; for a combination of components without importing torch."""
    from sca_registry.spec import ModelSpec

    if "+" in model:
        return ModelSpec.parse(model)
    from sca.checkpoints.load import resolve_spec
    from sca.checkpoints.trust import Trust

    return resolve_spec(model, Trust(trust_remote_code, allow_external))


def print_plan(model_plan: Plan) -> None:
    """Print a plan as a table.

    Args:
        model_plan: Plan.
    """
    from sca.io.terminal import Table
    from sca.io.text import format_bytes
    from sca.plan_cache import MAX_PLANNED_REGIONS

    workload = "a training step with" if model_plan.training else "captioning"
    counts = f"{model_plan.batch_size} x {model_plan.regions_per_image} regions, {model_plan.max_new_tokens} tokens"
    print_line(f"{model_plan.model}: {workload} {counts}, {model_plan.precision}")
    table = Table(("stage", "GFLOPs", "peak memory"), right_aligned=("GFLOPs", "peak memory"), has_frame=False)
    for stage, flops in model_plan.flops.items():
        table.add_row(stage, f"{flops / 1e9:,.1f}", format_bytes(model_plan.memory[stage]))
    table.add_row("total", f"{sum(model_plan.flops.values()) / 1e9:,.1f}", format_bytes(model_plan.peak_memory))
    print_table(table)
    for group, count in model_plan.parameters.items():
        print_line(f"{group:<16}{count:>15,}")
    print_line(
        f"{'parameters':<16}{sum(model_plan.parameters.values()):>15,}  {model_plan.trainable_parameters:,} trainable"
    )
    checkpoint_size = format_bytes(model_plan.checkpoint_bytes)
    print_line(f"{'float32 weights':<16}{format_bytes(model_plan.weight_bytes):>15}  checkpoint: {checkpoint_size}")
    if model_plan.quantization is not None:
        label = f"{model_plan.quantization} weights"
        print_line(f"{label:<16}{format_bytes(model_plan.quantized_bytes):>15}  of the language model, in memory")
    if model_plan.usable_gpu_memory is not None:
        max_regions = model_plan.max_regions_per_image
        fits = "fits" if model_plan.fits_gpu else "does not fit"
        limit_text = f"at least {MAX_PLANNED_REGIONS:,}" if max_regions is None else f"{max_regions:,}"
        usable_memory = format_bytes(model_plan.usable_gpu_memory)
        print_line(
            f"{model_plan.gpu:<16}{usable_memory:>15}  usable; the workload {fits}; maximum regions per image: "
            f"{limit_text}{_format_chunk_size(model_plan.max_chunk_size)}"
        )


def _format_chunk_size(max_chunk_size: int | None) -> str:
    """Format the chunk size with which a training step fits; "" if it fits without, or captioning is planned."""
    if max_chunk_size is None:
        return ""
    return f"; it fits with train.chunk_size={max_chunk_size}" if max_chunk_size else "; no train.chunk_size fits"
