"""The demo's server, a real one, asked by Gradio's own client: what it answers and what it refuses."""

import html
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from demo_controls import SHORT, controls

from visualrwkv import InputError, cli

pytest.importorskip("gradio")

from visualrwkv.demo import panel


@pytest.fixture(scope="module")
def server(random_folder):
    from visualrwkv.demo.app import Server

    server = Server([str(random_folder)], sessions=8, grace=0.5, max_upload=2, concurrency=1, queue=2)
    yield server
    server.close()
    assert not server._own.exists()


@pytest.fixture
def client(server):
    from gradio_client import Client

    client = Client(server.url, verbose=False)
    yield client
    client.close()


def ask(client, models, words, *files, **changes):
    from gradio_client import handle_file

    message = {"text": words, "files": [handle_file(file) for file in files]}
    return client.submit(message=message, **controls(models, **changes), api_name="/say")


def client_words(output):
    """The words of a conversation as Gradio's client gets them."""
    contents = [message["content"] for message in output[0]]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    said = [part if isinstance(part, str) else part.get("text") for part in parts]
    return [html.unescape(words) for words in said if words is not None]


def test_a_reply_streams_to_a_client(server, client, vlm, picture_file):
    job = ask(client, server.models, "What?", picture_file, max_new_tokens=200)
    assert client_words(job.result(timeout=300)) == ["What?", vlm.ask(picture_file, "What?", max_new_tokens=200)]
    grown = [client_words(output)[1:] for output in job.outputs()]
    assert len(grown) > 3 and all("".join(b).startswith("".join(a)) for a, b in zip(grown, grown[1:], strict=False))


def test_clients_side_by_side_never_see_each_other(server, vlm, pictures, tmp_path):
    from gradio_client import Client

    files = [str(tmp_path / f"{name}.png") for name in ("one", "two")]
    for file, picture in zip(files, pictures, strict=False):
        picture.save(file)
    clients = [Client(server.url, verbose=False) for _ in files]
    jobs = [ask(*pair) for pair in zip(clients, [server.models] * 2, ("What?", "Where?"), files, strict=True)]
    first = [client_words(job.result(timeout=300)) for job in jobs]
    jobs = [ask(client, server.models, "Why?") for client in clients]
    second = [client_words(job.result(timeout=300)) for job in jobs]
    for words, file, before, after in zip(("What?", "Where?"), files, first, second, strict=True):
        chat = vlm.chat()
        assert before == [words, chat.say(words, file, **SHORT)]
        assert after == [*before, "Why?", chat.say("Why?", **SHORT)]
    keys = [(None, client.session_hash) for client in clients]
    assert all(map(server.sessions.peek, keys))
    for client in clients:
        client.close()
    deadline = time.monotonic() + 60
    while any(map(server.sessions.peek, keys)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(server.sessions.peek, keys))  # closing the page freed them


def api(server, path):
    return f"{server.url}gradio_api/{path}"


def test_no_file_of_the_server_can_be_read(server, picture_file):
    import httpx

    source, outside = Path(panel.__file__), server._own / "sessions" / ".." / ".." / picture_file.name
    for path in (source, picture_file, Path.cwd() / "README.md", outside, "/etc/passwd", "../../../etc/passwd"):
        for form in (f"file={path}", f"file/{path}", f"file={str(path).replace('/', '%2f')}"):
            assert httpx.get(api(server, form)).status_code in (403, 404), form
    for private in ("monitoring", "monitoring/summary", "gradio_api/runs"):
        assert httpx.get(f"{server.url}{private}").status_code in (403, 404), private


def call(server, data):
    """The events of one call of /say with raw data, or the status that refused it."""
    import httpx

    joined = httpx.post(api(server, "call/say"), json={"data": data}, timeout=60)
    if joined.status_code != 200:
        return joined.status_code
    return httpx.get(api(server, f"call/say/{joined.json()['event_id']}"), timeout=300).text


def message_with(server, path):
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    return [{"text": "What?", "files": [file]}, *controls(server.models).values()]


def test_only_uploaded_files_are_taken(server, picture_file):
    before = set(server.sessions._live)
    assert "event: error" in call(server, message_with(server, str(picture_file)))
    assert "event: error" in call(server, message_with(server, "/etc/passwd"))
    assert set(server.sessions._live) <= before  # it did not come to that


def test_no_address_is_fetched(server):
    import httpx

    visits = []

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            visits.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    inside = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=inside.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{inside.server_port}/picture.png"
    try:
        assert call(server, message_with(server, address)) == 403
        for form in (f"file={address}", f"proxy={address}", f"file=HTTPS{address[4:]}"):
            assert httpx.get(api(server, form)).status_code == 403, form
        escaped = json.dumps(message_with(server, address)).replace("http:", "\\u0068ttp:")
        headers = {"content-type": "application/json"}
        body = '{"data": ' + escaped + "}"
        assert httpx.post(api(server, "call/say"), content=body, headers=headers).status_code == 403
    finally:
        inside.shutdown()
    assert visits == []


def test_what_is_too_large_is_refused(server):
    import httpx

    large = b"\x89PNG" + b"0" * (5 * 2**20)
    refused = httpx.post(api(server, "upload"), files={"files": ("large.png", large)}, timeout=60)
    assert refused.status_code == 413 and "limit" in refused.text
    # between the limit for a file and that for a request
    refused = httpx.post(api(server, "upload"), files={"files": ("large.png", large[: 2**21 + 1000])}, timeout=60)
    assert refused.status_code == 413
    assert httpx.post(api(server, "upload"), files={"files": ("small.png", large[:1000])}).status_code == 200
    body = b'{"data": ["' + b"x" * 2**21 + b'"]}'
    assert httpx.post(api(server, "call/say"), content=body).status_code == 413

    def untold():  # without a length in the header
        yield b'--edge\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        for _ in range(64):
            yield b"0" * 2**18

    headers = {"content-type": "multipart/form-data; boundary=edge"}
    try:
        status = httpx.post(api(server, "upload"), content=untold(), headers=headers, timeout=60).status_code
    except httpx.HTTPError:  # cut off
        status = 0
    assert status != 200
    assert not [path for path in server._own.rglob("*") if path.is_file() and path.stat().st_size > 2**21]
    assert httpx.get(server.url).status_code == 200  # it goes on


def test_overload_is_refused_and_passes(server):
    import httpx

    data = [{"text": "What?", "files": []}, *controls(server.models, max_new_tokens=100).values()]
    joined = [httpx.post(api(server, "call/say"), json={"data": data}, timeout=60) for _ in range(8)]
    taken = [answer for answer in joined if answer.status_code == 200]
    refused = [answer for answer in joined if answer.status_code == 503]
    assert len(taken) + len(refused) == 8 and refused and "full" in refused[0].text
    for answer in taken:
        events = httpx.get(api(server, f"call/say/{answer.json()['event_id']}"), timeout=300).text
        assert "event: complete" in events


def test_a_login_can_be_asked_for(random_folder):
    import httpx

    from visualrwkv.demo.app import Server

    server = Server([str(random_folder)], auth=[("anna", "secret")])
    try:
        assert httpx.get(f"{server.url}config").status_code == 401
        assert httpx.post(api(server, "call/say"), json={"data": []}).status_code == 401
        with httpx.Client() as person:
            wrong = person.post(f"{server.url}login", data={"username": "anna", "password": "guess"})
            assert wrong.status_code == 400
            assert person.post(f"{server.url}login", data={"username": "anna", "password": "secret"}).status_code == 200
            assert person.get(f"{server.url}config").status_code == 200
        with pytest.raises(InputError, match="port"):
            Server([str(random_folder)], port=int(server.url.rstrip("/").rpartition(":")[2]))
    finally:
        server.close()


def test_an_address_of_ipv6(random_folder):
    import httpx

    from visualrwkv.demo.app import Server

    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("needs IPv6")
    server = Server([str(random_folder)], host="::1")
    try:
        assert server.url.startswith("http://[::1]:") and httpx.get(server.url).status_code == 200
    finally:
        server.close()


# The command.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--auth", "anna"], "USER:PASSWORD"),
        (["--port", "70000"], "--port is 70000"),
        (["--sessions", "0"], "--sessions is 0"),
        (["--max-upload", "-1"], "--max-upload is -1"),
        (["--model", "nowhere/at all"], "nowhere/at all"),
        (["--host", "203.0.113.5"], "203.0.113.5"),  # of nobody's machine
        (["--host", "a..b"], "a..b"),
    ],
)
def test_wrong_calls_are_one_line(capsys, options, words):
    assert cli.main(["demo", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and words in captured.err and captured.err.count("\n") == 1


def test_the_command_serves_on_this_machine_alone_and_cleans_up(random_folder, tmp_path):
    import httpx

    demo = subprocess.Popen(
        [sys.executable, "-m", "visualrwkv.cli", "demo", "--model", str(random_folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a demo within this process has claimed Gradio's folder for itself
        env={**os.environ, "TMPDIR": str(tmp_path), "GRADIO_TEMP_DIR": str(tmp_path)},
    )
    try:
        line = demo.stdout.readline()
        url = re.fullmatch(r"VisualRWKV is at (http://127\.0\.0\.1:\d+/)\n", line)[1]
        assert httpx.get(url).status_code == 200
        assert list(tmp_path.glob("visualrwkv-demo-*"))
    finally:
        while demo.poll() is None:  # an impatient one
            demo.send_signal(signal.SIGTERM)
            time.sleep(0.02)
        out, err = demo.communicate(timeout=60)
    assert (demo.returncode, out, err) == (143, "", "") and not list(tmp_path.glob("visualrwkv-demo-*"))
