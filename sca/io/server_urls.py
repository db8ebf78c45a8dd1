"""URLs of servers, from the command line, options or the environment."""

from __future__ import annotations

import httpx2

from sca.io.errors import InputError


def parse_server_url(text: str, name: str, format_hint: str, secret_hint: str = "remove it") -> httpx2.URL:
    """Parse the URL of a server. Messages do not contain it, because it may contain a password.

    Args:
        text: URL.
        name: Subject of the messages.
        format_hint: Fix for an invalid URL.
        secret_hint: Fix for a URL with a user name, a query or a fragment.

    Returns:
        The URL.

    Raises:
        InputError: The text is not an http(s) URL with a host, or contains a user name, a query or a fragment.
    """
    try:
        url = httpx2.URL(text)
        is_valid = url.scheme in ("http", "https") and bool(url.host) and (url.port is None or 0 < url.port < 2**16)
    except (httpx2.InvalidURL, UnicodeError):
        is_valid = False
    if not is_valid:
        raise InputError(f"{name} is invalid; {format_hint}")
    if url.userinfo or url.query or url.fragment:
        raise InputError(f"{name} contains a user name, a query or a fragment; {secret_hint}")
    return url
