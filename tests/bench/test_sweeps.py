"""Sweeps are read, put in order and refused; results are kept, repaired and told."""

import json
import os
import resource
import signal
import tomllib

import pytest
from sca_bench import report
from sca_bench.diff import diff_rows
from sca_bench.runner import read_sweep_status, run_sweep
from sca_bench.store import ResultStore
from sca_bench.summary import find_pareto_front, summarize_rows
from sca_bench.sweep import SECTION_KEYS, Sweep, list_sweeps
from sca_registry import RegistryError

from sca.io.errors import InputError, LockedError, OutputError

BASE = """
[model]
encoder = { name = "tiny-vit", image_size = 64, hidden_size = 32, depth = 1, output_channels = 32, \
stem_channels = [8, 16] }
segmenter = "box"
language_model = { name = "tiny-gpt2", hidden_size = 32, depth = 1, num_heads = 2, max_positions = 40 }
task_tokens = 2
"""
SMALL = (
    BASE
    + """
[axes]
mixer = ["roi-pool", "mask-tokens"]
[benchmark]
regions_per_image = [1]
max_new_tokens = 2
num_repeats = 5
"""
)


@pytest.fixture
def sweep(tmp_path):
    def write(text=SMALL):
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return Sweep.read(str(path))

    return write


@pytest.mark.parametrize("name", list_sweeps())
def test_every_shipped_sweep_can_be_read(name):
    rows = Sweep.read(name).list_rows()
    assert len({row.key for row in rows}) == len(rows) > 1
    assert [row.num_listed_parameters for row in rows] == sorted(row.num_listed_parameters for row in rows)


def test_sweep_with_too_many_combinations_is_refused_before_they_are_built(sweep):
    axes = "".join(f'"mixer.a{number}" = {list(range(10))}\n' for number in range(10))
    with pytest.raises(
        RegistryError, match=r"mixer 2 x mixer.a0 10 x .* seeds 1\), and the maximum is 10,000"
    ) as caught:
        sweep(f'{BASE}[axes]\nmixer = ["roi-pool", "mask-tokens"]\n{axes}')
    assert "20,000,000,000 combinations" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_smoke_sweep_has_sixty_rows_and_the_mixers_with_a_transformer_are_of_one_size():
    import sca

    assert len(Sweep.read("smoke").list_rows()) == 60
    sizes = {}
    for row in Sweep.read("mixers").list_rows():
        model = sca.build(sca.ModelSpec.from_dict(row.config["model"]), "meta")
        sizes[row.config["model"]["mixer"]["name"]] = sum(each.numel() for each in model.mixer.parameters())
    equal = [sizes[name] for name in ("query", "split", "resampler")]
    assert max(equal) / min(equal) < 1.05


def test_a_key_is_of_what_is_asked_and_of_nothing_else(sweep):
    first, again = sweep().list_rows(), sweep(SMALL.replace("[axes]", "# a remark\n[axes]")).list_rows()
    assert [row.key for row in first] == [row.key for row in again]
    other = sweep(SMALL.replace("max_new_tokens = 2", "max_new_tokens = 3")).list_rows()
    assert not {row.key for row in first} & {row.key for row in other}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"roi-pool"', '"roi-pol"', "Did you mean 'roi-pool'"),
        ('["roi-pool", "mask-tokens"]', "[]", "the axis 'mixer' .* give a list of one or more"),
        ('["roi-pool", "mask-tokens"]', '"roi-pool"', "give a list"),
        ("[benchmark]", "[benchmrk]", "Did you mean 'benchmark'"),
        ("max_new_tokens = 2", "max_tokens = 2", "Did you mean 'max_new_tokens'"),
        ("[axes]", "seeds = []\n[axes]", "unknown field 'seeds'"),
        ("task_tokens = 2", "task_token = 2", "Did you mean 'task_tokens'"),
        ("[axes]", "[axes", "is not valid TOML"),
        ("\n[model]", "\nseeds = [4294967296]\n[model]", "seeds is 4294967296; give an integer from 0 to"),
        ("[axes]", '[evaluate]\ndataset = "scenes"\ntasks = []\n[axes]', "tasks is .*; give a list of 1 or more"),
        ("[axes]", '[evaluate]\ndataset = "scenes"\nmetrics = []\n[axes]', "metrics is .*; give a list of 1 or more"),
        (
            "[axes]",
            '[evaluate]\ndataset = "scenes"\ngeneration = { num_beams = 0 }\n[axes]',
            "evaluate.generation.num_beams is 0; give an integer of at least 1",
        ),
        (
            "[axes]",
            '[evaluate]\ndataset = "scenes"\ngeneration = { num_beams = "x" }\n[axes]',
            "evaluate.generation.num_beams is 'x'; give an integer",
        ),
    ],
)
def test_a_wrong_sweep_is_refused_with_the_place(sweep, old, new, said):
    with pytest.raises(RegistryError, match=said):
        sweep(SMALL.replace(old, new))


WHOLE = """
summary = "all fields"
seeds = [0]
num_threads = 1
[model]
encoder = "tiny-vit"
mixer = "query"
language_model = "tiny-gpt2"
[axes]
task_tokens = [1]
[train]
recipe = "sca-tiny"
[evaluate]
dataset = "scenes"
[benchmark]
"""
FIELDS = [
    *((None, field, kind) for field, kind in (("summary", str), ("seeds", list), ("num_threads", int))),
    *((None, section, dict) for section in ("model", "axes", "train", "evaluate", "benchmark")),
    *(("train", field, kind) for field, kind in (("recipe", str), ("steps", int), ("batch_size", int))),
    *(("train", field, kind) for field, kind in (("warmup_steps", int), ("learning_rate", float))),
    *(("train", field, kind) for field, kind in (("max_regions", int), ("captions_per_region", int))),
    *(("train", field, kind) for field, kind in (("precision", str), ("prompt_weights", dict), ("num_workers", int))),
    *(("evaluate", field, kind) for field, kind in (("split", str), ("prompt_type", str), ("tasks", list))),
    *(("evaluate", field, kind) for field, kind in (("metrics", list), ("max_images", int), ("batch_size", int))),
    *(("evaluate", field, kind) for field, kind in (("generation", dict), ("dataset", "part"))),
    *(
        ("benchmark", field, kind)
        for field, kind in (("regions_per_image", list), ("max_new_tokens", int), ("num_repeats", int))
    ),
    *(
        ("benchmark", field, kind)
        for field, kind in (("dtype", str), ("training_step", bool), ("plan", bool), ("batch_size", int))
    ),
]
WRONG = {
    str: (True, 1, ["x"]),
    int: (True, 1.5, "2", [1]),
    float: (True, "1", [1.0]),
    bool: (1, "true"),
    list: (3, True, "0,1", [[1]]),
    dict: (3, True, "sca-tiny", [1]),
    "part": (3, True, [1], {}),
}
WANTED = {
    str: "give text",
    int: "give an integer",
    float: "give a number",
    bool: "give true or false",
    list: "give a list of",
    dict: "give a table",
    "part": "give a name, or a table with a name",
}


def test_sweep_type_test_covers_every_field():
    known = {(section, field) for section, fields in SECTION_KEYS.items() for field in fields}
    assert known <= {(section, field) for section, field, _ in FIELDS}


@pytest.mark.parametrize(("section", "field", "kind"), FIELDS)
def test_sweep_rejects_a_wrong_type_in_any_field(tmp_path, section, field, kind):
    for value in WRONG[kind]:
        table = tomllib.loads(WHOLE)
        (table if section is None else table[section])[field] = value
        path = tmp_path / "mine.toml"
        path.write_text("".join(f"{key} = {inline(each)}\n" for key, each in table.items()))
        with pytest.raises(RegistryError) as caught:
            Sweep.read(str(path))
        message = str(caught.value)
        assert field in message
        assert WANTED[kind] in message
        assert "\n" not in message


def inline(value):
    """A value in TOML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {inline(each)}' for key, each in value.items()) + "}"
    return f"[{', '.join(map(inline, value))}]" if isinstance(value, list) else json.dumps(value)


def test_sweep_read_reports_text_that_is_not_utf_8(tmp_path):
    path = tmp_path / "latin.toml"
    path.write_bytes(b'summary = "caf\xe9"')
    with pytest.raises(ValueError, match=r"latin\.toml is not UTF-8"):
        Sweep.read(str(path))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('mixer = ["roi-pool"', 'mixer = [{ name = "roi-pool", dpth = 2 }', "mixer 'roi-pool' has no option 'dpth'"),
        ("image_size = 64", 'image_size = "64"', "encoder 'tiny-vit': image_size is '64'; give an integer"),
        ("[axes]", '[evaluate]\ndataset = "scenes"\nmetrics = ["cidr"]\n[axes]', "no metrics named 'cidr'"),
        ("[axes]", '[evaluate]\ndataset = "scene"\n[axes]', "no datasets named 'scene'"),
        ("[axes]", '[evaluate]\ndataset = "scenes"\nprompt_type = "circle"\n[axes]', "prompt_type is 'circle'"),
        ("[axes]", '[evaluate]\ndataset = "scenes"\ntasks = ["name"]\n[axes]', "task is 'name'"),
        (
            "[axes]",
            '[evaluate]\ndataset = "scenes"\ngeneration = { num_beans = 3 }\n[axes]',
            "evaluate.generation has no option 'num_beans'. Did you mean 'num_beams'",
        ),
        (
            "[axes]",
            '[evaluate]\ndataset = "scenes"\ngeneration = { temperature = "x" }\n[axes]',
            "evaluate.generation.temperature is 'x'; give a number",
        ),
        (
            "[axes]",
            '[evaluate]\ndataset = { name = "jsonl", file = "FOLDER/a.jsonl" }\nmetrics = ["class"]\n[axes]',
            "metric 'class': needs task=recognition, truth.name",
        ),
        ("task_tokens = 2", "task_tokens = 2\ngeneration = { beans = 3 }", "generation has no option 'beans'"),
        ("[axes]", "[train]\nprompt_weights = { circle = 1.0 }\n[axes]", "train.prompt_weights has no 'circle'"),
        ("[axes]", '[train]\nrecipe = "sca-tny"\n[axes]', "Did you mean 'sca-tiny'"),
        (
            "task_tokens = 2",
            'task_tokens = 2\nlora = 4\ntrainable = ["mixer"]\n[train]\nsteps = 1',
            "lora=4 is not trainable",
        ),
    ],
)
def test_run_checks_every_row_before_the_first(sweep, tmp_path, old, new, said):
    line = {"image": "a.png", "box": [0, 0, 4, 4], "caption": "a dog", "width": 8, "height": 8}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=said):
        run_sweep(
            sweep(SMALL.replace(old, new.replace("FOLDER", str(tmp_path)))),
            tmp_path / "out",
            launcher_options={"num_workers": 1},
            report=lambda line: None,
        )
    assert not ResultStore(tmp_path / "out").read_rows()


def test_run_rejects_a_missing_extra_before_the_first_row(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr("sca_registry.component_states.is_extra_installed", lambda distribution, extra: False)
    for text in (
        SMALL.replace('encoder = { name = "tiny-vit"', 'encoder = { name = "timm"'),
        SMALL.replace("[axes]", '[evaluate]\ndataset = "scenes"\nmetrics = ["meteor"]\n[axes]'),
    ):
        with pytest.raises(
            RegistryError, match=r"needs extra: \w+\. Install it: pip install 'segment-caption-anything"
        ):
            run_sweep(sweep(text), tmp_path / "out", launcher_options={"num_workers": 1}, report=lambda line: None)


def test_sweep_axis_edits_a_short_value(sweep):
    rows = sweep(
        SMALL.replace("[axes]", '[axes]\n"lora.rank" = [2, 4]').replace("task_tokens = 2", "lora = 8")
    ).list_rows()
    assert sorted({row.config["model"]["lora"]["rank"] for row in rows}) == [2, 4]
    with pytest.raises(RegistryError, match=r"model\.task_tokens is 2; give a table"):
        sweep(SMALL.replace("[axes]", '[axes]\n"task_tokens.x" = [2, 4]'))


def test_an_unknown_sweep_is_told_with_the_closest():
    with pytest.raises(RegistryError, match=r"unknown sweep 'smok'.*Did you mean 'smoke'"):
        Sweep.read("smok")


@pytest.mark.slow
def test_a_run_makes_what_is_missing_and_nothing_twice(sweep, tmp_path):
    told = []
    found = run_sweep(sweep(), tmp_path / "out", launcher_options={"num_workers": 1}, report=told.append)
    assert found.state_counts == {"done": 1, "incompatible": 1}
    assert found.missing == []
    assert len(told) == 3
    assert "process overhead" in told[-1]
    before = (tmp_path / "out/results.jsonl").read_bytes()
    told.clear()
    run_sweep(sweep(), tmp_path / "out", report=told.append)
    assert told == ["2 of 2 rows are finished already"]
    assert (tmp_path / "out/results.jsonl").read_bytes() == before
    (tmp_path / "out/results.jsonl").write_bytes(before[:-20])  # cut in the middle of a line
    told.clear()
    found = run_sweep(sweep(), tmp_path / "out", launcher_options={"num_workers": 1}, report=told.append)
    assert "ends with an incomplete line" in told[0]
    assert found.missing == []
    assert len(ResultStore(tmp_path / "out").read_rows()) == 2
    found = run_sweep(
        sweep(),
        tmp_path / "out",
        launcher_options={"num_workers": 1},
        retry_states=("incompatible",),
        report=told.append,
    )
    assert found.state_counts == {"done": 1, "incompatible": 1}


def test_what_is_missing_is_known_at_any_instant(sweep, tmp_path):
    found = read_sweep_status(sweep(), tmp_path / "nothing")
    assert (found.num_rows, len(found.missing)) == (2, 2)


def test_two_runners_do_not_share_a_folder(tmp_path):
    with (
        ResultStore(tmp_path).lock(),
        pytest.raises(LockedError, match="is being written by another process"),
        ResultStore(tmp_path).lock(),
    ):
        pass


def test_a_full_disk_leaves_whole_rows(tmp_path):
    store = ResultStore(tmp_path)
    store.append({"key": "a"})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (store.path.stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot write"):
            store.append({"key": "b"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert [row["key"] for row in store.read_rows()] == ["a"]
    store.append({"key": "b"})
    assert [row["key"] for row in store.read_rows()] == ["a", "b"]


def test_a_broken_line_in_between_is_named(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"key": "a"}\n{"key": \n{"key": "b"}\n')
    with pytest.raises(InputError, match="line 2, is damaged"):
        ResultStore(tmp_path).read_rows()


def test_a_folder_of_a_row_that_is_gone_is_made_again(tmp_path):
    folder = ResultStore(tmp_path).make_row_folder("a")
    os.rmdir(folder)
    assert ResultStore(tmp_path).make_row_folder("a").is_dir()


def made(name, seed, score, speed, state="done"):
    timing = {"median": 1 / speed, "min": 0.9 / speed, "max": 1.1 / speed, "num_repeats": 5}
    stages = dict.fromkeys(("encode", "segment", "mix", "prefill", "decode"), timing)
    point = {"regions_per_image": 1, "stages": stages, "total": timing, "time_to_first_token": timing}
    point["regions_per_second"] = speed
    scores = [
        {"name": "class/accuracy", "value": score, "ci_low": score - 0.02, "ci_high": score + 0.02, "control": None}
    ]
    row = {
        "key": f"{name}{seed}",
        "label": f"{name} seed={seed}",
        "state": state,
        "reason": "" if state == "done" else "<b>",
    }
    row |= {"config": {"model": {"mixer": name}, "seed": seed}, "sweep": "s", "seconds": {}}
    if state == "done":
        row |= {
            "scores": scores,
            "throughput": [point, {**point, "regions_per_image": 8, "regions_per_second": 2 * speed}],
        }
        row |= {
            "memory": {"estimated": 2**30},
            "parameters": {"total": 10**6, "trainable": 10**5},
            "flops": {"encode": 1e9},
        }
    return row


@pytest.fixture
def rows():
    return [
        *(made("slow", seed, 0.9 + seed / 100, 10.0) for seed in range(3)),
        *(made("fast", seed, 0.5, 100.0) for seed in range(3)),
        made("bad", 0, 0.4, 5.0),
        made("gone", 0, 0, 1, state="crashed"),
    ]


def test_seeds_are_one_line_with_their_spread(rows):
    best, second, third = summarize_rows(rows, "class/accuracy")
    assert (best.label, best.quality, best.seed_scores) == ("slow", pytest.approx(0.91), (0.9, 0.91, 0.92))
    assert second.regions_per_second == {1: 100.0, 8: 200.0}
    assert third.label == "bad"


def test_a_front_is_what_nothing_is_better_than():
    assert find_pareto_front([(1, 3), (2, 2), (1.5, 2), (3, 1), (0.5, 0.5)]) == [3, 1, 0]


def test_a_report_has_everything_and_the_same_rows_give_the_same_bytes(rows):
    page = report.render_sweep_page(rows, "sweep s")
    assert page == report.render_sweep_page(list(reversed(rows)), "sweep s")
    assert "default-src 'none'" in page
    assert "&lt;b&gt;" in page
    assert "crashed" in page
    assert page.count("<svg") == 4
    assert 'class="dimmed"' in page
    assert page.count("sca bench row") == 3
    assert report.render_markdown(rows) == report.render_markdown(list(reversed(rows)))
    assert report.render_csv(rows) == report.render_csv(list(reversed(rows)))
    assert len(report.render_csv(rows).splitlines()) == 1 + 7 * 2 + 1


HOSTILE = "=cmd()|<img src=x>[a](http://evil) `x`\x1b[31m\n"


def test_report_shows_hostile_text_as_text(rows):
    for row in rows:
        row["label"] += HOSTILE
        row["reason"] = HOSTILE
        row["environment"] = {"device": HOSTILE, "versions": {"torch": HOSTILE}}
    page, told, table = report.render_sweep_page(rows, HOSTILE), report.render_markdown(rows), report.render_csv(rows)
    assert "<img" not in page + told
    assert "[a](" not in told
    assert "http:" not in told
    assert "\x1b" not in page + told
    assert all(line.startswith(("|", "-", "Regions per second", "Score: ", "")) for line in told.splitlines())
    assert f'"\'{HOSTILE}"' in table
    number = rows[0]["scores"][0]["value"]
    assert f",{number}," in table


def test_report_has_a_column_per_axis_and_per_score(rows):
    for row in rows:
        name = row["config"]["model"].pop("mixer")
        row["config"]["model"] |= {"encoder": {"name": "tiny"}, "mixer": {"name": name, "depth": 2}}
        row["config"]["train"] = {"steps": 10 if name == "bad" else 20}
        if "scores" in row:
            one = row["scores"][0]
            row["scores"] += [{**one, "name": "words", "value": 7}, {**one, "value": 0.1, "control": "wrong-region"}]
    told = report.render_markdown(rows)
    heads, _, first, *_ = [line.strip("| ").split(" | ") for line in told.splitlines()]
    assert heads[:3] == ["mixer", "train.steps", "seeds"]
    assert heads[-2:] == ["words", "class/accuracy, wrong-region"]
    assert [first[0], first[1], *first[-2:]] == ["slow(depth=2)", "20", "7", "10.0"]
    assert "all rows: encoder tiny" in told
    for cell in (*heads, *first):
        assert f">{cell}</" in report.render_sweep_page(rows, "sweep s")
    assert report.render_csv(rows).startswith('"key","label","mixer","train.steps","state"')


def test_diff_shows_the_digits_in_which_scores_differ(rows):
    again = json.loads(json.dumps(rows))
    for rerun, values in ((rows, (0.654321, 0.5)), (again, (0.654329, 0.5 + 2**-52))):
        for row, value in zip(rerun, values, strict=False):
            row["scores"][0]["value"] = value
    changed = diff_rows(rows, again).change_lines
    assert changed[0] == "slow seed=0: class/accuracy 65.432, then 65.433"
    assert changed[1] == "slow seed=1: class/accuracy 50, then 50.00000000000002"
    assert "mean 61.49, then" not in diff_rows(rows, again).score_lines[0]


def test_diff_summarizes_every_score(rows):
    for row in rows:
        for score in row.get("scores") or ():
            row["scores"] = [score, {**score, "control": "wrong-region"}]
    again = json.loads(json.dumps(rows))
    again[3]["scores"][0]["value"] = 0.25
    del again[4]["scores"][1]
    found = diff_rows(rows, again)
    assert found.score_lines == (
        "class/accuracy: 1 of 7 rows differ, mean 66.14, then 62.57",
        "class/accuracy, wrong-region: 1 of 7 rows differ, mean 68.83, then 68.83; missing in 1 of them",
    )
    assert found.change_lines == (
        "fast seed=0: class/accuracy 50, then 25",
        "fast seed=1: class/accuracy, wrong-region 50, then none",
    )
    assert set(found.score_lines) <= set(found.format_lines())


def test_a_second_run_is_held_against_the_first(rows):
    again = json.loads(json.dumps(rows))
    for point in again[0]["throughput"]:
        point["total"]["median"] *= 2
    again[3]["scores"][0]["value"] = 0.25
    again[-1]["state"] = "done"
    found = diff_rows(rows, again[:-2] + again[-1:])
    assert found.num_unmatched == (1, 0)
    assert found.share_inside == pytest.approx(1 - 2 / 84)
    assert found.median_width == pytest.approx(0.2)
    assert len(found.change_lines) == 2
