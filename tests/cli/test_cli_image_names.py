"""Commands resolve image names in files, and write names that other tools can open."""

import json
import os

import pytest

REGION_FIELDS = {"box": [1, 1, 9, 9], "caption": "a cat"}
LOCAL_FILES_PREFIX = "/data/local-files/?d="


def write_jsonl(path, *names):
    records = ({"image": name, "width": 64, "height": 48, **REGION_FIELDS} for name in names)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


@pytest.mark.parametrize(
    "folder", [".", "~/data", "фото", "1_000", "2024", "0123", "true", "my photos", "a#b", "./.", "写真/"]
)
@pytest.mark.slow
def test_data_stats_accepts_image_folders_of_any_name(run_sca, write_image, working_folder, monkeypatch, folder):
    monkeypatch.setenv("HOME", str(working_folder / "home"))
    write_image(os.path.expanduser(folder).removeprefix(f"{working_folder}/") + "/a.png")
    write_jsonl(working_folder / "a.jsonl", "a.png")
    result = run_sca("data", "stats", "jsonl", "file=a.jsonl", f"image_root={folder}", "--json")
    assert result.status == 0, result.err
    assert json.loads(result.out)["num_images"] == 1


def test_convert_and_view_expand_home_directory(run_sca, write_image, working_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(working_folder / "home"))
    write_image("home/a.png")
    write_jsonl(working_folder / "home/a.jsonl", "~/a.png")
    assert run_sca("convert", "~/a.jsonl", "~/out", "--format", "jsonl,png").status == 0
    assert run_sca("view", "~/a.jsonl", "--out=~/v.html").err == [f"sca: wrote {working_folder}/home/v.html, 1 region"]
    assert (working_folder / "home/out/a.captions.png").exists()


@pytest.mark.parametrize("prefix", [LOCAL_FILES_PREFIX, "https://host/x/", "http://host/data/local-files/?d=sub/"])
def test_view_and_convert_strip_image_prefix_that_convert_writes(run_sca, write_image, working_folder, prefix):
    write_image("my pics/a b#1.png")
    write_jsonl(working_folder / "a.jsonl", "my pics/a b#1.png")
    assert run_sca("convert", "a.jsonl", "tasks", "--format", "label-studio", "--image-prefix", prefix).status == 0
    (task,) = json.loads((working_folder / "tasks/label-studio.json").read_text())
    assert task["data"]["image"] == f"{prefix}my%20pics/a%20b%231.png"
    arguments = ("tasks/label-studio.json", "--image-prefix", prefix)
    assert run_sca("view", *arguments).err == ["sca: wrote view.html, 1 region"]
    assert run_sca("convert", *arguments, "again", "--format", "jsonl,png").status == 0
    assert json.loads((working_folder / "again/captions.jsonl").read_text())["image"] == "my pics/a b#1.png"


def test_caption_writes_image_prefix_only_to_label_studio_files(
    run_sca, get_sca_error, write_image, checkpoint, working_folder
):
    arguments = (
        "--box",
        "1,1,9,9",
        "--max-new-tokens",
        2,
        "--model",
        checkpoint,
        "--image-prefix",
        LOCAL_FILES_PREFIX,
        "--quiet",
    )
    formats = ("--out", "out", "--format", "label-studio,jsonl")
    assert run_sca("caption", write_image("pics/é.png"), *arguments, *formats).status == 0
    (task,) = json.loads((working_folder / "out/label-studio.json").read_text())
    assert task["data"]["image"] == f"{LOCAL_FILES_PREFIX}pics/%C3%A9.png"
    assert json.loads((working_folder / "out/captions.jsonl").read_text())["image"] == "pics/é.png"
    assert "--image-prefix requires --format label-studio; add it, or omit --image-prefix" in get_sca_error(
        2, "caption", "pics", *arguments
    )
    (working_folder / "deep").mkdir()
    os.chdir(working_folder / "deep")
    assert "leaves the folder" in get_sca_error(2, "caption", "../pics", *arguments, *formats)


@pytest.mark.parametrize(
    "name", ["/data/upload/1/1a2b3c4d-a.png", "/data/local-files/?d=sub%2Fa.png", "C:\\old\\a.png", "file:///old/a.png"]
)
def test_view_and_convert_find_images_named_by_other_tools(run_sca, write_image, working_folder, name):
    write_image("export/images/a.png")
    results = [
        {"id": "1", "type": "rectanglelabels", "original_width": 64, "original_height": 48}
        | {"value": {"x": 1, "y": 1, "width": 9, "height": 9, "rectanglelabels": ["region"]}},
        {"id": "1", "type": "textarea", "original_width": 64, "original_height": 48, "value": {"text": ["a cat"]}},
    ]
    tasks = [{"data": {"image": name}, "annotations": [{"result": results}]}]
    (working_folder / "export/tasks.json").write_text(json.dumps(tasks))
    assert run_sca("view", "export/tasks.json").err == ["sca: wrote view.html, 1 region"]  # beside the file
    result = run_sca("convert", "export/tasks.json", "out", "--image-root", "export", "--format", "jsonl,labelme,png")
    assert result.status == 0, result.err
    assert json.loads((working_folder / "out/captions.jsonl").read_text())["image"] == "images/a.png"


def test_view_reports_image_url_and_convert_keeps_it(run_sca, working_folder):
    write_jsonl(working_folder / "a.jsonl", "https://host/a.png")
    result = run_sca("view", "a.jsonl")
    assert "'https://host/a.png' is a URL, not a file" in result.err[0]
    assert run_sca("convert", "a.jsonl", "out", "--format", "labelme").status == 0
    assert json.loads((working_folder / "out/labelme/a.json").read_text())["imagePath"] == "https://host/a.png"


def test_convert_reports_unused_image_prefix(run_sca, working_folder):
    write_jsonl(working_folder / "a.jsonl", "a.png")
    result = run_sca("convert", "a.jsonl", "out", "--format", "jsonl", "--image-prefix", LOCAL_FILES_PREFIX)
    assert f"sca: no image name of a.jsonl begins with --image-prefix {LOCAL_FILES_PREFIX}" in result.err


def test_caption_reads_images_in_symlinked_folders_once(run_sca, write_image, checkpoint, working_folder):
    write_image("store/a.png")
    write_image("in/b.png")
    (working_folder / "in/link").symlink_to(working_folder / "store")
    (working_folder / "in/again").symlink_to(working_folder / "store")
    (working_folder / "store/loop").symlink_to(working_folder / "in")
    result = run_sca(
        "caption", "in", "--box", "1,1,9,9", "--max-new-tokens", 2, "--model", checkpoint, "--out", "-", "--quiet"
    )
    assert [json.loads(line)["image"] for line in result.out.splitlines()] == ["in/again/a.png", "in/b.png"]


def test_convert_finds_images_of_labelme_files_in_symlinked_folder(run_sca, write_image, working_folder):
    write_image("a.png")
    write_jsonl(working_folder / "a.jsonl", "a.png")
    (working_folder / "far/away").mkdir(parents=True)
    (working_folder / "out").symlink_to(working_folder / "far/away")
    assert run_sca("convert", "a.jsonl", "out", "--format", "labelme").status == 0
    name = json.loads((working_folder / "out/labelme/a.json").read_text())["imagePath"]
    assert os.path.samefile(working_folder / "out/labelme" / name, working_folder / "a.png")
    assert run_sca("convert", "out/labelme", "back", "--format", "jsonl,png").status == 0


@pytest.mark.parametrize("name", ["..\\pics\\a.png", "C:\\old\\pics\\a.png", "pics\\a.png"])
def test_view_reads_labelme_files_with_windows_paths(run_sca, write_image, working_folder, name):
    write_image("pics/a.png")
    write_image("labels/pics/a.png")
    os.remove(working_folder / ("labels/pics/a.png" if name.startswith("..") else "pics/a.png"))
    shape = {"label": "cat", "points": [[1, 1], [9, 9]], "shape_type": "rectangle"}
    content = {"imagePath": name, "imageWidth": 64, "imageHeight": 48, "shapes": [shape]}
    (working_folder / "labels/a.json").write_text(json.dumps(content))
    assert run_sca("view", "labels").err == ["sca: wrote view.html, 1 region"]
