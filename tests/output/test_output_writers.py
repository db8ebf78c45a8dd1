"""Whatever happens, what is finished is there and nothing is half there."""

import json
import os
from contextlib import contextmanager

import pytest
from PIL import Image

from sca.io.errors import OutputError
from sca.output.formats import OUTPUT_FORMATS, MultiFormatWriter
from sca.output.reader import read_captions


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def check_whole(folder, images: int) -> None:
    """Every format holds so many images of four regions each."""
    whole = [
        "captions.geojson",
        "captions.html",
        "captions.jsonl",
        "captions.parquet",
        "coco.json",
        "label-studio.json",
    ]
    assert names(folder) == sorted(["labelme", *whole, *(f"{n}.captions.png" for n in range(images))])
    assert names(folder / "labelme") == [f"{n}.json" for n in range(images)]
    for name in whole[:1] + whole[2:4] + whole[4:5]:
        assert sum(len(each.captions) for each in read_captions(folder / name)) == 4 * images, name
    assert len([json.loads(line) for line in (folder / "captions.jsonl").open()]) == 4 * images
    coco = json.loads((folder / "coco.json").read_text())
    assert (len(coco["images"]), len(coco["annotations"])) == (images, 4 * images)
    page = (folder / "captions.html").read_text()
    assert page.count("<section") == page.count("</section>") == images
    assert page.endswith("</html>\n")
    for n in range(images):
        Image.open(folder / f"{n}.captions.png").load()


def write(folder, images, picture, captions, formats=OUTPUT_FORMATS):
    with MultiFormatWriter(folder, formats, model="m") as writers:
        for n in range(images):
            writers.add(f"{n}.png", picture, captions)
    return writers


@pytest.mark.parametrize("images", [0, 1, 3])
def test_every_format_is_written(tmp_path, picture, captions, images):
    writers = write(tmp_path / "new" / "folder", images, picture, captions)
    check_whole(tmp_path / "new" / "folder", images)
    assert list(writers.paths) == list(OUTPUT_FORMATS)
    assert all(path.exists() for path in writers.paths.values())


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interrupted_run_keeps_what_is_finished(tmp_path, picture, captions, end):
    def run():
        with MultiFormatWriter(tmp_path, OUTPUT_FORMATS) as writers:
            for n in range(2):
                writers.add(f"{n}.png", picture, captions)
            raise end

    with pytest.raises(end):
        run()
    check_whole(tmp_path, 2)


def test_a_run_that_fails_before_the_first_image_leaves_the_last_run_as_it_is(tmp_path, picture, captions):
    write(tmp_path, 2, picture, captions)
    with pytest.raises(RuntimeError), MultiFormatWriter(tmp_path, OUTPUT_FORMATS):
        raise RuntimeError
    check_whole(tmp_path, 2)


def test_a_run_replaces_the_last_one(tmp_path, picture, captions):
    write(tmp_path, 1, picture, captions * 20)
    write(tmp_path, 1, picture, captions)
    check_whole(tmp_path, 1)


def test_nothing_has_its_name_before_it_is_whole(tmp_path, picture, captions):
    with MultiFormatWriter(tmp_path, OUTPUT_FORMATS) as writers:
        writers.add("0.png", picture, captions)
        assert not (tmp_path / "coco.json").exists()
        assert not (tmp_path / "captions.html").exists()
        assert (tmp_path / "0.captions.png").exists()
    check_whole(tmp_path, 1)


@contextmanager
def little_space(size):
    """A limit on the size of a file: writing reaches it in the middle of a piece, as on a full disk.

    It is lifted before the test ends: what reports on the tests may write to a longer file.
    """
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def add_many(writers, picture, captions):
    with writers:
        for n in range(1, 30):
            writers.add(f"{n}.png", picture, captions)


@pytest.mark.parametrize("name", OUTPUT_FORMATS)
def test_a_full_disk_is_one_clear_line_and_leaves_nothing_half(tmp_path, picture, captions, name):
    writers = MultiFormatWriter(tmp_path, [name])
    writers.add("0.png", picture, captions)
    size = max(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    each = name in ("png", "labelme")  # a file an image
    refused = pytest.raises(OutputError, match=r"cannot write .*; free some space or choose another folder")
    with little_space(size // 2 if each else size + 200), refused as raised:
        add_many(writers, picture, captions)
    assert "\n" not in str(raised.value)
    assert not [name for name in names(tmp_path) if name.endswith(".part")]
    if name == "jsonl":
        assert len([json.loads(line) for line in writers.paths[name].open()]) == 4
    if name == "png":
        assert names(tmp_path) == ["0.captions.png"]


def test_the_formats_that_can_be_kept_are(tmp_path, picture, captions):
    """The page outgrows the limit, the COCO file does not."""
    writers = MultiFormatWriter(tmp_path, ["html", "coco"])
    writers.add("0.png", picture, captions)
    page = max(path.stat().st_size for path in tmp_path.iterdir())
    with little_space(page + 4000), pytest.raises(OutputError, match=r"captions\.html"):
        add_many(writers, picture, captions)
    coco = json.loads((tmp_path / "coco.json").read_text())
    assert len(coco["images"]) >= 1
    assert len(coco["annotations"]) == 4 * len(coco["images"])


def no_rename(*_):
    raise OSError(28, "No space left on device")


def test_a_format_that_cannot_be_completed_does_not_stop_the_next(tmp_path, picture, captions, monkeypatch):
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (no_rename if new.suffix == ".html" else rename)(old, new))
    with pytest.raises(OutputError, match=r"captions\.html"):
        write(tmp_path, 1, picture, captions, ["html", "coco"])
    assert names(tmp_path) == ["coco.json"]


def test_what_ended_a_run_is_not_hidden_by_what_it_left(tmp_path, picture, captions, monkeypatch):
    def run():
        with MultiFormatWriter(tmp_path, OUTPUT_FORMATS) as writers:
            writers.add("0.png", picture, captions)
            monkeypatch.setattr(os, "replace", no_rename)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()


@pytest.mark.parametrize("name", ["coco", "html", "png"])
def test_a_file_that_cannot_be_renamed_leaves_the_old_one(tmp_path, picture, captions, monkeypatch, name):
    before = write(tmp_path, 1, picture, captions, [name])
    path = tmp_path / "0.captions.png" if name == "png" else before.paths[name]
    content = path.read_bytes()

    monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(OutputError, match="No space left"):
        write(tmp_path, 1, picture, captions[:1], [name])
    assert names(tmp_path) == [path.name]
    assert path.read_bytes() == content


def test_a_folder_that_cannot_be_written_is_found_before_the_first_image(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="choose another folder"):
            MultiFormatWriter(folder, OUTPUT_FORMATS)
    user = os.geteuid()
    (tmp_path / "closed").mkdir(mode=0o500)
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(OutputError, match=r"Permission denied; choose a folder that you may write in"):
            MultiFormatWriter(tmp_path / "closed", OUTPUT_FORMATS)
    finally:
        if user == 0:
            os.seteuid(user)


def test_an_unknown_format_is_refused_with_what_there_is(tmp_path):
    with pytest.raises(ValueError, match="unknown output format 'xml'; choose from jsonl, coco, parquet"):
        MultiFormatWriter(tmp_path / "out", ["jsonl", "xml"])
    assert not (tmp_path / "out").exists()


def test_equal_stems_get_a_picture_each(tmp_path, picture):
    paths = ["a/cat.png", "b/cat.jpg", "c/CAT.png", "cat-2.png", "d/cat.png", "x" * 250 + ".png", "日本.png", ".png"]
    with MultiFormatWriter(tmp_path, ["png"]) as writers:
        for path in paths:
            writers.add(path, picture, [])
    assert len(names(tmp_path)) == len({name.casefold() for name in names(tmp_path)}) == len(paths)
    assert {"cat.captions.png", "cat-2.captions.png", "日本.captions.png"} <= set(names(tmp_path))


def test_a_source_in_the_same_folder_is_not_written_over(tmp_path, picture, captions):
    picture.save(tmp_path / "0.png")
    content = (tmp_path / "0.png").read_bytes()
    write(tmp_path, 1, picture, captions, ["png"])
    assert (tmp_path / "0.png").read_bytes() == content


def test_files_can_be_read_by_whom_the_umask_allows(tmp_path, picture, captions):
    write(tmp_path, 1, picture, captions)
    (tmp_path / "plain").touch()
    files = {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {(tmp_path / "plain").stat().st_mode}
