"""HTTP client of OpenAI-compatible servers, with concurrent requests, retries and a response cache.

The URL and the key come from the arguments and environment of the process, never from someone else's file or request.
The key is sent to this URL only, because redirects are not followed, and is never written to files, logs or messages.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

import anyio
import httpx2
from anyio.from_thread import start_blocking_portal

from sca.io.atomic import write_file
from sca.io.cache import get_cache_folder
from sca.io.errors import InputError
from sca.io.json import parse_json, read_regular_file
from sca.io.server_urls import parse_server_url
from sca.io.text import format_count
from sca.io.validation import check_range, is_int64

log: logging.Logger = logging.getLogger(__name__)

URL_VARIABLE, KEY_VARIABLE, KEY_FILE_VARIABLE = "OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_API_KEY_FILE"
MAX_RESPONSE_BYTES = 4 * 2**20
MAX_MESSAGE_LENGTH = 200  # characters of a server's message
FIRST_DELAY, MAX_DELAY = 0.5, 30.0  # minimum seconds before the first and any later retry
MAX_RETRY_AFTER = 120.0  # seconds; a server that requires a longer wait is not retried
RETRIED_STATUS_CODES = (408, 409, 425, 429)  # and all from 500
MAX_KEY_BYTES = 4096
MIN_SECRET_LENGTH = 8  # characters; shorter keys, such as "none", are placeholders and occur in captions
MAX_CONCURRENCY = 1024
Result = TypeVar("Result")


class ChatServerError(OSError):
    """Error of a server, or of the connection to it."""


class _TransientError(Exception):
    """Error that a retry may resolve. `delay`: wait that the server requires, in seconds."""

    def __init__(self, message: str, delay: float = 0.0):
        super().__init__(message)
        self.delay = delay


@dataclass(frozen=True)
class ChatCompletion:
    """Text that a server generated.

    Attributes:
        text: Text of the first choice, with its line breaks; empty if the server returned none, for example after a
            refusal.
        is_truncated: Whether it ended at the token limit.
        prompt_tokens: Tokens of the request; None if the server does not count them.
        completion_tokens: Tokens of the text; None if the server does not count them.
    """

    text: str
    is_truncated: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class ChatClient:
    """Client of one server.

    Args:
        url: Base URL, such as "http://localhost:8000/v1"; "/v1" is added to a URL without a path. Defaults to the
            environment variable `OPENAI_BASE_URL`.
        timeout: Maximum seconds per attempt, from the connection to the last byte of the response.
        max_retries: Maximum retries after a connection error, an overloaded or failing server, or an incomplete
            response.
        max_concurrency: Maximum number of concurrent requests.
        cache_folder: Folder that caches responses by their request; None for no cache.

    Raises:
        InputError: There is no URL, it is invalid or contains a password or a query, or the key cannot be read.
        RegistryError: An option is out of range.
    """

    def __init__(
        self,
        url: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 5,
        max_concurrency: int = 8,
        cache_folder: Path | None = None,
    ):
        check_range("timeout", timeout, float, 0.001)
        check_range("max_retries", max_retries, int, 0)
        check_range("max_concurrency", max_concurrency, int, 1, MAX_CONCURRENCY)
        self.url: str = normalize_url(url or os.environ.get(URL_VARIABLE) or "")
        self.timeout = timeout
        self.max_retries = max_retries
        self.max_concurrency = max_concurrency
        self.cache_folder = cache_folder
        self.usage: dict[str, int] = dict.fromkeys(
            ("requests", "cached", "empty", "prompt_tokens", "completion_tokens"), 0
        )
        self._key = read_api_key()

    def request_completions(
        self, make_bodies: Sequence[Callable[[], Mapping[str, Any]]], use_cache: bool = True
    ) -> list[ChatCompletion]:
        """Request completions that are not cached, several at a time.

        An interrupt or an error cancels the other requests; completions that have arrived are in the cache.

        Args:
            make_bodies: Functions that return the JSON bodies of the requests, each called when its request starts.
            use_cache: Read and write the cache; False for requests whose response is random.

        Returns:
            The completions, in order.

        Raises:
            ChatServerError: The server rejects a request, or all attempts failed.
        """
        completions: list[ChatCompletion | None] = [None] * len(make_bodies)

        async def request_all() -> None:
            limiter = anyio.Semaphore(self.max_concurrency)
            async with self._open_client() as client, anyio.create_task_group() as group:

                async def request_one(index: int) -> None:
                    async with limiter:
                        completions[index] = await self._request_completion(client, make_bodies[index](), use_cache)

                for index in range(len(make_bodies)):
                    group.start_soon(request_one, index)

        _run_async(request_all)
        return [completion for completion in completions if completion is not None]

    def find_model(self) -> str:
        """Return the name of the only model of the server.

        Returns:
            The name.

        Raises:
            ChatServerError: The server has several models or none, or all attempts failed.
        """

        async def request_names() -> list[str]:
            async with self._open_client() as client:
                return await self._retry_attempts(lambda: self._request_model_names(client))

        names = _run_async(request_names)
        if len(names) != 1:
            listed = self._clean_message(", ".join(names)) if names else "no models"
            raise ChatServerError(f"{self.url} has {listed}; set model=NAME")
        return names[0]

    def _open_client(self) -> httpx2.AsyncClient:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx2.Limits(max_connections=self.max_concurrency)
        return httpx2.AsyncClient(headers=headers, timeout=None, limits=limits, follow_redirects=False)

    async def _request_completion(
        self, client: httpx2.AsyncClient, body: Mapping[str, Any], use_cache: bool
    ) -> ChatCompletion:
        path = self._locate_cached(body) if use_cache else None
        if path is not None and (cached := _read_cached(path)) is not None:
            self.usage["cached"] += 1
            return cached
        completion = await self._retry_attempts(lambda: self._request_text(client, body))
        self.usage["requests"] += 1
        self.usage["empty"] += not completion.text
        self.usage["prompt_tokens"] += completion.prompt_tokens or 0
        self.usage["completion_tokens"] += completion.completion_tokens or 0
        if path is not None and completion.text:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, json.dumps(asdict(completion)))
            except OSError as error:
                log.warning("sca: the response cache cannot be written (%s); continuing without it", error.strerror)
                self.cache_folder = None
        return completion

    async def _request_text(self, client: httpx2.AsyncClient, body: Mapping[str, Any]) -> ChatCompletion:
        completion = _parse_completion(await self._send_request(client, "POST", "chat/completions", body))
        return replace(completion, text=self._mask_secret_key(completion.text))

    async def _request_model_names(self, client: httpx2.AsyncClient) -> list[str]:
        names = _parse_model_names(await self._send_request(client, "GET", "models"))
        return [self._mask_secret_key(name) for name in names]

    def _locate_cached(self, body: Mapping[str, Any]) -> Path | None:
        if self.cache_folder is None:
            return None
        digest = hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()
        return self.cache_folder / digest[:2] / f"{digest}.json"

    async def _retry_attempts(self, attempt: Callable[[], Awaitable[Result]]) -> Result:
        """Return the result of an attempt; retry it after transient errors."""
        for number in range(self.max_retries + 1):
            try:
                return await attempt()
            except _TransientError as error:
                if number == self.max_retries:
                    raise ChatServerError(
                        f"{self.url} {error} after {format_count(number + 1, 'attempt')}; check the server, or "
                        "increase max_retries or timeout"
                    ) from None
                backoff = min(FIRST_DELAY * 2**number, MAX_DELAY) * random.uniform(0.75, 1.0)
                await anyio.sleep(max(backoff, error.delay))
        raise AssertionError("unreachable")

    async def _send_request(
        self, client: httpx2.AsyncClient, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> Any:
        """Send a request and return the parsed JSON of its response."""
        content = bytearray()
        try:
            with anyio.fail_after(self.timeout):
                async with client.stream(method, f"{self.url}/{path}", json=body) as response:
                    async for chunk in response.aiter_bytes():
                        content += chunk
                        if len(content) > MAX_RESPONSE_BYTES:
                            raise ChatServerError(
                                f"{self.url} sent more than {MAX_RESPONSE_BYTES:,} bytes; check the URL"
                            )
        except TimeoutError:
            raise _TransientError(f"did not complete a response within {self.timeout:g} s") from None
        except (httpx2.TransportError, httpx2.DecodingError, UnicodeError) as error:  # the last: a host name
            raise _TransientError(f"failed ({self._clean_message(str(error) or type(error).__name__)})") from None
        self._check_status(response, bytes(content))
        try:
            return parse_json(bytes(content), "the response")
        except InputError:
            raise _TransientError("sent a response that is not JSON") from None

    def _check_status(self, response: httpx2.Response, content: bytes) -> None:
        """Raise an error unless the response is successful."""
        status = response.status_code
        if response.is_success:
            return
        if response.is_redirect:
            raise ChatServerError(
                f"{self.url} redirects to another address, which is not followed; set url to the final address"
            )
        message = f"responded with status {status}{self._read_error_message(content)}"
        if status in RETRIED_STATUS_CODES or status >= 500:
            delay = _parse_retry_after(response.headers.get("retry-after"))
            if delay > MAX_RETRY_AFTER:
                raise ChatServerError(f"{self.url} {message} and requires a wait of {delay:,.0f} s; try again later")
            raise _TransientError(message, delay)
        fix = f"set {KEY_VARIABLE} or {KEY_FILE_VARIABLE}" if status in (401, 403) else "check url, model and options"
        raise ChatServerError(f"{self.url} {message}; {fix}")

    def _read_error_message(self, content: bytes) -> str:
        """Return the message of an error response in parentheses, or nothing."""
        try:
            response = parse_json(content, "the response")
        except InputError:
            return ""
        message = None
        for key in ("error", "message", "detail"):
            message = response.get(key) if isinstance(response, dict) and message is None else message
        message = message.get("message") if isinstance(message, dict) else message
        return f" ({self._clean_message(str(message))})" if message else ""

    def _clean_message(self, message: str) -> str:
        """Return a message of a server in one printable line, shortened and without the key."""
        text = " ".join(self._mask_key(message).split())
        text = "".join(character if character.isprintable() else "?" for character in text)
        return text if len(text) <= MAX_MESSAGE_LENGTH else f"{text[:MAX_MESSAGE_LENGTH]}..."

    def _mask_key(self, text: str) -> str:
        """Return a text of a server without the key, which a server for debugging may repeat."""
        return text.replace(self._key, "***") if self._key else text

    def _mask_secret_key(self, text: str) -> str:
        """Return a text that is part of the result without the key, unless that is a placeholder."""
        return self._mask_key(text) if len(self._key) >= MIN_SECRET_LENGTH else text


def normalize_url(url: str) -> str:
    """Check a base URL and return it without a trailing slash.

    Args:
        url: Base URL.

    Returns:
        The URL, with the path "/v1" if it has none.

    Raises:
        InputError: The URL is empty or invalid, or contains a password, a query or a fragment.
    """
    if not url:
        raise InputError(f"no server; set url=http://HOST:PORT/v1, or the environment variable {URL_VARIABLE}")
    secret_hint = f"remove it, and set {KEY_VARIABLE} or {KEY_FILE_VARIABLE} for a key"
    parts = parse_server_url(url, "the URL of the server", "set url=http://HOST:PORT/v1", secret_hint)
    return str(parts.copy_with(path=parts.path.rstrip("/") or "/v1"))


def read_api_key(key_variable: str = KEY_VARIABLE, file_variable: str = KEY_FILE_VARIABLE) -> str:
    """Read an API key of the process from the environment, or from the file that the environment names.

    Args:
        key_variable: Environment variable that contains the key.
        file_variable: Environment variable that contains the path of its file.

    Returns:
        The key; "" without one.

    Raises:
        InputError: The file cannot be read, or the key contains characters that cannot be sent.
    """
    key, file = os.environ.get(key_variable, ""), os.environ.get(file_variable)
    if not key and file:
        try:
            key = read_regular_file(file, MAX_KEY_BYTES).decode()
        except OSError as error:
            raise InputError(f"{file_variable}: {file} cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise InputError(f"{file_variable}: {file} is not text") from None
    key = key.strip()
    if not all("!" <= character <= "~" for character in key):
        raise InputError(f"the key in {key_variable} or {file_variable} contains spaces or special characters")
    return key


def get_response_cache_folder() -> Path:
    """Return the folder that caches the responses of servers."""
    return get_cache_folder() / "responses"


def _run_async(function: Callable[[], Awaitable[Result]]) -> Result:
    """Run an asynchronous function in a thread of its own, also if an event loop runs in this one."""
    try:
        with start_blocking_portal() as portal:
            return portal.call(function)
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]  # that of the first request that failed
        raise error from None


def _read_cached(path: Path) -> ChatCompletion | None:
    """Return a cached completion; None if there is none, or if it is damaged."""
    try:
        completion = ChatCompletion(**parse_json(path.read_bytes(), str(path)))
    except (OSError, InputError, TypeError):
        return None
    has_valid_counts = all(
        count is None or is_int64(count) for count in (completion.prompt_tokens, completion.completion_tokens)
    )
    is_valid = isinstance(completion.text, str) and isinstance(completion.is_truncated, bool) and has_valid_counts
    return completion if is_valid else None


def _parse_completion(response: Any) -> ChatCompletion:
    """Return the first choice of a response. Raises _TransientError for another format."""
    try:
        choice = response["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise _TransientError("sent a response without choices") from None
    if text is not None and not isinstance(text, str):
        raise _TransientError("sent a choice without text")
    usage = response.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    prompt_tokens, completion_tokens = (
        int(count) if count is not None and is_int64(count) and count >= 0 else None for count in counts
    )
    is_truncated = choice.get("finish_reason") == "length"
    return ChatCompletion((text or "").strip(), is_truncated, prompt_tokens, completion_tokens)


def _parse_model_names(response: Any) -> list[str]:
    try:
        return [str(model["id"]) for model in response["data"]]
    except (KeyError, TypeError):
        raise _TransientError("sent no list of models") from None


def _parse_retry_after(value: str | None) -> float:
    """Return the seconds of a `Retry-After` header, a number or a date; 0 without a valid one."""
    try:
        delay = float(value or 0)
    except ValueError:
        try:
            delay = parsedate_to_datetime(value or "").timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(delay, 0.0) if math.isfinite(delay) else 0.0
