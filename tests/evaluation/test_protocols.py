"""Published evaluation protocols by name."""

from types import SimpleNamespace

import pytest
import sca_registry
from sca_registry import RegistryError

from sca.evaluation import protocol


@pytest.mark.parametrize("name", protocol.list_protocols())
def test_protocol_names_existing_metrics_datasets_and_proposers(name):
    loaded_protocol = protocol.read_protocol(name)
    assert loaded_protocol.summary
    assert "arXiv" in loaded_protocol.source
    for metric in loaded_protocol.metrics:
        assert metric in sca_registry.metrics
    for run in loaded_protocol.runs:
        assert run.prompting
        assert set(run.dataset_options) <= set(sca_registry.datasets.load_entry(run.dataset).options)
        assert run.proposer is None or run.proposer in sca_registry.proposers
        for values in run.published.values():
            assert 0 < len(values) <= len(run.scores)
            assert all(0 < value < 2 for value in values)


def test_protocol_main_table_matches_the_paper():
    (run,) = protocol.read_protocol("vg-region-captioning").runs
    published_scores = dict(zip(run.scores, run.published["SCA GPT2-large, pretrained, VG"], strict=True))
    assert (published_scores["cider-d"], published_scores["meteor"], published_scores["spice"]) == (1.498, 0.175, 0.314)
    assert run.generation == {"num_beams": 3}


def test_read_protocol_suggests_closest_name():
    with pytest.raises(RegistryError, match="Did you mean 'vg-region-captioning'"):
        protocol.read_protocol("vg-region-captionin")


def test_comparison_table_lists_published_rows_above_measured_ones():
    (run,) = protocol.read_protocol("refcocog-reg").runs
    table = protocol.build_comparison_table(run, "mine", {"meteor": 0.2}, "a paper")
    assert table.rows[-1][:3] == ("mine", "20.0", "–")
    assert table.rows[0] == ("Visdif (trained) (published)", "14.5")


def test_available_metrics_raises_the_first_reason_if_no_metric_is_available():
    with pytest.raises(RegistryError, match="jar"):
        protocol.find_available_metrics(SimpleNamespace(metrics=("spice", "clip-score")), {})
    assert protocol.find_available_metrics(SimpleNamespace(metrics=("spice", "class")), {}) == (["class"], ["spice"])
