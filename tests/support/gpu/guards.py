"""Guards: known bytes on both sides of an array, for writes that miss."""

from __future__ import annotations

import numpy as np
from support.gpu.arrays import bits, host, xp

GUARD_BYTES = 4096


class Guards:
    """Arrays with 4 KiB of known bytes on both sides, for writes that miss."""

    def __init__(self) -> None:
        self._rooms: list = []  # (name, all bytes, bytes of the array)
        self._copies: list = []  # (name, array, copy of it)

    def empty(self, name: str, shape, dtype):
        """A contiguous array, 256-byte aligned as if it were an allocation of its own."""
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        room = xp.empty(2 * GUARD_BYTES + size, "uint8")
        room[:GUARD_BYTES] = 0xA5
        room[GUARD_BYTES + size :] = 0x5A
        self._rooms.append((name, room, size))
        return room[GUARD_BYTES : GUARD_BYTES + size].view(dtype).reshape(shape)

    def copy(self, name: str, x):
        """A guarded copy of a contiguous array, which has to stay as it is now."""
        inside = self.empty(name, x.shape, x.dtype)
        bits(inside)[...] = bits(x)
        self._copies.append((name, inside, xp.array(bits(x))))
        return inside

    def changed(self) -> list[str]:
        """The names of the arrays beside which, or in which, something was written."""
        names, counts = [], []
        for name, room, size in self._rooms:
            names += [f"before {name}", f"after {name}"]
            counts.append((room[:GUARD_BYTES] != 0xA5).sum())
            counts.append((room[GUARD_BYTES + size :] != 0x5A).sum())
        for name, x, copy in self._copies:
            names.append(f"in {name}")
            counts.append((bits(x) != copy).sum())
        found = host(xp.stack(counts)) if counts else []
        return [name for name, count in zip(names, found, strict=True) if count]

    def forget(self, name: str) -> None:
        """That array may change from now on; its guards may not."""
        self._copies = [entry for entry in self._copies if entry[0] != name]
