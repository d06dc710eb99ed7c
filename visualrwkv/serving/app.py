"""HTTP around the engine: OpenAI's chat completions, the list of models, health.

Every request that is let in holds a ticket; there are as many as slots and places in the queue, so what a crowd of
clients can make the server hold is bounded, and the next one is told to come back later.
"""

import asyncio
import contextlib
import hmac
import json
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from visualrwkv.addresses import bind, in_address
from visualrwkv.serving.engine import Engine, ServedReply, ShuttingDown
from visualrwkv.serving.pictures import PictureReader
from visualrwkv.serving.requests import ChatRequest, Limits, Refused, check_prompt, parse

BODY_SECONDS = 60  # for sending a request
READ_ON = 256 * 2**20  # bytes of a request that is too large: a client that still writes would not see the answer
SHUTDOWN_SECONDS = 10  # for replies under way after Ctrl-C
RETRY_AFTER = "1"  # seconds


@dataclass(frozen=True)
class Settings:
    """Of one server.

    Args:
        model: name under which clients ask for the model.
        slots: replies under way together.
        queue: requests that may wait beside them.
        api_key: what clients have to send; None lets everybody in.
        limits: of one request.
    """

    model: str
    slots: int = 32
    queue: int = 64
    api_key: str | None = None
    limits: Limits = field(default_factory=Limits)


def build_app(vlm, settings: Settings) -> Starlette:
    """The application that answers with `vlm`; `app.state.service` holds its `Service`."""
    service = Service(vlm, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        service.close()

    async def refused(request, error):
        return JSONResponse(error.body, error.status, error.headers)

    async def failed(request, error):
        return JSONResponse(Refused(500, "the server failed; its log says why").body, 500)

    async def no_such_page(request, error):
        message = f"{request.method} {request.url.path}: {error.detail}; see /v1/models and /v1/chat/completions"
        return JSONResponse(Refused(error.status_code, message).body, error.status_code, error.headers)

    async def health(request):
        running, waiting = service.engine.load
        status = {"status": "ok" if service.engine.alive else "failed", "running": running, "waiting": waiting}
        return JSONResponse(status | {"tickets": service.tickets}, 200 if service.engine.alive else 503)

    async def models(request):
        service.check_key(request)
        return JSONResponse({"object": "list", "data": [service.card]})

    async def model(request):
        service.check_key(request)
        name = request.path_params["name"]
        if name != settings.model:
            message = f"the model {name[:80]!r} does not exist; this server has {settings.model!r}"
            raise Refused(404, message, "model", "model_not_found")
        return JSONResponse(service.card)

    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
        ],
        exception_handlers={Refused: refused, HTTPException: no_such_page, Exception: failed},
        lifespan=lifespan,
    )
    app.state.service = service
    return app


class Service:
    """From a request to its response."""

    def __init__(self, vlm, settings: Settings):
        self.engine = Engine(vlm, settings.slots, self._hand_over)
        self.places = self.tickets = settings.slots + settings.queue
        self.card = {"id": settings.model, "object": "model", "created": int(time.time()), "owned_by": "visualrwkv"}
        self._processor, self._settings, self._limits = vlm.processor, settings, settings.limits
        self._reader = PictureReader(self._processor.image_processor, self._limits, self.engine.recent)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told: list[tuple[asyncio.Queue, tuple[str, object]]] = []  # by the engine's thread

    def close(self) -> None:
        self.engine.close()
        self._reader.close()

    def check_key(self, request: Request) -> None:
        key = self._settings.api_key
        scheme, _, sent = request.headers.get("authorization", "").partition(" ")
        if key is not None and not (scheme.lower() == "bearer" and hmac.compare_digest(sent.encode(), key.encode())):
            raise Refused(401, "the API key is missing or wrong", code="invalid_api_key")

    async def chat(self, request: Request):
        self.check_key(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page in a browser can send other types to any server, unasked
            raise Refused(415, "the Content-Type must be application/json")
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.strip().lower() != "identity":
            raise Refused(415, f"the Content-Encoding {encoding} is not supported; send the body as it is")
        if not self.tickets:
            with contextlib.suppress(Refused):
                await self._body(request, keep=False)  # a client that is still writing would not read the answer
            message = "all slots and all places in the queue are taken; try again later"
            raise Refused(429, message, code="overloaded", headers={"Retry-After": RETRY_AFTER})
        self.tickets -= 1
        ticket = _Ticket(self)
        try:
            return await _unless_gone(request, self._answer(await self._body(request), ticket))
        except ClientDisconnect:
            return JSONResponse(None, 499)  # nobody reads it
        except asyncio.CancelledError:  # the time to end is over, and the request has not even arrived
            raise _shutting_down() from None
        finally:
            ticket.hand_back_unless_streaming()

    async def _answer(self, body: bytes, ticket: "_Ticket"):
        self._loop = asyncio.get_running_loop()
        # not by the threads that open pictures: a question without any does not wait for those of others
        asked, ids = await self._loop.run_in_executor(None, self._check, body)
        del body
        pictures = await self._reader.read(asked.sources)
        events: asyncio.Queue = asyncio.Queue()

        def tell(text, finish):
            if asked.stream or finish:  # nobody waits for the pieces of an answer that is sent as a whole
                self._told.append((events, (text, finish)))

        reply = ServedReply(self._processor.tokenizer, asked.sampling, ids, pictures, tell)
        completion = _Completion(self._settings.model, len(ids), asked)
        if asked.stream:
            ticket.streaming = True
            return _Stream(
                self._stream(reply, events, completion, ticket),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
                ticket=ticket,
            )
        text, finish = await self._whole(reply, events)
        return JSONResponse(completion.whole(text, finish, len(reply.tokens)))

    def _hand_over(self):
        """What the replies were told since the last call, to the thread that answers; waking it takes long."""
        told, self._told = self._told, []

        def put():
            for events, event in told:
                events.put_nowait(event)

        if told:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                self._loop.call_soon_threadsafe(put)

    def _check(self, body: bytes):
        asked = parse(body, self._settings.model, self._limits)
        return asked, check_prompt(asked, self._processor, self._limits)

    async def _body(self, request: Request, keep: bool = True) -> bytes:
        """The body within its limit; what is beyond it is read on for a while and thrown away."""
        limit, size, chunks = self._limits.body_bytes, 0, []
        too_large = Refused(
            413, f"the request is larger than {limit / 2**20:g} MiB; send smaller pictures", code="request_too_large"
        )
        declared = request.headers.get("content-length", "")
        if "expect" in request.headers and declared.isdecimal() and int(declared) > limit:
            raise too_large  # the client has asked before it sends

        async def read():
            nonlocal size
            async for chunk in request.stream():
                size += len(chunk)
                if keep and size <= limit:
                    chunks.append(chunk)
                else:
                    chunks.clear()
                if size > max(limit, READ_ON):
                    break

        try:
            await asyncio.wait_for(read(), BODY_SECONDS)
        except TimeoutError:
            raise Refused(408, f"the request did not arrive within {BODY_SECONDS} s") from None
        if size > limit:
            raise too_large
        return b"".join(chunks)

    async def _pieces(self, reply: ServedReply, events: asyncio.Queue) -> AsyncIterator[tuple[str, str | None]]:
        """(text, finish) from the engine; leaving early frees the slot."""
        try:
            self.engine.submit(reply)
            while True:
                text, finish = await events.get()
                if isinstance(finish, ShuttingDown):
                    raise finish
                if isinstance(finish, Exception):
                    print(f"visualrwkv: a reply failed: {finish!r}", file=sys.stderr)
                    raise Refused(500, "the reply failed in the server; its log says why")
                yield text, finish
                if finish:
                    return
        except ShuttingDown:
            raise _shutting_down() from None
        finally:
            reply.cancelled.set()

    async def _whole(self, reply, events):
        async with contextlib.aclosing(self._pieces(reply, events)) as pieces:
            finish = [ended async for _, ended in pieces][-1]
        return reply.text, finish

    async def _stream(self, reply, events, completion, ticket):
        try:
            yield completion.event({"role": "assistant", "content": ""})
            try:
                async with contextlib.aclosing(self._pieces(reply, events)) as pieces:
                    async for text, finish in pieces:
                        if text:
                            yield completion.event({"content": text})
                        if finish:
                            yield completion.event({}, finish)
                if completion.include_usage:
                    yield completion.usage_event(len(reply.tokens))
            except Refused as error:
                yield f"data: {json.dumps(error.body)}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            ticket.hand_back()


class _Ticket:
    """The right of one request to be in the server."""

    def __init__(self, service: Service):
        self._service, self._held = service, True
        self.streaming = False  # the response hands it back

    def hand_back(self) -> None:
        if self._held:
            self._held = False
            self._service.tickets += 1

    def hand_back_unless_streaming(self) -> None:
        if not self.streaming:
            self.hand_back()


class _Stream(StreamingResponse):
    """Closes its events whatever ends the response, at once; a generator alone waits for the garbage collector."""

    def __init__(self, content, *, ticket: _Ticket, **options):
        super().__init__(content, **options)
        self._events, self._ticket = content, ticket

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            self._ticket.hand_back()  # a generator that was never started does not run its end


class _Completion:
    """The JSON of one completion."""

    def __init__(self, model: str, prompt_tokens: int, asked: ChatRequest):
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._prompt_tokens = prompt_tokens
        self.include_usage = asked.include_usage

    def _usage(self, count: int) -> dict:
        total = self._prompt_tokens + count
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": count, "total_tokens": total}

    def whole(self, text: str, finish: str, count: int) -> dict:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
        return self._head | {"object": "chat.completion", "choices": [choice], "usage": self._usage(count)}

    def event(self, delta: dict, finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return self._event([choice], {"usage": None} if self.include_usage else {})

    def usage_event(self, count: int) -> str:
        return self._event([], {"usage": self._usage(count)})

    def _event(self, choices: list, more: dict) -> str:
        chunk = self._head | {"object": "chat.completion.chunk", "choices": choices} | more
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


def _shutting_down() -> Refused:
    return Refused(503, "the server is shutting down; try again later", code="shutting_down")


async def _unless_gone(request: Request, work: Coroutine):
    """What the work comes to. It is cancelled when the client goes first; the request must have been read."""

    async def gone():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


def make_server(vlm, settings: Settings):
    """A uvicorn server; `run(sockets=[...])` serves until Ctrl-C."""
    import uvicorn

    from visualrwkv.serving.server import BACKLOG, CLIENT_SECONDS, Connection, Server

    config = uvicorn.Config(
        build_app(vlm, settings),
        http=Connection,
        ws="none",
        backlog=BACKLOG,
        log_level="warning",
        timeout_keep_alive=CLIENT_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    return Server(config)


def serve(vlm, settings: Settings, listener: socket.socket) -> None:
    """Serve on a listening socket until Ctrl-C; replies under way get some seconds to end."""
    host, port = listener.getsockname()[:2]
    print(f"{settings.model} on http://{in_address(host)}:{port}/v1; Ctrl-C ends", file=sys.stderr, flush=True)
    make_server(vlm, settings).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address, before any model is loaded; InputError if it cannot be had."""
    listener = bind(host, port)
    # Connections take it over. Without it the body of an answer waits 40 ms for the client to confirm its headers.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
