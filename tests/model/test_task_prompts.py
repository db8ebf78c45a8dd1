"""Tasks with prompts: text around the visual prefix instead of learned task tokens, in inference and training."""

import pytest
import torch
from sca_registry import RegistryError
from sca_registry.contracts import TASKS, Batch, Prompt, PromptBatch
from sca_registry.spec import ModelSpec

from sca.checkpoints.native import save
from sca.evaluation.evaluate import evaluate
from sca.evaluation.predictions import PromptingOptions, predict_dataset
from sca.inference.automatic import caption_everything
from sca.inference.caption_job import CaptionJob
from sca.inference.engine import Engine
from sca.inference.predictor import Predictor
from sca.inference.processor import Processor
from sca.inference.text_search import index_regions
from sca.language_models.questions import encode_question
from sca.training.examples import ExampleStream, collate_examples
from sca.training.recipe import SamplingOptions

PROMPTS_BY_TASK = {
    "explain": "what is it made of?",
    "caption": "describe it in full.",
    "recognition": "name it.",
}
TEMPLATE = "<user> {image} {prompt} </user> <assistant>"
LANGUAGE_MODEL = {"name": "tiny-gpt2", "hidden_size": 32, "depth": 1, "num_heads": 2, "max_positions": 128}
REGION_PROMPTS = [Prompt(box=(4, 4, 30, 30)), Prompt(points=((40, 40, 1),)), Prompt(box=(20, 20, 60, 60))]
FIELDS = {"tasks": PROMPTS_BY_TASK, "prompt_template": TEMPLATE, "task_tokens": 0, "language_model": LANGUAGE_MODEL}


@pytest.fixture
def model(build_small_model):
    return build_small_model(**FIELDS, questions=True)


@pytest.fixture
def predictor(model, scene):
    predictor = Predictor(model)
    predictor.set_image(scene.image)
    return predictor


def test_spec_orders_tasks_with_recognition_and_caption_first(model):
    assert model.spec.task_names == ("recognition", "caption", "explain")
    assert ModelSpec.from_dict(model.spec.to_dict()) == model.spec
    assert model.task_tokens.shape == (3, 0, 32)


def test_spec_without_tasks_stays_the_same(build_small_model):
    spec = build_small_model().spec
    assert spec.task_names == TASKS
    assert not {"tasks", "prompt_template"} & spec.to_dict().keys()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": {"caption": "describe it."}}, "tasks has no prompt for recognition; add tasks.recognition"),
        ({"tasks": PROMPTS_BY_TASK | {"explain": " "}}, "tasks.explain is ' '; expected the text of a prompt"),
        ({"tasks": PROMPTS_BY_TASK | {"Explain it": "x"}}, "tasks has the name 'Explain it'; use lowercase letters"),
        ({"tasks": "caption"}, "tasks is 'caption'; expected a dict or table of options"),
        ({"task_tokens": 2}, "task_tokens is 2, but tasks with prompts have no learned tokens; set task_tokens=0"),
        ({"prompt_template": "{prompt} {image}"}, "expected a text with {image}, then {prompt}, once each"),
        ({"prompt_template": "{image}"}, "expected a text with {image}, then {prompt}, once each"),
    ],
)
def test_spec_rejects_invalid_tasks_and_templates(build_small_model, fields, message):
    with pytest.raises(RegistryError) as caught:
        build_small_model(**FIELDS | fields)
    assert message in str(caught.value)


def test_build_rejects_prompts_that_fill_the_language_model(build_small_model):
    short = LANGUAGE_MODEL | {"max_positions": 16}
    with pytest.raises(RegistryError, match=r"the prompt of the task\) fills the 16 positions"):
        build_small_model(**FIELDS | {"language_model": short})


def test_append_task_prompt_embeds_the_template_around_the_region(model):
    tokenizer = model.language_model.tokenizer
    prefix = model.build_prefix(torch.randn(2, model.mixer.num_queries, 32), torch.tensor([2, 2]))
    rows = model.append_task_prompt(prefix, "explain")
    before, after = (tokenizer.encode(text)[:-1] for text in ("<user> ", " what is it made of? </user> <assistant>"))
    embedded = [model.language_model.embed_tokens(torch.tensor(ids)) for ids in (before, after)]
    assert torch.equal(rows[1], torch.cat((embedded[0], prefix[1], embedded[1])))
    assert model.count_prefix_positions("explain") == rows.shape[1] == len(before) + len(after) + model.prefix_length


def test_predict_accepts_the_tasks_of_the_model_and_rejects_others(predictor):
    captions = {task: predictor.predict(REGION_PROMPTS, task=task) for task in predictor.model.spec.task_names}
    for task, task_captions in captions.items():
        assert [each.question for each in task_captions] == [None, None, None]
        positions = predictor.model.count_prefix_positions(task)
        assert [each.usage.prompt_tokens for each in task_captions] == [positions] * 3
    with pytest.raises(ValueError, match=r"unknown task 'explains'.*'explain'.*recognition, caption, explain"):
        predictor.predict(REGION_PROMPTS, task="explains")


def test_unknown_task_is_rejected_before_the_weights_are_read(model, tmp_path):
    save(model, tmp_path / "model")
    (tmp_path / "model" / "weights.safetensors").write_bytes(b"not read")
    name = str(tmp_path / "model")
    with pytest.raises(ValueError, match=r"unknown task 'explains'.*recognition, caption, explain"):
        CaptionJob(name, everything=True, task="explains").load_captioner()
    with pytest.raises(ValueError, match=r"unknown task 'explains'.*recognition, caption, explain"):
        evaluate(name, "scenes", max_images=1, prompting=PromptingOptions(caption_task="explains"))


def test_predict_of_a_task_equals_its_prompt_as_a_question(predictor):
    for task, text in PROMPTS_BY_TASK.items():
        captions = predictor.predict(REGION_PROMPTS, task=task)
        answers = predictor.predict(REGION_PROMPTS, question=text)
        assert [(each.text, each.score) for each in captions] == [(each.text, each.score) for each in answers]


def test_long_prefixes_are_captioned_in_small_calls(predictor, monkeypatch):
    expected = predictor.predict(REGION_PROMPTS)
    rows, generate = [], predictor.model.language_model.generate
    monkeypatch.setattr(
        predictor.model.language_model,
        "generate",
        lambda prefix, **options: rows.append(len(prefix)) or generate(prefix, **options),
    )
    monkeypatch.setattr("sca.model.MAX_POSITIONS_PER_CALL", 2 * predictor.model.count_prefix_positions())
    captions = predictor.predict(REGION_PROMPTS)
    assert rows == [2, 1]
    assert [each.text for each in captions] == [each.text for each in expected]
    assert [each.region_id for each in captions] == [0, 1, 2]


def test_generate_appends_the_prompt_of_the_task(model, scene):
    engine = Engine(model)
    encoded = engine.encode([scene.image])
    prompts = PromptBatch(torch.zeros(2, dtype=torch.long), boxes=torch.tensor([[4.0, 4, 30, 30], [20, 20, 60, 60]]))
    generated = model.generate(encoded.features, prompts, torch.tensor([2, 2]))
    regions = model.segment(encoded.features, prompts)
    prefix = model.append_task_prompt(model.build_prefix(model.mix(regions), torch.tensor([2, 2])), "explain")
    assert torch.equal(generated.sequences, model.generate_from_prefix(prefix).sequences)
    with pytest.raises(ValueError, match="the prompts have several tasks"):
        model.generate(encoded.features, prompts, torch.tensor([0, 2]))


def test_everything_and_find_use_the_prompts_of_tasks(predictor):
    options = {"points_per_side": 2, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
    captions = caption_everything(predictor, "explain", **options)
    positions = predictor.model.count_prefix_positions("explain")
    assert captions
    assert {each.usage.prompt_tokens for each in captions} == {positions}
    index = index_regions(predictor.engine, predictor.encoded, [REGION_PROMPTS])
    assert index.prefix.shape[:2] == (4, predictor.model.count_prefix_positions("caption"))
    assert predictor.find("a red circle", REGION_PROMPTS)


def test_evaluation_captions_with_a_further_task(model, scene):
    engine, tasks = Engine(model), []
    caption_batch = engine.caption_batch
    engine.caption_batch = lambda *args, **kwargs: tasks.append(args[2]) or caption_batch(*args, **kwargs)
    (batch,) = predict_dataset(engine, [scene], PromptingOptions(caption_task="explain"))
    assert set(tasks) == {"explain", "recognition"}
    assert {record["task"] for record in batch.records} == {"caption", "recognition"}


def test_evaluation_rejects_a_caption_task_without_captions():
    with pytest.raises(ValueError, match="caption_task explain has no effect on the task recognition; omit it"):
        PromptingOptions(tasks=("recognition",), caption_task="explain")


def test_model_without_a_tokenizer_requires_token_ids(model, scene):
    prefix = model.build_prefix(torch.randn(1, model.mixer.num_queries, 32), torch.tensor([1]))
    model.language_model.tokenizer = None
    with pytest.raises(ValueError, match="the language model has no tokenizer, so it reads no text"):
        model.append_task_prompt(prefix, "caption")


def test_training_computes_losses_of_captions_after_the_prompts(model, scene):
    tokenizer = model.language_model.tokenizer
    task_prompts = [model.encode_task_prompt(task) for task in model.spec.task_names]
    sampling = SamplingOptions(class_name_prob=0.5)
    stream = ExampleStream(
        [scene],
        Processor.from_encoder(model.encoder),
        tokenizer,
        sampling,
        4,
        prompt_template=TEMPLATE,
        task_prompts=task_prompts,
    )
    example = stream[0]
    prompts = [encode_question(tokenizer, PROMPTS_BY_TASK[name], TEMPLATE) for name in model.spec.task_names]
    assert example.questions == [prompts[task] for task in example.task_ids.tolist()]
    batch = collate_examples([example], tokenizer.pad_token_id)
    model.eval()
    with torch.no_grad():
        output = model(batch)
        log_probs = iter(output.logits.log_softmax(1))
        regions = model.segment(model.encode(batch.pixel_values), batch.prompts)
        queries = model.mix(regions)
        for ids, task, region in zip(
            example.input_ids, example.task_ids.tolist(), example.region_index.tolist(), strict=True
        ):
            prefix = model.build_prefix(queries[region : region + 1], torch.tensor([task]))
            prefix = model.append_task_prompt(prefix, model.spec.task_names[task])
            states = model.compute_caption_states(prefix, torch.tensor([ids]), torch.ones(1, len(ids), dtype=int))
            for expected in model.language_model.lm_head(states[0]).log_softmax(1):
                torch.testing.assert_close(next(log_probs), expected, rtol=1e-4, atol=1e-4)
    assert next(log_probs, None) is None
    assert isinstance(batch, Batch)
