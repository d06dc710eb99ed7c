"""`visualrwkv chat`: a conversation line by line.

One line is one turn, or a command. Replies go to stdout as they are written, everything else to stderr, so a pipe
carries the conversation alone.
"""

import contextlib
import os
import shlex
import sys
from collections import deque
from typing import Any

from visualrwkv.errors import InputError, error_line
from visualrwkv.image_processing import load_image
from visualrwkv.session import UNDO_LIMIT

HELP = """\
/image PATH      shows a picture with the next question; several may be shown together
/look QUESTION   shows the latest pictures once more, together with the question
/undo            takes back the last question and its reply; its pictures wait for the next question
/save FILE       writes the conversation; visualrwkv chat --resume FILE goes on with it
/reset           forgets everything
/help            this list
/quit            ends; so does Ctrl-D. Ctrl-C stops a reply and keeps the conversation"""


def talk(session, pictures: list, sampling: dict[str, Any]) -> int:
    """Read standard input until it ends.

    Args:
        session: the `ChatSession` to go on with.
        pictures: shown with the first question.
        sampling: fields of `Sampling` for every reply.

    Returns:
        The exit code: 2 if a line of a pipe was not understood, otherwise 0. A person sees that and goes on.
    """
    person = sys.stdin is not None and sys.stdin.isatty()
    if person:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing in input()
        print(HELP, file=sys.stderr)
    conversation, failed = _Conversation(session, pictures, sampling, person), False
    while (line := _next_line(person)) is not None:
        try:
            if not conversation.hear(line.strip()):
                break
        except InputError as error:  # one bad line does not end a conversation
            failed = True
            print(error_line(error), file=sys.stderr)
        except KeyboardInterrupt:  # while a picture was opened, say
            if not person:
                raise
            print("\n/quit ends the conversation", file=sys.stderr)
    return 2 if failed and not person else 0


def _next_line(person: bool) -> str | None:
    """The next line of input, None at its end."""
    if not person:
        return (sys.stdin.readline() if sys.stdin else "") or None
    while True:
        try:
            if sys.stdout.isatty():
                return input("> ")
            print("> ", end="", file=sys.stderr, flush=True)
            return input("")
        except EOFError:
            print(file=sys.stderr)
            return None
        except KeyboardInterrupt:  # meant for a reply that has just ended, perhaps
            print("\n/quit ends the conversation", file=sys.stderr)


class _Conversation:
    """The session, the pictures that wait for the next question, and those that came with the latest ones."""

    def __init__(self, session, pictures, sampling, person):
        self._session, self._pictures, self._sampling, self._person = session, pictures, sampling, person
        self._shown = deque(maxlen=UNDO_LIMIT)

    def hear(self, line: str) -> bool:
        """Do what a line says; returns whether to go on."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if not line:
            pass
        elif command == "/quit":
            return False
        elif command == "/help":
            print(HELP, file=sys.stderr)
        elif command == "/image":
            self._pictures.append(load_image(_path(_needed(rest, "/image needs the path of a picture"))))
        elif command == "/look":
            self._say(_needed(rest, "/look needs a question"), look_again=True)
        elif command == "/undo":
            taken = self._session.undo()
            self._pictures = self._shown.pop() + self._pictures
            print(f"taken back: {taken['text']}", file=sys.stderr)
        elif command == "/save":
            self._session.save(_path(_needed(rest, "/save needs the name of a file to write")))
        elif command == "/reset":
            self._session.reset()
            self._pictures = []
            self._shown.clear()
        elif command.startswith("/"):
            raise InputError(f"{command} is not a command; /help lists those that exist")
        else:
            self._say(line)
        return True

    def _say(self, text: str, look_again: bool = False) -> None:
        turns = len(self._session.transcript)
        reply = self._session.stream(text, self._pictures, look_again, **self._sampling)
        try:
            for piece in reply:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            reply.close()
            if not self._person:
                raise
            print(" [stopped]", end="", file=sys.stderr)
        finally:
            print(flush=True)
        if len(self._session.transcript) > turns:  # otherwise it was stopped before the first word
            self._shown.append(self._pictures)
            self._pictures = []


def _needed(text: str, message: str) -> str:
    if not text:
        raise InputError(message)
    return text


def _path(text: str) -> str:
    """A path as people type it, or as a terminal writes what is dropped on it: quoted, or with escaped blanks."""
    if os.path.exists(text):
        return text
    with contextlib.suppress(ValueError):  # an open quote belongs to the name
        parts = shlex.split(text)
        return parts[0] if len(parts) == 1 else text
    return text
