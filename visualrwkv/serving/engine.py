"""Continuous batching: one thread owns the model and its `Decoder`, which moves all replies under way by one token at a
time.

1. Waiting requests are read together; how many is bounded, so that the others do not wait long. In a crowd a few short
   ones wait some tokens for more to come, since reading one by one takes longer.
2. Their replies join those under way.
3. All advance by one token; those that are complete, or that nobody waits for any more, leave.
"""

import threading
from collections import deque
from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor

from visualrwkv.decoding import Decoder, Reply
from visualrwkv.sampling import Sampling
from visualrwkv.serving.pictures import Picture, RecentPictures

PREFILL_POSITIONS = 4096  # padded positions that are read between two tokens of the others, if one prompt is not longer
WORTH_READING = 256  # padded positions; fewer take longer each, and all the others wait meanwhile
CROWD = 8  # for every so many others those who are not worth reading yet let one token pass
PICTURES_AT_ONCE = 16  # through the vision tower


class ShuttingDown(Exception):
    """What ends the replies of an engine that is closed."""


class ServedReply(Reply):
    """A reply that somebody waits for.

    Args:
        tokenizer: the tokenizer of the model.
        sampling: how to choose.
        ids: of the prompt.
        pictures: in the order of their places in the prompt.
        tell: called in the engine's thread with (text that is certain now, finish). `finish` is None while more
            follows, then "stop", "length", or the exception that ended the reply.

    Attributes:
        cancelled: set it, and the reply leaves at the next token without a further call of `tell`.
    """

    def __init__(
        self,
        tokenizer,
        sampling: Sampling,
        ids: list[int],
        pictures: list[Picture],
        tell: Callable[[str, object], None],
    ):
        super().__init__(tokenizer, sampling)
        self.ids, self.pictures, self.tell = ids, pictures, tell
        self.cancelled = threading.Event()


class Engine:
    """Answers requests together, each as it would be answered alone.

    Args:
        vlm: a `VisualRWKV`.
        slots: replies under way at most; further ones wait in the order in which they came.
        told: called in the engine's thread behind all calls of `tell` that a token of the batch gave rise to.
    """

    def __init__(self, vlm, slots: int = 32, told: Callable[[], None] = lambda: None):
        self.slots = slots
        self.recent = RecentPictures()
        self._model, self._tokenizer = vlm.model, vlm.processor.tokenizer
        self._told = told
        self._changed = threading.Condition()
        self._waiting: deque[ServedReply] = deque()
        self._decoder = Decoder(self._model)
        self._passed = 0  # tokens that those who could be read have let pass
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, reply: ServedReply) -> None:
        """Put a request behind those that wait."""
        with self._changed:
            if self._closed:
                raise ShuttingDown("the engine is closed")
            self._waiting.append(reply)
            self._changed.notify()

    @property
    def load(self) -> tuple[int, int]:
        """Replies under way, and requests that wait."""
        return len(self._decoder.replies), len(self._waiting)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop after the token at hand; unfinished replies end with an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    @torch.inference_mode()
    def _work(self):
        while True:
            with self._changed:
                while not (self._closed or self._waiting or self._decoder.replies):
                    self._changed.wait()
                closed = self._closed
            if closed:
                break
            try:
                self._read(self._next_to_read())
                texts = self._decoder.advance()
                self._tell(self._decoder.replies, texts)
            except Exception as error:  # out of memory, say: these replies are lost, the server is not
                self._fail(self._decoder.replies, error)
                self._decoder = Decoder(self._model)
        self._fail([*self._decoder.replies, *self._waiting], ShuttingDown("the server is shutting down"))

    def _next_to_read(self) -> list[ServedReply]:
        """Take requests off the queue, as many as there are slots and as may be read at once; or none yet."""
        under_way = len(self._decoder.replies)
        chosen: list[ServedReply] = []
        with self._changed:
            # also while no slot is free: clients that come and go must not fill the queue beyond its bound
            self._waiting = deque(reply for reply in self._waiting if not reply.cancelled.is_set())
            for reply in islice(self._waiting, self.slots - under_way):
                if chosen and _positions([*chosen, reply]) > PREFILL_POSITIONS:
                    break
                chosen.append(reply)
            if chosen and _positions(chosen) < WORTH_READING and self._passed < under_way // CROWD:
                self._passed += 1
                return []
            self._passed = 0
            for _ in chosen:
                self._waiting.popleft()
        return chosen

    def _read(self, replies: list[ServedReply]) -> None:
        """Let new replies join those under way."""
        if not replies:
            return
        try:
            inputs = self._tokenizer.pad({"input_ids": [reply.ids for reply in replies]}, return_tensors="pt")
            pictures = [picture for reply in replies for picture in reply.pictures]
            if pictures:
                inputs["image_features"] = torch.cat(self._encode(pictures))
            texts = self._decoder.read(replies, inputs)
        except Exception as error:
            self._fail(replies, error)
        else:
            self._tell(replies, texts)
        finally:
            for reply in replies:
                reply.pictures = []

    def _tell(self, replies: list[ServedReply], texts: list[str]) -> None:
        """Pass on what the last token made certain, and let go of what is complete."""
        for reply, text in zip(replies, texts, strict=True):
            if text or reply.finish:
                reply.tell(text, reply.finish)
        if replies:
            self._told()
        for reply in self._decoder.replies:
            if reply.cancelled.is_set() and not reply.finish:
                reply.close("cancelled")
        self._decoder.drop_complete()

    def _encode(self, pictures: list[Picture]) -> list[Tensor]:
        """Features (1, num_image_tokens, D) of each; one that comes more than once goes through the tower once."""
        features = {picture.digest: picture.features for picture in pictures}
        fresh = [digest for digest, known in features.items() if known is None]
        pixels = {picture.digest: picture.pixels for picture in pictures if picture.features is None}
        for start in range(0, len(fresh), PICTURES_AT_ONCE):
            group = fresh[start : start + PICTURES_AT_ONCE]
            values = torch.cat([pixels[digest] for digest in group]).to(self._model.device)
            for digest, one in zip(group, self._model.get_image_features(values).split(1), strict=True):
                features[digest] = one.clone()  # by itself, not as a part of the whole group's memory
                self.recent.put(digest, features[digest])
        return [features[picture.digest] for picture in pictures]

    def _fail(self, replies: list[ServedReply], error: Exception) -> None:
        for reply in replies:
            reply.tell("", error)
        self._told()


def _positions(replies: list[ServedReply]) -> int:
    """Padded positions of their prompts together."""
    return len(replies) * max(len(reply.ids) for reply in replies)
