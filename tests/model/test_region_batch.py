"""Rows of regions: groups by image and chunks."""

import pytest
import torch

from sca.nn.region_batch import is_cpu_inference, iter_rows_by_image, split_rows


def test_rows_by_image_are_consecutive():
    image_index = torch.tensor([0, 0, 2, 2, 2])
    assert [*iter_rows_by_image(image_index, 3)] == [(0, slice(0, 2)), (2, slice(2, 5))]


def test_rows_by_image_of_one_image_do_not_depend_on_their_number():
    assert [*iter_rows_by_image(torch.zeros(4, dtype=torch.long), 1)] == [(0, slice(None))]
    assert [*iter_rows_by_image(torch.zeros(0, dtype=torch.long), 1)] == []


@pytest.mark.parametrize(
    ("num_rows", "rows_per_chunk", "expected"),
    [
        (5, None, [slice(None)]),
        (5, 3, [slice(0, 3), slice(3, 6)]),
        (2, 0, [slice(0, 1), slice(1, 2)]),  # at least one row per chunk
        (0, 3, []),
    ],
)
def test_split_rows_returns_consecutive_slices(num_rows, rows_per_chunk, expected):
    assert split_rows(num_rows, rows_per_chunk) == expected


def test_cpu_inference_excludes_training():
    values = torch.zeros(1)
    assert not is_cpu_inference(values)
    with torch.no_grad():
        assert is_cpu_inference(values)
