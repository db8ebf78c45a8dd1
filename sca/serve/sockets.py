"""Where a server listens."""

from __future__ import annotations

import ipaddress
import socket


def bind_socket(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 is any that is free. ValueError for an address that cannot be had."""
    bound_socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    bound_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound_socket.bind((host, port))
    except (OSError, OverflowError) as error:
        bound_socket.close()
        raise ValueError(f"cannot listen at {host}, port {port}: {error}; choose another --port") from error
    return bound_socket


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address to listen at."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
