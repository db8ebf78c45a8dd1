"""Cache for the features of recent images."""

from __future__ import annotations

from collections import OrderedDict

from sca.inference.engine import EncodedImages


class FeatureStore:
    """The features of the most recent images, without the images: at most `max_bytes`."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.stored_bytes, self.hits, self.misses = max_bytes, 0, 0, 0
        self._encoded_by_digest: OrderedDict[str, EncodedImages] = OrderedDict()

    def __len__(self) -> int:
        return len(self._encoded_by_digest)

    def get(self, digest: str) -> EncodedImages | None:
        encoded = self._encoded_by_digest.get(digest)
        if encoded is None:
            self.misses += 1
            return None
        self.hits += 1
        self._encoded_by_digest.move_to_end(digest)
        return encoded

    def put(self, digest: str, encoded: EncodedImages) -> None:
        self._encoded_by_digest[digest] = encoded
        self.stored_bytes += _count_feature_bytes(encoded)
        while self.stored_bytes > self.max_bytes:
            self.stored_bytes -= _count_feature_bytes(self._encoded_by_digest.popitem(last=False)[1])


def _count_feature_bytes(encoded: EncodedImages) -> int:
    return 0 if encoded.features is None else encoded.features.nbytes
