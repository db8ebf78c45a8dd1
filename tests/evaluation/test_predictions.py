"""Records contain all that metrics need, in plain JSON."""

import json
from dataclasses import replace

import pytest
from PIL import Image
from sca_registry.contracts import Caption, Prompt, Proposals, Region, Sample

from sca.data.scenes import Scenes
from sca.evaluation.predictions import (
    CONTROLS,
    DENSE_TASKS,
    PROMPT_TYPES,
    DenseCaptioningOptions,
    PromptingOptions,
    predict_dataset,
)
from sca.io import masks


def collect_records(captioner, dataset, prompting=None, **options):
    """Collect all records in one list."""
    return [record for batch in predict_dataset(captioner, dataset, prompting, **options) for record in batch.records]


class EchoCaptioner:
    """Returns the position of each prompt as its caption and records the arguments."""

    def __init__(self):
        self.calls = []
        self.encoded = []

    def encode(self, images):
        self.encoded.append(len(images))
        return images

    def caption_batch(self, images, requests, task="caption"):
        assert len(images) == len(requests)
        self.calls.append((task, [len(request) for request in requests]))
        return [
            [
                Caption(f"{task} {p.box or p.points}", float("nan"), p.box, None, None, p, i)
                for i, p in enumerate(request)
            ]
            for request in requests
        ]


def make_sample(number, *regions):
    return Sample(Image.new("RGB", (10, 8)), number, regions)


UNLABELED_REGION = Region(1, (1.0, 1.0, 4.0, 3.0))
NAMED_REGION = Region(2, (1.0, 1.0, 5.0, 3.0), name="car")
CAPTIONED_REGION = Region(3, (1.0, 1.0, 6.0, 3.0), phrases=("a car",), attributes={"center": (1.0, 2.0)})
NAMED_CAPTIONED_REGION = Region(4, (1.0, 1.0, 7.0, 3.0), name="car", phrases=("a car", "the car"))


def test_prediction_records_round_trip_through_json():
    dataset = Scenes("val", num_images=3)
    for prompt in PROMPT_TYPES:
        records = collect_records(EchoCaptioner(), dataset, PromptingOptions(prompt))
        assert json.loads(json.dumps(records, allow_nan=False)) == records
    record, region = records[0], dataset[0].regions[0]
    assert (record["image_id"], record["region_id"]) == (dataset[0].image_id, region.id)
    assert record["truth"]["phrases"] == list(region.phrases)
    assert record["truth"]["attributes"]["center"] == list(region.attributes["center"])
    assert record["truth"]["area"] == masks.compute_mask_area(region.mask)


def test_predict_dataset_prompts_only_labeled_tasks_and_keeps_regions_aligned():
    dataset = [
        make_sample(1, UNLABELED_REGION, NAMED_REGION, NAMED_CAPTIONED_REGION),
        make_sample(2, UNLABELED_REGION),
        make_sample(3),
        make_sample(4, CAPTIONED_REGION, UNLABELED_REGION, NAMED_CAPTIONED_REGION),
    ]
    records = collect_records(EchoCaptioner(), dataset)
    assert [(record["image_id"], record["region_id"], record["task"]) for record in records] == [
        (1, 2, "recognition"),
        (1, 4, "caption"),
        (1, 4, "recognition"),
        (4, 3, "caption"),
        (4, 4, "caption"),
        (4, 4, "recognition"),
    ]
    for record in records:
        assert record["caption"] == f"{record['task']} {tuple(record['truth']['box'])}"
        assert record["prompt"] == {"box": record["truth"]["box"]}
        assert record["score"] is None
    assert records[0]["truth"]["area"] == 8.0  # the center of the box


def test_predict_dataset_accepts_captioner_without_batches(make_oracle_captioner):
    dataset = [make_sample(1, UNLABELED_REGION, NAMED_REGION, NAMED_CAPTIONED_REGION)]
    records = collect_records(make_oracle_captioner(dataset), dataset)
    assert [record["caption"] for record in records] == ["car", "the car", "car"]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_predict_dataset_batch_size_does_not_change_records(batch_size):
    dataset = Scenes("val", num_images=5)
    progress, captioner = [], EchoCaptioner()
    records = collect_records(
        captioner, dataset, batch_size=batch_size, max_images=4, progress=lambda *state: progress.append(state)
    )
    assert records == collect_records(EchoCaptioner(), dataset, max_images=4)
    assert progress[-1] == (4, 4)
    assert max(len(counts) for _, counts in captioner.calls) == min(batch_size, 4)
    assert max(captioner.encoded) == min(batch_size, 4)
    assert sum(captioner.encoded) == 4  # once, although two tasks are requested


def test_mask_point_prompts_lie_in_the_mask_and_depend_on_the_seed():
    dataset = Scenes("val", num_images=3)
    points_by_seed = [
        [
            record["prompt"]["points"]
            for record in collect_records(EchoCaptioner(), dataset, PromptingOptions("mask-point", seed=seed))
        ]
        for seed in (0, 0, 1)
    ]
    assert points_by_seed[0] == points_by_seed[1] != points_by_seed[2]
    for record in collect_records(EchoCaptioner(), dataset, PromptingOptions("mask-point")):
        ((x, y, label),) = record["prompt"]["points"]
        assert label == 1
        assert masks.decode_rle(record["truth"]["mask"])[int(y), int(x)]


def test_random_point_prompt_is_the_same_for_all_tasks_and_datasets():
    dataset = Scenes("val", num_images=3)
    points = {}
    for records in (
        collect_records(EchoCaptioner(), dataset, PromptingOptions("random-point")),
        collect_records(EchoCaptioner(), [dataset[2]], PromptingOptions("random-point", ("caption",))),
    ):
        for record in records:
            points.setdefault(record["region_id"], []).append(record["prompt"]["points"])
    assert all(region_points == region_points[:1] * len(region_points) for region_points in points.values())


def test_random_point_prompts_differ_between_identical_regions():
    twins = [Region(number, (0.0, 0.0, 10.0, 8.0), name="car") for number in (1, 2)]
    first, second = collect_records(EchoCaptioner(), [make_sample(1, *twins)], PromptingOptions("random-point"))
    assert first["prompt"] != second["prompt"]


def test_prompt_types_have_expected_locations():
    (record,) = collect_records(EchoCaptioner(), [make_sample(1, CAPTIONED_REGION)], PromptingOptions("center"))
    assert record["prompt"] == {"points": [[3.5, 2.0, 1]]}
    (record,) = collect_records(EchoCaptioner(), [make_sample(1, CAPTIONED_REGION)], PromptingOptions("random-point"))
    ((x, y, _),) = record["prompt"]["points"]
    assert 1 <= x <= 6
    assert 1 <= y <= 3
    scene = Scenes("val", num_images=1)
    for record in collect_records(EchoCaptioner(), scene, PromptingOptions("mask")):
        assert record["prompt"] == {"mask": record["truth"]["mask"]}


def test_mask_point_prompt_uses_predicted_mask_for_region_without_mask(make_oracle_captioner):
    samples = list(Scenes("val", num_images=3))
    samples_without_masks = [
        scene._replace(regions=tuple(replace(region, mask=None) for region in scene.regions)) for scene in samples
    ]
    masks_by_region = {region.id: masks.decode_rle(region.mask) for scene in samples for region in scene.regions}

    class PointOracleCaptioner(type(make_oracle_captioner(samples))):
        def _caption_prompt(self, regions, prompt, task, index):
            if prompt.box:
                return super()._caption_prompt(regions, prompt, task, index)
            return Caption("", 1.0, None, None, None, prompt, index)

    for record in collect_records(PointOracleCaptioner(samples), samples_without_masks, PromptingOptions("mask-point")):
        ((x, y, _),) = record["prompt"]["points"]
        assert masks_by_region[record["region_id"]][int(y), int(x)]
    with pytest.raises(ValueError, match="some regions have no mask in the dataset, and the model predicts none"):
        collect_records(EchoCaptioner(), [make_sample(1, CAPTIONED_REGION)], PromptingOptions("mask"))


def test_controls_prompt_the_same_regions_and_keep_their_truth():
    scene = Scenes("val", num_images=6)
    records = collect_records(EchoCaptioner(), scene, PromptingOptions(controls=tuple(CONTROLS)))
    regular_records = {(r["region_id"], r["task"]): r for r in records if r["control"] is None}
    names_by_id = {region.id: region.name for each in scene for region in each.regions}
    ids_by_box = {tuple(region.box): region.id for each in scene for region in each.regions}
    for control in CONTROLS:
        control_records = [record for record in records if record["control"] == control]
        assert control_records
        for record in control_records:
            regular_record = regular_records[record["region_id"], record["task"]]
            assert record["truth"] == regular_record["truth"]
            if control == "color-swap":
                assert record["prompt"] == regular_record["prompt"]
            else:
                assert record["prompt"] != regular_record["prompt"]
            if control == "wrong-region":
                prompted_id = ids_by_box[tuple(record["prompt"]["box"])]
                assert names_by_id[prompted_id] != names_by_id[record["region_id"]]
            if control == "shuffled-mask":
                x1, y1, x2, y2 = record["prompt"]["box"]
                bx1, by1, bx2, by2 = record["truth"]["box"]
                assert (x2 - x1, y2 - y1) == (bx2 - bx1, by2 - by1)
                assert min(x1, y1) >= 0
                assert max(x2, y2) <= scene[0].image.width


def test_color_swap_control_changes_only_the_image():
    pixel_colors = []

    class PixelRecorder(EchoCaptioner):
        def encode(self, images):
            pixel_colors.append(images[0].getpixel((0, 0)))
            return images

    image = Image.new("RGB", (10, 8), (1, 2, 3))
    collect_records(
        PixelRecorder(), [Sample(image, 1, (CAPTIONED_REGION,))], PromptingOptions(controls=("color-swap",))
    )
    assert pixel_colors == [(1, 2, 3), (3, 1, 2)]


def test_dense_captioning_records_proposals_and_labeled_regions():
    def propose_boxes(image, image_id):
        prompts = (Prompt(box=(0.0, 0.0, 2.0, 2.0)), Prompt(box=(1.0, 1.0, 6.0, 3.0)))
        return Proposals(prompts, (0.25, 0.5), (None, None))

    class ConstantCaptioner:
        def caption(self, image, prompts, task="caption"):
            return [Caption("a car", 1.0, p.box, None, None, p, i) for i, p in enumerate(prompts)]

    (record,) = collect_records(
        ConstantCaptioner(), [make_sample(7, CAPTIONED_REGION, NAMED_REGION)], DenseCaptioningOptions(propose_boxes)
    )
    assert record["task"] == "dense"
    assert [each["score"] for each in record["proposals"]] == [0.5, 0.25]
    assert record["proposals"][0]["box"] == [1, 1, 6, 3]
    assert record["truth"]["regions"] == [{"id": 3, "box": [1, 1, 6, 3], "phrases": ["a car"]}]


def test_dense_recognition_records_class_names_next_to_those_of_the_proposer():
    def propose_boxes(image, image_id):
        prompts = (Prompt(box=(0.0, 0.0, 2.0, 2.0)), Prompt(box=(1.0, 1.0, 6.0, 3.0)))
        return Proposals(prompts, (0.25, 0.5), (None, "vehicle"))

    class TaskCaptioner:
        num_encoded = 0

        def encode(self, images):
            self.num_encoded += len(images)
            return images

        def caption_batch(self, encoded, requests, task="caption"):
            return [[Caption(task, 1.0, p.box, None, None, p, i) for i, p in enumerate(each)] for each in requests]

    captioner = TaskCaptioner()
    dense, recognition = collect_records(
        captioner,
        [make_sample(7, CAPTIONED_REGION, NAMED_REGION)],
        DenseCaptioningOptions(propose_boxes, tuple(DENSE_TASKS)),
    )
    assert captioner.num_encoded == 1
    assert (dense["task"], recognition["task"]) == ("dense", "dense-recognition")
    assert [each["caption"] for each in dense["proposals"]] == ["caption"] * 2
    assert [each["caption"] for each in recognition["proposals"]] == ["recognition"] * 2
    for record in (dense, recognition):
        assert [each["name"] for each in record["proposals"]] == ["vehicle", None]
    assert recognition["truth"]["regions"] == [
        {"id": NAMED_REGION.id, "box": [*NAMED_REGION.box], "name": NAMED_REGION.name}
    ]


def test_predict_dataset_counts_unreadable_images_and_continues():
    class DamagedDataset(list):
        def read_sample(self, index):
            return None if index == 1 else self[index]

    batches = list(
        predict_dataset(
            EchoCaptioner(), DamagedDataset(make_sample(i, CAPTIONED_REGION) for i in range(4)), batch_size=2
        )
    )
    assert [batch.num_unreadable for batch in batches] == [1, 0]
    assert [record["index"] for batch in batches for record in batch.records] == [0, 2, 3]


def test_predict_dataset_skip_keeps_batch_boundaries():
    batches = list(
        predict_dataset(
            EchoCaptioner(),
            [make_sample(i, CAPTIONED_REGION) for i in range(6)],
            batch_size=2,
            skip=lambda index: index in (0, 1, 4),
        )
    )
    assert [list(batch.indices) for batch in batches] == [[2, 3], [5]]


@pytest.mark.parametrize(
    "options",
    [{"prompt_type": "scribble"}, {"tasks": ["caption", "translation"]}, {"controls": ["hypnosis"]}, {"seed": -1}],
)
def test_prompting_options_reject_invalid_values(options):
    with pytest.raises(ValueError, match=r"scribble|translation|hypnosis|seed is -1"):
        PromptingOptions(**options)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"max_images": 0}])
def test_predict_dataset_rejects_numbers_below_one(options):
    with pytest.raises(ValueError, match="expected an integer of at least 1"):
        predict_dataset(EchoCaptioner(), [], **options)
