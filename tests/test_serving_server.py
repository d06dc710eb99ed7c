"""The endpoint's connections: those over which nothing is asked, encoded bodies, and how it ends."""

import gzip
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
from test_serve import (
    JSON,
    LIMITS,
    LONG,
    USER,
    image,
    open_stream,
    refused,
    replies_never_end,
    running,
    send,
    wait_until,
)

from visualrwkv.serving import app, engine, pictures, server

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BEGUN = HEAD + b"Content-Length: 99\r\n\r\n{"
ASKED = {"model": "tiny-random", "messages": [USER], "max_tokens": 2}


def connect(address):
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def answer(sock):
    """Status and text of the answer on a socket, which stays open."""
    head, body = b"", b""
    while b"\r\n\r\n" not in head:
        piece = sock.recv(4096)
        assert piece, head
        head += piece
    head, _, body = head.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += sock.recv(4096)
    return int(head.split()[1]), json.loads(body)


def refuses(address):
    """Whether no connection is taken any more."""
    try:
        connect(address).close()
    except ConnectionRefusedError:
        return True
    return False


def closed(sock):
    """Wait for the server to close a connection."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_request_that_does_not_come_is_not_waited_for(vlm, monkeypatch):
    monkeypatch.setattr(server, "CLIENT_SECONDS", 0.5)
    with running(vlm) as (_, address):
        data = json.dumps(ASKED).encode()
        slow, silent, unfinished = connect(address), connect(address), connect(address)
        slow.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data[:-1])
        unfinished.sendall(HEAD)
        again = send(address, ASKED)
        assert answer(again)[0] == 200
        again.sendall(b"GET /health HT")
        for sock in (silent, unfinished, again):
            assert closed(sock)
        slow.sendall(data[-1:])  # a body has a limit of its own
        assert answer(slow)[0] == 200


def test_a_connection_for_further_requests_is_kept_as_long_as_a_new_one(vlm, monkeypatch):
    monkeypatch.setattr(server, "CLIENT_SECONDS", 77)
    config = app.make_server(vlm, app.Settings("tiny-random")).config
    assert config.timeout_keep_alive == 77
    config.app.state.service.close()


def test_the_rest_of_a_refused_request_is_not_waited_for(vlm, monkeypatch):
    monkeypatch.setattr(server, "CLIENT_SECONDS", 0.5)
    with running(vlm) as (_, address), connect(address) as sock:
        sock.sendall(BEGUN.replace(b"application/json", b"text/plain"))
        assert answer(sock)[0] == 415

        def drip():
            try:
                sock.sendall(b" ")
            except OSError:
                return True
            time.sleep(0.05)

        for _ in range(90):  # fewer than the body has bytes
            if drip():
                return
        pytest.fail("the connection is still open")


@contextmanager
def long_replies(monkeypatch):
    """Replies go on for good, and fill the buffers of a connection soon."""
    with monkeypatch.context() as patch:
        patch.setattr(engine.ServedReply, "take", lambda self, token: self.tokens.append(token) or "x" * 20_000)
        yield


def made_servers(monkeypatch):
    """A list that every server made from now on is put into."""
    servers, make = [], app.make_server
    monkeypatch.setattr(app, "make_server", lambda *arguments: servers.append(make(*arguments)) or servers[-1])
    return servers


def test_who_does_not_read_an_answer_gives_its_ticket_back(vlm, monkeypatch, capfd):
    monkeypatch.setattr(server, "CLIENT_SECONDS", 1)
    with running(vlm, slots=2, queue=0, limits=LIMITS) as (service, address):
        with long_replies(monkeypatch):
            socks = [open_stream(address, LONG) for _ in range(2)]
            wait_until(lambda: service.engine.load[0] == 2 and service.tickets == 0)
            wait_until(lambda: service.engine.load == (0, 0) and service.tickets == 2)
        again = send(address, ASKED)
        assert answer(again)[0] == 200
        for sock in (*socks, again):
            sock.close()
    assert capfd.readouterr().err == ""


def test_the_end_of_an_answer_that_is_not_read_is_not_waited_for(vlm, monkeypatch):
    """The answer is complete, and its last bytes are in a connection that is to close behind them."""
    monkeypatch.setattr(server, "CLIENT_SECONDS", 1)
    monkeypatch.setattr(app._Completion, "whole", lambda *_: {"long": "x" * 2**25})
    servers = made_servers(monkeypatch)
    with running(vlm, slots=1, queue=0) as (service, address), connect(address) as sock:
        data = json.dumps(ASKED).encode()
        sock.sendall(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        assert sock.recv(8) == b"HTTP/1.1"
        wait_until(lambda: not servers[0].server_state.connections)


@pytest.mark.parametrize("twice", [False, True])
def test_the_end_does_not_wait_for_who_does_not_read(vlm, monkeypatch, capfd, twice):
    monkeypatch.setattr(app, "SHUTDOWN_SECONDS", 60 if twice else 2)
    servers = made_servers(monkeypatch)
    with long_replies(monkeypatch), running(vlm, slots=2, queue=0, limits=LIMITS) as (service, address):
        socks = [open_stream(address, LONG) for _ in range(2)]
        connections = servers[0].server_state.connections
        wait_until(lambda: sum(connection.flow.write_paused for connection in connections.copy()) == 2)
        for _ in range(1 + twice):
            servers[0].handle_exit(signal.SIGINT, None)
    for sock in socks:
        sock.close()
    assert capfd.readouterr().err == ""


PICTURES = {**ASKED, "messages": [image("data:,")]}
PICTURES["messages"][0]["content"] += 9 * PICTURES["messages"][0]["content"][1:]


@contextmanager
def pictures_take_long(monkeypatch):
    """Yields a list with an entry for each picture that is being opened or was; they are done after the block."""
    opened, done = [], threading.Event()

    def open_one(self, sent):
        opened.append(sent)
        assert done.wait(60)
        return pictures.Picture(b"")

    monkeypatch.setattr(pictures.PictureReader, "_open", open_one)
    try:
        yield opened
    finally:
        done.set()


def test_pictures_of_others_hold_up_no_question_and_end_with_their_clients(vlm, monkeypatch, capfd):
    with running(vlm) as (service, address):
        with pictures_take_long(monkeypatch) as opened:
            socks = [send(address, PICTURES | {"stream": stream}) for stream in (False, True) for _ in range(4)]
            wait_until(lambda: len(opened) == pictures.READERS)
            plain = send(address, ASKED)
            assert answer(plain)[0] == 200
            for sock in (*socks, plain):
                sock.close()
            wait_until(lambda: service.tickets == service.places)
    assert len(opened) == pictures.READERS  # none of the others
    assert capfd.readouterr().err == ""


def test_the_second_ctrl_c_does_not_wait_for_further_pictures(vlm, monkeypatch, capfd):
    servers = made_servers(monkeypatch)
    with pictures_take_long(monkeypatch) as opened:
        with running(vlm) as (_, address):
            sock = send(address, PICTURES)
            wait_until(lambda: opened)
            for _ in range(2):
                servers[0].handle_exit(signal.SIGINT, None)
            assert answer(sock)[0] == 503
    sock.close()
    assert len(opened) == 1
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "request_", [b"GET /health HTTP/1.1\r\n\r\n", b"\x16\x03\x01\r\n\r\n", HEAD + b"Content-Length: -1\r\n\r\n",
                 HEAD + b"Transfer-Encoding: chunked\r\n\r\nno number\r\n"])  # fmt: skip
def test_what_is_not_http_is_refused_in_the_same_form(vlm, capfd, request_):
    with running(vlm) as (service, address), connect(address) as sock:
        sock.sendall(request_)
        told = b""
        while data := sock.recv(4096):
            told += data
        wait_until(lambda: service.tickets == service.places)
    head, _, body = told.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"application/json" in head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert "Traceback" not in capfd.readouterr().err


def test_nonsense_behind_an_answer_closes_the_connection(vlm, caplog):
    with running(vlm) as (_, address), connect(address) as sock:
        sock.sendall(HEAD.replace(b"json", b"xml") + b"Transfer-Encoding: chunked\r\n\r\n")
        assert answer(sock)[0] == 415
        sock.sendall(b"no number\r\n")
        assert closed(sock)
    assert not [record for record in caplog.records if record.exc_info]


def test_a_websocket_is_answered_as_plain_http(vlm, capfd):
    with running(vlm) as (_, address):
        headers = {"Connection": "Upgrade", "Upgrade": "websocket"}
        refused(httpx.get(address + "/v1/chat/completions", headers=headers), 405, "GET")
    assert capfd.readouterr().err == ""


def test_silent_clients_do_not_keep_others_out(vlm, monkeypatch):
    monkeypatch.setattr(server, "AT_ONCE", 8)
    with running(vlm, slots=1, queue=1) as (_, address):
        at_work = connect(address)
        data = json.dumps(ASKED).encode()
        at_work.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(data))
        assert httpx.get(address + "/health").json()["tickets"] == 1  # its request has begun
        silent = [connect(address) for _ in range(20)]
        for sock in silent[:13]:
            assert closed(sock)
        silent[-1].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer(silent[-1])[0] == 200
        at_work.sendall(data)
        assert answer(at_work)[0] == 200


def test_an_encoded_body_is_refused_by_name(vlm):
    with running(vlm) as (_, address):
        body = gzip.compress(json.dumps(ASKED).encode())
        for encoding, words in (("gzip", "gzip"), ("br", "br")):
            headers = {**JSON, "Content-Encoding": encoding}
            refused(httpx.post(address + "/v1/chat/completions", content=body, headers=headers), 415, words)
        plain = {**JSON, "Content-Encoding": "identity"}
        done = httpx.post(address + "/v1/chat/completions", content=json.dumps(ASKED).encode(), headers=plain)
        assert done.status_code == 200


def test_a_request_that_has_not_arrived_at_the_end_is_told(vlm, monkeypatch, capfd):
    monkeypatch.setattr(app, "SHUTDOWN_SECONDS", 1)
    with running(vlm) as (service, address):
        slow = connect(address)
        slow.sendall(BEGUN)
        wait_until(lambda: service.tickets < service.places)
    status, told = answer(slow)
    assert status == 503 and told["error"]["code"] == "shutting_down"
    assert "Traceback" not in capfd.readouterr().err


def test_the_second_ctrl_c_ends_the_server_at_once_and_quietly(random_folder):
    command = [sys.executable, "-m", "visualrwkv.cli", "serve", "--model", str(random_folder), "--port", "0"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    address = re.search(r"http://127\.0\.0\.1:\d+", process.stderr.readline())[0]
    wait_until(lambda: httpx.get(address + "/health", timeout=60).status_code == 200)
    slow = connect(address)
    slow.sendall(BEGUN)
    wait_until(lambda: httpx.get(address + "/health").json()["tickets"] < 96)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: refuses(address))
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert (process.returncode, rest) == (130, "")
    assert answer(slow)[0] == 503


def test_replies_under_way_are_told_when_the_server_ends(vlm, monkeypatch, capfd):
    monkeypatch.setattr(app, "SHUTDOWN_SECONDS", 3)
    with replies_never_end(monkeypatch), running(vlm, slots=4, limits=LIMITS) as (service, address):
        socks = [open_stream(address, LONG) for _ in range(4)]
        wait_until(lambda: service.engine.load[0] == 4)
    for sock in socks:
        ends = b""
        while data := sock.recv(65536):
            ends = (ends + data)[-2000:]
        assert b"the server is shutting down; try again later" in ends and b"data: [DONE]" in ends
        sock.close()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_complete_after_the_end_of_the_engine_is_told(vlm, capfd, stream):
    body = {"model": "tiny-random", "messages": [USER], "stream": stream}
    with running(vlm, slots=4, limits=LIMITS) as (service, address):
        service.engine.close()  # as the server does shortly before it cuts connections
        answer = httpx.post(address + "/v1/chat/completions", json=body)
    assert "the server is shutting down; try again later" in answer.text
    assert answer.text.endswith("data: [DONE]\n\n") if stream else answer.status_code == 503
    assert "Traceback" not in capfd.readouterr().err


def test_ctrl_c_ends_the_server(random_folder):
    command = [sys.executable, "-m", "visualrwkv.cli", "serve", "--model", str(random_folder), "--port", "0"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    line = process.stderr.readline()
    address = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert address and line.startswith(random_folder.name), line
    for _ in range(200):
        try:
            assert httpx.get(address[0] + "/health").json()["status"] == "ok"
            break
        except httpx.ConnectError:
            time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert (process.returncode, rest) == (130, "")
