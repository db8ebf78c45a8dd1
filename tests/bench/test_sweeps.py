"""Sweeps: reading, ordering and errors; results: storage, repair and reports."""

import json
import os
import resource
import signal
import tomllib

import pytest
from sca_bench import report
from sca_bench.diff import diff_rows
from sca_bench.runner import RunSettings, read_sweep_status, run_sweep
from sca_bench.sections import SECTION_KEYS
from sca_bench.store import ResultStore
from sca_bench.summary import find_pareto_front, summarize_rows
from sca_bench.sweep import Sweep, list_sweeps
from sca_registry import RegistryError

from sca.io.errors import InputError, LockedError, OutputError
from sca.training.recipe import TrainOptions

BASE_SWEEP = """
[model]
encoder = { name = "tiny-vit", image_size = 64, hidden_size = 32, depth = 1, output_channels = 32, \
stem_channels = [8, 16] }
segmenter = "box"
language_model = { name = "tiny-gpt2", hidden_size = 32, depth = 1, num_heads = 2, max_positions = 40 }
task_tokens = 2
"""
SMALL_SWEEP = (
    BASE_SWEEP
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
def make_sweep(tmp_path):
    def write(text=SMALL_SWEEP):
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return Sweep.read(str(path))

    return write


@pytest.mark.parametrize("name", list_sweeps())
def test_bundled_sweep_has_unique_rows_sorted_by_size(name):
    rows = Sweep.read(name).list_rows()
    assert len({row.key for row in rows}) == len(rows) > 1
    assert [row.num_listed_parameters for row in rows] == sorted(row.num_listed_parameters for row in rows)


def test_sweep_rejects_too_many_combinations(make_sweep):
    axes = "".join(f'"mixer.a{number}" = {list(range(10))}\n' for number in range(10))
    with pytest.raises(
        RegistryError, match=r"mixer 2 x mixer.a0 10 x .* seeds 1\), and the maximum is 10,000"
    ) as caught:
        make_sweep(f'{BASE_SWEEP}[axes]\nmixer = ["roi-pool", "mask-tokens"]\n{axes}')
    assert "20,000,000,000 combinations" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_bundled_sweeps_have_sixty_smoke_rows_and_equally_large_mixers():
    import sca

    assert len(Sweep.read("smoke").list_rows()) == 60
    num_parameters = {}
    for row in Sweep.read("mixers").list_rows():
        model = sca.build(sca.ModelSpec.from_dict(row.config["model"]), "meta")
        num_parameters[row.config["model"]["mixer"]["name"]] = sum(each.numel() for each in model.mixer.parameters())
    transformer_sizes = [num_parameters[name] for name in ("query", "split", "resampler")]
    assert max(transformer_sizes) / min(transformer_sizes) < 1.05


def test_variants_change_several_values_together(make_sweep):
    sweep = make_sweep(
        BASE_SWEEP
        + """
[train]
steps = 5
[variants.box.model]
segmenter = "box"
[variants.sam]
model = { segmenter = "sam", task_tokens = 4 }
train = { steps = 7 }
[axes]
mixer = ["roi-pool", "mask-tokens"]
"train.batch_size" = [1, 2]
"""
    )
    settings = [each.settings for each in sweep.list_combinations(sweep.studies[0])]
    assert settings[0] == {"variant": "box", "mixer": "roi-pool", "train.batch_size": 1}
    assert len(settings) == 8
    rows = [row.config for row in sweep.list_rows("listed")]
    assert [(row["model"]["task_tokens"], row["train"]) for row in (rows[0], rows[7])] == [
        (2, {"steps": 5, "batch_size": 1}),
        (4, {"steps": 7, "batch_size": 2}),
    ]


def test_studies_share_tables_and_equal_rows(make_sweep):
    sweep = make_sweep(
        BASE_SWEEP.replace("task_tokens = 2", 'task_tokens = 2\nmixer = "roi-pool"')
        + """
[evaluate]
dataset = "scenes"
[studies.mixers]
summary = "mixers"
axes = { mixer = ["roi-pool", "mask-tokens"] }
[studies.prompts]
axes = { "evaluate.prompt_type" = ["box", "center"] }
evaluate = { split = "test" }
[studies.both]
axes = { mixer = ["roi-pool"] }
"""
    )
    assert [study.name for study in sweep.studies] == ["mixers", "prompts", "both"]
    assert len(sweep.list_rows()) == 4  # both is part of mixers
    prompts = [each.row.config["evaluate"] for each in sweep.list_combinations(sweep.studies[1])]
    assert prompts == [{"dataset": "scenes", "split": "test", "prompt_type": name} for name in ("box", "center")]


def test_variant_can_be_a_captioner(make_sweep):
    sweep = make_sweep(
        BASE_SWEEP.replace("task_tokens = 2", 'task_tokens = 2\nmixer = "roi-pool"')
        + """
[train]
steps = 5
[evaluate]
dataset = "scenes"
[variants.model]
[variants.baseline]
captioner = { name = "most-frequent", dataset = "scenes" }
"""
    )
    model, baseline = sweep.list_rows("listed")
    assert model.config["train"] == {"steps": 5}
    assert {*baseline.config} == {"captioner", "evaluate", "seed", "num_threads", "device"}
    assert baseline.label == "most-frequent(dataset=scenes) seed=0"
    assert baseline.make_recipes() == []


def test_stages_change_the_training_table(make_sweep):
    sweep = make_sweep(
        BASE_SWEEP.replace("task_tokens = 2", 'task_tokens = 2\nmixer = "roi-pool"')
        + """
[train]
steps = 5
learning_rate = 0.5
cache_features = true
data.scenes = { name = "scenes", num_images = 3 }
[[train.stages]]
steps = 9
class_name_prob = 1.0
data.names = { name = "scenes", num_images = 7 }
[[train.stages]]
"""
    )
    (row,) = sweep.list_rows()
    names, captions = row.make_recipes("cache")
    assert (names.train.steps, names.train.class_name_prob, names.train.learning_rate) == (9, 1.0, 0.5)
    assert (captions.train.steps, captions.train.class_name_prob) == (5, 0.1)  # of the recipe
    assert {name: source.dataset.options for name, source in names.data.items()} == {"names": {"num_images": 7}}
    assert {name: source.dataset.options for name, source in captions.data.items()} == {"scenes": {"num_images": 3}}
    assert [names.name, captions.name] == ["stage-1", "stage-2"]
    assert names.train.feature_cache_dir == captions.train.feature_cache_dir == "cache"


def test_row_key_depends_only_on_the_configuration(make_sweep):
    original_rows, rows_with_comment = (
        make_sweep().list_rows(),
        make_sweep(SMALL_SWEEP.replace("[axes]", "# a remark\n[axes]")).list_rows(),
    )
    assert [row.key for row in original_rows] == [row.key for row in rows_with_comment]
    changed_rows = make_sweep(SMALL_SWEEP.replace("max_new_tokens = 2", "max_new_tokens = 3")).list_rows()
    assert not {row.key for row in original_rows} & {row.key for row in changed_rows}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"roi-pool"', '"roi-pol"', "Did you mean 'roi-pool'"),
        ('["roi-pool", "mask-tokens"]', "[]", "the axis 'mixer' .* expected a list of one or more"),
        ('["roi-pool", "mask-tokens"]', '"roi-pool"', "expected a list"),
        ("[benchmark]", "[benchmrk]", "Did you mean 'benchmark'"),
        ("max_new_tokens = 2", "max_tokens = 2", "Did you mean 'max_new_tokens'"),
        ("[axes]", "seeds = []\n[axes]", "unknown field 'seeds'"),
        ("[axes]", "[variants.a]\nmodl = {}\n[axes]", "Did you mean 'model'"),
        ("[axes]", "[variants.a]\ntrain = { step = 1 }\n[axes]", "Did you mean 'steps'"),
        ("[axes]", "[axes]\nvariant = [1]", "the axis 'variant' of the sweep is reserved"),
        ("[axes]", '[axes]\n"train.steps" = [1]', r"changes \[train\], which the sweep does not have"),
        ("[axes]", '[train]\n[axes]\n"train.data.a.num_images" = [1]', "data of the axis .* is None; expected a table"),
        ("[axes]", '[train]\n[axes]\n"train.step" = [1]', "Did you mean 'steps'"),
        ("[axes]", "[train]\nstages = [{ stages = [] }]\n[axes]", r"stages\[1\] contains stages"),
        ("[axes]", "[train]\nstages = [{ step = 1 }]\n[axes]", "Did you mean 'steps'"),
        ("[axes]", "[studies.a]\n[axes]", "has axes beside studies"),
        ("[axes]", '[[comparisons]]\nclaim = "x"\n[axes]', "has no 'better'"),
        (
            "[axes]",
            '[[comparisons]]\nclaim = "x"\nbetter = { mixer = "query" }\nworse = { mixer = "roi-pool" }\n[axes]',
            "selects {'mixer': 'query'}, which no row has",
        ),
        (
            "[axes]",
            '[[comparisons]]\nclaim = "x"\nbetter = { mixr = "query" }\nworse = { mixer = "roi-pool" }\n[axes]',
            "Did you mean 'mixer'",
        ),
        (
            "[axes]",
            '[[comparisons]]\nclaim = "x"\nbetter = { mixer = "roi-pool" }\nworse = {}\n[axes]',
            "select values of the same axes in both",
        ),
        (
            "[axes]",
            '[[comparisons]]\nclaim = "x"\nbetter = { mixer = "roi-pool" }\nworse = { mixer = "roi-pool" }\n[axes]',
            "the comparison 'x' selects the same rows as better and as worse; select different values",
        ),
        (
            '"mask-tokens"]',
            '{ name = "roi-pool", pool_size = 3 }]\n[[comparisons]]\nclaim = "x"\nbetter = { mixer = "roi-pool" }\n'
            'worse = { mixer = "roi-pool" }\n',
            "which several values of the axis 'mixer' match",
        ),
        ("[axes]", "[evaluate]\n[axes]", "has no dataset"),
        (
            "[axes]",
            '[variants.a]\ncaptioner = "most-frequnet"\n[evaluate]\ndataset = "scenes"\n[axes]',
            "most-frequent",
        ),
        (
            "[axes]",
            '[variants.a]\ncaptioner = { name = "openai", url = "http://host/v1" }\n'
            '[evaluate]\ndataset = "scenes"\n[axes]',
            "a sweep cannot set the url of the captioner 'openai'; set the environment variable",
        ),
        ("task_tokens = 2", "task_token = 2", "Did you mean 'task_tokens'"),
        ("[axes]", "[axes", "is not valid TOML"),
        ("\n[model]", "\nseeds = [4294967296]\n[model]", "seeds is 4294967296; expected an integer from 0 to"),
        ("[axes]", '[evaluate]\ndataset = "scenes"\ntasks = []\n[axes]', "tasks is .*; expected a list of 1 or more"),
        (
            "[axes]",
            '[evaluate]\ndataset = "scenes"\nmetrics = []\n[axes]',
            "metrics is .*; expected a list of 1 or more",
        ),
        (
            "[axes]",
            '[evaluate]\ndataset = "scenes"\ngeneration = { num_beams = 0 }\n[axes]',
            "evaluate.generation.num_beams is 0; expected an integer of at least 1",
        ),
        (
            "[axes]",
            '[evaluate]\ndataset = "scenes"\ngeneration = { num_beams = "x" }\n[axes]',
            "evaluate.generation.num_beams is 'x'; expected an integer",
        ),
    ],
)
def test_sweep_rejects_wrong_fields_with_their_location(make_sweep, old, new, message):
    with pytest.raises(RegistryError, match=message):
        make_sweep(SMALL_SWEEP.replace(old, new))


COMPLETE_SWEEP = """
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
VALUES_OF_WRONG_TYPE = {
    str: (True, 1, ["x"]),
    int: (True, 1.5, "2", [1]),
    float: (True, "1", [1.0]),
    bool: (1, "true"),
    list: (3, True, "0,1", [[1]]),
    dict: (3, True, "sca-tiny", [1]),
    "part": (3, True, [1], {}),
}
FIELDS = [
    *((None, field, kind) for field, kind in (("summary", str), ("seeds", list), ("num_threads", int))),
    *((None, section, dict) for section in ("model", "axes", "train", "evaluate", "benchmark")),
    *((None, field, kind) for field, kind in (("variants", dict), ("studies", dict))),
    *(("train", field, kind) for field, kind in (("recipe", str), ("stages", list), ("data", dict), ("loss", dict))),
    *(("train", field, kind) for field, kind in (("cache_features", bool), ("keep_models", bool), ("stop_step", int))),
    *(
        (
            "train",
            field,
            next(kind for kind in VALUES_OF_WRONG_TYPE if isinstance(getattr(TrainOptions(), field), kind)),
        )
        for field in SECTION_KEYS["train"]
        if hasattr(TrainOptions(), field)
    ),
    *(
        ("evaluate", field, kind)
        for field, kind in (("split", str), ("prompt_type", str), ("tasks", list), ("caption_all", bool))
    ),
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
TYPE_MESSAGES = {
    str: "expected a string",
    int: "expected an integer",
    float: "expected a number",
    bool: "expected true or false",
    list: "expected a list of",
    dict: "expected a table",
    "part": "expected a name, or a dict or table with a name",
}


def test_sweep_type_test_covers_every_field():
    known = {(section, field) for section, fields in SECTION_KEYS.items() for field in fields}
    assert known <= {(section, field) for section, field, _ in FIELDS}


@pytest.mark.parametrize(("section", "field", "field_type"), FIELDS)
def test_sweep_rejects_a_wrong_type_in_any_field(tmp_path, section, field, field_type):
    for value in VALUES_OF_WRONG_TYPE[field_type]:
        table = tomllib.loads(COMPLETE_SWEEP)
        (table if section is None else table[section])[field] = value
        path = tmp_path / "mine.toml"
        path.write_text("".join(f"{key} = {format_inline_toml(each)}\n" for key, each in table.items()))
        with pytest.raises(RegistryError) as caught:
            Sweep.read(str(path))
        message = str(caught.value)
        assert field in message
        assert TYPE_MESSAGES[field_type] in message
        assert "\n" not in message


def format_inline_toml(value):
    """Format a value in TOML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {format_inline_toml(each)}' for key, each in value.items()) + "}"
    return f"[{', '.join(map(format_inline_toml, value))}]" if isinstance(value, list) else json.dumps(value)


def test_sweep_read_reports_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "latin.toml"
    path.write_bytes(b'summary = "caf\xe9"')
    with pytest.raises(ValueError, match=r"latin\.toml is not UTF-8"):
        Sweep.read(str(path))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('mixer = ["roi-pool"', 'mixer = [{ name = "roi-pool", dpth = 2 }', "mixer 'roi-pool' has no option 'dpth'"),
        ("image_size = 64", 'image_size = "64"', "encoder 'tiny-vit': image_size is '64'; expected an integer"),
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
            "evaluate.generation.temperature is 'x'; expected a number",
        ),
        (
            "[axes]",
            '[evaluate]\ndataset = { name = "jsonl", file = "FOLDER/a.jsonl" }\nmetrics = ["class"]\n[axes]',
            "metric 'class': needs task=recognition, truth.name",
        ),
        ("task_tokens = 2", "task_tokens = 2\ngeneration = { beans = 3 }", "generation has no option 'beans'"),
        (
            "[axes]",
            "[train]\nprompt_weights = { circle = 1.0 }\n[axes]",
            "unknown key 'circle' in train.prompt_weights",
        ),
        ("[axes]", '[train]\nrecipe = "sca-tny"\n[axes]', "Did you mean 'sca-tiny'"),
        (
            "task_tokens = 2",
            'task_tokens = 2\nlora = 4\ntrainable = ["mixer"]\n[train]\nsteps = 1',
            "lora=4 is not trainable",
        ),
    ],
)
def test_run_sweep_checks_all_rows_before_the_first(make_sweep, tmp_path, old, new, message):
    line = {"image": "a.png", "box": [0, 0, 4, 4], "caption": "a dog", "width": 8, "height": 8}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=message):
        run_sweep(
            make_sweep(SMALL_SWEEP.replace(old, new.replace("FOLDER", str(tmp_path)))),
            tmp_path / "out",
            RunSettings(launcher_options={"num_workers": 1}, report=lambda line: None),
        )
    assert not ResultStore(tmp_path / "out").read_rows()


def test_run_sweep_rejects_missing_extra_before_the_first_row(make_sweep, tmp_path, monkeypatch):
    monkeypatch.setattr("sca_registry.component_states.is_extra_installed", lambda distribution, extra: False)
    for text in (
        SMALL_SWEEP.replace('encoder = { name = "tiny-vit"', 'encoder = { name = "timm"'),
        SMALL_SWEEP.replace("[axes]", '[evaluate]\ndataset = "scenes"\nmetrics = ["meteor"]\n[axes]'),
    ):
        with pytest.raises(
            RegistryError, match=r"needs the extra '\w+'; install it with: pip install 'segment-caption-anything"
        ):
            run_sweep(make_sweep(text), tmp_path / "out", RunSettings(report=lambda line: None))


def test_sweep_axis_sets_option_of_shorthand_value(make_sweep):
    rows = make_sweep(
        SMALL_SWEEP.replace("[axes]", '[axes]\n"lora.rank" = [2, 4]').replace("task_tokens = 2", "lora = 8")
    ).list_rows()
    assert sorted({row.config["model"]["lora"]["rank"] for row in rows}) == [2, 4]
    with pytest.raises(RegistryError, match=r"model\.task_tokens is 2; expected a table"):
        make_sweep(SMALL_SWEEP.replace("[axes]", '[axes]\n"task_tokens.x" = [2, 4]'))


def test_sweep_read_suggests_closest_name():
    with pytest.raises(RegistryError, match=r"unknown sweep 'smok'.*Did you mean 'smoke'"):
        Sweep.read("smok")


@pytest.mark.slow
def test_run_sweep_runs_only_missing_rows(make_sweep, tmp_path):
    messages = []
    settings = RunSettings(launcher_options={"num_workers": 1}, report=messages.append)
    status = run_sweep(make_sweep(), tmp_path / "out", settings)
    assert status.state_counts == {"done": 1, "incompatible": 1}
    assert status.missing == []
    assert len(messages) == 3
    assert "process overhead" in messages[-1]
    original_bytes = (tmp_path / "out/results.jsonl").read_bytes()
    messages.clear()
    run_sweep(make_sweep(), tmp_path / "out", settings)
    assert messages == ["2 of 2 rows are finished already"]
    assert (tmp_path / "out/results.jsonl").read_bytes() == original_bytes
    (tmp_path / "out/results.jsonl").write_bytes(original_bytes[:-20])  # truncated in the middle of a line
    messages.clear()
    status = run_sweep(make_sweep(), tmp_path / "out", settings)
    assert "ends with an incomplete line" in messages[0]
    assert status.missing == []
    assert len(ResultStore(tmp_path / "out").read_rows()) == 2
    status = run_sweep(make_sweep(), tmp_path / "out", settings, retry_states=("incompatible",))
    assert status.state_counts == {"done": 1, "incompatible": 1}


def test_read_sweep_status_counts_all_rows_of_a_new_folder_as_missing(make_sweep, tmp_path):
    status = read_sweep_status(make_sweep(), tmp_path / "nothing")
    assert (status.num_rows, len(status.missing)) == (2, 2)


def test_result_store_rejects_a_second_lock(tmp_path):
    with (
        ResultStore(tmp_path).lock(),
        pytest.raises(LockedError, match="is being written by another process"),
        ResultStore(tmp_path).lock(),
    ):
        pass


def test_result_store_keeps_complete_rows_on_a_full_disk(tmp_path):
    store = ResultStore(tmp_path)
    store.append({"key": "a"})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (store.path.stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot write"):
            store.append({"key": "b"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous_handler)
    assert [row["key"] for row in store.read_rows()] == ["a"]
    store.append({"key": "b"})
    assert [row["key"] for row in store.read_rows()] == ["a", "b"]


def test_result_store_reports_damaged_line(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"key": "a"}\n{"key": \n{"key": "b"}\n')
    with pytest.raises(InputError, match="line 2, is damaged"):
        ResultStore(tmp_path).read_rows()


def test_result_store_recreates_missing_row_folder(tmp_path):
    folder = ResultStore(tmp_path).make_row_folder("a")
    os.rmdir(folder)
    assert ResultStore(tmp_path).make_row_folder("a").is_dir()


def make_row(name, seed, score, speed, state="done"):
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
        *(make_row("slow", seed, 0.9 + seed / 100, 10.0) for seed in range(3)),
        *(make_row("fast", seed, 0.5, 100.0) for seed in range(3)),
        make_row("bad", 0, 0.4, 5.0),
        make_row("gone", 0, 0, 1, state="crashed"),
    ]


def test_summarize_rows_groups_seeds_with_their_spread(rows):
    best, second, third = summarize_rows(rows, "class/accuracy")
    assert (best.label, best.quality, best.seed_scores) == ("slow", pytest.approx(0.91), (0.9, 0.91, 0.92))
    assert second.regions_per_second == {1: 100.0, 8: 200.0}
    assert third.label == "bad"


def test_find_pareto_front_returns_nondominated_points():
    assert find_pareto_front([(1, 3), (2, 2), (1.5, 2), (3, 1), (0.5, 0.5)]) == [3, 1, 0]


def test_sweep_report_is_complete_and_deterministic(rows):
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


HOSTILE_TEXT = "=cmd()|<img src=x>[a](http://evil) `x`\x1b[31m\n"


def test_sweep_report_escapes_hostile_text(rows):
    for row in rows:
        row["label"] += HOSTILE_TEXT
        row["reason"] = HOSTILE_TEXT
        row["environment"] = {"device": HOSTILE_TEXT, "versions": {"torch": HOSTILE_TEXT}}
    page, markdown, csv = (
        report.render_sweep_page(rows, HOSTILE_TEXT),
        report.render_markdown(rows),
        report.render_csv(rows),
    )
    assert "<img" not in page + markdown
    assert "[a](" not in markdown
    assert "http:" not in markdown
    assert "\x1b" not in page + markdown
    assert all(line.startswith(("|", "-", "Regions per second", "Score: ", "")) for line in markdown.splitlines())
    assert f'"\'{HOSTILE_TEXT}"' in csv
    score_value = rows[0]["scores"][0]["value"]
    assert f",{score_value}," in csv


def test_sweep_report_has_a_column_per_axis_and_per_score(rows):
    for row in rows:
        name = row["config"]["model"].pop("mixer")
        row["config"]["model"] |= {"encoder": {"name": "tiny"}, "mixer": {"name": name, "depth": 2}}
        row["config"]["train"] = {"steps": 10 if name == "bad" else 20}
        if "scores" in row:
            score = row["scores"][0]
            row["scores"] += [
                {**score, "name": "words", "value": 7},
                {**score, "value": 0.1, "control": "wrong-region"},
            ]
    markdown = report.render_markdown(rows)
    header, _, first, *_ = [line.strip("| ").split(" | ") for line in markdown.splitlines()]
    assert header[:3] == ["mixer", "train.steps", "seeds"]
    assert header[-2:] == ["words", "class/accuracy, wrong-region"]
    assert [first[0], first[1], *first[-2:]] == ["slow(depth=2)", "20", "7", "10.0"]
    assert "all rows: encoder tiny" in markdown
    for cell in (*header, *first):
        assert f">{cell}</" in report.render_sweep_page(rows, "sweep s")
    assert report.render_csv(rows).startswith('"key","label","mixer","train.steps","state"')


def test_diff_rows_shows_the_digits_in_which_scores_differ(rows):
    changed_rows = json.loads(json.dumps(rows))
    for run_rows, values in ((rows, (0.654321, 0.5)), (changed_rows, (0.654329, 0.5 + 2**-52))):
        for row, value in zip(run_rows, values, strict=False):
            row["scores"][0]["value"] = value
    change_lines = diff_rows(rows, changed_rows).change_lines
    assert change_lines[0] == "slow seed=0: class/accuracy 65.432, then 65.433"
    assert change_lines[1] == "slow seed=1: class/accuracy 50, then 50.00000000000002"
    assert "mean 61.49, then" not in diff_rows(rows, changed_rows).score_lines[0]


def test_diff_rows_summarizes_every_score(rows):
    for row in rows:
        for score in row.get("scores") or ():
            row["scores"] = [score, {**score, "control": "wrong-region"}]
    changed_rows = json.loads(json.dumps(rows))
    changed_rows[3]["scores"][0]["value"] = 0.25
    del changed_rows[4]["scores"][1]
    diff = diff_rows(rows, changed_rows)
    assert diff.score_lines == (
        "class/accuracy: 1 of 7 rows differ, mean 66.14, then 62.57",
        "class/accuracy, wrong-region: 1 of 7 rows differ, mean 68.83, then 68.83; missing in 1 of them",
    )
    assert diff.change_lines == (
        "fast seed=0: class/accuracy 50, then 25",
        "fast seed=1: class/accuracy, wrong-region 50, then none",
    )
    assert set(diff.score_lines) <= set(diff.format_lines())


def test_diff_rows_reports_unmatched_and_changed_rows(rows):
    changed_rows = json.loads(json.dumps(rows))
    for point in changed_rows[0]["throughput"]:
        point["total"]["median"] *= 2
    changed_rows[3]["scores"][0]["value"] = 0.25
    changed_rows[-1]["state"] = "done"
    diff = diff_rows(rows, changed_rows[:-2] + changed_rows[-1:])
    assert diff.num_unmatched == (1, 0)
    assert diff.share_inside == pytest.approx(1 - 2 / 84)
    assert diff.median_width == pytest.approx(0.2)
    assert len(diff.change_lines) == 2
