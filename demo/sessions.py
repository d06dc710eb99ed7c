"""Who is talking: one `Session` for each open page, kept on the server alone, bounded in number and in idle time.

A conversation never travels through the browser; the browser is shown its words. What a session needs on disk (its
pictures, its saved conversation) lies in a folder with a name that cannot be guessed, and goes when the session goes.
"""

import os
import secrets
import shutil
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import visualrwkv


class Ended(Exception):
    """The session was closed; `reason` is "idle", "crowded" or "left"."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass
class Branch:
    """One conversation and the pictures shown in it.

    For each user turn there are the files that the page shows, and those to read when it is answered again; None for
    a turn that came from a saved file, which holds no pictures. `former` is the branch with the turn that is being
    answered again.
    """

    chat: visualrwkv.ChatSession
    shown: list[list[str] | None] = field(default_factory=list)
    sources: list[list[str] | None] = field(default_factory=list)
    former: "Branch | None" = None

    def fork(self) -> "Branch":
        return Branch(self.chat.fork(), list(self.shown), list(self.sources))

    def undo(self) -> tuple[str, list[str]]:
        """Take back the last turn; returns its text and the files of its pictures. InputError as of the chat's."""
        text, self.former = self.chat.undo()["text"], None
        self.shown.pop()
        return text, self.sources.pop() or []

    def take_former(self) -> "Branch | None":
        former, self.former = self.former, None
        return former


class Session:
    """What one open page talks about.

    `lock` is held while a reply is written or the conversation is changed; setting `halt` ends a reply that is under
    way. `setting` names the model and the way of reading that the branches were begun with.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.lock = threading.Lock()
        self.halt = threading.Event()
        self.setting = None
        self.branches: list[Branch] = []
        self.current = 0

    @property
    def branch(self) -> Branch | None:
        return self.branches[self.current] if self.branches else None

    @property
    def nbytes(self) -> int:
        """Bytes of the states of all branches (earlier ones, kept for undo, not counted)."""
        return sum(branch.chat.nbytes for branch in list(self.branches))

    def restart(self, setting=None, chat=None) -> None:
        """Forget all branches; begin one with `chat`, if given."""
        self.setting, self.current = setting, 0
        self.branches = [] if chat is None else [Branch(chat)]

    def bring_back(self, former: Branch | None) -> None:
        """Put the `former` of the current branch, if it has one, in its place."""
        if former is not None:
            self.branches[self.current] = former

    def file(self, name: str) -> Path:
        """A new path in the session's folder, with `name` as its last part."""
        folder = self.folder / secrets.token_urlsafe(8)
        folder.mkdir(parents=True, mode=0o700)
        return folder / name

    def keep(self, upload: str) -> str:
        """Own copy of an uploaded file, so that nobody else's clean-up takes it away; returns its path."""
        path = self.file(Path(upload).name)
        try:
            os.link(upload, path)
        except OSError:
            shutil.copyfile(upload, path)
        return str(path)


class Sessions:
    """At most `limit` sessions.

    When one more is opened, the one that was unused longest goes. A session also goes after `idle` seconds without
    use, and `grace` seconds after its page was closed (a page that lost its connection for a moment comes back in
    time). Whoever comes back to a closed session is told so once.

    Args:
        folder: where sessions keep files.
        clock: seconds, rising.
    """

    def __init__(self, folder: Path, limit: int = 64, idle: float = 1800, grace: float = 60, clock=time.monotonic):
        self.limit, self.idle, self.grace = limit, idle, grace
        self._folder, self._clock = Path(folder), clock
        self._lock = threading.Lock()
        self._live: OrderedDict[tuple, Session] = OrderedDict()  # least recently used first
        self._used: dict[tuple, float] = {}
        self._left: dict[tuple, float] = {}
        self._ended: OrderedDict[tuple, str] = OrderedDict()  # reasons not told yet, the newest few
        self._closing = threading.Event()

    def __len__(self) -> int:
        return len(self._live)

    @property
    def nbytes(self) -> int:
        """Bytes of the states of all sessions."""
        with self._lock:
            live = list(self._live.values())
        return sum(session.nbytes for session in live)

    def open(self, key: tuple) -> Session:
        """The session of a page, a new one if there is none. Raises `Ended` once if there was one."""
        with self._lock:
            self._sweep()
            session = self._live.get(key)
            if session is None:
                reason = self._ended.pop(key, None)
                if reason:
                    raise Ended(reason)
                while len(self._live) >= self.limit:
                    self._end(next(iter(self._live)), "crowded")
                session = self._live[key] = Session(self._folder / secrets.token_urlsafe(16))
            self._live.move_to_end(key)
            self._used[key] = self._clock()
            self._left.pop(key, None)
            return session

    def peek(self, key: tuple) -> Session | None:
        """The session of a page if there is one; does not count as use."""
        with self._lock:
            return self._live.get(key)

    def rename(self, former: tuple, key: tuple) -> Session | None:
        """A page was loaded again and has another key from now on; returns its session, None if there is none.

        Raises `Ended` once if there was one.
        """
        with self._lock:
            self._sweep()
            reason = self._ended.pop(former, None)
            if reason:
                raise Ended(reason)
            if former not in self._live or key in self._live:
                return None
            self._left.pop(former, None)
            del self._used[former]
            self._used[key] = self._clock()
            self._live[key] = self._live.pop(former)
            return self._live[key]

    def leave(self, key: tuple) -> None:
        """The page was closed: its reply stops now, its session goes after the grace time."""
        with self._lock:
            if key in self._live:
                self._live[key].halt.set()
                self._left[key] = self._clock()

    def sweep(self) -> None:
        """Close what has been idle or left for too long."""
        with self._lock:
            self._sweep()

    def watch(self) -> None:
        """Sweep from time to time in a thread of its own, until `close`."""
        threading.Thread(target=self._watch, daemon=True, name="sessions").start()

    def close(self) -> None:
        """End all sessions and the watching."""
        self._closing.set()
        with self._lock:
            for key in list(self._live):
                self._end(key, "left")

    def _watch(self):
        pause = max(0.05, min(self.idle, self.grace, 60) / 4)
        while not self._closing.wait(pause):
            self.sweep()
            with self._lock:
                folders = [session.folder for session in self._live.values()]
            for folder in folders:  # files in use look new to the clean-up of old files
                for path in folder.rglob("*"):
                    try:
                        os.utime(path)
                    except OSError:
                        continue

    def _sweep(self):
        now = self._clock()
        for key in [key for key, since in self._left.items() if now - since >= self.grace]:
            self._end(key, "left")
        for key in [key for key, since in self._used.items() if now - since >= self.idle]:
            self._end(key, "idle")

    def _end(self, key, reason):
        session = self._live.pop(key)
        self._used.pop(key)
        self._left.pop(key, None)
        if session.nbytes:  # something was said
            self._ended[key] = reason
        while len(self._ended) > 10 * self.limit:
            self._ended.popitem(last=False)
        session.halt.set()
        shutil.rmtree(session.folder, ignore_errors=True)
