"""uvicorn's HTTP/1.1 protocol with deadlines for both directions, and with our shape of errors.

uvicorn itself waits for ever on a connection that sends nothing, or its headers byte by byte, and on one that
does not read its answers.
"""

from __future__ import annotations

import asyncio
import socket
from typing import ClassVar, Self

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.http.access import MAX_HEADER_BYTES, note_request, request_id_of
from server.http.errors import ApiError, new_request_id
from server.http.http_metrics import OTHER, HttpMetrics

# The kernel tells of room in its send buffer only when about a third is free, and on a fast network the buffer
# grows to megabytes: a client that reads slowly would seem not to read at all. It also is memory held for it.
SEND_BUFFER_BYTES = 2**17


class DeadlineProtocol(H11Protocol):
    """Closes a connection whose client does not do its part within `deadline_s`, or that rests while others wait.

    Receiving: the head of a request must arrive whole within the deadline of its start. The start is the
    connection itself, and after an answer the first byte of the next request; the wait in between is bounded
    by uvicorn's keep-alive timeout. Sending: while bytes wait for room in the kernel's send buffer, some of
    them must leave in each such time, so a client has to read about a third of that buffer in it.

    When there are more than `max_connections`, the one that has rested longest is closed for each new one: one that
    waits between requests, has not sent a whole head, or does not read the rest of its answer. If none rests, the new
    one stays, and its requests are refused (`server.http.crowd`).
    """

    deadline_s: ClassVar[float] = 10.0
    max_connections: ClassVar[int] = 1024
    metrics: ClassVar[HttpMetrics | None] = None
    _deadline: asyncio.TimerHandle | None = None
    _send_deadline: asyncio.TimerHandle | None = None
    _rests_since_s = 0.0

    @classmethod
    def with_bounds(
        cls, deadline_s: float, max_connections: int, metrics: HttpMetrics | None = None
    ) -> type[Self]:
        """Return the protocol class with other bounds.

        Args:
            deadline_s: see the class.
            max_connections: see there.
            metrics: where it counts what is not HTTP, and connections that it closes for others.
        """
        bounds = {"deadline_s": deadline_s, "max_connections": max_connections, "metrics": metrics}
        return type(cls.__name__, (cls,), bounds)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the first deadline."""
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        # asyncio does so only for sockets whose protocol number is written out, which that of a listener of ours is
        # not. Without it the body of an answer waits for the acknowledgement of its head: 40 ms.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Writing counts as paused while anything waits: otherwise a small answer that nobody reads would go
        # unnoticed, and hold the connection open even after it was closed on our side.
        transport.set_write_buffer_limits(high=0)
        self._rests_since_s = self.loop.time()
        self._arm()
        if len(self.connections) > self.max_connections:
            self._make_room()

    def _make_room(self) -> None:
        """Close the connection that has rested longest, first of those that wait for nothing but a request."""
        others = [
            each for each in self.connections if isinstance(each, DeadlineProtocol) and each is not self
        ]
        resting = [each for each in others if each.rests]
        if resting:
            chosen = min(resting, key=lambda each: (each.has_unsent, each._rests_since_s))
            chosen.transport.abort()
            if self.metrics is not None:
                self.metrics.connections_closed.inc()

    @property
    def rests(self) -> bool:
        """Whether no request is at work on this connection."""
        return not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete)

    @property
    def has_unsent(self) -> bool:
        """Whether a part of an answer waits for its client to read on."""
        return self.transport.get_write_buffer_size() > 0

    def data_received(self, data: bytes) -> None:
        """Receive, and see whether a request's head is complete."""
        if data[:2] == b"\r\n" and self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            # An empty line before a request is none of it (RFC 9112, section 2.2); h11 would refuse it.
            data = data[2:]
            if not data:  # to h11 that is the end of the connection
                return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._disarm()
        elif self._deadline is None:
            self._arm()

    def pause_writing(self) -> None:
        """Start the deadline for sending."""
        super().pause_writing()
        self._arm_send()

    def resume_writing(self) -> None:
        """End the deadline for sending: all is sent."""
        self._disarm_send()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP in the one shape of errors, if no answer is on its way already."""
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            error = ApiError(
                400,
                "invalid_http",
                f"this is not a valid HTTP/1.1 request, or its head is over {MAX_HEADER_BYTES} bytes",
                headers={"Connection": "close", "X-Request-Id": self._note_invalid()},
            ).response()
            head = h11.Response(status_code=400, headers=error.raw_headers, reason=b"Bad Request")
            for event in (head, h11.Data(data=bytes(error.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            if self.cycle is not None and not self.cycle.response_complete:
                # It may just begin, and has nobody left to answer. What it was answered, its line in the log tells.
                self.cycle.scope["state"]["invalid_http"] = True
                self.cycle.disconnected = True
                self.cycle.message_event.set()
        self.transport.close()

    def _note_invalid(self) -> str:
        """Return the id of what is not HTTP; write its line and count it, unless it is the rest of a request."""
        if self.cycle is not None and not self.cycle.response_complete:
            return request_id_of(dict(self.cycle.scope))  # which has a line of its own
        request_id = new_request_id()
        if self.metrics is not None:
            client = {"client": self.client[0]} if self.client else {}
            note_request(self.metrics, request_id, OTHER, OTHER, 400, 0.0, client)
        return request_id

    def on_response_complete(self) -> None:
        """Wait for the next request under the keep-alive timeout alone."""
        self._rests_since_s = self.loop.time()
        self._disarm()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadlines."""
        self._disarm()
        self._disarm_send()
        super().connection_lost(exc)

    def _arm(self) -> None:
        self._deadline = self.loop.call_later(self.deadline_s, self.transport.abort)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _arm_send(self) -> None:
        unsent_bytes = self.transport.get_write_buffer_size()
        self._send_deadline = self.loop.call_later(self.deadline_s, self._check_sent, unsent_bytes)

    def _check_sent(self, unsent_before_bytes: int) -> None:
        """Go on waiting for a client that reads; cut off one that does not."""
        if self.transport.get_write_buffer_size() < unsent_before_bytes:
            self._arm_send()
        else:
            self.transport.abort()

    def _disarm_send(self) -> None:
        if self._send_deadline is not None:
            self._send_deadline.cancel()
            self._send_deadline = None
