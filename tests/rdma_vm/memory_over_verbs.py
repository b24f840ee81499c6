# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""In the guest: memory that the kernel pins in the background, and its own answer when it may not pin more. Prints JSON."""

from __future__ import annotations

import json
import os
import resource

import numpy as np

from kvxfer.errors import RegistrationError
from kvxfer.transfer import EngineConfig, TransferEngine

NBYTES = 32 << 20
LIMIT = 8 << 20  # less than is pinned by then
NOBODY = 65534  # a user without CAP_IPC_LOCK, for whom the limit holds
PATIENCE_S = 200.0


def main() -> None:
    config = EngineConfig(verbs_background_nbytes=0)
    secret = b"in the guest"
    with (
        TransferEngine("a", transports=("verbs",), secret=secret, config=config) as a,
        TransferEngine("b", transports=("verbs",), secret=secret, config=config) as b,
    ):
        source = a.register(np.arange(NBYTES // 8, dtype=np.int64), "source")
        target = b.allocate(NBYTES, "target")
        at_once = source.registration["verbs"].state
        remote = a.connect(b.address, timeout_s=PATIENCE_S).regions["target"]
        a.write(source, remote, 0, 0, 1 << 16, deadline_s=PATIENCE_S).wait()
        for region in (source, target):
            region.wait_registered(PATIENCE_S)
        a.write(source, remote, 0, 0, NBYTES, deadline_s=PATIENCE_S).wait()
        same = bool(np.array_equal(target.array.view(np.int64), source.array.view(np.int64)))
        again = a.register(source.array, "again")
        again.wait_registered(PATIENCE_S)

        resource.setrlimit(resource.RLIMIT_MEMLOCK, (LIMIT, LIMIT))
        os.setuid(NOBODY)
        try:
            a.register(np.zeros(NBYTES, np.uint8), "too much").wait_registered(PATIENCE_S)
            refusal = ""
        except RegistrationError as error:
            refusal = str(error)
        print(
            json.dumps(
                {
                    "at_once": at_once,
                    "done": source.registration["verbs"].nbytes_done,
                    "same": same,
                    "refusal": refusal,
                }
            )
        )


if __name__ == "__main__":
    main()
