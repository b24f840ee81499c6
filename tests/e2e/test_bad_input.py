# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Bad input gets a clear 4xx, or a clear start-up error with exit status 1 or 2 and no trace."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvxfer.testing.cluster import Cluster


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvxfer", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    said = done.stdout + done.stderr
    assert done.returncode in (1, 2), said
    assert "Traceback" not in said, said
    for word in words:
        assert word in said, said


def test_unknown_directory(tmp_path: Path) -> None:
    refused(serve(str(tmp_path / "nowhere"), "--port", "0"), "nowhere")


def test_unsupported_architecture(random_llama: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(random_llama, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["architectures"], config["model_type"] = ["GPT2LMHeadModel"], "gpt2"
    (broken / "config.json").write_text(json.dumps(config))
    refused(serve(str(broken), "--port", "0"), "GPT2LMHeadModel")


def test_truncated_weights(random_llama: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(random_llama, tmp_path / "broken")
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(serve(str(broken), "--port", "0"), weights.name, "truncated")


def test_port_in_use(random_llama: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(serve(str(random_llama), "--port", str(port)), str(port), "in use")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"prompt": "def ", "max_tokens": -1}, 400, ["max_tokens"]),
        ({"prompt": "def ", "model": "gpt-9"}, 404, ["gpt-9"]),
        ({"prompt": [1] * 20000, "max_tokens": 5}, 400, ["16384", "20000"]),
        ({"prompt": [10**6], "max_tokens": 5}, 400, ["1000000"]),
        ({"max_tokens": 5}, 400, ["prompt"]),
        ({"prompt": "def ", "temperature": -1}, 400, ["temperature"]),
        ({"prompt": "def ", "top_p": 0}, 400, ["top_p"]),
        ({"prompt": "def ", "n": 0}, 400, ["n"]),
        ({"prompt": "def ", "stop": ["a"] * 5}, 400, ["stop"]),
        ({"prompt": "def ", "suffix": "x"}, 400, ["suffix"]),
    ],
)
def test_bad_request(bundled: Cluster, body: dict[str, Any], status: int, words: list[str]) -> None:
    answer = bundled.client.post("/v1/completions", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"], error


def test_malformed_json(bundled: Cluster) -> None:
    answer = bundled.client.post(
        "/v1/completions", content=b'{"prompt": ', headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert "JSON" in answer.json()["error"]["message"]
