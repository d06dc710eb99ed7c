"""A gate in front of the server for what the app never needs: fetching addresses for others, and huge requests."""

import json
from urllib.parse import unquote

MAX_JSON = 2**20  # bytes of a request that is no upload: a message and the settings


class Guard:
    """ASGI middleware that answers such requests itself.

    Gradio serves `file=<address>` and `proxy=<address>` by fetching the address, and does the same for an address in
    place of an uploaded file. Nothing here uses that, and nobody should be able to send this server somewhere. Bodies
    are counted as they arrive, whatever their header says.

    Args:
        app: the ASGI app behind it.
        max_upload: bytes of the largest upload.
    """

    def __init__(self, app, max_upload: int):
        self.app, self.max_upload = app, max_upload

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = unquote(scope["path"]).lower()
        if "proxy=" in path or any(f"file={scheme}" in path for scheme in ("http:", "https:")):
            await _refuse(send, 403, "This server fetches no addresses.")
            return
        headers = dict(scope["headers"])
        upload = headers.get(b"content-type", b"").startswith(b"multipart/")
        limit = self.max_upload if upload else MAX_JSON
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > limit:
            await _refuse(send, 413, _too_large(limit))
        elif upload:
            await self._counted(scope, receive, send, limit)
        else:
            await self._looked_at(scope, receive, send, limit)

    async def _counted(self, scope, receive, send, limit):
        """Pass on an upload as it comes; a client that sends more than it declared is cut off."""
        read = 0

        async def counting():
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            return message if read <= limit else {"type": "http.disconnect"}

        await self.app(scope, counting, send)

    async def _looked_at(self, scope, receive, send, limit):
        """Read a short body, look at it, pass it on."""
        body, more = b"", scope["method"] not in ("GET", "HEAD")
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > limit:
                await _refuse(send, 413, _too_large(limit))
                return
        if _names_an_address(body):
            await _refuse(send, 403, "This server fetches no addresses; download the file and upload it.")
            return
        passed_on = False

        async def again():
            nonlocal passed_on
            if passed_on or not body:
                return await receive()
            passed_on = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)


def _names_an_address(body: bytes) -> bool:
    """Whether JSON holds an address in place of a file's path."""
    try:
        pending = [json.loads(body)] if body else []
    except (ValueError, RecursionError):  # for the app to refuse
        return False
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if "://" in str(value.get("path", "")):
                return True
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
    return False


def _too_large(limit):
    return f"The request is too large; the limit is {limit / 2**20:.0f} MiB."


async def _refuse(send, status, words):
    body = words.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
