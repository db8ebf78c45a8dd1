"""Opening pictures the way their viewer sees them, and finding the pictures a user means."""

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
from PIL import ExifTags, Image

from sca.io.errors import ImageMemoryError, InputError, IrregularFileError, TooLargeError
from sca.io.json import open_regular_file
from sca.io.masks import PIXEL_LIMIT
from sca.io.notices import notice_once
from sca.io.validation import is_finite_number
from sca.io.walk import walk_files

FORMATS = {  # that are read, by Pillow's names, and the suffixes that folders are searched for
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif"),  # where pillow-heif has registered it
    "JPEG2000": (".jp2",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TGA": (".tga",),
}
WHITES = (1, 255, 1023, 4095, 16383, 65535)  # of gray in more than 8 bits
DEEP_COLORS = re.compile(r"RGB[AX]{0,2};16")  # how Pillow names colors of 16 bits
EXPECTED = [(0, 1), (0, 255), (0, 65535)]  # ranges that need no remark
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPPED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height

EMPTY = "{} is empty (0 bytes); copy or download it again"


def open_image(path: str | Path, allow_pipe: bool = False) -> Image.Image:
    """The picture as RGB: EXIF rotation applied, transparency over white, the first frame of many.

    Gray of more than 8 bits is scaled from the range that the file records, or else from the first of 0..1 (floating
    only), 0..255, 0..1023, 0..4095, 0..16383 and 0..65535 that contains all values. Values that fill less than an
    eighth of that range, or do not fit into any, are scaled from their own minimum and maximum. Colors of 16 bits that
    use only 10, 12 or 14 of them are scaled as well. Raises `InputError`.

    Args:
        path: The file.
        allow_pipe: Accept a pipe such as /dev/stdin, which only a path that a person typed may be.
    """
    with _open_file(path, allow_pipe) as file:
        return read_image(file, show(path))


def measure_image(path: str | Path) -> tuple[int, int]:
    """Return width and height of the upright image in a file, without decoding it.

    Raises:
        InputError: If it cannot be opened.
    """
    with _open_file(path) as file, _refusals(show(path)):
        return read_size(file)


@contextmanager
def _open_file(path: str | Path, allow_pipe: bool = False) -> Iterator[BinaryIO]:
    shown = show(path)
    try:
        if os.path.isdir(path):
            raise InputError(f"{shown} is a folder, not an image; name a file in it")
        with open_regular_file(path, seekable=True, allow_pipe=allow_pipe) as file:
            yield file
    except IrregularFileError as error:
        raise InputError(
            f"{shown} is a pipe or a device, not an image file; save the image and name its file"
        ) from error
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"cannot open the image {shown}: {_reason(error)}") from error


def read_image(file: BinaryIO, shown: str, pixels: int | None = None) -> Image.Image:
    """Decode an image as `open_image` does, from an open file that messages call `shown`.

    Args:
        pixels: Maximum pixels of an image of unknown origin, for which decoders written in Python are excluded as well:
            a small file can keep them busy for minutes.
    """
    return decode_image(inspect_image(file, shown, pixels), shown)


def inspect_image(file: BinaryIO, shown: str, pixels: int | None = None) -> Image.Image:
    """Open an image without decoding it, and check its header. Arguments as for `read_image`."""
    most = PIXEL_LIMIT if pixels is None else pixels
    with _refusals(shown):
        if not file.read(1):
            raise InputError(EMPTY.format(shown))
        file.seek(0)
        image = identify_image(file)
        if image.width * image.height > most:
            raise TooLargeError(
                f"{shown} has {image.width * image.height:,} pixels ({image.width} x {image.height}), "
                f"{most:,} are allowed; scale it down"
            )
        if pixels is not None and any(tile[0] in Image.DECODERS for tile in image.tile):
            raise InputError(f"{shown} uses a rare variant of {image.format} that decodes slowly; convert it to PNG")
        return image


def decode_image(image: Image.Image, shown: str) -> Image.Image:
    """Decode what `inspect_image` has opened, as `open_image` does."""
    with _refusals(shown):
        has_deep_colors = any(DEEP_COLORS.match(_raw_mode(tile)) for tile in image.tile)
        image.load()
        return _upright(image, shown, has_deep_colors)


def identify_image(file: BinaryIO | str | Path) -> Image.Image:
    """Open an image in one of `FORMATS` without decoding it; its size and mode are known, its pixels are not.

    Raises:
        PIL.UnidentifiedImageError: For any other format.
    """
    Image.init()
    return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def read_size(file: BinaryIO) -> tuple[int, int]:
    """Return width and height of the upright image in a file, without decoding it."""
    image = identify_image(file)
    is_upright = image.format == "TIFF"  # Pillow rotates TIFF itself, and reports its size so
    is_turned = not is_upright and image.getexif().get(ExifTags.Base.Orientation) in SWAPPED
    return (image.height, image.width) if is_turned else image.size


def take_image(image: Image.Image | np.ndarray) -> Image.Image:
    """A picture that is in memory, as `open_image` gives one; an array is (height, width, 3) uint8 in RGB.

    InputError for anything else.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise InputError(
                f"an array of {image.dtype} with shape {image.shape}; give (height, width, 3) uint8 in RGB"
            )
        return Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise InputError(
            f"{type(image).__name__} is not an image; give a PIL image or a uint8 array, or use sca.open_image"
        )
    return image if image.mode == "RGB" and not image.info else _upright(image, "an image")


def find_images(
    arguments: Sequence[str | Path], exclude: Callable[[Path], bool] = lambda path: False
) -> tuple[list[Path], list[str]]:
    """The pictures that files, folders and glob patterns name, and a line for each argument or folder that failed.

    Files are taken as they are; folders are searched with all their subfolders, and they and patterns give the files
    with a suffix of `SUFFIXES`, sorted, hidden ones left out. A picture named twice comes once, at its first place.

    exclude: returns whether a picture of a folder or a pattern is left out.
    """
    found: dict[str, Path] = {}
    problems: list[str] = []
    for argument in arguments:
        path = Path(os.path.expanduser(argument))
        try:
            for image in _named(path, problems):
                if image == path or not exclude(image):
                    found.setdefault(os.path.abspath(image), image)
        except InputError as error:
            problems.append(str(error))
        except (OSError, ValueError) as error:
            problems.append(f"{show(path)}: {_reason(error)}")
    return list(found.values()), problems


def is_irregular(path: Path) -> bool:
    """Whether a path is a pipe, a socket or a device, which may never end."""
    return path.exists() and not (path.is_file() or path.is_dir())


def show(path: str | Path) -> str:
    """A path on one line."""
    text = str(path)
    return text if text and text.isprintable() else repr(text)


@contextmanager
def _refusals(shown: str) -> Iterator[None]:
    """Whatever Pillow raises, in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures that are allowed, and of odd metadata
            yield
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"{shown}: {str(error).split(',')[0]}; scale it down") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{shown} is not an image that can be read; convert it to JPEG or PNG") from error
    except Exception as error:  # a decoder may raise anything for damaged data
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, MemoryError) or "out of memory" in reason.lower():  # which Pillow's decoders tell as text
            raise ImageMemoryError(f"{shown} does not fit into memory; scale it down") from error
        raise InputError(f"{shown} is truncated or damaged ({reason}); copy or export it again") from error


def _upright(image: Image.Image, shown: str, has_deep_colors: bool = False) -> Image.Image:
    """A loaded picture as RGB, turned as its EXIF says and without the EXIF, so that nobody turns it again."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata turns nothing
        turn = None
    if has_deep_colors:
        image = _scale_colors(image, shown)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = Image.fromarray(_scale_gray(np.asarray(image), _recorded_range(image), shown))
    elif image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(colours, mask=colours.getchannel("A"))
    rgb = image.convert("RGB") if turn is None else image.convert("RGB").transpose(turn)
    rgb.info = {}
    return rgb


def _recorded_range(image: Image.Image) -> tuple[float, float] | None:
    """Return the least and greatest value that a TIFF states for its samples, or None."""
    tags = getattr(image, "tag_v2", {})
    for lowest, highest in ((280, 281), (340, 341)):  # MinSampleValue and MaxSampleValue; SMin... and SMaxSampleValue
        low, high = _first_number(tags.get(lowest, 0)), _first_number(tags.get(highest))
        if low is not None and high is not None and low < high:
            return low, high
    return None


def _first_number(value: Any) -> float | None:
    """Return the value of a TIFF tag, or the first of several; None if it is not a finite number."""
    first = value[0] if isinstance(value, tuple) and value else value
    return float(first) if is_finite_number(first) else None


def _scale_gray(values: np.ndarray, recorded: tuple[float, float] | None, shown: str) -> np.ndarray:
    """Scale gray of more than 8 bits, see `open_image`; values that are not finite become the least one.

    Args:
        values: (height, width) of 16 or 32 bits.
        recorded: Least and greatest value that the file states; used if all values are between them.

    Returns:
        (height, width) uint8.
    """
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(values.shape, np.uint8)
    low, high = float(values[finite].min()), float(values[finite].max())
    whites = WHITES if values.dtype.kind == "f" else WHITES[1:]
    ranges = [recorded] if recorded else []
    ranges += [(0.0, float(white)) for white in whites]
    black, white = next((pair for pair in ranges if pair[0] <= low and high <= pair[1]), (low, high))
    if 0 < high - low < (white - black) / 8:
        black, white = low, high
    if (black, white) not in EXPECTED:
        notice_once(
            f"gray {white if black == 0 else 'own range'}", f"{shown}: gray values are scaled from {black:g}..{white:g}"
        )
    scaled = (np.where(finite, values, low).astype(np.float64) - black) * (255 / ((white - black) or 1))
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)


def _raw_mode(tile: tuple[Any, ...]) -> str:
    """Return how a tile of an image that Pillow has opened stores its samples, such as "RGB;16B"."""
    arguments = tile[3]
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _scale_colors(image: Image.Image, shown: str) -> Image.Image:
    """Scale colors of 16 bits, of which Pillow keeps the upper 8, if they use only 10, 12 or 14 bits."""
    colors = np.array(image)
    high = int(colors[..., :3].max())
    white = next((white for white in WHITES if white > 255 and high <= white >> 8), None) if high else None
    if white is None or white == WHITES[-1]:
        return image
    notice_once(
        f"colors {white}",
        f"{shown}: colors are scaled from 0..{white}, with {(white >> 8) + 1} levels per channel; for more levels "
        "convert the image to 8 bits from that range",
    )
    colors[..., :3] = np.rint(colors[..., :3] * (255 / (white >> 8)))
    return Image.fromarray(colors)


def _named(path: Path, problems: list[str]) -> list[Path]:
    """The pictures that one argument names; a folder that may not be listed is a line in `problems`."""
    if path.is_dir():
        images = _below(path, problems)
    elif os.path.lexists(path):
        images = [path]
    elif glob.has_magic(str(path)):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        if not matches:
            raise InputError(f"nothing matches the pattern {show(path)}; check the folder and the suffix")
        images = [
            match for match in matches if (match.is_file() or is_irregular(match)) and match.suffix.lower() in SUFFIXES
        ]
        if "**" not in str(path):
            images += [image for match in matches if match.is_dir() for image in _below(match, problems)]
    else:
        raise InputError(f"there is no file, folder or match for {show(path)}; check the name")
    if not images:
        raise InputError(f"no images in {show(path)}; looked for {' '.join(SUFFIXES)}")
    return images


def _below(folder: Path, problems: list[str]) -> list[Path]:
    """Pictures in a folder and its subfolders, sorted."""
    files = walk_files(
        folder,
        onerror=lambda error: problems.append(f"{show(error.filename)}: {_reason(error)}"),
        enter=lambda name: not name.startswith("."),
    )
    return sorted(path for path in files if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file; check the name"
    if isinstance(error, PermissionError):
        where = f" ({show(error.filename)})" if error.filename else ""
        return f"permission denied{where}; ask for read access"
    code = getattr(error, "errno", None)
    if code == errno.ENAMETOOLONG:
        return "the name is too long; check it"
    return os.strerror(code) if code else " ".join(str(error).split())
