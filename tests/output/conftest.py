import numpy as np
import pytest
from PIL import Image
from sca_registry.contracts import Caption, Prompt

from sca.io import masks

HOSTILE_TEXTS = (
    "\"quoted\" and 'single'",
    "two\nlines\r\nand\u2028more\x00\x1b[31m",
    "emoji 😀 and 日本語",
    "</script><script>alert(1)</script>",
    '<img src=x onerror=alert(1)> " onmouseover="alert(1)',
    "<!-- --> ]]> {{x}} ${y} \\ `z`",
    "half a pair \ud83d",
    "",
)


@pytest.fixture
def noise_image():
    """Image of 40 x 30 noise pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8))


@pytest.fixture
def captions():
    """Four regions of a 40 x 30 image: with a mask, with a box only, with neither, and with a mask prompt."""
    disc_mask = np.hypot(*np.mgrid[-12:18, -15:25]) < 8
    square_mask = np.zeros((30, 40), bool)
    square_mask[20:28, 30:38] = True
    point_prompt = Prompt(points=((15.0, 12.0, 1), (1.0, 1.0, 0)))
    return [
        Caption("a disc", 0.75, masks.mask_to_box(disc_mask), masks.encode_rle(disc_mask), 0.5, point_prompt, 0),
        Caption("a box", 0.5, (1.5, 2.0, 10.0, 12.25), None, None, Prompt(box=(1.5, 2.0, 10.0, 12.25)), 1),
        Caption("a point", np.float32(0.25), None, None, None, Prompt(points=((5, 6, 1),)), 2),
        Caption(
            "a square",
            1.0,
            masks.mask_to_box(square_mask),
            masks.encode_rle(square_mask),
            np.float32(1),
            Prompt(mask=square_mask),
            3,
        ),
    ]


@pytest.fixture
def hostile_captions():
    return [
        Caption(text, 0.5, (1, 1, 9, 9), None, None, Prompt(box=(1, 1, 9, 9)), n)
        for n, text in enumerate(HOSTILE_TEXTS)
    ]
