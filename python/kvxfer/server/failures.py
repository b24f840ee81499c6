# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""How an attempt at a request fails, and what a worker's HTTP refusal means for the next one."""

from __future__ import annotations

import httpx
import msgspec

from kvxfer.server.pool import WorkerView
from kvxfer.server.wire import RequestRefusedError

__all__ = ["AttemptFailedError", "refusal_of_worker"]


class AttemptFailedError(Exception):
    """No answer will come of this attempt. ``culprits`` are the workers that a retry should avoid."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        retryable: bool,
        culprits: tuple[WorkerView, ...] = (),
        refusal: RequestRefusedError | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retryable = retryable
        self.culprits = culprits
        self.refusal = refusal


def refusal_of_worker(
    view: WorkerView, response: httpx.Response, content: bytes
) -> AttemptFailedError:
    """A worker's status as ours: 4xx about the request is final, the rest may go better elsewhere."""
    status = response.status_code
    try:
        told = msgspec.json.decode(content)["error"]
        message, code, param = str(told["message"]), str(told["code"]), told.get("param")
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError):
        message, code, param = content[:200].decode(errors="replace"), "refused", None
    if status in (400, 413, 422):
        refusal = RequestRefusedError(status, message, code=code, param=param)
        return AttemptFailedError(code, message, retryable=False, refusal=refusal)
    message = f"{view.role} worker {view.id} answered {status}: {message}"
    retry_after = response.headers.get("retry-after", "")
    refusal = RequestRefusedError(
        503,
        message,
        code=code,
        retry_after_s=float(retry_after) if retry_after.isdigit() else 1.0,
    )
    return AttemptFailedError(code, message, retryable=True, culprits=(view,), refusal=refusal)
