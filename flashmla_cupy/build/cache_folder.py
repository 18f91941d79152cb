"""The folder of the kernel cache: where it is, and whether others could have put something there.

A cubin is code that runs with the caller's rights. The directory and everything above it must
therefore be closed to other users. No failure of the cache stops a computation: the kernel is then
compiled in memory, and one warning says why.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import stat
import tempfile
import warnings
from collections.abc import Iterator

from ..errors import KernelCacheError, KernelCacheWarning
from ..locks import Lock

DIRECTORY_VARIABLE = "FLASHMLA_CUPY_CACHE_DIR"
OPEN_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)

_warned: set[type[Warning]] = set()
_warned_lock = Lock()


class Untrusted(Exception):
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
            raise Untrusted(f"{step} belongs to user {status.st_uid}")
        if stat.S_ISLNK(status.st_mode):
            links += 1
            if links > 40:
                raise OSError(errno.ELOOP, "too many symbolic links", path)
            target = os.readlink(step)
            todo += target.split("/")[::-1]
            current = "/" if target.startswith("/") else current
            continue
        if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
            raise Untrusted(f"other users can write to {step}; {_remedy(step, status)}")
        current = step
    return current


def _remedy(step: str, status: os.stat_result) -> str:
    """What to do about a directory that others can write: close it, if it is there for the caller
    alone, and so neither a temporary directory nor another one at the top of the file system."""
    shared = os.path.dirname(step) == "/" or step == os.path.realpath(tempfile.gettempdir())
    if status.st_uid != os.geteuid() or shared:
        return f"set {DIRECTORY_VARIABLE} to a directory below which only you can write"
    return f"run: chmod go-w {shlex.quote(step)}"


def require_closed(status: os.stat_result, what: str) -> None:
    """Refuse a cache directory or entry that another user owns or can write."""
    owners = {os.geteuid()}
    if DIRECTORY_VARIABLE in os.environ:  # a cache that root filled, when building an image
        owners.add(0)
    if status.st_uid not in owners:
        raise Untrusted(f"{what} belongs to user {status.st_uid}")
    if status.st_mode & 0o022:
        raise Untrusted(f"other users can write to {what}; run: chmod go-w {shlex.quote(what)}")


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
def open_directory(create: bool) -> Iterator[int]:
    """A descriptor of the verified cache directory; all entries are opened relative to it."""
    if os.name != "posix":
        raise OSError(errno.ENOTSUP, "the kernel cache needs a POSIX system")
    path = directory()
    if create:
        _make(path)
    place = os.path.join(_physical(os.path.dirname(path)), os.path.basename(path))
    if os.path.islink(place):
        raise Untrusted(f"{place} is a symbolic link; name the directory that it points to")
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | OPEN_FLAGS)
    try:
        require_closed(os.fstat(fd), place)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def failures_warn(action: str) -> Iterator[None]:
    """Turn a failure of the cache into one warning a process; the caller goes on without it."""
    try:
        yield
    except Untrusted as reason:
        _warn_once(
            KernelCacheWarning,
            f"The kernel cache is not used, because {reason}. Kernels are compiled in memory.",
        )
    except OSError as reason:
        if isinstance(reason, FileNotFoundError) and action != "write":
            return  # nothing stored yet, or another process has just cleared the cache
        _warn_once(
            RuntimeWarning,
            f"Cannot {action} the kernel cache: {reason}. Kernels are compiled in memory; set "
            f"{DIRECTORY_VARIABLE} to a directory that you can write.",
        )


def _warn_once(category: type[Warning], message: str) -> None:
    with _warned_lock:
        if category in _warned:
            return
        _warned.add(category)
    warnings.warn(message, category, stacklevel=2)
