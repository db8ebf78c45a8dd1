"""Resolve image names, as files of any tool or system write them, to image files on this machine.

Names may contain Windows backslashes, another Unicode normalization, `~`, percent-encoding or `file://`. They may be
Label Studio URLs, or relative to another folder of the same export. Readers try the name as written, then the
interpretation with the fewest changes. Interpretations with equally many changes must resolve to one file.
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
UPLOAD_FOLDER_PATTERN = re.compile(r"(?:/data|[./\w-]*/media)/upload/\d+/")  # Label Studio, in tasks and COCO exports
UPLOAD_PREFIX_PATTERN = re.compile(r"[0-9a-f]{8}-(?=.)")  # Label Studio's prefix of uploaded files
EXPORT_IMAGE_FOLDER = "images"  # image folder in exports of labeling tools, next to the annotations or below them


def resolve_image_path(name: str, roots: Sequence[str | Path]) -> Path:
    """Resolve the name of an image in a file to the image file.

    Args:
        name: Name as written: a path in the style of any system, a `file://` URL or a path served by Label Studio.
        roots: Folders that relative names may start from. Names as written are resolved in this order.

    Returns:
        The file; the name in the first root if no interpretation exists. A file that shares only its file name with an
            absolute path of another machine is reported, once per process.

    Raises:
        InputError: The name is a remote URL, or matches several files.
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
                raise InputError(f"{_shorten_name(name)} matches both {first} and {second}; write the full path")
            if matches:
                _warn_about_substitute(name, interpretations, matches[0])
                return matches[0]
    return literal_paths[0]


def read_named_image_size(name: str, roots: Sequence[str | Path]) -> tuple[int, int] | None:
    """Return the width and height of an image by its name, see `resolve_image_path`; None if it cannot be read."""
    try:
        return read_image_file_size(resolve_image_path(name, roots))
    except InputError:
        return None


class ImageNameResolver:
    """Unifies the names of images that resolve to the same file.

    Args:
        locate: Resolves a name to a file, as `resolve_image_path` does.
    """

    def __init__(self, locate: Callable[[str], Path]):
        self._locate = locate
        self._resolved_names: dict[str, tuple[str, str]] = {}  # name -> results of unify_spelling and identify_file
        self._name_by_path: dict[str, str] = {}
        self._name_by_file: dict[str, str] = {}

    def unify_spelling(self, name: str) -> str:
        """Return the first name that spells the same path, with links to folders resolved.

        An absolute path of another machine is unchanged, because it may refer to another file than it resolves to.
        """
        return self._resolve_name(name)[0]

    def identify_file(self, name: str) -> str:
        """Return the first name that resolves to the same file in any way; unchanged if the file does not exist."""
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
    """Return an image name that other tools on this machine can read: relative to the root that contains the image.

    A name that exists as written, or that resolves to no file, is unchanged.
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
    """Return whether an image name is a URL that requires a download, such as https://, s3:// or data:."""
    return bool(URL_PATTERN.match(name))


def is_absolute_name(name: str) -> bool:
    r"""Return whether an image name is absolute on any system or server: /x, \x, C:\x or file:///x."""
    return bool(FILE_URL_PATTERN.match(name)) or _NameInterpretation(_replace_backslashes(name)).is_absolute


def list_possible_file_names(name: str) -> set[str]:
    """Return the file names, without folders and NFC-normalized, that a written name could refer to."""
    name = re.split("[?#]", name)[0] if is_url(name) else name
    file_names = {split_path_parts(form.path)[-1] for form in _iter_spellings(name) if split_path_parts(form.path)}
    file_names |= (
        {UPLOAD_PREFIX_PATTERN.sub("", each, count=1) for each in file_names} if _has_upload_prefix(name) else set()
    )
    return {unicodedata.normalize("NFC", each) for each in file_names} | {re.split(r"[\\/]", name)[-1]}


def add_image_prefix(path: str, prefix: str) -> str:
    """Return the URL of an image for a labeling tool: a prefix and the percent-encoded path.

    Args:
        path: Path relative to the folder that the prefix serves, or absolute if it serves the root.
        prefix: URL prefix, such as `/data/local-files/?d=` or `https://host/folder/`. "" leaves the path unchanged.

    Returns:
        The URL.

    Raises:
        ValueError: The path leaves the folder by `..`.
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
    """Return the path in a URL of `add_image_prefix`; other names are unchanged."""
    if not prefix or not name.startswith(prefix):
        return name
    return unquote(name.removeprefix(prefix), errors="surrogateescape")


class _NameInterpretation(NamedTuple):
    """Path with `/`, and whether it must stay below the roots: only a literal `..` may leave them."""

    path: str
    is_confined: bool = False

    @property
    def is_absolute(self) -> bool:
        return self.path.startswith("/") or bool(DRIVE_PATTERN.match(self.path))


_Locate = Callable[[_NameInterpretation, Path], Iterator[Path]]


def _iter_interpretations(name: str) -> Iterator[tuple[list[_NameInterpretation], _Locate]]:
    """Yield interpretations, fewest changes first: respelled, in another folder, without an upload prefix."""
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
    """Yield the spellings of a name: with `/`, decoded, without additions of its tool or system."""
    if name.startswith(LOCAL_FILES_PREFIX):
        value = name.removeprefix(LOCAL_FILES_PREFIX)
        for path in (value, unquote(value), unquote(value.partition("&")[0])):
            # The path is relative to Label Studio's document root, which may differ from our roots.
            yield _NameInterpretation(f"/{_replace_backslashes(path)}", is_confined=True)
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
    """Return `C:/x` for `/C:/x`, the path of a file URL."""
    return path[1:] if DRIVE_PATTERN.match(path[1:]) and path[1:3] != "//" else path


def _has_upload_prefix(name: str) -> bool:
    return bool(UPLOAD_PREFIX_PATTERN.match(re.split(r"[\\/]", name)[-1]))


def split_path_parts(path: str) -> list[str]:
    """Split a path in the style of any system into its parts, without its root or drive."""
    slashed = _replace_backslashes(path)
    return [part for part in DRIVE_PATTERN.sub("", slashed, count=1).split("/") if part not in ("", ".")]


def _iter_paths_in_root(interpretation: _NameInterpretation, root: Path) -> Iterator[Path]:
    """Yield the paths of an interpretation in a root."""
    parts = split_path_parts(interpretation.path)
    if not interpretation.is_confined:
        yield Path(root, interpretation.path)
    elif parts and ".." not in parts:
        yield root.joinpath(*parts)


def _iter_paths_in_other_folders(interpretation: _NameInterpretation, root: Path) -> Iterator[Path]:
    """Yield the paths below a root of a name that starts from another folder.

    That folder is above the root and repeated in the name, or an export's folder with `images/`, or any folder for an
    absolute path of another machine. A leading `..` is never dropped: it names another folder.
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
    """Report a file that matches an absolute name by its file name only."""
    folders = {part for form in interpretations if form.is_absolute for part in split_path_parts(form.path)[-2:-1]}
    if folders and not any(
        _are_equal_parts([Path(os.path.abspath(substitute)).parent.name], [folder]) for folder in folders
    ):
        warn_once(
            "image of a different folder",
            f"{_shorten_name(name)} does not exist; {substitute}, which has the same file name, is used instead",
        )


def _are_equal_parts(parts: Sequence[str], others: Sequence[str]) -> bool:
    return [unicodedata.normalize("NFC", part) for part in parts] == [
        unicodedata.normalize("NFC", part) for part in others
    ]


def _list_existing_files(paths: Iterable[Path]) -> list[Path]:
    """Return the paths of existing files, each file once."""
    existing: dict[str, Path] = {}
    for path in dict.fromkeys(paths):
        for each in _list_unicode_variants(path):
            if os.path.isfile(each):
                existing.setdefault(os.path.realpath(each), each)
    return list(existing.values())


def _list_unicode_variants(path: Path) -> list[Path]:
    """Return the path and, if it is not ASCII, the paths on disk that differ only in Unicode normalization."""
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
    """Group the names in a folder by their NFC form; `modified_ns` is a cache key, so that changes are detected."""
    names: dict[str, list[str]] = {}
    for name in os.listdir(folder):
        if not name.isascii():
            names.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    return names


def _shorten_name(name: str) -> str:
    return f"{name[:77]!r}..." if len(name) > 80 else repr(name)
