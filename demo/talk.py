"""What happens when something is pressed: each handler changes the caller's session and shows it anew.

What the browser sends is never trusted: the conversation, its pictures and its branches are those of the server's
session, and the history that a page holds is only ever written.
"""

import html
import time
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from visualrwkv import InputError
from visualrwkv.demo import panel
from visualrwkv.demo.examples import Example
from visualrwkv.demo.models import Models
from visualrwkv.demo.sessions import Ended, Session, Sessions
from visualrwkv.demo.texts import text
from visualrwkv.demo.view import explained, messages, save_reduced, tell, warn
from visualrwkv.errors import one_line
from visualrwkv.image_processing import load_image

BRANCHES = "ABCD"
REFRESH = 0.05  # seconds between two pictures of a growing reply, at least, and
REST = 4  # so many times what the last one took: each takes longer the more pictures there are in the conversation
REFRESH_PANEL = 0.5  # and of the figures meanwhile
READY = {"submit_btn": True, "stop_btn": False}
WRITING = {"submit_btn": False, "stop_btn": True}


@dataclass(frozen=True)
class Limits:
    """What one message may hold, and how many replies are written at the same time."""

    pictures: int = 4
    characters: int = 4000
    stops: int = 16
    stop_characters: int = 256
    new_tokens: int = 1024
    seed: int = 2**31 - 1
    replies: int = 2


class Talk:
    """The handlers of the page. Those of the conversation return (messages, text box, panel, branch switch)."""

    def __init__(self, models: Models, sessions: Sessions, examples: list[Example], limits: Limits):
        self.models, self.sessions, self.examples, self.limits = models, sessions, examples, limits
        self._writing: dict[Session, tuple] = {}  # those with a reply under way -> its setting
        self._picking: set[tuple] = set()  # (page, setting) of models that are being loaded for a page

    # Writing a reply.

    def say(
        self,
        message: dict,
        language: str,
        model: str,
        prompt: str,
        scan: str,
        look_again: bool,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        top_k: int,
        seed: str,
        presence_penalty: float,
        frequency_penalty: float,
        penalty_decay: float,
        stop: str,
        request: gr.Request,
    ):
        """Send a message, {"text": ..., "files": [...]}; the reply comes piece by piece.

        A message with the key "draft" does not come from the text box, which keeps what is in it. Where it is one to
        answer again (`take_back`) and gets no answer, the former answer comes back.
        """
        if message is None:  # a message to answer again that could not be taken back
            yield (gr.skip(),) * 4
            return
        setting = (model, prompt, scan)
        sampling = {
            "max_new_tokens": min(int(max_new_tokens), self.limits.new_tokens),
            "temperature": temperature,
            "top_p": top_p,
            "top_k": int(top_k),
            "seed": seed,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "penalty_decay": penalty_decay,
            "stop": [line for line in (stop or "").splitlines() if line],
        }
        session = self._open(request, language)
        if session is None:
            yield self._show(None, language, setting, gr.skip())
        elif not session.lock.acquire(timeout=5):
            warn(language, text(language, "busy"))
            yield (gr.skip(),) * 4
        else:
            self._writing[session] = setting
            try:  # the lock is held until the page has the last word, so that nothing older overwrites what follows
                yield from self._reply(session, language, setting, message, sampling, look_again)
            finally:
                del self._writing[session]
                session.lock.release()

    def _reply(self, session, language, setting, message, sampling, look_again):
        session.halt.clear()
        asked, files = (message.get("text") or "").strip(), [str(path) for path in message.get("files") or ()]
        former = session.branch.take_former() if session.branch else None
        if "draft" not in message:
            former = None  # a message to answer again did not arrive, since the queue was full
        try:
            sampling = sampling | {"seed": self._seed(sampling["seed"], language)}
            if not asked:
                raise InputError(text(language, "empty"))
            if len(asked) > self.limits.characters:
                raise InputError(text(language, "too_long", given=len(asked), limit=self.limits.characters))
            if len(files) > self.limits.pictures:
                raise InputError(text(language, "too_many_pictures", given=len(files), limit=self.limits.pictures))
            if len(sampling["stop"]) > self.limits.stops or max(map(len, sampling["stop"]), default=0) > (
                self.limits.stop_characters
            ):
                limits = {"limit": self.limits.stops, "characters": self.limits.stop_characters}
                raise InputError(text(language, "too_many_stops", **limits))
            if session.setting != setting or session.branch is None:
                with explained(language, "bad_model"):
                    session.restart(setting, self.models.get(*setting).chat())
            pictures = []
            for path in files:
                with explained(language, "bad_picture", path):
                    pictures.append(load_image(path))
            # a box that stays ticked: it matters where a picture was shown before and none comes now
            again = look_again and not pictures and any(turn["images"] for turn in session.branch.chat.transcript)
            with explained(language, "bad_message"):
                stream = session.branch.chat.stream(asked, pictures, look_again=again, **sampling)
            with explained(language, "full"):
                shown = [save_reduced(session, picture) for picture in pictures]
                sources = [session.keep(path) for path in files]
        except InputError as error:
            warn(language, error)
            session.bring_back(former)
            yield self._show(session, language, setting, gr.skip())
            return
        branch, said, due, counted = session.branch, "", 0.0, 0.0
        box = gr.update(**WRITING) if "draft" in message else gr.update(value={"text": "", "files": []}, **WRITING)
        yield messages(branch, language, (asked, shown, "")), box, gr.skip(), gr.skip()
        turns = len(branch.chat.transcript)
        try:
            for piece in stream:
                said += piece
                if session.halt.is_set():
                    break
                if (now := time.monotonic()) >= due:
                    figures = gr.skip()
                    if now - counted >= REFRESH_PANEL:
                        counted, numbers = now, panel.figures(self.models.get(*setting), branch.chat)
                        figures = panel.html(numbers, language)
                    yield messages(branch, language, (asked, shown, said)), gr.skip(), figures, gr.skip()
                    shown_at = time.monotonic()
                    due = shown_at + max(REFRESH, REST * (shown_at - now))
        except InputError as error:
            warn(language, text(language, "bad_message", reason=error))
        except RuntimeError as error:  # out of memory, for instance: the page goes on, the conversation is as before
            warn(language, text(language, "failed", reason=one_line(error)))
        finally:
            stream.close()
            answered = len(branch.chat.transcript) > turns
            if answered:
                branch.shown.append(shown)
                branch.sources.append(sources)
            else:
                session.bring_back(former)
        keep = answered or "draft" in message
        box = gr.update(**READY) if keep else gr.update(value={"text": asked, "files": sources}, **READY)
        yield self._show(session, language, setting, box)

    def _seed(self, given, language) -> int | None:
        """What the field of the seed says; empty is None."""
        given = "" if given is None else str(given).strip()
        if given and not (given.isascii() and given.isdecimal() and int(given) <= self.limits.seed):
            raise InputError(text(language, "bad_seed", given=given[:20], limit=self.limits.seed))
        return int(given) if given else None

    def queued(self, language):
        """A word for whoever has to wait."""
        if len(self._writing) >= self.limits.replies:
            tell(language, text(language, "waiting"))

    def stop(self, request: gr.Request):
        """End the reply that is being written; what was said stays."""
        session = self.sessions.peek(_key(request))
        if session:
            session.halt.set()

    def arrive(self, former, language, request: gr.Request):
        """A page was loaded. It may be `former` loaded again, by hand or since its connection was cut: then it goes on
        with that one's conversation. Returns the setting of the conversation, too."""
        try:
            session = self.sessions.rename((request.username, former), _key(request)) if former else None
        except Ended as ended:
            session = self._tell_end(ended, language)
        if session is None or session.setting is None:
            return (gr.skip(),) * 7
        session.halt.set()
        with session.lock:  # what was said of a reply under way has become a part of the conversation
            return *self._show(session, language, session.setting, gr.skip()), *session.setting

    def leave(self, request: gr.Request):
        """The page was closed."""
        self.sessions.leave(_key(request))

    # Changing the conversation.

    def new(self, language, model, prompt, scan, request: gr.Request):
        """Forget everything, or begin again with another model or way of reading."""
        setting = (model, prompt, scan)
        return self._change(request, language, setting, lambda session: session.restart(setting))

    def setting(self, language, model, prompt, scan, request: gr.Request):
        """Another model or way of reading: loads it and begins anew. Returns the setting in the end, too.

        Where nothing changes (menus report a look at them, too) or the model cannot be loaded, all stays as it is.
        """
        picked, session = (model, prompt, scan), self.sessions.peek(_key(request))
        before = session.setting if session and session.setting else self.models.default
        if picked == before:
            return *(gr.skip(),) * 4, *before
        if (_key(request), picked) in self._picking:  # Gradio reports a pick twice
            return (gr.skip(),) * 7
        self._picking.add((_key(request), picked))
        try:
            if not self.models.is_loaded(model):
                tell(language, text(language, "loading", model=html.escape(str(model))))
            with explained(language, "bad_model"):
                self.models.get(*picked)
        except InputError as error:
            warn(language, error)
            return *(gr.skip(),) * 4, *before
        finally:
            self._picking.discard((_key(request), picked))

        def act(session):
            if session.setting != picked:  # else it was begun anew by a message, sent while the model was loaded
                if session.branches:
                    tell(language, text(language, "restarted"))
                session.restart(picked)

        if self._writing.get(self.sessions.peek(_key(request))) == picked:
            return *(gr.skip(),) * 4, *picked
        return *self._change(request, language, picked, act), *picked

    def undo(self, language, model, prompt, scan, request: gr.Request):
        """Take back the last turn."""
        return self.take_back(language, model, prompt, scan, request, again=False)[:4]

    def edit(self, draft, language, model, prompt, scan, request: gr.Request):
        """Take back the last turn and put its message into the box again, where no other may be lost."""
        if draft and ((draft.get("text") or "").strip() or draft.get("files")):
            tell(language, text(language, "draft"))
            return (gr.skip(),) * 4
        *shown, message = self.take_back(language, model, prompt, scan, request, again=False)
        message = message and {"text": message["text"], "files": message["files"]}
        return shown[0], gr.skip() if message is None else gr.update(value=message, **READY), *shown[2:]

    def take_back(self, language, model, prompt, scan, request: gr.Request, again=True):
        """Take back the last turn; returns its message, too, for `say` to answer it again."""
        taken = []

        def act(session):
            taken.append(self._take_back(session, language, again))

        shown = self._change(request, language, (model, prompt, scan), act)
        return *shown, taken[0] if taken else None

    def fork(self, language, model, prompt, scan, request: gr.Request):
        """A second conversation with the same past; the page goes on with it."""
        self._tell_cut(language, request)

        def act(session):
            if session.branch is None or not session.branch.chat.transcript:
                raise InputError(text(language, "nothing"))
            if len(session.branches) == len(BRANCHES):
                raise InputError(text(language, "forks_full", limit=len(BRANCHES)))
            session.branches.append(session.branch.fork())
            session.current = len(session.branches) - 1
            tell(language, text(language, "forked", name=BRANCHES[session.current]))

        return self._change(request, language, (model, prompt, scan), act)

    def switch(self, branch, language, model, prompt, scan, request: gr.Request):
        """Go on with another branch."""
        self._tell_cut(language, request)

        def act(session):
            if branch in BRANCHES[: len(session.branches)]:
                session.current = BRANCHES.index(branch)

        return self._change(request, language, (model, prompt, scan), act)

    def save(self, language, request: gr.Request):
        """The conversation as one file to download, or nothing where nothing was said."""
        session = self._open(request, language)
        if session is None:
            return None
        self._tell_cut(language, request)
        session.halt.set()
        with session.lock:
            if session.branch is None or not session.branch.chat.transcript:
                tell(language, text(language, "nothing"))
                return None
            try:
                with explained(language, "full"):
                    path = session.file(time.strftime("visualrwkv-%Y%m%d-%H%M.safetensors"))
                with explained(language, "full", path):
                    session.branch.chat.save(path)
            except InputError as error:
                warn(language, error)
                return None
            return str(path)

    def load(self, upload, language, model, prompt, scan, request: gr.Request):
        """Go on with a saved conversation in place of the present one. Returns the setting it was held with, too."""
        setting = [(model, prompt, scan)]

        def act(session):
            try:
                with explained(language, "bad_chat", upload):
                    found, chat = self.models.owner(Path(upload), setting[0])
            except InputError:
                raise
            except Exception:  # a forged file can break in many ways, none of which is to end the page
                raise InputError(text(language, "bad_file", file=Path(upload).name)) from None
            session.restart(found, chat)
            setting[0] = found
            turns = len(chat.transcript) // 2
            session.branch.shown, session.branch.sources = [None] * turns, [None] * turns  # the file holds no pictures
            tell(language, text(language, "loaded", turns=turns))

        shown = self._change(request, language, setting[0], act)
        return *self._show(self.sessions.peek(_key(request)), language, setting[0], shown[1]), *setting[0]

    # Small things around it.

    def example(self, language, chosen: gr.SelectData):
        """The message of an example; what is in the text box stays there."""
        index = chosen.index if isinstance(chosen.index, int) else chosen.index[0]
        example = self.examples[index % len(self.examples)]
        return {"text": example.questions[language], "files": [example.picture], "draft": True}

    def open_camera(self, is_open):
        """Open the camera, or close it."""
        return gr.update(value=None, visible=not is_open), not is_open

    def attach(self, message, photograph):
        """Add a photograph of the camera to the message; closes the camera."""
        if photograph is None:
            return gr.skip(), gr.skip(), gr.skip()
        message = message or {}
        files = [*(message.get("files") or ()), photograph]
        return {"text": message.get("text") or "", "files": files}, gr.update(value=None, visible=False), False

    def show(self, language, model, prompt, scan, request: gr.Request):
        """The session as it is (after a reply, or a change of language); a reply under way shows itself."""
        session = self.sessions.peek(_key(request))
        if session in self._writing:
            return (gr.skip(),) * 4
        return self._show(session, language, (model, prompt, scan), gr.skip())

    # Shared by the above.

    def _open(self, request, language) -> Session | None:
        """The caller's session; None, and a word about it, where it was closed meanwhile."""
        try:
            return self.sessions.open(_key(request))
        except Ended as ended:
            return self._tell_end(ended, language)

    def _tell_end(self, ended, language) -> None:
        words = text(language, ended.reason, minutes=round(self.sessions.idle / 60))
        gr.Warning(words, duration=None, title=text(language, "note"))

    def _tell_cut(self, language, request) -> None:
        """A word where a reply under way will end although nobody asked for its end."""
        if self.sessions.peek(_key(request)) in self._writing:
            tell(language, text(language, "ended"))

    def _change(self, request, language, setting, act):
        """End a reply that is under way, let `act` change the session, show it."""
        session = self._open(request, language)
        if session is not None:
            session.halt.set()
            with session.lock:
                try:
                    act(session)
                except InputError as error:
                    warn(language, error)
                return self._show(session, language, setting, gr.update(**READY))
        return self._show(None, language, setting, gr.update(**READY))

    def _take_back(self, session, language, again) -> dict | None:
        """Undo the last turn; returns its message, or None with a word about it where that cannot be done."""
        branch = session.branch
        if branch is None or not branch.chat.transcript:
            tell(language, text(language, "nothing"))
            return None
        sources = branch.sources[-1]
        there = [path for path in sources or [] if Path(path).is_file()]
        lost = branch.chat.transcript[-2]["images"] if sources is None else len(sources) - len(there)
        if lost and again:
            warn(language, text(language, "pictures_gone"))
            return None
        former = branch.fork() if again else None
        try:
            asked, _ = branch.undo()
        except InputError:
            warn(language, text(language, "no_undo"))
            return None
        branch.former = former
        return {"text": asked, "files": there, "draft": True}

    def _show(self, session, language, setting, box):
        branch = session.branch if session else None
        try:
            vlm = self.models.get(*(session.setting if branch else setting))
        except InputError:  # said where it was picked
            vlm = self.models.get(*self.models.default)
        names = list(BRANCHES[: len(session.branches)]) if branch else []
        switch = gr.update(choices=names, value=names[session.current] if names else None, visible=len(names) > 1)
        numbers = panel.figures(vlm, branch.chat if branch else None)
        return messages(branch, language), box, panel.html(numbers, language), switch


def _key(request) -> tuple:
    """Whose session: a page's own random number, and the name it logged in with."""
    if not request.session_hash:
        raise gr.Error("The request names no session.")
    return request.username, request.session_hash
