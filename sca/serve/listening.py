"""Where a server listens."""

from __future__ import annotations

import ipaddress
import socket


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 is any that is free. ValueError for an address that cannot be had."""
    door = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((host, port))
    except (OSError, OverflowError) as error:
        door.close()
        raise ValueError(f"cannot listen at {host}, port {port}: {error}; choose another --port") from error
    return door


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address to listen at."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
