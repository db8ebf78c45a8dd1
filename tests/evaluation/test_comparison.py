"""Comparison of runs as a table and as pages."""

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

SCENE_METRICS = ["attributes", "class", "mask-iou"]


@pytest.fixture(scope="module")
def run_folders(make_oracle_captioner, tmp_path_factory):
    """Write a perfect run and a run with every third color wrong, both of scenes that can be drawn again."""
    dataset = Scenes("val", num_images=20)

    def caption_with_wrong_color(region, _, task):
        caption = region.phrases[-1] if task == "caption" else region.name
        return caption.replace(region.attributes["color"], "<b>plaid</b>") if region.id % 3 == 0 else caption

    folders = []
    for name, describe_region in (("right", None), ("wrong", caption_with_wrong_color)):
        folder = tmp_path_factory.mktemp(name)
        evaluate(
            make_oracle_captioner(dataset, describe_region),
            {"name": "scenes", "num_images": 20},
            folder=folder,
            metrics=["class"],
        )
        folders.append(folder)
    return folders


def test_compare_runs_returns_differences_with_intervals_and_changed_captions(run_folders):
    correct_run, wrong_run = run_folders
    comparison = compare_runs(wrong_run, correct_run, SCENE_METRICS)
    color = next(each for each in comparison.differences if each.name == "attributes/color")
    assert color.second == 1
    assert color.difference == pytest.approx(1 - color.first)
    assert 0 < color.ci_low < color.difference < color.ci_high < 1
    size = next(each for each in comparison.differences if each.name == "attributes/size")
    assert (size.difference, size.ci_low, size.ci_high) == (0, 0, 0)
    assert comparison.sorted_by == "attributes/all"
    assert comparison.changes
    assert {each.change for each in comparison.changes} == {1}
    assert all(each.first["region_id"] % 3 == 0 for each in comparison.changes)
    console = Console(file=io.StringIO(), width=150)
    console.print(comparison.build_table())
    assert re.search(r"attributes/color .* \+\d+\.\d \*", console.file.getvalue())
    assert json.loads(json.dumps(comparison.to_dict(), allow_nan=False))


def test_compare_runs_rejects_runs_on_different_regions(run_folders, make_oracle_captioner, tmp_path):
    fewer_images, other_split = tmp_path / "fewer", tmp_path / "other"
    dataset = Scenes("val", num_images=10)
    for folder, split in ((fewer_images, "val"), (other_split, "test")):
        folder.mkdir()
        dataset = Scenes(split, num_images=10)
        evaluate(
            make_oracle_captioner(dataset),
            {"name": "scenes", "num_images": 10},
            split,
            folder=folder,
            metrics=["class"],
        )
    with pytest.raises(InputError, match=r"predictions? in .* only \(first: region"):
        compare_runs(run_folders[0], fewer_images)
    with pytest.raises(InputError, match=r"predictions? in .* only"):
        compare_runs(fewer_images, other_split)


def test_compare_runs_reports_different_prompts(run_folders, make_oracle_captioner, tmp_path):
    dataset = Scenes("val", num_images=20)

    class PointOracleCaptioner(type(make_oracle_captioner(dataset))):
        def _caption_prompt(self, regions, prompt, task, index):
            ((x, y, _),) = prompt.points
            nearest_region = min(
                regions,
                key=lambda region: (
                    abs(region.box[0] + region.box[2] - 2 * x) + abs(region.box[1] + region.box[3] - 2 * y)
                ),
            )
            return super()._caption_prompt(regions, type(prompt)(box=nearest_region.box), task, index)

    evaluate(
        PointOracleCaptioner(dataset),
        {"name": "scenes", "num_images": 20},
        folder=tmp_path,
        prompting=PromptingOptions("center"),
        metrics=["class"],
    )
    assert compare_runs(run_folders[0], tmp_path, SCENE_METRICS).notes == ("prompt_type differs: 'box' and 'center'",)


class TagParser(HTMLParser):
    VOID = ("meta", "image", "path", "rect", "line", "br")

    def __init__(self, page):
        super().__init__()
        self.open_tags, self.tags = [], []
        self.feed(page)
        assert not self.open_tags

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag


def render_pages(run_folders):
    reports = [score_file(run, ["attributes", "class", "mask-iou", "rouge-l"]) for run in run_folders]
    return {
        "report": render_report(reports),
        "comparison": render_comparison(compare_runs(*run_folders, SCENE_METRICS)),
    }


def test_report_pages_are_well_formed_and_load_nothing(run_folders):
    for page in render_pages(run_folders).values():
        tags = TagParser(page).tags
        assert "default-src 'none'" in page
        assert not [tag for tag, _ in tags if tag in ("script", "link", "img", "b")]  # captions are escaped
        links = [value for _, attributes in tags for name, value in attributes.items() if name in ("href", "src")]
        assert links
        assert all(link.startswith("data:image/") for link in links)


def test_report_shows_scores_distributions_extremes_and_runs_side_by_side(run_folders):
    page = render_pages(run_folders)["report"]
    for expected_text in (
        "attributes/color",
        "95% confidence interval",
        "Best",
        "Worst",
        "Random",
        "Example regions",
        "Score distributions",
    ):
        assert expected_text in page
    tags = TagParser(page).tags
    assert {"mask", "ground-truth", "box"} <= {attributes.get("class") for _, attributes in tags}
    figure = page.partition('class="figure"')[2].partition("</table>")[0]
    assert figure.count("<tr>") == 3  # two models and the ground truth
    assert figure.count("<td>") == 18
    assert "ground truth" in figure.rpartition("<tr>")[2]
    assert 'class="mask"' not in figure.rpartition("<tr>")[2]


def test_comparison_page_shows_lost_regions(run_folders):
    page = render_pages(run_folders)["comparison"]
    assert "Lost most in attributes/all" in page
    assert "&lt;b&gt;plaid" in page
    assert "Gained most" not in page


def test_report_without_images_shows_captions(tmp_path):
    path = tmp_path / "made.jsonl"
    records = [
        {"image_id": n, "region_id": n, "caption": "a dog", "references": ["a dog" if n % 2 else "the cat"]}
        for n in range(9)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    page = render_report([score_file(path, ["rouge-l"], {"tokenizer": "plain"})])
    assert "Images not shown: the predictions do not contain the location of the images" in page
    assert "the cat" in page
    with pytest.raises(ValueError, match="no score 'meteor' of single regions; choose from rouge-l"):
        render_report([score_file(path, ["rouge-l"], {"tokenizer": "plain"})], sort_by="meteor")
