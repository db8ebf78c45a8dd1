"""Runs side by side, as a table and as pages."""

import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from sca.data.scenes import Scenes
from sca.evaluation.comparison import compare_runs
from sca.evaluation.evaluate import evaluate, score_file
from sca.evaluation.predictions import PromptingOptions
from sca.evaluation.report import render_comparison, render_report
from sca.io.errors import InputError

pytestmark = pytest.mark.slow

DRAWN = ["attributes", "class", "mask-iou"]


@pytest.fixture(scope="module")
def runs(teller, tmp_path_factory):
    """A run that knows all, and one that has every third color wrong; both of scenes that can be drawn again."""
    dataset = Scenes("val", num_images=20)

    def wrong(region, _, task):
        said = region.phrases[-1] if task == "caption" else region.name
        return said.replace(region.attributes["color"], "<b>plaid</b>") if region.id % 3 == 0 else said

    folders = []
    for name, say in (("right", None), ("wrong", wrong)):
        folder = tmp_path_factory.mktemp(name)
        evaluate(teller(dataset, say), {"name": "scenes", "num_images": 20}, folder=folder, metrics=["class"])
        folders.append(folder)
    return folders


def test_differences_come_with_intervals_and_the_answers_that_changed(runs):
    right, wrong = runs
    comparison = compare_runs(wrong, right, DRAWN)
    color = next(each for each in comparison.differences if each.name == "attributes/color")
    assert color.second == 1
    assert color.difference == pytest.approx(1 - color.first)
    assert 0 < color.low < color.difference < color.high < 1
    size = next(each for each in comparison.differences if each.name == "attributes/size")
    assert (size.difference, size.low, size.high) == (0, 0, 0)
    assert comparison.sorted_by == "attributes/all"
    assert comparison.changes
    assert {each.change for each in comparison.changes} == {1}
    assert all(each.first["region_id"] % 3 == 0 for each in comparison.changes)
    screen = Console(file=io.StringIO(), width=150)
    screen.print(comparison.build_table())
    assert re.search(r"attributes/color .* \+0\.\d+ \*", screen.file.getvalue())
    assert json.loads(json.dumps(comparison.to_dict(), allow_nan=False))


def test_only_the_same_regions_are_compared(runs, teller, tmp_path):
    fewer, other = tmp_path / "fewer", tmp_path / "other"
    dataset = Scenes("val", num_images=10)
    for folder, split in ((fewer, "val"), (other, "test")):
        folder.mkdir()
        dataset = Scenes(split, num_images=10)
        evaluate(teller(dataset), {"name": "scenes", "num_images": 10}, split, folder=folder, metrics=["class"])
    with pytest.raises(InputError, match=r"answers are only in .*, the first for region"):
        compare_runs(runs[0], fewer)
    with pytest.raises(InputError, match="answers are only in"):
        compare_runs(fewer, other)


def test_what_else_differs_is_said(runs, teller, tmp_path):
    dataset = Scenes("val", num_images=20)

    class Points(type(teller(dataset))):
        def _answer(self, regions, prompt, task, place):
            ((x, y, _),) = prompt.points
            near = min(regions, key=lambda r: abs(r.box[0] + r.box[2] - 2 * x) + abs(r.box[1] + r.box[3] - 2 * y))
            return super()._answer(regions, type(prompt)(box=near.box), task, place)

    evaluate(
        Points(dataset),
        {"name": "scenes", "num_images": 20},
        folder=tmp_path,
        prompting=PromptingOptions("center"),
        metrics=["class"],
    )
    assert compare_runs(runs[0], tmp_path, DRAWN).remarks == ("prompt differs: 'box' and 'center'",)


class Tags(HTMLParser):
    VOID = ("meta", "image", "path", "rect", "line", "br")

    def __init__(self, page):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def pages(runs):
    reports = [score_file(run, ["attributes", "class", "mask-iou", "rouge-l"]) for run in runs]
    return {"report": render_report(reports), "comparison": render_comparison(compare_runs(*runs, DRAWN))}


def test_pages_are_whole_and_load_nothing(runs):
    for page in pages(runs).values():
        tags = Tags(page).seen
        assert "default-src 'none'" in page
        assert not [tag for tag, _ in tags if tag in ("script", "link", "img", "b")]  # a caption is no markup
        links = [value for _, attributes in tags for name, value in attributes.items() if name in ("href", "src")]
        assert links
        assert all(link.startswith("data:image/") for link in links)


def test_a_report_has_scores_their_spread_the_best_the_worst_and_models_side_by_side(runs):
    page = pages(runs)["report"]
    for words in (
        "attributes/color",
        "[",
        "Best",
        "Worst",
        "Random",
        "Example regions",
        "Score distributions",
    ):
        assert words in page
    tags = Tags(page).seen
    assert {"mask", "ground-truth", "box"} <= {attributes.get("class") for _, attributes in tags}
    figure = page.partition('class="figure"')[2].partition("</table>")[0]
    assert figure.count("<tr>") == 3  # two models and the truth
    assert figure.count("<td>") == 18
    assert "ground truth" in figure.rpartition("<tr>")[2]
    assert 'class="mask"' not in figure.rpartition("<tr>")[2]


def test_a_comparison_shows_what_was_lost(runs):
    page = pages(runs)["comparison"]
    assert "Lost most in attributes/all" in page
    assert "&lt;b&gt;plaid" in page
    assert "Gained most" not in page


def test_without_pictures_a_page_has_words(tmp_path):
    path = tmp_path / "made.jsonl"
    records = [
        {"image_id": n, "region_id": n, "caption": "a dog", "references": ["a dog" if n % 2 else "the cat"]}
        for n in range(9)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    page = render_report([score_file(path, ["rouge-l"], {"tokenizer": "plain"})])
    assert "Images not shown: the predictions do not contain the location of the images" in page
    assert "the cat" in page
    with pytest.raises(ValueError, match="no score 'meteor' of single regions: there are rouge-l"):
        render_report([score_file(path, ["rouge-l"], {"tokenizer": "plain"})], sort_by="meteor")
