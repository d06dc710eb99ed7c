"""The endpoint's connections: those over which nothing is asked, encoded bodies, and how it ends."""

import gzip
import json
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from test_serve import JSON, LIMITS, LONG, USER, open_stream, refused, replies_never_end, running, send, wait_until

from visualrwkv.serving import app, server

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
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.5)
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
