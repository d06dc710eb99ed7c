"""From token ids to the text of a reply, at once or piece by piece.

Tokens are bytes, so one may end inside a character, and a reply ends at the first empty line, which may lie inside a
token or between two. `ReplyText` takes care of both and of stop strings; the blocking and the streaming way go through
it, hence agree. `Utf8Streamer` and `StopAtTurnEnd` bring the same to transformers' own `generate`.
"""

import codecs
import queue
from collections.abc import Iterable, Iterator
from functools import lru_cache

import torch
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from visualrwkv.prompt import TURN_END
from visualrwkv.tokenization import RWKVWorldTokenizer, Vocabulary


class ReplyText:
    """Turns ids into reply text: whole characters only, cut at the first empty line or stop string, stripped.

    A character that never gets complete is left out; bytes that are not UTF-8 and ids outside the vocabulary show as
    U+FFFD. The pieces of all `add` calls and of `close` joined are the reply, whatever the ids were grouped like: no
    text is given out that may turn out to be the beginning of a stop string.

    Args:
        tokenizer: the tokenizer of the model.
        stop: further strings that end the reply; the one that is complete first does.

    Attributes:
        finished: nothing more will come.
        end: what ended the reply, `TURN_END` or one of `stop`; None as long as none of them was found.
    """

    def __init__(self, tokenizer: RWKVWorldTokenizer, stop: Iterable[str] = ()):
        self._tokens = tokenizer.vocabulary.tokens
        self._special = {tokenizer.pad_token_id, tokenizer.image_token_id}
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ends = (TURN_END, *stop)
        self._held = ""  # white space that is only shown when something follows, and what may begin a stop string
        self._started = False
        self.finished = False
        self.end: str | None = None

    def add(self, ids: Iterable[int]) -> str:
        """Take the next ids and return the text that is now certain, often empty."""
        if self.finished:
            return ""
        data = b"".join(b"" if i in self._special else self._tokens.get(i, b"\xef\xbf\xbd") for i in map(int, ids))
        text = self._held + self._utf8.decode(data)
        # white space in front of the reply is no part of it, so a stop string does not match there
        begin = 0 if self._started else len(text) - len(text.lstrip())
        begins = {end: 0 if end == TURN_END else begin for end in self._ends}
        found = [(at + len(end), at, end) for end in self._ends if (at := text.find(end, begins[end])) >= 0]
        if found:
            _, start, self.end = min(found)
            self.finished = True
            return self._show(text[:start], "")
        certain = len(text) - max(_begun(text[begins[end] :], end) for end in self._ends)
        return self._show(text[:certain], text[certain:])

    def close(self) -> str:
        """No more ids follow: return what was held back as a possible stop string. White space at the end and half a
        character are no part of the reply."""
        if self.finished:
            return ""
        self.finished = True
        return self._show(self._held, "")

    def _show(self, text: str, doubtful: str) -> str:
        if not self._started:
            # line breaks are kept until it is clear that they are not the end of the reply
            text = text.lstrip() if text.strip() else text
            self._started = bool(text.strip())
        shown = text.rstrip()
        self._held = text[len(shown) :] + doubtful
        return shown

    @classmethod
    def whole(cls, tokenizer: RWKVWorldTokenizer, ids: Iterable[int], stop: Iterable[str] = ()) -> str:
        """The reply that all generated ids stand for."""
        reply = cls(tokenizer, stop)
        return reply.add(ids) + reply.close()


def _begun(text: str, end: str) -> int:
    """How many characters at the end of the text may be the beginning of `end`."""
    return next((n for n in range(min(len(text), len(end) - 1), 0, -1) if text.endswith(end[:n])), 0)


class Utf8Streamer(BaseStreamer):
    """Streamer for `generate(..., streamer=...)` of one sample: an iterator over pieces of the reply.

    `generate` runs in one thread and fills the streamer; iterating over it in another one yields the text and ends
    with the reply.

    Args:
        tokenizer: the tokenizer of the model.
        skip_prompt: the first `put` of `generate` holds the prompt; leave it out.
        timeout: seconds to wait for the next piece before `queue.Empty` is raised; None waits for ever.
        stop: strings that end the reply.
    """

    def __init__(
        self,
        tokenizer: RWKVWorldTokenizer,
        skip_prompt: bool = True,
        timeout: float | None = None,
        stop: Iterable[str] = (),
    ):
        self._decoder = ReplyText(tokenizer, stop)
        self._skip_next = skip_prompt
        self._timeout = timeout
        self._queue: queue.Queue[str | BaseException | None] = queue.Queue()

    def put(self, value: torch.Tensor) -> None:
        """Take ids of shape (n,) or (1, n)."""
        if value.ndim > 1 and value.shape[0] > 1:
            raise ValueError(f"only one sample can be streamed, got a batch of {value.shape[0]}")
        if self._skip_next:
            self._skip_next = False
            return
        self._give(self._decoder.add(value.flatten().tolist()))

    def end(self) -> None:
        """No more ids follow."""
        self._give(self._decoder.close())
        self._queue.put(None)

    def _give(self, text: str) -> None:
        if text:
            self._queue.put(text)

    def fail(self, error: BaseException) -> None:
        """Let the reader raise an error that stopped the generation."""
        self._queue.put(error)

    def __iter__(self) -> Iterator[str]:
        while (piece := self._queue.get(timeout=self._timeout)) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece


@lru_cache(maxsize=4)
def _line_breaks(vocabulary: Vocabulary) -> torch.Tensor:
    """For every id: holds an empty line, ends with a line break, begins with one; bool (3, n), the last id is free."""
    rows = torch.zeros(vocabulary.max_id + 2, 3, dtype=torch.bool)
    found = {index: token for index, token in vocabulary.tokens.items() if b"\n" in token}
    flags = [(b"\n\n" in token, token.endswith(b"\n"), token.startswith(b"\n")) for token in found.values()]
    rows[list(found)] = torch.tensor(flags)
    return rows.T.contiguous()


def turn_end_ids(tokenizer: RWKVWorldTokenizer) -> list[int]:
    """Ids that end a reply by themselves, for `eos_token_id` of transformers: end of text, and every token that holds
    an empty line. One that is made of two tokens is seen by `StopAtTurnEnd` alone."""
    end, tokens = TURN_END.encode(), tokenizer.vocabulary.tokens
    return [tokenizer.eos_token_id, *(index for index, token in tokens.items() if end in token)]


class StopAtTurnEnd(StoppingCriteria):
    """Stops each row as soon as its generated text holds an empty line.

    The end of a turn is usually token 261, but an empty line also arises from longer white space tokens, and from two
    tokens of which one ends and the next begins with a line break, such as "。\\n" and "\\n".

    Args:
        tokenizer: the tokenizer of the model.
        prompt_length: number of ids in front of the generated ones (0 when generating from `inputs_embeds`).
    """

    def __init__(self, tokenizer: RWKVWorldTokenizer, prompt_length: int):
        self._prompt_length = prompt_length
        self._table = _line_breaks(tokenizer.vocabulary)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """Take ids (B, T) and return which rows are complete, bool (B,)."""
        if self._table.device != input_ids.device:
            self._table = self._table.to(input_ids.device)
        holds, ends, begins = self._table
        fresh = input_ids[:, self._prompt_length :][:, -2:].clamp(max=holds.shape[0] - 1)  # the older ones were seen
        if fresh.shape[1] == 0:
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        done = holds[fresh[:, -1]]
        if fresh.shape[1] == 2:
            done = done | (ends[fresh[:, 0]] & begins[fresh[:, 1]])
        return done
