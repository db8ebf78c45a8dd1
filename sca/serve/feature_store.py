"""Cache for the features of recent images."""

from __future__ import annotations

from collections import OrderedDict

from sca.inference.engine import Encoded


class FeatureStore:
    """What an encoder has made of the images seen last, without the images: at most so many bytes of it."""

    def __init__(self, limit: int):
        self.limit, self.held, self.hits, self.misses = limit, 0, 0, 0
        self._kept: OrderedDict[str, Encoded] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, digest: str) -> Encoded | None:
        found = self._kept.get(digest)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(digest)
        return found

    def put(self, digest: str, encoded: Encoded) -> None:
        self._kept[digest] = encoded
        self.held += _size(encoded)
        while self.held > self.limit:
            self.held -= _size(self._kept.popitem(last=False)[1])


def _size(encoded: Encoded) -> int:
    return 0 if encoded.features is None else encoded.features.nbytes
