"""Arguments of lmms-eval: the batch size of the command line and the stop strings of a task."""

from typing import Any


def parse_batch_size(value: Any) -> int:
    """Parse `--batch_size`.

    Args:
        value: Integer, or its text.

    Returns:
        Regions per batch.

    Raises:
        ValueError: The value is not an integer of at least 1, such as "auto".
    """
    try:
        batch_size = int(value)
    except (TypeError, ValueError):
        batch_size = 0
    if batch_size < 1:
        raise ValueError(f"batch_size is {value!r}; expected an integer of at least 1")
    return batch_size


def parse_stop_strings(until: Any, task: str) -> list[str]:
    """Parse the generation option `until` of a task.

    Args:
        until: Stop string, list of stop strings, or None. Empty stop strings have no effect.
        task: Name of the task, for messages.

    Returns:
        The stop strings.

    Raises:
        ValueError: The value is neither a text nor a list of texts.
    """
    stop_strings = [until] if isinstance(until, str) else list(until) if isinstance(until, list | tuple) else until
    if stop_strings is None:
        return []
    if not isinstance(stop_strings, list) or not all(isinstance(each, str) for each in stop_strings):
        raise ValueError(f"{task}: the generation option 'until' is {until!r}; expected a text or a list of texts")
    return [each for each in stop_strings if each]
