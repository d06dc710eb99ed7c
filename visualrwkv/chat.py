"""Asking about pictures: one question, a batch, a stream of words; and the door to conversations.

Everything goes through the model's own `generate` and the one prompt builder. This file adds what a user should not
have to think about: opening pictures and stopping at the end of a reply. Conversations are in `session.py`.
"""

import os
from collections.abc import Iterator
from functools import partial
from hashlib import sha256

import torch

from visualrwkv.errors import InputError
from visualrwkv.image_processing import open_pictures
from visualrwkv.prompt import Turn, check_question
from visualrwkv.sampling import CheckedScores, ChosenTokens, Sampling
from visualrwkv.session import ChatSession
from visualrwkv.streaming import ReplyJob, ReplyText, StopAtStrings, StopAtTurnEnd


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
        options = Sampling.of(sampling)
        output = self.generate(inputs, options)
        replies = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        answers = [ReplyText.whole(self.processor.tokenizer, reply, options.stop) for reply in replies]
        return answers[0] if single else answers

    def stream(self, image, question: str, **sampling) -> Iterator[str]:
        """Answer one question piece by piece; the pieces joined are what `ask` returns.

        Args and errors as for `ask` with one question. Wrong arguments are reported here, not at the first piece.
        """
        if not isinstance(question, str):
            raise InputError("stream answers one question at a time; use ask for a list")
        options, inputs = Sampling.of(sampling), self._prepare([image], [question])
        job = ReplyJob(partial(self.generate, inputs, options), self.processor.tokenizer, options.stop)
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

        Raises:
            InputError: the model's scores are no numbers.
        """
        device, tokenizer = self.model.device, self.processor.tokenizer
        inputs = {name: value.to(device) for name, value in inputs.items()}
        rows, length = inputs["input_ids"].shape
        choice = [] if sampling.plain else [ChosenTokens(sampling, rows, device)]
        end = StopAtStrings(tokenizer, length, sampling.stop) if sampling.stop else StopAtTurnEnd(tokenizer, length)
        return self.model.generate(
            **inputs,
            cache=state,
            generation_config=sampling.config(self.model.config.image_token_id),
            logits_processor=[CheckedScores(), *choice],
            stopping_criteria=[end, stop] if stop else [end],
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
        return ChatSession.load(path, self._vlm)
