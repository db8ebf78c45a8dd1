"""The README is short and its numbers are the measured ones; the generated tables of the docs are current."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

import architecture_figure
import model_table
import plugin_index
import results_table
from markers import read_between

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text("utf-8")
MAX_LINES = 180


def read_docs(name: str) -> str:
    return (ROOT / "docs" / name).read_text("utf-8")


def test_readme_is_short():
    assert len(README.splitlines()) <= MAX_LINES


def iter_measured_facts():
    """Yield what the README must contain, from the committed results."""
    tiny, street = (
        next(
            report for report in results_table.read_reports(RESULTS) if (report["model"], report["prompt_type"]) == key
        )
        for key in (("sca-tiny", "box"), ("sca-street", "box"))
    )
    for report in (tiny, street):
        yield f"{report['num_regions']:,} regions in {report['num_images']}"
        yield f"mask IoU {report['scores']['mask-iou/mean']:.1%}"
    yield f"{tiny['scores']['attributes/all']:.1%} of captions have the correct size, color, texture and shape"
    yield f"class accuracy {street['scores']['class/accuracy']:.1%}"
    published = json.loads((RESULTS / "published-comparison/results.json").read_text("utf-8"))["rows"]
    captions, training = (row["ours"] / row["reference"] for row in published[:2])
    yield f"captioning {captions:.2f}x, with identical token ids; training step {training:.2f}x"
    serving = json.loads((RESULTS / "serving-throughput/results.json").read_text("utf-8"))["multiple_clients"]
    yield f"{serving['requests_per_second']:.0f} requests per second"


@pytest.mark.parametrize("fact", [*iter_measured_facts()])
def test_readme_contains_measured_numbers(fact):
    assert fact in README


def test_source_layout_lists_existing_folders_and_every_package():
    (tree,) = (block for block in re.findall(r"```text\n(.*?)```", read_docs("concepts.md"), re.DOTALL))
    folders, parent = [], ""
    for line in tree.splitlines():
        folder = line.split()[0]
        parent = parent if line.startswith(" ") else folder
        folders.append(f"{parent}{folder}" if line.startswith(" ") else folder)
    assert all((ROOT / folder).is_dir() for folder in folders)
    listed = {folder for folder in folders if folder.startswith("sca/")}
    assert listed >= {f"sca/{each.name}/" for each in (ROOT / "sca").iterdir() if (each / "__init__.py").exists()}


# --- generated content


def test_architecture_figure_is_current():
    assert architecture_figure.PATH.read_text("utf-8") == architecture_figure.render_figure(), (
        "run: python tools/architecture_figure.py"
    )


def test_results_table_is_current():
    table = read_between(read_docs("evaluation.md"), results_table.START, results_table.END)
    assert table == results_table.render_results_table(results_table.read_reports(RESULTS)), "run: make results-table"


@pytest.mark.slow
def test_model_table_is_current():
    pytest.importorskip("open_clip", reason="the extra clip is not installed", exc_type=Exception)
    table = read_between(read_docs("models.md"), model_table.START, model_table.END)
    assert table == model_table.render_model_table(), "run: make model-table"


@pytest.mark.all
def test_segmenter_table_is_current():
    table = read_between(read_docs("models.md"), model_table.SEGMENTERS_START, model_table.SEGMENTERS_END)
    assert table == model_table.render_segmenter_table(), "run: make model-table"


def test_plugin_index_is_current_and_lists_the_plugins_of_this_repository():
    packages = tomllib.loads(read_docs("plugin-index.toml"))
    table = read_between(read_docs("plugin-index.md"), plugin_index.START, plugin_index.END)
    assert table == plugin_index.render_plugin_table(packages), "run: make plugin-index"
    for file in (ROOT / "plugins").glob("*/pyproject.toml"):
        project = tomllib.loads(file.read_text("utf-8"))["project"]
        if not any(group.startswith("sca_") for group in project["entry-points"]):
            continue  # an adapter for another tool, without components
        package = packages[project["name"]]
        assert (package["summary"], package["license"]) == (project["description"], project["license"])
        assert (ROOT / package["install"]).resolve() == file.parent
        groups = {group.removeprefix("sca_"): names for group, names in project["entry-points"].items()}
        assert package.keys() - {*plugin_index.FIELDS} == groups.keys() - {"api"}
        for kind in groups.keys() - {"api"}:
            assert package[kind] == [*groups[kind]] or "cards" in groups[kind]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"summary": ""}, "mine has no 'summary'"),
        ({"mixer": ["x"]}, "mine: unknown field 'mixer'; choose from summary, .*, mixers"),
        ({"mixers": []}, "mine has no components; add their names by kind"),
    ],
)
def test_plugin_index_rejects_incomplete_packages(fields, message):
    package = {"summary": "A mixer.", "license": "MIT", "install": "mine", "mixers": ["x"]}
    with pytest.raises(ValueError, match=message):
        plugin_index.render_plugin_table({"mine": package | fields})


def test_results_table_replaces_the_text_between_markers(tmp_path):
    report = {"model": "m", "dataset": "d", "split": "test", "prompt_type": "box", "num_images": 3, "num_regions": 7}
    scored = report | {"scores": {"mask-iou/mean": 0.8765, "attributes/all": 0.5, "mask-iou/regions": 7}}
    other = report | {
        "model": "n",
        "scores": {"mask-iou/mean": None, "attributes/all": None, "class/area-accuracy": 0.25},
    }
    (tmp_path / "results.json").write_text(json.dumps([scored, other]), "utf-8")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{results_table.START}\nold\n{results_table.END}\nafter\n", "utf-8")
    for _ in range(2):
        results_table.main(str(page), str(tmp_path))
    head, rule, first, second = page.read_text("utf-8").splitlines()[2:-2]
    assert head.endswith("| all four attributes correct | class accuracy by area | mask IoU |")
    assert rule.count("|") == head.count("|")
    assert first == "| m | 3 of d test | box | 7 | 50.0% | – | 87.6% |"
    assert second == "| n | 3 of d test | box | 7 | – | 25.0% | – |"
    assert page.read_text("utf-8").startswith("before\n")
    assert page.read_text("utf-8").endswith("\nafter\n")


def test_results_table_rejects_a_page_without_markers_and_a_folder_without_reports(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing\n", "utf-8")
    with pytest.raises(SystemExit, match="error: no report in"):
        results_table.main(str(page), str(tmp_path))
    (tmp_path / "results.json").write_text('{"scores": {}}', "utf-8")
    with pytest.raises(SystemExit, match=r"error: .*results.json is neither the output of `sca evaluate --json`"):
        results_table.main(str(page), str(tmp_path))
    report = {
        "model": "m",
        "dataset": "d",
        "split": "test",
        "prompt_type": "box",
        "num_images": 3,
        "num_regions": 7,
        "scores": {},
    }
    (tmp_path / "results.json").write_text(json.dumps(report), "utf-8")
    with pytest.raises(SystemExit, match=r"error: .*page.md: the page has no <!-- results -->"):
        results_table.main(str(page), str(tmp_path))
