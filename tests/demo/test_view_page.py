"""The viewer, which `sca view` and `--format html` write, in a real browser."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from sca_registry.contracts import Caption, Prompt

from sca.cli import run_command
from sca.io import masks
from sca.output.colors import REGION_COLORS
from sca.output.html import HtmlWriter

pytestmark = pytest.mark.slow


def write(folder, name, images, regions, words):
    """Captions of squares in noise."""
    with (folder / name).open("w") as file:
        for image in range(images):
            path = folder / f"{image:03d}.png"
            if not path.exists():
                Image.fromarray(np.random.default_rng(image).integers(0, 255, (48, 64, 3), np.uint8)).save(path)
            for region in range(regions):
                mask = np.zeros((48, 64), bool)
                mask[region : region + 9, region : region + 9] = True
                line = {"image": str(path), "width": 64, "height": 48, "region": region, "prompt": {}}
                line |= {"caption": words(image, region), "score": region / regions, "iou": None, "model": name}
                file.write(json.dumps({**line, "box": masks.mask_to_box(mask), "mask": masks.encode_rle(mask)}) + "\n")
    return str(folder / name)


def test_ten_thousand_regions_are_browsed(browser, tmp_path):
    file = write(tmp_path, "a.jsonl", 500, 20, lambda image, region: f"square {region} of image {image}")
    assert run_command(["view", file, "--out", str(tmp_path / "view.html")]) == 0
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda asked: problems.append(asked.url) if asked.url.startswith("http") else None)
    page.goto(f"file://{tmp_path}/view.html")
    page.wait_for_selector("li")
    assert page.locator("#count").inner_text() == "10,000 regions in 500 images"
    assert page.locator("li").count() < 500, "only what is near the window is there"
    page.wait_for_function(  # the page grows as sections are filled
        "() => { window.scrollTo(0, document.body.scrollHeight); "
        "return document.querySelector('section:last-of-type li') !== null; }"
    )
    assert page.locator("li").count() < 500
    page.locator("#search").fill("square 7 image 123")
    page.wait_for_function("() => document.querySelector('#count').textContent === '2 regions in 1 image'")
    assert page.locator("li:visible .one").first.inner_text().startswith("square 7 of image 123")
    assert "M7,7" in page.locator(".region:visible .shape").first.get_attribute("d"), "the mask"
    page.locator("#search").fill("")
    page.locator("#score").fill("0.9")
    page.wait_for_function("() => document.querySelector('#count').textContent === '1,000 regions in 500 images'")
    assert problems == []
    page.close()


def test_two_files_are_compared(browser, tmp_path):
    one = write(tmp_path, "a.jsonl", 5, 3, lambda image, region: f"square {region}")
    other = write(tmp_path, "b.jsonl", 5, 3, lambda image, region: "a cat" if image == 2 else f"square {region}")
    assert run_command(["view", one, other, "--out", str(tmp_path / "view.html")]) == 0
    page = browser.new_page()
    page.goto(f"file://{tmp_path}/view.html")
    page.locator("#differ").check()
    page.wait_for_function("() => document.querySelector('#count').textContent === '3 regions in 1 image'")
    page.wait_for_selector("section:visible .other")
    assert page.locator("section:visible .other").all_inner_texts() == [
        f"a cat score {s:.2f}" for s in (0, 1 / 3, 2 / 3)
    ]
    page.close()


@pytest.fixture
def show(browser, tmp_path):
    """Writes a page of one image and opens it; what goes wrong in the page fails the test."""
    problems, pages = [], []

    def write_and_open(image, captions, name="image.png", title="title", **options):
        page_file = HtmlWriter(tmp_path / "page.html", title)
        page_file.add(name, image, captions)
        page_file.close()
        page = browser.new_page(**options)
        pages.append(page)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda asked: problems.append(asked.url) if asked.url.startswith("http") else None)
        page.goto(f"file://{tmp_path}/page.html")
        page.wait_for_selector(".content")
        return page

    yield write_and_open
    for page in pages:
        page.close()
    assert problems == []


def make_caption(text, region, mask=None, box=None, points=()):
    code = None if mask is None else masks.encode_rle(mask)
    prompt = Prompt(box=box, points=points)
    return Caption(text, 0.5, box if mask is None else masks.mask_to_box(mask), code, 0.75, prompt, region)


def squares(count, side=60):
    """Masks of squares beside each other in an image of `side` rows."""
    found = np.zeros((count, side, side * count), bool)
    for number in range(count):
        found[number, 10 : side - 10, number * side + 10 : (number + 1) * side - 10] = True
    return found


def test_regions_are_visible_without_pointing_at_them(show):
    regions = [make_caption(f"square {number}", number, mask) for number, mask in enumerate(squares(3))]
    regions.append(make_caption("a box", 3, box=(2.0, 2.0, 30.0, 9.0)))
    regions.append(make_caption("a point", 4, points=((90.0, 5.0, 1), (150.0, 5.0, 0))))
    page = show(Image.new("RGB", (180, 60), (120, 120, 120)), regions)
    assert page.locator(".shape").count() == 4
    for shape in page.locator(".shape").all():
        assert shape.is_visible()
        style = (
            "node => [...['fillOpacity', 'strokeOpacity', 'strokeWidth'].map((name) => getComputedStyle(node)[name])]"
        )
        fill, stroke, width = shape.evaluate(style)
        assert 0 < float(fill) <= 0.15
        assert (stroke, width) == ("1", "2px")
    assert [point.is_visible() for point in page.locator(".point").all()] == [True, True]
    assert page.locator(".label:visible").all_inner_texts() == ["0", "1", "2", "3", "4"]
    assert page.locator("li:visible .one").all_inner_texts() == [
        f"{text} score 0.50 · IoU 0.75" for text in ("square 0", "square 1", "square 2", "a box", "a point")
    ]
    assert page.locator(".on").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colors_of_the_image_are_seen_through_every_tint(show, scheme):
    count = len(REGION_COLORS)
    found = squares(count)
    pixels = np.zeros((60, 60 * count, 3), np.uint8) + np.uint8([200, 30, 30])
    captions = [make_caption("red", number, mask) for number, mask in enumerate(found)]
    page = show(Image.fromarray(pixels), captions, color_scheme=scheme, viewport={"width": 900, "height": 600})
    shown = np.asarray(Image.open(io.BytesIO(page.locator(".stage svg").screenshot())).convert("RGB")).astype(int)
    scale = shown.shape[1] / pixels.shape[1]
    tinted = []
    for number, color in enumerate(REGION_COLORS):
        x, y = round((60 * number + 16) * scale), round(16 * scale)
        red, green, blue = shown[y, x]
        assert red > 170, color
        assert red > 3 * max(green, blue), color
        tinted.append(np.abs(shown[y, x] - (200, 30, 30)).max() > 2)
        row = shown[round(30 * scale), round((60 * number + 3) * scale) : round((60 * number + 17) * scale)]
        assert np.abs(row - color).sum(1).min() < 90, "the contour has the region's color"
    assert all(tinted)


def test_pointing_at_a_region_highlights_it_and_its_caption(show):
    inner, outer = np.zeros((2, 60, 60), bool)
    outer[5:55, 5:55] = True
    inner[30:40, 30:40] = True
    page = show(Image.new("RGB", (60, 60)), [make_caption("inner", 0, inner), make_caption("outer", 1, outer)])
    frame = page.locator(".stage svg").bounding_box()

    def point_at(x, y):
        page.mouse.move(frame["x"] + x / 60 * frame["width"], frame["y"] + y / 60 * frame["height"])
        return page.locator("li.on .one").all_inner_texts(), page.locator(".current").inner_text()

    assert point_at(32, 32) == (["inner score 0.50 · IoU 0.75"], "inner score 0.50 · IoU 0.75")
    assert point_at(10, 10)[0] == ["outer score 0.50 · IoU 0.75"]
    assert page.locator(".region.on").count() == page.locator(".label.on").count() == 1
    page.mouse.down()
    page.mouse.up()
    assert point_at(1, 1)[0] == ["outer score 0.50 · IoU 0.75"], "a click keeps the highlight"


def test_regions_are_reached_by_the_keyboard(show):
    regions = [make_caption(f"square {number}", number, mask) for number, mask in enumerate(squares(3))]
    page = show(Image.new("RGB", (180, 60)), regions)
    page.locator("#overlay").focus()
    seen = []
    for _ in regions:
        page.keyboard.press("Tab")
        seen.append(page.locator(".region.on").get_attribute("data-place"))
    assert seen == ["0", "1", "2"]
    page.keyboard.press("Enter")
    page.locator("#search").focus()
    assert page.locator(".region.on").get_attribute("data-place") == "2"
    page.locator("li").first.focus()
    page.keyboard.press("Escape")
    page.locator("#search").focus()
    assert page.locator(".on").count() == 0


def test_regions_can_be_hidden_to_see_the_image(show):
    page = show(Image.new("RGB", (180, 60)), [make_caption("square", 0, squares(3)[0])])
    page.locator("#overlay").uncheck()
    assert page.locator(".shape:visible, .label:visible").count() == 0
    assert page.locator("li:visible").count() == 1


def test_outlines_are_those_of_the_masks(show):
    generator = np.random.default_rng(0)
    found = [generator.random((11, 17)) < share for share in (0.1, 0.5, 0.9)]
    found += [np.ones((11, 17), bool), np.indices((11, 17)).sum(0) % 2 == 0, squares(1, 25)[0][:11, :17]]
    page = show(Image.new("RGB", (17, 11)), [make_caption("", number, mask) for number, mask in enumerate(found)])
    assert page.locator("image").evaluate("node => getComputedStyle(node).imageRendering") == "pixelated"
    for number, mask in enumerate(found):
        inside = page.locator(f".region[data-place='{number}'] .shape").evaluate(
            "path => [...Array(11).keys()].map((y) => [...Array(17).keys()].map("
            "(x) => path.isPointInFill(new DOMPoint(x + 0.5, y + 0.5))))"
        )
        assert np.array_equal(inside, mask), number


HOSTILE = (
    "</script><script>alert(1)</script>",
    "{{ 7*7 }} {% raw %} ${7*7}",
    '<img src=x onerror=alert(1)> " onmouseover="alert(1)',
    "\x00\x1b[31mred\x9b \u202eevil\ud83d",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_displayed_and_runs_nothing(show, text):
    page = show(Image.new("RGB", (60, 60)), [make_caption(text, 0, box=(9.0, 9.0, 30.0, 30.0))], text, text)
    page.locator("li").hover()
    page.wait_for_timeout(100)
    shown = "".join(character if character.isprintable() else " " for character in text)
    assert page.locator("li .one").evaluate("node => node.firstChild.data") == shown
    assert page.locator("h1").evaluate("node => node.textContent") == shown
    assert page.locator("h2").evaluate("node => node.textContent") == shown
    assert page.title() == " ".join(shown.split())
    assert page.locator("img, script[src]").count() == 0
