"""What earlier calls refused: kept by the engine of each GPU and, for the host, here.

A kernel finds a bad page number, length or schedule long after its call has returned. The next
call, or check(), raises what was found as a DeviceCheckError.
"""

from __future__ import annotations

from ..errors import DeviceCheckError
from ..gpu.engine import engines

_on_host: list[DeviceCheckError] = []  # at most one: what is yet to be raised


def check() -> None:
    """Waits for the work queued so far; raises DeviceCheckError if a call since the last time had
    to refuse a request, and then forgets it. The next call of flash_mla_with_kvcache() raises the
    same, without waiting, as soon as the device has reported it."""
    for engine in engines():
        engine.check()
    raise_host()


def raise_pending() -> None:
    """Raises what earlier calls are known to have refused, on any device; does not wait."""
    for engine in engines():
        engine.raise_pending()
    raise_host()


def raise_host() -> None:
    """Raises what the reference refused earlier."""
    if _on_host:
        raise _on_host.pop()


def report(violation: DeviceCheckError | None) -> None:
    """Keeps what the reference refused, for the next call or check() to raise."""
    if violation is not None:
        _on_host[:] = [violation]
