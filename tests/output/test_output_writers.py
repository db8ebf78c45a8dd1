"""Writers: after an error, finished outputs are complete and no partial output exists."""

import json
import os
from contextlib import contextmanager
from xml.etree import ElementTree

import pytest
from PIL import Image

from sca.io.errors import OutputError
from sca.output.formats import OUTPUT_FORMATS, MultiFormatWriter
from sca.output.reader import read_captions


def list_names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_outputs_are_complete(folder, num_images: int) -> None:
    """Assert that every format contains `num_images` images of four regions each."""
    file_names = [
        "captions.geojson",
        "captions.html",
        "captions.jsonl",
        "captions.parquet",
        "coco.json",
        "label-studio.json",
    ]
    other_names = ("cvat.xml", "fiftyone", "labelme", "yolo", *(f"{n}.captions.png" for n in range(num_images)))
    assert list_names(folder) == sorted([*file_names, *other_names])
    assert list_names(folder / "labelme") == [f"{n}.json" for n in range(num_images)]
    cvat = ElementTree.parse(folder / "cvat.xml")
    assert (len(cvat.findall("image")), len(cvat.findall("image/*"))) == (num_images, 4 * num_images)
    assert list_names(folder / "fiftyone") == ["metadata.json", "samples.json"]
    samples = json.loads((folder / "fiftyone/samples.json").read_text())["samples"]
    assert [len(sample["regions"]["detections"]) for sample in samples] == [3] * num_images
    assert list_names(folder / "yolo") == ["data.yaml", "images", "labels"]
    for n in range(num_images):
        Image.open(folder / f"yolo/images/{n}.png").load()
        assert len((folder / f"yolo/labels/{n}.txt").read_text().splitlines()) == 3
    for name in file_names[:1] + file_names[2:4] + file_names[4:5]:
        num_captions = 3 if name == "coco.json" else 4  # COCO has no points
        assert (
            sum(len(captioned_image.captions) for captioned_image in read_captions(folder / name))
            == num_captions * num_images
        ), name
    assert len([json.loads(line) for line in (folder / "captions.jsonl").open()]) == 4 * num_images
    coco = json.loads((folder / "coco.json").read_text())
    assert (len(coco["images"]), len(coco["annotations"])) == (num_images, 3 * num_images)
    page = (folder / "captions.html").read_text()
    assert page.count("<section") == page.count("</section>") == num_images
    assert page.endswith("</html>\n")
    for n in range(num_images):
        Image.open(folder / f"{n}.captions.png").load()


def write_outputs(folder, num_images, image, captions, formats=OUTPUT_FORMATS):
    with MultiFormatWriter(folder, formats, model="m") as writers:
        for n in range(num_images):
            writers.add(f"{n}.png", image, captions)
    return writers


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_multi_format_writer_writes_every_format(tmp_path, noise_image, captions, num_images):
    writers = write_outputs(tmp_path / "new" / "folder", num_images, noise_image, captions)
    assert_outputs_are_complete(tmp_path / "new" / "folder", num_images)
    assert list(writers.paths) == list(OUTPUT_FORMATS)
    assert all(path.exists() for path in writers.paths.values())


@pytest.mark.parametrize("exception_type", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_multi_format_writer_keeps_finished_images_after_an_exception(tmp_path, noise_image, captions, exception_type):
    def write_and_raise():
        with MultiFormatWriter(tmp_path, OUTPUT_FORMATS) as writers:
            for n in range(2):
                writers.add(f"{n}.png", noise_image, captions)
            raise exception_type

    with pytest.raises(exception_type):
        write_and_raise()
    assert_outputs_are_complete(tmp_path, 2)


def test_multi_format_writer_keeps_earlier_outputs_if_it_fails_before_an_image(tmp_path, noise_image, captions):
    write_outputs(tmp_path, 2, noise_image, captions)
    with pytest.raises(RuntimeError), MultiFormatWriter(tmp_path, OUTPUT_FORMATS):
        raise RuntimeError
    assert_outputs_are_complete(tmp_path, 2)


def test_multi_format_writer_replaces_earlier_outputs(tmp_path, noise_image, captions):
    write_outputs(tmp_path, 1, noise_image, captions * 20)
    write_outputs(tmp_path, 1, noise_image, captions)
    assert_outputs_are_complete(tmp_path, 1)


def test_multi_format_writer_publishes_files_only_when_complete(tmp_path, noise_image, captions):
    with MultiFormatWriter(tmp_path, OUTPUT_FORMATS) as writers:
        writers.add("0.png", noise_image, captions)
        assert not (tmp_path / "coco.json").exists()
        assert not (tmp_path / "captions.html").exists()
        assert (tmp_path / "0.captions.png").exists()
    assert_outputs_are_complete(tmp_path, 1)


@contextmanager
def limit_file_size(max_bytes):
    """Limit the size of a file; writing fails in the middle of a chunk, as on a full disk.

    It is lifted before the test ends: what reports on the tests may write to a longer file.
    """
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def add_images(writers, image, captions):
    with writers:
        for n in range(1, 30):
            writers.add(f"{n}.png", image, captions)


@pytest.mark.parametrize("format_name", OUTPUT_FORMATS)
def test_multi_format_writer_reports_a_full_disk_and_leaves_no_partial_files(
    tmp_path, noise_image, captions, format_name
):
    writers = MultiFormatWriter(tmp_path, [format_name])
    writers.add("0.png", noise_image, captions)
    largest_file_bytes = max(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    has_file_per_image = format_name in ("png", "labelme", "yolo")  # a file an image
    expect_error = pytest.raises(OutputError, match=r"cannot write .*; free some space or choose another folder")
    with (
        limit_file_size(largest_file_bytes // 2 if has_file_per_image else largest_file_bytes + 200),
        expect_error as error_info,
    ):
        add_images(writers, noise_image, captions)
    assert "\n" not in str(error_info.value)
    assert not [format_name for format_name in list_names(tmp_path) if format_name.endswith(".part")]
    if format_name == "jsonl":
        assert len([json.loads(line) for line in writers.paths[format_name].open()]) == 4
    if format_name == "png":
        assert list_names(tmp_path) == ["0.captions.png"]


def test_multi_format_writer_keeps_other_formats_on_a_full_disk(tmp_path, noise_image, captions):
    """The page exceeds the limit; the COCO file does not."""
    writers = MultiFormatWriter(tmp_path, ["html", "coco"])
    writers.add("0.png", noise_image, captions)
    page_bytes = max(path.stat().st_size for path in tmp_path.iterdir())
    with limit_file_size(page_bytes + 4000), pytest.raises(OutputError, match=r"captions\.html"):
        add_images(writers, noise_image, captions)
    coco = json.loads((tmp_path / "coco.json").read_text())
    assert len(coco["images"]) >= 1
    assert len(coco["annotations"]) == 3 * len(coco["images"])


def raise_disk_full(*_):
    raise OSError(28, "No space left on device")


def test_multi_format_writer_completes_other_formats_if_one_rename_fails(tmp_path, noise_image, captions, monkeypatch):
    rename = os.replace
    monkeypatch.setattr(
        os, "replace", lambda old, new: (raise_disk_full if new.suffix == ".html" else rename)(old, new)
    )
    with pytest.raises(OutputError, match=r"captions\.html"):
        write_outputs(tmp_path, 1, noise_image, captions, ["html", "coco"])
    assert list_names(tmp_path) == ["coco.json"]


def test_multi_format_writer_raises_the_original_exception_if_cleanup_fails(
    tmp_path, noise_image, captions, monkeypatch
):
    def write_and_interrupt():
        with MultiFormatWriter(tmp_path, OUTPUT_FORMATS) as writers:
            writers.add("0.png", noise_image, captions)
            monkeypatch.setattr(os, "replace", raise_disk_full)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_interrupt()


@pytest.mark.parametrize("format_name", ["coco", "html", "png"])
def test_multi_format_writer_keeps_the_old_file_if_a_rename_fails(
    tmp_path, noise_image, captions, monkeypatch, format_name
):
    earlier_writers = write_outputs(tmp_path, 1, noise_image, captions, [format_name])
    path = tmp_path / "0.captions.png" if format_name == "png" else earlier_writers.paths[format_name]
    content = path.read_bytes()

    monkeypatch.setattr(os, "replace", raise_disk_full)
    with pytest.raises(OutputError, match="No space left"):
        write_outputs(tmp_path, 1, noise_image, captions[:1], [format_name])
    assert list_names(tmp_path) == [path.name]
    assert path.read_bytes() == content


def test_multi_format_writer_rejects_an_unwritable_folder_at_once(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="choose another folder"):
            MultiFormatWriter(folder, OUTPUT_FORMATS)
    user_id = os.geteuid()
    (tmp_path / "closed").mkdir(mode=0o500)
    if user_id == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(OutputError, match=r"Permission denied; choose a folder that you may write in"):
            MultiFormatWriter(tmp_path / "closed", OUTPUT_FORMATS)
    finally:
        if user_id == 0:
            os.seteuid(user_id)


def test_multi_format_writer_rejects_an_unknown_format_and_lists_formats(tmp_path):
    with pytest.raises(ValueError, match="unknown output format 'xml'; choose from jsonl, coco, parquet"):
        MultiFormatWriter(tmp_path / "out", ["jsonl", "xml"])
    assert not (tmp_path / "out").exists()


def test_png_writer_writes_distinct_files_for_equal_stems(tmp_path, noise_image):
    paths = ["a/cat.png", "b/cat.jpg", "c/CAT.png", "cat-2.png", "d/cat.png", "x" * 250 + ".png", "日本.png", ".png"]
    with MultiFormatWriter(tmp_path, ["png"]) as writers:
        for path in paths:
            writers.add(path, noise_image, [])
    assert len(list_names(tmp_path)) == len({name.casefold() for name in list_names(tmp_path)}) == len(paths)
    assert {"cat.captions.png", "cat-2.captions.png", "日本.captions.png"} <= set(list_names(tmp_path))


def test_png_writer_does_not_overwrite_the_source_image(tmp_path, noise_image, captions):
    noise_image.save(tmp_path / "0.png")
    content = (tmp_path / "0.png").read_bytes()
    write_outputs(tmp_path, 1, noise_image, captions, ["png"])
    assert (tmp_path / "0.png").read_bytes() == content


def test_multi_format_writer_applies_the_umask_to_files(tmp_path, noise_image, captions):
    write_outputs(tmp_path, 1, noise_image, captions)
    (tmp_path / "plain").touch()
    file_modes = {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert file_modes == {(tmp_path / "plain").stat().st_mode}
