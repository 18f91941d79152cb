"""Locks in a forked child: the thread that held one in the parent does not exist there."""

from __future__ import annotations

import os
import re
import signal
import threading
import warnings
from pathlib import Path

import pytest

import flashmla_cupy
from flashmla_cupy.locks import Lock

ROOT = Path(flashmla_cupy.__file__).parent
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


def child_does(work) -> int:
    """The exit status of a forked child that does `work`, 0 if it comes to its end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork in a process with threads
        child = os.fork()
    if child == 0:
        signal.alarm(10)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def use(lock: Lock) -> None:
    for _ in range(2):
        with lock:
            pass


@needs_fork
def test_a_child_finds_a_lock_open_that_a_thread_of_its_parent_holds():
    lock, held, done = Lock(), threading.Event(), threading.Event()

    def hold():
        with lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    status = child_does(lambda: use(lock))
    done.set()
    thread.join()
    assert status == 0
    use(lock)


@needs_fork
def test_a_fork_inside_of_a_lock():
    lock = Lock()
    with lock:
        assert child_does(lambda: use(lock)) == 0
    use(lock)


def test_an_error_releases_it():
    lock = Lock()
    with pytest.raises(ZeroDivisionError), lock:
        _ = 1 / 0
    use(lock)


def test_every_lock_of_the_package_is_one_of_these():
    """For an ordinary one a child may wait for ever."""
    ordinary = re.compile(r"threading\.(R?Lock|Condition|\w*Semaphore|Barrier|Event)\b")
    for path in ROOT.rglob("*.py"):
        source = path.read_text()
        assert "from threading import" not in source, path
        assert path.name == "locks.py" or not ordinary.search(source), path
