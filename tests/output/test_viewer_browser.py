"""Viewer pages of `sca view` and `--format html` in Chromium."""

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


def write_captions(folder, name, num_images, num_regions, make_caption_text):
    """Write noise images and a JSON lines file with captions of squares in them; return the path of the file."""
    with (folder / name).open("w") as file:
        for image_index in range(num_images):
            path = folder / f"{image_index:03d}.png"
            if not path.exists():
                Image.fromarray(np.random.default_rng(image_index).integers(0, 255, (48, 64, 3), np.uint8)).save(path)
            for region_id in range(num_regions):
                mask = np.zeros((48, 64), bool)
                mask[region_id : region_id + 9, region_id : region_id + 9] = True
                line = {"image": str(path), "width": 64, "height": 48, "region_id": region_id, "prompt": {}}
                line |= {
                    "caption": make_caption_text(image_index, region_id),
                    "score": region_id / num_regions,
                    "predicted_iou": None,
                    "model": name,
                }
                file.write(json.dumps({**line, "box": masks.mask_to_box(mask), "mask": masks.encode_rle(mask)}) + "\n")
    return str(folder / name)


def test_viewer_filters_ten_thousand_regions(browser, tmp_path):
    file = write_captions(tmp_path, "a.jsonl", 500, 20, lambda image, region: f"square {region} of image {image}")
    assert run_command(["view", file, "--out", str(tmp_path / "view.html")]) == 0
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
    page.goto(f"file://{tmp_path}/view.html")
    page.wait_for_selector("li")
    assert page.locator("#region-count").inner_text() == "10,000 regions in 500 images"
    assert page.locator("li").count() < 500, "only sections near the window are filled"
    page.wait_for_function(  # the page grows as sections are filled
        "() => { window.scrollTo(0, document.body.scrollHeight); "
        "return document.querySelector('section:last-of-type li') !== null; }"
    )
    assert page.locator("li").count() < 500
    page.locator("#search").fill("square 7 image 123")
    page.wait_for_function("() => document.querySelector('#region-count').textContent === '2 regions in 1 image'")
    assert page.locator("li:visible .caption").first.inner_text().startswith("square 7 of image 123")
    assert "M7,7" in page.locator(".region:visible .contour").first.get_attribute("d"), "the mask"
    page.locator("#search").fill("")
    page.locator("#min-score").fill("0.9")
    page.wait_for_function(
        "() => document.querySelector('#region-count').textContent === '1,000 regions in 500 images'"
    )
    assert problems == []
    page.close()


def test_viewer_compares_two_files(browser, tmp_path):
    file = write_captions(tmp_path, "a.jsonl", 5, 3, lambda image, region: f"square {region}")
    other_file = write_captions(
        tmp_path, "b.jsonl", 5, 3, lambda image, region: "a cat" if image == 2 else f"square {region}"
    )
    assert run_command(["view", file, other_file, "--out", str(tmp_path / "view.html")]) == 0
    page = browser.new_page()
    page.goto(f"file://{tmp_path}/view.html")
    page.locator("#only-different").check()
    page.wait_for_function("() => document.querySelector('#region-count').textContent === '3 regions in 1 image'")
    page.wait_for_selector("section:visible .other-caption")
    assert page.locator("section:visible .other-caption").all_inner_texts() == [
        f"a cat score {score:.2f}" for score in (0, 1 / 3, 2 / 3)
    ]
    page.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Function that writes a page of one image and opens it; script errors and external requests fail the test."""
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
        page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
        page.goto(f"file://{tmp_path}/page.html")
        page.wait_for_selector(".content")
        return page

    yield write_and_open
    for page in pages:
        page.close()
    assert problems == []


def make_caption(text, region_id, mask=None, box=None, points=()):
    rle = None if mask is None else masks.encode_rle(mask)
    prompt = Prompt(box=box, points=points)
    return Caption(text, 0.5, box if mask is None else masks.mask_to_box(mask), rle, 0.75, prompt, region_id)


def make_square_masks(count, side=60):
    """Return masks (count, side, side * count) of squares in a row."""
    square_masks = np.zeros((count, side, side * count), bool)
    for number in range(count):
        square_masks[number, 10 : side - 10, number * side + 10 : (number + 1) * side - 10] = True
    return square_masks


def test_viewer_shows_all_regions_without_pointing(open_page):
    regions = [make_caption(f"square {number}", number, mask) for number, mask in enumerate(make_square_masks(3))]
    regions.append(make_caption("a box", 3, box=(2.0, 2.0, 30.0, 9.0)))
    regions.append(make_caption("a point", 4, points=((90.0, 5.0, 1), (150.0, 5.0, 0))))
    page = open_page(Image.new("RGB", (180, 60), (120, 120, 120)), regions)
    assert page.locator(".contour").count() == 4
    for shape in page.locator(".contour").all():
        assert shape.is_visible()
        style = (
            "node => [...['fillOpacity', 'strokeOpacity', 'strokeWidth'].map((name) => getComputedStyle(node)[name])]"
        )
        fill, stroke, width = shape.evaluate(style)
        assert 0 < float(fill) <= 0.15
        assert (stroke, width) == ("1", "2px")
    assert [point.is_visible() for point in page.locator(".point").all()] == [True, True]
    assert page.locator(".region-label:visible").all_inner_texts() == ["0", "1", "2", "3", "4"]
    assert page.locator("li:visible .caption").all_inner_texts() == [
        f"{text} score 0.50 · IoU 0.75" for text in ("square 0", "square 1", "square 2", "a box", "a point")
    ]
    assert page.locator(".highlighted").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_region_fill_leaves_image_colors_visible(open_page, scheme):
    count = len(REGION_COLORS)
    square_masks = make_square_masks(count)
    pixels = np.zeros((60, 60 * count, 3), np.uint8) + np.uint8([200, 30, 30])
    captions = [make_caption("red", number, mask) for number, mask in enumerate(square_masks)]
    page = open_page(Image.fromarray(pixels), captions, color_scheme=scheme, viewport={"width": 900, "height": 600})
    screenshot = np.asarray(
        Image.open(io.BytesIO(page.locator(".image-frame svg").screenshot())).convert("RGB")
    ).astype(int)
    scale = screenshot.shape[1] / pixels.shape[1]
    is_tinted = []
    for number, color in enumerate(REGION_COLORS):
        x, y = round((60 * number + 16) * scale), round(16 * scale)
        red, green, blue = screenshot[y, x]
        assert red > 170, color
        assert red > 3 * max(green, blue), color
        is_tinted.append(np.abs(screenshot[y, x] - (200, 30, 30)).max() > 2)
        row = screenshot[round(30 * scale), round((60 * number + 3) * scale) : round((60 * number + 17) * scale)]
        assert np.abs(row - color).sum(1).min() < 90, "the contour has the region's color"
    assert all(is_tinted)


def test_pointing_at_a_region_highlights_region_and_caption(open_page):
    inner, outer = np.zeros((2, 60, 60), bool)
    outer[5:55, 5:55] = True
    inner[30:40, 30:40] = True
    page = open_page(Image.new("RGB", (60, 60)), [make_caption("inner", 0, inner), make_caption("outer", 1, outer)])
    frame = page.locator(".image-frame svg").bounding_box()

    def point_at(x, y):
        page.mouse.move(frame["x"] + x / 60 * frame["width"], frame["y"] + y / 60 * frame["height"])
        captions = page.locator("li.highlighted .caption").all_inner_texts()
        return captions, page.locator(".highlighted-caption").inner_text()

    assert point_at(32, 32) == (["inner score 0.50 · IoU 0.75"], "inner score 0.50 · IoU 0.75")
    assert point_at(10, 10)[0] == ["outer score 0.50 · IoU 0.75"]
    assert page.locator(".region.highlighted").count() == page.locator(".region-label.highlighted").count() == 1
    page.mouse.down()
    page.mouse.up()
    assert point_at(1, 1)[0] == ["outer score 0.50 · IoU 0.75"], "a click keeps the highlight"


def test_keyboard_focus_highlights_regions(open_page):
    regions = [make_caption(f"square {number}", number, mask) for number, mask in enumerate(make_square_masks(3))]
    page = open_page(Image.new("RGB", (180, 60)), regions)
    page.locator("#show-regions").focus()
    highlighted_indices = []
    for _ in regions:
        page.keyboard.press("Tab")
        highlighted_indices.append(page.locator(".region.highlighted").get_attribute("data-index"))
    assert highlighted_indices == ["0", "1", "2"]
    page.keyboard.press("Enter")
    page.locator("#search").focus()
    assert page.locator(".region.highlighted").get_attribute("data-index") == "2"
    page.locator("li").first.focus()
    page.keyboard.press("Escape")
    page.locator("#search").focus()
    assert page.locator(".highlighted").count() == 0


def test_show_regions_checkbox_hides_regions(open_page):
    page = open_page(Image.new("RGB", (180, 60)), [make_caption("square", 0, make_square_masks(3)[0])])
    page.locator("#show-regions").uncheck()
    assert page.locator(".contour:visible, .region-label:visible").count() == 0
    assert page.locator("li:visible").count() == 1


def test_contours_match_the_masks(open_page):
    generator = np.random.default_rng(0)
    test_masks = [generator.random((11, 17)) < share for share in (0.1, 0.5, 0.9)]
    test_masks += [
        np.ones((11, 17), bool),
        np.indices((11, 17)).sum(0) % 2 == 0,
        make_square_masks(1, 25)[0][:11, :17],
    ]
    page = open_page(
        Image.new("RGB", (17, 11)), [make_caption("", number, mask) for number, mask in enumerate(test_masks)]
    )
    assert page.locator("image").evaluate("node => getComputedStyle(node).imageRendering") == "pixelated"
    for number, mask in enumerate(test_masks):
        is_inside = page.locator(f".region[data-index='{number}'] .contour").evaluate(
            "path => [...Array(11).keys()].map((y) => [...Array(17).keys()].map("
            "(x) => path.isPointInFill(new DOMPoint(x + 0.5, y + 0.5))))"
        )
        assert np.array_equal(is_inside, mask), number


HOSTILE = (
    "</script><script>alert(1)</script>",
    "{{ 7*7 }} {% raw %} ${7*7}",
    '<img src=x onerror=alert(1)> " onmouseover="alert(1)',
    "\x00\x1b[31mred\x9b \u202eevil\ud83d",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_displayed_and_not_executed(open_page, text):
    page = open_page(Image.new("RGB", (60, 60)), [make_caption(text, 0, box=(9.0, 9.0, 30.0, 30.0))], text, text)
    page.locator("li").hover()
    page.wait_for_timeout(100)
    printable_text = "".join(character if character.isprintable() else " " for character in text)
    assert page.locator("li .caption").evaluate("node => node.firstChild.data") == printable_text
    assert page.locator("h1").evaluate("node => node.textContent") == printable_text
    assert page.locator("h2").evaluate("node => node.textContent") == printable_text
    assert page.title() == " ".join(printable_text.split())
    assert page.locator("img, script[src]").count() == 0
