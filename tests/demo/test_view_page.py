"""The page of `sca view` in a real browser."""

import json

import numpy as np
from PIL import Image

from sca.cli import run
from sca.io import masks


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
                file.write(json.dumps({**line, "box": masks.box_of(mask), "mask": masks.encode(mask)}) + "\n")
    return str(folder / name)


def test_ten_thousand_regions_are_browsed(browser, tmp_path):
    file = write(tmp_path, "a.jsonl", 500, 20, lambda image, region: f"square {region} of image {image}")
    assert run(["view", file, "--out", str(tmp_path / "view.html")]) == 0
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
        "return document.querySelector('section[data-image=\"499\"] li') !== null; }"
    )
    assert page.locator("li").count() < 500
    page.locator("#words").fill("square 7 image 123")
    page.wait_for_function("() => document.querySelector('#count').textContent === '2 regions in 1 images'")
    assert page.locator("li:visible").first.inner_text().startswith("square 7 of image 123")
    painted = "() => { const c = document.querySelector('section:not([hidden]) canvas'); "
    painted += "return [...c.getContext('2d').getImageData(10, 10, 1, 1).data]; }"
    assert page.evaluate(painted)[3] > 0, "the mask"
    page.locator("#words").fill("")
    page.locator("#score").fill("0.9")
    page.wait_for_function("() => document.querySelector('#count').textContent === '1,000 regions in 500 images'")
    assert problems == []
    page.close()


def test_two_files_are_compared(browser, tmp_path):
    one = write(tmp_path, "a.jsonl", 5, 3, lambda image, region: f"square {region}")
    other = write(tmp_path, "b.jsonl", 5, 3, lambda image, region: "a cat" if image == 2 else f"square {region}")
    assert run(["view", one, other, "--out", str(tmp_path / "view.html")]) == 0
    page = browser.new_page()
    page.goto(f"file://{tmp_path}/view.html")
    page.locator("#differ").check()
    page.wait_for_function("() => document.querySelector('#count').textContent === '3 regions in 1 images'")
    page.wait_for_selector("section:visible .other")
    assert page.locator("section:visible .other").all_inner_texts() == [
        f"a cat score {s:.2f}" for s in (0, 1 / 3, 2 / 3)
    ]
    page.close()
