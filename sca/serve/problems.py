"""What goes wrong, as HTTP says it: a status and one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from sca.images import ImageError, ImageMemoryError, TooLargeError
from sca.prompts import PromptError
from sca.serve.engine import BusyError, CannotError, ClosedError, EngineError, LateError, NoRoomError
from sca.serve.memory import BudgetError

MOST = 3  # problems of one request in its answer
_STATUS = {BusyError: 503, ClosedError: 503, NoRoomError: 503, LateError: 504, CannotError: 422}


class ApiError(Exception):
    """A status and a line."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": "1"} if self.status == 503 else {}


def to_api_error(error: Exception) -> ApiError:
    """Convert an error to an HTTP status and a line.

    Raises:
        TypeError: For an error that no request causes.
    """
    match error:
        case ApiError():
            return error
        case EngineError():
            return ApiError(_STATUS.get(type(error), 500), str(error))
        case MemoryError():
            return ApiError(503, "not enough memory for this request: ask for less, or later")
        case BudgetError() | ImageMemoryError():
            return ApiError(503, str(error))
        case TooLargeError():
            return ApiError(413, str(error))
        case ImageError() | PromptError():
            return ApiError(422, str(error))
        case ValidationError():
            return ApiError(422, _fields(error.errors(include_url=False, include_context=False, include_input=False)))
        case RequestValidationError():
            return ApiError(422, _fields(error.errors()))
    raise TypeError(type(error).__name__)


def _fields(errors: Sequence[Mapping[str, Any]]) -> str:
    """The first problems, each with the field that has it."""
    lines = []
    for each in errors[:MOST]:
        where = ".".join(str(part) for part in each["loc"] if part != "body")
        message = " ".join(each["msg"].removeprefix("Value error, ").split())
        lines.append(f"{where}: {message}" if where else message)
    return "; ".join(lines)[:1000]
