"""Pictures that the endpoint fetches from the web, where that is allowed: from the public internet, within limits."""

import contextlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from visualrwkv.errors import InputError
from visualrwkv.image_processing import load_image
from visualrwkv.serving import fetching, requests
from visualrwkv.serving.pictures import fetch_allowed

PRIVATE = """127.0.0.1 10.0.0.1 192.168.1.1 172.16.0.1 169.254.169.254 0.0.0.0 100.64.0.1 224.0.0.1 255.255.255.255 ::1
:: fe80::1 fe80::1%eth0 fd00::1 ::ffff:127.0.0.1 2002:7f00:1:: 64:ff9b::7f00:1"""


@pytest.mark.parametrize("address", PRIVATE.split())
def test_addresses_that_are_not_public(address):
    assert not fetching.is_public(address)


def test_public_addresses():
    assert fetching.is_public("1.1.1.1") and fetching.is_public("2606:4700:4700::1111")


REMOTE = requests.Limits(remote_images=True, remote_bytes=20_000, remote_seconds=1.0)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.1", "2130706433", "0x7f000001"])
def test_the_own_machine_is_not_fetched_from(host):
    with pytest.raises(InputError, match="public internet|no host"):
        fetch_allowed(f"http://{host}:1/picture.png", REMOTE, REMOTE.remote_seconds)


@pytest.fixture
def web(picture_file, monkeypatch):
    """A web server whose address counts as public."""

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/picture")
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            if self.path == "/slow":
                for _ in range(40):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
            self.wfile.write(b"x" * 30_000 if self.path == "/large" else picture_file.read_bytes())

        def log_message(self, *_):
            pass

    monkeypatch.setattr(fetching, "is_public", lambda address: True)
    server = HTTPServer(("127.0.0.1", 0), Pages)
    server.handle_error = lambda *_: None  # clients that give up are what is tested
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_remote_pictures_within_limits(web, pictures):
    assert load_image(fetch_allowed(web + "/picture", REMOTE, REMOTE.remote_seconds)).tobytes() == pictures[0].tobytes()
    for page, words in (("/moved", "redirects"), ("/large", "larger"), ("/slow", "more than 1 s")):
        with pytest.raises(InputError, match=words):
            fetch_allowed(web + page, REMOTE, REMOTE.remote_seconds)
    for seconds, words in ((0, "more than 1 s"), (0.2, "more than 1 s")):  # what others of the request have left
        with pytest.raises(InputError, match=words):
            fetch_allowed(web + "/slow", REMOTE, seconds)
    for address in ("http://", "http://:80/", "http://[::1", "http://127.0.0.1:99999/", "https://a b/"):
        with pytest.raises(InputError, match="no host"):
            fetch_allowed(address, REMOTE, REMOTE.remote_seconds)


def test_a_handshake_that_never_ends(monkeypatch):
    """A host that says a byte now and then keeps any limit of a single wait."""
    monkeypatch.setattr(fetching, "is_public", lambda address: True)
    host, heard = socket.create_server(("127.0.0.1", 0)), []

    def drip():
        client, _ = host.accept()
        with client, contextlib.suppress(OSError):
            client.sendall(b"\x16\x03\x03\x40\x00")  # the head of a record of 16 KiB
            for _ in range(100):
                client.sendall(b"\x02")
                heard.append(1)
                time.sleep(0.1)

    thread = threading.Thread(target=drip)
    thread.start()
    with pytest.raises(InputError, match="more than 1 s"):
        fetch_allowed(f"https://127.0.0.1:{host.getsockname()[1]}/", REMOTE, REMOTE.remote_seconds)
    thread.join()
    assert len(heard) < 100  # the connection was cut
    host.close()
