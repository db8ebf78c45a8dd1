"""What is drawn for training depends on the seed and the place in the stream, and on nothing else."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image
from sca_registry.contracts import CAPTION_TASK_ID, RECOGNITION_TASK_ID, ImageFormat, Region, Sample

from sca.data.scenes import COLORS, Scenes
from sca.inference.processor import Processor
from sca.io.masks import decode_rle
from sca.language_models.tiny_gpt2 import TinyGpt2
from sca.training.augmentation import Augmentation
from sca.training.examples import Example, ExampleMixture, ExampleStream, collate_examples
from sca.training.recipe import SamplingOptions


@pytest.fixture(scope="module")
def tokenizer():
    return TinyGpt2(hidden_size=8, depth=1, num_heads=1).tokenizer


@pytest.fixture
def stream(tokenizer):
    def make(drawing=None, length=40, seed=0, dataset=None, **more):
        dataset = dataset if dataset is not None else Scenes("train", num_images=8, image_size=64)
        processor = Processor(ImageFormat(size=64), 8)
        return ExampleStream(dataset, processor, tokenizer, drawing or SamplingOptions(), length, seed, **more)

    return make


def same(one, other):
    values = [(getattr(one, each.name), getattr(other, each.name)) for each in fields(Example)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else str(a) == str(b) for a, b in values)


VARIED = SamplingOptions(
    prompts={"box": 0.5, "point": 0.5}, class_name_prob=0.5, longest_caption_prob=0.5, box_jitter=0.1
)


def test_an_example_is_a_function_of_the_seed_and_the_place(stream):
    one, other = stream(VARIED, augment=Augmentation(crop=0.8)), stream(VARIED, augment=Augmentation(crop=0.8))
    forwards = [one[place] for place in range(20)]
    np.random.seed(9)
    torch.manual_seed(9)
    backwards = [other[place] for place in reversed(range(20))][::-1]
    assert all(map(same, forwards, backwards))
    assert not same(one[3], stream(VARIED, seed=1, augment=Augmentation(crop=0.8))[3])


def test_every_epoch_has_every_image_once_in_an_order_of_its_own(stream):
    examples = stream(length=24)
    epochs = [[examples[place].pixel_values.numpy().tobytes() for place in range(8 * n, 8 * n + 8)] for n in range(3)]
    assert [len(set(epoch)) for epoch in epochs] == [8, 8, 8]
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]


def test_words_masks_boxes_and_points_of_a_row_belong_to_one_region(stream, tokenizer):
    """Every row's phrase is one of the phrases of the region whose box it has, and its point lies in that region."""
    dataset = Scenes("train", num_images=8, image_size=64)
    by_pixels = {
        Processor(ImageFormat(size=64), 8).preprocess_images([sample.image]).numpy().tobytes(): sample
        for sample in dataset
    }
    examples = stream(SamplingOptions(class_name_prob=0.3), dataset=dataset)
    for place in range(16):
        example = examples[place]
        sample = by_pixels[example.pixel_values[None].numpy().tobytes()]
        boxes = {region.box: region for region in sample.regions}
        assert sorted(map(tuple, example.boxes.tolist())) == sorted(boxes)
        for row, box in enumerate(example.boxes.tolist()):
            region = boxes[tuple(box)]
            text = tokenizer.decode(example.input_ids[row])
            assert text == region.name if example.task_ids[row] == RECOGNITION_TASK_ID else text in region.phrases
            x, y = map(int, example.points[row, 0].tolist())
            assert decode_rle(region.mask)[y, x]
            covered = example.masks[row].sum() * (64 / example.masks.shape[-1]) ** 2
            assert covered == pytest.approx(decode_rle(region.mask).sum(), rel=0.02)


def test_names_come_first_then_plain_phrases_then_the_telling_ones(stream, tokenizer):
    examples = stream(
        SamplingOptions(class_name_warmup=0.25, short_caption_warmup=0.25, longest_caption_prob=1.0), length=40
    )
    for place in range(40):
        for words, task in zip(examples[place].input_ids, examples[place].task_ids.tolist(), strict=True):
            text = tokenizer.decode(words)
            if place < 10:
                assert task == RECOGNITION_TASK_ID
                assert " " not in text
            else:
                assert task == CAPTION_TASK_ID
                assert place >= 20 or " of " not in text
    late = [tokenizer.decode(words) for place in range(20, 40) for words in examples[place].input_ids]
    assert sum(any(word in text for word in (" of ", "above", "below")) for text in late) > len(late) / 2


def test_a_region_teaches_as_many_texts_as_are_drawn_and_none_twice(stream, tokenizer):
    dataset = Scenes("train", num_images=8, image_size=64)
    several = [
        stream(SamplingOptions(captions_per_region=9, class_name_prob=0.3), dataset=dataset)[place]
        for place in range(8)
    ]
    for example in several:
        texts = [
            (place, tokenizer.decode(ids))
            for place, ids in zip(example.region_index.tolist(), example.input_ids, strict=True)
        ]
        assert len(set(texts)) == len(texts) > len(example.boxes)
        assert [place for place, _ in texts] == sorted(place for place, _ in texts)
        assert set(example.region_index.tolist()) == set(range(len(example.boxes)))
    batch = collate_examples(several, tokenizer.pad_token_id)
    assert batch.region_index.tolist() == sorted(batch.region_index.tolist())
    told = {row: set() for row in range(len(batch.prompts))}
    for row, ids, mask in zip(batch.region_index.tolist(), batch.input_ids, batch.attention_mask, strict=True):
        told[row].add(tokenizer.decode(ids[mask == 1].tolist()))
    regions = {tuple(region.box): {region.name, *region.phrases} for sample in dataset for region in sample.regions}
    assert all(told[row] <= regions[tuple(box)] for row, box in enumerate(batch.prompts.boxes.tolist()))


@pytest.mark.slow
def test_shares_are_kept(stream):
    examples = [stream(VARIED, length=300)[place] for place in range(300)]
    tasks = torch.cat([example.task_ids for example in examples]).float()
    assert 0.44 < tasks.mean() < 0.56
    mixture = ExampleMixture(
        [stream(VARIED, length=2400)], [1.0], 2400, prompt_shares=VARIED.prompts, examples_per_step=8
    )
    kinds = [str(kind) for kind in mixture._prompt_kinds]
    assert len(kinds) == 300
    assert 0.4 < np.mean([kind == "box" for kind in kinds]) < 0.6
    assert [mixture[place].prompt_kind for place in (8, 11, 15, 16)] == [*[kinds[1]] * 3, kinds[2]]


def test_jitter_moves_boxes_and_keeps_them_in_the_frame(stream):
    still, moved = stream(SamplingOptions(box_jitter=0.0))[0], stream(SamplingOptions(box_jitter=0.2))[0]
    sides = (still.boxes[:, 2:] - still.boxes[:, :2]).repeat(1, 2)
    off = (moved.boxes - still.boxes).abs() / sides
    assert (off <= 0.4 + 1e-4).all()
    assert off.any()
    assert (moved.boxes >= 0).all()
    assert (moved.boxes <= 64).all()


def test_no_more_regions_and_words_than_asked_for(stream, tokenizer):
    for place in range(10):
        example = stream(SamplingOptions(max_regions=2, max_tokens=4))[place]
        assert len(example.input_ids) == 2 == len(example.boxes) == len(example.masks)
        assert all(len(words) <= 4 and words[-1] == tokenizer.eos_token_id for words in example.input_ids)


def test_attributes_are_labeled_by_their_place_in_the_list(stream):
    dataset = Scenes("train", num_images=8, image_size=64)
    example = stream(dataset=dataset, attributes={"color": COLORS, "name": ("square",), "mood": ("sad",)})[0]
    assert ((example.labels["color"] >= 0) & (example.labels["color"] < len(COLORS))).all()
    assert set(example.labels["name"].tolist()) <= {0, -100}
    assert set(example.labels["mood"].tolist()) == {-100}


def test_a_region_without_a_mask_is_pointed_at_inside_its_box_and_teaches_no_mask(stream):
    box = (10.0, 20.0, 30.0, 25.0)
    sample = Sample(Image.new("RGB", (64, 64)), 1, (Region(1, box, None, "car"), Region(2, (0, 0, 9, 9))))
    example = stream(dataset=[sample])[0]
    assert len(example.input_ids) == 1  # one has nothing to say
    assert not example.has_mask.any()
    (x, y) = example.points[0, 0].tolist()
    assert 10 <= x <= 30
    assert 20 <= y <= 25


def test_a_mixture_draws_each_stream_in_proportion_and_in_its_own_order(stream):
    first = stream(length=750, dataset=Scenes("train", num_images=8, image_size=64))
    second = stream(length=250, dataset=Scenes("val", num_images=8, image_size=64))
    mixture = ExampleMixture([first, second], [3, 1], 1000, seed=4)
    again = ExampleMixture([first, second], [3, 1], 1000, seed=4)
    assert len(mixture) == 1000
    assert (mixture._stream_indices == again._stream_indices).all()
    assert 0.7 < (mixture._stream_indices == 0).mean() < 0.8
    place = int(np.flatnonzero(mixture._stream_indices == 1)[5])
    assert same(mixture[place], second[5])
    assert (ExampleMixture([first, second], [3, 1], 1000, seed=5)._stream_indices != mixture._stream_indices).any()


def test_a_batch_has_all_regions_in_rows_and_says_whose_they_are(stream, tokenizer):
    nothing = Sample(Image.new("RGB", (64, 40)), 7, ())
    examples = [stream()[0], stream(dataset=[nothing])[0], stream()[1]]
    batch = collate_examples(examples, tokenizer.pad_token_id)
    counts = [len(example.boxes) for example in examples]
    assert batch.region_index.tolist() == list(range(sum(counts)))
    assert counts[1] == 0
    rows = sum(counts)
    assert batch.pixel_values.shape == (3, 3, 64, 64)
    assert batch.prompts.image_index.tolist() == [0] * counts[0] + [2] * counts[2]
    assert torch.equal(batch.prompts.boxes, torch.cat([example.boxes for example in examples]))
    assert batch.prompts.points is None
    assert batch.targets.masks.shape == batch.targets.valid_pixels.shape == (rows, 32, 32)
    assert len(batch.task_ids) == len(batch.targets.has_mask) == rows
    words = [ids for example in examples for ids in example.input_ids]
    longest = max(map(len, words))
    for row, given in enumerate(words):
        assert batch.input_ids[row].tolist() == given + [tokenizer.pad_token_id] * (longest - len(given))
        assert batch.attention_mask[row].tolist() == [1] * len(given) + [0] * (longest - len(given))


@pytest.mark.parametrize("kind", ["box", "point", "mask", "box-and-point"])
def test_a_batch_is_prompted_by_the_kind_that_is_drawn_for_its_step(stream, tokenizer, kind):
    mixture = ExampleMixture([stream()], [1.0], 4, prompt_shares={kind: 1.0})
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


def test_a_region_without_a_mask_is_prompted_by_its_box_filled(stream, tokenizer):
    sample = Sample(Image.new("RGB", (64, 64)), 1, (Region(1, (10.0, 20.0, 30.0, 40.0), None, "car"),))
    example = ExampleMixture([stream(dataset=[sample])], [1.0], 1, prompt_shares={"mask": 1.0})[0]
    cells = collate_examples([example], tokenizer.pad_token_id).prompts.masks[0, 0] > 0
    assert cells.sum() == 10 * 10
    assert cells[10:20, 5:15].all()


@pytest.mark.parametrize("budget", [1, 3, 7, 10, 100])
def test_a_budget_is_shared_out_and_wastes_nothing(stream, tokenizer, budget):
    examples = [stream()[place] for place in range(5)]
    counts = [len(example.boxes) for example in examples]
    batch = collate_examples(examples, tokenizer.pad_token_id, budget)
    assert len(batch.prompts) == min(budget, sum(counts)) == len(batch.targets.masks)
    kept = torch.bincount(batch.prompts.image_index, minlength=5).tolist()
    most = max(kept)
    assert all(k == count or k >= most - 1 for k, count in zip(kept, counts, strict=True))
    assert set(batch.region_index.tolist()) == set(range(len(batch.prompts)))
    row = 0
    for example, k in zip(examples, kept, strict=True):
        assert torch.equal(batch.prompts.boxes[row : row + k], example.boxes[:k])
        row += k
