"""The one prompt builder: turns of a conversation -> pieces of text and pictures.

A turn is written `User: text` or `Assistant: text` and ends with an empty line. Where the picture stands in a user's
turn is the *position*: "first" (picture, then text), "last" (text, then picture) or "sandwich" (the question before
and after the picture, VisualRWKV, arXiv 2406.13362, section 3.3). Pictures travel as `IMAGE`, never as text, so no
text that a user types can become one. Training, evaluation and chat all build their prompts here.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from visualrwkv.errors import InputError, short

POSITIONS = ("sandwich", "first", "last")
MARKER = "<image>"  # how data files and prompt strings write a picture
IGNORE = -100  # label of a position that is not learned; what torch's cross entropy leaves out by default
SHORT_ANSWER = "Answer the question using a single word or phrase."
TURN_END = "\n\n"
SPEAKERS = {"user": "User:", "assistant": "Assistant:"}
LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_BLANK_LINES = re.compile(r"\n(?:\s*\n)+")


class Image:
    """The type of `IMAGE`, which stands for one picture between pieces of text."""

    def __repr__(self) -> str:
        return "IMAGE"


IMAGE = Image()


@dataclass(frozen=True)
class Turn:
    """What one speaker says.

    Args:
        role: "user" or "assistant".
        text: the words alone; the characters "<image>" in it are ordinary text.
        images: number of pictures shown in this turn.
    """

    role: str
    text: str
    images: int = 0

    def __post_init__(self):
        if not isinstance(self.role, str) or self.role not in SPEAKERS:
            raise InputError(f"unknown speaker {short(self.role)}; a turn belongs to 'user' or 'assistant'")
        if not isinstance(self.text, str):
            raise InputError(f"the text of a turn must be a string, got {type(self.text).__name__}")


@dataclass(frozen=True)
class Segment:
    """One turn, ready for the tokenizer.

    Args:
        pieces: strings and `IMAGE`, in order; each string is tokenised on its own.
        target: whether the model learns to write this turn (all but its speaker label).
    """

    pieces: tuple[str | Image, ...]
    target: bool

    @property
    def text(self) -> str:
        """The turn as a string, pictures as "<image>"; for display, not for the tokenizer."""
        return "".join(MARKER if piece is IMAGE else piece for piece in self.pieces)


def check_position(position: str) -> str:
    """Return the position if it is a known one."""
    if position not in POSITIONS:
        raise InputError(f"prompt {position!r} is unknown; choose one of {', '.join(POSITIONS)}")
    return position


def check_question(text: str) -> str:
    """Return a question that can be asked: a string that is not blank and does not contain the picture marker."""
    if not isinstance(text, str):
        raise InputError(f"a question must be a string, got {type(text).__name__}")
    if not text.strip():
        raise InputError("the question is empty; ask something about the picture")
    if MARKER in text:
        raise InputError(f"the question contains {MARKER!r}; leave it out, pictures are passed beside the question")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("the question holds half of a surrogate pair, which is no character; leave it out") from None
    return text


def collapse(text: str) -> str:
    """Strip, and turn each run of empty lines into one line break, so that no turn ends early."""
    return _BLANK_LINES.sub("\n", text.strip())


def upper_slice(turns: Sequence[Turn]) -> str:
    """The questions as they stand before the picture of a sandwich, one after the other.

    A turn with a picture is collapsed and loses the short-answer sentence; a turn without is only stripped, since the
    released models were trained that way.
    """
    questions = []
    for turn in turns:
        if turn.role == "user":
            text = turn.text.strip()
            questions.append(collapse(text.replace(SHORT_ANSWER, "")) if turn.images else text)
    return "\n".join(questions)


def build_prompt(
    turns: Sequence[Turn],
    position: str = "sandwich",
    open_reply: bool = False,
    start: int = 0,
    foresight: bool = True,
) -> list[Segment]:
    """Write a conversation as segments, one for each turn.

    In a sandwich, the first picture stands below all user turns given; a picture in a later turn stands between two
    copies of that turn's own text.

    Args:
        turns: the conversation as far as it is known.
        position: "sandwich", "first" or "last".
        open_reply: leave the last assistant turn open for the model to write. A conversation that ends with the user
            gets a new `Assistant:`; one that ends with the assistant is continued from its last word.
        start: write only the turns from this index on (the turns before it have been read already).
        foresight: False writes each turn as if those behind it were not known yet, as they are when a conversation is
            held turn by turn: no later question stands above the first picture.
    """
    check_position(position)
    turns = list(turns)
    if open_reply and (not turns or turns[-1].role == "user"):
        turns.append(Turn("assistant", ""))
    first = next((index for index, turn in enumerate(turns) if turn.images), None)
    segments = []
    for index, turn in enumerate(turns[start:], start):
        text = collapse(turn.text)
        body: list[str | Image] = [text] if text else []
        if turn.images:
            upper, known = "", turns if foresight else turns[: index + 1]
            if position == "sandwich":
                upper = upper_slice(known if index == first else [Turn("user", turn.text, turn.images)]).lstrip()
            pictures = [IMAGE, "\n"] * turn.images
            if position == "last":
                body = [text, "\n", *pictures[:-1]] if text else pictures[:-1]
            else:
                body = [upper, "\n"] if upper else []
                body += [*pictures, text] if text else pictures[:-1]
        if body:
            body.insert(0, SPEAKERS[turn.role] + " ")
            if not (open_reply and index == len(turns) - 1):
                body.append(TURN_END)
        else:
            body = [SPEAKERS[turn.role]]  # an empty turn is its label alone
        segments.append(Segment(_join(body), turn.role == "assistant"))
    return segments


def _join(pieces: Iterable[str | Image]) -> tuple[str | Image, ...]:
    """Merge neighbouring strings, since the tokenizer must see the text between two pictures as one."""
    merged: list[str | Image] = []
    for piece in pieces:
        if isinstance(piece, str) and merged and isinstance(merged[-1], str):
            merged[-1] += piece
        else:
            merged.append(piece)
    return tuple(merged)


def split_markers(text: str) -> list[str | Image]:
    """Split a prompt string at its "<image>" markers into text and `IMAGE`."""
    pieces: list[str | Image] = []
    for index, part in enumerate(text.split(MARKER)):
        if index:
            pieces.append(IMAGE)
        if part:
            pieces.append(part)
    return pieces


def llava_role(message: Mapping[str, str], number: int) -> str:
    """The speaker of a turn of a LLaVA sample, "user" or "assistant", where the turn can be used.

    Args:
        message: `{"from": "human" | "gpt", "value": text}`.
        number: of the turn in its sample, counted from 1, for the message of an `InputError`.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("value"), str) or "from" not in message:
        raise InputError(f"turn {number} is not an object with the strings 'from' and 'value': {short(message)}")
    role = LLAVA_ROLES.get(str(message["from"]).lower())
    if role is None:
        raise InputError(f"turn {number} comes from {short(message['from'])}; must be 'human' or 'gpt'")
    return role


def turns_from_llava(conversations: Sequence[Mapping[str, str]], n_images: int) -> list[Turn]:
    """Turns of a LLaVA sample, `[{"from": "human" | "gpt", "value": "<image>\\nWhat is it?"}, ...]`.

    With pictures, "<image>" marks the turn that shows one, wherever it stands in the text; several markers in one turn
    stand for one picture if the sample has only one. Without pictures the marker is ordinary text. Whether as many
    pictures as `n_images` were found is for the caller to check: `sum(turn.images for turn in turns)`.
    """
    turns = []
    for number, message in enumerate(conversations, 1):
        role = llava_role(message, number)
        text, images = message["value"], 0
        if n_images:
            images = text.count(MARKER)
            if n_images == 1:
                images = min(images, 1)
            text = text.replace(MARKER, "")
        turns.append(Turn(role, text, images))
    return turns


def turns_from_messages(messages: Sequence[Mapping]) -> tuple[list[Turn], list]:
    """Turns and pictures of chat messages in the format of OpenAI and of transformers.

    Args:
        messages: `{"role": "user" | "assistant", "content": ...}`; the content is a string or a list of parts
            `{"type": "text", "text": ...}`, `{"type": "image", "image" | "path" | "url" | "base64": ...}` (the source
            may be left out) and `{"type": "image_url", "image_url": {"url": ...}}`. Text parts of a message are joined
            by line breaks; where its pictures stand in the prompt is decided by the prompt position.

    Returns:
        The turns, and the picture sources in order of appearance, None where a message only announces a picture.
    """
    turns, images = [], []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise InputError(f"message {number} is not an object with 'role' and 'content'")
        role = message.get("role")
        if role in ("system", "developer"):
            raise InputError(f"message {number}: the model has no place for the role {role!r}; put it in a question")
        if not isinstance(role, str) or role not in SPEAKERS:
            raise InputError(f"message {number} has the role {short(role)}; must be 'user' or 'assistant'")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, Sequence):
            raise InputError(f"message {number} has no content; must be a string or a list of parts")
        texts, before = [], len(images)
        for part in parts:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            if kind == "text":
                if not isinstance(part.get("text"), str):
                    raise InputError(f"message {number}: a part of type 'text' needs a string as its 'text'")
                texts.append(part["text"])
            elif kind == "image":
                given = ((key, part[key]) for key in ("image", "path", "url", "base64") if part.get(key) is not None)
                key, source = next(given, ("image", None))
                if key == "base64" and not str(source).startswith("data:"):  # transformers writes it without a header
                    source = f"data:image/png;base64,{source}"  # the picture itself says what it is
                images.append(source)
            elif kind == "image_url" and part.get("image_url"):
                source = part["image_url"]
                images.append(source.get("url") if isinstance(source, Mapping) else source)
            else:
                raise InputError(
                    f"message {number} has a part of type {short(kind)}; only text and images are understood"
                )
        turns.append(Turn(role, "\n".join(texts), len(images) - before))
    return turns, images
