"""Write the tables of combinations to train and of segmenters: `python tools/model_table.py [docs/models.md]`.

The values are those of `sca plan MODEL --precision bfloat16` for one image with 32 regions and captions of 20 tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sca_registry import get_registry
from sca_registry.spec import ModelSpec

from markers import write_between
from sca.builder import build
from sca.plan import plan_model
from sca.plan_cache import GIB

START, END = "<!-- choice -->", "<!-- /choice -->"
SEGMENTERS_START, SEGMENTERS_END = "<!-- segmenters -->", "<!-- /segmenters -->"
SEGMENTER_ENCODERS = (
    *("sam-vit-b", "sam-vit-l", "sam-vit-h", "sam-hq-vit-b", "sam-hq-vit-l", "sam-hq-vit-h"),
    *("sam2.1-hiera-tiny", "sam2.1-hiera-small", "sam2.1-hiera-base-plus", "sam2.1-hiera-large", "edgetam"),
    "sam3-tracker",
)
NUM_REGIONS = 32
CHOICES = {  # spec -> reason to choose it
    "sam-vit-h+query+gpt2-large": "the paper's architecture; the original SCA checkpoints load by name",
    "sam-vit-b+query+gpt2": "the same architecture at a sixth of the size; start here",
    "sam-vit-b+resampler+smollm2-360m": "SAM's masks; mixer with a low cost per region; larger language model",
    "sam-vit-l+query+qwen3-0.6b": "a recent language model of moderate size",
    "sam-vit-h+query+mistral-7b": "a language model of 7 B parameters; use `lora=16`",
    "clip-vit-l-14-336+query+gpt2": "image-text encoder; no masks",
    "siglip2-so400m-16-384+resampler+qwen3-0.6b": "recent image-text encoder; no masks",
    "dinov2-vit-b-14+query+gpt2": "self-supervised encoder with a fine grid; no masks",
    "tiny-vit+query+tiny-gpt2": "trains from scratch on a laptop",
}


def render_model_table() -> str:
    """Render the Markdown table."""
    rows = [["model", "use", "parameters", "memory", "GFLOPs per image", "GFLOPs per region", "licenses"]]
    rows.append(["---", "---", *["---:"] * 4, "---"])
    for model_name, reason in CHOICES.items():
        spec = ModelSpec.parse(model_name)
        model_plan = plan_model(spec, regions_per_image=NUM_REGIONS, precision="bfloat16")
        flops_per_region = sum(flops for stage, flops in model_plan.flops.items() if stage != "encode") / NUM_REGIONS
        part_cards = (
            get_registry("encoders").get_card(spec.encoder.name),
            get_registry("language_models").get_card(spec.language_model.name),
        )
        rows.append(
            [
                f"`{model_name}`",
                reason,
                f"{sum(model_plan.parameters.values()) / 1e6:,.0f} M",
                f"{model_plan.peak_memory / GIB:.2g} GiB",
                _format_giga(model_plan.flops["encode"]),
                _format_giga(flops_per_region),
                ", ".join(dict.fromkeys(card.license for card in part_cards)),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def render_segmenter_table() -> str:
    """Render the Markdown table of the encoders that bring a segmenter."""
    rows = [["encoder", "segmenter", "parameters", "GFLOPs per image", "GFLOPs per region", "input", "grid", "mask"]]
    rows = [[*rows[0], "license"], ["---", "---", *["---:"] * 6, "---"]]
    for name in SEGMENTER_ENCODERS:
        spec = ModelSpec.parse(f"{name}+query+tiny-gpt2")
        model_plan = plan_model(spec, regions_per_image=NUM_REGIONS, precision="bfloat16")
        encoder = build(spec, "meta").encoder
        grid_size = encoder.image_format.size // encoder.stride
        num_parameters = model_plan.parameters["encoder"] + model_plan.parameters["segmenter"]
        rows.append(
            [
                f"`{name}`",
                f"`{encoder.default_segmenter}`",
                f"{num_parameters / 1e6:,.1f} M",
                _format_giga(model_plan.flops["encode"]),
                _format_giga(model_plan.flops["segment"] / NUM_REGIONS),
                str(encoder.image_format.size),
                f"{grid_size} x {grid_size}",
                f"{4 * grid_size} x {4 * grid_size}",
                get_registry("encoders").get_card(name).license,
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _format_giga(num_operations: float) -> str:
    return f"{num_operations / 1e9:,.0f}" if num_operations >= 1e10 else f"{num_operations / 1e9:.1f}"


def main(page: str = "docs/models.md") -> None:
    try:
        write_between(Path(page), START, END, render_model_table())
        write_between(Path(page), SEGMENTERS_START, SEGMENTERS_END, render_segmenter_table())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
