"""Conversion and opening of a dataset of Visual Genome's size need constant memory."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

VISUAL_GENOME_SIZE = (108_077, 50)  # images, and regions per image: 5.4 million regions, as in Visual Genome
MAX_LINKS_PER_FILE = 50_000  # hard links per file
MEASUREMENT_SCRIPT = """
import re, sys, time
from sca.data.visual_genome import VisualGenome
start = time.perf_counter()
found = VisualGenome("train", root=sys.argv[1])
peak = re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]  # without what the parent had
print(len(found), time.perf_counter() - start, int(peak) / 2**20)
"""


def write_visual_genome(root, num_images, regions_per_image):
    """Write files in the published layout, with one image under many names."""
    (root / "VG_100K").mkdir(parents=True)
    for number in range(num_images):
        linked_id = number - number % MAX_LINKS_PER_FILE
        if number == linked_id:
            Image.new("RGB", (64, 48)).save(root / f"VG_100K/{linked_id}.jpg")
        else:
            os.link(root / f"VG_100K/{linked_id}.jpg", root / f"VG_100K/{number}.jpg")
    image_data = [{"image_id": n, "width": 64, "height": 48, "url": f"VG_100K/{n}.jpg"} for n in range(num_images)]
    (root / "image_data.json").write_text(json.dumps(image_data))
    (root / "densecap_splits.json").write_text(json.dumps({"train": list(range(num_images)), "val": [], "test": []}))
    with (root / "region_descriptions.json").open("w") as file:
        file.write("[")
        for n in range(num_images):
            region_records = [
                {
                    **{
                        "region_id": n * regions_per_image + k,
                        "image_id": n,
                        "x": k % 40,
                        "y": k % 30,
                        "width": 20,
                        "height": 15,
                    },
                    "phrase": f"a thing of number {k} beside another thing in image {n}",
                }
                for k in range(regions_per_image)
            ]
            file.write(("," if n else "") + json.dumps({"id": n, "regions": region_records}))
        file.write("]")


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc of Linux")
@pytest.mark.parametrize("num_images", [2_000, pytest.param(VISUAL_GENOME_SIZE[0], marks=pytest.mark.all)])
def test_conversion_and_reopening_use_little_memory(tmp_path, num_images):
    write_visual_genome(tmp_path / "vg", num_images, VISUAL_GENOME_SIZE[1])

    def open_in_subprocess():
        environment = {**os.environ, "SCA_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, "-c", MEASUREMENT_SCRIPT, str(tmp_path / "vg")]
        output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        count, seconds, gib = map(float, output.split())
        assert count == num_images
        return seconds, gib

    conversion, reopening = open_in_subprocess(), open_in_subprocess()
    print(
        f"{num_images} images: converted in {conversion[0]:.1f} s with {conversion[1]:.2f} GiB; "
        f"opened in {reopening[0]:.2f} s"
    )
    assert conversion[1] < 2.5
    assert reopening[1] < 0.6  # for every size
