"""append.cu, copy_pages.cu and update_tables.cu on an emulated GPU, bit for bit against NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from emulator import device
from support.problems import PAGE_SIZES

from flashmla_cupy import deepseek, reference_append
from flashmla_cupy.gpu.append_launch import (
    NO_ROTATION,
    CacheLaunches,
    PoolGeometry,
    Rotary,
    Rows,
)
from flashmla_cupy.gpu.engine import engine_of

pytestmark = pytest.mark.skipif(device.host_compiler() is None, reason="no C++ compiler")
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return device.Kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def gpu(monkeypatch, kernels):
    return device.install(monkeypatch, kernels, num_sms=4)


class Pool:
    """A pool of all layers between guard bytes, in either order of its axes."""

    def __init__(self, rng, pages, layers, page_size, heads, dtype, layer_axis, gap=0):
        lead = [pages, layers] if layer_axis == 1 else [layers, pages]
        shape = (*lead, page_size, heads, 576 + gap)
        size = int(np.prod(shape))
        # Behind it a further page of all layers, so that a slot beyond does no other harm.
        self.memory = rng.integers(0, 2**16, size + 512 + size // pages, np.uint16)
        start = -(-self.memory.ctypes.data // 16) * 16 - self.memory.ctypes.data
        whole = self.memory[128 + start // 2 :][:size].reshape(shape)[..., :576]
        self.array = whole if layer_axis == 1 else whole.swapaxes(0, 1)
        self.view = self.array.view(dtype)  # [pages, layers, page_size, heads, 576]
        page, layer, slot, head, _ = self.array.strides
        self.geometry = PoolGeometry(
            self.array.ctypes.data, layer, page, slot, head, pages, page_size, heads, 1152
        )


def aligned(rng, *shape):
    """Random bits of numbers, at an address that is a multiple of 16."""
    size = int(np.prod(shape))
    memory = np.empty(size + 8, np.uint16)
    start = -(-memory.ctypes.data // 16) * 16 - memory.ctypes.data
    x = memory[start // 2 : start // 2 + size].reshape(shape)
    x[...] = rng.standard_normal(shape, np.float32).astype(np.float16).view(np.uint16)
    return x


@pytest.mark.parametrize("seed", range(24))
def test_random_appends_have_the_bits_of_the_definition(gpu, seed):
    rng = np.random.default_rng(seed)
    name = str(rng.choice(list(DTYPES)))
    dtype, page_size = DTYPES[name], int(rng.choice(PAGE_SIZES))
    pages, layers, heads = int(rng.integers(1, 6)), int(rng.integers(1, 4)), int(rng.choice([1, 2]))
    pool = Pool(rng, pages, layers, page_size, heads, dtype, seed % 2, gap=8 * (seed % 3))
    batch, tokens = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    n = batch * tokens
    bits = aligned(rng, layers, batch, tokens, heads, 576 + 8 * (seed % 2))[..., :576]
    if dtype is ml_dtypes.bfloat16:
        bits[...] = bits.view(np.float16).astype(dtype).view(np.uint16)
    slots = rng.permutation(pages * page_size)[:n].astype(np.int64)
    slots = np.concatenate([slots, np.full(n - len(slots), -1)])
    slots[rng.random(n) < 0.2] = rng.choice([-1, -(2**40), pages * page_size, 2**40])
    rotation, options = NO_ROTATION, {}
    if rng.random() < 0.7:
        cos, sin = deepseek.rotary_tables({"qk_rope_head_dim": 64, "rope_theta": 1e4}, 50)
        positions = rng.integers(0, 50, n)
        positions[rng.random(n) < 0.2] = rng.choice([-1, 50, 2**40])
        interleaved = bool(rng.random() < 0.5)
        options = {"cos": cos, "sin": sin, "positions": positions, "interleaved": interleaved}
        rotation = Rotary(cos.ctypes.data, sin.ctypes.data, positions.ctypes.data, 50, interleaved)
    expected = pool.memory.copy()
    model = np.lib.stride_tricks.as_strided(  # the pool within the copy
        expected[(pool.array.ctypes.data - pool.memory.ctypes.data) // 2 :],
        pool.array.shape,
        pool.array.strides,
    ).view(dtype)
    for layer in range(layers):
        rows = bits[layer].reshape(n, heads, 576).view(dtype)
        reference_append.append(model[:, layer], rows, slots, **options)
    launches = CacheLaunches(engine_of(0), name)
    of = Rows(bits.ctypes.data, *bits.strides[:4], layers, batch, tokens)
    launches.append(0, pool.geometry, of, slots.ctypes.data, rotation)
    assert np.array_equal(pool.memory, expected)


def test_one_layer_of_several(gpu):
    rng = np.random.default_rng(1)
    pool = Pool(rng, 3, 4, 16, 1, np.float16, 1)
    before = pool.array.copy()
    bits = aligned(rng, 1, 5, 1, 1, 576)
    slots = np.array([3, 47, -1, 16, 17])
    geometry = pool.geometry
    of = Rows(bits.ctypes.data, *bits.strides[:4], 1, 5, 1)
    CacheLaunches(engine_of(0), "float16").append(
        0,
        geometry._replace(address=geometry.address + 2 * geometry.layer_stride),
        of,
        slots.ctypes.data,
    )
    kept = slots[slots >= 0]
    before[kept // 16, 2, kept % 16, 0] = bits.reshape(5, 576)[slots >= 0]
    assert np.array_equal(pool.array, before)


def test_many_rows_take_several_vectors_a_thread(gpu):
    rng = np.random.default_rng(2)
    pool = Pool(rng, 40, 1, 16, 1, np.float16, 1)
    bits = aligned(rng, 1, 1, 600, 1, 576)
    slots = rng.permutation(640)[:600].astype(np.int64)
    expected = pool.array.copy()
    expected.reshape(640, 576)[slots] = bits.reshape(600, 576)
    of = Rows(bits.ctypes.data, *bits.strides[:4], 1, 1, 600)
    CacheLaunches(engine_of(0), "float16").append(0, pool.geometry, of, slots.ctypes.data)
    assert np.array_equal(pool.array, expected)


@pytest.mark.parametrize("layer_axis", [0, 1])
@pytest.mark.parametrize("page_size", [16, 64])
def test_pages_are_copied_in_all_layers(gpu, layer_axis, page_size):
    rng = np.random.default_rng(3)
    pool = Pool(rng, 6, 3, page_size, 2, np.float16, layer_axis, gap=8)
    expected = pool.array.copy()
    pages = np.array([[4, 0, 4], [1, 5, 2]], np.int32)
    expected[pages[1]] = expected[pages[0]]
    launches = CacheLaunches(engine_of(0), "float16")
    launches.copy_pages(0, pool.geometry, 3, pages.ctypes.data, 3)
    assert np.array_equal(pool.array, expected)


def test_tables_are_updated_where_they_lie(gpu):
    rng = np.random.default_rng(4)
    table, lengths = rng.integers(0, 99, (5, 70), np.int32), np.zeros(5, np.int32)
    slots = np.zeros(10, np.int64)
    where, page = rng.permutation(350)[:300].astype(np.int32), rng.integers(0, 9, 300, np.int32)
    new_lengths, new_slots = rng.integers(0, 99, 5, np.int32), rng.integers(-1, 2**40, 10)
    changes = np.stack([where, page], 1).ravel()
    staged = np.concatenate([new_slots.view(np.int32), new_lengths, changes])
    expected = table.copy()
    expected.ravel()[where] = page
    CacheLaunches(engine_of(0), "float16").update_tables(
        0,
        staged.ctypes.data,
        slots.ctypes.data,
        lengths.ctypes.data,
        table.ctypes.data,
        (10, 5, 300),
    )
    assert np.array_equal(table, expected)
    assert np.array_equal(lengths, new_lengths)
    assert np.array_equal(slots, new_slots)


# --- the emulator notices ----------------------------------------------------------------------

BROKEN = {
    "a slot beyond the pool": ("append.cu", "slot >= slots", "slot > slots"),
    "a position beyond the tables": ("append.cu", "position >= num_positions", "position > 99"),
    "the wrong half": ("append.cu", "is_second ? -away : away", "is_second ? away : -away"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_kernel_is_noticed(monkeypatch, tmp_path, what):
    file, old, new = BROKEN[what]

    def edit(name, text):
        assert name != file or text.count(old) == 1
        return text.replace(old, new) if name == file else text

    gpu = device.install(monkeypatch, device.Kernels(tmp_path / "kernels", edit), num_sms=4)
    with pytest.raises((AssertionError, device.EmulationError)):
        for seed in range(24):
            test_random_appends_have_the_bits_of_the_definition(gpu, seed)
