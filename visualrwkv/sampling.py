"""How the tokens of a reply are chosen.

The choice of every reply is its own `TokenChoice` with random numbers of its own. A seeded reply is therefore the same
alone, in a batch, streamed, beside other threads and from the server.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

from visualrwkv.errors import InputError, short


@dataclass(frozen=True)
class Sampling:
    """How a reply is chosen, and where it ends.

    Args:
        max_new_tokens: at most so many tokens.
        temperature: 0 takes the likeliest token each time; higher values sample more freely.
        top_p: sample among the likeliest tokens that together have this probability.
        top_k: sample among so many of the likeliest tokens; 0 for all.
        seed: a whole number from 0 makes sampling repeatable; without one torch's global random numbers are followed.
        presence_penalty: taken off the score of every token that the reply already holds.
        frequency_penalty: taken off the score of a token once for each time that the reply holds it.
        penalty_decay: what is counted for `frequency_penalty` fades by this factor with each further token.
        stop: a string or several; the reply ends before the one that is complete first, which is no part of it.

    Raises:
        InputError: a value out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_decay: float = 0.996
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        self._whole("max_new_tokens", 1)
        self._number("temperature", 0, 100, "use 0 (always the likeliest token) up to 100")
        self._number("top_p", 0, 1, "use a number above 0 and up to 1")
        if self.top_p == 0:
            raise InputError("top_p is 0; use a number above 0 and up to 1")
        self._whole("top_k", 0)
        if self.seed is not None:
            self._whole("seed", 0)
        for name in ("presence_penalty", "frequency_penalty"):
            self._number(name, -2, 2, "use a number from -2 to 2; 0 is no penalty")
        self._number("penalty_decay", 0, 1, "use a number from 0 to 1; 1 never fades")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (tuple, list)) or not all(isinstance(text, str) and text for text in stop):
            raise InputError(f"stop is {short(self.stop)}; use a string or a list of strings that are not empty")
        object.__setattr__(self, "stop", tuple(stop))

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, Integral) or not least <= value < 2**63:
            raise InputError(f"{name} is {short(value)}; use a whole number from {least} (and below 2**63)")
        object.__setattr__(self, name, int(value))

    def _number(self, name: str, least: float, most: float, remedy: str) -> None:
        value = getattr(self, name)
        # a comparison with NaN is false
        if isinstance(value, bool) or not isinstance(value, Real) or not least <= value <= most:
            raise InputError(f"{name} is {short(value)}; {remedy}")
        object.__setattr__(self, name, float(value))

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Sampling":
        """From keyword arguments; InputError for unknown names."""
        unknown = sorted(set(options) - set(cls.__dataclass_fields__))
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise InputError(f"unknown option {', '.join(unknown)}; these are known: {known}")
        return cls(**options)

    @property
    def plain(self) -> bool:
        """Whether each token is the likeliest one, so that no `TokenChoice` is needed."""
        return not (self.temperature or self.presence_penalty or self.frequency_penalty)


class TokenChoice:
    """Chooses the tokens of one reply, one after the other.

    Args:
        sampling: a `Sampling`.
        device: where the scores are.
    """

    def __init__(self, sampling: Sampling, device: torch.device | str = "cpu"):
        self._sampling = sampling
        self._penalised = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self._present = self._counts = None  # (V,) for each token: is in the reply, how often (faded)
        self._generator = None
        self._narrow = []
        if sampling.temperature:
            seed = int(torch.randint(2**63 - 1, ())) if sampling.seed is None else sampling.seed
            self._generator = torch.Generator(device).manual_seed(seed)
            if sampling.top_k:
                self._narrow.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._narrow.append(TopPLogitsWarper(float(sampling.top_p)))

    def __call__(self, scores: Tensor) -> Tensor:
        """Take the scores (V,) of the next token, -inf for what is forbidden, and return its id, a tensor of no
        dimension."""
        scores = scores.float()
        if self._penalised:
            if self._counts is None:
                self._present, self._counts = torch.zeros_like(scores), torch.zeros_like(scores)
            penalties = self._sampling.presence_penalty * self._present
            scores = scores - penalties - self._sampling.frequency_penalty * self._counts
        if self._generator is None:
            token = scores.argmax()
        else:
            # measured from the best one, the scores cannot overflow
            scores = ((scores - scores.max()) / max(self._sampling.temperature, 1e-6))[None]
            for narrow in self._narrow:
                scores = narrow(None, scores)
            # What torch.multinomial does, without its check: scores that are no numbers would end a GPU's context.
            shares = scores.softmax(-1)
            token = (shares / torch.empty_like(shares).exponential_(generator=self._generator)).argmax()
        if self._penalised:
            self._counts *= self._sampling.penalty_decay
            place = token[None]  # with an index of no dimension the host would wait for a GPU
            self._counts[place] += 1
            self._present.index_fill_(0, place, 1)
        return token
