"""From the name of an image, as a file of any tool or system writes it, to the image on this machine.

Names come with the backslashes of Windows, in another Unicode composition, with `~`, percent-encoded, as `file://`, as
Label Studio serves them, or relative to another folder of the same export. Readers try the name as written, then the
interpretation with the fewest changes; equally changed interpretations must resolve to one file.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

from sca.io.errors import InputError
from sca.io.images import measure_image
from sca.io.notices import notice_once

URL = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+://|data:\w+/", re.IGNORECASE)  # a drive, C:/, is one letter
FILE_URL = re.compile(r"file://[^/\\]*(?=[/\\])", re.IGNORECASE)
DRIVE = re.compile(r"[a-z]:(?=/)|//", re.IGNORECASE)  # C:/ or a network share
LOCAL_FILES = "/data/local-files/?d="  # Label Studio's URL of a file in its document root
UPLOAD_FOLDER = re.compile(r"(?:/data|[./\w-]*/media)/upload/\d+/")  # of Label Studio: in tasks and in COCO exports
UPLOAD = re.compile(r"[0-9a-f]{8}-(?=.)")  # what Label Studio puts before the name of an uploaded file
EXPORT_FOLDER = "images"  # where exports of labeling tools store images, beside the annotations or below them


def find_image(name: str, roots: Sequence[str | Path]) -> Path:
    """Return the image file that a name in a file means.

    Args:
        name: As written: a path in the style of any system, a `file://` URL or a path that Label Studio serves.
        roots: Folders that relative names may start from; names as they are written count in this order.

    Returns:
        The file. If no interpretation exists, the name in the first root. A file that only shares its file name with an
        absolute path of another machine is reported, once per process.

    Raises:
        InputError: If the name is a URL of another machine, or could mean several files.
    """
    written = [Path(root, name) for root in roots]
    for path in written:
        if os.path.isfile(path):
            return path
    if is_url(name):
        raise InputError(f"{_shorten(name)} is a URL, not a file; download the image and write its path")
    for forms, locate in _interpretations(name):
        for root in roots:
            found = _existing(path for form in forms for path in locate(form, Path(root)))
            if len(found) > 1:
                first, second, *_ = found
                raise InputError(f"{_shorten(name)} could mean {first} or {second}; write the whole path")
            if found:
                _note_substitute(name, forms, found[0])
                return found[0]
    return written[0]


def measure_named_image(name: str, roots: Sequence[str | Path]) -> tuple[int, int] | None:
    """Return width and height of the image that a name in a file means, see `find_image`; None if it cannot be read."""
    try:
        return measure_image(find_image(name, roots))
    except InputError:
        return None


class ImageFiles:
    """The names of images by the file that they lead to: a file is one image, in whatever spelling.

    Args:
        locate: Returns the file that a name means, as `find_image` does.
    """

    def __init__(self, locate: Callable[[str], Path]):
        self._locate = locate
        self._names: dict[str, tuple[str, str]] = {}  # name -> first name with the same meaning, and of the same file
        self._same: dict[str, str] = {}
        self._first: dict[str, str] = {}

    def unify(self, name: str) -> str:
        """Return the first name that is another spelling of the same path, with folders that are links followed.

        An absolute path of another machine, which may mean another file than the one it leads to, is unchanged.
        """
        return self._resolve(name)[0]

    def identify(self, name: str) -> str:
        """Return the first name that leads to the same file in any way; unchanged where there is no file."""
        return self._resolve(name)[1]

    def _resolve(self, name: str) -> tuple[str, str]:
        if name not in self._names:
            self._names[name] = self._unify_and_identify(name)
        return self._names[name]

    def _unify_and_identify(self, name: str) -> tuple[str, str]:
        try:
            path = self._locate(name)
        except InputError:
            return name, name
        if not os.path.isfile(path):
            return name, name
        is_moved = is_absolute_name(name) and not os.path.isfile(name)
        real = os.path.join(os.path.realpath(path.parent), path.name)
        return name if is_moved else self._same.setdefault(real, name), self._first.setdefault(
            os.path.realpath(path), name
        )


def rewrite_name(name: str, roots: Sequence[str | Path]) -> str:
    """Return the name of an image as other tools on this machine read it: relative to the root that it is found in.

    A name that exists as it is written, or that leads to no file, is unchanged.
    """
    try:
        path = find_image(name, roots)
    except InputError:
        return name
    if not path.is_file() or any(path == Path(root, name) for root in roots):
        return name
    found = next((Path(root) for root in roots if path.is_relative_to(root)), None)
    return str(path.relative_to(found) if found else path)


def is_url(name: str) -> bool:
    """Whether the name of an image is a URL that only a download can read, such as https://, s3:// or data:."""
    return bool(URL.match(name))


def is_absolute_name(name: str) -> bool:
    """Whether the name of an image starts at the root of some system or server: /x, \\x, C:\\x or file:///x."""
    return bool(FILE_URL.match(name)) or _Interpretation(_with_slashes(name)).is_absolute


def possible_file_names(name: str) -> set[str]:
    """Return the file names, without folders and composed (NFC), that a written name could mean."""
    name = re.split("[?#]", name)[0] if is_url(name) else name
    found = {split_name(form.path)[-1] for form in _list_spellings(name) if split_name(form.path)}
    found |= {UPLOAD.sub("", each, count=1) for each in found} if _is_upload(name) else set()
    return {unicodedata.normalize("NFC", each) for each in found} | {re.split(r"[\\/]", name)[-1]}


def add_image_prefix(path: str, prefix: str) -> str:
    """Return the URL of an image for a labeling tool: a prefix and the percent-encoded path.

    Args:
        path: Relative to the folder that the prefix serves, or absolute if it serves the root.
        prefix: Such as `/data/local-files/?d=` or `https://host/folder/`; "" leaves the path unchanged.

    Raises:
        ValueError: If the path leaves the folder by `..`.
    """
    if not prefix:
        return path
    parts = split_name(path)
    if ".." in parts:
        raise ValueError(f"{_shorten(path)} leaves the folder that the image prefix serves; name images without '..'")
    return prefix + quote("/".join(parts), safe="/", errors="surrogateescape")


def remove_image_prefix(name: str, prefix: str) -> str:
    """Return the path in a URL that `add_image_prefix` has made; another name unchanged."""
    if not prefix or not name.startswith(prefix):
        return name
    return unquote(name.removeprefix(prefix), errors="surrogateescape")


class _Interpretation(NamedTuple):
    """An interpretation of a name: a path with `/`, and whether it must stay below the roots.

    Decoding must not lead out of a root: only a name that contains `..` in plain letters does.
    """

    path: str
    confined: bool = False

    @property
    def is_absolute(self) -> bool:
        return self.path.startswith("/") or bool(DRIVE.match(self.path))


_Locate = Callable[[_Interpretation, Path], Iterator[Path]]


def _interpretations(name: str) -> Iterator[tuple[list[_Interpretation], _Locate]]:
    """Yield what a name could mean, fewest changes first: respelled, in another folder, without an upload prefix."""
    if "\0" in name:
        return
    forms = list(dict.fromkeys(_list_spellings(name)))
    yield forms, _locate_in_root
    yield forms, _locate_in_other_folders
    if _is_upload(name):
        stripped = [form._replace(path=re.sub(rf"{UPLOAD.pattern}(?=[^/]*$)", "", form.path)) for form in forms]
        yield stripped, _locate_in_root
        yield stripped, _locate_in_other_folders


def _list_spellings(name: str) -> Iterator[_Interpretation]:
    """Return the spellings of a name: with `/`, decoded, without what its tool or system adds."""
    if name.startswith(LOCAL_FILES):
        value = name.removeprefix(LOCAL_FILES)
        for path in (value, unquote(value), unquote(value.partition("&")[0])):
            yield _Interpretation(f"/{_with_slashes(path)}", confined=True)  # from its document root, perhaps not ours
    elif upload := UPLOAD_FOLDER.match(name):
        if not name.startswith("/"):
            yield _Interpretation(name)
        for path in (name[upload.end() :], unquote(name[upload.end() :])):
            yield _Interpretation(f"/{_with_slashes(path)}", confined=True)
    elif file_url := FILE_URL.match(name):
        path = name[file_url.end() :]
        for each in (path, unquote(path)):
            yield _Interpretation(_without_slash_before_drive(_with_slashes(each)))
    else:
        yield _Interpretation(_with_slashes(name))
        if "%" in name:
            yield _Interpretation(_with_slashes(unquote(name)), confined=True)
        if name.startswith(("~/", "~\\")):
            yield _Interpretation(os.path.expanduser(_with_slashes(name)))


def _with_slashes(name: str) -> str:
    return name.replace("\\", "/")


def _without_slash_before_drive(path: str) -> str:
    """`C:/x` of `/C:/x`, as the path of a file URL has it."""
    return path[1:] if DRIVE.match(path[1:]) and path[1:3] != "//" else path


def _is_upload(name: str) -> bool:
    return bool(UPLOAD.match(re.split(r"[\\/]", name)[-1]))


def split_name(path: str) -> list[str]:
    """Return the parts of a path in the style of any system, without its root or drive."""
    whole = _with_slashes(path)
    return [part for part in DRIVE.sub("", whole, count=1).split("/") if part not in ("", ".")]


def _locate_in_root(form: _Interpretation, root: Path) -> Iterator[Path]:
    """Return the path that an interpretation means in a root."""
    parts = split_name(form.path)
    if not form.confined:
        yield Path(root, form.path)
    elif parts and ".." not in parts:
        yield root.joinpath(*parts)


def _locate_in_other_folders(form: _Interpretation, root: Path) -> Iterator[Path]:
    """Return the paths below a root that an interpretation means if it starts from another folder.

    That is a folder above the root, whose name it repeats, or the folder of an export that has `images/`; for an
    absolute path of another machine, any. A leading `..` is never dropped: it names another folder.
    """
    parts, own = split_name(form.path), Path(os.path.abspath(root)).parts
    for count in range(len(parts)):
        rest = parts[count:]
        if ".." not in rest and (count == 0 or form.is_absolute or _is_same(parts[:count], own[-count:])):
            yield root.joinpath(*rest)
            yield root.joinpath(EXPORT_FOLDER, *rest)


def _note_substitute(name: str, forms: Iterable[_Interpretation], found: Path) -> None:
    """Report a file that shares no folder with the absolute name that leads to it: only their file names agree."""
    folders = {part for form in forms if form.is_absolute for part in split_name(form.path)[-2:-1]}
    if folders and not any(_is_same([Path(os.path.abspath(found)).parent.name], [folder]) for folder in folders):
        notice_once(
            "image of another folder",
            f"{_shorten(name)} does not exist; {found}, which has the same file name, is used instead",
        )


def _is_same(parts: Sequence[str], others: Sequence[str]) -> bool:
    return [unicodedata.normalize("NFC", part) for part in parts] == [
        unicodedata.normalize("NFC", part) for part in others
    ]


def _existing(paths: Iterable[Path]) -> list[Path]:
    """Return the paths of files, each file once."""
    found: dict[str, Path] = {}
    for path in dict.fromkeys(paths):
        for each in _compositions(path):
            if os.path.isfile(each):
                found.setdefault(os.path.realpath(each), each)
    return list(found.values())


def _compositions(path: Path) -> list[Path]:
    """The path and, of a path with letters beyond ASCII, those on disk that differ in Unicode composition only."""
    if str(path).isascii() or os.path.isfile(path):
        return [path]
    found = [Path(path.anchor)]
    for part in path.parts[1:] if path.anchor else path.parts:
        found = [each / name for each in found for name in _list_equivalent_names(each, part)]
    return found


def _list_equivalent_names(folder: Path, part: str) -> Iterable[str]:
    if part.isascii():
        return [part]
    try:
        modified = os.stat(folder).st_mtime_ns
        return _list_by_composition(str(folder), modified).get(unicodedata.normalize("NFC", part), ())
    except OSError:
        return ()


@lru_cache(maxsize=64)
def _list_by_composition(folder: str, modified: int) -> dict[str, list[str]]:
    """The names in a folder by their composed form; `modified` is part of the key, so that a change is seen."""
    names: dict[str, list[str]] = {}
    for name in os.listdir(folder):
        if not name.isascii():
            names.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    return names


def _shorten(name: str) -> str:
    return f"{name[:77]!r}..." if len(name) > 80 else repr(name)
