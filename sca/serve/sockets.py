"""Sockets of servers."""

from __future__ import annotations

import ipaddress
import socket


def bind_socket(host: str, port: int) -> socket.socket:
    """Bind a TCP socket.

    Args:
        host: Host name or IP address.
        port: Port; 0 selects a free port.

    Returns:
        The bound socket, not yet listening.

    Raises:
        ValueError: The address cannot be bound.
    """
    bound_socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    bound_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound_socket.bind((host, port))
    except (OSError, OverflowError) as error:
        bound_socket.close()
        raise ValueError(f"cannot bind {host}, port {port}: {error}; choose another --port") from error
    return bound_socket


def is_loopback(host: str) -> bool:
    """Return whether an address is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
