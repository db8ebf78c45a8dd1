"""Startup: commands import only what they need."""

import json
import subprocess
import sys

import pytest

from sca.io.terminal import Table

CAPTION_PROGRAM = """
import json, sys
from sca.cli import run_command
assert run_command(["caption", *json.loads(sys.argv[1])]) == 0
unused = {"transformers", "peft", "accelerate", "torchvision", "torch._dynamo", "sympy"} & set(sys.modules)
assert not unused, f"sca caption imported {unused}"
"""


@pytest.mark.parametrize("model", ["sca-tiny", "sca-street"])
@pytest.mark.slow
def test_caption_with_a_bundled_model_imports_no_transformers(model, scene, tmp_path):
    scene.image.save(tmp_path / "scene.png")
    arguments = [str(tmp_path / "scene.png"), "--model", model, "--box", "5,5,60,60", "--out", str(tmp_path / "out")]
    completed = subprocess.run(
        [sys.executable, "-c", CAPTION_PROGRAM, json.dumps(arguments)], capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stderr


def test_table_without_frame_wraps_its_widest_column():
    table = Table(("name", "count", "summary"), right_aligned=("count",), has_frame=False)
    table.add_row("a", "7", "a long summary of more than twenty characters")
    table.add_row("\u4e2d\u6587", "10", "short\x1b[1m")
    assert table.format_lines(120) == [
        "name  count  summary",
        "a         7  a long summary of more than twenty characters",
        "\u4e2d\u6587     10  short\\x1b[1m",
    ]
    assert table.format_lines(40) == [
        "name  count  summary",
        "a         7  a long summary of more than",
        "             twenty characters",
        "\u4e2d\u6587     10  short\\x1b[1m",
    ]
