"""The demo's store of sessions: bounded, and freed when nobody is there any more."""

import gc
import time
import weakref

import pytest
from demo_controls import SHORT

from visualrwkv import RWKVState

pytest.importorskip("gradio")

from visualrwkv.demo.sessions import Branch, Ended, Sessions


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def sessions(tmp_path, clock):
    return Sessions(tmp_path / "sessions", limit=8, idle=100, grace=10, clock=clock)


@pytest.fixture(scope="module")
def spoken(vlm, pictures):
    """A conversation of one turn."""
    chat = vlm.chat()
    chat.say("What?", pictures[0], **SHORT)
    return chat


def begin(sessions, key, chat):
    session = sessions.open(key)
    session.branches = [Branch(chat, [[]], [[]])]
    session.file("picture.png").write_bytes(b"0" * 100)
    return session


def test_two_hundred_sessions_stay_within_the_bound(sessions, vlm, pictures, spoken):
    gc.collect()
    states = sum(type(thing) is RWKVState for thing in gc.get_objects())
    chats = []
    for number in range(200):
        chat = spoken.fork()
        chat.say("And now?", max_new_tokens=1)
        chats.append(weakref.ref(chat))
        begin(sessions, (None, f"page {number}"), chat)
        del chat
        assert len(sessions) <= 8 and sessions.nbytes <= 8 * spoken.nbytes
    gc.collect()
    assert sum(chat() is not None for chat in chats) == 8
    # each that is left holds its state and, for undo, the one before, which all of these share
    assert sum(type(thing) is RWKVState for thing in gc.get_objects()) - states <= 8
    assert len(list(sessions._folder.iterdir())) == 8


def test_the_one_unused_longest_makes_room_and_is_told_once(sessions, spoken):
    for number in range(8):
        begin(sessions, (None, f"page {number}"), spoken)
    sessions.open((None, "page 0"))  # used again
    begin(sessions, (None, "one more"), spoken)
    assert sessions.peek((None, "page 0")) and not sessions.peek((None, "page 1"))
    with pytest.raises(Ended) as ended:
        sessions.open((None, "page 1"))
    assert ended.value.reason == "crowded"
    assert sessions.open((None, "page 1")).branch is None


def test_idle_sessions_go(sessions, spoken, clock):
    old = begin(sessions, (None, "old"), spoken)
    clock.now = 60
    begin(sessions, (None, "new"), spoken)
    clock.now = 120
    sessions.sweep()
    assert len(sessions) == 1 and sessions.peek((None, "new"))
    assert old.halt.is_set() and not old.folder.exists()
    with pytest.raises(Ended, match="idle"):
        sessions.open((None, "old"))


def test_a_closed_page_frees_its_session_unless_it_comes_back(sessions, spoken, clock):
    back, gone = begin(sessions, (None, "back"), spoken), begin(sessions, (None, "gone"), spoken)
    sessions.leave((None, "back"))
    sessions.leave((None, "gone"))
    assert gone.halt.is_set()  # its reply ends at once
    clock.now = 9
    assert sessions.open((None, "back")) is back
    clock.now = 11
    sessions.sweep()
    assert len(sessions) == 1 and not sessions.peek((None, "gone"))


def test_a_page_that_is_loaded_again_goes_on_under_its_new_name(sessions, spoken, clock):
    session = begin(sessions, ("anna", "before"), spoken)
    sessions.leave(("anna", "before"))
    clock.now = 9
    assert sessions.rename(("anna", "before"), ("anna", "after")) is session
    sessions.leave(("anna", "before"))  # the end of the old page may be noticed late
    clock.now = 50
    assert sessions.open(("anna", "after")) is session and sessions.peek(("anna", "before")) is None
    assert sessions.rename(("berta", "after"), ("berta", "page")) is None and len(sessions) == 1
    # what came too late is told
    sessions.leave(("anna", "after"))
    clock.now = 61
    sessions.sweep()
    with pytest.raises(Ended, match="left"):
        sessions.rename(("anna", "after"), ("anna", "later"))
    assert sessions.rename(("anna", "after"), ("anna", "later")) is None


def test_the_store_watches_by_itself(tmp_path, spoken):
    sessions = Sessions(tmp_path, limit=8, idle=0.3, grace=0.1)
    begin(sessions, (None, "page"), spoken)
    sessions.watch()
    deadline = time.monotonic() + 20
    while len(sessions) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not len(sessions)
    sessions.close()


def test_a_session_belongs_to_a_page_and_a_login(sessions):
    one = sessions.open(("anna", "page"))
    assert sessions.open(("anna", "page")) is one
    assert sessions.open(("berta", "page")) is not one and sessions.open(("anna", "other")) is not one
