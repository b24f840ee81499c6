# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""`kvxfer serve` as a process: it starts all or nothing, replaces who dies, and leaves nobody behind."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_workers import SECRET
from front_fakes import BYTE_LEVEL

from kvxfer.errors import InvalidArgumentError
from kvxfer.server import launch

STUB = Path(__file__).with_name("stub_kvxfer.py")
HEADERS = {"Authorization": f"Bearer {SECRET}"}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 330,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory as far as the front and the launcher look: its weights hold one small tensor."""
    folder = tmp_path_factory.mktemp("models") / "stub-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    BYTE_LEVEL.save(str(folder / "tokenizer.json"))
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    content = len(header).to_bytes(8, "little") + header + b"\0" * 4
    (folder / "model.safetensors").write_bytes(content)
    return folder


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Launched:
    """A launcher in a process of its own; its output is read as it comes."""

    def __init__(self, model_dir: Path, *arguments: str, **env: str) -> None:
        self.lines: list[str] = []
        self._heard = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, str(STUB), "serve", str(model_dir), "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "KVXFER_SECRET": SECRET, "NO_COLOR": "1", **env},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._heard:
                self.lines.append(line)
                self._heard.notify_all()
        with self._heard:
            self.lines.append("(end of output)")
            self._heard.notify_all()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_for(self, pattern: str, timeout_s: float = 40.0) -> re.Match[str]:
        def found() -> re.Match[str] | None:
            return re.search(pattern, self.output)

        with self._heard:
            self._heard.wait_for(lambda: found() or "(end of output)" in self.output, timeout_s)
        match = found()
        assert match, f"no {pattern!r} in:\n{self.output}"
        return match

    def url(self) -> str:
        self.wait_for("Ctrl-C stops it")
        return self.wait_for(r"ready at (http://[\d.]+:\d+)")[1]

    def children(self) -> dict[str, int]:
        """Role -> pid."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent == self.process.pid and alive(int(entry.name)) and len(words) > 2:
                role = words[words.index(b"--role") + 1] if b"--role" in words else words[2]
                found[role.decode()] = int(entry.name)
        return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=30)

    def close(self) -> None:
        children = self.children()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        eventually(lambda: not any(map(alive, children.values())), "children to leave", 20)
        self._reader.join(timeout=5)
        assert self.process.stdout is not None
        self.process.stdout.close()


def eventually(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    end, tick = time.monotonic() + timeout_s, threading.Event()
    while not condition():
        assert time.monotonic() < end, f"after {timeout_s} s still waiting for {what}"
        tick.wait(0.02)


@pytest.fixture
def serve(model_dir: Path) -> Iterator[Callable[..., Launched]]:
    launched: list[Launched] = []

    def start(*arguments: str, **env: str) -> Launched:
        launched.append(Launched(model_dir, *arguments, **env))
        return launched[-1]

    yield start
    for one in launched:
        one.close()


def complete(url: str, **fields: Any) -> dict[str, Any]:
    answer = httpx.post(
        f"{url}/v1/completions", json={"prompt": "hello", "max_tokens": 4, **fields}, timeout=20
    )
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_a_server_lives_through_the_death_of_each_part(serve: Callable[..., Launched]) -> None:
    """One start for the whole story: greeting, answers, each part killed in turn, an orderly end."""
    server = serve()
    url = server.url()
    assert "curl" in server.output
    assert '"temperature": 0.7' in server.output
    assert complete(url)["model"] == "stub-model"
    children = server.children()
    assert set(children) == {"prefill", "decode", "router"}
    sessions = {os.getsid(pid) for pid in children.values()}
    assert len(sessions) == 3, "Ctrl-C must not reach the children"

    os.kill(children["decode"], signal.SIGKILL)
    server.wait_for(r"decode-0 \(pid \d+\) died with signal SIGKILL")
    server.wait_for("decode-0 is back")
    assert server.children()["decode"] != children["decode"]
    assert complete(url)
    workers = httpx.get(f"{url}/workers", headers=HEADERS).json()
    assert sorted(w["role"] for w in workers if w["up"]) == ["decode", "prefill"]
    eventually(
        lambda: len(httpx.get(f"{url}/workers", headers=HEADERS).json()) == 2,
        "the dead worker to be dropped",
    )

    os.kill(children["router"], signal.SIGKILL)
    # Connections wait in the launcher's socket: a client that comes now is not refused.
    assert complete(url)
    server.wait_for("the router is back")
    assert httpx.get(f"{url}/readiness").status_code == 200

    everyone = server.children()
    assert server.stop() == 0
    assert not any(map(alive, everyone.values()))
    assert "killed" not in server.output


def test_a_part_that_dies_at_its_start_is_shown_and_ends_all(
    serve: Callable[..., Launched],
) -> None:
    server = serve(STUB_FAIL="decode")
    assert server.process.wait(timeout=40) == 1
    server.wait_for("the weights are nowhere to be found")
    assert "decode-0 ended with exit status 3 while starting" in server.output
    assert "Traceback" not in server.output
    assert not server.children()


def test_a_part_that_is_never_ready_ends_all_in_time(serve: Callable[..., Launched]) -> None:
    server = serve("--role", "both", "--start-timeout", "1", STUB_HANG="both")
    assert server.process.wait(timeout=40) == 1
    server.wait_for("both-0 was not ready within 1 s")


def test_ctrl_c_while_starting_leaves_nobody(serve: Callable[..., Launched]) -> None:
    server = serve(STUB_HANG="prefill")
    eventually(lambda: set(server.children()) == {"prefill", "decode"}, "the workers to be spawned")
    children = server.children()
    assert server.stop(signal.SIGINT) == 0
    assert not any(map(alive, children.values()))


def test_a_killed_launcher_leaves_nobody(serve: Callable[..., Launched]) -> None:
    """Of the monolithic baseline, which is thereby shown to answer."""
    server = serve("--role", "both", "--num-workers", "1", "--threads", "1")
    url = server.url()
    assert complete(url)
    (worker,) = httpx.get(f"{url}/workers", headers=HEADERS).json()
    assert worker["role"] == "both"
    children = server.children()
    assert set(children) == {"both", "router"}
    server.process.kill()
    eventually(lambda: not any(map(alive, children.values())), "the children to leave", 20)


def test_sigterm_lets_a_running_answer_finish(
    serve: Callable[..., Launched], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    server = serve("--role", "both", STUB_GATE=str(gate))
    url = server.url()
    body = {"prompt": "hello", "max_tokens": 6, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        server.process.send_signal(signal.SIGTERM)

        def refused() -> bool:
            with socket.socket() as sock:
                host, port = url.removeprefix("http://").split(":")
                return sock.connect_ex((host, int(port))) != 0

        eventually(refused, "the drain to begin")
        gate.touch()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert server.process.wait(timeout=30) == 0


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    launch.add_arguments(parser)
    return parser.parse_args(list(words))


def test_port_in_use_is_said_before_anything_is_spawned(model_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InvalidArgumentError, match=f"port {port} .*in use"):
            launch.run(arguments(str(model_dir), "--port", str(port)), program=("/nonexistent",))


@pytest.mark.parametrize(
    "words",
    [
        ("--decode", "0"),
        ("--prefill", "-1"),
        ("--role", "both", "--num-workers", "0"),
    ],
)
def test_a_server_that_could_not_answer_is_refused(model_dir: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidArgumentError, match="must decode"):
        launch.run(arguments(str(model_dir), *words), program=("/nonexistent",))


def test_bad_model_directories_are_refused_before_anything_is_spawned(
    model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgumentError, match="nowhere"):
        launch.run(arguments(str(tmp_path / "nowhere")), program=("/nonexistent",))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    weights = (model_dir / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-2])
    with pytest.raises(InvalidArgumentError, match="truncated"):
        launch.run(arguments(str(tmp_path)), program=("/nonexistent",))


def test_default_is_one_of_each_with_the_bundled_model() -> None:
    args = arguments()
    assert launch._roles(args) == [("prefill-0", "prefill"), ("decode-0", "decode")]
    assert args.model_dir == launch.BUNDLED_MODEL


def test_a_second_signal_ends_what_still_runs(
    serve: Callable[..., Launched], tmp_path: Path
) -> None:
    server = serve("--role", "both", STUB_GATE=str(tmp_path / "never"))
    url = server.url()
    children = server.children()
    body = {"prompt": "hello", "max_tokens": 6, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        server.process.send_signal(signal.SIGINT)
        server.process.send_signal(signal.SIGTERM)  # two of one kind may arrive as one
        server.process.wait(timeout=10)
        with pytest.raises(httpx.RemoteProtocolError):  # cut off, and seen to be
            list(lines)
    assert not any(map(alive, children.values()))
