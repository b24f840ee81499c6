# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Tables from the host to a device, which nobody waits for."""

from __future__ import annotations

import sys
from typing import Any

from kvxfer.kernels._arrays import Array

__all__ = ["upload"]

# The tables of copies that CUDA graphs hold: a replay reads them again, and nobody says when the last one was.
_kept: list[Array] = []


def upload(host: Array, device: Any) -> Array:
    """The tensor on ``device``, by its current stream.

    Without ``non_blocking`` torch would wait for all that the stream has before. Pageable memory may go when this
    returns, since the driver has taken it by then; a captured copy is another matter.
    """
    torch = sys.modules["torch"]
    device = torch.device(device)
    if device.type != "cuda":
        return host.to(device)
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            host = host.pin_memory()
            _kept.append(host)
        return host.to(device, non_blocking=True)
