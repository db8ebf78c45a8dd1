"""Region proposals from the boxes of an mmdet detector."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from sca_registry.contracts import Proposals

from sca.io.validation import check_range
from sca.io.weight_files import hash_tensors
from sca.proposers.detector import Detections, select_proposals
from sca.proposers.phrases import check_num_tokens, join_phrases, parse_phrases, split_phrases
from sca_mmdet.detectors import build_detector, load_mmdet_config, silence_mmdet


class MmdetProposer:
    """Proposer of a detector's boxes, with their scores and class names.

    The classes of most detectors are fixed. Their names are `class_names`, else those stored with the weights, else
    those of the test dataset in the config. A text-prompted detector, such as Grounding DINO, finds the phrases in
    `text`.

    Args:
        config: Name of a config in mmdet, or path of a file.
        weights: File or URL in the format of mmdet.
        pretrained: Load `weights`; False for random weights.
        class_names: Names of the classes, in the order of training.
        text: Phrases to find, such as "red car". They are converted to lower case. A period separates phrases.
        score_thresh: Minimum score.
        max_regions: Maximum number of regions, highest scores first.
        device: Device of the detector.

    Raises:
        RegistryError: An option is out of range.
        ValueError: The config or the weights do not exist, the detector needs compiled operators, or `text` or
            `class_names` does not suit it.
    """

    def __init__(
        self,
        config: str,
        weights: str | None = None,
        pretrained: bool = True,
        class_names: Sequence[str] = (),
        text: str | Sequence[str] = (),
        score_thresh: float = 0.3,
        max_regions: int = 100,
        device: str = "cpu",
    ):
        check_range("score_thresh", score_thresh, float, 0, 1)
        check_range("max_regions", max_regions, int, 1)
        if pretrained and weights is None:
            raise ValueError("no weights; set weights=FILE or a URL, or pretrained=false")
        mmdet_config = load_mmdet_config(config)
        if "test_dataloader" not in mmdet_config:
            raise ValueError(f"{config} has no test_dataloader, which prepares the images; add it to the config")
        self.text: str = _make_text(config, "language_model" in mmdet_config.model, text, class_names)
        _set_test_options(mmdet_config.model.get("test_cfg"), score_thresh)
        self.detector, metadata = build_detector(mmdet_config, config, weights if pretrained else None)
        self.detector.cfg = mmdet_config
        self.detector.to(device)
        if self.text:
            language_model = self.detector.language_model
            check_num_tokens(language_model.tokenizer, [self.text], language_model.max_tokens)
            self.class_names = tuple(split_phrases([self.text]))
        else:
            self.class_names = _find_class_names(config, class_names, mmdet_config, metadata, self.detector)
        self.score_thresh, self.max_regions = score_thresh, max_regions

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the weights."""
        return hash_tensors(self.detector.state_dict())

    def __call__(self, image: Image.Image, image_id: int | str) -> Proposals:
        """Return boxes of at least 1 pixel per side, best first."""
        from mmdet.apis import inference_detector

        bgr_image = np.asarray(image.convert("RGB"))[..., ::-1].copy()
        with silence_mmdet():
            results = inference_detector(
                self.detector, bgr_image, text_prompt=self.text or None, custom_entities=True
            ).pred_instances
        names = [self.class_names[label] if self.class_names else None for label in results.labels.tolist()]
        detections = Detections(results.bboxes, results.scores, names)
        return select_proposals(detections, image.size, self.score_thresh, self.max_regions)


def _make_text(config: str, takes_text: bool, text: str | Sequence[str], class_names: Sequence[str]) -> str:
    """Return the text prompt; empty for a detector with fixed classes. ValueError if an option does not suit it."""
    if not takes_text:
        if text:
            raise ValueError(
                f"the detector {config!r} takes no text, because its classes are fixed; omit it, or use a "
                "text-prompted one, such as grounding_dino_swin-t_pretrain_obj365_goldg_cap4m"
            )
        return ""
    if class_names:
        raise ValueError(f"the detector {config!r} takes text instead of class_names; set text=['red car', 'dog']")
    return join_phrases(parse_phrases(text))


def _set_test_options(settings: Any, score_thresh: float) -> None:
    """Set the score threshold of every stage of a config, and find all phrases at once."""
    if isinstance(settings, MutableMapping):
        settings.pop("chunked_size", None)
        for key, value in settings.items():
            if key == "score_thr":
                settings[key] = score_thresh
            else:
                _set_test_options(value, score_thresh)


def _find_class_names(
    config: str, class_names: Sequence[str], mmdet_config: Any, metadata: Any, detector: Any
) -> tuple[str, ...]:
    """Return the class names by label; empty, with a warning, if none or a wrong number of them is known."""
    names = tuple(class_names) or _read_class_names(mmdet_config, metadata)
    num_classes = max(_iter_class_counts(detector), default=len(names))
    if len(names) == num_classes:
        return names
    problem = f"{len(names)} class names for the {num_classes} classes of the detector {config!r}"
    remedy = "set class_names to one name per class"
    if class_names:
        raise ValueError(f"{problem}; {remedy}")
    warnings.warn(f"{problem}, so that regions have no names; {remedy}", stacklevel=3)
    return ()


def _read_class_names(config: Any, metadata: Any) -> tuple[str, ...]:
    """Return the class names stored with the weights, else those of the test dataset in the config."""
    meta = metadata.get("dataset_meta") or {}
    classes = meta.get("classes") or meta.get("CLASSES") or metadata.get("CLASSES")
    if classes:
        return tuple(classes)
    from mmdet.registry import DATASETS

    dataset = config.test_dataloader.get("dataset", {})
    dataset_type = dataset.get("type")
    dataset_class = DATASETS.get(dataset_type) if isinstance(dataset_type, str) else None
    defaults = getattr(dataset_class, "METAINFO", None) or {}
    return tuple((dataset.get("metainfo") or {}).get("classes") or defaults.get("classes", ()))


def _iter_class_counts(detector: Any) -> Iterator[int]:
    """Yield the number of classes of each head of a detector."""
    for name, child in detector.named_children():
        if name not in ("backbone", "neck"):
            for module in child.modules():
                if isinstance(count := getattr(module, "num_classes", None), int):
                    yield count
