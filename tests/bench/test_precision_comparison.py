"""`sca bench precision`: what a precision changes next to float32."""

from types import SimpleNamespace

import numpy as np
from sca_bench.precision_comparison import PrecisionRow, build_table, compute_mask_ious, list_scores_outside

from sca.cli.options import print_table
from sca.io.masks import encode_rle


def make_record(columns):
    mask = np.zeros((4, 8), dtype=bool)
    mask[:, :columns] = True
    return {"mask": encode_rle(mask)}


def make_row(**fields):
    defaults = {"precision": "int8", "applied": "int8 (2 linear layers), float32", "num_predictions": 4}
    defaults |= {"mask_iou_mean": 0.99, "mask_iou_percentile": 0.9, "share_equal_captions": 0.75}
    defaults |= {"seconds_per_image": (0.1, 0.25), "score_differences": (), "scores_outside": ("class/accuracy",)}
    return PrecisionRow(**defaults | fields)


def test_mask_ious_of_pairs():
    pairs = [(make_record(4), make_record(2)), (make_record(0), make_record(0)), (make_record(3), {"mask": None})]
    assert compute_mask_ious(pairs).tolist() == [0.5, 1.0]


def test_scores_outside_are_those_outside_the_interval_of_float32():
    scores = [
        SimpleNamespace(name=name, ci_low=low, ci_high=high, control=None)
        for name, low, high in (("inside", 0.1, 0.3), ("below", 0.1, 0.3), ("above", 0.1, 0.3), ("unknown", None, None))
    ]
    control = SimpleNamespace(name="inside", ci_low=0.8, ci_high=0.9, control="wrong-region")
    values = {"inside": 0.3, "below": 0.05, "above": 0.4, "unknown": 0.9}
    comparison = SimpleNamespace(
        first=SimpleNamespace(scoring=SimpleNamespace(scores=[*scores, control])),
        differences=[SimpleNamespace(name=name, second=value) for name, value in values.items()],
    )
    assert list_scores_outside(comparison) == ["below", "above"]


def test_precision_table_has_a_line_per_precision(capsys):
    print_table(build_table("sca-tiny", "scenes test", [make_row(), make_row(mask_iou_mean=None, scores_outside=())]))
    first, second = (line for line in capsys.readouterr().out.splitlines() if "int8 (2" in line)
    for cell in ("0.9900", "0.9000", "75.0%", "100.0", "2.50x", "class/accuracy"):
        assert cell in first
    assert "0.9900" not in second
    assert "none" in second
