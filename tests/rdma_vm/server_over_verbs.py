# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""In the guest: a prefill and a decode worker with verbs alone between them, against a monolithic server.

`tests/rdma_vm/run -m 6000 -t 1500 -- .venv/bin/python tests/rdma_vm/server_over_verbs.py` prints one JSON line.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from kvxfer.testing.cluster import Cluster
from kvxfer.testing.models import make_random_checkpoint

START_S = 900.0  # three emulated processes that import torch
NUM_TOKENS = 8
LENGTHS = (1, 17, 64, 200, 513)  # tokens of the prompts: edges of a block and of a chunk among them


def tokens(cluster: Cluster, prompts: list[list[int]]) -> list[list[int]]:
    cluster.client.timeout = START_S
    found = []
    for prompt in prompts:
        answer = cluster.complete(
            prompt, max_tokens=NUM_TOKENS, ignore_eos=True, return_token_ids=True
        )
        (choice,) = answer["choices"]  # type: ignore[misc]
        found.append(choice["token_ids"])
    return found


def main() -> int:
    if "KVXFER_RDMA_DEVICES" not in os.environ:
        sys.exit("this runs in the guest: see the first lines of the file")
    generator = np.random.default_rng(5)
    prompts = [generator.integers(0, 256, n).tolist() for n in LENGTHS]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "llama"
        make_random_checkpoint(model, "llama", seed=3, num_heads=4, num_kv_heads=2, head_dim=32)
        with Cluster(model, "--role", "both", start_timeout_s=START_S) as monolithic:
            expected = tokens(monolithic, prompts)
        print("monolithic answers are there", file=sys.stderr)
        workers = ("--prefill", "1", "--decode", "1", "--transports", "verbs")
        with Cluster(model, *workers, start_timeout_s=START_S) as split:
            found = tokens(split, prompts)
            metrics = split.metrics()
    moved = {
        name: value
        for name, value in metrics.items()
        if name.startswith("kvxfer:kv_transfer_bytes_total")
    }
    print(json.dumps({"expected": expected, "found": found, "moved": moved}))
    over_verbs = sum(value for name, value in moved.items() if 'transport="verbs"' in name)
    return 0 if found == expected and over_verbs > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
