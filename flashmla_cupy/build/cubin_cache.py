"""The disk cache of compiled kernels: a checksummed file a cubin, in a directory of the user's own.

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
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..errors import KernelCacheError, KernelCacheWarning
from ..locks import Lock

DIRECTORY_VARIABLE = "FLASHMLA_CUPY_CACHE_DIR"
STALE_SECONDS = 3600.0  # a temporary file older than this has lost its writer

_MAGIC = b"FMLACUBN"
_FORMAT = 1
_FIELDS = struct.Struct("<8sIIQ")
_DIGEST_BYTES = 32
_LARGEST_ENTRY = 1 << 27  # bytes; a cubin of ours is about 100 KB
_ENTRY_NAME = re.compile(r"[0-9a-f]{64}\.cubin")
_TEMPORARY_NAME = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{16}\.tmp")
_OPEN_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)

_warned: set[type[Warning]] = set()
_warned_lock = Lock()


class Entry(NamedTuple):
    """A cached kernel: its key (64 hex digits), the metadata stored with it, and the cubin."""

    key: str
    metadata: dict[str, Any]
    cubin: bytes


class _Untrusted(Exception):
    """Another user could have written here. The text is a clause that says why."""


def directory() -> str:
    """Absolute path of the cache: $FLASHMLA_CUPY_CACHE_DIR, else under the XDG cache directory.

    Raises KernelCacheError for a variable that is not the absolute path of a directory, OSError
    when no variable is set and the user has no home directory. Creates nothing.
    """
    path = os.environ.get(DIRECTORY_VARIABLE)
    if path is None:
        base = os.environ.get("XDG_CACHE_HOME", "")
        if not os.path.isabs(base):  # the XDG specification: ignore an empty or relative value
            base = os.path.join(os.path.expanduser("~"), ".cache")
        if not os.path.isabs(base):
            raise OSError(f"the user has no home directory; set {DIRECTORY_VARIABLE}")
        return os.path.normpath(os.path.join(base, "flashmla_cupy"))
    expected = f"{DIRECTORY_VARIABLE}: expected the absolute path of a directory, got {path!r}"
    if not os.path.isabs(path) or "\0" in path or not path.strip("/"):
        raise KernelCacheError(f"{expected}. Write the path in full, or unset the variable.")
    if os.path.exists(path) and not os.path.isdir(path):
        raise KernelCacheError(f"{expected}, which is a file. Name a directory.")
    return os.path.normpath(path)


def load(key: str) -> Entry | None:
    """The entry stored under `key`, or None. A damaged entry counts as absent and is removed."""
    with _failures_warn("read"), _directory_fd(create=False) as fd:
        return _read(fd, key)
    return None


def store(key: str, metadata: dict[str, Any], cubin: bytes) -> str | None:
    """Store an entry atomically; return its path, or None when the cache cannot be written."""
    text = json.dumps(metadata, sort_keys=True).encode()
    fields = _FIELDS.pack(_MAGIC, _FORMAT, len(text), len(cubin))
    blob = fields + _digest(key, fields, text + cubin) + text + cubin
    with _failures_warn("write"), _directory_fd(create=True) as fd:
        _reap(fd)
        _write(fd, f"{key}.cubin", f".{key}.{secrets.token_hex(8)}.tmp", blob)
        return os.path.join(directory(), f"{key}.cubin")
    return None


def entries() -> list[Entry]:
    """Every intact entry, in the order of their keys."""
    found: list[Entry | None] = []
    with _failures_warn("read"), _directory_fd(create=False) as fd:
        for name in sorted(os.listdir(fd)):
            if _ENTRY_NAME.fullmatch(name):
                with _failures_warn("read"):
                    found.append(_read(fd, name[:64]))
    return [entry for entry in found if entry is not None]


def clear() -> tuple[int, int]:
    """Remove all entries and temporary files, and nothing else; return (files, bytes) removed."""
    files = size = 0
    with _failures_warn("clear"), _directory_fd(create=False) as fd:
        for name in os.listdir(fd):
            if _ENTRY_NAME.fullmatch(name) or _TEMPORARY_NAME.fullmatch(name):
                with _failures_warn("clear"):
                    status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    os.unlink(name, dir_fd=fd)
                    files, size = files + 1, size + status.st_size
    return files, size


# ---- trust -----------------------------------------------------------------------------------


def _physical(path: str) -> str:
    """`path` with its symbolic links resolved; every step must be closed to other users.

    A step is closed if root or the caller owns it and only they can rename what it holds: not
    writable by group or others, or sticky as the shared temporary directory is.
    """
    current, todo, links = "/", path.split("/")[::-1], 0
    while todo:
        name = todo.pop()
        if name in ("", "."):
            continue
        if name == "..":
            current = os.path.dirname(current)
            continue
        step = os.path.join(current, name)
        status = os.lstat(step)
        if status.st_uid not in (0, os.geteuid()):
            raise _Untrusted(f"{step} belongs to user {status.st_uid}")
        if stat.S_ISLNK(status.st_mode):
            links += 1
            if links > 40:
                raise OSError(errno.ELOOP, "too many symbolic links", path)
            target = os.readlink(step)
            todo += target.split("/")[::-1]
            current = "/" if target.startswith("/") else current
            continue
        if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
            raise _Untrusted(f"other users can write to {step}; run: chmod go-w {step}")
        current = step
    return current


def _require_closed(status: os.stat_result, what: str) -> None:
    """Refuse a cache directory or entry that another user owns or can write."""
    owners = {os.geteuid()}
    if DIRECTORY_VARIABLE in os.environ:  # a cache that root filled, when building an image
        owners.add(0)
    if status.st_uid not in owners:
        raise _Untrusted(f"{what} belongs to user {status.st_uid}")
    if status.st_mode & 0o022:
        raise _Untrusted(f"other users can write to {what}; run: chmod go-w {what}")


def _make(path: str) -> None:
    """Create `path` and the directories above it that are missing, each for the owner alone."""
    parent = os.path.dirname(path)
    if os.path.isdir(parent):
        _physical(parent)
    else:
        _make(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)


@contextlib.contextmanager
def _directory_fd(create: bool) -> Iterator[int]:
    """A descriptor of the verified cache directory; all entries are opened relative to it."""
    if os.name != "posix":
        raise OSError(errno.ENOTSUP, "the kernel cache needs a POSIX system")
    path = directory()
    if create:
        _make(path)
    place = os.path.join(_physical(os.path.dirname(path)), os.path.basename(path))
    if os.path.islink(place):
        raise _Untrusted(f"{place} is a symbolic link; name the directory that it points to")
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | _OPEN_FLAGS)
    try:
        _require_closed(os.fstat(fd), place)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _failures_warn(action: str) -> Iterator[None]:
    """Turn a failure of the cache into one warning a process; the caller goes on without it."""
    try:
        yield
    except FileNotFoundError:
        pass  # nothing stored yet, or another process has just cleared the cache
    except _Untrusted as reason:
        _warn_once(
            KernelCacheWarning,
            f"The kernel cache is not used, because {reason}. Kernels are compiled in memory.",
        )
    except OSError as reason:
        _warn_once(
            RuntimeWarning,
            f"Cannot {action} the kernel cache: {reason}. Kernels are compiled in memory; set "
            f"{DIRECTORY_VARIABLE} to a directory that you can write.",
        )


def _warn_once(category: type[Warning], message: str) -> None:
    with _warned_lock.held():
        if category in _warned:
            return
        _warned.add(category)
    warnings.warn(message, category, stacklevel=2)


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
    flags = os.O_RDONLY | os.O_NONBLOCK | _OPEN_FLAGS
    try:
        fd = os.open(name, flags, dir_fd=directory_fd)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):  # a symbolic link, a socket
            raise
        raise _Untrusted(f"its entry {name} is not a plain file") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _Untrusted(f"its entry {name} is not a plain file")
        _require_closed(status, f"its entry {name}")
        if status.st_nlink > 1:
            raise _Untrusted(f"its entry {name} has {status.st_nlink} names")
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


def _write(directory_fd: int, name: str, temporary: str, blob: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN_FLAGS
    fd = os.open(temporary, flags, 0o600, dir_fd=directory_fd)
    try:
        try:
            view = memoryview(blob)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=directory_fd)
        raise
    with contextlib.suppress(OSError):  # the rename stands; some file systems refuse this call
        os.fsync(directory_fd)


def _reap(directory_fd: int) -> None:
    """Remove the temporary files of writers that were killed."""
    oldest = time.time() - STALE_SECONDS
    with contextlib.suppress(OSError):
        for name in os.listdir(directory_fd):
            if _TEMPORARY_NAME.fullmatch(name):
                status = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
                if status.st_mtime < oldest:
                    os.unlink(name, dir_fd=directory_fd)
