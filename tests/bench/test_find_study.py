"""The study of the search by text, at the smallest size, and the texts that it draws."""

import json

import pytest

import find
from sca.data.scenes import Scenes


def test_drawn_texts_fit_their_region_only_or_none_at_all():
    scenes = [Scenes("test", num_images=3, seed=find.SEED)[index] for index in range(3)]
    texts = find.draw_texts(scenes)
    for each in texts:
        assert find.list_matches(each.text, scenes[each.scene].regions) == (
            [] if each.target is None else [each.target]
        )
    targets = [each.target for each in texts]
    assert targets.count(None) == len(targets) / 2 > 0


@pytest.mark.slow
def test_find_study_compares_all_scores_and_writes_its_results(tmp_path, capsys):
    out = tmp_path / "results.json"
    find.main(["--num-scenes", "2", "--num-searched-scenes", "1", "--num-timed-images", "2", "--out", str(out)])
    results = json.loads(out.read_text())
    assert [*results["true_boxes"]] == [*results["found_boxes"]] == [*find.METHODS]
    assert results["true_boxes"][find.USED_METHOD]["top1"] > 0.8
    assert results["speed"]["search_seconds"] < results["speed"]["caption_seconds"]
    assert capsys.readouterr().out.strip().endswith(list(find.iter_result_lines(results))[-1])
