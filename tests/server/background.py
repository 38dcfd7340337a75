"""Requests beside those of a test."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import httpx

from tests.server.running import Running


class Background:
    """Requests in threads of their own."""

    def __init__(self, server: Running) -> None:
        self.server = server
        self.pool = ThreadPoolExecutor(16)

    def post(self, **body: object) -> Future[httpx.Response]:
        return self.pool.submit(lambda: httpx.post(f"{self.server.url}/generate", json=body, timeout=60))
