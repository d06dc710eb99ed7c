"""Where a server listens: the same words and checks for `visualrwkv serve` and `visualrwkv demo`."""

import socket

from visualrwkv.errors import InputError


def bind(host: str, port: int | None) -> socket.socket:
    """A listening socket; port None or 0 takes any free one.

    Raises:
        InputError: no such host, an address of another machine, or a port that is taken.
    """
    try:
        family = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port or 0), family=family, backlog=1024)
    except (OSError, OverflowError, UnicodeError) as error:  # UnicodeError: no name of a host
        reason = getattr(error, "strerror", None) or error
        place = host if port is None else f"{host}, port {port}"
        raise InputError(f"{place}: cannot be listened on ({reason}); pass another --host or --port") from None


def is_local(host: str) -> bool:
    """Whether only this machine reaches a server there."""
    return host in ("127.0.0.1", "localhost", "::1")


def in_address(host: str) -> str:
    """A host as it stands in an address: of IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host
