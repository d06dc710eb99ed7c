"""A conversation whose memory is one state of fixed size.

A turn reads only its own words: what was said before is in the state. All that a conversation is at one point is a
`Moment`, which nobody changes; so to fork, to undo and to save are to keep or copy one. Saved files and their checks
are in `saved_chat.py`.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from visualrwkv.decoding import Decoder, Reply
from visualrwkv.errors import InputError
from visualrwkv.image_processing import open_pictures
from visualrwkv.prompt import TURN_END, Turn, check_question
from visualrwkv.sampling import Sampling
from visualrwkv.saved_chat import Moment, read_chat, write_chat
from visualrwkv.state import RWKVState
from visualrwkv.tokenization import Vocabulary

UNDO_LIMIT = 4  # turns that can be taken back: so many earlier states are kept


@dataclass(frozen=True)
class ReplyStats:
    """Numbers of one reply.

    Args:
        prompt_tokens: positions read for this turn, image positions and the unread end of the last reply included.
        reply_tokens: tokens the model wrote, the end of the turn included.
        first_token_s: seconds from the call to the first token; encoding the pictures is part of it.
        total_s: seconds of work on the turn; the time that the reader of a stream takes between two pieces is none.
        finish: "stop" (the model ended its turn, or wrote a stop string), "length" (`max_new_tokens` cut it) or
            "cancelled" (the reader of a stream left).
    """

    prompt_tokens: int
    reply_tokens: int
    first_token_s: float
    total_s: float
    finish: str


class ChatSession:
    """A conversation; `vlm.chat()` starts one, `vlm.chat.load(path)` continues a saved one.

    Its memory does not grow with the talk, but for the words of the transcript: there are the state, up to
    `UNDO_LIMIT` earlier states, during a reply one more, and for each of these the features of the pictures that were
    passed last.
    One turn at a time: while a stream is being read, another turn, `undo`, `reset` and `save` are refused.

    Attributes:
        stats: `ReplyStats` of the latest reply, None before the first.
    """

    def __init__(self, vlm):
        self._vlm = vlm
        self._busy = threading.Lock()
        self._now = Moment()
        self._past: deque[Moment] = deque(maxlen=UNDO_LIMIT)
        self._under_way: _TurnUnderWay | None = None
        self.stats: ReplyStats | None = None

    @property
    def transcript(self) -> list[dict]:
        """The turns so far as {"role": "user" | "assistant", "text", "images": number of pictures shown}."""
        return [asdict(turn) for turn in self._now.turns]

    @property
    def prompt(self) -> str:
        """Where pictures stand in a turn, "sandwich", "first" or "last": as the processor of the model says when the
        conversation begins. It goes on that way, also where it was saved and the model now says otherwise."""
        return self._now.prompt or self._vlm.processor.prompt

    @property
    def nbytes(self) -> int:
        """Bytes of the state; 0 before the first turn, then always the same."""
        return self._state.nbytes if self._state else 0

    @property
    def tokens_read(self) -> int:
        """Positions that the state has seen: words of both speakers and image positions; it grows with a stream."""
        return self._state.seen if self._state else 0

    @property
    def _state(self) -> RWKVState | None:
        """The state, of a turn under way as far as it has come."""
        turn = self._under_way
        return turn.state if turn and turn.state else self._now.state

    def say(self, text: str, images: Any = None, look_again: bool = False, **sampling) -> str:
        """Say something, with or without pictures, and return the reply.

        Args:
            text: what the user says.
            images: a picture or a list of pictures, shown in this turn.
            look_again: show the pictures once more that came with the latest turn that passed any, before those of
                `images`; the encoder does not run again. In a sandwich they stand between two copies of `text`, so the
                model reads them knowing what is asked now. Otherwise a turn goes on from what the state remembers.
            sampling: fields of `Sampling`.

        Raises:
            InputError: as for `VisualRWKV.ask`, or there is no picture to look at again; the conversation is then as
                before, as it is after Ctrl-C.
        """
        asked, options = self._check(text, images, look_again), Sampling.of(sampling)
        with self._alone():
            turn = self._under_way = _TurnUnderWay(self._vlm, self._now, self.prompt, *asked, options)
            for _ in turn.pieces():
                pass
            return self._commit(turn)

    def stream(self, text: str, images: Any = None, look_again: bool = False, **sampling) -> Iterator[str]:
        """Like `say`, piece by piece. Leaving early, or Ctrl-C behind the first token, keeps what was said until then
        as the reply."""
        asked, options = self._check(text, images, look_again), Sampling.of(sampling)
        return self._stream(asked, options)

    def _stream(self, asked, options):
        with self._alone():
            *_, look_again = asked
            self._check_look(look_again)  # once more: the conversation may have changed before the first piece
            turn = self._under_way = _TurnUnderWay(self._vlm, self._now, self.prompt, *asked, options)
            try:
                yield from turn.pieces()
            except GeneratorExit:
                self._commit(turn)
                raise
            except KeyboardInterrupt:
                if turn.begun:
                    self._commit(turn, state_is_certain=False)
                raise
            self._commit(turn)

    def fork(self) -> "ChatSession":
        """A second conversation with the same past; neither hears what the other says from here on."""
        other = ChatSession(self._vlm)
        other._now, other._past, other.stats = self._now, self._past.copy(), self.stats
        return other

    def __copy__(self) -> "ChatSession":
        return self.fork()

    def __deepcopy__(self, memo) -> "ChatSession":
        """A fork: the model is not copied."""
        return self.fork()

    def undo(self) -> dict:
        """Take back the last turn and its reply; the state is exactly what it was before.

        The last `UNDO_LIMIT` turns can be taken back, none of those before a `load`.

        Returns:
            The user's turn as in `transcript`, without its pictures themselves.
        Raises:
            InputError: there is nothing to take back.
        """
        with self._alone():
            if not self._past:
                kept = f"only the last {UNDO_LIMIT}, and none from before a load, are kept; use reset to start anew"
                raise InputError(f"no turn to take back: {kept if self._now.turns else 'nothing was said yet'}")
            said = self._now.turns[-2]
            self._now, self.stats = self._past.pop(), None
            return asdict(said)

    def reset(self) -> None:
        """Forget everything."""
        with self._alone():
            self._now, self.stats = Moment(), None
            self._past.clear()

    def save(self, path: str | os.PathLike) -> None:
        """Write the conversation to one safetensors file: the state, the transcript, the features of the pictures
        passed last, and which model it belongs to. A file that was there is replaced once the new one is complete.

        Raises:
            InputError: the file cannot be written.
        """
        with self._alone():
            write_chat(path, self._now, self._vlm.fingerprint())

    @classmethod
    def load(cls, path: str | os.PathLike, vlm) -> "ChatSession":
        """What `vlm.chat.load(path)` does."""
        session = cls(vlm)
        session._now = read_chat(path, vlm.model.config, vlm.processor.tokenizer, vlm.fingerprint).to(vlm.model.device)
        return session

    @contextmanager
    def _alone(self):
        if not self._busy.acquire(blocking=False):
            raise InputError("a reply of this conversation is still being written; read it to its end, or close it")
        try:
            yield
        finally:
            self._under_way = None
            self._busy.release()

    def _check(self, text, images, look_again):
        self._check_look(look_again)
        pictures = open_pictures(images, self._vlm.processor.image_processor.max_pixels)
        return check_question(text), pictures, bool(look_again)

    def _check_look(self, look_again):
        if look_again and self._now.features is None:
            raise InputError("there is no picture to look at again; pass images in this turn")

    def _commit(self, turn, state_is_certain=True):
        """Take over what the reply led to; returns the reply."""
        now, self.stats = turn.outcome(state_is_certain)
        self._past.append(self._now)
        self._now = now
        return turn.reply.text


class _TurnUnderWay:
    """One turn from the user's words to the moment behind the reply; the moment before it stays as it is."""

    def __init__(
        self, vlm, before: Moment, prompt: str, text: str, pictures: list, look_again: bool, sampling: Sampling
    ):
        self._started = time.perf_counter()
        self._vlm, self._before, self._prompt = vlm, before, prompt
        fresh = None
        if pictures:
            pixels = vlm.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                fresh = vlm.model.get_image_features(pixels.to(vlm.model.device))
        shown = [features for features in (before.features if look_again else None, fresh) if features is not None]
        self._kept = before.features if fresh is None else fresh
        self._turn = Turn("user", text, images=sum(map(len, shown)))
        # the unread end of the last reply, then this turn alone
        turns = [*before.turns, self._turn]
        ids, _ = vlm.processor.encode_turns(turns, open_reply=True, start=len(before.turns), position=prompt)
        self._inputs = {"input_ids": torch.tensor([[*before.unread, *ids]])}
        if shown:
            self._inputs["image_features"] = torch.cat(shown)  # (n, num_image_tokens, D)
        self._decoder, self.reply = Decoder(vlm.model), Reply(vlm.processor.tokenizer, sampling)
        self._behind_prompt: RWKVState | None = None
        self._seconds = time.perf_counter() - self._started  # of work

    @property
    def state(self) -> RWKVState | None:
        """None until the prompt was read."""
        return self._decoder.state

    @property
    def begun(self) -> bool:
        """Whether the prompt was read and the first token chosen."""
        return self._behind_prompt is not None

    def pieces(self) -> Iterator[str]:
        """Let the model reply, piece by piece."""
        pieces = self._pieces()
        while True:
            resumed = time.perf_counter()
            try:
                piece = next(pieces, None)
            finally:
                self._seconds += time.perf_counter() - resumed
            if piece is None:
                return
            yield piece

    def outcome(self, state_is_certain: bool) -> tuple[Moment, ReplyStats]:
        """The moment behind the reply and the reply's numbers; a reply that is not complete ends here.

        Args:
            state_is_certain: False if the state may or may not have read the last token but one.
        """
        reply, tokenizer = self.reply, self._vlm.processor.tokenizer
        if reply.finish is None:
            reply.close("cancelled")
        state, unread = self._decoder.state, unread_end(tokenizer.vocabulary, reply.tokens)
        if reply.end not in (None, TURN_END) or not state_is_certain:
            # what the state has read beyond the reply, such as a stop string, is no part of the talk: go back to the
            # prompt, and let the next turn read the reply
            state = self._behind_prompt
            unread = tokenizer.encode_text((f" {reply.text}" if reply.text else "") + TURN_END)
        stats = ReplyStats(
            prompt_tokens=self._inputs["input_ids"].shape[1],
            reply_tokens=len(reply.tokens),
            first_token_s=reply.first_token_at - self._started,
            total_s=self._seconds,
            finish=reply.finish,
        )
        turns = (*self._before.turns, self._turn, Turn("assistant", reply.text))
        return Moment(turns, state, tuple(unread), self._kept, self._prompt), stats

    def _pieces(self):
        before = self._before.state.clone() if self._before.state else None  # which is moved
        (text,) = self._decoder.read([self.reply], self._inputs, before)
        self._behind_prompt = self._decoder.state.clone()
        yield from self._decoder.rest(self.reply, text)


def unread_end(vocabulary: Vocabulary, reply: list[int]) -> list[int]:
    """What the next turn has to read first, so that the reply stands in the state closed by exactly one turn end.

    The state has read all tokens of the reply but the last. That one may be the turn end, hold its second half or
    something behind it, be the end-of-text token (0), or be any token if the reply was cut.
    """
    *read, last = [vocabulary.tokens.get(index, b"") for index in reply]
    tail = b"".join(read[-1:])[-1:]  # an empty line may begin with the last byte that was read
    end = TURN_END.encode()
    at = (tail + last).find(end)
    if at < 0:
        return ([reply[-1]] if last else []) + vocabulary.encode(end)
    kept = (tail + last)[len(tail) : at + len(end)]
    return vocabulary.encode(kept)
