"""uvicorn's HTTP/1.1 protocol with one thing added: a deadline for receiving the head of a request.

uvicorn itself waits for ever on a connection that sends nothing, or its headers byte by byte.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar, Self

from uvicorn.protocols.http.h11_impl import H11Protocol


class DeadlineProtocol(H11Protocol):
    """Closes a connection whose next request head does not arrive whole within `deadline_s` of its start.

    The start is the connection itself, and after an answer the first byte of the next request; the wait in
    between is bounded by uvicorn's keep-alive timeout.
    """

    deadline_s: ClassVar[float] = 10.0
    _deadline: asyncio.TimerHandle | None = None

    @classmethod
    def with_deadline(cls, deadline_s: float) -> type[Self]:
        """Return the protocol class with another deadline in seconds."""
        return type(cls.__name__, (cls,), {"deadline_s": deadline_s})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the first deadline."""
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        """Receive, and see whether a request's head is complete."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._disarm()
        elif self._deadline is None:
            self._arm()

    def on_response_complete(self) -> None:
        """Wait for the next request under the keep-alive timeout alone."""
        self._disarm()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadline."""
        self._disarm()
        super().connection_lost(exc)

    def _arm(self) -> None:
        self._deadline = self.loop.call_later(self.deadline_s, self.transport.abort)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
