"""When a request ends, in whatever way, its unfinished jobs are cancelled and counted."""

from __future__ import annotations

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from server.metrics import Failure, Metrics


class CancelUnfinished:
    """Cancels the jobs of a request that are not finished when it ends: nobody waits for them any more.

    A client that goes, a frame that cannot be made and an answer that is never begun all end here, so that nothing that
    holds a job need think of them. The rows are free within a step. A job whose end the metrics do not tell counts as
    cancelled, also if the engine had finished it; or as an internal error, if one has ended the request.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        """Surround an app.

        Args:
            app: what answers; it notes its jobs in the state of the request, as ``jobs``.
            metrics: where to count.
        """
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        reason: Failure = "cancelled"
        try:
            await self.app(scope, receive, send)
        except ClientDisconnect:
            raise
        except Exception:
            reason = "internal_error"
            raise
        finally:
            for job in scope.get("state", {}).get("jobs", []):
                job.done.cancel()
                if not job.counted:
                    self._metrics.fail(job.model, reason)
