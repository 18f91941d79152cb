"""append.cu, copy_pages.cu and update_tables.cu on an emulated GPU, bit for bit against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import device
from support.append_cases import Case, Pool, aligned

from flashmla_cupy.gpu.append_launch import (
    NO_ROTATION,
    CacheLaunches,
    PoolGeometry,
    Rotary,
    Rows,
)
from flashmla_cupy.gpu.engine import engine_of

pytestmark = pytest.mark.skipif(device.host_compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return device.Kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def gpu(monkeypatch, kernels):
    return device.install(monkeypatch, kernels, num_sms=4)


def rows_of(bits):
    layers, batch, tokens = bits.shape[:3]
    return Rows(bits.ctypes.data, *bits.strides[:4], layers, batch, tokens)


def geometry(pool, layer=0):
    return PoolGeometry(*pool.geometry(pool.memory.ctypes.data, layer))


def random_bits(rng, *shape):
    memory = aligned(int(np.prod(shape)))
    memory[...] = rng.integers(0, 2**16, memory.shape, np.uint16)
    return memory.reshape(shape)


@pytest.mark.parametrize("seed", range(24))
def test_random_appends_have_the_bits_of_the_definition(gpu, seed):
    case = Case(seed)
    rotation = NO_ROTATION
    if case.rotation:
        cos, sin, positions, interleaved = case.rotation.values()
        rotation = Rotary(*(x.ctypes.data for x in (cos, sin, positions)), len(cos), interleaved)
    CacheLaunches(engine_of(0), case.name).append(
        0, geometry(case.pool), rows_of(case.bits), case.slots.ctypes.data, rotation
    )
    assert np.array_equal(case.pool.memory, case.expected)


def test_one_layer_of_several(gpu):
    rng = np.random.default_rng(1)
    pool = Pool(rng, 3, 4, 16, 1, np.float16, 1)
    before = pool.array.copy()
    bits = random_bits(rng, 1, 5, 1, 1, 576)
    slots = np.array([3, 47, -1, 16, 17])
    CacheLaunches(engine_of(0), "float16").append(
        0, geometry(pool, layer=2), rows_of(bits), slots.ctypes.data
    )
    kept = slots[slots >= 0]
    before[kept // 16, 2, kept % 16, 0] = bits.reshape(5, 576)[slots >= 0]
    assert np.array_equal(pool.array, before)


def test_many_rows_take_several_vectors_a_thread(gpu):
    rng = np.random.default_rng(2)
    pool = Pool(rng, 40, 1, 16, 1, np.float16, 1)
    bits = random_bits(rng, 1, 1, 600, 1, 576)
    slots = rng.permutation(640)[:600].astype(np.int64)
    expected = pool.array.copy()
    expected[slots // 16, 0, slots % 16, 0] = bits.reshape(600, 576)
    CacheLaunches(engine_of(0), "float16").append(
        0, geometry(pool), rows_of(bits), slots.ctypes.data
    )
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
    launches.copy_pages(0, geometry(pool), 3, pages.ctypes.data, 3)
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
    "a position beyond the tables": (
        "append.cu",
        "position < angles.num_positions",
        "position <= angles.num_positions",
    ),
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
