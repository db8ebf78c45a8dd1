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
from sca.io.images import read_image_file_size
from sca.io.warnings_once import warn_once

URL_PATTERN = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+://|data:\w+/", re.IGNORECASE)  # a drive, C:/, is one letter
FILE_URL_PATTERN = re.compile(r"file://[^/\\]*(?=[/\\])", re.IGNORECASE)
DRIVE_PATTERN = re.compile(r"[a-z]:(?=/)|//", re.IGNORECASE)  # C:/ or a network share
LOCAL_FILES_PREFIX = "/data/local-files/?d="  # Label Studio's URL of a file in its document root
UPLOAD_FOLDER_PATTERN = re.compile(
    r"(?:/data|[./\w-]*/media)/upload/\d+/"
)  # of Label Studio: in tasks and in COCO exports
UPLOAD_PREFIX_PATTERN = re.compile(r"[0-9a-f]{8}-(?=.)")  # what Label Studio puts before the name of an uploaded file
EXPORT_IMAGE_FOLDER = "images"  # where exports of labeling tools store images, beside the annotations or below them


def resolve_image_path(name: str, roots: Sequence[str | Path]) -> Path:
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
    literal_paths = [Path(root, name) for root in roots]
    for path in literal_paths:
        if os.path.isfile(path):
            return path
    if is_url(name):
        raise InputError(f"{_shorten_name(name)} is a URL, not a file; download the image and write its path")
    for interpretations, locate in _iter_interpretations(name):
        for root in roots:
            matches = _list_existing_files(path for form in interpretations for path in locate(form, Path(root)))
            if len(matches) > 1:
                first, second, *_ = matches
                raise InputError(f"{_shorten_name(name)} could mean {first} or {second}; write the whole path")
            if matches:
                _warn_about_substitute(name, interpretations, matches[0])
                return matches[0]
    return literal_paths[0]


def read_named_image_size(name: str, roots: Sequence[str | Path]) -> tuple[int, int] | None:
    """Return width and height of the image that a name refers to, see `resolve_image_path`; None if unreadable."""
    try:
        return read_image_file_size(resolve_image_path(name, roots))
    except InputError:
        return None


class ImageNameResolver:
    """The names of images by the file that they lead to: a file is one image, in whatever spelling.

    Args:
        locate: Returns the file that a name means, as `resolve_image_path` does.
    """

    def __init__(self, locate: Callable[[str], Path]):
        self._locate = locate
        self._resolved_names: dict[
            str, tuple[str, str]
        ] = {}  # name -> first name with the same meaning, and of the same file
        self._name_by_path: dict[str, str] = {}
        self._name_by_file: dict[str, str] = {}

    def unify_spelling(self, name: str) -> str:
        """Return the first name that is another spelling of the same path, with folders that are links followed.

        An absolute path of another machine, which may mean another file than the one it leads to, is unchanged.
        """
        return self._resolve_name(name)[0]

    def identify_file(self, name: str) -> str:
        """Return the first name that leads to the same file in any way; unchanged where there is no file."""
        return self._resolve_name(name)[1]

    def _resolve_name(self, name: str) -> tuple[str, str]:
        if name not in self._resolved_names:
            self._resolved_names[name] = self._unify_and_identify(name)
        return self._resolved_names[name]

    def _unify_and_identify(self, name: str) -> tuple[str, str]:
        try:
            path = self._locate(name)
        except InputError:
            return name, name
        if not os.path.isfile(path):
            return name, name
        is_moved = is_absolute_name(name) and not os.path.isfile(name)
        real_path = os.path.join(os.path.realpath(path.parent), path.name)
        return name if is_moved else self._name_by_path.setdefault(real_path, name), self._name_by_file.setdefault(
            os.path.realpath(path), name
        )


def make_relative_image_name(name: str, roots: Sequence[str | Path]) -> str:
    """Return the name of an image as other tools on this machine read it: relative to the root that it is found in.

    A name that exists as it is written, or that leads to no file, is unchanged.
    """
    try:
        path = resolve_image_path(name, roots)
    except InputError:
        return name
    if not path.is_file() or any(path == Path(root, name) for root in roots):
        return name
    containing_root = next((Path(root) for root in roots if path.is_relative_to(root)), None)
    return str(path.relative_to(containing_root) if containing_root else path)


def is_url(name: str) -> bool:
    """Whether the name of an image is a URL that only a download can read, such as https://, s3:// or data:."""
    return bool(URL_PATTERN.match(name))


def is_absolute_name(name: str) -> bool:
    """Whether the name of an image starts at the root of some system or server: /x, \\x, C:\\x or file:///x."""
    return bool(FILE_URL_PATTERN.match(name)) or _NameInterpretation(_replace_backslashes(name)).is_absolute


def list_possible_file_names(name: str) -> set[str]:
    """Return the file names, without folders and composed (NFC), that a written name could mean."""
    name = re.split("[?#]", name)[0] if is_url(name) else name
    file_names = {split_path_parts(form.path)[-1] for form in _iter_spellings(name) if split_path_parts(form.path)}
    file_names |= (
        {UPLOAD_PREFIX_PATTERN.sub("", each, count=1) for each in file_names} if _has_upload_prefix(name) else set()
    )
    return {unicodedata.normalize("NFC", each) for each in file_names} | {re.split(r"[\\/]", name)[-1]}


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
    parts = split_path_parts(path)
    if ".." in parts:
        raise ValueError(
            f"{_shorten_name(path)} leaves the folder that the image prefix serves; name images without '..'"
        )
    return prefix + quote("/".join(parts), safe="/", errors="surrogateescape")


def remove_image_prefix(name: str, prefix: str) -> str:
    """Return the path in a URL that `add_image_prefix` has made; another name unchanged."""
    if not prefix or not name.startswith(prefix):
        return name
    return unquote(name.removeprefix(prefix), errors="surrogateescape")


class _NameInterpretation(NamedTuple):
    """An interpretation of a name: a path with `/`, and whether it must stay below the roots.

    Decoding must not lead out of a root: only a name that contains `..` in plain letters does.
    """

    path: str
    is_confined: bool = False

    @property
    def is_absolute(self) -> bool:
        return self.path.startswith("/") or bool(DRIVE_PATTERN.match(self.path))


_Locate = Callable[[_NameInterpretation, Path], Iterator[Path]]


def _iter_interpretations(name: str) -> Iterator[tuple[list[_NameInterpretation], _Locate]]:
    """Yield what a name could mean, fewest changes first: respelled, in another folder, without an upload prefix."""
    if "\0" in name:
        return
    spellings = list(dict.fromkeys(_iter_spellings(name)))
    yield spellings, _iter_paths_in_root
    yield spellings, _iter_paths_in_other_folders
    if _has_upload_prefix(name):
        stripped = [
            form._replace(path=re.sub(rf"{UPLOAD_PREFIX_PATTERN.pattern}(?=[^/]*$)", "", form.path))
            for form in spellings
        ]
        yield stripped, _iter_paths_in_root
        yield stripped, _iter_paths_in_other_folders


def _iter_spellings(name: str) -> Iterator[_NameInterpretation]:
    """Return the spellings of a name: with `/`, decoded, without what its tool or system adds."""
    if name.startswith(LOCAL_FILES_PREFIX):
        value = name.removeprefix(LOCAL_FILES_PREFIX)
        for path in (value, unquote(value), unquote(value.partition("&")[0])):
            yield _NameInterpretation(
                f"/{_replace_backslashes(path)}", is_confined=True
            )  # from its document root, perhaps not ours
    elif upload := UPLOAD_FOLDER_PATTERN.match(name):
        if not name.startswith("/"):
            yield _NameInterpretation(name)
        for path in (name[upload.end() :], unquote(name[upload.end() :])):
            yield _NameInterpretation(f"/{_replace_backslashes(path)}", is_confined=True)
    elif file_url := FILE_URL_PATTERN.match(name):
        path = name[file_url.end() :]
        for each in (path, unquote(path)):
            yield _NameInterpretation(_strip_slash_before_drive(_replace_backslashes(each)))
    else:
        yield _NameInterpretation(_replace_backslashes(name))
        if "%" in name:
            yield _NameInterpretation(_replace_backslashes(unquote(name)), is_confined=True)
        if name.startswith(("~/", "~\\")):
            yield _NameInterpretation(os.path.expanduser(_replace_backslashes(name)))


def _replace_backslashes(name: str) -> str:
    return name.replace("\\", "/")


def _strip_slash_before_drive(path: str) -> str:
    """`C:/x` of `/C:/x`, as the path of a file URL has it."""
    return path[1:] if DRIVE_PATTERN.match(path[1:]) and path[1:3] != "//" else path


def _has_upload_prefix(name: str) -> bool:
    return bool(UPLOAD_PREFIX_PATTERN.match(re.split(r"[\\/]", name)[-1]))


def split_path_parts(path: str) -> list[str]:
    """Return the parts of a path in the style of any system, without its root or drive."""
    slashed = _replace_backslashes(path)
    return [part for part in DRIVE_PATTERN.sub("", slashed, count=1).split("/") if part not in ("", ".")]


def _iter_paths_in_root(interpretation: _NameInterpretation, root: Path) -> Iterator[Path]:
    """Return the path that an interpretation means in a root."""
    parts = split_path_parts(interpretation.path)
    if not interpretation.is_confined:
        yield Path(root, interpretation.path)
    elif parts and ".." not in parts:
        yield root.joinpath(*parts)


def _iter_paths_in_other_folders(interpretation: _NameInterpretation, root: Path) -> Iterator[Path]:
    """Return the paths below a root that an interpretation means if it starts from another folder.

    That is a folder above the root, whose name it repeats, or the folder of an export that has `images/`; for an
    absolute path of another machine, any. A leading `..` is never dropped: it names another folder.
    """
    parts, root_parts = split_path_parts(interpretation.path), Path(os.path.abspath(root)).parts
    for count in range(len(parts)):
        remaining_parts = parts[count:]
        if ".." not in remaining_parts and (
            count == 0 or interpretation.is_absolute or _are_equal_parts(parts[:count], root_parts[-count:])
        ):
            yield root.joinpath(*remaining_parts)
            yield root.joinpath(EXPORT_IMAGE_FOLDER, *remaining_parts)


def _warn_about_substitute(name: str, interpretations: Iterable[_NameInterpretation], substitute: Path) -> None:
    """Report a file that shares no folder with the absolute name that leads to it: only their file names agree."""
    folders = {part for form in interpretations if form.is_absolute for part in split_path_parts(form.path)[-2:-1]}
    if folders and not any(
        _are_equal_parts([Path(os.path.abspath(substitute)).parent.name], [folder]) for folder in folders
    ):
        warn_once(
            "image of another folder",
            f"{_shorten_name(name)} does not exist; {substitute}, which has the same file name, is used instead",
        )


def _are_equal_parts(parts: Sequence[str], others: Sequence[str]) -> bool:
    return [unicodedata.normalize("NFC", part) for part in parts] == [
        unicodedata.normalize("NFC", part) for part in others
    ]


def _list_existing_files(paths: Iterable[Path]) -> list[Path]:
    """Return the paths of files, each file once."""
    existing: dict[str, Path] = {}
    for path in dict.fromkeys(paths):
        for each in _list_unicode_variants(path):
            if os.path.isfile(each):
                existing.setdefault(os.path.realpath(each), each)
    return list(existing.values())


def _list_unicode_variants(path: Path) -> list[Path]:
    """The path and, of a path with letters beyond ASCII, those on disk that differ in Unicode composition only."""
    if str(path).isascii() or os.path.isfile(path):
        return [path]
    variants = [Path(path.anchor)]
    for part in path.parts[1:] if path.anchor else path.parts:
        variants = [each / name for each in variants for name in _list_equivalent_names(each, part)]
    return variants


def _list_equivalent_names(folder: Path, part: str) -> Iterable[str]:
    if part.isascii():
        return [part]
    try:
        modified = os.stat(folder).st_mtime_ns
        return _group_by_composed_name(str(folder), modified).get(unicodedata.normalize("NFC", part), ())
    except OSError:
        return ()


@lru_cache(maxsize=64)
def _group_by_composed_name(folder: str, modified_ns: int) -> dict[str, list[str]]:
    """The names in a folder by their composed form; `modified_ns` is part of the key, so that a change is seen."""
    names: dict[str, list[str]] = {}
    for name in os.listdir(folder):
        if not name.isascii():
            names.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    return names


def _shorten_name(name: str) -> str:
    return f"{name[:77]!r}..." if len(name) > 80 else repr(name)
