"""HTTP errors in the OpenAI format."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from sca.io.errors import ImageMemoryError, InputError, TooLargeError
from sca.serve.inference_requests import (
    DeadlineExceededError,
    InsufficientMemoryError,
    QueueFullError,
    SchedulerClosedError,
    SchedulerError,
    UnsupportedRequestError,
)
from sca.serve.memory_budget import MemoryBudgetError

_FIELD_NAME = re.compile(r"[a-z][a-z0-9_]*")
MAX_REPORTED_PROBLEMS = 3  # validation errors per response
_STATUS_BY_ERROR = {
    QueueFullError: 503,
    SchedulerClosedError: 503,
    InsufficientMemoryError: 503,
    DeadlineExceededError: 504,
    UnsupportedRequestError: 422,
}
_CODE_BY_STATUS = {
    400: "bad_request",
    401: "invalid_api_key",
    403: "host_not_allowed",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    422: "invalid_value",
    500: "internal_error",
    503: "overloaded",
    504: "timeout",
}


class ApiError(Exception):
    """Error with an HTTP status.

    Args:
        status: HTTP status.
        message: Problem and fix in one line.
        code: Machine-readable code; None for the default of the status.
        param: Invalid field of the request, if any.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code: str = code or _CODE_BY_STATUS.get(status, "error")

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response: Retry-After for status 503."""
        return {"Retry-After": "1"} if self.status == 503 else {}

    @property
    def content(self) -> dict[str, Any]:
        """Body of the response: an error object in the format of the OpenAI API."""
        error_type = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": error_type, "param": self.param, "code": self.code}}


def make_error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Create the HTTP response of an error, with additional headers."""
    return JSONResponse(error.content, error.status, {**error.headers, **(headers or {})})


def to_api_error(error: Exception) -> ApiError:
    """Convert an error of a request to an `ApiError`.

    Args:
        error: Error raised while a request was processed.

    Returns:
        The error with its HTTP status.

    Raises:
        TypeError: Requests do not cause errors of this type.
    """
    match error:
        case ApiError():
            return error
        case SchedulerError():
            return ApiError(_STATUS_BY_ERROR.get(type(error), 500), str(error))
        case MemoryError():
            return ApiError(503, "not enough memory; request fewer regions or try again later")
        case MemoryBudgetError() | ImageMemoryError():
            return ApiError(503, str(error))
        case TooLargeError():
            return ApiError(413, str(error))
        case InputError():
            return ApiError(422, str(error))
        case ValidationError():
            return _make_field_error(error.errors(include_url=False, include_context=False, include_input=False))
        case RequestValidationError():
            return _make_field_error(error.errors())
    raise TypeError(type(error).__name__)


def _make_field_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Create an error with the first `MAX_REPORTED_PROBLEMS` problems and their fields."""
    locations, messages = [], []
    errors = [each for each in errors if not _is_other_branch_error(each, errors)]
    for each in errors[:MAX_REPORTED_PROBLEMS]:
        location = ".".join(str(part) for part in each["loc"] if part != "body" and not _is_union_branch(part))
        message = " ".join(each["msg"].removeprefix("Value error, ").split())
        locations.append(location)
        messages.append(f"{location}: {message}" if location else message)
    return ApiError(422, "; ".join(messages)[:1000], param=locations[0][:100] or None)


def _is_union_branch(name: str | int) -> bool:
    """Return whether an element of an error location is a union branch of pydantic, such as "str" or "list[Part]"."""
    return name in ("str", "bool", "int", "float") or (isinstance(name, str) and not _FIELD_NAME.fullmatch(name))


def _is_other_branch_error(error: Mapping[str, Any], errors: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether an error is about the type of a union branch while the value matches another branch."""
    *union_location, branch = error["loc"] or ("",)
    if not (_is_union_branch(branch) and error["type"].endswith("_type")):
        return False
    depth = len(union_location)
    sibling_errors = [
        each
        for each in errors
        if list(each["loc"][:depth]) == union_location and each["loc"][depth : depth + 1] != (branch,)
    ]
    return any(len(each["loc"]) > depth + 1 or not each["type"].endswith("_type") for each in sibling_errors)
