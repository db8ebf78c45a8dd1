"""HTTP client for servers that speak the chat completions of the OpenAI API, with retries and a response cache.

The address and the key come from the process that captions: from its arguments and environment, never from a file or a
request of somebody else. The key is sent to this address only, because redirects are not followed, and is not written
to files, logs or messages.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx2

from sca.io.atomic import write_file
from sca.io.cache import get_cache_folder
from sca.io.errors import InputError
from sca.io.json import parse_json
from sca.io.validation import check_range

URL_VARIABLE, KEY_VARIABLE, KEY_FILE_VARIABLE = "OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_API_KEY_FILE"
MAX_RESPONSE_BYTES = 4 * 2**20
MAX_MESSAGE_LENGTH = 200  # characters of a server's error message
FIRST_DELAY, MAX_DELAY = 0.5, 30.0  # seconds before the first and any later retry, without `Retry-After`
MAX_RETRY_AFTER = 120.0  # seconds; a server that requires more is not retried
RETRIED_STATUS_CODES = (408, 409, 425, 429)  # and all from 500
MAX_KEY_LENGTH = 4096


class ChatServerError(OSError):
    """Error of a server, or of the connection to it."""


class _TransientError(Exception):
    """Problem that may not occur again. `delay` is the time to wait that the server requires, in seconds."""

    def __init__(self, message: str, delay: float | None = None):
        super().__init__(message)
        self.delay = delay


@dataclass(frozen=True)
class ChatCompletion:
    """Text that a server generated.

    Attributes:
        text: Text of the first choice.
        is_truncated: Whether it ended at the token limit.
        prompt_tokens: Tokens of the request; None if the server does not count them.
        completion_tokens: Tokens of the text; None if the server does not count them.
    """

    text: str
    is_truncated: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class ChatClient:
    """Client of one server. Its methods can be called from several threads.

    Args:
        url: Base URL, such as "http://localhost:8000/v1"; "/v1" is added to a URL without a path. Defaults to the
            environment variable `OPENAI_BASE_URL`.
        timeout: Seconds for one response, from the request to its last byte.
        max_retries: Further attempts after a connection error, an overloaded or failing server, or an incomplete
            response.
        cache_folder: Folder that caches responses by their request; None for no cache.

    Raises:
        InputError: There is no URL, it is invalid or contains a password or a query, or the key cannot be read.
        ValueError: An option is out of range.
    """

    def __init__(
        self, url: str | None = None, timeout: float = 60.0, max_retries: int = 5, cache_folder: Path | None = None
    ):
        check_range("timeout", timeout, float, 0.001, math.inf)
        check_range("max_retries", max_retries, int, 0)
        self.url: str = normalize_url(url or os.environ.get(URL_VARIABLE) or "")
        self.timeout = timeout
        self.max_retries = max_retries
        self.cache_folder = cache_folder
        self._usage = dict.fromkeys(("requests", "cached", "prompt_tokens", "completion_tokens"), 0)
        self._usage_lock = threading.Lock()
        self._key = read_api_key()
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=timeout,
            follow_redirects=False,
        )

    def request_completion(
        self, body: Mapping[str, Any], is_cached: bool = True, stop: threading.Event | None = None
    ) -> ChatCompletion:
        """Request a completion, unless it is cached.

        Args:
            body: JSON body of the request.
            is_cached: Use the cache; False for requests whose response is random.
            stop: Event that ends the attempts.

        Returns:
            The completion.

        Raises:
            ChatServerError: The server rejects the request, or all attempts failed.
        """
        cache_path = self._locate_cached(body) if is_cached else None
        if cache_path is not None and (cached := _read_cached(cache_path)) is not None:
            self._count_usage(cached=1)
            return cached
        completion = self._repeat_attempts(
            lambda: _parse_completion(self._send_request("POST", "chat/completions", body)), stop
        )
        self._count_usage(
            requests=1,
            prompt_tokens=completion.prompt_tokens or 0,
            completion_tokens=completion.completion_tokens or 0,
        )
        if cache_path is not None:
            cache_path.parent.mkdir(parents=True, exist_ok=True)
            write_file(cache_path, json.dumps(asdict(completion)))
        return completion

    def find_model(self) -> str:
        """Return the name of the only model of the server.

        Returns:
            The name.

        Raises:
            ChatServerError: The server has several models or none, or all attempts failed.
        """
        names = self._repeat_attempts(lambda: _parse_model_names(self._send_request("GET", "models")))
        if len(names) != 1:
            listed = f"{', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" if names else "no models"
            raise ChatServerError(f"{self.url} has {listed}; set model=NAME")
        return names[0]

    @property
    def usage(self) -> dict[str, int]:
        """Numbers of completed requests, of cached completions, and of tokens, as the server counts them."""
        with self._usage_lock:
            return dict(self._usage)

    def _count_usage(self, **counts: int) -> None:
        with self._usage_lock:
            for name, count in counts.items():
                self._usage[name] += count

    def _locate_cached(self, body: Mapping[str, Any]) -> Path | None:
        if self.cache_folder is None:
            return None
        digest = hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()
        return self.cache_folder / digest[:2] / f"{digest}.json"

    def _repeat_attempts(self, attempt: Callable[[], Any], stop: threading.Event | None = None) -> Any:
        """Return the result of an attempt; repeat it after transient errors."""
        stop = stop or threading.Event()
        for number in range(self.max_retries + 1):
            try:
                return attempt()
            except _TransientError as error:
                if number == self.max_retries or stop.is_set():
                    attempts = "1 attempt" if number == 0 else f"{number + 1} attempts"
                    raise ChatServerError(
                        f"{self.url} {error} after {attempts}; check the server, or increase max_retries or timeout"
                    ) from None
                backoff = min(FIRST_DELAY * 2**number, MAX_DELAY) * random.uniform(0.75, 1.0)
                stop.wait(backoff if error.delay is None else error.delay)
        raise AssertionError("unreachable")

    def _send_request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Send a request and return the parsed JSON of its response."""
        deadline = time.monotonic() + self.timeout
        try:
            with self._client.stream(method, f"{self.url}/{path}", json=body) as response:
                content = bytearray()
                for chunk in response.iter_bytes():
                    content += chunk
                    if len(content) > MAX_RESPONSE_BYTES:
                        raise ChatServerError(f"{self.url} sent more than {MAX_RESPONSE_BYTES:,} bytes; check the URL")
                    if time.monotonic() > deadline:
                        raise _TransientError(f"did not complete a response within {self.timeout:g} s")
        except httpx2.TimeoutException:
            raise _TransientError(f"did not respond within {self.timeout:g} s") from None
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _TransientError(f"failed ({self._redact_message(str(error) or type(error).__name__)})") from None
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
            if delay is None or delay <= MAX_RETRY_AFTER:
                raise _TransientError(message, delay)
        fix = f"set {KEY_VARIABLE} or {KEY_FILE_VARIABLE}" if status in (401, 403) else "check url, model and options"
        raise ChatServerError(f"{self.url} {message}; {fix}")

    def _read_error_message(self, content: bytes) -> str:
        """Return the message of an error response in parentheses, or nothing."""
        try:
            error = parse_json(content, "the response")["error"]
            message = error["message"] if isinstance(error, dict) else error
        except (InputError, KeyError, TypeError):
            return ""
        return f" ({self._redact_message(str(message))})" if message else ""

    def _redact_message(self, message: str) -> str:
        """Return a message in one line, shortened and without the key."""
        text = " ".join((message.replace(self._key, "***") if self._key else message).split())
        return text if len(text) <= MAX_MESSAGE_LENGTH else f"{text[:MAX_MESSAGE_LENGTH]}..."


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
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_valid = False
    if not is_valid:
        raise InputError("the URL of the server is invalid; set url=http://HOST:PORT/v1")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise InputError(
            f"the URL of the server contains a user name, a query or a fragment; remove it, and set {KEY_VARIABLE} or "
            f"{KEY_FILE_VARIABLE} for a key"
        )
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/") or "/v1", "", ""))


def read_api_key() -> str:
    """Read the API key of the process from the environment, or from the file that the environment names.

    Returns:
        The key; "" without one.

    Raises:
        InputError: The file cannot be read, or the key contains characters that cannot be sent.
    """
    key, file = os.environ.get(KEY_VARIABLE, ""), os.environ.get(KEY_FILE_VARIABLE)
    if not key and file:
        try:
            with open(file, encoding="utf-8") as opened:
                key = opened.read(MAX_KEY_LENGTH)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not text"
            raise InputError(f"{KEY_FILE_VARIABLE}: {file} cannot be read ({reason})") from None
    key = key.strip()
    if not all("!" <= character <= "~" for character in key):
        raise InputError(f"the key in {KEY_VARIABLE} or {KEY_FILE_VARIABLE} contains spaces or special characters")
    return key


def get_response_cache_folder() -> Path:
    """Return the folder that caches the responses of servers."""
    return get_cache_folder() / "responses"


def _read_cached(path: Path) -> ChatCompletion | None:
    """Return a cached completion; None if there is none, or if it is damaged."""
    try:
        completion = ChatCompletion(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return completion if isinstance(completion.text, str) else None


def _parse_completion(response: Any) -> ChatCompletion:
    """Return the first choice of a response. Raises _TransientError for another format."""
    try:
        choice = response["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise _TransientError("sent a response without choices") from None
    if text is None:  # an empty text, for example if all tokens were used for reasoning
        text = ""
    if not isinstance(text, str):
        raise _TransientError("sent a choice without text")
    usage = response.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    prompt_tokens, completion_tokens = (count if isinstance(count, int) else None for count in counts)
    is_truncated = choice.get("finish_reason") == "length"
    return ChatCompletion(" ".join(text.split()), is_truncated, prompt_tokens, completion_tokens)


def _parse_model_names(response: Any) -> list[str]:
    try:
        return [str(model["id"]) for model in response["data"]]
    except (KeyError, TypeError):
        raise _TransientError("sent no list of models") from None


def _parse_retry_after(value: str | None) -> float | None:
    """Return the seconds of a `Retry-After` header, a number or a date; None without a valid one."""
    if not value:
        return None
    try:
        delay = float(value)
    except ValueError:
        try:
            delay = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(delay, 0.0) if math.isfinite(delay) else None
