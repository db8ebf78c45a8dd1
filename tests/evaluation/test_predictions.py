"""Records say all that metrics need, and say it in plain JSON."""

import json

import pytest
from PIL import Image
from sca_registry.contracts import Caption, Region, Sample

from sca import masks
from sca.data.scenes import Scenes
from sca.evaluation.predictions import predict


class Echo:
    """Says where it was asked, and remembers how."""

    def __init__(self):
        self.calls = []
        self.encoded = []

    def encode(self, images):
        self.encoded.append(len(images))
        return images

    def answer(self, images, requests, task="caption"):
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
TOLD = Region(3, (1.0, 1.0, 6.0, 3.0), phrases=("a car",), attributes={"centre": (1.0, 2.0)})
BOTH = Region(4, (1.0, 1.0, 7.0, 3.0), name="car", phrases=("a car", "the car"))


def test_a_record_comes_back_from_json_as_it_was():
    dataset = Scenes("val", count=3)
    for prompt in ("box", "point"):
        records = list(predict(Echo(), dataset, prompt))
        assert json.loads(json.dumps(records, allow_nan=False)) == records
    record, region = records[0], dataset[0].regions[0]
    assert (record["image_id"], record["region_id"]) == (dataset[0].image_id, region.id)
    assert record["truth"]["phrases"] == list(region.phrases)
    assert record["truth"]["attributes"]["centre"] == list(region.attributes["centre"])
    assert record["truth"]["area"] == masks.area(region.mask)


def test_a_task_is_asked_only_where_there_is_truth_and_answers_stay_with_their_regions():
    dataset = [sample(1, BARE, NAMED, BOTH), sample(2, BARE), sample(3), sample(4, TOLD, BARE, BOTH)]
    records = list(predict(Echo(), dataset))
    asked = [(record["image_id"], record["region_id"], record["task"]) for record in records]
    assert asked == [
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
    records = list(predict(teller(dataset), dataset))
    assert [record["caption"] for record in records] == ["car", "the car", "car"]


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_the_batch_changes_nothing_but_how_many_go_together(batch):
    dataset = Scenes("val", count=5)
    progress, echo = [], Echo()
    records = list(predict(echo, dataset, batch=batch, limit=4, progress=lambda *state: progress.append(state)))
    assert records == list(predict(Echo(), dataset, limit=4))
    assert progress[-1] == (4, 4)
    assert max(len(counts) for _, counts in echo.calls) == min(batch, 4)
    assert max(echo.encoded) == min(batch, 4)
    assert sum(echo.encoded) == 4  # once, though two tasks are asked


def test_points_lie_inside_the_mask_and_are_drawn_again_for_another_seed():
    dataset = Scenes("val", count=3)
    drawn = [[record["prompt"]["points"] for record in predict(Echo(), dataset, "point", seed=s)] for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for record in predict(Echo(), dataset, "point"):
        ((x, y, label),) = record["prompt"]["points"]
        assert label == 1
        assert masks.decode(record["truth"]["mask"])[int(y), int(x)]


def test_a_point_is_the_same_for_both_tasks_and_whatever_else_is_in_the_dataset():
    dataset = Scenes("val", count=3)
    points = {}
    for records in (predict(Echo(), dataset, "point"), predict(Echo(), [dataset[2]], "point", tasks=["caption"])):
        for record in records:
            points.setdefault(record["region_id"], []).append(record["prompt"]["points"])
    assert all(drawn == drawn[:1] * len(drawn) for drawn in points.values())


def test_two_regions_of_the_same_shape_have_points_of_their_own():
    twins = [Region(number, (0.0, 0.0, 10.0, 8.0), name="car") for number in (1, 2)]
    first, second = predict(Echo(), [sample(1, *twins)], "point")
    assert first["prompt"] != second["prompt"]


@pytest.mark.parametrize(
    "wrong", [{"prompt": "scribble"}, {"tasks": ["caption", "translation"]}, {"batch": 0}, {"limit": 0}]
)
def test_a_wrong_wish_is_refused_at_once(wrong):
    with pytest.raises(ValueError, match=r"scribble|translation|batch|limit"):
        predict(Echo(), [], **wrong)
