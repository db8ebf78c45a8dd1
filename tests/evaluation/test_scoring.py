"""Errors of scoring contain a fix."""

import sys

import pytest

from sca.evaluation.scoring import COMPARABLE_RUN_KEYS, compute_protocol_id, score_records

RECORD = {
    **{"image_id": 1, "region_id": 1, "task": "caption", "caption": "a dog", "references": ["a dog"]},
    "truth": {"phrases": ["a dog"], "name": None},
}


def test_score_records_reports_install_command_of_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider_scorer", None)
    metric_options = {"tokenizer": "plain"}
    with pytest.raises(ValueError, match=r"'cider-d': needs pycocoevalcap.*: pip install '.*\[metrics\]'"):
        score_records([RECORD], ["cider-d"], metric_options)


def test_protocol_id_depends_on_search_version():
    metric_options, run = {"tokenizer": "plain"}, {"proposer": {"name": "grid"}}
    scored = [
        score_records([RECORD], ["rouge-l"], metric_options, run={**run, **search_fields})
        for search_fields in ({}, {"search_version": 2})
    ]
    assert scored[0].scores[0].protocol_id != scored[1].scores[0].protocol_id


def test_protocol_id_depends_on_zoom_only_if_it_is_on():
    metric_options, run = {"tokenizer": "plain"}, {"prompt_type": "box", "seed": 0}
    ids = [
        score_records([RECORD], ["rouge-l"], metric_options, run={**run, **zoom_fields}).scores[0].protocol_id
        for zoom_fields in ({}, {"zoom": {"max_cells": 4.0}}, {"zoom": {"max_cells": 5.0}})
    ]
    assert len(set(ids)) == 3
    run_facts = {key: run.get(key) for key in COMPARABLE_RUN_KEYS}
    implementation = score_records([RECORD], ["rouge-l"], metric_options, run=run).scores[0].implementation
    shared_options = {"references": "all", "tokenizer": "plain"}
    assert ids[0] == compute_protocol_id(run_facts, "rouge-l", None, shared_options, implementation)
