# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""tcp under TLS 1.3: the same transfers, and who is turned away with which words."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import ssl
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from transfer_peers import SECRET, TIMEOUT_S, take_notifications, wait_for

from kvxfer.errors import (
    InvalidArgumentError,
    LeaseError,
    TransferTimeoutError,
    TransportError,
)
from kvxfer.transfer import EngineConfig, TlsFiles, TransferEngine, tls_unavailable

pytestmark = [
    pytest.mark.skipif(tls_unavailable() is not None, reason=f"TLS: {tls_unavailable()}"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command"),
]
NBYTES = 3 << 20
MAKE_ENGINE = """
import sys
import kvxfer
tls = kvxfer.TlsFiles(sys.argv[1], sys.argv[2], sys.argv[1])
try:
    kvxfer.TransferEngine("x", secret="x", config=kvxfer.EngineConfig(tls=tls))
except kvxfer.InvalidArgumentError as error:
    print(error)
"""


def openssl(*args: str) -> None:
    subprocess.run(["openssl", *args], check=True, capture_output=True)


def make_authority(folder: Path, name: str) -> Path:
    path = folder / f"{name}.pem"
    openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-days", "30", "-subj", f"/CN={name}"),
        *("-keyout", str(folder / f"{name}.key"), "-out", str(path)),
    )
    return path


def make_certificate(folder: Path, name: str, authority: Path, *extra: str) -> TlsFiles:
    key, request, path = folder / f"{name}.key", folder / f"{name}.csr", folder / f"{name}.pem"
    openssl(
        *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-subj", f"/CN={name}", "-keyout", str(key), "-out", str(request)),
    )
    openssl(
        *("x509", "-req", "-in", str(request), "-CA", str(authority)),
        *("-CAkey", str(authority.with_suffix(".key")), "-CAcreateserial"),
        *("-out", str(path), *(extra or ("-days", "30"))),
    )
    return TlsFiles(path, key, authority)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Path:
    return make_authority(folder, "authority")


@pytest.fixture(scope="module")
def honest(folder: Path, authority: Path) -> TlsFiles:
    return make_certificate(folder, "honest", authority)


def make_engine(name: str, tls: TlsFiles | None) -> TransferEngine:
    return TransferEngine(
        name, transports=("tcp",), secret=SECRET, config=EngineConfig(tls=tls, deadline_s=TIMEOUT_S)
    )


@pytest.fixture
def pair(honest: TlsFiles) -> Iterator[tuple[TransferEngine, TransferEngine]]:
    with make_engine("a", honest) as a, make_engine("b", honest) as b:
        yield a, b


def test_writes_reads_notifications_and_arrivals(
    pair: tuple[TransferEngine, TransferEngine],
) -> None:
    a, b = pair
    rng = np.random.default_rng(0)
    source, target = a.allocate(NBYTES, "kv"), b.allocate(NBYTES, "kv")
    source.array[:] = rng.integers(0, 256, NBYTES, np.uint8)
    peer = a.connect(b.address)
    assert "TLS 1.3" in a.explain(peer)
    lease = b.grant(target, 0, NBYTES, ttl_s=60, num_arrivals=1)
    order = rng.permutation(NBYTES // 4096).astype(np.int64) * 4096
    a.write(
        source, peer.regions["kv"], order, order, 4096, lease=lease.token, arrival=0, notify=b"all"
    ).wait(TIMEOUT_S)
    assert take_notifications(b, 1) == [("a", b"all")]
    assert lease.arrived.tolist() == [0]
    assert (target.array == source.array).all()
    source.array[:] = 0
    a.read(source, peer.regions["kv"], 0, 0, NBYTES).wait(TIMEOUT_S)
    assert (target.array == source.array).all()
    back = wait_for(b, lambda: [e.peer for e in b.peer_events() if e.kind == "connected"])[0]
    target.array[:] = 9
    b.write(target, back.regions["kv"], 0, 0, NBYTES).wait(TIMEOUT_S)
    assert (source.array == 9).all()


def test_lease_cancel_and_deadline(pair: tuple[TransferEngine, TransferEngine]) -> None:
    a, b = pair
    source, target = a.allocate(NBYTES, "kv"), b.allocate(NBYTES, "kv")
    peer = a.connect(b.address)
    lease = b.grant(target, 0, NBYTES, ttl_s=60)
    lease.revoke(TIMEOUT_S)
    with pytest.raises(LeaseError, match="revoked"):
        a.write(source, peer.regions["kv"], 0, 0, NBYTES, lease=lease.token).wait(TIMEOUT_S)
    for _ in range(50):
        xfer = a.write(source, peer.regions["kv"], 0, 0, NBYTES)
        xfer.cancel()
        wait_for(a, lambda xfer=xfer: xfer.quiesced)
        assert xfer.state in ("cancelled", "done")
    short = a.write(source, peer.regions["kv"], 0, 0, NBYTES, deadline_s=1e-6)
    with contextlib.suppress(TransferTimeoutError):
        short.wait(TIMEOUT_S)
    source.array[:] = 5
    a.write(source, peer.regions["kv"], 0, 0, NBYTES).wait(TIMEOUT_S)
    assert (target.array == 5).all()


def test_goodbye_arrives(pair: tuple[TransferEngine, TransferEngine]) -> None:
    a, b = pair
    a.connect(b.address)
    b.close()
    lost = wait_for(a, lambda: [e for e in a.peer_events() if e.kind == "lost"])
    assert "closed" in lost[0].cause


def test_many_threads_submit(pair: tuple[TransferEngine, TransferEngine]) -> None:
    a, b = pair
    source, target = a.allocate(1 << 20, "kv"), b.allocate(1 << 20, "kv")
    source.array[:] = np.arange(1 << 20, dtype=np.uint32).astype(np.uint8)
    remote = a.connect(b.address).regions["kv"]
    failures: list[BaseException] = []

    def run(part: int) -> None:
        try:
            for i in range(64):
                at = part * (1 << 18) + i * 4096
                a.write(source, remote, at, at, 4096).wait(TIMEOUT_S)
        except BaseException as error:  # noqa: BLE001 - shown by the main thread
            failures.append(error)

    threads = [threading.Thread(target=run, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert failures == []
    assert (target.array == source.array).all()


def refused(a: TransferEngine, b: TransferEngine, ours: str, theirs: str) -> None:
    """One clear error on each side, and the engine that was asked goes on."""
    with pytest.raises(TransportError, match=ours) as info:
        a.connect(b.address)
    assert info.value.transport == "tcp"
    wait_for_refusal(b, theirs)
    assert b.stats()["peers"] == {}


def wait_for_refusal(engine: TransferEngine, text: str) -> None:
    done = threading.Event()
    for _ in range(3000):
        if text in engine.stats()["last_handshake_refusal"]:
            return
        done.wait(0.01)
    raise AssertionError(engine.stats()["last_handshake_refusal"])


def test_plain_client(honest: TlsFiles) -> None:
    with make_engine("plain", None) as a, make_engine("b", honest) as b:
        refused(a, b, "speaks TLS only", "speaks TLS only")


def test_plain_server(honest: TlsFiles) -> None:
    with make_engine("a", honest) as a, make_engine("plain", None) as b:
        refused(a, b, "does not speak TLS", "this engine does not")


def test_wrong_authority(folder: Path, honest: TlsFiles) -> None:
    other = make_authority(folder, "other")
    stranger = make_certificate(folder, "stranger", other)
    trusting = TlsFiles(stranger.certificate, stranger.key, honest.authority)
    with make_engine("b", honest) as b:
        with make_engine("stranger", stranger) as a:  # it does not trust us
            refused(a, b, "tls.authority here", "refused this engine's certificate")
        with make_engine("stranger", trusting) as a:  # we do not trust it
            refused(a, b, "refused this engine's certificate", "tls.authority here")
        with make_engine("a", honest) as a:
            a.notify(a.connect(b.address), b"still here").wait(TIMEOUT_S)


def test_expired_certificate(folder: Path, authority: Path, honest: TlsFiles) -> None:
    expired = make_certificate(folder, "expired", authority, "-days", "-1")
    with make_engine("old", expired) as a, make_engine("b", honest) as b:
        refused(a, b, "expired: the other side refused this engine's", "expired")
        refused(b, a, "expired", "expired: the other side refused this engine's")


def test_older_tls_is_refused(
    pair: tuple[TransferEngine, TransferEngine], honest: TlsFiles
) -> None:
    b = pair[1]
    host, port = b.address.rsplit(":", 1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.load_verify_locations(honest.authority)
    context.load_cert_chain(honest.certificate, honest.key)
    with (
        socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as client,
        pytest.raises(ssl.SSLError, match=r"(?i)version"),
    ):
        context.wrap_socket(client)
    wait_for_refusal(b, "TLS handshake failed")


def test_client_without_certificate_is_refused(
    pair: tuple[TransferEngine, TransferEngine], honest: TlsFiles
) -> None:
    b = pair[1]
    host, port = b.address.rsplit(":", 1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(honest.authority)
    with (
        socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as raw,
        context.wrap_socket(raw) as client,
        pytest.raises(ssl.SSLError, match=r"(?i)certificate"),
    ):
        client.recv(1)
    wait_for_refusal(b, "did not return a certificate")


def test_right_certificate_with_wrong_secret_is_refused(honest: TlsFiles) -> None:
    config = EngineConfig(tls=honest)
    with (
        make_engine("b", honest) as b,
        TransferEngine("a", transports=("tcp",), secret=b"another", config=config) as a,
    ):
        refused(a, b, "authentication failed", "authentication failed")


def _rest(client: socket.socket) -> None:
    with contextlib.suppress(ConnectionResetError):
        while client.recv(65536):
            pass


GARBAGE: dict[str, Callable[[np.random.Generator], bytes]] = {
    "a record of noise": lambda rng: b"\x16\x03\x01\x02\x00" + rng.bytes(512),
    "half a record": lambda _: b"\x16\x03\x01\x40\x00" + bytes(100),
    "one byte": lambda _: b"\x16",
    "noise": lambda rng: b"\x99" + rng.bytes(300),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_costs_its_own_connection(
    pair: tuple[TransferEngine, TransferEngine], what: str
) -> None:
    a, b = pair
    host, port = b.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as client:
        client.sendall(GARBAGE[what](np.random.default_rng(1)))
        _rest(client)  # within the handshake's time limit
    assert b.stats()["handshakes_refused"] == 1
    a.notify(a.connect(b.address), b"still here").wait(TIMEOUT_S)


def test_silent_clients_do_not_keep_others_out(
    pair: tuple[TransferEngine, TransferEngine],
) -> None:
    a, b = pair
    host, port = b.address.rsplit(":", 1)
    silent = [socket.create_connection((host, int(port)), timeout=TIMEOUT_S) for _ in range(80)]
    for client in silent[::2]:
        client.sendall(b"\x16\x03\x01")
    a.notify(a.connect(b.address), b"x").wait(TIMEOUT_S)
    for client in silent:
        _rest(client)
        client.close()


def test_files_that_do_not_fit_are_refused(folder: Path, honest: TlsFiles) -> None:
    other = make_authority(folder, "elsewhere")
    with pytest.raises(InvalidArgumentError, match=r"key.*mismatch"):
        make_engine("x", TlsFiles(honest.certificate, other.with_suffix(".key"), honest.authority))
    with pytest.raises(InvalidArgumentError, match="certificate"):
        make_engine("x", TlsFiles(honest.key, honest.key, honest.authority))
    with pytest.raises(InvalidArgumentError, match="authority"):
        make_engine("x", TlsFiles(honest.certificate, honest.key, honest.key))


FORMATS = {"PKCS #8": ("pkcs8", "-topk8"), "SEC 1": ("ec", "-aes256")}


@pytest.mark.parametrize("form", FORMATS)
def test_an_encrypted_key_is_refused_and_no_password_asked_for(
    folder: Path, honest: TlsFiles, form: str
) -> None:
    command, flag = FORMATS[form]
    key = folder / f"{command}.enc"
    openssl(command, flag, "-in", str(honest.key), "-out", str(key), "-passout", "pass:secret")
    assert "ENCRYPTED" in key.read_text()
    master, terminal = os.openpty()  # OpenSSL asks on the controlling terminal, whatever stdin is
    with os.fdopen(master, "rb", buffering=0), os.fdopen(terminal, "rb") as stdin:
        done = subprocess.run(
            [sys.executable, "-c", MAKE_ENGINE, str(honest.certificate), str(key)],
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            start_new_session=True,
            stdin=stdin,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert done.stderr == ""
    assert f"key '{key}' is encrypted" in done.stdout
    assert "give one that is not" in done.stdout


def test_one_certificate_that_signs_itself_does_for_a_test(folder: Path) -> None:
    """The recipe of README.md."""
    path = make_authority(folder, "itself")
    tls = TlsFiles(path, path.with_suffix(".key"), path)
    with make_engine("a", tls) as a, make_engine("b", tls) as b:
        a.notify(a.connect(b.address), b"x").wait(TIMEOUT_S)
        assert take_notifications(b, 1) == [("a", b"x")]
