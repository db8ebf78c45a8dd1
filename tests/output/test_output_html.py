import base64
import hashlib
import io
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from viewer_page import ViewerPage

from sca.output.formats import MultiFormatWriter
from sca.output.reader import read_captions
from sca.output.viewer import write_viewer

# fmt: off
ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "section", "div", "svg", "image", "p", "ol", "script",
    "main", "form", "label", "input", "output", "noscript", "template",
}
# fmt: on


@pytest.fixture
def page(tmp_path, picture):
    def written(*captions, path="a.png", image=picture, model="m"):
        with MultiFormatWriter(tmp_path, ("html",), model=model) as writers:
            for each in captions:
                writers.add(path, image, each)
        return ViewerPage(writers.paths["html"].read_text("utf-8"))

    return written


def test_every_image_and_region_is_on_the_page(page, captions):
    found = page(captions, [], captions[:1])
    assert found.texts["h2"] == ["a.png"] * 3
    texts = [[region["caption"] for region in image["regions"]] for image in found.images]
    assert texts == [["a disc", "a box", "a point", "a square"], [], ["a disc"]]
    disc, box, point, square = found.images[0]["regions"]
    assert [each["region"] for each in (disc, box, point, square)] == [0, 1, 2, 3]
    assert (disc["mask"], square["mask"]) == (captions[0].mask["counts"], captions[3].mask["counts"])
    assert box == {"region": 1, "caption": "a box", "score": 0.5, "iou": None} | {
        "box": [1.5, 2.0, 10.0, 12.25],
        "mask": None,
        "points": [],
        "prompt_box": True,
    }
    assert disc["points"] == [[15.0, 12.0, 1], [1.0, 1.0, 0]]
    assert point["points"] == [[5.0, 6.0, 1]]
    assert (point["box"], point["mask"], point["prompt_box"]) == (None, None, False)


def test_html_format_and_view_write_the_same_page(tmp_path, picture, captions, hostile):
    folder, images = tmp_path / "out", {"a.png": captions, "b.png": hostile, "c.png": []}
    with MultiFormatWriter(folder, ("jsonl", "html"), model="m") as writers:
        for number, (name, each) in enumerate(images.items()):
            image = picture.rotate(90 * number, expand=True)
            image.save(folder / name)
            if each:  # JSON lines have no line for an image without regions
                writers.add(str(folder / name), image, each)
    assert write_viewer(tmp_path / "view.html", read_captions(writers.paths["jsonl"]), names=("m",)) == (12, [])
    assert (tmp_path / "view.html").read_text() == writers.paths["html"].read_text()


@pytest.mark.parametrize("attack", ['"><script>alert(1)</script><img src=x onerror=alert(1)>', "{{ 7*7 }}{% raw %}"])
def test_hostile_captions_paths_and_models_are_text(page, hostile, attack):
    found = page(hostile, path=attack, model=attack)
    assert {tag for tag, _ in found.elements} <= ELEMENTS
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
    assert len(found.texts["script"]) == 1
    assert [*found.texts["h1"], *found.texts["h2"], *found.texts["title"]] == [attack] * 3
    for region, caption in zip(found.images[0]["regions"], hostile, strict=True):
        printable = "".join(c if c.isprintable() or c == "\n" else " " for c in caption.text)
        assert region["caption"] == printable


def test_names_with_control_characters_are_shown_with_spaces(page, captions):
    found = page(captions, path="a\x1b[31m\x00b\ud83d.png", model="m\u202e\x9b")
    assert (found.texts["h2"], found.texts["h1"]) == (["a [31m b .png"], ["m  "])


def test_nothing_is_loaded_from_elsewhere(page, captions):
    found = page(captions)
    for _, attributes in found.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "data-picture"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"url\(|@import|https?:", "".join(found.texts["style"] + found.texts["script"]))


def test_the_policy_allows_the_page_its_own_script_and_style_only(page, captions):
    found = page(captions)
    policy = next(meta["content"] for meta in found.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    for kind in ("style", "script"):
        (text,) = found.texts[kind]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


@pytest.mark.parametrize(
    ("size", "kind"), [((40, 30), "png"), ((600, 400), "jpeg"), ((3000, 20), "jpeg"), ((1, 1), "png")]
)
def test_pictures_are_embedded_at_a_bounded_size(page, captions, size, kind):
    image = Image.new("RGB", size, (10, 200, 90))
    (shown,) = page(captions[1:2], image=image).all("section")
    assert (shown["data-width"], shown["data-height"]) == tuple(map(str, size)), "drawn in the pixels of the image"
    assert (shown.get("class") == "sharp") == (kind == "png")
    start, data = shown["data-picture"].split(",")
    assert start == f"data:image/{kind};base64"
    embedded = Image.open(io.BytesIO(base64.b64decode(data)))
    assert max(embedded.size) == min(max(size), 1024)
    assert np.abs(np.asarray(embedded).astype(int) - (10, 200, 90)).max() < 6


def test_tints_of_regions_leave_the_colors_of_the_image(page, captions):
    (style,) = page(captions).texts["style"]
    opacities = re.findall(r"fill-opacity: ([\d.]+)", style)
    assert len(opacities) == 1
    assert 0 < float(opacities[0]) <= 0.15


@pytest.mark.slow
def test_jinja2_is_imported_when_a_page_is_written():
    program = "import sys, sca, sca.output, sca.output.html_page, sca.output.viewer; print('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"
