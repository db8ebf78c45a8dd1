"""Limits of the server on sizes, times, connections and values of request fields."""

from __future__ import annotations

from dataclasses import dataclass

from sca.io.prompts import MAX_POINTS

MAX_BEAMS, MAX_NEW_TOKENS = 16, 512  # beams and captions per region, tokens per caption
MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1  # range of the OpenAI API
MAX_POINTS_PER_SIDE, MAX_CROP_LAYERS = 64, 2
MAX_TASK_LENGTH = 40  # characters of the name of a task
MAX_TEXT_LENGTH, MAX_MATCHES = 1000, 4096  # characters of a text to find, regions that match it


@dataclass(frozen=True)
class ServerLimits:
    """Limits on requests and connections.

    Args:
        max_body_bytes: Maximum bytes per request.
        max_pixels: Maximum number of pixels per image.
        max_prompts: Maximum number of prompts per request; also limits the regions found in everything mode.
        timeout: Time limit in seconds, applied separately to receiving a request and to responding to it.
        max_connections: Maximum concurrent connections.
        max_points: Maximum points per prompt.
        max_points_per_request: Maximum points per request.
        max_json_values: Maximum numbers, strings, lists and objects in the JSON of a request.
    """

    max_body_bytes: int = 32 * 2**20
    max_pixels: int = 50_000_000
    max_prompts: int = 4096
    timeout: float = 60.0
    max_connections: int = 512
    max_points: int = MAX_POINTS
    max_points_per_request: int = 16_384
    max_json_values: int = 2**20

    @property
    def max_memory_bytes(self) -> int:
        """Memory budget of all requests in bytes, sufficient for the largest request."""
        return max(2**30, 24 * self.max_pixels, 8 * self.max_body_bytes)
