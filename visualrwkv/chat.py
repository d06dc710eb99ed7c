"""Asking about pictures: one question, a batch, a stream of words, a conversation that keeps its state.

Everything goes through the model's own `generate` and the one prompt builder. This file adds what a user should not
have to think about: opening pictures, stopping at the end of a reply, and what the state has and has not read yet.
"""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers.generation import GenerationConfig, StoppingCriteria

from visualrwkv.errors import InputError
from visualrwkv.image_processing import load_image
from visualrwkv.prompt import TURN_END, Turn, check_question
from visualrwkv.state import RWKVState
from visualrwkv.streaming import ReplyText, StopAtTurnEnd, Utf8Streamer
from visualrwkv.tokenization import Vocabulary

CHAT_FORMAT = "visualrwkv-chat-1"


@dataclass(frozen=True)
class Sampling:
    """How a reply is chosen.

    Args:
        max_new_tokens: at most so many tokens.
        temperature: 0 takes the likeliest token each time; higher values sample more freely.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: makes sampling repeatable and leaves torch's global random state alone.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        if isinstance(self.max_new_tokens, bool) or not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens!r}; use a whole number from 1")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature!r}; use 0 (always the likeliest token) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p!r}; use a number above 0 and up to 1")

    def config(self, image_token_id: int) -> GenerationConfig:
        """The same for transformers' generate, which may never write the picture placeholder."""
        choice = {"do_sample": False}
        if self.temperature:
            choice = {"do_sample": True, "temperature": float(self.temperature), "top_p": float(self.top_p), "top_k": 0}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            pad_token_id=0,
            eos_token_id=0,
            suppress_tokens=[image_token_id],
            return_dict_in_generate=True,
            **choice,
        )

    @contextmanager
    def randomness(self, device):
        """Random numbers follow `seed` inside."""
        if self.seed is None or not self.temperature:
            yield
            return
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            yield


class VisualRWKV:
    """A model and its processor, ready to be asked. `visualrwkv.load()` makes one.

    Args:
        model: a VisualRWKVForConditionalGeneration; it is put into evaluation mode.
        processor: its VisualRWKVProcessor.
    """

    def __init__(self, model, processor):
        self.model = model.eval()
        self.processor = processor

    @property
    def chat(self) -> "ChatStarter":
        """`vlm.chat()` starts a conversation, `vlm.chat.load(file)` continues a saved one."""
        return ChatStarter(self)

    def ask(self, image, question: str | list[str], **sampling) -> str | list[str]:
        """Answer one question or a batch of them; a batch gives what the questions give one by one.

        Args:
            image: PIL image, path, bytes or numpy array; a list of them; None for a question without a picture.
                With one question a list holds the pictures of that question. With a list of questions it holds one
                entry for each: a picture, a list of pictures, or None. A single picture serves all questions.
            question: a string or a list of strings.
            sampling: fields of `Sampling`.

        Returns:
            The answer, or the list of answers.

        Raises:
            InputError: an unusable picture, question or option, or lists of different lengths.
        """
        single = isinstance(question, str)
        questions = [question] if single else list(question)
        if not questions:
            return []
        if single:
            pictures = [image]
        elif isinstance(image, (list, tuple)):
            pictures = list(image)
        else:
            pictures = [image] * len(questions)
        if len(pictures) != len(questions):
            raise InputError(f"{len(pictures)} pictures for {len(questions)} questions; pass one for each")
        inputs = self._prepare(pictures, questions)
        output = self.generate(inputs, Sampling(**_known(sampling)))
        replies = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        answers = [ReplyText.whole(self.processor.tokenizer, reply) for reply in replies]
        return answers[0] if single else answers

    def stream(self, image, question: str, **sampling) -> Iterator[str]:
        """Answer one question piece by piece; the pieces joined are what `ask` returns.

        Args and errors as for `ask` with one question. Wrong arguments are reported here, not at the first piece.
        """
        if not isinstance(question, str):
            raise InputError("stream answers one question at a time; use ask for a list")
        job = _Job(self, self._prepare([image], [question]), Sampling(**_known(sampling)))
        return job.pieces()

    def generate(self, inputs, sampling, state=None, streamer=None, stop=None):
        """One call of the model's `generate`.

        Args:
            inputs: what the processor made, on any device.
            sampling: a `Sampling`.
            state: `RWKVState` to continue from; it is moved forward.
            streamer: receives the tokens as they come.
            stop: further stopping criterion.

        Returns:
            transformers' output with `sequences` (prompt and reply) and `cache`, which has not read the
            last token of the reply.
        """
        device = self.model.device
        inputs = {name: value.to(device) for name, value in inputs.items()}
        criteria = [StopAtTurnEnd(self.processor.tokenizer, inputs["input_ids"].shape[1])]
        with sampling.randomness(device):
            return self.model.generate(
                **inputs,
                cache=state,
                generation_config=sampling.config(self.model.config.image_token_id),
                stopping_criteria=criteria + ([stop] if stop else []),
                streamer=streamer,
            )

    def fingerprint(self) -> str:
        """Hash of the architecture and of up to 64 values of every tensor: tells two models apart, at any dtype."""
        config = self.model.config
        digest = sha256(f"{config.scan} {config.grid_size} {config.image_token_id}".encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            flat = tensor.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.bfloat16).contiguous()
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.view(torch.int16).numpy().tobytes())
        return digest.hexdigest()

    def _prepare(self, pictures, questions):
        groups = [open_pictures(entry) for entry in pictures]
        turns = [
            [Turn("user", check_question(text), images=len(group))]
            for text, group in zip(questions, groups, strict=True)
        ]
        return self.processor.prepare(images=groups, turns=turns, open_reply=True)


class ChatStarter:
    """What `vlm.chat` is: call it for a new conversation, or load a saved one."""

    def __init__(self, vlm):
        self._vlm = vlm

    def __call__(self) -> "ChatSession":
        return ChatSession(self._vlm)

    def load(self, path: str | os.PathLike) -> "ChatSession":
        """Continue the conversation that `ChatSession.save` wrote; InputError if it belongs to another model."""
        return ChatSession(self._vlm)._load(Path(path))


class ChatSession:
    """A conversation whose memory is the state: each turn reads only its own words, however long the talk has been.

    `transcript` lists the turns so far as {"role", "text", "images"}; `nbytes` is the size of the state.
    """

    def __init__(self, vlm):
        self._vlm = vlm
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._turns = []
        self._state = None
        self._unread = []  # tokens of the last reply, and its turn end, that the state has not read yet

    @property
    def transcript(self) -> list[dict]:
        return [asdict(turn) for turn in self._turns]

    @property
    def nbytes(self) -> int:
        return self._state.nbytes if self._state else 0

    def say(self, text: str, images=None, **sampling) -> str:
        """Say something, with or without pictures, and return the reply.

        Args:
            text: what the user says.
            images: a picture or a list of pictures, shown in this turn.
            sampling: fields of `Sampling`.

        Raises:
            InputError: as for `VisualRWKV.ask`; the conversation is then as before.
        """
        turn, inputs = self._read(text, images)
        output = self._vlm.generate(inputs, Sampling(**_known(sampling)), state=self._copy_state())
        return self._commit(turn, inputs, output)

    def stream(self, text: str, images=None, **sampling) -> Iterator[str]:
        """Like `say`, piece by piece. Leaving early keeps what was said until then as the reply."""
        turn, inputs = self._read(text, images)
        return self._stream(turn, inputs, Sampling(**_known(sampling)))

    def _stream(self, turn, inputs, sampling):
        job = _Job(self._vlm, inputs, sampling, state=self._copy_state())
        try:
            yield from job.pieces()
        finally:
            if job.output is not None:
                self._commit(turn, inputs, job.output)

    def fork(self) -> "ChatSession":
        """A second conversation with the same past; neither hears what the other says from here on."""
        other = ChatSession(self._vlm)
        other._turns, other._state, other._unread = list(self._turns), self._copy_state(), list(self._unread)
        return other

    def save(self, path: str | os.PathLike) -> None:
        """Write the conversation to one safetensors file: the state, the transcript, and which model it belongs to."""
        meta = {
            "format": CHAT_FORMAT,
            "model": self._vlm.fingerprint(),
            "transcript": json.dumps(self.transcript, ensure_ascii=False),
            "unread": json.dumps(self._unread),
            "seen": str(self._state.seen if self._state else 0),
        }
        Path(path).write_bytes(save(self._state.tensors() if self._state else {}, metadata=meta))

    def _load(self, path):
        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: not a saved conversation ({error}); pass a file that chat.save wrote") from None
        if meta.get("format") != CHAT_FORMAT:
            raise InputError(f"{path}: not a conversation of format {CHAT_FORMAT}; pass a file that chat.save wrote")
        if meta["model"] != self._vlm.fingerprint():
            raise InputError(f"{path}: the conversation was held with another model; load the model it was saved with")
        self._turns = [Turn(**turn) for turn in json.loads(meta["transcript"])]
        self._unread = json.loads(meta["unread"])
        self._state = RWKVState.from_tensors(tensors, int(meta["seen"])).to(self._vlm.model.device) if tensors else None
        return self

    def _copy_state(self):
        return self._state.clone() if self._state else None

    def _read(self, text, images):
        """The new turn, and what has to be read for it: the unread end of the last reply, then the turn alone."""
        pictures = open_pictures(images)
        turn = Turn("user", check_question(text), images=len(pictures))
        processor = self._vlm.processor
        ids, _ = processor.encode_turns([*self._turns, turn], open_reply=True, start=len(self._turns))
        ids = torch.tensor([self._unread + ids])
        seen = self._state.seen if self._state else 0
        # generate takes ids shorter than the mask for the new part of a sequence
        inputs = {"input_ids": ids, "attention_mask": torch.ones(1, seen + ids.shape[1], dtype=torch.long)}
        if pictures:
            inputs["pixel_values"] = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return turn, inputs

    def _commit(self, turn, inputs, output):
        """Take over the state behind a reply; returns the reply."""
        tokenizer = self._vlm.processor.tokenizer
        reply = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        text = ReplyText.whole(tokenizer, reply)
        self._unread = unread_end(tokenizer.vocabulary, reply)
        self._state = output.cache
        self._turns += [turn, Turn("assistant", text)]
        return text


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


class _Job:
    """One reply under way in a thread of its own, since transformers pushes tokens and callers want to pull them."""

    def __init__(self, vlm, inputs, sampling, state=None):
        self.output = None  # what generate returned; stays None when it failed
        self._vlm, self._work = vlm, (inputs, sampling, state)

    def pieces(self):
        """Text as soon as it is certain. Closing the iterator stops the reply after the token it is at."""
        streamer, stop = Utf8Streamer(self._vlm.processor.tokenizer), _StopWhen()

        def work():
            try:
                self.output = self._vlm.generate(*self._work, streamer=streamer, stop=stop)
            except BaseException as error:  # raised again in the thread that waits for the text
                streamer.fail(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            stop.wanted.set()
            thread.join()


class _StopWhen(StoppingCriteria):
    """Ends a reply that nobody waits for any more."""

    def __init__(self):
        self.wanted = threading.Event()

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), self.wanted.is_set(), device=input_ids.device)


def open_pictures(entry) -> list:
    """RGB pictures of one question: None, one source, or a list of sources (see `image_processing.load_image`)."""
    sources = entry if isinstance(entry, (list, tuple)) else [] if entry is None else [entry]
    return [load_image(source) for source in sources]


def _known(options):
    unknown = sorted(set(options) - set(Sampling.__dataclass_fields__))
    if unknown:
        known = ", ".join(Sampling.__dataclass_fields__)
        raise InputError(f"unknown option {', '.join(unknown)}; these are known: {known}")
    return options
