"""Cache of image features."""

from __future__ import annotations

from collections import OrderedDict

from sca.inference.engine import EncodedImages


class FeatureCache:
    """LRU cache of image features, without the images.

    Args:
        max_bytes: Maximum bytes of all features.

    Attributes:
        cached_bytes: Current bytes of all features.
        hits: Lookups that found features.
        misses: Lookups that did not.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.cached_bytes: int = 0
        self.hits: int = 0
        self.misses: int = 0
        self._encoded_by_digest: OrderedDict[str, EncodedImages] = OrderedDict()

    def __len__(self) -> int:
        return len(self._encoded_by_digest)

    def get(self, digest: str) -> EncodedImages | None:
        """Return the features of an image by the hash of its pixels; None if not cached."""
        encoded = self._encoded_by_digest.get(digest)
        if encoded is None:
            self.misses += 1
            return None
        self.hits += 1
        self._encoded_by_digest.move_to_end(digest)
        return encoded

    def put(self, digest: str, encoded: EncodedImages) -> None:
        """Store the features of an image and evict the least recently used ones."""
        self._encoded_by_digest[digest] = encoded
        self.cached_bytes += _count_feature_bytes(encoded)
        while self.cached_bytes > self.max_bytes:
            self.cached_bytes -= _count_feature_bytes(self._encoded_by_digest.popitem(last=False)[1])


def _count_feature_bytes(encoded: EncodedImages) -> int:
    return 0 if encoded.features is None else encoded.features.nbytes
