"""Errors that a person's mistake or a file's defect becomes; the message is one line with the problem and what to do.

Three classes: `sca_registry.RegistryError` for names, options, recipes and specs, and the first two here. A subclass
exists only where code treats it differently.
"""

from __future__ import annotations

from collections.abc import Callable


class InputError(ValueError):
    """What is read is absent, malformed or unusable: a file, an image, a prompt, a record or a checkpoint."""


class OutputError(OSError):
    """What is written cannot be: a folder in use or of another run, a full disk, a file that must not be replaced."""


RejectCallback = Callable[[InputError], None]  # receives the error of a record, which is then passed over


def raise_error(error: InputError) -> None:
    """Refuse a whole file for one record that cannot be read."""
    raise error


class IrregularFileError(InputError):
    """A path of a folder, a FIFO or a device."""


class TooLargeError(InputError):
    """An image with more pixels than are allowed."""


class ImageMemoryError(InputError):
    """An image that does not fit into memory."""


class DifferentRunError(OutputError):
    """A folder or journal of a run with other settings, which may be replaced."""


class LockedError(OutputError):
    """A file or folder that another process is writing."""
