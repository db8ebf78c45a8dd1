"""Image-to-text models of transformers: pictures, and texts where wanted, in; words with their scores out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from sca_registry.plugins import BUILTIN
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from sca.captioners.regions import ScoredText
from sca.captioners.untrained import untrained_processor
from sca.devices import find_dtype
from sca.io.errors import InputError
from sca.io.hub import fetch, fingerprint, load_pretrained, quiet
from sca.io.weight_files import reading
from sca.language_models.causal import new_words
from sca.language_models.hf import make_config
from sca.language_models.usage import count_tokens
from sca.model import check_finite_scores

ANSWERLESS = ("blip", "git")  # captioners: they go on with a text, and answer no question


class Question(NamedTuple):
    """What a model is shown and asked; `text` None for a caption of the picture."""

    image: Image.Image
    text: str | None = None


class ImageTextModel:
    """Any model of transformers' AutoModelForImageTextToText, with its processor.

    weights: a hub id, at a revision, or a folder in the same format. config: fields of the configuration, `model_type`
    among them; with `pretrained=False` weights are random, and the same each time, from them or from the configuration
    that lies with the weights. dtype: float32 on a CPU and that of the weights elsewhere, unless it is given. batch:
    how many pictures at a time; a memory limit, not a result.

    Pictures are prepared by Pillow, whether torchvision is there or not. Raises InputError or ValueError.
    """

    def __init__(
        self,
        weights: str | None,
        revision: str | None,
        pretrained: bool,
        config: Mapping[str, Any] | None,
        device: str | torch.device,
        dtype: str | None,
        batch: int,
    ):
        find_dtype(dtype)
        if batch < 1:
            raise ValueError(f"batch is {batch}: give a whole number, 1 or more")
        self.weights = weights if pretrained else None
        self.revision = revision
        self.batch = batch
        where = torch.device(device)
        kind = dtype or ("float32" if where.type == "cpu" else "auto")
        if self.weights:
            model = load_pretrained(
                AutoModelForImageTextToText,
                weights,
                revision,
                ("",),  # what the weights have besides (old buffers, other heads) is not needed
                dtype=kind,
            )
            self.processor = read_processor(fetch(weights, revision))
        else:
            configuration = make_config(weights, revision, config)
            self.processor = untrained_processor(configuration)  # refuses what it does not know
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = AutoModelForImageTextToText.from_config(configuration, trust_remote_code=False)
            model = model if kind == "auto" else model.to(getattr(torch, kind))
        self.model = model.to(where).eval()
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.kind: str = model.config.model_type
        self.ends = self._ends()

    @property
    def facts(self) -> dict[str, Any]:
        """What tells the weights from any others."""
        return fingerprint(self.weights, self.revision) if self.weights else {"weights": None}

    @torch.inference_mode()
    def tell(self, questions: Sequence[Question], beams: int, max_new_tokens: int) -> list[ScoredText]:
        """An answer for each question, and how sure the model was: exp of the mean log-probability of a token.

        Only what has the same shape goes together, so nothing is padded and no answer depends on its neighbours.
        """
        told = [ScoredText("", 0.0)] * len(questions)
        for start in range(0, len(questions), self.batch):
            alike: dict[Any, list[tuple[int, dict[str, Tensor]]]] = {}
            for place, question in enumerate(questions[start : start + self.batch], start):
                inputs = self._inputs(question)
                shape = tuple((name, value.shape) for name, value in inputs.items())
                alike.setdefault(shape, []).append((place, inputs))
            for rows in alike.values():
                places, several = zip(*rows, strict=True)
                together = {name: torch.cat([inputs[name] for inputs in several]) for name in several[0]}
                for place, answer in zip(places, self._generate(together, beams, max_new_tokens), strict=True):
                    told[place] = answer
        return told

    def _inputs(self, question: Question) -> dict[str, Tensor]:
        image, text = question
        if text is not None and getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": text}]
            turn = [{"role": "user", "content": content}]
            text = self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        asked = {"images": image} if text is None else {"images": image, "text": text}
        with quiet():
            return dict(self.processor(**asked, return_tensors="pt"))

    def _generate(self, inputs: dict[str, Tensor], beams: int, max_new_tokens: int) -> list[ScoredText]:
        def moved(value: Tensor) -> Tensor:
            return value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)

        with quiet():
            found = self.model.generate(
                **{name: moved(value) for name, value in inputs.items()},
                max_new_tokens=max_new_tokens,
                num_beams=beams,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        pad = self.tokenizer.pad_token_id
        pad = self.ends[0] if pad is None else pad
        ids, scores = new_words(found, self.ends, pad)
        check_finite_scores(scores, f"captioner model {self.kind!r}")
        texts = [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids.tolist()]
        prompt = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        usages = [count_tokens(prompt, [row], self.ends) for row in ids.tolist()]
        return [ScoredText(*each) for each in zip(texts, scores.exp().tolist(), usages, strict=True)]

    def _ends(self) -> list[int]:
        """What ends a text: as each part that generates says; BLIP's text decoder stops at its separator."""
        configs = [getattr(module, "generation_config", None) for module in self.model.modules()]
        given = [getattr(config, "eos_token_id", None) for config in configs]
        given.append(getattr(self.model.config.get_text_config(decoder=True), "sep_token_id", None))
        ends = [end for each in given for end in (each if isinstance(each, list) else [each]) if end is not None]
        return sorted(set(ends)) or [self.tokenizer.eos_token_id]


def read_processor(folder: Path) -> Any:
    """What prepares pictures and texts, as it lies in a folder. Raises InputError for one that cannot be read."""
    try:
        with reading(f"the processor in {folder}"), quiet():
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
            image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except InputError as error:
        way = f". It needs: pip install '{BUILTIN}[baselines]'" if "torchvision" in str(error).lower() else ""
        raise InputError(f"{error}{way}") from error
    processor.image_processor = image_processor
    return processor
