"""Viewer pages: embedded data, escaping, content security policy and image size."""

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
def make_page(tmp_path, noise_image):
    """Function that writes a viewer page with captions of one image per argument, and parses it."""

    def make(*captions, path="a.png", image=noise_image, model="m"):
        with MultiFormatWriter(tmp_path, ("html",), model=model) as writers:
            for each in captions:
                writers.add(path, image, each)
        return ViewerPage(writers.paths["html"].read_text("utf-8"))

    return make


def test_page_contains_every_image_and_region(make_page, captions):
    page = make_page(captions, [], captions[:1])
    assert page.texts_by_tag["h2"] == ["a.png"] * 3
    texts = [[region["caption"] for region in image["regions"]] for image in page.images]
    assert texts == [["a disc", "a box", "a point", "a square"], [], ["a disc"]]
    disc, box, point, square = page.images[0]["regions"]
    assert [each["region_id"] for each in (disc, box, point, square)] == [0, 1, 2, 3]
    assert (disc["mask"], square["mask"]) == (captions[0].mask["counts"], captions[3].mask["counts"])
    assert box == {"region_id": 1, "caption": "a box", "score": 0.5, "predicted_iou": None} | {
        "box": [1.5, 2.0, 10.0, 12.25],
        "mask": None,
        "points": [],
        "is_box_prompt": True,
    }
    assert disc["points"] == [[15.0, 12.0, 1], [1.0, 1.0, 0]]
    assert point["points"] == [[5.0, 6.0, 1]]
    assert (point["box"], point["mask"], point["is_box_prompt"]) == (None, None, False)


def test_html_format_and_write_viewer_write_the_same_page(tmp_path, noise_image, captions, hostile_captions):
    folder, images = tmp_path / "out", {"a.png": captions, "b.png": hostile_captions, "c.png": []}
    with MultiFormatWriter(folder, ("jsonl", "html"), model="m") as writers:
        for number, (name, each) in enumerate(images.items()):
            image = noise_image.rotate(90 * number, expand=True)
            image.save(folder / name)
            if each:  # JSON lines have no line for an image without regions
                writers.add(str(folder / name), image, each)
    assert write_viewer(tmp_path / "view.html", read_captions(writers.paths["jsonl"]), names=("m",)) == (12, [])
    assert (tmp_path / "view.html").read_text() == writers.paths["html"].read_text()


@pytest.mark.parametrize("attack", ['"><script>alert(1)</script><img src=x onerror=alert(1)>', "{{ 7*7 }}{% raw %}"])
def test_page_escapes_hostile_captions_paths_and_models(make_page, hostile_captions, attack):
    page = make_page(hostile_captions, path=attack, model=attack)
    assert {tag for tag, _ in page.elements} <= ELEMENTS
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert len(page.texts_by_tag["script"]) == 1
    assert [*page.texts_by_tag["h1"], *page.texts_by_tag["h2"], *page.texts_by_tag["title"]] == [attack] * 3
    for region, caption in zip(page.images[0]["regions"], hostile_captions, strict=True):
        printable = "".join(c if c.isprintable() or c == "\n" else " " for c in caption.text)
        assert region["caption"] == printable


def test_page_replaces_control_characters_in_names_by_spaces(make_page, captions):
    page = make_page(captions, path="a\x1b[31m\x00b\ud83d.png", model="m\u202e\x9b")
    assert (page.texts_by_tag["h2"], page.texts_by_tag["h1"]) == (["a [31m b .png"], ["m  "])


def test_page_loads_no_external_files(make_page, captions):
    page = make_page(captions)
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "data-image"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"url\(|@import|https?:", "".join(page.texts_by_tag["style"] + page.texts_by_tag["script"]))


def test_content_security_policy_allows_only_the_script_and_style_of_the_page(make_page, captions):
    page = make_page(captions)
    policy = next(
        meta["content"] for meta in page.find_all("meta") if meta.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (text,) = page.texts_by_tag[tag]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


@pytest.mark.parametrize(
    ("size", "file_type"), [((40, 30), "png"), ((600, 400), "jpeg"), ((3000, 20), "jpeg"), ((1, 1), "png")]
)
def test_embedded_images_have_a_bounded_size(make_page, captions, size, file_type):
    image = Image.new("RGB", size, (10, 200, 90))
    (section,) = make_page(captions[1:2], image=image).find_all("section")
    assert (section["data-width"], section["data-height"]) == tuple(map(str, size)), (
        "coordinates are pixels of the original image"
    )
    assert (section.get("class") == "pixelated") == (file_type == "png")
    header, data = section["data-image"].split(",")
    assert header == f"data:image/{file_type};base64"
    embedded = Image.open(io.BytesIO(base64.b64decode(data)))
    assert max(embedded.size) == min(max(size), 1024)
    assert np.abs(np.asarray(embedded).astype(int) - (10, 200, 90)).max() < 6


def test_region_fill_is_nearly_transparent(make_page, captions):
    (style,) = make_page(captions).texts_by_tag["style"]
    opacities = re.findall(r"fill-opacity: ([\d.]+)", style)
    assert len(opacities) == 1
    assert 0 < float(opacities[0]) <= 0.15


@pytest.mark.slow
def test_jinja2_is_not_imported_with_sca_output():
    program = "import sys, sca, sca.output, sca.output.html_page, sca.output.viewer; print('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"
