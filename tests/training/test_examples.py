"""Training examples depend only on the seed and the position in the stream."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image
from sca_registry.contracts import CAPTION_TASK_ID, RECOGNITION_TASK_ID, ImageFormat, Question, Region, Sample

from sca.data.scenes import COLORS, Scenes
from sca.inference.processor import Processor
from sca.io.masks import decode_rle
from sca.language_models.tiny_gpt2 import TinyGpt2
from sca.training.augmentation import Augmentation
from sca.training.auxiliary_losses import AttributeValues
from sca.training.examples import Example, ExampleMixture, ExampleStream, collate_examples
from sca.training.module import TrainingModule
from sca.training.recipe import SamplingOptions
from sca.training.trainer import count_loss_terms


@pytest.fixture(scope="module")
def tokenizer():
    return TinyGpt2(hidden_size=8, depth=1, num_heads=1).tokenizer


@pytest.fixture
def make_stream(tokenizer):
    def make(sampling=None, length=40, seed=0, dataset=None, **options):
        dataset = dataset if dataset is not None else Scenes("train", num_images=8, image_size=64)
        processor = Processor(ImageFormat(size=64), 8)
        return ExampleStream(dataset, processor, tokenizer, sampling or SamplingOptions(), length, seed, **options)

    return make


def are_examples_equal(first, second):
    values = [(getattr(first, field.name), getattr(second, field.name)) for field in fields(Example)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else str(a) == str(b) for a, b in values)


MIXED_SAMPLING = SamplingOptions(
    prompt_weights={"box": 0.5, "point": 0.5}, class_name_prob=0.5, longest_caption_prob=0.5, box_jitter=0.1
)


def test_example_stream_depends_only_on_seed_and_index(make_stream):
    first_stream, second_stream = (
        make_stream(MIXED_SAMPLING, augment=Augmentation(min_crop_fraction=0.8)),
        make_stream(MIXED_SAMPLING, augment=Augmentation(min_crop_fraction=0.8)),
    )
    in_order = [first_stream[index] for index in range(20)]
    np.random.seed(9)
    torch.manual_seed(9)
    in_reverse = [second_stream[index] for index in reversed(range(20))][::-1]
    assert all(map(are_examples_equal, in_order, in_reverse))
    assert not are_examples_equal(
        first_stream[3], make_stream(MIXED_SAMPLING, seed=1, augment=Augmentation(min_crop_fraction=0.8))[3]
    )


def test_example_stream_visits_each_image_once_per_epoch_in_new_order(make_stream):
    examples = make_stream(length=24)
    epochs = [[examples[index].pixel_values.numpy().tobytes() for index in range(8 * n, 8 * n + 8)] for n in range(3)]
    assert [len(set(epoch)) for epoch in epochs] == [8, 8, 8]
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]


def test_example_stream_row_fields_belong_to_the_same_region(make_stream, tokenizer):
    """Check that each row's phrase belongs to the region of its box and that its point is inside that region."""
    dataset = Scenes("train", num_images=8, image_size=64)
    samples_by_pixels = {
        Processor(ImageFormat(size=64), 8).preprocess_images([sample.image]).numpy().tobytes(): sample
        for sample in dataset
    }
    examples = make_stream(SamplingOptions(class_name_prob=0.3), dataset=dataset)
    for index in range(16):
        example = examples[index]
        sample = samples_by_pixels[example.pixel_values[None].numpy().tobytes()]
        regions_by_box = {region.box: region for region in sample.regions}
        assert sorted(map(tuple, example.boxes.tolist())) == sorted(regions_by_box)
        for row, box in enumerate(example.boxes.tolist()):
            region = regions_by_box[tuple(box)]
            text = tokenizer.decode(example.input_ids[row])
            assert text == region.name if example.task_ids[row] == RECOGNITION_TASK_ID else text in region.phrases
            x, y = map(int, example.points[row, 0].tolist())
            assert decode_rle(region.mask)[y, x]
            covered_area = example.masks[row].sum() * (64 / example.masks.shape[-1]) ** 2
            assert covered_area == pytest.approx(decode_rle(region.mask).sum(), rel=0.02)


def test_example_stream_warms_up_with_class_names_then_short_captions(make_stream, tokenizer):
    examples = make_stream(
        SamplingOptions(class_name_warmup=0.25, short_caption_warmup=0.25, longest_caption_prob=1.0), length=40
    )
    for index in range(40):
        for token_ids, task in zip(examples[index].input_ids, examples[index].task_ids.tolist(), strict=True):
            text = tokenizer.decode(token_ids)
            if index < 10:
                assert task == RECOGNITION_TASK_ID
                assert " " not in text
            else:
                assert task == CAPTION_TASK_ID
                assert index >= 20 or " of " not in text
    late_texts = [tokenizer.decode(token_ids) for index in range(20, 40) for token_ids in examples[index].input_ids]
    assert sum(any(word in text for word in (" of ", "above", "below")) for text in late_texts) > len(late_texts) / 2


def test_example_stream_draws_distinct_captions_per_region(make_stream, tokenizer):
    dataset = Scenes("train", num_images=8, image_size=64)
    examples = [
        make_stream(SamplingOptions(captions_per_region=9, class_name_prob=0.3), dataset=dataset)[index]
        for index in range(8)
    ]
    for example in examples:
        texts = [
            (index, tokenizer.decode(ids))
            for index, ids in zip(example.region_index.tolist(), example.input_ids, strict=True)
        ]
        assert len(set(texts)) == len(texts) > len(example.boxes)
        assert [index for index, _ in texts] == sorted(index for index, _ in texts)
        assert set(example.region_index.tolist()) == set(range(len(example.boxes)))
    batch = collate_examples(examples, tokenizer.pad_token_id)
    assert batch.region_index.tolist() == sorted(batch.region_index.tolist())
    texts_by_row = {row: set() for row in range(len(batch.prompts))}
    for row, ids, mask in zip(batch.region_index.tolist(), batch.input_ids, batch.attention_mask, strict=True):
        texts_by_row[row].add(tokenizer.decode(ids[mask == 1].tolist()))
    allowed_texts_by_box = {
        tuple(region.box): {region.name, *region.phrases} for sample in dataset for region in sample.regions
    }
    assert all(
        texts_by_row[row] <= allowed_texts_by_box[tuple(box)] for row, box in enumerate(batch.prompts.boxes.tolist())
    )


@pytest.mark.slow
def test_example_stream_keeps_task_and_prompt_shares(make_stream):
    examples = [make_stream(MIXED_SAMPLING, length=300)[index] for index in range(300)]
    tasks = torch.cat([example.task_ids for example in examples]).float()
    assert 0.44 < tasks.mean() < 0.56
    mixture = ExampleMixture(
        [make_stream(MIXED_SAMPLING, length=2400)],
        [1.0],
        2400,
        prompt_weights=MIXED_SAMPLING.prompt_weights,
        examples_per_step=8,
    )
    prompt_kinds = [str(kind) for kind in mixture._prompt_kinds]
    assert len(prompt_kinds) == 300
    assert 0.4 < np.mean([kind == "box" for kind in prompt_kinds]) < 0.6
    assert [mixture[index].prompt_kind for index in (8, 11, 15, 16)] == [*[prompt_kinds[1]] * 3, prompt_kinds[2]]


def test_box_jitter_moves_boxes_within_the_image(make_stream):
    unjittered, jittered = (
        make_stream(SamplingOptions(box_jitter=0.0))[0],
        make_stream(SamplingOptions(box_jitter=0.2))[0],
    )
    side_lengths = (unjittered.boxes[:, 2:] - unjittered.boxes[:, :2]).repeat(1, 2)
    relative_shifts = (jittered.boxes - unjittered.boxes).abs() / side_lengths
    assert (relative_shifts <= 0.4 + 1e-4).all()
    assert relative_shifts.any()
    assert (jittered.boxes >= 0).all()
    assert (jittered.boxes <= 64).all()


def test_example_stream_limits_regions_and_tokens(make_stream, tokenizer):
    for index in range(10):
        example = make_stream(SamplingOptions(max_regions=2, max_tokens=4))[index]
        assert len(example.input_ids) == 2 == len(example.boxes) == len(example.masks)
        assert all(len(token_ids) <= 4 and token_ids[-1] == tokenizer.eos_token_id for token_ids in example.input_ids)


def test_example_stream_labels_attributes_by_list_index(make_stream):
    dataset = Scenes("train", num_images=8, image_size=64)
    example = make_stream(dataset=dataset, attributes={"color": COLORS, "name": ("square",), "mood": ("sad",)})[0]
    assert ((example.labels["color"] >= 0) & (example.labels["color"] < len(COLORS))).all()
    assert set(example.labels["name"].tolist()) <= {0, -100}
    assert set(example.labels["mood"].tolist()) == {-100}


def test_example_stream_region_without_mask_gets_point_in_box_and_no_mask_target(make_stream):
    box = (10.0, 20.0, 30.0, 25.0)
    sample = Sample(Image.new("RGB", (64, 64)), 1, (Region(1, box, None, "car"), Region(2, (0, 0, 9, 9))))
    example = make_stream(dataset=[sample])[0]
    assert len(example.input_ids) == 1  # one has no caption
    assert not example.has_mask.any()
    (x, y) = example.points[0, 0].tolist()
    assert 10 <= x <= 30
    assert 20 <= y <= 25


def test_example_mixture_draws_streams_in_proportion_and_in_order(make_stream):
    first = make_stream(length=750, dataset=Scenes("train", num_images=8, image_size=64))
    second = make_stream(length=250, dataset=Scenes("val", num_images=8, image_size=64))
    mixture = ExampleMixture([first, second], [3, 1], 1000, seed=4)
    same_seed_mixture = ExampleMixture([first, second], [3, 1], 1000, seed=4)
    assert len(mixture) == 1000
    assert (mixture._stream_indices == same_seed_mixture._stream_indices).all()
    assert 0.7 < (mixture._stream_indices == 0).mean() < 0.8
    index = int(np.flatnonzero(mixture._stream_indices == 1)[5])
    assert are_examples_equal(mixture[index], second[5])
    assert (ExampleMixture([first, second], [3, 1], 1000, seed=5)._stream_indices != mixture._stream_indices).any()


def test_collate_examples_stacks_regions_and_records_their_image(make_stream, tokenizer):
    sample_without_regions = Sample(Image.new("RGB", (64, 40)), 7, ())
    examples = [make_stream()[0], make_stream(dataset=[sample_without_regions])[0], make_stream()[1]]
    batch = collate_examples(examples, tokenizer.pad_token_id)
    counts = [len(example.boxes) for example in examples]
    assert batch.region_index.tolist() == list(range(sum(counts)))
    assert counts[1] == 0
    num_rows = sum(counts)
    assert batch.pixel_values.shape == (3, 3, 64, 64)
    assert batch.prompts.image_index.tolist() == [0] * counts[0] + [2] * counts[2]
    assert torch.equal(batch.prompts.boxes, torch.cat([example.boxes for example in examples]))
    assert batch.prompts.points is None
    assert batch.targets.masks.shape == batch.targets.valid_pixels.shape == (num_rows, 32, 32)
    assert len(batch.task_ids) == len(batch.targets.has_mask) == num_rows
    token_ids = [ids for example in examples for ids in example.input_ids]
    max_length = max(map(len, token_ids))
    for row, row_ids in enumerate(token_ids):
        assert batch.input_ids[row].tolist() == row_ids + [tokenizer.pad_token_id] * (max_length - len(row_ids))
        assert batch.attention_mask[row].tolist() == [1] * len(row_ids) + [0] * (max_length - len(row_ids))


@pytest.mark.parametrize("kind", ["box", "point", "mask", "box-and-point"])
def test_collate_examples_uses_the_prompt_kind_of_the_step(make_stream, tokenizer, kind):
    mixture = ExampleMixture([make_stream()], [1.0], 4, prompt_weights={kind: 1.0})
    batch = collate_examples([mixture[0], mixture[1]], tokenizer.pad_token_id)
    prompts = batch.prompts
    assert (prompts.boxes is not None) == ("box" in kind)
    assert (prompts.points is not None) == ("point" in kind) == (prompts.labels is not None)
    assert (prompts.masks is not None) == ("mask" in kind)
    if prompts.masks is not None:
        assert torch.equal(prompts.masks[:, 0] > 0, batch.targets.masks > 0.5)
    if prompts.points is not None:
        assert prompts.points.shape == (len(prompts), 1, 2)
        assert (prompts.labels == 1).all()


def test_mask_prompt_of_region_without_mask_is_its_filled_box(make_stream, tokenizer):
    sample = Sample(Image.new("RGB", (64, 64)), 1, (Region(1, (10.0, 20.0, 30.0, 40.0), None, "car"),))
    example = ExampleMixture([make_stream(dataset=[sample])], [1.0], 1, prompt_weights={"mask": 1.0})[0]
    prompt_mask = collate_examples([example], tokenizer.pad_token_id).prompts.masks[0, 0] > 0
    assert prompt_mask.sum() == 10 * 10
    assert prompt_mask[10:20, 5:15].all()


@pytest.mark.parametrize("max_regions", [1, 3, 7, 10, 100])
def test_collate_examples_shares_region_budget_evenly_and_fully(make_stream, tokenizer, max_regions):
    examples = [make_stream()[index] for index in range(5)]
    counts = [len(example.boxes) for example in examples]
    batch = collate_examples(examples, tokenizer.pad_token_id, max_regions)
    assert len(batch.prompts) == min(max_regions, sum(counts)) == len(batch.targets.masks)
    kept_counts = torch.bincount(batch.prompts.image_index, minlength=5).tolist()
    max_count = max(kept_counts)
    assert all(
        num_kept == count or num_kept >= max_count - 1 for num_kept, count in zip(kept_counts, counts, strict=True)
    )
    assert set(batch.region_index.tolist()) == set(range(len(batch.prompts)))
    row = 0
    for example, num_kept in zip(examples, kept_counts, strict=True):
        assert torch.equal(batch.prompts.boxes[row : row + num_kept], example.boxes[:num_kept])
        row += num_kept


@pytest.mark.parametrize(
    ("phrase_mode", "has_geometry"), [("dataset", False), ("dataset", True), ("template", False), ("template", True)]
)
def test_places_in_template_phrases_refer_to_the_crop_unless_the_model_receives_boxes(
    make_stream, tokenizer, phrase_mode, has_geometry
):
    image = Image.new("RGB", (64, 32))
    region = Region(0, (22.0, 8.0, 38.0, 24.0), name="car", phrases=("a car in the middle",))
    if phrase_mode == "template":
        region = replace(region, phrases=())
    augment = Augmentation(flip_prob=0.5, min_crop_fraction=0.5, scale_range=(0.6, 1.4), min_visibility=1.0)
    stream = make_stream(
        dataset=[Sample(image, 0, (region,))], augment=augment, phrase_mode=phrase_mode, has_geometry=has_geometry
    )
    geometry = torch.tensor([22 / 64, 0.25, 38 / 64, 0.75])
    mirrored = torch.tensor([26 / 64, 0.25, 42 / 64, 0.75])
    num_whole, texts = 0, set()
    for position in range(40):
        example = stream[position]
        texts |= {tokenizer.decode(ids) for ids in example.input_ids}
        origin, end = example.image_boxes.split(2, dim=1)
        fractions = ((example.boxes.unflatten(1, (2, 2)) - origin) / (end - origin)).flatten()
        is_whole = any(torch.allclose(fractions, each, atol=0.02) for each in (geometry, mirrored))
        num_whole += is_whole and example.aspect_ratios.item() == pytest.approx(2, abs=0.1)
        batch = collate_examples([example, example], pad_token_id=0)
        assert torch.equal(batch.prompts.image_boxes, example.image_boxes.repeat(2, 1))
        assert torch.equal(batch.prompts.aspect_ratios, example.aspect_ratios.repeat(2))
        if phrase_mode == "template" and not has_geometry:
            assert example.image_boxes.tolist() == [[0, 0, 64, 64 / example.aspect_ratios.item()]]
    assert num_whole == 40 if phrase_mode == "dataset" or has_geometry else num_whole < 20
    endings = {text.removeprefix("the car ") for text in texts if text.startswith("the car ")}
    if phrase_mode == "template":
        assert (endings == {"in the middle"}) == has_geometry


def test_regions_with_questions_only_are_trained_on_their_answers(make_stream, tokenizer):
    image = Image.new("RGB", (64, 64))
    regions = (Region(3, (2.0, 2, 20, 20)), Region(4, (30.0, 30, 60, 60), name="car"), Region(5, (5.0, 40, 9, 50)))
    questions = (Question("what color is it?", "red", (3,)), Question("is <region 1> <region 2>?", "no", (4, 5)))
    sampling = SamplingOptions(question_prob=0.5, captions_per_region=2)
    stream = make_stream(sampling, dataset=[Sample(image, 0, regions, questions)])
    for position in range(10):
        example = stream[position]
        assert len(example.boxes) == 3
        texts = [tokenizer.decode(ids) for ids in example.input_ids]
        by_region = {}
        for region, text in zip(example.region_index.tolist(), texts, strict=True):
            by_region.setdefault(round(example.boxes[region, 0].item()), set()).add(text)
        assert by_region[2] == {"red"}
        assert by_region[30] <= {"car", "no"}
        assert 5 not in by_region
    plain = make_stream(SamplingOptions(), dataset=[Sample(image, 0, regions, questions)])[0]
    assert [tokenizer.decode(ids) for ids in plain.input_ids] == ["car"]


def test_images_without_texts_after_augmentation_or_limits_do_not_stop_training(make_stream, build_small_model):
    image = Image.new("RGB", (64, 64))
    regions = (Region(0, (0.0, 0, 30, 30)), Region(1, (40.0, 40, 63, 63)))
    sample = Sample(image, 0, regions, (Question("is <region 1> left of <region 2>?", "yes", (0, 1)),))
    sampling = SamplingOptions(question_prob=0.5)
    augment = Augmentation(min_crop_fraction=0.4, min_visibility=0.9)
    stream = make_stream(sampling, dataset=[sample], augment=augment)
    for position in range(20):
        assert len(stream[position].input_ids) == 1  # of the original image if the crop has no text
    limited = make_stream(replace(sampling, max_regions=1), dataset=[sample])[0]
    assert limited.input_ids == []
    batch = collate_examples([limited, limited], pad_token_id=0)
    assert batch.input_ids is None
    assert count_loss_terms(batch)["caption"] == 0
    module = TrainingModule(build_small_model(), {"caption": 1.0, "mask": 0.0, "iou": 0.0}, AttributeValues({}, {}))
    loss = module(batch)
    assert loss.item() == 0
    loss.backward()


def test_augmentation_drops_counts_of_images_that_lost_a_region():
    image = Image.new("RGB", (64, 64))
    regions = (Region(0, (0.0, 0, 30, 30), name="a"), Region(1, (40.0, 40, 63, 63), name="b"))
    questions = (Question("how many?", "two", (0,), "count", is_about_image=True), Question("what?", "a", (0,)))
    augment = Augmentation(flip_prob=0.0, min_crop_fraction=0.4, min_visibility=0.9)
    samples = [augment(Sample(image, 0, regions, questions), np.random.default_rng(seed)) for seed in range(60)]
    numbers = {
        (len(sample.regions), len(sample.questions))
        for sample in samples
        if any(region.id == 0 for region in sample.regions)
    }
    assert (1, 1) in numbers
    assert (1, 2) not in numbers


def test_question_without_positions_for_its_regions_is_an_error(make_stream):
    regions = (Region(0, (0.0, 0, 30, 30)), Region(1, (40.0, 40, 63, 63)))
    questions = (Question("is it <region 2>?", "no", (0, 1)),)
    sample = Sample(Image.new("RGB", (64, 64)), 0, regions, questions)
    example = make_stream(SamplingOptions(question_prob=1.0), dataset=[sample])[0]
    with pytest.raises(ValueError, match="set embeddings_per_region"):
        collate_examples([example], pad_token_id=0)
