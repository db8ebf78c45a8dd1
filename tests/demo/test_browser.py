"""The demo as a person uses it, in a real browser."""

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

pytest.importorskip("gradio", reason="needs the extra demo")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address():
    """Of `sca demo`, started as the README says."""
    command = [sys.executable, "-m", "sca", "demo", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if found := re.search(r"http://[\d.]+:\d+", line):
                break
        else:
            raise AssertionError("the demo did not start")
        yield found[0]
        process.terminate()


@pytest.fixture
def tab(browser, address):
    """A tab with the first example open; nothing may be asked of other hosts, and nothing may go wrong in it."""
    context = browser.new_context(viewport={"width": 1280, "height": 1400}, accept_downloads=True)
    opened = context.new_page()
    problems = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    opened.on("request", lambda asked: problems.append(asked.url) if _elsewhere(asked.url) else None)
    _open(opened, address)
    yield opened
    context.close()
    assert problems == []


def _elsewhere(url):
    return not url.startswith(("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:"))


def _open(page, address):
    page.goto(address)
    page.locator("#examples img").first.click()
    page.wait_for_selector("#canvas .stage svg image")


def place(page, x, y):
    """Where a pixel of the 512 x 512 example is in the window."""
    frame = page.locator("#canvas .stage svg").bounding_box()
    scale = min(frame["width"], frame["height"]) / 512
    left = frame["x"] + (frame["width"] - 512 * scale) / 2
    top = frame["y"] + (frame["height"] - 512 * scale) / 2
    return left + x * scale, top + y * scale


def captions(page, count):
    """The list, once it has so many captions."""
    page.wait_for_function(
        "count => document.querySelectorAll('#canvas li span').length === count && "
        "[...document.querySelectorAll('#canvas li span')].every(each => each.textContent !== '…')",
        arg=count,
        timeout=30_000,
    )
    return page.locator("#canvas li span").all_inner_texts()


def test_a_click_is_answered_with_three_masks_to_choose_from(tab):
    tab.mouse.click(*place(tab, 270, 260))
    assert "triangle" in captions(tab, 1)[0]
    assert tab.locator("#canvas li button").count() == 3
    before = tab.locator("#canvas .stage svg .mask").get_attribute("d")
    tab.locator("#canvas li button").nth(2).click()
    tab.wait_for_function(
        "before => document.querySelector('#canvas .stage svg .mask').getAttribute('d') !== before", arg=before
    )
    assert tab.locator("#canvas li button").nth(2).get_attribute("aria-pressed") == "true"


def test_further_points_are_of_the_same_region_until_a_new_one(tab):
    tab.mouse.click(*place(tab, 270, 260))
    captions(tab, 1)
    tab.get_by_role("button", name="Point outside").click()
    tab.mouse.click(*place(tab, 60, 60))
    tab.wait_for_selector("#canvas .stage svg .point.outside")
    captions(tab, 1)
    tab.get_by_role("button", name="New region").click()
    tab.get_by_role("button", name="Point inside").click()
    tab.mouse.click(*place(tab, 80, 420))
    assert "square" in captions(tab, 2)[1]
    tab.get_by_role("button", name="Undo").click()
    captions(tab, 1)
    tab.get_by_role("button", name="Clear").click()
    tab.wait_for_function("() => document.querySelectorAll('#canvas li').length === 0")
    tab.get_by_role("button", name="Undo").click()
    captions(tab, 1)


def test_clicks_while_a_caption_is_pending_are_kept(tab):
    for x, y in ((270, 260), (260, 265), (280, 270)):
        tab.mouse.click(*place(tab, x, y))
    tab.wait_for_function("() => document.querySelectorAll('#canvas .stage svg .point.inside').length === 3")
    captions(tab, 1)


def test_a_box_is_drawn(tab):
    tab.get_by_role("button", name="Box", exact=True).click()
    tab.mouse.move(*place(tab, 180, 350))
    tab.mouse.down()
    tab.mouse.move(*place(tab, 250, 420))
    tab.mouse.move(*place(tab, 325, 500))
    tab.mouse.up()
    assert "star" in captions(tab, 1)[0]
    box = tab.locator("#canvas .stage svg .box")
    assert float(box.get_attribute("width")) == pytest.approx(145, abs=3)


def test_a_region_is_painted(tab):
    tab.get_by_role("button", name="Paint").click()
    tab.mouse.move(*place(tab, 240, 280))
    tab.mouse.down()
    for x in range(240, 310, 10):
        tab.mouse.move(*place(tab, x, 280))
    tab.mouse.up()
    assert captions(tab, 1)[0]
    assert tab.locator("#canvas .stage svg .mask").count() == 1


def test_everything_is_found_filtered_and_downloaded(tab, tmp_path):
    tab.get_by_role("tab", name="Everything").click()
    tab.get_by_role("button", name="Find everything").click()
    tab.wait_for_function(
        "() => /^\\d+ regions$/.test(document.querySelector('#status').innerText.trim())", timeout=60_000
    )
    found = tab.locator("#canvas li span").all_inner_texts()
    assert len(found) >= 3
    tab.locator("#canvas .words").fill("star")
    tab.wait_for_function("() => /^[1-9]\\d* of/.test(document.querySelector('#canvas .count').innerText)")
    shown = [each for each in found if "star" in each]
    assert tab.locator("#canvas li:visible").count() == len(shown) < len(found)
    tab.locator("#canvas .words").fill("")
    first = tab.locator("#canvas li").first
    first.hover()
    assert tab.locator("#canvas .tip").inner_text() == first.locator("span").inner_text()
    tab.get_by_role("button", name="Make files to download").click()
    tab.wait_for_selector("#files a[download]")
    names = {}
    for link in tab.locator("#files a[download]").all():
        with tab.expect_download() as saved:
            link.click()
        path = tmp_path / saved.value.suggested_filename
        saved.value.save_as(path)
        names[path.name] = path
    assert {"captions.jsonl", "coco.json", "captions.html"} < set(names)
    assert [json.loads(line)["caption"] for line in names["captions.jsonl"].open()] == found
    picture = next(path for name, path in names.items() if name.endswith(".png"))
    Image.open(picture).load()
    assert not zipfile.is_zipfile(picture)


def test_a_search_is_cancelled(tab):
    tab.get_by_role("tab", name="Everything").click()
    tab.locator("#points_per_side input[type=number]").fill("32")
    tab.locator("#points_per_side input[type=number]").press("Tab")
    tab.get_by_role("button", name="Find everything").click()
    tab.wait_for_function("() => document.querySelector('#status').innerText.includes('looked at')", timeout=30_000)
    tab.get_by_role("button", name="Cancel").click()
    tab.wait_for_function("() => document.querySelector('#status').innerText.includes('cancelled')")
    tab.wait_for_timeout(500)  # the status makes room for itself
    tab.mouse.click(*place(tab, 270, 260))  # what is asked next is answered
    tab.wait_for_function(
        "() => [...document.querySelectorAll('#canvas li span')].some(each => each.textContent.includes('triangle'))",
        timeout=30_000,
    )


def test_the_keyboard_suffices(tab):
    tab.locator("#canvas .stage").focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("Enter")
    words = captions(tab, 1)
    assert "triangle" in words[0]
    tab.keyboard.press("Control+z")
    tab.wait_for_function("() => document.querySelectorAll('#canvas li').length === 0")


def test_two_tabs_do_not_disturb_each_other(browser, address):
    pages = []
    for _ in range(2):
        page = browser.new_context(viewport={"width": 1280, "height": 1400}).new_page()
        _open(page, address)
        pages.append(page)
    for page, spot in zip(pages, ((270, 260), (80, 420)), strict=True):
        page.mouse.click(*place(page, *spot))
    assert "triangle" in captions(pages[0], 1)[0]
    assert "square" in captions(pages[1], 1)[0]
    for page in pages:
        page.context.close()


def test_a_picture_is_opened_and_a_file_that_is_none_is_said(tab, tmp_path):
    Image.new("RGB", (300, 200), "navy").save(tmp_path / "navy.png")
    (tmp_path / "none.png").write_text("none")
    tab.locator("#open input[type=file], input[type=file]").first.set_input_files(tmp_path / "navy.png")
    tab.wait_for_function("() => document.querySelector('#status').innerText.includes('navy.png: 300 x 200')")
    assert tab.locator("#canvas .stage svg").get_attribute("viewBox") == "0 0 300 200"
    tab.locator("#open input[type=file], input[type=file]").first.set_input_files(tmp_path / "none.png")
    tab.get_by_text("is not an image that can be read").first.wait_for()


def test_it_is_usable_on_a_phone(browser, address):
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = context.new_page()
    _open(page, address)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#canvas .stage svg").scroll_into_view_if_needed()
    page.touchscreen.tap(*place(page, 270, 260))
    assert "triangle" in captions(page, 1)[0]
    context.close()


@pytest.mark.all
def test_the_demo_checks_hosts_and_keys(address, tmp_path):
    def status(address, path="/", host=None):
        asked = urllib.request.Request(f"{address}{path}", headers={"Host": host} if host else {})
        try:
            with urllib.request.urlopen(asked, timeout=30) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    assert [status(address), status(address, host="evil.example")] == [200, 403]
    assert status(address, "/config") == 200
    (tmp_path / "keys").write_text("secret\n")
    command = [sys.executable, "-m", "sca", "demo", "--port", "0", "--api-key-file", str(tmp_path / "keys")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        locked = next(found[0] for line in process.stderr if (found := re.search(r"http://[\d.]+:\d+", line)))
        try:
            assert status(locked, "/config") == 401
            login = {password: _login(locked, password) for password in ("secret", "wrong")}
        finally:
            process.terminate()
    assert login == {"secret": 200, "wrong": 400}


def _login(address, password):
    form = urllib.parse.urlencode({"username": "a", "password": password}).encode()
    try:
        with urllib.request.urlopen(f"{address}/login", form, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
