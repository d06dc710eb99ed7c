"""uvicorn as the endpoint needs it: connections over which nothing is asked make room, and an end leaves nobody without
an answer.

uvicorn waits without end for the first request of a connection, and for the rest of the lines above a body. A crowd of
silent clients would take all files that the process may open; nobody else could connect then, and asyncio writes
thousands of tracebacks a second.
"""

import asyncio

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 60  # for the lines of a request above its body
AT_ONCE = 384  # connections, if the tickets of the server need no more; a process may often open 1,024 files
BACKLOG = 160  # connections that are accepted in one go; a few times as many come before the first is counted


class Connection(H11Protocol):
    """Closes when no request arrives in time; one too many at once takes the place of the one that waits longest."""

    _late = None  # runs out while a request is waited for

    def connection_made(self, transport):
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > max(AT_ONCE, 2 * self.config.app.state.service.places):
            waiting = (other for other in self.connections if other._late)
            min(waiting, key=lambda other: other._late.when())._end()

    def connection_lost(self, exc):
        super().connection_lost(exc)
        self._watch()

    def handle_events(self):
        super().handle_events()
        self._watch()

    def _watch(self):
        # idle: between two requests, or the lines above a body are not complete
        waits = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        if waits and not self._late:
            self._late = self.loop.call_later(HEAD_SECONDS, self._end)
        elif self._late and not waits:
            self._late.cancel()
            self._late = None

    def _end(self):
        self.transport.abort()
        self._watch()


class Server(uvicorn.Server):
    """Ends at the first Ctrl-C with its replies, at the second one at once."""

    async def shutdown(self, sockets=None):
        """Shortly before connections are cut, replies still under way end with an error that says why."""
        loop, engine = asyncio.get_running_loop(), self.config.app.state.service.engine
        seconds = 0.9 * self.config.timeout_graceful_shutdown
        timer = loop.call_later(seconds, lambda: loop.run_in_executor(None, engine.close))
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
        if self.force_exit:  # what uvicorn leaves to be cancelled, each with a traceback
            await loop.run_in_executor(None, engine.close)
            if tasks := set(self.server_state.tasks):
                _, late = await asyncio.wait(tasks, timeout=1)
                for task in late:
                    task.cancel()
            await self.lifespan.shutdown()
