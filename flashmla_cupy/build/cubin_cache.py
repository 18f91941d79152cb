"""The disk cache of compiled kernels: a checksummed file a cubin, in a directory of the user's own.

A directory that is made here is for its owner alone. Entries are as readable as their directory,
so that root can fill one for the users of an image: make it first, or chmod -R a+rX it afterwards.

A cubin is code that runs with the caller's rights. An entry is therefore believed only where
nobody else could have put it: the directory and everything above it must be closed to other
users, and the file must be a plain one, of the right owner, with a single name. Entries appear by
rename, so a reader sees a whole entry or none, and a process killed while it writes leaves a
temporary file at worst. No failure of the cache stops a computation: the kernel is then compiled
in memory, and one warning says why.

An entry, little endian:

    8s   magic
    I    format version
    I    bytes of metadata
    Q    bytes of cubin
    32s  SHA-256 of key + the four fields above + metadata + cubin
    ...  metadata (JSON, UTF-8), then the cubin
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import stat
import struct
import time
from typing import Any, NamedTuple

from ..errors import KernelCacheError
from .cache_folder import (
    OPEN_FLAGS,
    Untrusted,
    directory,
    failures_warn,
    open_directory,
    require_closed,
)

STALE_SECONDS = 3600.0  # a temporary file older than this has lost its writer

_MAGIC = b"FMLACUBN"
_FORMAT = 1
_FIELDS = struct.Struct("<8sIIQ")
_DIGEST_BYTES = 32
_LARGEST_ENTRY = 1 << 27  # bytes; a cubin of ours is about 100 KB
_ENTRY_NAME = re.compile(r"[0-9a-f]{64}\.cubin")
_TEMPORARY_NAME = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{16}\.tmp")


class Entry(NamedTuple):
    """A cached kernel: its key (64 hex digits), the metadata stored with it, and the cubin."""

    key: str
    metadata: dict[str, Any]
    cubin: bytes


def load(key: str) -> Entry | None:
    """The entry stored under `key`, or None. A damaged entry counts as absent and is removed."""
    with failures_warn("read"), open_directory(create=False) as fd:
        return _read(fd, key)
    return None


def store(key: str, metadata: dict[str, Any], cubin: bytes) -> str | None:
    """Store an entry atomically; return its path, or None when the cache cannot be written."""
    text = json.dumps(metadata, sort_keys=True).encode()
    fields = _FIELDS.pack(_MAGIC, _FORMAT, len(text), len(cubin))
    blob = fields + _digest(key, fields, text + cubin) + text + cubin
    with failures_warn("write"), open_directory(create=True) as fd:
        _reap(fd)
        if _write(fd, f"{key}.cubin", f".{key}.{secrets.token_hex(8)}.tmp", blob):
            return os.path.join(directory(), f"{key}.cubin")
    return None


def entries() -> list[Entry]:
    """Every intact entry, in the order of their keys."""
    found: list[Entry | None] = []
    with failures_warn("read"), open_directory(create=False) as fd:
        for name in sorted(os.listdir(fd)):
            if _ENTRY_NAME.fullmatch(name):
                with failures_warn("read"):
                    found.append(_read(fd, name[:64]))
    return [entry for entry in found if entry is not None]


def clear() -> tuple[int, int]:
    """Remove all entries and temporary files, and nothing else; return (files, bytes) removed.

    An entry is a file that begins as entries do, of this or another version, damaged or not."""
    files = size = 0
    with failures_warn("clear"), open_directory(create=False) as fd:
        for name in _ours(fd):
            with failures_warn("clear"):
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                os.unlink(name, dir_fd=fd)
                files, size = files + 1, size + status.st_size
    return files, size


def require_usable() -> int:
    """Raises KernelCacheError, which says why, unless the cache can be trusted, OSError unless it
    can be read. Returns the number of files that `clear` would remove."""
    try:
        with open_directory(create=False) as fd:
            return len(_ours(fd))
    except FileNotFoundError:
        return 0
    except Untrusted as reason:
        raise KernelCacheError(f"The kernel cache is not used, because {reason}.") from None


def _ours(directory_fd: int) -> list[str]:
    """The names of all entries and temporary files. Other programs name files after a SHA-256,
    too, and so it takes more than the name."""
    found = []
    for name in sorted(os.listdir(directory_fd)):
        if _TEMPORARY_NAME.fullmatch(name) or (
            _ENTRY_NAME.fullmatch(name) and _begins_as_entry(directory_fd, name)
        ):
            found.append(name)
    return found


def _begins_as_entry(directory_fd: int, name: str) -> bool:
    """False for a plain file of something else. (What is no plain file was planted here.)"""
    try:
        if not stat.S_ISREG(os.stat(name, dir_fd=directory_fd, follow_symlinks=False).st_mode):
            return True
        fd = os.open(name, os.O_RDONLY | OPEN_FLAGS, dir_fd=directory_fd)
    except OSError:
        return False
    with os.fdopen(fd, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


# ---- entries ---------------------------------------------------------------------------------


def _digest(key: str, fields: bytes, payload: bytes) -> bytes:
    return hashlib.sha256(key.encode() + fields + payload).digest()


def _decode(key: str, blob: bytes) -> Entry | None:
    """The entry in `blob`, or None unless every byte is as `store` wrote it for this key."""
    start = _FIELDS.size + _DIGEST_BYTES
    if len(blob) < start:
        return None
    fields, digest, payload = blob[: _FIELDS.size], blob[_FIELDS.size : start], blob[start:]
    magic, version, text_bytes, cubin_bytes = _FIELDS.unpack(fields)
    if (magic, version, text_bytes + cubin_bytes) != (_MAGIC, _FORMAT, len(payload)):
        return None
    if _digest(key, fields, payload) != digest:
        return None
    return Entry(key, json.loads(payload[:text_bytes]), payload[text_bytes:])


def _read(directory_fd: int, key: str) -> Entry | None:
    name = f"{key}.cubin"
    # O_NONBLOCK: opening a planted FIFO must not wait for its writer.
    flags = os.O_RDONLY | os.O_NONBLOCK | OPEN_FLAGS
    try:
        fd = os.open(name, flags, dir_fd=directory_fd)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):  # a symbolic link, a socket
            raise
        raise Untrusted(f"its entry {name} is not a plain file") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise Untrusted(f"its entry {name} is not a plain file")
        require_closed(status, f"its entry {name}")
        if status.st_nlink > 1:
            raise Untrusted(f"its entry {name} has {status.st_nlink} names")
        blob = b""
        if status.st_size <= _LARGEST_ENTRY:
            with os.fdopen(os.dup(fd), "rb") as file:
                blob = file.read(_LARGEST_ENTRY)
        entry = _decode(key, blob)
        if entry is None:
            _unlink_same(directory_fd, name, status)
        return entry
    finally:
        os.close(fd)


def _unlink_same(directory_fd: int, name: str, status: os.stat_result) -> None:
    """Remove the file that was read, not one that another process has put in its place since."""
    with contextlib.suppress(OSError):
        now = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
        if (now.st_dev, now.st_ino) == (status.st_dev, status.st_ino):
            os.unlink(name, dir_fd=directory_fd)


def _write(directory_fd: int, name: str, temporary: str, blob: bytes) -> bool:
    """Whether it is there: another process may clear the cache meanwhile."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | OPEN_FLAGS
    fd = os.open(temporary, flags, 0o600, dir_fd=directory_fd)
    try:
        try:
            os.fchmod(fd, 0o600 | os.fstat(directory_fd).st_mode & 0o044)
            view = memoryview(blob)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
    except FileNotFoundError:
        return False
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=directory_fd)
        raise
    with contextlib.suppress(OSError):  # the rename stands; some file systems refuse this call
        os.fsync(directory_fd)
    return True


def _reap(directory_fd: int) -> None:
    """Remove the temporary files of writers that were killed."""
    oldest = time.time() - STALE_SECONDS
    with contextlib.suppress(OSError):
        for name in os.listdir(directory_fd):
            if _TEMPORARY_NAME.fullmatch(name):
                status = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
                if status.st_mtime < oldest:
                    os.unlink(name, dir_fd=directory_fd)
