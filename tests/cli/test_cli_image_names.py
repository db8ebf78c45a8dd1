"""Commands find images by the names in files, and write the names that other tools open."""

import json
import os

import pytest

BOX = {"box": [1, 1, 9, 9], "caption": "a cat"}
LOCAL = "/data/local-files/?d="


def _lines(path, *names):
    records = ({"image": name, "width": 64, "height": 48, **BOX} for name in names)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


@pytest.mark.parametrize(
    "images", [".", "~/data", "фото", "1_000", "2024", "0123", "true", "my photos", "a#b", "./.", "写真/"]
)
@pytest.mark.slow
def test_cli_options_take_folders_of_any_name(shell, picture, here, monkeypatch, images):
    monkeypatch.setenv("HOME", str(here / "home"))
    picture(os.path.expanduser(images).removeprefix(f"{here}/") + "/a.png")
    _lines(here / "a.jsonl", "a.png")
    result = shell("data", "stats", "jsonl", "file=a.jsonl", f"images={images}", "--json")
    assert result.status == 0, result.err
    assert json.loads(result.out)["images"] == 1


def test_cli_options_expand_the_home_directory(shell, picture, here, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "home"))
    picture("home/a.png")
    _lines(here / "home/a.jsonl", "~/a.png")
    assert shell("convert", "~/a.jsonl", "~/out", "--format", "jsonl,png").status == 0
    assert shell("view", "~/a.jsonl", "--out=~/v.html").err == [f"sca: wrote {here}/home/v.html, 1 region"]
    assert (here / "home/out/a.captions.png").exists()


@pytest.mark.parametrize("prefix", [LOCAL, "https://host/x/", "http://host/data/local-files/?d=sub/"])
def test_view_strips_the_image_prefix_that_convert_writes(shell, picture, here, prefix):
    picture("my pics/a b#1.png")
    _lines(here / "a.jsonl", "my pics/a b#1.png")
    assert shell("convert", "a.jsonl", "tasks", "--format", "label-studio", "--image-prefix", prefix).status == 0
    (task,) = json.loads((here / "tasks/label-studio.json").read_text())
    assert task["data"]["image"] == f"{prefix}my%20pics/a%20b%231.png"
    given = ("tasks/label-studio.json", "--image-prefix", prefix)
    assert shell("view", *given).err == ["sca: wrote view.html, 1 region"]
    assert shell("convert", *given, "again", "--format", "jsonl,png").status == 0
    assert json.loads((here / "again/captions.jsonl").read_text())["image"] == "my pics/a b#1.png"


def test_caption_writes_an_image_prefix(shell, refused, picture, checkpoint, here):
    arguments = ("--box", "1,1,9,9", "--max-new-tokens", 2, "--model", checkpoint, "--image-prefix", LOCAL, "--quiet")
    formats = ("--out", "out", "--format", "label-studio,jsonl")
    assert shell("caption", picture("pics/é.png"), *arguments, *formats).status == 0
    (task,) = json.loads((here / "out/label-studio.json").read_text())
    assert task["data"]["image"] == f"{LOCAL}pics/%C3%A9.png"
    assert json.loads((here / "out/captions.jsonl").read_text())["image"] == "pics/é.png"
    assert "add --format label-studio" in refused(2, "caption", "pics", *arguments)
    (here / "deep").mkdir()
    os.chdir(here / "deep")
    assert "leaves the folder" in refused(2, "caption", "../pics", *arguments, *formats)


@pytest.mark.parametrize(
    "name", ["/data/upload/1/1a2b3c4d-a.png", "/data/local-files/?d=sub%2Fa.png", "C:\\old\\a.png", "file:///old/a.png"]
)
def test_convert_rewrites_image_names_of_other_tools(shell, picture, here, name):
    picture("export/images/a.png")
    results = [
        {"id": "1", "type": "rectanglelabels", "original_width": 64, "original_height": 48}
        | {"value": {"x": 1, "y": 1, "width": 9, "height": 9, "rectanglelabels": ["region"]}},
        {"id": "1", "type": "textarea", "original_width": 64, "original_height": 48, "value": {"text": ["a cat"]}},
    ]
    tasks = [{"data": {"image": name}, "annotations": [{"result": results}]}]
    (here / "export/tasks.json").write_text(json.dumps(tasks))
    assert shell("view", "export/tasks.json").err == ["sca: wrote view.html, 1 region"]  # beside the file
    result = shell("convert", "export/tasks.json", "out", "--image-root", "export", "--format", "jsonl,labelme,png")
    assert result.status == 0, result.err
    assert json.loads((here / "out/captions.jsonl").read_text())["image"] == "images/a.png"


def test_convert_reports_image_urls_as_urls(shell, here):
    _lines(here / "a.jsonl", "https://host/a.png")
    result = shell("view", "a.jsonl")
    assert "'https://host/a.png' is a URL, not a file" in result.err[0]
    assert shell("convert", "a.jsonl", "out", "--format", "labelme").status == 0
    assert json.loads((here / "out/labelme/a.json").read_text())["imagePath"] == "https://host/a.png"


def test_convert_reports_an_unused_image_prefix(shell, here):
    _lines(here / "a.jsonl", "a.png")
    result = shell("convert", "a.jsonl", "out", "--format", "jsonl", "--image-prefix", LOCAL)
    assert f"sca: no image name of a.jsonl begins with --image-prefix {LOCAL}" in result.err


def test_caption_reads_images_below_linked_folders_once(shell, picture, checkpoint, here):
    picture("store/a.png")
    picture("in/b.png")
    (here / "in/link").symlink_to(here / "store")
    (here / "in/again").symlink_to(here / "store")
    (here / "store/loop").symlink_to(here / "in")
    result = shell(
        "caption", "in", "--box", "1,1,9,9", "--max-new-tokens", 2, "--model", checkpoint, "--out", "-", "--quiet"
    )
    assert [json.loads(line)["image"] for line in result.out.splitlines()] == ["in/again/a.png", "in/b.png"]


def test_caption_finds_images_of_labelme_files_in_a_linked_folder(shell, picture, here):
    picture("a.png")
    _lines(here / "a.jsonl", "a.png")
    (here / "far/away").mkdir(parents=True)
    (here / "out").symlink_to(here / "far/away")
    assert shell("convert", "a.jsonl", "out", "--format", "labelme").status == 0
    name = json.loads((here / "out/labelme/a.json").read_text())["imagePath"]
    assert os.path.samefile(here / "out/labelme" / name, here / "a.png")
    assert shell("convert", "out/labelme", "back", "--format", "jsonl,png").status == 0


@pytest.mark.parametrize("name", ["..\\pics\\a.png", "C:\\old\\pics\\a.png", "pics\\a.png"])
def test_view_reads_labelme_files_of_windows(shell, picture, here, name):
    picture("pics/a.png")
    picture("labels/pics/a.png")
    os.remove(here / ("labels/pics/a.png" if name.startswith("..") else "pics/a.png"))
    shape = {"label": "cat", "points": [[1, 1], [9, 9]], "shape_type": "rectangle"}
    content = {"imagePath": name, "imageWidth": 64, "imageHeight": 48, "shapes": [shape]}
    (here / "labels/a.json").write_text(json.dumps(content))
    assert shell("view", "labels").err == ["sca: wrote view.html, 1 region"]
