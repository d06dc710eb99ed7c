"""Pictures on their way into the model. Those seen lately are neither opened nor encoded again.

A client that goes on with a conversation sends its pictures with every turn.
"""

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256

from torch import Tensor

from visualrwkv.errors import InputError
from visualrwkv.image_processing import is_data_uri
from visualrwkv.serving.fetching import fetch
from visualrwkv.serving.requests import Limits, Refused

FEATURE_BYTES = 64 * 2**20  # of the pictures seen last
READERS = 4  # threads that open pictures, each in up to 0.45 GB at 50 million pixels
FETCHERS = 8  # threads that wait for the web


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


class PictureReader:
    """Opens the pictures of requests, by turns: each request has one picture at a time in the hands of the threads.

    So many large pictures of one request hold up others by one, and a request that is cancelled ends with the picture
    at hand.

    Args:
        process: the model's image processor.
        limits: of one request.
        recent: where the features of pictures seen lately are.
    """

    def __init__(self, process, limits: Limits, recent: RecentPictures):
        self._process, self._limits, self._recent = process, limits, recent
        self._readers = ThreadPoolExecutor(READERS, "reader")
        self._fetchers = ThreadPoolExecutor(FETCHERS, "fetcher")  # a slow host must not hold up who sends pictures

    def close(self) -> None:
        for pool in (self._readers, self._fetchers):
            pool.shutdown(wait=False, cancel_futures=True)

    async def read(self, sources: Sequence[str]) -> list[Picture]:
        """The pictures behind the `url`s of a request; `Refused` names the one that cannot be had."""
        loop = asyncio.get_running_loop()
        pictures, seconds = [], self._limits.remote_seconds
        for number, source in enumerate(sources, 1):
            try:
                sent: str | bytes = source
                if not is_data_uri(source):
                    sent, seconds = await loop.run_in_executor(self._fetchers, self._fetch, source, seconds)
                pictures.append(await loop.run_in_executor(self._readers, self._open, sent))
            except InputError as error:
                raise Refused(400, f"picture {number}: {error}", "messages", "invalid_image") from None
        return pictures

    def _fetch(self, url: str, seconds: float) -> tuple[bytes, float]:
        """What is behind an address, and the seconds that are left for others of the same request."""
        until = time.monotonic() + seconds
        return fetch_allowed(url, self._limits, seconds), until - time.monotonic()

    def _open(self, sent: str | bytes) -> Picture:
        """With features where it was seen lately, else with its pixels."""
        digest = sha256(sent.encode() if isinstance(sent, str) else sent).digest()
        features = self._recent.get(digest)
        if features is not None:
            return Picture(digest, features)
        return Picture(digest, pixels=self._process(sent, return_tensors="pt")["pixel_values"])


def fetch_allowed(url: str, limits: Limits, seconds: float) -> bytes:
    """What is behind the address of a picture, if this server fetches any, and if it can be had within some seconds."""
    if not url.lower().startswith(("http://", "https://")):
        raise InputError("the url must be a data URI, such as data:image/png;base64,...")
    if not limits.remote_images:
        raise InputError(
            "this server fetches no addresses (it was started without --allow-remote-images); send a data URI"
        )
    try:
        return fetch(url, limits.remote_bytes, seconds)
    except TimeoutError:
        raise InputError(f"the picture could not be fetched: more than {limits.remote_seconds:g} s") from None
