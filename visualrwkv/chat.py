"""Asking about pictures: one question, a batch, a stream of words; and the door to conversations.

Everything goes through the one prompt builder and the one loop of `decoding.py`. This file adds what a user should not
have to think about: opening pictures and putting questions into batches. Conversations are in `session.py`.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256

import torch

from visualrwkv.decoding import Decoder, Reply
from visualrwkv.errors import InputError
from visualrwkv.image_processing import open_pictures
from visualrwkv.prompt import Turn, check_question
from visualrwkv.sampling import Sampling
from visualrwkv.session import ChatSession


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
        if not isinstance(question, (str, Iterable)) or isinstance(question, (bytes, Mapping)):
            raise InputError(f"a question must be a string, or a list of strings, got {type(question).__name__}")
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
        options = Sampling.of(sampling)
        answers = self.answers(self._prepare(pictures, questions), options)
        return answers[0] if single else answers

    def stream(self, image, question: str, **sampling) -> Iterator[str]:
        """Answer one question piece by piece; the pieces joined are what `ask` returns.

        Args and errors as for `ask` with one question. Wrong arguments are reported here, not at the first piece.
        """
        if not isinstance(question, str):
            raise InputError("stream answers one question at a time; use ask for a list")
        reply = Reply(self.processor.tokenizer, Sampling.of(sampling))
        return Decoder(self.model).stream(reply, self._prepare([image], [question]))

    def answers(self, inputs: Mapping[str, torch.Tensor], sampling: Sampling) -> list[str]:
        """Replies to a batch of prompts.

        Args:
            inputs: what the processor made, or with `image_features` in place of the pixels; on any device.
            sampling: a `Sampling`.

        Raises:
            InputError: the model's scores are no numbers.
        """
        replies = [Reply(self.processor.tokenizer, sampling) for _ in inputs["input_ids"]]
        decoder = Decoder(self.model)
        decoder.read(replies, inputs)
        while decoder.advance():
            pass
        for reply in replies:
            reply.check()
        return [reply.text for reply in replies]

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
        groups = [open_pictures(entry, self.processor.image_processor.max_pixels) for entry in pictures]
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
        return ChatSession.load(path, self._vlm)
