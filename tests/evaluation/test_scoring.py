"""What cannot be scored says what would change that."""

import sys

import pytest

from sca.evaluation.scoring import score_records

RECORD = {
    **{"image_id": 1, "region_id": 1, "task": "caption", "caption": "a dog", "references": ["a dog"]},
    "truth": {"phrases": ["a dog"], "name": None},
}


def test_a_metric_whose_package_is_not_installed_says_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider_scorer", None)
    settings = {"tokenizer": "plain"}
    with pytest.raises(ValueError, match=r"'cider-d': needs pycocoevalcap.*: pip install '.*\[metrics\]'"):
        score_records([RECORD], ["cider-d"], settings)


def test_protocol_id_depends_on_the_version_of_the_search():
    settings, run = {"tokenizer": "plain"}, {"proposer": {"name": "grid"}}
    scored = [
        score_records([RECORD], ["rouge-l"], settings, run={**run, **more}) for more in ({}, {"search_version": 2})
    ]
    assert scored[0].scores[0].protocol_id != scored[1].scores[0].protocol_id
