"""Writing replies: choose a token, read it, choose the next. The one loop of `ask`, streams, conversations, evaluation
and the server.

A `Decoder` moves all replies under way by one token at a time. Each has a row of the state, whose size is fixed, so a
reply joins behind its prompt and leaves at any token. None depends on its neighbours: each has a `TokenChoice` and a
`ReplyText` of its own. Callers pull: nothing is computed before somebody asks for the next token.
"""

import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from visualrwkv.errors import InputError
from visualrwkv.sampling import Sampling, TokenChoice
from visualrwkv.state import RWKVState
from visualrwkv.streaming import ReplyText
from visualrwkv.tokenization import RWKVWorldTokenizer

# every choice among such scores would be a made-up one
NO_NUMBERS = (
    "the model computes no numbers (NaN): its weights are damaged, or too large for the dtype; "
    "load it with dtype float32, or from another file"
)


class Reply:
    """One reply, from its first token to its last.

    Args:
        tokenizer: the tokenizer of the model.
        sampling: how to choose, and where to end.

    Attributes:
        tokens: ids written so far.
        finish: None while the reply is under way; then "stop" (the model ended its turn, or wrote a stop string),
            "length" (`max_new_tokens` cut it), what `close` was called with, or the InputError that ended it.
        first_token_at: `time.perf_counter()` when the first token was chosen.
    """

    def __init__(self, tokenizer: RWKVWorldTokenizer, sampling: Sampling):
        self.tokens: list[int] = []
        self.finish: str | InputError | None = None
        self.first_token_at: float | None = None
        self._sampling, self._last_id = sampling, tokenizer.eos_token_id
        self._decoder, self._pieces = ReplyText(tokenizer, sampling.stop), []
        self._choice: TokenChoice | None = None

    @property
    def text(self) -> str:
        """What is certain so far; with `finish` it is the whole reply."""
        return "".join(self._pieces)

    @property
    def end(self) -> str | None:
        """The string that ended the reply: an empty line or a stop string."""
        return self._decoder.end

    @property
    def plain(self) -> bool:
        """Whether each token is the likeliest one, so that nothing is asked of `choose`."""
        return self._sampling.plain

    def choose(self, scores: Tensor) -> Tensor:
        """The next token for scores (V,), a tensor of no dimension."""
        if self._choice is None:
            self._choice = TokenChoice(self._sampling, scores.device)
        return self._choice(scores)

    def take(self, token: int) -> str:
        """Take the next token; returns the text that it makes certain, often empty."""
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        self.tokens.append(token)
        text = self._decoder.add([token])
        self._pieces.append(text)
        if self._decoder.finished or token == self._last_id:
            text += self.close("stop")
        elif len(self.tokens) >= self._sampling.max_new_tokens:
            text += self.close("length")
        return text

    def check(self) -> None:
        """Raises InputError if an error ended the reply."""
        if isinstance(self.finish, InputError):
            raise self.finish

    def close(self, finish: str | InputError) -> str:
        """No further token follows; returns the text that was held back as the possible beginning of a stop string."""
        self.finish = finish
        text = self._decoder.close()
        self._pieces.append(text)
        return text


class Decoder:
    """The replies that a model has under way.

    Complete replies leave before the next token; until then `state` holds theirs too.

    Args:
        model: a `VisualRWKVForConditionalGeneration` in evaluation mode.

    Attributes:
        replies: those under way, one for each row of `state`.
        state: `RWKVState`; it has read the prompts and all tokens but the last of each reply. None without replies.
    """

    def __init__(self, model):
        self.replies: list[Reply] = []
        self.state: RWKVState | None = None
        self._model = model

    @torch.no_grad()
    def read(self, replies: Sequence[Reply], inputs: Mapping[str, Tensor], state: RWKVState | None = None) -> list[str]:
        """Let replies join: read their prompts and choose their first tokens.

        Args:
            replies: without a token yet.
            inputs: their prompts, padded on the left, as `VisualRWKVProcessor.prepare` makes them or with
                `image_features` in place of the pixels; on any device.
            state: what the prompts go on from; it is moved.

        Returns:
            For each of them the text that is certain.

        Errors leave the other replies as they are.
        """
        inputs = {name: value.to(self._model.device) for name, value in inputs.items()}
        output = self._model(**inputs, cache=state, logits_to_keep=1)
        texts = self._choose(replies, output.logits[:, -1])
        self.drop_complete()
        self.state = RWKVState.concatenate([self.state, output.cache]) if self.replies else output.cache
        self.replies = [*self.replies, *replies]
        return texts

    @torch.no_grad()
    def advance(self) -> list[str]:
        """Move all replies by one token; returns the text that it makes certain, for each of `replies`."""
        self.drop_complete()
        if not self.replies:
            return []
        last = torch.tensor([reply.tokens[-1:] for reply in self.replies], device=self._model.device)
        # embedded here, since the model would look for pictures among ids, and to find none it waits for a GPU
        embeds = self._model.get_input_embeddings()(last)
        output = self._model(inputs_embeds=embeds, cache=self.state, logits_to_keep=1)
        self.state = output.cache
        return self._choose(self.replies, output.logits[:, -1])

    def drop_complete(self) -> None:
        """Let the replies with a `finish` leave."""
        rows = [row for row, reply in enumerate(self.replies) if not reply.finish]
        if len(rows) < len(self.replies):
            self.replies = [self.replies[row] for row in rows]
            with torch.no_grad():
                self.state = self.state.select(rows) if rows else None

    def stream(self, reply: Reply, inputs: Mapping[str, Tensor], state: RWKVState | None = None) -> Iterator[str]:
        """Write one reply by itself: its text, as soon as it is certain. Arguments as for `read`.

        Raises:
            InputError: the model's scores are no numbers.
        """
        (text,) = self.read([reply], inputs, state)
        yield from self.rest(reply, text)

    def rest(self, reply: Reply, text: str) -> Iterator[str]:
        """What `stream` gives, of the one reply that was just read and of whose text `text` is certain."""
        while True:
            reply.check()
            if text:
                yield text
            if reply.finish:
                return
            (text,) = self.advance()

    def _choose(self, replies: Sequence[Reply], scores: Tensor) -> list[str]:
        """Choose the next tokens of some replies for scores (replies, V). Scores that are no numbers end their reply
        alone."""
        scores[:, self._model.config.image_token_id] = -torch.inf  # a place for a picture is no answer
        highest, likeliest = scores.max(-1)  # not a number if any score of the row is none
        for row, reply in enumerate(replies):
            if not reply.plain:
                likeliest[row] = reply.choose(scores[row])
        tokens, broken = torch.stack([likeliest, highest.isnan()]).tolist()  # the one wait for a GPU in a token
        return [
            reply.close(InputError(NO_NUMBERS)) if is_broken else reply.take(token)
            for reply, token, is_broken in zip(replies, tokens, broken, strict=True)
        ]
