"""`sca bench speedup everything`: the generators find the same masks with the same weights."""

import re
import sys

import pytest
import torch
from sca_bench.everything_workload import choose_threshold, make_image, match_masks
from sca_bench.mask_generators import build_library_sam, build_original_sam
from sca_bench.published_comparison import run_comparisons
from sca_bench.published_procedure import ComparisonSettings
from sca_bench.timing import measure_peak_memory

import sca
from sca.io.masks import encode_rle
from sca.testing.tiny import get_tiny_options

TINY_SAM = {"name": "sam", **get_tiny_options("encoder", "sam")}
TINY_LANGUAGE_MODEL = {"name": "tiny-gpt2", "hidden_size": 32, "depth": 2, "num_heads": 2, "max_positions": 64}
POINTS_PER_SIDE = 9


@pytest.fixture
def settings():
    return ComparisonSettings(TINY_SAM, TINY_LANGUAGE_MODEL, num_repeats=1, points_per_side=POINTS_PER_SIDE)


@pytest.mark.slow
def test_generators_find_equal_masks_with_identical_captions(settings):
    pytest.importorskip("segment_anything", reason="the dependency group `references` is not installed")
    rows = {
        quantity: (unit, ours, other, note)
        for quantity, unit, ours, other, note in run_comparisons(["everything"], settings)
    }
    units = {quantity: row[0] for quantity, row in rows.items()}
    expected_units = {"everything mode, captions of the masks": "regions/s"}
    has_memory = measure_peak_memory(lambda: None, "cpu") is not None
    for name in ("SamAutomaticMaskGenerator", "pipeline"):
        label = f"everything mode vs. {name}"
        expected_units |= {f"{label}, masks": "images/s", f"{label}, masks and captions": "images/s"}
        expected_units |= {f"{label}, memory": "GiB"} if has_memory else {}
    assert units == expected_units
    assert all(ours > 0 and other > 0 for _, ours, other, _ in rows.values())
    for name in ("SamAutomaticMaskGenerator", "pipeline"):
        note = rows[f"everything mode vs. {name}, masks"][3]
        counts = re.fullmatch(r"(\d+) and (\d+) masks of 81 points; mean IoU 1.0000, equal: 100.0%", note).groups()
        assert counts[0] == counts[1]
        assert int(counts[0]) in (7, 8, 9)  # 100 of 1,024
    assert rows["everything mode, captions of the masks"][3] == "identical: 100.0%"


@pytest.mark.parametrize("build_sam", [build_original_sam, build_library_sam])
def test_other_models_share_the_parameters(build_sam):
    if build_sam is build_original_sam:
        pytest.importorskip("segment_anything", reason="the dependency group `references` is not installed")
    model = sca.compose(TINY_SAM, "query", TINY_LANGUAGE_MODEL, weights=False)
    pointers = {each.data_ptr() for part in (model.encoder, model.segmenter) for each in part.state_dict().values()}
    other = build_sam(model.encoder, model.segmenter)
    assert {each.data_ptr() for each in other.state_dict().values()} == pointers


def test_everything_without_the_original_code_states_what_to_install(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    with pytest.raises(ValueError, match="pip install segment-anything torchvision"):
        next(run_comparisons(["tiny", "everything"], settings))


def test_threshold_is_in_the_widest_gap_near_the_count():
    values = torch.cat((torch.linspace(2.0, 1.5, 102), torch.linspace(1.0, 0.0, 200)))
    assert choose_threshold(values[torch.randperm(len(values))], 100) == pytest.approx(1.25)
    assert choose_threshold(torch.tensor([3.0, 1.0]), 1) == 2.0


def test_masks_are_matched_by_iou():
    images = torch.zeros(3, 4, 6, dtype=torch.bool)
    images[0, :, :3] = images[1, :, 3:] = images[2, :2, 3:] = True
    first, second, half = (encode_rle(image.numpy()) for image in images)
    matches, ious = match_masks([first, half], [second, first])
    assert matches.tolist() == [1, 0]
    assert ious.tolist() == [0.5, 1.0]


def test_image_has_the_size_of_the_model_input():
    assert make_image(96).size == (96, 96)


def test_peak_memory_contains_what_a_function_frees():
    peak = measure_peak_memory(lambda: torch.ones(2**23).sum(), "cpu")
    if peak is None:
        pytest.skip("the operating system does not measure it")
    assert 0.9 * 2**25 < peak < 2**27
