"""Metrics that ask a model: with small ones that are made here, in the format of the large ones."""

import json

import numpy as np
import open_clip
import pytest
import sca_registry
import spacy
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from sca.data.scenes import Scenes
from sca.evaluation.evaluate import evaluate, score_file

KINDS = {"dog": "NOUN", "cat": "NOUN", "Rex": "PROPN", "runs": "VERB", "sits": "VERB", "a": "DET", "red": "ADJ"}


def told(*pairs):
    return [
        {"image_id": n, "region_id": n, "task": "caption", "caption": caption, "truth": {"phrases": phrases}}
        for n, (caption, phrases) in enumerate(pairs)
    ]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A spaCy pipeline that knows seven words, with vectors in which a cat is rather like a dog."""
    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("attribute_ruler")
    ruler.add_patterns([{"patterns": [[{"ORTH": word}]], "attrs": {"POS": kind}} for word, kind in KINDS.items()])
    nlp.vocab.set_vector("dog", np.array([1, 0, 0], np.float32))
    nlp.vocab.set_vector("cat", np.array([0.6, 0.8, 0], np.float32))
    nlp.vocab.set_vector("runs", np.array([0, 0, 1], np.float32))
    folder = tmp_path_factory.mktemp("spacy") / "seven-words"
    nlp.to_disk(folder)
    return str(folder)


def test_nouns_and_verbs_are_recalled_as_published_and_where_there_are_any(pipeline):
    records = told(("a red dog runs", ["a dog sits"]), ("a dog", ["a cat Rex"]), ("Rex", ["a red"]))
    nouns = sca_registry.metrics.build("noun-recall", model=pipeline)(records)
    assert nouns.per_record["noun-recall/exact"].tolist() == [1, 0, 0]
    assert nouns.values["noun-recall/exact-where-any"] == 0.5
    assert nouns.per_record["noun-recall/fuzzy"] == pytest.approx([1, 0.3, 0])  # the cat by the dog, Rex by nothing
    verbs = sca_registry.metrics.build("verb-recall", model=pipeline)(records)
    assert verbs.values["verb-recall/exact"] == 0
    assert verbs.values["verb-recall/exact-where-any"] == 0
    assert np.isnan(verbs.per_record["verb-recall/exact-where-any"]).tolist() == [False, True, True]


def test_letter_case_counts_as_in_the_published_evaluation(pipeline):
    found = sca_registry.metrics.build("noun-recall", model=pipeline)(told(("Dog", ["dog"]), ("dog", ["dog"])))
    assert found.per_record["noun-recall/exact"].tolist() == [0, 1]


def test_a_pipeline_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"no spaCy pipeline .*noun-recall\.model=FOLDER"):
        sca_registry.metrics.build("noun-recall", model=str(tmp_path / "none"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A sentence encoder of eight words."""
    folder = tmp_path_factory.mktemp("sentences")
    words = {"[UNK]": 0, "[PAD]": 1, "[CLS]": 2, "[SEP]": 3, "dog": 4, "cat": 5, "a": 6, "red": 7}
    tokenizer = Tokenizer(WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config.initializer_range = 0.5
    BertModel(config).save_pretrained(folder)
    return str(folder)


def test_meaning_is_that_of_the_closest_reference_whatever_stands_beside_it(encoder):
    metric = sca_registry.metrics.build("semantic", model=encoder, batch_size=2)
    records = told(("a dog", ["a red cat", "a dog"]), ("cat", ["dog"]), ("red", ["red"]))
    together = metric(records).per_record["semantic"]
    assert together[[0, 2]] == pytest.approx(1, abs=1e-5)
    assert together[1] < 0.999
    alone = [float(metric([record]).per_record["semantic"][0]) for record in records]
    assert together == pytest.approx(alone, abs=1e-5)
    first = sca_registry.metrics.build("semantic", model=encoder, references="first")
    assert first(records).per_record["semantic"][0] < 0.999


def test_without_an_encoder_the_reason_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"needs a sentence encoder.*semantic\.model=FOLDER"):
        sca_registry.metrics.build("semantic", model=str(tmp_path))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP of a few thousand numbers in a folder of open_clip."""
    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    model = open_clip.CLIP(
        **{**config, "vision_cfg": open_clip.CLIPVisionCfg(**vision), "text_cfg": open_clip.CLIPTextCfg(**text)}
    )
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    written = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(written))
    return f"local-dir:{folder}"


def test_the_picture_that_is_scored_is_that_of_the_region(clip):
    metric = sca_registry.metrics.build("clip-score", model=clip, batch_size=2)
    image = Image.new("RGB", (64, 64), "red")
    image.paste("blue", (0, 0, 32, 32))
    boxes = ([0, 0, 32, 32], [32, 32, 64, 64], [0.2, 0.2, 0.4, 0.4])
    records = [
        {
            "image_id": 1,
            "region_id": n,
            "task": "caption",
            "caption": "a blue square",
            "truth": {"box": box, "phrases": []},
        }
        for n, box in enumerate(boxes)
    ]
    values = metric(records, lambda record: image).per_record["clip-score"]
    assert values.shape == (3,)
    assert (values >= 0).all()
    blue = metric(records[:1], lambda record: Image.new("RGB", (64, 64), "blue")).per_record["clip-score"]
    assert values[0] == pytest.approx(blue[0], abs=1e-5)


def test_pictures_are_found_again_when_a_file_is_scored(clip, teller, tmp_path):
    dataset = Scenes("val", num_images=2)
    evaluate(teller(dataset), {"name": "scenes", "num_images": 2}, folder=tmp_path, metrics=["class"])
    report = score_file(tmp_path, ["clip-score"], {"clip-score.model": clip})
    assert 0 <= report.scores["clip-score"] <= 2.5


@pytest.mark.slow
def test_metrics_without_what_they_need_are_left_out_with_the_way_to_it(teller):
    dataset = Scenes("val", num_images=1)
    left_out = evaluate(teller(dataset), dataset).skipped_metrics
    assert "clip-score.pretrained=openai" in left_out["clip-score"]
    assert "spice.jars=FOLDER" in left_out["spice"]
