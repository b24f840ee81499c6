# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What no engine can beat: one vectored call into another process, and one bare socket."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket

import numpy as np

CHUNK = 1 << 20  # of the bare socket: one call moves this much
IOV_MAX = 1024


def plain_pages(nbytes: int) -> np.ndarray:
    """Touched anonymous memory in ordinary pages, so that it compares with shared segments."""
    memory = mmap.mmap(-1, nbytes)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    array[:: mmap.PAGESIZE] = 0  # present before anything is timed
    return array


class VectoredCall:
    """process_vm_readv or process_vm_writev of scattered blocks: as few calls as the kernel allows."""

    def __init__(
        self,
        pid: int,
        write: bool,
        here: np.ndarray,
        here_offsets: np.ndarray,
        there_base: int,
        there_offsets: np.ndarray,
        nbytes: int,
    ) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._name = "process_vm_writev" if write else "process_vm_readv"
        self._call = getattr(libc, self._name)
        self._call.restype = ctypes.c_ssize_t
        self._call.argtypes = [ctypes.c_int, *[ctypes.c_void_p, ctypes.c_ulong] * 2, ctypes.c_ulong]
        self._pid, self._nbytes = pid, nbytes
        self._here = self._vector(here.ctypes.data, here_offsets)
        self._there = self._vector(there_base, there_offsets)

    def _vector(self, base: int, offsets: np.ndarray) -> np.ndarray:
        vector = np.empty((len(offsets), 2), np.uint64)  # struct iovec: address, length
        vector[:, 0] = base + offsets
        vector[:, 1] = self._nbytes
        return vector

    def __call__(self) -> None:
        for at in range(0, len(self._here), IOV_MAX):
            here, there = self._here[at : at + IOV_MAX], self._there[at : at + IOV_MAX]
            n = len(here)
            moved = self._call(self._pid, here.ctypes.data, n, there.ctypes.data, n, 0)
            if moved != n * self._nbytes:
                error = ctypes.get_errno() if moved < 0 else 0
                raise OSError(
                    error,
                    f"{self._name} moved {moved} of {n * self._nbytes} bytes: {os.strerror(error)}",
                )


def send_all(raw: socket.socket, data: memoryview) -> None:
    """The pool from its start, in calls of 1 MiB, until the other side has said that it has it all."""
    at = 0
    while at < len(data):
        at += raw.send(data[at : at + CHUNK])
    if raw.recv(1) != b"!":
        raise ConnectionError("the other end of the bare socket is gone")


def receive_all(raw: socket.socket, data: memoryview) -> None:
    at = 0
    while at < len(data):
        n = raw.recv_into(data[at : at + CHUNK])
        if n == 0:
            raise ConnectionError("the other end of the bare socket is gone")
        at += n
    raw.sendall(b"!")
