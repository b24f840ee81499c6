# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""`kvxfer serve` with the bundled model: token ids of answers, by a monolithic server or, in the guest, by a prefill and
a decode worker with verbs alone between them.

`server_over_verbs.py both` prints what is expected, on any machine;
`tests/rdma_vm/run -m 4000 -t 1500 -- .venv/bin/python tests/rdma_vm/server_over_verbs.py split` what must equal it.
"""

from __future__ import annotations

import json
import os
import sys
import time

import numpy as np

from kvxfer.testing.cluster import Cluster

START_S = 900.0  # of all parts: emulated processes that import torch, all at once
REQUEST_S = 400.0
NUM_TOKENS = 8
LENGTHS = (1, 16, 17, 150, 513)  # tokens of the prompts: edges of a block and of a step among them
VOCABULARY = 2048  # of the bundled model
TEXT = "def fibonacci(n):\n    if n < 2:\n        return n\n    return "
KINDS = {
    "both": ("--role", "both"),
    "split": ("--prefill", "1", "--decode", "1", "--transports", "verbs"),
}
BEGAN = time.monotonic()


def say(what: str) -> None:
    print(f"{time.monotonic() - BEGAN:7.1f} s  {what}", file=sys.stderr, flush=True)


def main(kind: str) -> None:
    if kind == "split" and "KVXFER_RDMA_DEVICES" not in os.environ:
        sys.exit("this runs in the guest: see the first lines of the file")
    generator = np.random.default_rng(5)
    prompts = [generator.integers(1, VOCABULARY, n).tolist() for n in LENGTHS] + [TEXT]
    patience = ("--start-timeout", f"{START_S:g}", "--request-timeout", f"{REQUEST_S:g}")
    tokens = []
    with Cluster(None, *patience, *KINDS[kind], start_timeout_s=START_S) as cluster:
        say("ready")
        cluster.client.timeout = REQUEST_S
        try:
            for prompt in prompts:
                answer = cluster.complete(
                    prompt, max_tokens=NUM_TOKENS, ignore_eos=True, return_token_ids=True
                )
                (choice,) = answer["choices"]  # type: ignore[misc]
                tokens.append(choice["token_ids"])
                say(f"{len(prompt)} {type(prompt[0]).__name__} -> {choice['token_ids']}")
            metrics = cluster.metrics()
        finally:
            print(cluster.output, file=sys.stderr)
    named = ("kvxfer:kv_transfer_bytes_total", "kvxfer:handoffs_total")
    print(json.dumps({"tokens": tokens, "metrics": {k: v for k, v in metrics.items() if k.startswith(named)}}))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
