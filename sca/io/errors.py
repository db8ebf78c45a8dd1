"""Errors caused by a user's mistake or a defective file. The message is one line with the problem and the fix.

There are three base classes: `sca_registry.RegistryError` for names, options, recipes and specs, and `InputError` and
`OutputError` in this module. A subclass exists only if code handles it differently.
"""

from __future__ import annotations

from collections.abc import Callable


class InputError(ValueError):
    """Input that is missing, malformed or unusable: a file, an image, a prompt, a record or a checkpoint."""


class OutputError(OSError):
    """Output that cannot be written, such as a folder in use, a full disk, or a file that must not be overwritten."""


RejectCallback = Callable[[ValueError], None]  # receives the error of a record, which is then skipped


def raise_error(error: ValueError) -> None:
    """Raise the error, to reject the entire file for one unreadable record."""
    raise error


class IrregularFileError(InputError):
    """Path of a folder, a FIFO or a device."""


class TooLargeError(InputError):
    """Image with more pixels than allowed."""


class ImageMemoryError(InputError):
    """Image that does not fit into memory."""


class NonFiniteWeightsError(InputError):
    """Checkpoint with weights that are NaN or infinite."""


class DifferentRunError(OutputError):
    """Folder or journal of a run with other settings, which may be replaced."""


class LockedError(OutputError):
    """File or folder that another process is writing."""
