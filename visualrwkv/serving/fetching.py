"""Fetching a picture from the web for a client who is not trusted: only from the public internet, within limits."""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
from urllib.parse import urlsplit

from visualrwkv.errors import InputError


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the open internet: not this machine, not its network, not a reserved range."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            inner = ipaddress.ip_address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner)) and ip.is_global
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def fetch(url: str, most: int, seconds: float) -> bytes:
    """The bytes behind an address on the web.

    The connection goes to the very address that was checked, so a name that changes its meaning in between leads
    nowhere; redirects are refused.

    Args:
        most: bytes.
        seconds: for all of it, whatever the other end does to make it last.

    Raises:
        InputError: no public address, another status than 200, or more bytes.
        TimeoutError: it took longer.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM) if host else []
    except (ValueError, OSError):
        found = []
    addresses = [entry[4][0] for entry in found]
    if not addresses:
        raise InputError("the address of the picture leads to no host")
    if not all(map(is_public, addresses)):
        raise InputError("the address of the picture is not on the public internet; send a data URI")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not target.isascii() or any(character <= " " for character in target):
        raise InputError("the address of the picture holds characters that must be percent-encoded")
    if seconds <= 0:
        raise TimeoutError
    connection = http.client.HTTPConnection(host, port)
    late = threading.Event()
    clock = None
    try:
        raw = socket.create_connection((addresses[0], port), timeout=seconds)
        connection.sock = raw

        def give_up():
            late.set()
            with contextlib.suppress(OSError):  # the other end may have closed it
                raw.shutdown(socket.SHUT_RDWR)

        clock = threading.Timer(seconds, give_up)
        clock.daemon = True
        clock.start()
        if parts.scheme == "https":
            secure = ssl.create_default_context().wrap_socket(raw, server_hostname=host, do_handshake_on_connect=False)
            raw = connection.sock = secure  # before the handshake, which must not last longer either
            if late.is_set():  # the clock has shut the socket that was
                raise TimeoutError
            secure.do_handshake()
        connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "visualrwkv"})
        answer = connection.getresponse()
        if answer.status != 200:
            more = "; redirects are not followed" if 300 <= answer.status < 400 else ""
            raise InputError(f"the host of the picture answers with status {answer.status}{more}")
        data = answer.read(most + 1)
    except (OSError, http.client.HTTPException) as error:
        if late.is_set() or isinstance(error, TimeoutError):
            raise TimeoutError from None
        raise InputError(f"the picture could not be fetched: {type(error).__name__}") from None
    finally:
        if clock:
            clock.cancel()
        connection.close()
    if late.is_set():
        raise TimeoutError
    if len(data) > most:
        raise InputError(f"the picture is larger than {most / 2**20:g} MiB")
    return data
