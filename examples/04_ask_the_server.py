# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Streams a completion from a running server (`make serve`), then shows how many bytes of KV cache moved."""

from __future__ import annotations

import json
import sys

import httpx

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
with httpx.Client(base_url=url, timeout=60) as client:
    body = {"prompt": "def ", "max_tokens": 60, "temperature": 0.7, "stream": True}
    try:
        client.get("/health")
    except httpx.ConnectError:
        sys.exit(f"no server at {url}: run `make serve`, or give its URL as the first argument")
    with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        print("def ", end="")
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    print(choice["text"], end="", flush=True)
    print()
    for line in client.get("/metrics").text.splitlines():
        if line.startswith("kvxfer:kv_transfer_bytes_total"):
            print(line)
