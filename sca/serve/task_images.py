"""Images of Label Studio tasks: base64 data, or downloads from the servers that the operator of this server allows."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import httpx2
from anyio import to_thread

from sca.io.errors import InputError
from sca.io.json import parse_json
from sca.io.server_urls import parse_server_url
from sca.serve.errors import ApiError
from sca.serve.memory_budget import MemoryLease
from sca.serve.service import decode_base64

MAX_REDIRECTS = 3
MAX_SHOWN_URL = 200  # characters of a URL in error messages
REFRESH_PATH = "/api/token/refresh"  # exchanges a personal access token for a short-lived one


class TaskImageReader:
    """Reader of the images of tasks.

    URLs are downloaded only if they are below `label_studio_url` or one of `image_urls`, also after each redirect:
    scheme, host and port are equal, and the path begins with that of the server. Paths are relative to
    `label_studio_url`. Files of this machine are never read. The key is sent only to URLs below `label_studio_url`.

    Args:
        label_studio_url: URL of Label Studio, such as "http://localhost:8080"; "" for none.
        image_urls: URLs of further servers of images, or of folders on them.
        api_key: Access token of Label Studio; "" for none. Personal access tokens and legacy tokens are supported.
        max_bytes: Maximum bytes per image.

    Raises:
        InputError: A URL is invalid.
    """

    def __init__(
        self, label_studio_url: str = "", image_urls: Sequence[str] = (), api_key: str = "", max_bytes: int = 2**25
    ):
        self.url: str = label_studio_url.rstrip("/")
        self.max_bytes = max_bytes
        self._key = api_key
        self._access_token = ""  # in exchange for a personal access token
        self._label_studio = _parse_task_server_url(self.url, "--label-studio-url") if self.url else None
        self._servers = [_parse_task_server_url(each, "--image-url") for each in image_urls]
        if self._label_studio:
            self._servers.append(self._label_studio)

    async def read(self, source: str, location: str, seconds: float, lease: MemoryLease) -> bytes:
        """Read an image file.

        Args:
            source: `data:` URL, http(s) URL, or path on Label Studio.
            location: Task, for messages.
            seconds: Time limit in seconds.
            lease: Memory lease of the request, to which the bytes are added.

        Returns:
            The bytes of the file.

        Raises:
            ApiError: The URL is not allowed (422), the file is too large (413), or the download failed (422 or 504).
            MemoryBudgetError: There is not enough memory.
        """
        if source[:5].lower() == "data:":
            return await to_thread.run_sync(decode_base64, source, location, "tasks")
        url = self._resolve_url(source, location)
        try:
            with anyio.fail_after(max(seconds, 0)):
                async with httpx2.AsyncClient(timeout=None, follow_redirects=False) as client:
                    for _ in range(MAX_REDIRECTS + 1):
                        async with self._send_request(client, url, location) as response:
                            if not response.has_redirect_location:
                                return await self._read_body(response, url, location, lease)
                        url = self._check_url(url.join(response.headers["location"]), location)
        except TimeoutError:
            raise ApiError(
                504, f"{location}: {_shorten_url(url)} was not downloaded in time; try again later"
            ) from None
        except (httpx2.TransportError, httpx2.DecodingError, httpx2.InvalidURL, UnicodeError) as error:
            reason = " ".join(str(error).split())[:MAX_SHOWN_URL] or type(error).__name__
            raise ApiError(
                422, f"{location}: {_shorten_url(url)} cannot be downloaded ({reason}); check the URL"
            ) from None
        raise ApiError(
            422, f"{location}: {_shorten_url(url)} has more than {MAX_REDIRECTS} redirects; use the final URL"
        )

    def _resolve_url(self, source: str, location: str) -> httpx2.URL:
        """Return the URL of an image, after checking that it is allowed."""
        is_path = source.startswith(("/", "upload/")) and not source.startswith("//")
        if is_path and not self.url:
            raise ApiError(
                422, f"{location}: {source[:MAX_SHOWN_URL]!r} is a path; start the server with --label-studio-url"
            )
        try:
            return self._check_url(httpx2.URL(self._make_absolute(source) if is_path else source), location)
        except (httpx2.InvalidURL, UnicodeError):
            raise ApiError(422, f"{location}: the URL of the image is invalid; use an http(s) URL") from None

    def _make_absolute(self, path: str) -> str:
        """Return the URL of a path on Label Studio, which may already contain the path of its URL."""
        assert self._label_studio is not None  # see `_resolve_url`
        prefix = self._label_studio.path.rstrip("/")
        is_complete = prefix and path.startswith(f"{prefix}/")
        return f"{self.url.removesuffix(prefix) if is_complete else self.url}/{path.lstrip('/')}"

    def _check_url(self, url: httpx2.URL, location: str) -> httpx2.URL:
        """Return a URL unchanged; raise ApiError if it is not allowed."""
        if url.scheme not in ("http", "https"):
            fix = "use an http(s) or data: URL, or a path that begins with /"
        elif url.userinfo:
            fix = "remove its user name"
        elif not any(_is_below(url, server) for server in self._servers):
            fix = "start the server with --label-studio-url or --image-url to allow it"
        else:
            return url
        raise ApiError(422, f"{location}: {_shorten_url(url)} is not downloaded; {fix}")

    @asynccontextmanager
    async def _send_request(
        self, client: httpx2.AsyncClient, url: httpx2.URL, location: str
    ) -> AsyncIterator[httpx2.Response]:
        """Request an image. An access token that Label Studio rejects has expired and is replaced once."""
        is_label_studio = self._label_studio is not None and _is_below(url, self._label_studio)
        used_token = self._access_token if is_label_studio else ""
        headers = await self._make_headers(client, location) if is_label_studio else {}
        async with client.stream("GET", url, headers=headers) as response:
            if response.status_code != 401 or not used_token:
                yield response
                return
        if self._access_token == used_token:
            self._access_token = ""
        async with client.stream("GET", url, headers=await self._make_headers(client, location)) as response:
            yield response

    async def _make_headers(self, client: httpx2.AsyncClient, location: str) -> dict[str, str]:
        """Return the headers for Label Studio. A personal access token, which is a JWT, is exchanged first."""
        if not self._key:
            return {}
        if self._key.count(".") != 2:
            return {"Authorization": f"Token {self._key}"}
        self._access_token = self._access_token or await self._request_access_token(client, location)
        return {"Authorization": f"Bearer {self._access_token}"}

    async def _request_access_token(self, client: httpx2.AsyncClient, location: str) -> str:
        response = await client.post(f"{self.url}{REFRESH_PATH}", json={"refresh": self._key})
        try:
            access_token = parse_json(response.content, "the response")["access"] if response.is_success else None
        except (InputError, KeyError, TypeError):
            access_token = None
        if not isinstance(access_token, str):
            raise ApiError(
                422, f"{location}: Label Studio rejects its access token (status {response.status_code}); check the key"
            )
        return access_token

    async def _read_body(self, response: httpx2.Response, url: httpx2.URL, location: str, lease: MemoryLease) -> bytes:
        if not response.is_success:
            status = response.status_code
            fix = "set LABEL_STUDIO_API_KEY" if status in (401, 403) else "check the URL"
            raise ApiError(422, f"{location}: {_shorten_url(url)} responds with status {status}; {fix}")
        content = bytearray()
        async for chunk in response.aiter_bytes():
            lease.add(len(chunk))
            content += chunk
            if len(content) > self.max_bytes:
                raise ApiError(413, f"{location}: {_shorten_url(url)} exceeds the limit of {self.max_bytes:,} bytes")
        return bytes(content)


def _parse_task_server_url(text: str, option: str) -> httpx2.URL:
    """Parse the value of `--label-studio-url` or `--image-url`; raise InputError if it is not the URL of a server."""
    return parse_server_url(text, f"the URL of {option}", "write it like http://localhost:8080")


def _is_below(url: httpx2.URL, server: httpx2.URL) -> bool:
    """Return whether a URL has the scheme, host and port of a server, and a path below that of the server."""
    if (url.scheme, url.host, url.port) != (server.scheme, server.host, server.port):  # without default ports
        return False
    prefix = server.path.rstrip("/")
    # Servers can decode the path before they resolve "..", and treat a backslash as a slash.
    has_parent_segment = ".." in re.split(r"[/\\]", url.path)
    return not prefix or ((url.path == prefix or url.path.startswith(f"{prefix}/")) and not has_parent_segment)


def _shorten_url(url: httpx2.URL) -> str:
    """Return a URL for messages, without its user name, password and query, which can contain a signature."""
    return str(url.copy_with(userinfo=b"", query=None, fragment=None))[:MAX_SHOWN_URL]
