# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The per-user cookie: what engines of one user share when no secret was given.

Loopback is no boundary between users, so there is always a secret; this one is random, made once,
and readable by its owner alone.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from kvxfer.errors import UnavailableError

__all__ = ["user_secret"]

_COOKIE_NBYTES = 32


def _directory() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime) and os.access(runtime, os.W_OK):
        return Path(runtime) / "kvxfer"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "kvxfer"


def user_secret() -> bytes:
    """Reads the cookie, or makes it; several processes may come first at the same moment."""
    path = _directory() / "cookie"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            # Written whole under another name and linked: nobody ever reads half of it, and of
            # several makers one wins and all use its cookie.
            draft = path.with_name(f"cookie.{os.getpid()}.{secrets.token_hex(4)}")
            fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.write(fd, secrets.token_bytes(_COOKIE_NBYTES))
            finally:
                os.close(fd)
            try:
                os.link(draft, path)
            except FileExistsError:
                pass  # another process was first; its cookie is read below
            finally:
                os.unlink(draft)
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            cookie = file.read()
    except OSError as error:
        raise UnavailableError(
            f"cannot keep the per-user secret in {path}: {error}; "
            "pass secret= to TransferEngine, or set XDG_RUNTIME_DIR to a writable directory",
            errno=error.errno,
        ) from error
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise UnavailableError(
            f"{path} belongs to uid {status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}; "
            f"it must belong to uid {os.getuid()} with mode 600: delete it, or pass secret="
        )
    if len(cookie) != _COOKIE_NBYTES:
        raise UnavailableError(
            f"{path} has {len(cookie)} bytes, expected {_COOKIE_NBYTES}: delete it"
        )
    return cookie
