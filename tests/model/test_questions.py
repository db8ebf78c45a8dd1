"""Questions after the prefix: token ids, references to regions, losses of answers only, and answers."""

import pytest
import torch
from PIL import Image
from sca_registry.contracts import Batch, Prompt, PromptBatch, Question, Region, Sample, list_region_references
from torch.nn import functional as F

from sca.inference.automatic import caption_everything
from sca.inference.engine import Engine, RegionQuestion
from sca.inference.generation_options import resolve_generation_options
from sca.inference.predictor import Predictor
from sca.inference.processor import Processor
from sca.language_models.causal import TextTokenizer
from sca.language_models.plain_tokenizer import PlainTokenizer
from sca.language_models.questions import LENGTH_REQUESTS, encode_question, expand_references
from sca.language_models.tiny_gpt2 import TinyGpt2
from sca.model import LABEL_SMOOTHING
from sca.training.augmentation import Augmentation
from sca.training.examples import ExampleStream, collate_examples
from sca.training.recipe import SamplingOptions
from sca.training.trainer import count_loss_terms

CHAT_TEMPLATE = (
    "{% for message in messages %}<user> {{ message.content }} </user> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPTS = [Prompt(box=(4, 4, 30, 30)), Prompt(points=((40, 40, 1),)), Prompt(box=(20, 20, 60, 60))]
REGIONS = tuple(Region(index, (8.0 * index, 4, 8.0 * index + 20, 40), name="star") for index in range(3))
SAMPLE = Sample(
    Image.new("RGB", (64, 64), (200, 40, 40)),
    0,
    REGIONS,
    (
        Question("what color is it?", "red", (1,), "color"),
        Question("is <region 2> left of <region 1>?", "yes", (0, 2), "relation"),
    ),
)
SAMPLING = SamplingOptions(question_prob=0.7, captions_per_region=3, class_name_prob=1.0)


@pytest.fixture
def tokenizer():
    return TextTokenizer(TinyGpt2(hidden_size=8, depth=1, num_heads=1).tokenizer.to_transformers())


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(params=["plain", "geometry", "chat"])
def model(request, build_small_model):
    """Model that answers questions, also with a geometry token or with a chat template."""
    geometry = "token" if request.param == "geometry" else None
    model = build_small_model(questions=True, geometry=geometry, language_model=LANGUAGE_MODEL)
    if request.param == "chat":
        model.language_model.tokenizer = TextTokenizer(model.language_model.tokenizer.to_transformers())
        model.language_model.tokenizer.tokenizer.chat_template = CHAT_TEMPLATE
    return model


LANGUAGE_MODEL = {"name": "tiny-gpt2", "hidden_size": 32, "depth": 1, "num_heads": 2, "max_positions": 96}


def test_encode_question_keeps_the_text_and_marks_regions(tokenizer):
    question = encode_question(tokenizer, " is  <region 2> left of <region 1>? ")
    assert question.before == []
    assert question.regions == [2, 1]
    tokens = tokenizer.encode("is")[:-1]
    assert question.after[: len(tokens)] == tokens
    assert question.after[len(tokens)] == -2
    assert list_region_references("what is <region 3> to <region 1> and <region 3>?") == [3, 1]
    assert expand_references([5, -2, 6], 3) == ([5, 0, 0, 0, 6], [None, (2, 0), (2, 1), (2, 2), None])


def test_encode_question_uses_the_chat_template(chat_tokenizer):
    question = encode_question(chat_tokenizer, "what is <region 1>?")
    assert chat_tokenizer.decode(question.before) == "<user>"
    text = chat_tokenizer.decode([token if token >= 0 else chat_tokenizer.encode("X")[-2] for token in question.after])
    assert text.replace(" ", "") == "whatisX?</user><assistant>"


def test_encode_question_uses_any_tokenizer_of_the_contract():
    class Tokenizer:
        def encode(self, text, max_length=None):
            return [len(word) for word in text.split()] + [0]

    assert encode_question(Tokenizer(), "what is <region 1>?") == ([], [4, 2, -1, 1])


@pytest.mark.parametrize(("question", "message"), [(" ", "the question is empty"), ("is <region 0> red?", "from 1")])
def test_encode_question_rejects(tokenizer, question, message):
    with pytest.raises(ValueError, match=message):
        encode_question(tokenizer, question)


@pytest.mark.parametrize(
    "text", ["is <region  2> red?", "is <region\n2> red?", "is <Region 2 > red?", "is <region2> red?"]
)
def test_reference_with_other_spacing_is_that_of_the_same_region(model, text):
    engine = Engine(model)
    encoded = engine.encode([SAMPLE.image])
    (expected,) = engine.caption_batch(encoded, [PROMPTS], question="is <region 2> red?")[0]
    (answer,) = engine.caption_batch(encoded, [PROMPTS], question=text)[0]
    assert (answer.text, answer.score, answer.region_id) == (expected.text, expected.score, 1)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("is <region one> red?", "contains '<region one>'; refer to regions as <region 1>"),
        ("is <region -1> red?", "contains '<region -1>'"),
        ("is <region 1234567890> red?", "contains '<region 1234567890>'"),
        ("is <region 123456789> red?", "refers to <region 123456789>, but the image has 3 regions"),
        ("red \ud83d?", r"the question contains '\\ud83d', half of a surrogate pair"),
        ("red?<|end|>", r"contains the special token '<\|end\|>' of the language model; remove it"),
    ],
)
def test_predictor_rejects_questions_with_malformed_references_and_special_tokens(model, question, message):
    predictor = Predictor(model)
    predictor.set_image(SAMPLE.image)
    with pytest.raises(ValueError, match=message):
        predictor.predict(PROMPTS, question=question)
    assert predictor.predict(PROMPTS, question="<regional> {prompt} {{ 1 }} <visual prefix> \u00e9\U0001f600 ١?")


def embed_ids(model, ids):
    return model.language_model.embed_tokens(torch.tensor(ids, dtype=torch.long))


def test_append_question_inserts_the_embeddings_of_regions(model):
    prefix = torch.randn(3, model.prefix_length, 32)
    tokenizer = model.language_model.tokenizer
    question = encode_question(tokenizer, "what color is it?")
    rows = model.append_question(prefix, question)
    expected = torch.cat((embed_ids(model, question.before), prefix[1], embed_ids(model, question.after)))
    assert torch.equal(rows[1], expected)
    question = encode_question(tokenizer, "is <region 3> left of <region 1>?")
    (row,) = model.append_question(prefix, question)
    start = len(question.before) + model.prefix_length
    assert torch.equal(row[len(question.before) : start], prefix[2])
    first, second = question.after.index(-3), question.after.index(-1)
    size = model.prefix_length - model.spec.task_tokens
    assert torch.equal(row[start + first : start + first + size], prefix[2, 2:])
    second += start + size - 1
    assert torch.equal(row[second : second + size], prefix[0, 2:])
    with pytest.raises(ValueError, match=r"refers to <region 4>, but the image has 3 regions"):
        model.append_question(prefix, encode_question(tokenizer, "what is <region 4>?"))


def make_batch(model, position=0, sampling=SAMPLING, sample=SAMPLE, **options):
    tokenizer = model.language_model.tokenizer
    stream = ExampleStream([sample], Processor.from_encoder(model.encoder), tokenizer, sampling, 100, **options)
    size = model.prefix_length - model.spec.task_tokens
    examples = [stream[position], stream[position + 1]]
    return collate_examples(examples, tokenizer.pad_token_id, 0, size), examples


@pytest.mark.parametrize("chunk_size", [0, 2])
def test_loss_of_answers_equals_that_of_each_text_alone(model, chunk_size):
    batch, examples = make_batch(model)
    questions = [question for example in examples for question in example.questions]
    assert {bool(question and question.regions) for question in questions if question} == {True, False}
    assert None in questions
    output = model(batch, chunk_size=chunk_size)
    prefix = model.build_prefix(
        output.queries, torch.zeros(6, dtype=torch.long), model.compute_geometry(output.regions, batch.prompts)
    )
    losses = []
    row = 0
    for first_region, example in zip((0, 3), examples, strict=True):
        for ids, question, region, task in zip(
            example.input_ids, example.questions, example.region_index, example.task_ids, strict=True
        ):
            image_prefix = prefix[first_region : first_region + 3].clone()
            image_prefix[:, : model.spec.task_tokens] = model.task_tokens[task]
            if question is None:
                text_prefix = image_prefix[region : region + 1]
            else:
                rows = slice(None) if question.regions else slice(region, region + 1)
                text_prefix = model.append_question(image_prefix[rows], question)
            tokens = torch.tensor([ids])
            states = model.compute_caption_states(text_prefix, tokens, torch.ones_like(tokens))[0]
            logits = model.language_model.lm_head(states)
            losses.append(F.cross_entropy(logits, tokens[0], label_smoothing=LABEL_SMOOTHING, reduction="none"))
            row += 1
    expected = torch.cat(losses)
    torch.testing.assert_close(output.losses["caption"], expected.mean())
    assert count_loss_terms(batch)["caption"] == len(expected)
    assert row == len(batch.input_ids)
    output.losses["caption"].backward()
    assert all(p.grad is not None for p in model.projection.parameters())


def test_batch_without_questions_is_unchanged(build_small_model):
    model = build_small_model(questions=True, language_model=LANGUAGE_MODEL)
    batch, examples = make_batch(model, sampling=SamplingOptions(class_name_prob=1.0))
    assert batch.questions is None
    with_unused_questions, _ = make_batch(model, sampling=SamplingOptions(class_name_prob=1.0), sample=SAMPLE)
    without_questions, _ = make_batch(
        model, sampling=SamplingOptions(class_name_prob=1.0, question_prob=0.5), sample=SAMPLE._replace(questions=())
    )
    assert torch.equal(with_unused_questions.input_ids, without_questions.input_ids)
    assert all(question is None for example in examples for question in example.questions)


def test_questions_about_dropped_regions_are_dropped(build_small_model):
    model = build_small_model(questions=True, language_model=LANGUAGE_MODEL)
    for position in range(20):
        _, (example, _) = make_batch(model, position)
        kept = example.select_first_regions(2)
        assert all(max(question.regions, default=0) <= 2 for question in kept.questions if question)
        assert len(kept.questions) == len(kept.input_ids) == len(kept.region_index) == len(kept.task_ids)


def test_augmentation_mirrors_questions_and_drops_those_about_lost_regions():
    import numpy as np

    flipped = Augmentation(flip_prob=1.0)(SAMPLE, np.random.default_rng(0))
    assert flipped.questions[1].text == "is <region 2> right of <region 1>?"
    dropped = Augmentation(flip_prob=1.0, side_words="drop")(SAMPLE, np.random.default_rng(0))
    assert [question.kind for question in dropped.questions] == ["color"]
    cropped = [
        Augmentation(flip_prob=0.0, min_crop_fraction=0.3, min_visibility=0.9)(SAMPLE, np.random.default_rng(seed))
        for seed in range(20)
    ]
    for sample in cropped:
        ids = {region.id for region in sample.regions}
        assert all(ids.issuperset(question.region_ids) for question in sample.questions)
    assert {len(sample.questions) for sample in cropped} > {0, 2}


def test_predictor_answers_each_region_or_all_of_them_once(model):
    predictor = Predictor(model)
    predictor.set_image(SAMPLE.image)
    captions = predictor.predict(PROMPTS, question="what color is it?")
    assert [caption.region_id for caption in captions] == [0, 1, 2]
    alone = predictor.predict(PROMPTS[1:2], question="what color is it?")[0]
    assert (alone.text, alone.mask) == (captions[1].text, captions[1].mask)
    (answer,) = predictor.predict(PROMPTS, question="is <region 2> left of <region 1>?")
    assert (answer.region_id, answer.prompt) == (1, PROMPTS[1])
    assert answer.usage.prompt_tokens > predictor.predict(PROMPTS)[1].usage.prompt_tokens
    batch = predictor.predict_batch(
        [SAMPLE.image] * 3, [PROMPTS, [], PROMPTS[:2]], question="is <region 2> left of <region 1>?"
    )
    assert [len(each) for each in batch] == [1, 0, 1]
    assert batch[0][0].text == answer.text
    with pytest.raises(ValueError, match="refers to <region 2>, but the image has 1 region"):
        predictor.predict(PROMPTS[:1], question="is <region 2> left of <region 1>?")
    with pytest.raises(ValueError, match="regions of everything mode have no numbers"):
        caption_everything(predictor, points_per_side=2, question="is <region 2> red?")


def test_answer_batch_answers_many_questions_in_order(model):
    engine = Engine(model)
    encoded = engine.encode([SAMPLE.image, SAMPLE.image])
    questions = [[RegionQuestion("what is it?", 2), RegionQuestion("is <region 1> red?", 0)], []]
    answers = engine.answer_batch(encoded, [PROMPTS, PROMPTS[:1]], questions)
    assert [[answer.region_id for answer in each] for each in answers] == [[2, 0], []]
    alone = engine.caption_batch(encoded, [PROMPTS, []], question="what is it?")[0][2]
    assert answers[0][0].text == alone.text


def test_captions_of_a_requested_length_are_trained_and_requested_by_the_same_question(build_small_model):
    model = build_small_model(lengths=True, language_model=LANGUAGE_MODEL)
    region = Region(0, (8.0, 4, 40, 40), name="star", phrases=("a red star", "a small dotted red star", "x " * 9))
    batch, (example, _) = make_batch(
        model,
        sampling=SamplingOptions(length_prob=1.0, captions_per_region=20, class_name_prob=0.2),
        sample=Sample(SAMPLE.image, 0, (region,)),
    )
    assert batch.questions is not None
    tokenizer = model.language_model.tokenizer
    pairs = {
        (tokenizer.decode(question.after), tokenizer.decode(ids).strip())
        for question, ids in zip(example.questions, example.input_ids, strict=True)
    }
    assert pairs == {
        (LENGTH_REQUESTS["short"], "star"),
        (LENGTH_REQUESTS["short"], "a red star"),
        (LENGTH_REQUESTS["phrase"], "a small dotted red star"),
        (LENGTH_REQUESTS["full"], "x x x x x x x x x"),
    }
    predictor = Predictor(model)
    predictor.set_image(SAMPLE.image)
    (caption,) = predictor.predict(PROMPTS[:1], length="phrase")
    expected = Engine(model).caption_batch(predictor.encoded, [PROMPTS[:1]], question=LENGTH_REQUESTS["phrase"])[0][0]
    assert caption == expected
    assert caption.question == LENGTH_REQUESTS["phrase"]
    options = resolve_generation_options(predictor.engine, length="short")
    assert resolve_generation_options(predictor.engine, **options) == options
    assert caption_everything(predictor, points_per_side=1, pred_iou_thresh=0, stability_score_thresh=0, **options)
    for arguments, message in (
        ({"length": "long"}, "length is 'long'"),
        ({"length": "short", "question": "what is it?"}, "does not support questions"),
    ):
        with pytest.raises(ValueError, match=message):
            predictor.predict(PROMPTS[:1], **arguments)
    predictor = Predictor(build_small_model(questions=True, language_model=LANGUAGE_MODEL))
    predictor.set_image(SAMPLE.image)
    with pytest.raises(ValueError, match="length and question are mutually exclusive"):
        predictor.predict(PROMPTS[:1], length="short", question="what is it?")
    with pytest.raises(ValueError, match="does not support a length"):
        predictor.predict(PROMPTS[:1], length="short")


def test_models_that_answer_no_questions_refuse_them(build_small_model):
    predictor = Predictor(build_small_model())
    predictor.set_image(SAMPLE.image)
    with pytest.raises(ValueError, match="this captioner does not support questions"):
        predictor.predict(PROMPTS, question="what color is it?")
    predictor = Predictor(build_small_model(questions=True))
    predictor.set_image(SAMPLE.image)
    with pytest.raises(ValueError, match="question is 3"):
        predictor.predict(PROMPTS, question=3)
    assert isinstance(predictor.model.language_model.tokenizer, PlainTokenizer)
    assert isinstance(Batch(PromptBatch(torch.zeros(1)), torch.zeros(1)).questions, type(None))


def test_loss_of_answers_is_computed_in_lower_precision(model):
    batch, _ = make_batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch)
    assert output.losses["caption"].isfinite()
    output.losses["caption"].backward()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system turn') }}", "the chat template of the tokenizer fails with TemplateError"),
        ("hello", "does not contain the text of the user"),
        (
            "{% for message in messages %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endfor %}",
            "does not contain the text of the user",
        ),
    ],
)
def test_chat_template_that_fails_or_omits_the_question_is_rejected_in_one_line(tokenizer, template, message):
    tokenizer.tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        encode_question(tokenizer, "what is it?")


def test_long_questions_are_rejected_before_generation_and_before_training(model, tmp_path):
    question = "what color is it? " * 40
    predictor = Predictor(model)
    predictor.set_image(SAMPLE.image)
    with pytest.raises(ValueError, match="but the language model reads at most 95; shorten the question"):
        predictor.predict(PROMPTS, question=question)
    with pytest.raises(ValueError, match="shorten the question"):
        Engine(model).answer_batch(predictor.encoded, [PROMPTS], [[RegionQuestion(question, 0)]])


def test_questions_are_captions_only(model):
    engine = Engine(model)
    encoded = engine.encode([SAMPLE.image])
    with pytest.raises(ValueError, match="the task recognition cannot be combined with a question or a length"):
        engine.caption_batch(encoded, [PROMPTS], "recognition", question="what is it?")
    with pytest.raises(ValueError, match="is about region 4, but the image has 3 regions"):
        engine.answer_batch(encoded, [PROMPTS], [[RegionQuestion("what is it?", 3)]])


@pytest.mark.parametrize(
    "fields",
    [
        {"text": " "},
        {"answer": ""},
        {"region_ids": ()},
        {"text": "is it <region 3>?"},
        {"text": "is it <region 0>?"},
    ],
)
def test_question_of_a_dataset_is_checked(fields):
    with pytest.raises(ValueError, match=r"question"):
        Question(**{"text": "is it <region 2>?", "answer": "no", "region_ids": (1, 2), **fields})
