"""When a page that was freed may be written again: after the launched work that still reads it.

Work on one stream runs in the order in which it was launched, so a freed page can be handed out at
once and nothing is recorded. When a cache is used on several streams, what is freed waits for an
event on each of them. A stream that joins waits, on the device, for all that came before it: some
free pages may still be read there.

Fences knows streams by number and events through a `StreamEvents`; pages and sequences are not its
business.
"""

from __future__ import annotations

from typing import Any, Protocol


class StreamEvents(Protocol):
    """What is asked of a device; CudaEvents below is the one that there is."""

    def hold(self, stream: int) -> Any:
        """What keeps the stream, which is the current one, from being destroyed."""

    def record(self, stream: int) -> Any:
        """An event behind all work that `stream` has been given."""

    def is_done(self, event: Any) -> bool:
        """Whether that work is done. Does not wait."""

    def wait(self, event: Any) -> None:
        """Blocks the host until it is."""

    def order(self, stream: int, event: Any) -> None:
        """What `stream` is given from now on starts after the event. Does not block the host."""


class Fence:
    """Events that have to pass, of the work that was launched up to a moment."""

    __slots__ = ("_device", "_events")

    def __init__(self, device: StreamEvents, events: list[Any]) -> None:
        self._device, self._events = device, events

    def is_done(self) -> bool:
        while self._events and self._device.is_done(self._events[-1]):
            self._events.pop()
        return not self._events

    def wait(self) -> None:
        for event in self._events:
            self._device.wait(event)


class Fences:
    """The streams that a cache is used on, and what has to be waited for."""

    def __init__(self, device: StreamEvents) -> None:
        self._device = device
        self._latest: int | None = None  # the stream of the last use, which most uses are on
        self._left: dict[int, Any] = {}  # the others, each with an event behind all its work
        self._held: dict[int, Any] = {}  # what keeps these streams alive

    def use(self, stream: int) -> None:
        """To be called before work on the cache's pages is launched on a stream."""
        if stream == self._latest:
            return
        if self._latest is not None:
            self._left[self._latest] = self._device.record(self._latest)
        if stream in self._left:
            del self._left[stream]
        else:
            for event in self._left.values():
                self._device.order(stream, event)
        self._held[stream] = self._device.hold(stream)
        self._latest = stream

    def holder(self, stream: int) -> Any:
        """What keeps a stream alive that was used."""
        return self._held.get(stream)

    def order_latest(self) -> None:
        """Lets the stream of the last use wait, on the device, for the work on all others."""
        if self._latest is not None:
            for event in self._left.values():
                self._device.order(self._latest, event)

    def fence(self) -> Fence | None:
        """Of all work so far; None if the order of the one stream is enough."""
        if not self._left:
            return None
        self._left = {
            stream: event for stream, event in self._left.items() if not self._device.is_done(event)
        }
        for stream in self._held.keys() - self._left.keys() - {self._latest}:
            del self._held[stream]
        if not self._left or self._latest is None:
            return None
        return Fence(self._device, [*self._left.values(), self._device.record(self._latest)])


class NoEvents:
    """Host memory: a call returns when its work is done, all on stream 0."""

    def hold(self, stream: int) -> Any:
        return None

    def record(self, stream: int) -> Any:
        return None

    def is_done(self, event: Any) -> bool:
        return True

    def wait(self, event: Any) -> None:
        pass

    def order(self, stream: int, event: Any) -> None:
        pass


class CudaEvents:
    """Events of one CUDA device, through CuPy."""

    def __init__(self, cuda: Any, device: int) -> None:
        self._cuda, self._device = cuda, device

    def hold(self, stream: int) -> Any:
        """CuPy's object, which destroys its stream with it. PyTorch's streams are never destroyed;
        those that other libraries made are theirs to keep."""
        current = self._cuda.get_current_stream(self._device)
        return current if current.ptr == stream else None

    def record(self, stream: int) -> Any:
        with self._cuda.Device(self._device):
            event = self._cuda.Event(block=False, disable_timing=True)
            self._cuda.runtime.eventRecord(event.ptr, stream)
        return event

    def is_done(self, event: Any) -> bool:
        return bool(event.done)

    def wait(self, event: Any) -> None:
        event.synchronize()

    def order(self, stream: int, event: Any) -> None:
        with self._cuda.Device(self._device):
            self._cuda.runtime.streamWaitEvent(stream, event.ptr)
