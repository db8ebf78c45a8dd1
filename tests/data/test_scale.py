"""Visual Genome's size is no matter of memory: conversion streams, and a table is opened and not read."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

WHOLE = (108_077, 50)  # images and regions of each: 5.4 million, as Visual Genome has
LINKS = 50_000  # names that one file can have
MEASURED = """
import re, sys, time
from sca.data.visual_genome import VisualGenome
start = time.perf_counter()
found = VisualGenome("train", root=sys.argv[1])
peak = re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]  # without what the parent had
print(len(found), time.perf_counter() - start, int(peak) / 2**20)
"""


def generated(root, images, regions):
    """Files as the publishers' are, with one picture under many names."""
    (root / "VG_100K").mkdir(parents=True)
    for number in range(images):
        first = number - number % LINKS
        if number == first:
            Image.new("RGB", (64, 48)).save(root / f"VG_100K/{first}.jpg")
        else:
            os.link(root / f"VG_100K/{first}.jpg", root / f"VG_100K/{number}.jpg")
    sizes = [{"image_id": n, "width": 64, "height": 48, "url": f"VG_100K/{n}.jpg"} for n in range(images)]
    (root / "image_data.json").write_text(json.dumps(sizes))
    (root / "densecap_splits.json").write_text(json.dumps({"train": list(range(images)), "val": [], "test": []}))
    with (root / "region_descriptions.json").open("w") as file:
        file.write("[")
        for n in range(images):
            told = [
                {
                    **{
                        "region_id": n * regions + k,
                        "image_id": n,
                        "x": k % 40,
                        "y": k % 30,
                        "width": 20,
                        "height": 15,
                    },
                    "phrase": f"a thing of number {k} beside another thing in picture {n}",
                }
                for k in range(regions)
            ]
            file.write(("," if n else "") + json.dumps({"id": n, "regions": told}))
        file.write("]")


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is measured as Linux tells it")
@pytest.mark.parametrize("images", [2_000, pytest.param(WHOLE[0], marks=pytest.mark.all)])
def test_conversion_streams_and_a_table_is_opened_without_being_read(tmp_path, images):
    generated(tmp_path / "vg", images, WHOLE[1])

    def opened():
        environment = {**os.environ, "SCA_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, "-c", MEASURED, str(tmp_path / "vg")]
        said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        count, seconds, gib = map(float, said.split())
        assert count == images
        return seconds, gib

    first, second = opened(), opened()
    print(f"{images} images: converted in {first[0]:.1f} s with {first[1]:.2f} GiB; opened in {second[0]:.2f} s")
    assert first[1] < 2.5
    assert second[1] < 0.6  # whatever its size
