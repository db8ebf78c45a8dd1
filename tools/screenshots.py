"""Take the screenshots of the demo and of the `sca view` page in docs/images/: `make screenshots`.

Requires the extra `demo`, playwright and Chromium.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CLICK_POINTS = ((270, 260), (80, 420), (420, 480))  # pixels of the first example: a triangle, a square, a circle
SCA_COMMAND = [sys.executable, "-m", "sca"]


def main():
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        take_demo_screenshot(browser)
        take_view_screenshot(browser)
        browser.close()


def take_demo_screenshot(browser):
    """Save docs/images/demo.jpg: the demo with three captioned regions."""
    with subprocess.Popen([*SCA_COMMAND, "demo", "--port", "0"], stderr=subprocess.PIPE, text=True) as server:
        page = browser.new_page(viewport={"width": 1280, "height": 1400})
        page.on("close", lambda _: server.terminate())
        address = next(filter(None, (re.search(r"http://[\d.]+:\d+", line) for line in server.stderr)))[0]
        page.goto(address)
        page.locator("#examples img").first.click()
        page.wait_for_selector("#canvas .image-frame svg image")
        for number, (x, y) in enumerate(CLICK_POINTS, 1):
            frame = page.locator("#canvas .image-frame svg").bounding_box()
            scale = min(frame["width"], frame["height"]) / 512
            left, top = (frame["width"] - 512 * scale) / 2, (frame["height"] - 512 * scale) / 2
            page.mouse.click(frame["x"] + left + x * scale, frame["y"] + top + y * scale)
            page.wait_for_function(
                "count => document.querySelectorAll('#canvas li small').length === count && "
                "!document.querySelector('#canvas ol').innerText.includes('…')",
                arg=number,
            )
            if number < len(CLICK_POINTS):
                page.get_by_role("button", name="New region").click()
                page.wait_for_timeout(500)
        page.screenshot(path=IMAGES / "demo.jpg", quality=80)
        page.close()


def take_view_screenshot(browser):
    """Save docs/images/view.jpg: the page of `sca view`."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [*SCA_COMMAND, "data", "export", "scenes", "scenes", "--split", "test", "--max-images", "4"],
            cwd=folder,
            check=True,
        )
        caption = ["caption", "scenes/test", "--everything", "--out", "out", "--quiet"]
        subprocess.run([*SCA_COMMAND, *caption], cwd=folder, check=True)
        subprocess.run([*SCA_COMMAND, "view", "out/captions.jsonl"], cwd=folder, check=True)
        page = browser.new_page(viewport={"width": 1280, "height": 760})
        page.goto(f"file://{folder}/view.html")
        page.wait_for_selector("li")
        page.screenshot(path=IMAGES / "view.jpg", quality=80)


if __name__ == "__main__":
    main()
