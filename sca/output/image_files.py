"""Output files: one per image, or one document with all images."""

from __future__ import annotations

from pathlib import Path

from sca.io.atomic import AtomicFile, make_write_error, sync_path, write_file


def close_document(file: AtomicFile, end: str, has_images: bool, finished: bool) -> None:
    """Write the end of a document and commit it.

    An unfinished document is discarded if it has no images or would replace an older file.
    """
    if not finished and (file.replaces_file or not has_images):
        file.discard()
        return
    try:
        file.write(end)
    except BaseException:
        file.discard()
        raise
    file.commit()


class UniqueFileNames:
    """Unique file names: the stem of each image, or `STEM-2` if another image uses it."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def make_unique(self, path: str) -> str:
        """Return a unique file name, without suffix, for the image at a path."""
        stem = Path(path).stem.encode("utf-8", "surrogateescape")[:200].decode("utf-8", "ignore") or "image"
        name, count = stem, 1
        while name.casefold() in self._used:
            count += 1
            name = f"{stem}-{count}"
        self._used.add(name.casefold())
        return name


class FilePerImage:
    """Writer of one file per image in `folder`. Each file is complete and synced to disk before it is renamed.

    `close` syncs the names once for all files.
    """

    def __init__(self, folder: Path, suffix: str):
        self._folder, self._suffix, self._names = folder, suffix, UniqueFileNames()

    def write(self, image: str, content: str | bytes) -> None:
        """Write the file of an image, identified by its path."""
        write_file(self._folder / f"{self._names.make_unique(image)}{self._suffix}", content, sync_folder=False)

    def close(self) -> None:
        """Sync the names of all files to disk.

        Raises:
            OutputError: The folder cannot be synced.
        """
        try:
            sync_path(self._folder)
        except OSError as error:
            raise make_write_error(self._folder, error) from error
