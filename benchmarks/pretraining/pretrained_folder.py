"""Folders of pretrained weights and a model card: an encoder, its segmenter, a language model or a captioner."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from crop_caption_objective import TinyGit
from sca.encoders.tiny_vit import TinyVit
from sca.encoders.tiny_vit_weights import TinyVitConfig
from sca.io.atomic import write_folder
from sca.io.hub import silence_transformers
from sca.language_models.tiny_gpt2 import TinyGpt2
from sca.segmenters.sam import SamSegmenter
from sca.segmenters.sam_weights import POSITION_FREQUENCY_SCALE

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"
TEXT_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
REPOSITORY_FOLDER = "benchmarks/pretrained"
PROCESSOR_FILE = "processor_config.json"
FOLDER_CONTENT = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, PROCESSOR_FILE, *TEXT_FILES)
CAMVID_TERMS = (
    "The photographs are the training split of CamVid (Brostow et al. 2009), as published with SegNet. CamVid is "
    "available for research, requires citation and has no license; clarify its terms before any other use. The "
    "photographs are not part of this repository. Not for driving or surveillance."
)
INPUTS = {  # what each objective uses of the data
    "masks": "images and masks",
    "image-text": "images, boxes, class names and phrases",
    "masked-pixels": "images",
    "self-distillation": "images and boxes",
    "language-model": "class names and phrases",
    "crop-captions": "images, boxes and phrases",
}
SUMMARIES = {
    "encoder": "Tiny encoder to freeze in experiments with the region captioner; not for other use.",
    "language_model": "Tiny language model to freeze in experiments with the region captioner; not for other use.",
    "captioner": "Tiny image captioner for crops of regions, as a baseline of the region captioner; not for other use.",
}
CARD = """\
# {name}

{summary}

```toml
{usage}
```

- Objective: {objective} ({source}), {steps} steps of {batch_size}, seed {seed}, {cpu_seconds:.0f} CPU seconds.
- Data: {inputs} of {data}. {terms}
- License: Apache-2.0 for the weights.

`config.json` contains the facts under `training`. To reproduce it:

```sh
{command}
```
"""


def save_encoder(
    folder: Path, options: Mapping[str, Any], encoder: TinyVit, segmenter: SamSegmenter | None, facts: Mapping[str, Any]
) -> None:
    """Write an encoder in the format of `TinyVitConfig`.

    Args:
        folder: New folder, or one that this program wrote.
        options: Options of the encoder.
        encoder: Encoder.
        segmenter: Segmenter that was trained with it, if any.
        facts: Facts about the training.
    """
    config = {"model_type": TinyVitConfig.model_type, "architectures": ["TinyVitModel"], "encoder": dict(options)}
    modules: dict[str, nn.Module] = {"encoder": encoder}
    if segmenter is not None:
        config |= make_segmenter_tables(segmenter)
        modules |= {"prompt_encoder": segmenter.prompt_encoder, "mask_decoder": segmenter.decoder}
    tensors = {
        f"{prefix}.{name}": tensor.detach().clone().contiguous()
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    with write_pretrained_folder(folder, facts) as draft:
        (draft / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
        write_json(draft / CONFIG_FILE, config | {"training": dict(facts)})


def make_segmenter_tables(segmenter: SamSegmenter) -> dict[str, Any]:
    """Return the tables of transformers' `SamConfig` that differ from its defaults."""
    decoder = segmenter.decoder.config
    return {
        "vision_config": {"hidden_size": POSITION_FREQUENCY_SCALE, "num_pos_feats": segmenter.channels // 2},
        "prompt_encoder_config": {
            "hidden_size": segmenter.channels,
            "image_size": segmenter.image_size,
            "patch_size": segmenter.image_size // segmenter.grid_size,
            "mask_input_channels": segmenter.prompt_encoder.mask_embed.conv3.in_channels,
            "box_masks": segmenter.box_masks,
        },
        "mask_decoder_config": {
            "hidden_size": segmenter.channels,
            "num_hidden_layers": decoder.num_hidden_layers,
            "num_attention_heads": decoder.num_attention_heads,
            "mlp_dim": decoder.mlp_dim,
            "iou_head_depth": decoder.iou_head_depth,
            "iou_head_hidden_dim": decoder.iou_head_hidden_dim,
        },
    }


def save_language_model(folder: Path, language_model: TinyGpt2, facts: Mapping[str, Any]) -> None:
    """Write a language model and its tokenizer in transformers' format.

    Args:
        folder: New folder, or one that this program wrote.
        language_model: Language model.
        facts: Facts about the training.
    """
    model = language_model.to_transformers().model
    model.config.training = dict(facts)
    with write_pretrained_folder(folder, facts) as draft, silence_transformers():
        model.save_pretrained(draft)
        language_model.tokenizer.save(str(draft))


def save_captioner(folder: Path, captioner: TinyGit, facts: Mapping[str, Any]) -> None:
    """Write an image captioner and its processor in transformers' format.

    Args:
        folder: New folder, or one that this program wrote.
        captioner: Captioner.
        facts: Facts about the training.
    """
    captioner.model.config.training = dict(facts)
    with write_pretrained_folder(folder, facts) as draft, silence_transformers():
        captioner.model.save_pretrained(draft)
        captioner.processor.save_pretrained(draft)


@contextmanager
def write_pretrained_folder(folder: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a draft of a folder with a model card, which replaces the folder at the end."""
    with write_folder(folder, FOLDER_CONTENT) as draft:
        yield draft
        (draft / CARD_FILE).write_text(render_card(folder.name, facts), "utf-8")


def render_card(name: str, facts: Mapping[str, Any]) -> str:
    """Render the model card of a folder.

    Args:
        name: Name of the folder.
        facts: Facts about its training.

    Returns:
        Markdown.
    """
    kind = facts["kind"]
    usage = f'{kind} = {{ name = "{facts["component"]}", weights = "{REPOSITORY_FOLDER}/{name}"'
    if kind == "captioner":
        usage += f', encoder = {{ name = "tiny-vit", weights = "{REPOSITORY_FOLDER}/tiny-vit-masks" }}'
    usage += " }"
    if facts["segmenter"]:
        usage += f'\nsegmenter = "{facts["segmenter"]}"'
    has_street = "street" in facts["data"]
    return CARD.format(
        **facts | {"data": " and ".join(f"{source} ({text})" for source, text in facts["data"].items())},
        inputs=INPUTS[facts["objective"]],
        name=name,
        usage=usage,
        terms=CAMVID_TERMS if has_street else "Scenes are generated.",
        summary=SUMMARIES[kind],
        command=f"python benchmarks/pretraining/pretrain.py {facts['objective']} --steps {facts['steps']} "
        f"--seed {facts['seed']}{' --street FOLDER' if has_street else ''} --out {REPOSITORY_FOLDER}/{name}",
    )


def write_json(path: Path, table: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2) + "\n", "utf-8")
