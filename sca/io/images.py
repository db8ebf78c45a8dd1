"""Open images in the orientation and range in which viewers show them, and find image files."""

from __future__ import annotations

import errno
import glob
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile

from sca.hints import check_argument_names
from sca.io.errors import ImageMemoryError, InputError, IrregularFileError, TooLargeError
from sca.io.file_walk import walk_files
from sca.io.json import open_regular_file
from sca.io.masks import PIXEL_LIMIT
from sca.io.validation import is_finite_number
from sca.io.warnings_once import warn_once

IMAGE_FORMATS = {  # formats to read, by Pillow's names, and the suffixes that folders are searched for
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif"),  # if pillow-heif has registered it
    "JPEG2000": (".jp2",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TGA": (".tga",),
}
WHITE_LEVELS = (1, 255, 1023, 4095, 16383, 65535)  # white levels of gray images with more than 8 bits
DEEP_COLOR_MODE = re.compile(r"RGB[AX]{0,2};16")  # Pillow's raw modes of 16-bit colors
STANDARD_RANGES = [(0, 1), (0, 255), (0, 65535)]  # ranges that need no warning
IMAGE_SUFFIXES = tuple(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)

_ORIENTATION_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPPING_ORIENTATIONS = (5, 6, 7, 8)  # EXIF orientations that swap width and height

EMPTY_FILE_MESSAGE = "{} is empty (0 bytes); copy or download it again"


@check_argument_names()
def open_image(path: str | Path, allow_pipe: bool = False) -> Image.Image:
    """Open an image as RGB.

    The EXIF orientation is applied, transparency is composited over white, and only the first frame is read.

    Grayscale images with more than 8 bits per pixel are rescaled to 8 bits from a source range: the range recorded in
    the file, or else the smallest of [0, 1] (floating point only), [0, 255], [0, 1023], [0, 4095], [0, 16383] and
    [0, 65535] that contains all pixel values. If none does, or if the pixel values span less than an eighth of the
    range, the minimum and maximum pixel values are used. 16-bit colors that use only 10, 12 or 14 bits are also scaled.

    Args:
        path: Image file.
        allow_pipe: Accept a pipe such as /dev/stdin. Enable it only for trusted paths, such as command-line arguments.

    Returns:
        Upright RGB image.

    Raises:
        TypeError: Unknown keyword argument; the message suggests the closest one.
        InputError: The file is missing, unreadable, not an image, or too large.
    """
    with _open_image_file(path, allow_pipe) as file:
        return read_image(file, format_path(path))


def read_image_file_size(path: str | Path) -> tuple[int, int]:
    """Return the width and height of the upright image in a file, without decoding it.

    Args:
        path: Image file.

    Returns:
        Width and height in pixels.

    Raises:
        InputError: The file cannot be opened.
    """
    with _open_image_file(path) as file, _translate_decoder_errors(format_path(path)):
        return read_upright_size(file)


@contextmanager
def _open_image_file(path: str | Path, allow_pipe: bool = False) -> Iterator[BinaryIO]:
    display_name = format_path(path)
    try:
        if os.path.isdir(path):
            raise InputError(f"{display_name} is a folder, not an image; name a file in it")
        with open_regular_file(path, require_seekable=True, allow_pipe=allow_pipe) as file:
            yield file
    except IrregularFileError as error:
        raise InputError(
            f"{display_name} is a pipe or a device, not an image file; save the image to a file and pass its path"
        ) from error
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"cannot open the image {display_name}: {_describe_os_error(error)}") from error


def read_image(file: BinaryIO, display_name: str, max_pixels: int | None = None) -> Image.Image:
    """Decode an image from an open file, as `open_image` does.

    Args:
        file: Open file.
        display_name: Name of the file in messages.
        max_pixels: Maximum number of pixels, for images from untrusted sources. It also excludes decoders written in
            Python, which a small file can keep busy for minutes.

    Returns:
        The upright RGB image.

    Raises:
        InputError: The file is not an image, or has too many pixels.
    """
    return decode_image(open_image_header(file, display_name, max_pixels), display_name)


def open_image_header(file: BinaryIO, display_name: str, max_pixels: int | None = None) -> ImageFile.ImageFile:
    """Open an image without decoding it, and check its header. See `read_image` for the arguments.

    Args:
        file: Open file.
        display_name: Name of the file in messages.
        max_pixels: Maximum number of pixels.

    Returns:
        The undecoded image.

    Raises:
        InputError: The file is not an image that can be read.
        TooLargeError: The image has too many pixels.
    """
    pixel_limit = PIXEL_LIMIT if max_pixels is None else max_pixels
    with _translate_decoder_errors(display_name):
        if not file.read(1):
            raise InputError(EMPTY_FILE_MESSAGE.format(display_name))
        file.seek(0)
        image = open_undecoded(file)
        if image.width * image.height > pixel_limit:
            raise TooLargeError(
                f"{display_name} has {image.width * image.height:,} pixels ({image.width} x {image.height}), "
                f"{pixel_limit:,} are allowed; resize the image"
            )
        if max_pixels is not None and any(tile[0] in Image.DECODERS for tile in image.tile):
            raise InputError(
                f"{display_name} uses a rare variant of {image.format} that decodes slowly; convert it to PNG"
            )
        return image


def decode_image(image: ImageFile.ImageFile, display_name: str) -> Image.Image:
    """Decode the result of `open_image_header`, as `open_image` does."""
    with _translate_decoder_errors(display_name):
        has_deep_colors = any(DEEP_COLOR_MODE.match(_get_raw_mode(tile)) for tile in image.tile)
        image.load()
        return _convert_to_upright_rgb(image, display_name, has_deep_colors)


def open_undecoded(file: BinaryIO | str | Path) -> ImageFile.ImageFile:
    """Open an image in one of `IMAGE_FORMATS` without decoding it: its size and mode are available, its pixels are not.

    Args:
        file: Open file or path.

    Returns:
        The undecoded image.

    Raises:
        PIL.UnidentifiedImageError: The file has a different format.
    """
    Image.init()
    return Image.open(file, formats=[name for name in IMAGE_FORMATS if name in Image.OPEN])


def read_upright_size(file: BinaryIO) -> tuple[int, int]:
    """Return the width and height of the upright image in a file, without decoding it."""
    image = open_undecoded(file)
    is_upright = image.format == "TIFF"  # Pillow rotates TIFF itself, and reports the rotated size
    is_turned = not is_upright and image.getexif().get(ExifTags.Base.Orientation) in SWAPPING_ORIENTATIONS
    return (image.height, image.width) if is_turned else image.size


def convert_to_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    """Convert an image in memory to RGB, as `open_image` does.

    Args:
        image: PIL image, or a (height, width, 3) uint8 RGB array.

    Returns:
        The RGB image.

    Raises:
        InputError: `image` has an unsupported type, shape or dtype.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise InputError(
                f"an array of {image.dtype} with shape {image.shape}; expected (height, width, 3) uint8 in RGB"
            )
        return Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise InputError(
            f"{type(image).__name__} is not an image; expected a PIL image or a uint8 array, or use sca.open_image"
        )
    return image if image.mode == "RGB" and not image.info else _convert_to_upright_rgb(image, "an image")


def find_images(
    arguments: Sequence[str | Path], is_excluded: Callable[[Path], bool] = lambda path: False
) -> tuple[list[Path], list[str]]:
    """Find the images that files, folders and glob patterns name.

    Files are used unchanged. Folders are searched recursively. Folders and patterns yield the files with a suffix in
    `IMAGE_SUFFIXES`, sorted, without hidden files. Duplicates are removed; the first occurrence is kept.

    Args:
        arguments: Files, folders and glob patterns.
        is_excluded: Whether to exclude an image found in a folder or by a pattern.

    Returns:
        Paths of the images, and one message per argument or folder that failed.
    """
    images_by_path: dict[str, Path] = {}
    problems: list[str] = []
    for argument in arguments:
        path = Path(os.path.expanduser(argument))
        try:
            for image in _list_argument_images(path, problems):
                if image == path or not is_excluded(image):
                    images_by_path.setdefault(os.path.abspath(image), image)
        except InputError as error:
            problems.append(str(error))
        except (OSError, ValueError) as error:
            problems.append(f"{format_path(path)}: {_describe_os_error(error)}")
    return list(images_by_path.values()), problems


def is_irregular_file(path: Path) -> bool:
    """Return whether a path is a pipe, a socket or a device, which may never end."""
    return path.exists() and not (path.is_file() or path.is_dir())


def format_path(path: str | Path) -> str:
    """Format a path on one line."""
    text = str(path)
    return text if text and text.isprintable() else repr(text)


@contextmanager
def _translate_decoder_errors(display_name: str) -> Iterator[None]:
    """Convert Pillow's exceptions to one-line errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about large images that are allowed, and about odd metadata
            yield
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"{display_name}: {str(error).split(',')[0]}; resize the image") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{display_name} is not a readable image; convert it to JPEG or PNG") from error
    except Exception as error:  # a decoder may raise anything for damaged data
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, MemoryError) or "out of memory" in reason.lower():  # Pillow's decoders report it as text
            raise ImageMemoryError(f"{display_name} is too large for the available memory; resize the image") from error
        raise InputError(f"{display_name} is truncated or damaged ({reason}); copy or export it again") from error


def _convert_to_upright_rgb(image: Image.Image, display_name: str, has_deep_colors: bool = False) -> Image.Image:
    """Convert a loaded image to upright RGB, without the EXIF orientation, so that it is not applied twice."""
    try:
        transpose = _ORIENTATION_TRANSPOSES.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata: no rotation
        transpose = None
    if has_deep_colors:
        image = _scale_colors(image, display_name)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = Image.fromarray(_scale_gray(np.asarray(image), _read_recorded_range(image), display_name))
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(rgba, mask=rgba.getchannel("A"))
    rgb = image.convert("RGB") if transpose is None else image.convert("RGB").transpose(transpose)
    rgb.info = {}
    return rgb


def _read_recorded_range(image: Image.Image) -> tuple[float, float] | None:
    """Return the minimum and maximum sample value that a TIFF records, or None."""
    tags = getattr(image, "tag_v2", {})
    for min_tag, max_tag in ((280, 281), (340, 341)):  # MinSampleValue and MaxSampleValue; SMin... and SMax...
        low, high = _parse_first_number(tags.get(min_tag, 0)), _parse_first_number(tags.get(max_tag))
        if low is not None and high is not None and low < high:
            return low, high
    return None


def _parse_first_number(value: Any) -> float | None:
    """Return the value of a TIFF tag, or the first of several; None if it is not a finite number."""
    first = value[0] if isinstance(value, tuple) and value else value
    return float(first) if is_finite_number(first) else None


def _scale_gray(values: np.ndarray, recorded_range: tuple[float, float] | None, display_name: str) -> np.ndarray:
    """Scale (height, width) gray of 16 or 32 bits to uint8, see `open_image`; non-finite values become the minimum."""
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(values.shape, np.uint8)
    low, high = float(values[finite].min()), float(values[finite].max())
    white_levels = WHITE_LEVELS if values.dtype.kind == "f" else WHITE_LEVELS[1:]
    ranges = [recorded_range] if recorded_range else []
    ranges += [(0.0, float(white)) for white in white_levels]
    black, white = next((pair for pair in ranges if pair[0] <= low and high <= pair[1]), (low, high))
    if 0 < high - low < (white - black) / 8:
        black, white = low, high
    if (black, white) not in STANDARD_RANGES:
        warn_once(
            f"gray {white if black == 0 else 'own range'}",
            f"{display_name}: gray values are scaled from {black:g}..{white:g}",
        )
    scaled = (np.where(finite, values, low).astype(np.float64) - black) * (255 / ((white - black) or 1))
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)


def _get_raw_mode(tile: tuple[Any, ...]) -> str:
    """Return the raw mode of a tile of an undecoded Pillow image, such as "RGB;16B"."""
    arguments = tile[3]
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _scale_colors(image: Image.Image, display_name: str) -> Image.Image:
    """Scale 16-bit colors that use only 10, 12 or 14 bits; Pillow keeps the upper 8 bits."""
    colors = np.array(image)
    high = int(colors[..., :3].max())
    white = next((white for white in WHITE_LEVELS if white > 255 and high <= white >> 8), None) if high else None
    if white is None or white == WHITE_LEVELS[-1]:
        return image
    warn_once(
        f"colors {white}",
        f"{display_name}: colors are scaled from 0..{white}, with {(white >> 8) + 1} levels per channel; for more "
        "levels convert the image to 8 bits from that range",
    )
    colors[..., :3] = np.rint(colors[..., :3] * (255 / (white >> 8)))
    return Image.fromarray(colors)


def _list_argument_images(path: Path, problems: list[str]) -> list[Path]:
    """List the images that one argument names; a folder that cannot be listed adds a message to `problems`."""
    if path.is_dir():
        images = _list_folder_images(path, problems)
    elif os.path.lexists(path):
        images = [path]
    elif glob.has_magic(str(path)):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        if not matches:
            raise InputError(f"nothing matches the pattern {format_path(path)}; check the folder and the suffix")
        images = [
            match
            for match in matches
            if (match.is_file() or is_irregular_file(match)) and match.suffix.lower() in IMAGE_SUFFIXES
        ]
        if "**" not in str(path):
            images += [image for match in matches if match.is_dir() for image in _list_folder_images(match, problems)]
    else:
        raise InputError(f"no file or folder {format_path(path)}; check the name")
    if not images:
        raise InputError(f"no images in {format_path(path)}; looked for {' '.join(IMAGE_SUFFIXES)}")
    return images


def _list_folder_images(folder: Path, problems: list[str]) -> list[Path]:
    """List the images in a folder and its subfolders, sorted."""
    files = walk_files(
        folder,
        onerror=lambda error: problems.append(f"{format_path(error.filename)}: {_describe_os_error(error)}"),
        should_enter=lambda name: not name.startswith("."),
    )
    return sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."))


def _describe_os_error(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file; check the name"
    if isinstance(error, PermissionError):
        location = f" ({format_path(error.filename)})" if error.filename else ""
        return f"permission denied{location}; change the permissions"
    code = getattr(error, "errno", None)
    if code == errno.ENAMETOOLONG:
        return "the name is too long; check it"
    return os.strerror(code) if code else " ".join(str(error).split())
