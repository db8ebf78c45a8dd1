"""Images: opened as a viewer shows them, or rejected in one line."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile

from sca.io.errors import ImageMemoryError, InputError, TooLargeError
from sca.io.images import find_images, open_image, read_image


def get_error_message(path) -> str:
    with pytest.raises(InputError) as error_info:
        open_image(path)
    message = str(error_info.value)
    assert "\n" not in message
    assert os.path.basename(path) in message
    return message


@pytest.fixture
def unprivileged_user():
    """User without permissions for the folder of the test."""
    if os.name != "posix":
        pytest.skip("rights are another matter here")
    user_id = os.geteuid()
    if user_id == 0:
        os.seteuid(65534)
    yield
    if user_id == 0:
        os.seteuid(user_id)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "bmp", "gif"])
def test_open_image_opens_common_formats_as_rgb(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (7, 5), (200, 100, 50)).save(path)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (7, 5))
    assert np.abs(np.asarray(image).astype(int) - (200, 100, 50)).max() < 12


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_open_image_applies_exif_orientation_once(tmp_path, suffix, orientation):
    """The image of each EXIF orientation shows the same scene: red on the left, blue at the bottom right."""
    expected = np.full((32, 64, 3), 128, np.uint8)
    expected[:, :16], expected[16:, 48:] = (255, 0, 0), (0, 0, 255)
    stored_array = {
        1: expected,
        2: expected[:, ::-1],
        3: expected[::-1, ::-1],
        4: expected[::-1],
        5: expected.transpose(1, 0, 2),
        6: np.rot90(expected),
        7: expected[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(expected, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored_array)).save(path, exif=exif, quality=95)
    image = open_image(path)
    assert image.size == (64, 32)
    assert np.abs(np.asarray(image).astype(int) - expected)[4:32:8, 8::16].max() < 40
    assert not image.getexif(), "a second reader of the EXIF would turn it again"


def test_16_bit_gray_keeps_its_scale(tmp_path):
    ramp = np.array([[0, 255, 300, 40000, 65535]], np.uint16)
    for suffix in ("png", "tif"):
        Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
        assert np.asarray(open_image(tmp_path / f"a.{suffix}"))[0, :, 0].tolist() == [0, 1, 1, 156, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 2048, 4080], [0, 128, 254]),  # 12 bits
        ([0, 512, 1020], [0, 128, 254]),  # 10 bits
        ([7, 100, 200], [7, 100, 200]),  # 8 bits
        ([21000, 22000, 23000], [0, 128, 255]),  # a narrow range, as of thermal cameras
        ([40000, 40000, 40000], [156, 156, 156]),
        ([0, 0, 0], [0, 0, 0]),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_open_image_scales_16_bit_gray_of_fewer_bits_or_narrow_range(tmp_path, values, expected, suffix):
    Image.fromarray(np.array([values], np.uint16)).save(tmp_path / f"a.{suffix}")
    assert np.asarray(open_image(tmp_path / f"a.{suffix}"))[0, :, 0].tolist() == pytest.approx(expected, abs=1)


def test_open_image_scales_16_bit_gray_by_the_range_recorded_in_a_tiff(tmp_path):
    image = Image.fromarray(np.array([[1000, 1500, 2000]], np.uint16))
    image.save(tmp_path / "a.tif", tiffinfo={280: 1000, 281: 3000})
    assert np.asarray(open_image(tmp_path / "a.tif"))[0, :, 0].tolist() == pytest.approx([0, 64, 128], abs=1)


def test_open_image_warns_about_scaled_gray_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("sca.io.warnings_once._warned_keys", set())
    for name in ("a.png", "b.png"):
        Image.fromarray(np.array([[0, 4000]], np.uint16)).save(tmp_path / name)
        open_image(tmp_path / name)
    assert [record.getMessage().count("a.png: gray values are scaled from 0..4095") for record in caplog.records] == [1]


def write_16_bit_png(path, colors, exif):
    """Encode (height, width, 3 or 4) colors as a PNG that Pillow cannot write."""

    def build_chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, channels = colors.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colors)
    content = (
        build_chunk(b"IHDR", header)
        + (build_chunk(b"eXIf", exif) if exif else b"")
        + build_chunk(b"IDAT", zlib.compress(rows))
        + build_chunk(b"IEND", b"")
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("num_bits", [10, 12, 14, 16])
def test_open_image_scales_16_bit_colors(tmp_path, caplog, monkeypatch, num_bits, channels):
    colors = np.linspace(0, 2**num_bits - 1, 60).reshape(5, 4, 3)
    alpha = np.full((5, 4, channels - 3), 2**16 - 1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    path = tmp_path / f"{num_bits}-{channels}.png"
    write_16_bit_png(path, np.concatenate([colors, alpha], 2), exif.tobytes().removeprefix(b"Exif\0\0"))
    monkeypatch.setattr("sca.io.warnings_once._warned_keys", set())
    decoded = np.asarray(open_image(path))[::-1, ::-1]
    levels = 2 ** (num_bits - 8)
    assert np.abs(decoded - colors * (255 / (2**num_bits - 1))).max() <= 255 / (levels - 1) + 1
    assert len(caplog.records) == (num_bits < 16)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 51.0, 255.0]], np.float32), [0, 51, 255]),
        (np.array([[0, 32896, 65535]], np.int32), [0, 128, 255]),
        (np.array([[0, 7, 200]], np.int32), [0, 7, 200]),
        (np.array([[-100.0, 0.0, 100.0]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, 0.0, 1.0]], np.float32), [0, 0, 255]),
        (np.array([[np.nan, np.nan]], np.float32), [0, 0]),
        (np.array([[-3.0, -3.0]], np.float32), [0, 0]),
    ],
)
def test_32_bit_gray_is_scaled_by_what_holds_its_values(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert np.asarray(open_image(tmp_path / "a.tif"))[0, :, 0].tolist() == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "L", "RGB"])
def test_open_image_shows_transparency_as_white(tmp_path, mode):
    """The left half is transparent black, the right half opaque black."""
    path = tmp_path / "a.png"
    gray = Image.fromarray(np.array([[0, 10]], np.uint8))
    if mode in ("LA", "RGBA"):
        image = gray.convert(mode)
        image.putalpha(Image.fromarray(np.array([[0, 255]], np.uint8)))
        image.save(path)
    elif mode == "P":
        gray.convert("P").save(path, transparency=0)
    else:
        gray.convert(mode).save(path, transparency=0 if mode == "L" else (0, 0, 0))
    assert np.asarray(open_image(path))[0, :, 0].tolist() == [255, 10]


def test_open_image_composites_half_transparency_on_white(tmp_path):
    Image.new("RGBA", (2, 2), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 127, 127)


def test_open_image_converts_cmyk_to_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    red, green, blue = open_image(tmp_path / "a.jpg").getpixel((4, 4))
    assert red > 200
    assert max(green, blue) < 60


def test_open_image_returns_the_first_of_several_frames(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for suffix in ("gif", "tif", "webp"):
        path = tmp_path / f"a.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        red, _, blue = open_image(path).getpixel((0, 0))
        assert red > 200 > 50 > blue


@pytest.mark.parametrize("size", [(1, 1), (20000, 10), (10, 20000)])
def test_open_image_opens_extreme_sizes(tmp_path, size):
    Image.new("L", size).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").size == size


def test_open_image_rejects_missing_files_folders_and_other_content(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n")
    assert "no such file" in get_error_message(tmp_path / "missing.jpg")
    assert "is a folder" in get_error_message(tmp_path)
    assert "0 bytes" in get_error_message(tmp_path / "empty.jpg")
    assert "not a readable image" in get_error_message(tmp_path / "text.jpg")
    assert "not a readable image" in get_error_message(tmp_path / "program.eps")
    with pytest.raises(InputError, match="nul"):
        open_image("nul\0.jpg")
    with pytest.raises(InputError) as error_info:
        open_image(tmp_path / "two\nlines.jpg")
    assert "\n" not in str(error_info.value)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "gif", "bmp"])
def test_open_image_rejects_truncated_images(tmp_path, suffix):
    rng = np.random.default_rng(0)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "damaged" in get_error_message(path) or "not a readable image" in get_error_message(path)


def test_open_image_rejects_a_decompression_bomb_with_its_pixel_count(tmp_path):
    def build_chunk(chunk_type: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + chunk_type + data + struct.pack(">I", zlib.crc32(chunk_type + data))

    header = build_chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 10000, 8, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + build_chunk(b"IDAT", b""))
    message = get_error_message(tmp_path / "a.png")
    assert "200000000" in message
    assert "178956970" in message


def test_open_image_limit_is_twice_the_pillow_limit_without_warnings(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("L", (40, 40)).save(tmp_path / "a.png")
    Image.new("L", (50, 50)).save(tmp_path / "b.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(tmp_path / "a.png").size == (40, 40)
    assert "2500 pixels" in get_error_message(tmp_path / "b.png")


def test_open_image_keeps_its_limit_if_the_pillow_limit_is_disabled(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr("sca.io.images.PIXEL_LIMIT", 2000)
    Image.new("L", (50, 50)).save(tmp_path / "b.png")
    assert "2,500 pixels (50 x 50)" in get_error_message(tmp_path / "b.png")


def test_open_image_reports_a_file_without_read_permission(tmp_path, open_unreadable_image):
    assert "permission denied" in open_unreadable_image(tmp_path)


@pytest.fixture
def open_unreadable_image(request):
    def open_without_permission(folder):
        Image.new("L", (2, 2)).save(folder / "a.png")
        (folder / "a.png").chmod(0)
        request.getfixturevalue("unprivileged_user")
        return get_error_message(folder / "a.png")

    return open_without_permission


def test_find_images_lists_files_folders_and_patterns_once_and_sorted(tmp_path):
    for name in ("b.JPG", "a.png", "sub/c.webp", ".hidden.png", "._b.jpg", "notes.txt", ".cache/d.png", "sub/[1].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    images, problems = find_images([tmp_path / "sub" / "c.webp", tmp_path, str(tmp_path / "*.png")])
    assert [str(image.relative_to(tmp_path)) for image in images] == ["sub/c.webp", "a.png", "b.JPG", "sub/[1].png"]
    assert problems == []
    assert find_images([str(tmp_path / "sub" / "[1].png")])[0] == [tmp_path / "sub" / "[1].png"], "a name, no pattern"
    assert len(find_images([str(tmp_path / "**")])[0]) == 4
    assert find_images([str(tmp_path / "s*")])[0] == [tmp_path / "sub" / "[1].png", tmp_path / "sub" / "c.webp"]
    assert find_images([tmp_path / "notes.txt"])[0] == [tmp_path / "notes.txt"], "a file is taken at its word"


def test_find_images_collects_problems_and_keeps_valid_images(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "none").mkdir()
    images, problems = find_images(
        [tmp_path / "missing.png", str(tmp_path / "x*.png"), tmp_path / "none", "bad\0", tmp_path / "a.png"]
    )
    assert images == [tmp_path / "a.png"]
    assert len(problems) == 4
    assert not any("\n" in problem for problem in problems)
    for problem, expected_text in zip(
        problems, ("no file or folder", "nothing matches", "no images", "bad"), strict=True
    ):
        assert expected_text in problem


# --- images of unknown origin -----------------------------------------------------------------------------------------


def make_blp(side=64):
    content = b"BLP2" + struct.pack("<i4bII", 1, 2, 8, 7, 0, side, side) + struct.pack("<16I", 1172, *[0] * 15)
    content += struct.pack("<16I", side * side, *[0] * 15)
    return content.ljust(1172, b"\0") + bytes(side * side)


def make_ico_with_a_large_png():
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    content = buffer.getvalue()
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(content), 22) + content


UNLISTED_FORMATS = {
    "blp": make_blp(),
    "qoi": b"qoif" + struct.pack(">IIBB", 8, 8, 3, 0) + b"\1\2" * 32 + b"\0" * 7 + b"\1",
    "xpm": b'/* XPM */\nstatic char *a[] = {\n"1 1 1 1",\n"a c #000000",\n"a"\n};',
    "ico": make_ico_with_a_large_png(),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n",
}


@pytest.mark.parametrize("image_format", UNLISTED_FORMATS)
def test_read_image_rejects_unlisted_formats_without_decoding(image_format, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(InputError, match="not a readable image"):
        read_image(io.BytesIO(UNLISTED_FORMATS[image_format]), "it", 10**6)


@pytest.mark.parametrize(
    "content", [b"P3\n2 1\n255\n1 2 3 4 5 6\n", b"P5\n2 1\n100\n12", b"P1\n2 1\n1 0\n"], ids=["P3", "P5", "P1"]
)
def test_read_image_decodes_rare_ppm_variants_only_without_pixel_limit(content):
    assert read_image(io.BytesIO(content), "it").size == (2, 1)
    with pytest.raises(InputError, match="rare variant of PPM that decodes slowly; convert it to PNG"):
        read_image(io.BytesIO(content), "it", 10**6)


@pytest.mark.parametrize(
    "image_format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "JPEG2000", "AVIF"]
)
def test_read_image_checks_the_pixel_limit_before_decoding(image_format, monkeypatch):
    buffer = io.BytesIO()
    Image.new("RGB", (300, 200)).save(buffer, image_format)
    assert read_image(io.BytesIO(buffer.getvalue()), "it", 60_000).size == (300, 200)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(TooLargeError, match=r"60,000 pixels \(300 x 200\), 59,999 are allowed"):
        read_image(io.BytesIO(buffer.getvalue()), "it", 59_999)


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory error when reading image file")])
def test_read_image_reports_out_of_memory_as_memory_error(error, monkeypatch):
    def raise_error(_):
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", raise_error)
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2)).save(buffer, "BMP")
    with pytest.raises(ImageMemoryError, match="is too large for the available memory"):
        read_image(io.BytesIO(buffer.getvalue()), "it")
