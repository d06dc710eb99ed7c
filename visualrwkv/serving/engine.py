"""Continuous batching: one thread owns the model and moves all replies under way by one token at a time.

The state of a sequence has a fixed size, so a reply joins the batch behind its prompt and leaves it at any token: a
row more or less in every tensor of `RWKVState`. No reply depends on its neighbours: each has its own `TokenChoice` and
`ReplyText`.

1. Waiting requests are read together; how many is bounded, so that the others do not wait long.
2. Their states join the running batch.
3. All rows advance by one token; those that are complete, or that nobody waits for any more, leave.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from visualrwkv.sampling import Sampling, TokenChoice, check_scores
from visualrwkv.serving.pictures import Picture, RecentPictures
from visualrwkv.state import RWKVState
from visualrwkv.streaming import ReplyText

PREFILL_POSITIONS = 4096  # padded positions that are read between two tokens of the others, if one prompt is not longer
PICTURES_AT_ONCE = 16  # through the vision tower


@dataclass(eq=False)
class Reply:
    """One request on its way through the engine.

    Args:
        ids: of the prompt.
        pictures: in the order of their places in the prompt.
        sampling: how to choose.
        tell: called in the engine's thread with (text that is certain now, finish). `finish` is None while more
            follows, then "stop", "length", or the exception that ended the reply.
        cancelled: set it, and the reply leaves the batch at the next token without a further call of `tell`.
    """

    ids: list[int]
    pictures: list[Picture]
    sampling: Sampling
    tell: Callable[[str, object], None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    count: int = 0  # tokens written

    def begin(self, tokenizer, device):
        self._end = tokenizer.eos_token_id
        self._text = ReplyText(tokenizer, self.sampling.stop)
        self._choice = None if self.sampling.plain else TokenChoice(self.sampling, device)

    def choose(self, scores: Tensor, likeliest: int) -> int:
        """The next token for scores (V,)."""
        return likeliest if self._choice is None else int(self._choice(scores))

    def take(self, token: int) -> bool:
        """Tell the text that the token makes certain; returns whether more is to come."""
        self.count += 1
        text, finish = self._text.add([token]), None
        if self._text.finished or token == self._end:
            finish = "stop"
        elif self.count >= self.sampling.max_new_tokens:
            finish = "length"
        if finish:
            text += self._text.close()
        if text or finish:
            self.tell(text, finish)
        return finish is None


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
        self._waiting: deque[Reply] = deque()
        self._running: list[Reply] = []  # rows of `_state`
        self._state: RWKVState | None = None
        self._last: list[int] = []  # the token of each row that the state has not read
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, reply: Reply) -> None:
        """Put a request behind those that wait."""
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._waiting.append(reply)
            self._changed.notify()

    @property
    def load(self) -> tuple[int, int]:
        """Replies under way, and requests that wait."""
        return len(self._running), len(self._waiting)

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
                while not (self._closed or self._waiting or self._running):
                    self._changed.wait()
                closed = self._closed
            if closed:
                break
            try:
                self._drop_cancelled()
                self._read(self._next_to_read())
                self._advance()
            except Exception as error:  # out of memory, say: these replies are lost, the server is not
                self._fail(self._running, error)
                self._running, self._last, self._state = [], [], None
                self._told()
        self._fail([*self._running, *self._waiting], RuntimeError("the server is shutting down"))
        self._told()

    def _next_to_read(self) -> list[Reply]:
        """Take requests off the queue, as many as there are slots and as may be read at once."""
        chosen: list[Reply] = []
        with self._changed:
            while self._waiting and len(self._running) + len(chosen) < self.slots:
                if self._waiting[0].cancelled.is_set():
                    self._waiting.popleft()
                    continue
                longest = max(len(reply.ids) for reply in (*chosen, self._waiting[0]))
                if chosen and longest * (len(chosen) + 1) > PREFILL_POSITIONS:
                    break
                chosen.append(self._waiting.popleft())
        return chosen

    def _read(self, replies: list[Reply]) -> None:
        """Let new requests join: read their prompts, choose their first tokens."""
        if not replies:
            return
        try:
            for reply in replies:
                reply.begin(self._tokenizer, self._model.device)
            inputs = self._tokenizer.pad({"input_ids": [reply.ids for reply in replies]}, return_tensors="pt")
            inputs = {name: value.to(self._model.device) for name, value in inputs.items()}
            pictures = [picture for reply in replies for picture in reply.pictures]
            if pictures:
                inputs["image_features"] = torch.cat(self._encode(pictures))
            output = self._model(**inputs, logits_to_keep=1)
            check_scores(output.logits)
        except Exception as error:
            self._fail(replies, error)
            self._told()
            return
        finally:
            for reply in replies:
                reply.pictures = []
        joined = [output.cache] if self._state is None else [self._state, output.cache]
        old = self._last
        self._running = [*self._running, *replies]
        self._state, self._last = RWKVState.concatenate(joined), [*old, *([0] * len(replies))]
        self._choose(output.logits[:, -1], first=len(old))

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

    def _advance(self) -> None:
        """All replies under way: one token further."""
        if self._running:
            tokens = torch.tensor(self._last, device=self._model.device)[:, None]
            output = self._model(input_ids=tokens, cache=self._state, logits_to_keep=1)
            self._state = output.cache
            self._choose(output.logits[:, -1])

    def _choose(self, scores: Tensor, first: int = 0) -> None:
        """Choose the next tokens of the rows from `first` on, for scores (rows, V); let complete ones leave."""
        scores[:, self._model.config.image_token_id] = -torch.inf  # a place for a picture is no answer
        stay = [True] * first
        likeliest = scores.argmax(-1).tolist()
        for row, reply in enumerate(self._running[first:]):
            token = reply.choose(scores[row], likeliest[row])
            self._last[first + row] = token
            stay.append(reply.take(token))
        self._told()
        self._keep(stay)

    def _drop_cancelled(self) -> None:
        self._keep([not reply.cancelled.is_set() for reply in self._running])

    def _keep(self, stay: list[bool]) -> None:
        if all(stay):
            return
        rows = [row for row, wanted in enumerate(stay) if wanted]
        self._state = self._state.select(rows) if rows else None
        self._last = [self._last[row] for row in rows]
        self._running = [self._running[row] for row in rows]

    @staticmethod
    def _fail(replies: list[Reply], error: Exception) -> None:
        for reply in replies:
            reply.tell("", error)
