"""Pictures on their way into the model. Those seen lately are neither opened nor encoded again.

A client that goes on with a conversation sends its pictures with every turn.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

FEATURE_BYTES = 64 * 2**20  # of the pictures seen last


@dataclass(eq=False)
class Picture:
    """One picture of a request.

    Args:
        digest: of what the client sent.
        features: (1, num_image_tokens, D), where the picture was seen lately.
        pixels: (1, 3, S, S) otherwise.
    """

    digest: bytes
    features: Tensor | None = None
    pixels: Tensor | None = None


class RecentPictures:
    """Features of the pictures seen last, by digest; for all threads.

    Args:
        limit: bytes of features; beyond it those not seen for longest are forgotten.
    """

    def __init__(self, limit: int = FEATURE_BYTES):
        self.limit = limit
        self._lock = threading.Lock()
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, digest: bytes) -> Tensor | None:
        with self._lock:
            features = self._features.get(digest)
            if features is not None:
                self._features.move_to_end(digest)
            return features

    def put(self, digest: bytes, features: Tensor) -> None:
        with self._lock:
            former = self._features.pop(digest, None)
            self._features[digest] = features
            self._bytes += features.nbytes - (0 if former is None else former.nbytes)
            while self._bytes > self.limit:
                self._bytes -= self._features.popitem(last=False)[1].nbytes

    @property
    def nbytes(self) -> int:
        return self._bytes
