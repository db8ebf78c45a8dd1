"""The demo page in Chromium."""

import json
import re
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
import zipfile

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="requires the extra demo")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo_url():
    """URL of `sca demo`."""
    command = [sys.executable, "-m", "sca", "demo", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if match := re.search(r"http://[\d.]+:\d+", line):
                break
        else:
            raise AssertionError("the demo did not start")
        yield match[0]
        process.terminate()


@pytest.fixture
def page(browser, demo_url):
    """Page with the first example open; script errors and external requests fail the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 1400}, accept_downloads=True)
    page = context.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: problems.append(request.url) if is_external(request.url) else None)
    open_example(page, demo_url)
    yield page
    context.close()
    assert problems == []


def is_external(url):
    return not url.startswith(("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:"))


def open_example(page, url):
    page.goto(url)
    page.locator("#examples img").first.click()
    page.wait_for_selector("#canvas .image-frame svg image")


def to_window(page, x, y):
    """Convert a pixel of the 512 x 512 example to window coordinates."""
    frame = page.locator("#canvas .image-frame svg").bounding_box()
    scale = min(frame["width"], frame["height"]) / 512
    left = frame["x"] + (frame["width"] - 512 * scale) / 2
    top = frame["y"] + (frame["height"] - 512 * scale) / 2
    return left + x * scale, top + y * scale


def wait_for_captions(page, count):
    """Wait until the region list has `count` captions, and return them."""
    page.wait_for_function(
        "count => document.querySelectorAll('#canvas li span').length === count && "
        "[...document.querySelectorAll('#canvas li span')].every(each => each.textContent !== '…')",
        arg=count,
        timeout=30_000,
    )
    return page.locator("#canvas li span").all_inner_texts()


def test_click_shows_caption_and_three_masks(page):
    page.mouse.click(*to_window(page, 270, 260))
    assert "triangle" in wait_for_captions(page, 1)[0]
    assert page.locator("#canvas li button").count() == 3
    path_before = page.locator("#canvas .image-frame svg .mask").get_attribute("d")
    page.locator("#canvas li button").nth(2).click()
    page.wait_for_function(
        "pathBefore => document.querySelector('#canvas .image-frame svg .mask').getAttribute('d') !== pathBefore",
        arg=path_before,
    )
    assert page.locator("#canvas li button").nth(2).get_attribute("aria-pressed") == "true"


def test_points_refine_the_current_region_until_new_region(page):
    page.mouse.click(*to_window(page, 270, 260))
    wait_for_captions(page, 1)
    page.get_by_role("button", name="Background point").click()
    page.mouse.click(*to_window(page, 60, 60))
    page.wait_for_selector("#canvas .image-frame svg .point.background")
    wait_for_captions(page, 1)
    page.get_by_role("button", name="New region").click()
    page.get_by_role("button", name="Foreground point").click()
    page.mouse.click(*to_window(page, 80, 420))
    assert "square" in wait_for_captions(page, 2)[1]
    page.get_by_role("button", name="Undo").click()
    wait_for_captions(page, 1)
    page.get_by_role("button", name="Clear").click()
    page.wait_for_function("() => document.querySelectorAll('#canvas li').length === 0")
    page.get_by_role("button", name="Undo").click()
    wait_for_captions(page, 1)


def test_clicks_during_a_pending_caption_are_kept(page):
    for x, y in ((270, 260), (260, 265), (280, 270)):
        page.mouse.click(*to_window(page, x, y))
    page.wait_for_function("() => document.querySelectorAll('#canvas .image-frame svg .point.foreground').length === 3")
    wait_for_captions(page, 1)


def test_drawn_box_is_captioned(page):
    page.get_by_role("button", name="Box", exact=True).click()
    page.mouse.move(*to_window(page, 180, 350))
    page.mouse.down()
    page.mouse.move(*to_window(page, 250, 420))
    page.mouse.move(*to_window(page, 325, 500))
    page.mouse.up()
    assert "star" in wait_for_captions(page, 1)[0]
    box = page.locator("#canvas .image-frame svg .box")
    assert float(box.get_attribute("width")) == pytest.approx(145, abs=3)


def test_painted_mask_is_captioned(page):
    page.get_by_role("button", name="Paint mask").click()
    page.mouse.move(*to_window(page, 240, 280))
    page.mouse.down()
    for x in range(240, 310, 10):
        page.mouse.move(*to_window(page, x, 280))
    page.mouse.up()
    assert wait_for_captions(page, 1)[0]
    assert page.locator("#canvas .image-frame svg .mask").count() == 1


def test_caption_everything_filters_and_downloads_regions(page, tmp_path):
    page.get_by_role("tab", name="Everything").click()
    page.get_by_role("button", name="Caption everything").click()
    page.wait_for_function(
        "() => /^\\d+ regions$/.test(document.querySelector('#status').innerText.trim())", timeout=60_000
    )
    captions = page.locator("#canvas li span").all_inner_texts()
    assert len(captions) >= 3
    page.locator("#canvas .search-text").fill("star")
    page.wait_for_function("() => /^[1-9]\\d* of/.test(document.querySelector('#canvas .region-count').innerText)")
    matching_captions = [each for each in captions if "star" in each]
    assert page.locator("#canvas li:visible").count() == len(matching_captions) < len(captions)
    page.locator("#canvas .search-text").fill("")
    first_item = page.locator("#canvas li").first
    first_item.hover()
    assert page.locator("#canvas .tooltip").inner_text() == first_item.locator("span").inner_text()
    page.get_by_role("button", name="Prepare downloads").click()
    page.wait_for_selector("#downloads a[download]")
    paths_by_name = {}
    for link in page.locator("#downloads a[download]").all():
        with page.expect_download() as download:
            link.click()
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        paths_by_name[path.name] = path
    assert {"captions.jsonl", "coco.json", "captions.html"} < set(paths_by_name)
    assert [json.loads(line)["caption"] for line in paths_by_name["captions.jsonl"].open()] == captions
    png_path = next(path for name, path in paths_by_name.items() if name.endswith(".png"))
    Image.open(png_path).load()
    assert not zipfile.is_zipfile(png_path)


def test_find_shows_the_regions_that_match_a_text(page):
    page.get_by_role("tab", name="Find").click()
    page.locator("#find-text textarea, #find-text input").fill("a triangle")
    page.get_by_role("button", name="Find regions").click()
    page.wait_for_function("() => / match /.test(document.querySelector('#status').innerText)", timeout=60_000)
    captions = page.locator("#canvas li span").all_inner_texts()
    assert captions
    assert "triangle" in captions[0]
    assert page.locator("#canvas li small").first.inner_text().startswith("text score 0.9")
    page.locator("#find-text textarea, #find-text input").fill("umbrella")
    page.locator("#find-text textarea, #find-text input").press("Enter")
    page.wait_for_function("() => /^0 of/.test(document.querySelector('#status').innerText.trim())", timeout=60_000)
    assert page.locator("#canvas li").count() == 0


def test_cancel_stops_the_search(page):
    page.get_by_role("tab", name="Everything").click()
    page.locator("#points_per_side input[type=number]").fill("64")
    page.locator("#points_per_side input[type=number]").press("Tab")
    page.get_by_role("button", name="Caption everything").click()
    page.wait_for_function("() => document.querySelector('#status').innerText.includes('searched')", timeout=30_000)
    page.get_by_role("button", name="Cancel").click()
    page.wait_for_function("() => document.querySelector('#status').innerText.includes('cancelled')")
    page.wait_for_timeout(500)  # the layout changes with the status
    page.mouse.click(*to_window(page, 270, 260))  # later prompts are captioned
    page.wait_for_function(
        "() => [...document.querySelectorAll('#canvas li span')].some(each => each.textContent.includes('triangle'))",
        timeout=30_000,
    )


def test_keyboard_adds_points_and_undoes(page):
    page.locator("#canvas .image-frame").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    captions = wait_for_captions(page, 1)
    assert "triangle" in captions[0]
    page.keyboard.press("Control+z")
    page.wait_for_function("() => document.querySelectorAll('#canvas li').length === 0")


def test_two_tabs_have_separate_sessions(browser, demo_url):
    pages = []
    for _ in range(2):
        page = browser.new_context(viewport={"width": 1280, "height": 1400}).new_page()
        open_example(page, demo_url)
        pages.append(page)
    for page, point in zip(pages, ((270, 260), (80, 420)), strict=True):
        page.mouse.click(*to_window(page, *point))
    assert "triangle" in wait_for_captions(pages[0], 1)[0]
    assert "square" in wait_for_captions(pages[1], 1)[0]
    for page in pages:
        page.context.close()


def test_upload_opens_images_and_reports_invalid_files(page, tmp_path):
    Image.new("RGB", (300, 200), "navy").save(tmp_path / "navy.png")
    (tmp_path / "invalid.png").write_text("not an image")
    page.locator("#open-image input[type=file], input[type=file]").first.set_input_files(tmp_path / "navy.png")
    page.wait_for_function("() => document.querySelector('#status').innerText.includes('navy.png: 300 x 200')")
    assert page.locator("#canvas .image-frame svg").get_attribute("viewBox") == "0 0 300 200"
    page.locator("#open-image input[type=file], input[type=file]").first.set_input_files(tmp_path / "invalid.png")
    page.get_by_text("is not a readable image; convert it to JPEG or PNG").first.wait_for()


def test_page_fits_a_phone_and_captions_a_tap(browser, demo_url):
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = context.new_page()
    open_example(page, demo_url)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#canvas .image-frame svg").scroll_into_view_if_needed()
    page.touchscreen.tap(*to_window(page, 270, 260))
    assert "triangle" in wait_for_captions(page, 1)[0]
    context.close()


@pytest.mark.all
def test_demo_checks_hosts_and_api_keys(demo_url, tmp_path):
    def get_status(url, path="/", host=None):
        request = urllib.request.Request(f"{url}{path}", headers={"Host": host} if host else {})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code

    assert [get_status(demo_url), get_status(demo_url, host="evil.example")] == [200, 403]
    assert get_status(demo_url, "/config") == 200
    (tmp_path / "keys").write_text("secret\n")
    command = [sys.executable, "-m", "sca", "demo", "--port", "0", "--api-key-file", str(tmp_path / "keys")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        locked_url = next(match[0] for line in process.stderr if (match := re.search(r"http://[\d.]+:\d+", line)))
        try:
            assert get_status(locked_url, "/config") == 401
            login_statuses = {password: log_in(locked_url, password) for password in ("secret", "wrong")}
        finally:
            process.terminate()
    assert login_statuses == {"secret": 200, "wrong": 400}


def log_in(url, password):
    form = urllib.parse.urlencode({"username": "a", "password": password}).encode()
    try:
        with urllib.request.urlopen(f"{url}/login", form, timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
