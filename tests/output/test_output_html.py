import base64
import hashlib
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from sca.output import Writers

# fmt: off
ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "section", "div", "svg", "image", "g", "path", "rect",
    "circle", "p", "ol", "li", "span", "small", "script",
}
# fmt: on


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.elements, self.spans, self.scripts, self.styles = [], [], [], []
        self._into = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._into = {"span": self.spans, "script": self.scripts, "style": self.styles}.get(tag)
        if self._into is not None:
            self._into.append("")

    def handle_endtag(self, tag):
        self._into = None

    def handle_data(self, data):
        if self._into is not None:
            self._into[-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def page(tmp_path, picture):
    def written(*captions, path="a.png", image=picture, model="m"):
        with Writers(tmp_path, ("html",), model=model) as writers:
            for each in captions:
                writers.add(path, image, each)
        return Page(writers.paths["html"].read_text("utf-8"))

    return written


def test_every_image_and_region_is_on_the_page(page, captions):
    found = page(captions, [], captions[:1])
    assert [section["class"] for section in found.all("section")] == ["picture"] * 3
    assert found.spans == ["a disc", "a box", "a point", "a square", "a disc"]
    assert sorted(shape["data-region"] for shape in found.all("g")) == ["0", "0", "1", "2", "3"]
    assert len(found.all("path")) == 3
    assert len(found.all("circle")) == 5


def test_each_region_can_be_reached_by_the_keyboard(page, captions):
    items = page(captions).all("li")
    assert [item["data-region"] for item in items] == ["0", "1", "2", "3"]
    assert all(item["tabindex"] == "0" for item in items)


def test_small_regions_lie_on_top_of_large_ones(page, captions):
    """What is last in the document is on top: the disc is the largest, the point has no area."""
    assert [shape["data-region"] for shape in page(captions).all("g")] == ["0", "1", "3", "2"]


def test_hostile_captions_paths_and_models_are_text(page, hostile):
    attack = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    found = page(hostile, path=attack, model=attack)
    assert {tag for tag, _ in found.elements} <= ELEMENTS
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
    assert len(found.scripts) == 1
    for shown, caption in zip(found.spans, hostile, strict=True):
        printable = "".join(c if c.isprintable() or c == "\n" else " " for c in caption.text)
        assert shown == printable


def test_nothing_is_loaded_from_elsewhere(page, captions):
    found = page(captions)
    for _, attributes in found.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"url\(|@import|https?:", "".join(found.styles + found.scripts))


def test_the_policy_allows_the_page_its_own_script_and_style_only(page, captions):
    found = page(captions)
    policy = next(meta["content"] for meta in found.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    for kind, text in (("style", found.styles[0]), ("script", found.scripts[0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


@pytest.mark.parametrize(
    ("size", "kind"), [((40, 30), "png"), ((600, 400), "jpeg"), ((3000, 20), "jpeg"), ((1, 1), "png")]
)
def test_pictures_are_embedded_at_a_bounded_size(page, captions, size, kind):
    image = Image.new("RGB", size, (10, 200, 90))
    (shown,) = page(captions[1:2], image=image).all("image")
    assert (shown["width"], shown["height"]) == tuple(map(str, size)), "drawn in the pixels of the image"
    start, data = shown["href"].split(",")
    assert start == f"data:image/{kind};base64"
    embedded = Image.open(io.BytesIO(base64.b64decode(data)))
    assert max(embedded.size) == min(max(size), 2048)
    assert np.abs(np.asarray(embedded).astype(int) - (10, 200, 90)).max() < 6
