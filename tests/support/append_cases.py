"""Random appends, for the emulated GPU and the real one: a pool of all layers between guard bytes,
ragged rows, slots that are to be skipped, a rotation or none, and what memory should hold then."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from support.problems import PAGE_SIZES

from flashmla_cupy import deepseek, reference_append

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
GUARD = 256  # elements before the pool; more behind it


class Pool:
    """Memory with a pool [pages, layers, page_size, heads, 576] inside, in either order of its
    first two axes."""

    def __init__(self, rng, pages, layers, page_size, heads, dtype, layer_axis, gap=0):
        lead = [pages, layers] if layer_axis == 1 else [layers, pages]
        shape = (*lead, page_size, heads, 576 + gap)
        size = int(np.prod(shape))
        # Behind it a further page of all layers, so that a slot beyond does no other harm.
        self.memory = aligned(size + 2 * GUARD + size // pages)
        self.memory[...] = rng.integers(0, 2**16, len(self.memory), np.uint16)
        self.dtype, self.layer_axis, self.shape, self.size = dtype, layer_axis, shape, size
        self.array = self.inside(self.memory)
        self.layers, self.heads, self.page_size, self.num_pages = layers, heads, page_size, pages

    def inside(self, memory):
        """The pool in that memory, as bits [pages, layers, page_size, heads, 576]."""
        whole = memory[GUARD : GUARD + self.size].reshape(self.shape)[..., :576]
        return whole if self.layer_axis == 1 else whole.swapaxes(0, 1)

    def geometry(self, address, layer=0):
        """The arguments of PoolGeometry, for the memory at that address."""
        page, layer_stride, slot, head, _ = self.array.strides
        start = address + 2 * GUARD + layer * layer_stride
        return (
            start,
            layer_stride,
            page,
            slot,
            head,
            self.num_pages,
            self.page_size,
            self.heads,
            1152,
        )


def aligned(size):
    """uint16 at an address that is a multiple of 16."""
    memory = np.zeros(size + 8, np.uint16)
    start = -(-memory.ctypes.data // 16) * 16 - memory.ctypes.data
    return memory[start // 2 : start // 2 + size]


class Case:
    """One random append, and `expected`: the memory of its pool afterwards."""

    def __init__(self, seed, most_pages=5, most_batch=4, most_tokens=3):
        rng = np.random.default_rng(seed)
        self.name = str(rng.choice(list(DTYPES)))
        dtype, page_size = DTYPES[self.name], int(rng.choice(PAGE_SIZES))
        pages, layers = int(rng.integers(1, most_pages + 1)), int(rng.integers(1, 4))
        heads = int(rng.choice([1, 2]))
        pool = self.pool = Pool(
            rng, pages, layers, page_size, heads, dtype, seed % 2, gap=8 * (seed % 3)
        )
        batch = int(rng.integers(1, most_batch + 1))
        tokens = int(rng.integers(1, most_tokens + 1))
        n, width = batch * tokens, 576 + 8 * (seed % 2)
        self.shape = layers, batch, tokens, heads, width
        self.memory = aligned(int(np.prod(self.shape)))
        numbers = rng.standard_normal(self.memory.shape, np.float32)
        self.memory[...] = numbers.astype(dtype).view(np.uint16)
        wild = np.flatnonzero(rng.random(self.memory.shape) < 0.01)  # NaN, too, and subnormals
        self.memory[wild] = rng.integers(0, 2**16, len(wild))
        self.bits = self.memory.reshape(self.shape)[..., :576]
        slots = rng.permutation(pages * page_size)[:n].astype(np.int64)
        slots = np.concatenate([slots, np.full(n - len(slots), -1)])
        slots[rng.random(n) < 0.2] = rng.choice([-1, -(2**40), pages * page_size, 2**40])
        self.slots = slots
        self.rotation = {}
        if rng.random() < 0.7:
            cos, sin = deepseek.rotary_tables({"qk_rope_head_dim": 64, "rope_theta": 1e4}, 50)
            positions = rng.integers(0, 50, n)
            positions[rng.random(n) < 0.2] = rng.choice([-1, 50, 2**40])
            self.rotation = {
                "cos": cos,
                "sin": sin,
                "positions": positions,
                "interleaved": bool(rng.random() < 0.5),
            }
        self.expected = pool.memory.copy()
        after = pool.inside(self.expected).view(dtype)
        for layer in range(layers):
            rows = self.bits[layer].reshape(n, heads, 576).view(dtype)
            reference_append.append(after[:, layer], rows, slots, **self.rotation)
