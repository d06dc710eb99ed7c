"""uvicorn as the endpoint needs it: clients that keep it waiting make room, and an end leaves nobody without an answer.

uvicorn waits without end for the first request of a connection, for the rest of the lines above a body, and for a
client to read its answer. A crowd of such clients would take all tickets, or all files that the process may open:
nobody else could connect then, and asyncio writes thousands of tracebacks a second.
"""

import asyncio
import json

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from visualrwkv.serving.requests import Refused

CLIENT_SECONDS = 60  # for the lines of a request above its body, and for reading what was sent
AT_ONCE = 384  # connections, if the tickets of the server need no more; a process may often open 1,024 files
BACKLOG = 160  # connections that are accepted in one go; a few times as many come before the first is counted


class Connection(H11Protocol):
    """Closes when its client lets it wait for too long; one too many at once takes the place of the one that waits
    longest."""

    _late = None  # runs out while the client is waited for

    def connection_made(self, transport):
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > max(AT_ONCE, 2 * self.config.app.state.service.places):
            waiting = (other for other in self.connections if other._late)
            min(waiting, key=lambda other: other._late.when()).cut()

    def connection_lost(self, exc):
        super().connection_lost(exc)
        self._stop_watch()

    def handle_events(self):
        super().handle_events()
        self._watch()

    def on_response_complete(self):
        super().on_response_complete()
        self._watch()

    def pause_writing(self):
        super().pause_writing()
        self._watch()

    def resume_writing(self):
        super().resume_writing()
        self._stop_watch()  # it has read something
        self._watch()

    def _watch(self):
        # Nothing is being answered, or what is sent is not read. Also where a connection is to close behind an answer
        # that is not read, or where the rest of a request that was refused is still to come.
        waits = self.cycle is None or self.cycle.response_complete or self.flow.write_paused
        if waits and not self._late:
            self._late = self.loop.call_later(CLIENT_SECONDS, self.cut)
        elif not waits:
            self._stop_watch()

    def _stop_watch(self):
        if self._late:
            self._late.cancel()
            self._late = None

    def cut(self):
        """Close without waiting for the client; a reply of which it was reading leaves as if it had gone."""
        self.transport.abort()
        self._stop_watch()

    def send_400_response(self, msg):
        """An error in OpenAI's form, where an answer can still begin."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(Refused(400, "the request is not valid HTTP").body).encode()
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
            response = h11.Response(status_code=400, headers=list(headers.items()), reason=b"Bad Request")
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()

    def _unsupported_upgrade_warning(self):
        """Whoever asks for a WebSocket is answered as if by plain HTTP; uvicorn would advise to install something."""


class Server(uvicorn.Server):
    """Ends at the first Ctrl-C with its replies, at the second one at once."""

    async def shutdown(self, sockets=None):
        """Shortly before connections are closed, replies still under way end with an error that says why."""
        seconds = 0.9 * self.config.timeout_graceful_shutdown
        ending = asyncio.create_task(self._end_replies(seconds))
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
        if self.force_exit:  # what uvicorn leaves to be cancelled, each with a traceback
            await self._end_replies()
            if tasks := set(self.server_state.tasks):
                _, late = await asyncio.wait(tasks, timeout=1)
                for task in late:
                    task.cancel()
            await self.lifespan.shutdown()

    async def _end_replies(self, seconds=0.0):
        await asyncio.sleep(seconds)
        await asyncio.get_running_loop().run_in_executor(None, self.config.app.state.service.engine.close)
        for connection in list(self.server_state.connections):
            if connection.transport.get_write_buffer_size():  # its client does not read, not even this
                connection.cut()
