# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Strangers, silent clients and wrong secrets cost their own connection and nothing else."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from transfer_peers import SECRET, TIMEOUT_S

from kvxfer.errors import (
    InvalidArgumentError,
    TransferTimeoutError,
    TransportError,
    UnavailableError,
)
from kvxfer.transfer import TransferEngine
from kvxfer.transfer.secret import user_secret

Pair = tuple[TransferEngine, TransferEngine]


def raw(engine: TransferEngine) -> socket.socket:
    host, port = engine.address.rsplit(":", 1)
    return socket.create_connection((host.strip("[]"), int(port)), timeout=TIMEOUT_S)


def ended(client: socket.socket) -> bytes:
    """All that the engine says before it hangs up."""
    data = b""
    try:
        while chunk := client.recv(65536):
            data += chunk
    except ConnectionResetError:
        pass
    return data


def head(type_: int, control: int, body: int = 0) -> bytes:
    return struct.pack("<IBBHIIQII", 0x3158564B, 1, type_, 0, control, body, 0, 0, 0)


GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b" " * 32,
    "zeros": bytes(64),
    "endless control": head(1, 0xFFFFFFFF),
    "control above the limit": head(1, 5000) + bytes(5000),
    "body in the handshake": head(1, 10, 10) + bytes(20),
    "empty hello": head(1, 0),
    "malformed hello": head(1, 40) + bytes(40),
    "stripe first": head(6, 40) + bytes(40),
    "auth first": head(2, 32) + bytes(32),
    "made-up join": head(3, 52) + bytes(52),
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_costs_its_own_connection(pair: Pair, data: bytes) -> None:
    a, b = pair
    with raw(b) as client:
        client.sendall(data)
        ended(client)
    assert b.stats()["handshakes_refused"] == 1
    assert b.stats()["last_handshake_refusal"]
    peer = a.connect(b.address)
    a.notify(peer, b"still here").wait(TIMEOUT_S)


def test_random_garbage_never_hurts(pair: Pair) -> None:
    a, b = pair
    rng = np.random.default_rng(3)
    for _ in range(50):
        with raw(b) as client:
            data = bytearray(head(int(rng.integers(0, 16)), int(rng.integers(0, 200))))
            data += rng.bytes(int(rng.integers(0, 300)))
            if rng.integers(2):
                data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
            with contextlib.suppress(OSError):  # it may hang up before all is said
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
            ended(client)
    a.notify(a.connect(b.address), b"still here").wait(TIMEOUT_S)


def test_silent_clients_are_dropped_and_do_not_keep_others_out(pair: Pair) -> None:
    a, b = pair
    silent = [raw(b) for _ in range(300)]  # more than the half-open limit
    a.notify(a.connect(b.address), b"x").wait(TIMEOUT_S)
    for client in silent:
        ended(client)  # all of them, within the handshake's time limit
        client.close()


def caught_hello(engine: TransferEngine) -> bytes:
    """The engine's own first frame, caught by a listener."""
    with socket.create_server(("127.0.0.1", 0)) as trap:
        address = f"127.0.0.1:{trap.getsockname()[1]}"
        attempt = threading.Thread(target=_try_connect, args=(engine, address))
        attempt.start()
        caught, _ = trap.accept()
        with caught:
            caught.settimeout(TIMEOUT_S)
            hello = caught.recv(4096)
    attempt.join(TIMEOUT_S)
    return hello


def test_hello_split_at_every_byte_is_understood(pair: Pair) -> None:
    a, b = pair
    hello = caught_hello(a)
    with raw(b) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(len(hello)):
            client.send(hello[i : i + 1])
        answer = client.recv(4096)
    assert answer[5] == 1  # HELLO


@pytest.mark.parametrize(
    ("speaks", "chosen"), [((1, 1), 1), ((1, 900), 1), ((2, 900), None), ((0, 0), None)]
)
def test_versions_are_negotiated(pair: Pair, speaks: tuple[int, int], chosen: int | None) -> None:
    """A client of the future that still speaks version 1 is answered; one that does not, is told."""
    a, b = pair
    hello = bytearray(caught_hello(a))
    hello[32:36] = struct.pack("<HH", *speaks)
    with raw(b) as client:
        client.sendall(hello)
        if chosen is None:
            text = ended(client)
            assert text[5] == 14  # ERROR
            assert f"ours is 1, the client's are {speaks[0]} to {speaks[1]}".encode() in text
        else:
            answer = client.recv(4096)
            assert answer[5] == 1
            assert struct.unpack("<HH", answer[32:36]) == (chosen, chosen)


def test_client_that_goes_on_talking_after_its_proof_is_turned_away(pair: Pair) -> None:
    """Nobody reads there until the lanes have joined: the bytes once kept the engine busy for two
    seconds, and an end behind them went unseen."""
    a, b = pair
    host, port = b.address.rsplit(":", 1)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"127.0.0.1:{proxy.getsockname()[1]}"
        attempt = threading.Thread(target=_try_connect, args=(a, address))
        attempt.start()
        client, _ = proxy.accept()
        with client, socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as server:
            client.settimeout(TIMEOUT_S)
            server.sendall(client.recv(4096))
            client.sendall(server.recv(4096))
            server.sendall(client.recv(4096))  # the proof
            assert server.recv(4096)[5] == 2  # and the engine's
            server.sendall(b"x")
            assert b"out of order" in ended(server)
        attempt.join(TIMEOUT_S)
    assert "out of order" in b.stats()["last_handshake_refusal"]


def test_replayed_proof_is_refused(pair: Pair) -> None:
    """Hello and proof of an honest client, recorded on the way and played again."""
    a, b = pair
    host, port = b.address.rsplit(":", 1)
    recorded: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"127.0.0.1:{proxy.getsockname()[1]}"
        attempt = threading.Thread(target=_try_connect, args=(a, address))
        attempt.start()
        client, _ = proxy.accept()
        with client, socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as server:
            client.settimeout(TIMEOUT_S)
            for _ in range(2):
                data = client.recv(4096)
                recorded.append(data)
                server.sendall(data)
                client.sendall(server.recv(4096))
        attempt.join(TIMEOUT_S)
    with raw(b) as thief:
        thief.sendall(recorded[0])
        assert thief.recv(4096)[5] == 1
        thief.sendall(recorded[1])
        assert b"authentication failed" in ended(thief)


def _try_connect(engine: TransferEngine, address: str) -> None:
    with contextlib.suppress(TransportError, TransferTimeoutError):
        engine.connect(address, timeout_s=3)


def test_wrong_secret_is_one_clear_error_on_both_sides(pair: Pair) -> None:
    _, b = pair
    b.allocate(100, "kv")
    with TransferEngine("stranger", transports=("tcp",), secret=b"another") as stranger:
        with pytest.raises(TransportError, match=r"authentication failed.*same secret") as info:
            stranger.connect(b.address)
        assert info.value.transport == "tcp"
    assert "authentication failed" in b.stats()["last_handshake_refusal"]
    assert b.stats()["peers"] == {}
    assert b.peer_events() == []


def test_nobody_listening_and_nobody_answering(pair: Pair) -> None:
    a, _ = pair
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TransferTimeoutError, match="in time"):
            a.connect(address, timeout_s=0.2)
    with pytest.raises(TransportError, match="cannot connect"):
        a.connect(address, timeout_s=2)
    for bad in ("nonsense", "127.0.0.1", "127.0.0.1:x", "::1:80"):
        with pytest.raises(InvalidArgumentError, match="host:port"):
            a.connect(bad)


def test_an_engine_is_not_its_own_peer(pair: Pair) -> None:
    with pytest.raises(Exception, match="own peer"):
        pair[0].connect(pair[0].address)


def test_connecting_again_gives_the_same_peer(pair: Pair) -> None:
    a, b = pair
    peer = a.connect(b.address)
    assert a.connect(b.address) is peer
    back = b.connect(a.address)
    assert back.incarnation == a.incarnation
    assert len(b.stats()["peers"]) == 1
    assert b.stats()["handshakes_refused"] == 0


def test_ipv6_loopback() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with (
        TransferEngine("a", listen="[::1]:0", secret=SECRET) as a,
        TransferEngine("b", listen="[::1]:0", secret=SECRET) as b,
    ):
        assert b.address.startswith("[::1]:")
        a.notify(a.connect(b.address), b"x").wait(TIMEOUT_S)


@pytest.fixture
def cookie_home(tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return os.fspath(tmp_path)


def test_user_cookie_is_made_once_and_private(cookie_home: str) -> None:
    secrets: set[bytes] = set()
    threads = [threading.Thread(target=lambda: secrets.add(user_secret())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert len(secrets) == 1
    path = os.path.join(cookie_home, "kvxfer", "cookie")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert os.listdir(os.path.dirname(path)) == ["cookie"]
    with TransferEngine("a") as a, TransferEngine("b") as b:
        a.connect(b.address)


def test_cookie_that_others_can_read_is_refused(cookie_home: str) -> None:
    user_secret()
    path = os.path.join(cookie_home, "kvxfer", "cookie")
    os.chmod(path, 0o644)
    with pytest.raises(UnavailableError, match="mode 644"):
        TransferEngine("a")
    os.chmod(path, 0o600)
    os.truncate(path, 5)
    with pytest.raises(UnavailableError, match="5 bytes"):
        TransferEngine("a")


@pytest.mark.parametrize("name", ["a\nERROR", "\x1b[31m", "nul\0", "del\x7f"])
def test_names_with_control_characters_are_refused(pair: Pair, name: str) -> None:
    """Peers put them into messages and logs as they are."""
    with pytest.raises(InvalidArgumentError, match="engine name has a control character"):
        TransferEngine(name)
    with pytest.raises(InvalidArgumentError, match="region name has a control character"):
        pair[0].allocate(10, name)
    with pytest.raises(InvalidArgumentError, match="host:port"):
        pair[0].connect(f"{name}:1")
    with TransferEngine("knödel 团子", secret=SECRET) as engine:
        assert engine.connect(pair[1].address).name == "b"


@pytest.fixture
def mute() -> Iterator[socket.socket]:
    """Takes connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def address_of(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


def test_close_ends_a_connect_that_waits(mute: socket.socket) -> None:
    engine = TransferEngine("a")

    def close_once_it_waits() -> None:
        with mute.accept()[0] as taken:
            taken.recv(1)
            engine.close()

    closer = threading.Thread(target=close_once_it_waits)
    closer.start()
    began = time.monotonic()
    with pytest.raises(InvalidArgumentError, match="'a' is closed"):
        engine.connect(address_of(mute), timeout_s=TIMEOUT_S)
    assert time.monotonic() - began < TIMEOUT_S / 2
    closer.join()


_CONNECTING = """
import sys
from kvxfer.transfer import TransferEngine
with TransferEngine("a") as engine:
    try:
        engine.connect(sys.argv[1], timeout_s=600)
    except KeyboardInterrupt:
        print("interrupted", engine.peer_events())
"""


def test_ctrl_c_ends_a_connect_that_waits(mute: socket.socket) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _CONNECTING, address_of(mute)], stdout=subprocess.PIPE, text=True
    ) as child:
        with mute.accept()[0] as taken:
            taken.recv(1)  # its HELLO: it waits for ours
            child.send_signal(signal.SIGINT)
            out, _ = child.communicate(timeout=TIMEOUT_S)
    assert (out, child.returncode) == ("interrupted []\n", 0)
