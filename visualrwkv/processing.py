"""The processor: pictures and turns of a conversation -> model inputs.

Turns become ids through `prompt.build_prompt` alone. The picture placeholder is put in by its id, once for each image
feature, so text can never turn into it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.processing_utils import BatchFeature, ProcessorMixin

from visualrwkv.errors import InputError
from visualrwkv.image_processing import VisualRWKVImageProcessor, flatten_images
from visualrwkv.prompt import (
    IGNORE,
    IMAGE,
    MARKER,
    SPEAKERS,
    TURN_END,
    Image,
    Segment,
    Turn,
    build_prompt,
    check_position,
    split_markers,
    turns_from_messages,
)
from visualrwkv.tokenization import RWKVWorldTokenizer

_TARGET_LABEL = len(SPEAKERS["assistant"].encode())


class VisualRWKVProcessor(ProcessorMixin):
    """Image processor and tokenizer as one object, for training, evaluation, chat and transformers pipelines.

    Args:
        image_processor: pictures -> pixel values.
        tokenizer: text -> ids.
        num_image_tokens: image features per picture, `config.num_image_tokens` of the model (577 for ViT-L/14 at 336).
        prompt: where the picture stands, "sandwich", "first" or "last".
    """

    def __init__(
        self,
        image_processor: VisualRWKVImageProcessor,
        tokenizer: RWKVWorldTokenizer,
        num_image_tokens: int = 577,
        prompt: str = "sandwich",
    ):
        if not isinstance(num_image_tokens, int) or num_image_tokens < 1:
            raise InputError(f"num_image_tokens {num_image_tokens!r} must be a whole number above 0")
        self.num_image_tokens = num_image_tokens
        self.prompt = check_position(prompt)
        super().__init__(image_processor, tokenizer)

    @property
    def image_token(self) -> str:
        return self.tokenizer.image_token

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.image_token_id

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]

    def encode_pieces(self, pieces: Sequence[str | Image]) -> list[int]:
        """Ids of text pieces, each tokenised on its own, and of pictures."""
        ids: list[int] = []
        for piece in pieces:
            ids += (
                [self.image_token_id] * self.num_image_tokens if piece is IMAGE else self.tokenizer.encode_text(piece)
            )
        return ids

    def encode_turns(
        self,
        turns: Sequence[Turn],
        open_reply: bool = False,
        start: int = 0,
        foresight: bool = True,
        position: str | None = None,
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of a conversation.

        Args:
            turns: the conversation; see `prompt.build_prompt` for `open_reply`, `start` and `foresight`.
            position: where pictures stand; by default as `prompt` says.

        Returns:
            input ids, with `num_image_tokens` placeholders for each picture, and labels of the same length: the id
            where the model is to learn it (replies and their ends), -100 elsewhere.
        """
        ids: list[int] = []
        labels: list[int] = []
        for segment in build_prompt(turns, position or self.prompt, open_reply, start, foresight):
            new = self.encode_pieces(segment.pieces)
            ids += new
            labels += self._labels(segment, new)
        return ids, labels

    def _labels(self, segment: Segment, ids: list[int]) -> list[int]:
        if not segment.target:
            return [IGNORE] * len(ids)
        labels = [IGNORE if index == self.image_token_id else index for index in ids]
        position, seen = 0, 0
        while position < len(ids) and seen < _TARGET_LABEL:  # the tokens of "Assistant:"
            seen += len(self.tokenizer.vocabulary.tokens[ids[position]])
            labels[position] = IGNORE
            position += 1
        return labels

    def prepare(
        self, images: Sequence[Any] | None, turns: Sequence[Sequence[Turn]], open_reply: bool = True
    ) -> BatchFeature:
        """A batch of conversations as tensors.

        Args:
            images: for each conversation its pictures (a list, one picture or None), in order of appearance.
            turns: for each conversation its turns.
            open_reply: end each with `Assistant:` for the model to go on.

        Returns:
            BatchFeature with `input_ids` and `attention_mask` (B, T), padded on the left, and, if there are pictures,
            `pixel_values` (n, 3, S, S) in order of appearance over the batch.
        """
        images = [None] * len(turns) if images is None else images
        if len(images) != len(turns):
            raise InputError(f"{len(images)} lists of images for {len(turns)} conversations; pass one list for each")
        sources = [flatten_images(item) for item in images]
        for number, (own, conversation) in enumerate(zip(sources, turns, strict=True), 1):
            shown = sum(turn.images for turn in conversation)
            if shown != len(own):
                raise InputError(f"conversation {number} shows {shown} images, but {len(own)} were passed")
        rows = [self.encode_turns(conversation, open_reply)[0] for conversation in turns]
        return self._batch(rows, flatten_images(sources), padding=True, return_tensors="pt")

    def _batch(self, rows: list[list[int]], sources: list, padding: bool, return_tensors: str | None) -> BatchFeature:
        data: dict[str, Any] = {}
        if rows:
            data |= self.tokenizer.pad({"input_ids": rows}, padding=padding)
        if sources:
            data["pixel_values"] = self.image_processor(sources)["pixel_values"]
        return BatchFeature(data, tensor_type=return_tensors)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = None,
        padding: bool | str = True,
        **kwargs,
    ) -> BatchFeature:
        """Model inputs of prompt strings, taken as they are.

        "<image>" in a string stands for the next picture. To build prompts from questions, or to keep what users type
        apart from the markers, use `apply_chat_template` or `prepare`.

        Args:
            images: one picture or a list, in order of appearance; with lists of lists, one list for each string.
            text: one string or a list.
            return_tensors: "pt", "np" or None for lists.
            padding: True or "longest" pads on the left to the longest string; False leaves the rows as they are.

        Returns:
            BatchFeature with `input_ids`, `attention_mask` (if there is text) and `pixel_values` (if there are images).
        """
        if kwargs:
            raise TypeError(f"VisualRWKVProcessor got unknown keyword arguments: {', '.join(sorted(kwargs))}")
        if padding not in (True, False, "longest", "do_not_pad"):
            raise InputError(f"padding={padding!r} is not supported; choose True or False")
        if images is None and text is None:
            raise InputError("neither images nor text were passed; pass at least one of them")
        texts = [] if text is None else [text] if isinstance(text, str) else list(text)
        if not all(isinstance(item, str) for item in texts):
            raise InputError("text must be a string or a list of strings")
        sources = flatten_images(images)
        if text is not None:
            self._check_counts(images, texts, len(sources))
        rows = [self.encode_pieces(split_markers(item)) for item in texts]
        return self._batch(rows, sources, padding in (True, "longest"), return_tensors)

    def _check_counts(self, images: Any, texts: list[str], n_images: int) -> None:
        markers = [item.count(MARKER) for item in texts]
        if sum(markers) != n_images:
            raise InputError(
                f"the text holds {sum(markers)} {MARKER} markers, but {n_images} images were passed; "
                "write one marker for each image, or use apply_chat_template"
            )
        if isinstance(images, (list, tuple)) and len(texts) > 1 and any(isinstance(i, (list, tuple)) for i in images):
            own = [len(flatten_images(item)) for item in images]
            if own != markers:
                raise InputError(f"the texts hold {markers} {MARKER} markers, but their lists hold {own} images")

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping] | Sequence[Sequence[Mapping]],
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs,
    ) -> Any:
        """Chat messages, in the format of transformers and OpenAI, as a prompt or as model inputs.

        There is no template text: the prompt comes from `prompt.build_prompt`, as everywhere.

        Args:
            conversation: messages (see `prompt.turns_from_messages`) or a list of conversations.
            add_generation_prompt: end with `Assistant:` for the model to go on.
            continue_final_message: leave the last message, which must be the assistant's, open.
            tokenize: give ids rather than the prompt string.
            return_dict: with `tokenize`, give all model inputs, pixel values too, rather than the ids alone.
            return_tensors, processor_kwargs: as in `__call__` (`processor_kwargs` holds `padding`).
        """
        unknown = sorted(key for key, value in kwargs.items() if value is not None)
        if unknown:
            raise TypeError(f"apply_chat_template does not support: {', '.join(unknown)}")
        if not conversation:
            raise InputError("the conversation is empty; pass at least one message")
        batched = not isinstance(conversation[0], Mapping)
        chats = [turns_from_messages(chat) for chat in (conversation if batched else [conversation])]
        ends_with_reply = [bool(turns) and turns[-1].role == "assistant" for turns, _ in chats]
        if continue_final_message and (add_generation_prompt or not all(ends_with_reply)):
            raise InputError("continue_final_message needs a last message of the assistant, and no generation prompt")
        if add_generation_prompt and any(ends_with_reply):
            raise InputError("the last message is the assistant's; use continue_final_message to let the model go on")
        open_reply = add_generation_prompt or continue_final_message
        if not tokenize:
            texts = [self._prompt_text(turns, open_reply) for turns, _ in chats]
            return texts if batched else texts[0]
        options = {"padding": True, "return_tensors": return_tensors} | dict(processor_kwargs or {})
        if set(options) - {"padding", "return_tensors"}:
            raise TypeError(f"processor_kwargs understands padding and return_tensors, got {', '.join(options)}")
        rows = [self.encode_turns(turns, open_reply)[0] for turns, _ in chats]
        sources = [source for _, images in chats for source in images]
        if return_dict and any(source is None for source in sources):
            raise InputError(
                "a message announces an image without holding one; add it as {'type': 'image', 'image': ...}"
            )
        batch = self._batch(
            rows, sources if return_dict else [], options["padding"] in (True, "longest"), options["return_tensors"]
        )
        if return_dict:
            return batch
        return batch["input_ids"] if batched or options["return_tensors"] else batch["input_ids"][0]

    def _prompt_text(self, turns: Sequence[Turn], open_reply: bool) -> str:
        if any(MARKER in turn.text for turn in turns):
            raise InputError(f"a message contains the text {MARKER}, which in a string is an image; use tokenize=True")
        return "".join(segment.text for segment in build_prompt(turns, self.prompt, open_reply))

    def post_process_image_text_to_text(self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs):
        """Text of generated sequences (prompt included, as `generate` returns it), without the end of the last turn."""
        texts = self.tokenizer.decode(
            generated_outputs, skip_special_tokens=skip_special_tokens, errors="replace", **kwargs
        )
        end = re.compile(re.escape(TURN_END) + r"\s*$")
        return end.sub("", texts) if isinstance(texts, str) else [end.sub("", text) for text in texts]
