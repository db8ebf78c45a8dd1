"""Records say all that metrics need, and say it in plain JSON."""

import json
from dataclasses import replace

import pytest
from PIL import Image
from sca_registry.contracts import Caption, Prompt, Proposals, Region, Sample

from sca.data.scenes import Scenes
from sca.evaluation.predictions import CONTROLS, PROMPT_TYPES, DenseCaptioningOptions, PromptingOptions, predict_dataset
from sca.io import masks


def asked(captioner, dataset, questions=None, **how):
    """Every record in one list."""
    return [record for each in predict_dataset(captioner, dataset, questions, **how) for record in each.records]


class Echo:
    """Says where it was asked, and remembers how."""

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


def sample(number, *regions):
    return Sample(Image.new("RGB", (10, 8)), number, regions)


BARE = Region(1, (1.0, 1.0, 4.0, 3.0))
NAMED = Region(2, (1.0, 1.0, 5.0, 3.0), name="car")
TOLD = Region(3, (1.0, 1.0, 6.0, 3.0), phrases=("a car",), attributes={"center": (1.0, 2.0)})
BOTH = Region(4, (1.0, 1.0, 7.0, 3.0), name="car", phrases=("a car", "the car"))


def test_a_record_comes_back_from_json_as_it_was():
    dataset = Scenes("val", num_images=3)
    for prompt in PROMPT_TYPES:
        records = asked(Echo(), dataset, PromptingOptions(prompt))
        assert json.loads(json.dumps(records, allow_nan=False)) == records
    record, region = records[0], dataset[0].regions[0]
    assert (record["image_id"], record["region_id"]) == (dataset[0].image_id, region.id)
    assert record["truth"]["phrases"] == list(region.phrases)
    assert record["truth"]["attributes"]["center"] == list(region.attributes["center"])
    assert record["truth"]["area"] == masks.compute_mask_area(region.mask)


def test_a_task_is_asked_only_where_there_is_truth_and_answers_stay_with_their_regions():
    dataset = [sample(1, BARE, NAMED, BOTH), sample(2, BARE), sample(3), sample(4, TOLD, BARE, BOTH)]
    records = asked(Echo(), dataset)
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
    assert records[0]["truth"]["area"] == 8.0  # of the box


def test_a_captioner_that_takes_one_image_at_a_time_gives_the_same(teller):
    dataset = [sample(1, BARE, NAMED, BOTH)]
    records = asked(teller(dataset), dataset)
    assert [record["caption"] for record in records] == ["car", "the car", "car"]


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_the_batch_changes_nothing_but_how_many_go_together(batch):
    dataset = Scenes("val", num_images=5)
    progress, echo = [], Echo()
    records = asked(echo, dataset, batch_size=batch, limit=4, progress=lambda *state: progress.append(state))
    assert records == asked(Echo(), dataset, limit=4)
    assert progress[-1] == (4, 4)
    assert max(len(counts) for _, counts in echo.calls) == min(batch, 4)
    assert max(echo.encoded) == min(batch, 4)
    assert sum(echo.encoded) == 4  # once, though two tasks are asked


def test_points_lie_inside_the_mask_and_are_drawn_again_for_another_seed():
    dataset = Scenes("val", num_images=3)
    drawn = [
        [record["prompt"]["points"] for record in asked(Echo(), dataset, PromptingOptions("mask-point", seed=seed))]
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    for record in asked(Echo(), dataset, PromptingOptions("mask-point")):
        ((x, y, label),) = record["prompt"]["points"]
        assert label == 1
        assert masks.decode_rle(record["truth"]["mask"])[int(y), int(x)]


def test_a_point_is_the_same_for_both_tasks_and_whatever_else_is_in_the_dataset():
    dataset = Scenes("val", num_images=3)
    points = {}
    for records in (
        asked(Echo(), dataset, PromptingOptions("random-point")),
        asked(Echo(), [dataset[2]], PromptingOptions("random-point", ("caption",))),
    ):
        for record in records:
            points.setdefault(record["region_id"], []).append(record["prompt"]["points"])
    assert all(drawn == drawn[:1] * len(drawn) for drawn in points.values())


def test_two_regions_of_the_same_shape_have_points_of_their_own():
    twins = [Region(number, (0.0, 0.0, 10.0, 8.0), name="car") for number in (1, 2)]
    first, second = asked(Echo(), [sample(1, *twins)], PromptingOptions("random-point"))
    assert first["prompt"] != second["prompt"]


def test_each_prompt_is_where_it_says():
    (record,) = asked(Echo(), [sample(1, TOLD)], PromptingOptions("center"))
    assert record["prompt"] == {"points": [[3.5, 2.0, 1]]}
    (record,) = asked(Echo(), [sample(1, TOLD)], PromptingOptions("random-point"))
    ((x, y, _),) = record["prompt"]["points"]
    assert 1 <= x <= 6
    assert 1 <= y <= 3
    scene = Scenes("val", num_images=1)
    for record in asked(Echo(), scene, PromptingOptions("mask")):
        assert record["prompt"] == {"mask": record["truth"]["mask"]}


def test_a_region_without_a_mask_is_pointed_at_inside_the_one_that_the_captioner_gives_for_its_box(teller):
    whole = list(Scenes("val", num_images=3))
    bare = [each._replace(regions=tuple(replace(region, mask=None) for region in each.regions)) for each in whole]
    inside = {region.id: masks.decode_rle(region.mask) for each in whole for region in each.regions}

    class Points(type(teller(whole))):
        def _answer(self, regions, prompt, task, place):
            if prompt.box:
                return super()._answer(regions, prompt, task, place)
            return Caption("", 1.0, None, None, None, prompt, place)

    for record in asked(Points(whole), bare, PromptingOptions("mask-point")):
        ((x, y, _),) = record["prompt"]["points"]
        assert inside[record["region_id"]][int(y), int(x)]
    with pytest.raises(ValueError, match="the model gives none"):
        asked(Echo(), [sample(1, TOLD)], PromptingOptions("mask"))


def test_controls_ask_the_same_regions_once_more_and_keep_their_truth():
    scene = Scenes("val", num_images=6)
    records = asked(Echo(), scene, PromptingOptions(controls=tuple(CONTROLS)))
    usual = {(r["region_id"], r["task"]): r for r in records if r["control"] is None}
    names = {region.id: region.name for each in scene for region in each.regions}
    boxes = {tuple(region.box): region.id for each in scene for region in each.regions}
    for control in CONTROLS:
        misled = [record for record in records if record["control"] == control]
        assert misled
        for record in misled:
            own = usual[record["region_id"], record["task"]]
            assert record["truth"] == own["truth"]
            if control == "color-swap":
                assert record["prompt"] == own["prompt"]
            else:
                assert record["prompt"] != own["prompt"]
            if control == "wrong-region":
                other = boxes[tuple(record["prompt"]["box"])]
                assert names[other] != names[record["region_id"]]
            if control == "shuffled-mask":
                x1, y1, x2, y2 = record["prompt"]["box"]
                bx1, by1, bx2, by2 = record["truth"]["box"]
                assert (x2 - x1, y2 - y1) == (bx2 - bx1, by2 - by1)
                assert min(x1, y1) >= 0
                assert max(x2, y2) <= scene[0].image.width


def test_colors_are_swapped_in_what_is_shown_and_in_nothing_else():
    seen = []

    class Looks(Echo):
        def encode(self, images):
            seen.append(images[0].getpixel((0, 0)))
            return images

    image = Image.new("RGB", (10, 8), (1, 2, 3))
    asked(Looks(), [Sample(image, 1, (TOLD,))], PromptingOptions(controls=("color-swap",)))
    assert seen == [(1, 2, 3), (3, 1, 2)]


def test_proposed_regions_are_recorded_with_all_that_is_true_of_the_image():
    def proposer(image, image_id):
        prompts = (Prompt(box=(0.0, 0.0, 2.0, 2.0)), Prompt(box=(1.0, 1.0, 6.0, 3.0)))
        return Proposals(prompts, (0.25, 0.5), (None, None))

    class Describes:
        def caption(self, image, prompts, task="caption"):
            return [Caption("a car", 1.0, p.box, None, None, p, i) for i, p in enumerate(prompts)]

    (record,) = asked(Describes(), [sample(7, TOLD, NAMED)], DenseCaptioningOptions(proposer))
    assert record["task"] == "dense"
    assert [each["score"] for each in record["proposals"]] == [0.5, 0.25]
    assert record["proposals"][0]["box"] == [1, 1, 6, 3]
    assert record["truth"]["regions"] == [{"id": 3, "box": [1, 1, 6, 3], "phrases": ["a car"]}]


def test_a_picture_that_cannot_be_read_is_counted_and_the_others_are_asked():
    class Damaged(list):
        def read(self, place):
            return None if place == 1 else self[place]

    found = list(predict_dataset(Echo(), Damaged(sample(i, TOLD) for i in range(4)), batch_size=2))
    assert [each.num_unread for each in found] == [1, 0]
    assert [record["index"] for each in found for record in each.records] == [0, 2, 3]


def test_what_is_done_is_left_out_and_the_rest_stays_in_its_batch():
    found = list(
        predict_dataset(
            Echo(), [sample(i, TOLD) for i in range(6)], batch_size=2, skip=lambda place: place in (0, 1, 4)
        )
    )
    assert [list(each.indices) for each in found] == [[2, 3], [5]]


@pytest.mark.parametrize(
    "wrong", [{"prompt": "scribble"}, {"tasks": ["caption", "translation"]}, {"controls": ["hypnosis"]}]
)
def test_a_wrong_question_is_refused_at_once(wrong):
    with pytest.raises(ValueError, match=r"scribble|translation|hypnosis"):
        PromptingOptions(**wrong)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"limit": 0}])
def test_a_number_below_one_is_refused_at_once(wrong):
    with pytest.raises(ValueError, match="give an integer of at least 1"):
        predict_dataset(Echo(), [], **wrong)
