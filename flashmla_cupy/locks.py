"""Locks that a forked child finds open: the thread that held one does not exist there."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator


class Lock:
    """A lock for `with lock.held():`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _all.add(self)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:
            yield

    def renew(self) -> None:
        """Forgets who holds it."""
        self._lock = threading.Lock()


_all: weakref.WeakSet[Lock] = weakref.WeakSet()


def _renew_all() -> None:
    for lock in list(_all):
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
