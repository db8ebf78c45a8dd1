"""Model-based metrics, with small models built here in the format of the published ones."""

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

PARTS_OF_SPEECH = {
    "dog": "NOUN",
    "cat": "NOUN",
    "Rex": "PROPN",
    "runs": "VERB",
    "sits": "VERB",
    "a": "DET",
    "red": "ADJ",
}


def make_records(*pairs):
    return [
        {"image_id": n, "region_id": n, "task": "caption", "caption": caption, "truth": {"phrases": phrases}}
        for n, (caption, phrases) in enumerate(pairs)
    ]


@pytest.fixture(scope="module")
def spacy_pipeline(tmp_path_factory):
    """Build a spaCy pipeline with seven words, whose vectors of "cat" and "dog" are similar."""
    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("attribute_ruler")
    ruler.add_patterns(
        [
            {"patterns": [[{"ORTH": word}]], "attrs": {"POS": part_of_speech}}
            for word, part_of_speech in PARTS_OF_SPEECH.items()
        ]
    )
    nlp.vocab.set_vector("dog", np.array([1, 0, 0], np.float32))
    nlp.vocab.set_vector("cat", np.array([0.6, 0.8, 0], np.float32))
    nlp.vocab.set_vector("runs", np.array([0, 0, 1], np.float32))
    folder = tmp_path_factory.mktemp("spacy") / "seven-words"
    nlp.to_disk(folder)
    return str(folder)


def test_noun_and_verb_recall_match_published_definition(spacy_pipeline):
    records = make_records(("a red dog runs", ["a dog sits"]), ("a dog", ["a cat Rex"]), ("Rex", ["a red"]))
    noun_recall = sca_registry.metrics.build("noun-recall", model=spacy_pipeline)(records)
    assert noun_recall.per_record["noun-recall/exact"].tolist() == [1, 0, 0]
    assert noun_recall.values["noun-recall/exact-nonempty"] == 0.5
    assert noun_recall.per_record["noun-recall/fuzzy"] == pytest.approx(
        [1, 0.3, 0]
    )  # "cat" matches "dog", "Rex" matches nothing
    verb_recall = sca_registry.metrics.build("verb-recall", model=spacy_pipeline)(records)
    assert verb_recall.values["verb-recall/exact"] == 0
    assert verb_recall.values["verb-recall/exact-nonempty"] == 0
    assert np.isnan(verb_recall.per_record["verb-recall/exact-nonempty"]).tolist() == [False, True, True]


def test_noun_recall_is_case_sensitive_as_published(spacy_pipeline):
    output = sca_registry.metrics.build("noun-recall", model=spacy_pipeline)(
        make_records(("Dog", ["dog"]), ("dog", ["dog"]))
    )
    assert output.per_record["noun-recall/exact"].tolist() == [0, 1]


def test_noun_recall_reports_missing_pipeline(tmp_path):
    with pytest.raises(ValueError, match=r"no spaCy pipeline .*noun-recall\.model=FOLDER"):
        sca_registry.metrics.build("noun-recall", model=str(tmp_path / "none"))


@pytest.fixture(scope="module")
def sentence_encoder(tmp_path_factory):
    """Build a sentence encoder with eight words."""
    folder = tmp_path_factory.mktemp("sentences")
    vocabulary = {"[UNK]": 0, "[PAD]": 1, "[CLS]": 2, "[SEP]": 3, "dog": 4, "cat": 5, "a": 6, "red": 7}
    tokenizer = Tokenizer(WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config.initializer_range = 0.5
    BertModel(config).save_pretrained(folder)
    return str(folder)


def test_semantic_uses_closest_reference_regardless_of_batch(sentence_encoder):
    metric = sca_registry.metrics.build("semantic", model=sentence_encoder, batch_size=2)
    records = make_records(("a dog", ["a red cat", "a dog"]), ("cat", ["dog"]), ("red", ["red"]))
    batched_scores = metric(records).per_record["semantic"]
    assert batched_scores[[0, 2]] == pytest.approx(1, abs=1e-5)
    assert batched_scores[1] < 0.999
    single_scores = [float(metric([record]).per_record["semantic"][0]) for record in records]
    assert batched_scores == pytest.approx(single_scores, abs=1e-5)
    first_reference_metric = sca_registry.metrics.build("semantic", model=sentence_encoder, references="first")
    assert first_reference_metric(records).per_record["semantic"][0] < 0.999


def test_semantic_reports_missing_encoder(tmp_path):
    with pytest.raises(ValueError, match=r"needs a sentence encoder.*semantic\.model=FOLDER"):
        sca_registry.metrics.build("semantic", model=str(tmp_path))


def make_name_records(*pairs):
    return [
        {"image_id": n, "region_id": n, "task": "recognition", "caption": caption, "truth": {"name": name}}
        for n, (caption, name) in enumerate(pairs)
    ]


def test_name_iou_matches_the_definition_of_osprey():
    pairs = [
        ("Car wheel.", "car_wheel"),
        ("a dog", "dog"),
        ("answer: cat, sitting", "cat"),
        ("", "dog"),
        ("car", "car:wheel"),
    ]
    values = sca_registry.metrics.build("name-iou")(make_name_records(*pairs)).per_record["name-iou"]
    assert values.tolist() == [1, 0.5, 0.5, 0, 0.5]


def test_name_similarity_compares_names_without_punctuation(sentence_encoder):
    metric = sca_registry.metrics.build("name-similarity", model=sentence_encoder, batch_size=2)
    records = make_name_records(("red dog.", "red_dog"), ("name: cat", "cat"), ("dog", "red cat"))
    values = metric(records).per_record["name-similarity"]
    assert values[:2] == pytest.approx([1, 1], abs=1e-5)
    assert values[2] < 0.999
    with pytest.raises(ValueError, match=r"needs a sentence encoder.*name-similarity\.model=FOLDER"):
        sca_registry.metrics.build("name-similarity", model="nowhere")


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory):
    """Write a CLIP with a few thousand parameters to a folder in the format of open_clip."""
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
    open_clip_config = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config))
    return f"local-dir:{folder}"


def test_clip_score_uses_the_crop_of_the_region(clip_model):
    metric = sca_registry.metrics.build("clip-score", model=clip_model, batch_size=2)
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
    expected = metric(records[:1], lambda record: Image.new("RGB", (64, 64), "blue")).per_record["clip-score"]
    assert values[0] == pytest.approx(expected[0], abs=1e-5)


def test_clip_score_reloads_images_of_predictions_file(clip_model, make_oracle_captioner, tmp_path):
    dataset = Scenes("val", num_images=2)
    evaluate(make_oracle_captioner(dataset), {"name": "scenes", "num_images": 2}, folder=tmp_path, metrics=["class"])
    report = score_file(tmp_path, ["clip-score"], {"clip-score.model": clip_model})
    assert 0 <= report.scores["clip-score"] <= 2.5


@pytest.mark.parametrize("batch_size", [0, -1])
@pytest.mark.parametrize(
    "name", ["clip-score", "judge", "judged-answers", "name-similarity", "noun-recall", "semantic"]
)
def test_metrics_reject_batch_sizes_below_1(name, batch_size):
    options = {"model": "tiny-gpt2"} if name.startswith("judge") else {}
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}; expected an integer of at least 1"):
        sca_registry.metrics.build(name, batch_size=batch_size, **options)


@pytest.mark.slow
def test_evaluate_reports_missing_options_of_skipped_metrics(make_oracle_captioner):
    dataset = Scenes("val", num_images=1)
    skipped_metrics = evaluate(make_oracle_captioner(dataset), dataset).skipped_metrics
    assert "clip-score.pretrained=openai" in skipped_metrics["clip-score"]
    assert "spice.jars=FOLDER" in skipped_metrics["spice"]
