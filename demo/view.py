"""What the page is shown: the messages of a conversation with their pictures, and words that pop up."""

import html
import os
from contextlib import contextmanager
from pathlib import Path

import gradio as gr

from visualrwkv import InputError
from visualrwkv.demo.sessions import Branch
from visualrwkv.demo.texts import text
from visualrwkv.errors import one_line

SHOWN_SIDE = 768  # pixels; the page shows the picture as the model was given it, reduced to this


def tell(language, message):
    gr.Info(message, title=text(language, "note"))


def warn(language, message):
    gr.Warning(html.escape(str(message)), title=text(language, "warning"))


@contextmanager
def explained(language, key, path=None):
    """What the library or the disk refuses in here is refused in the reader's language; of `path` only the name is
    shown."""
    try:
        yield
    except (InputError, OSError) as error:
        reason = getattr(error, "strerror", None) or one_line(error, 1000)
        for shown in () if path is None else (os.path.realpath(path), str(path)):
            reason = reason.replace(shown, Path(path).name)
        raise InputError(text(language, key, reason=reason)) from None


def save_reduced(session, picture) -> str:
    """A small copy for the page: upright RGB as the model is given it, without what a camera writes beside it."""
    small = picture.copy()
    small.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    path = session.file("picture.png" if max(picture.size) <= SHOWN_SIDE else "picture.jpg")
    small.save(path, quality=90)
    return str(path)


def messages(branch: Branch | None, language, pending=None) -> list[dict]:
    """The conversation as the chatbot component shows it, with a turn that is still being answered."""
    found = []
    if branch is not None:
        shown = iter(branch.shown)
        for turn in branch.chat.transcript:
            pictures = next(shown) if turn["role"] == "user" else []
            lost = pictures is None and turn["images"]
            words = [text(language, "picture_not_saved")] if lost else []
            found.append(_message(turn["role"], pictures or [], *words, turn["text"]))
    if pending is not None:
        asked, pictures, said = pending
        found.append(_message("user", pictures, asked))
        if said:
            found.append(_message("assistant", [], said))
    return found


def _message(role, pictures, *words):
    # the page takes words for HTML: escaped, they look as they were written
    spoken = [{"type": "text", "text": html.escape(said, quote=False)} for said in words]
    return {"role": role, "content": [{"path": path} for path in pictures] + spoken}
