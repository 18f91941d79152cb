"""Where the kernels of one GPU report a request that they refuse, and how the host is told.

The device keeps the least key of all refusals (`refuse` in sm90_pieces.cuh) and sets a word of host
memory, so that a call can look without waiting.
"""

from __future__ import annotations

import ctypes
from typing import Any

from ..errors import DeviceCheckError, ForkedProcessError
from .driver import RelaxedCapture

REASONS = ("foreign metadata", "length", "stale metadata", "page id")  # Reason in sm90_pieces.cuh
# Of lengths and ids in lists of tokens, by the upper bits of the column: List in sm90_pieces.cuh.
LIST_SHIFT = 28
LISTS = {
    "length": ("length", "topk_length", "extra topk_length", "topk_length"),
    "page id": ("page id", "index", "extra index", "index"),
}
PREFILL = 3  # of these, that of flash_mla_sparse_fwd()
NOTHING_REFUSED = (1 << 64) - 1


class Reports:
    """What one GPU refused since it was last asked."""

    def __init__(self, cuda: Any, device: int) -> None:
        """cuda: the module cupy.cuda; the device must be current."""
        self._cuda, self._device = cuda, device
        self._key = cuda.runtime.malloc(8)
        self._stream = cuda.Stream(non_blocking=True)
        self._host = cuda.alloc_pinned_memory(16)
        self._refused = ctypes.c_uint32.from_address(self._host.ptr)
        self._host_key = ctypes.c_uint64.from_address(self._host.ptr + 8)
        self._refused.value = 0
        self.refusal: int = self._key  # addresses, as the kernels' parameters are called
        self.refused: int = self._host.ptr
        self.forked = False
        self._forget()

    def raise_pending(self) -> None:
        """Raises DeviceCheckError if the device is known to have refused a request; no waiting."""
        if self._refused.value:
            self._raise()

    def check(self) -> None:
        """Waits for the device, then the same."""
        self.require_unforked()
        with self._cuda.Device(self._device):
            self._cuda.runtime.deviceSynchronize()
        self.raise_pending()

    def after_fork(self) -> None:
        """In a child of a process that used this GPU: CUDA cannot go on here."""
        self.forked = True
        self._refused = ctypes.c_uint32(1)  # so that raise_pending(), too, comes to say so

    def require_unforked(self) -> None:
        """Raises ForkedProcessError in such a child."""
        if self.forked:
            raise ForkedProcessError(
                "This process was forked after its parent had used the GPU. Start workers with the"
                " spawn method: multiprocessing.set_start_method('spawn')."
            )

    def _raise(self) -> None:
        self.require_unforked()
        with RelaxedCapture(), self._cuda.Device(self._device):
            self._refused.value = 0
            self._copy(self.refused + 8, self.refusal, 2)
            key = self._host_key.value
            self._forget()
        if key != NOTHING_REFUSED:
            raise refusal(key)

    def _forget(self) -> None:
        self._host_key.value = NOTHING_REFUSED
        self._copy(self.refusal, self.refused + 8, 1)

    def _copy(self, to: int, source: int, kind: int) -> None:
        self._cuda.runtime.memcpyAsync(to, source, 8, kind, self._stream.ptr)
        self._stream.synchronize()


def refusal(key: int) -> DeviceCheckError:
    """What a key of the device means."""
    reason, column = REASONS[key >> 32 & 3], key & 0xFFFFFFFF
    request = -1 if reason == "foreign metadata" else key >> 34
    which, place = column >> LIST_SHIFT, column & (1 << LIST_SHIFT) - 1
    if reason != "page id":
        place = -1
    if reason in LISTS and which < len(LISTS[reason]):
        reason = LISTS[reason][which]
        if which == PREFILL:
            return DeviceCheckError(request, place, reason, function="flash_mla_sparse_fwd")
    return DeviceCheckError(request, place, reason)
