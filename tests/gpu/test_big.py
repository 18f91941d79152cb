"""Sizes at which 32-bit arithmetic gives out: offsets past 2^31 and 2^32, a million tokens, 8,192
requests. Needs about 40 GB of GPU memory.

High pages have to give the bits of low ones: the same tokens, the same schedule, another place. The
rest of the expected values come from the float64 oracle.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.gpu import oracle as gpu_oracle
from support.gpu import problems as gpu_problems
from support.gpu.arrays import DRY, DTYPES, bits, fill_poison, mark, release_memory, same, xp

import flashmla_cupy

pytestmark = mark

ROW = 576  # elements
POOL = 2**24 if DRY else 2**32 + 2**26  # elements of the big pool: 8.7 GB
LAYERS = 61  # of a packed cache: DeepSeek-V3's
MILLION = 5000 if DRY else 2**20
# Element offsets that pages lie around; the first three are byte 2^31, 2^32 and 2^33.
MARKS = (2**20, 2**21, 2**22) if DRY else (2**30, 2**31, 2**32)


@pytest.fixture(autouse=True)
def memory():
    release_memory()
    yield
    flashmla_cupy.check()
    release_memory()


@pytest.fixture(scope="module")
def pool():
    """One room for all tests that need a big cache; what is not used is poison."""
    release_memory()
    room = xp.empty(POOL, "uint16")
    yield room
    del room
    release_memory()


def around(page_elements: int, pages: int, rng) -> np.ndarray:
    """Page numbers on both sides of every mark, the first, the last and some between."""
    near = [m // page_elements + side for m in MARKS for side in (-1, 0, 1)]
    near += [0, 1, pages - 2, pages - 1]
    inside = np.array(sorted({page for page in near if 0 <= page < pages}))
    others = rng.permutation(np.setdiff1d(np.arange(pages)[:: max(1, pages // 200)], inside))
    return rng.permutation(np.concatenate([inside, others[:20]]))


def moved(problem, cache, numbers: np.ndarray):
    """The same problem with its used pages copied to those pages of `cache`."""
    used = np.arange(problem.table.shape[1]) < -(-problem.lengths[:, None] // problem.page_size)
    pages = np.unique(problem.table[used])
    assert len(pages) == len(numbers)
    place = np.zeros(problem.k_cache.shape[0], np.int32)
    place[pages] = numbers
    table = problem.table.copy()
    table[used] = place[table[used]]
    for page in pages.tolist():  # one by one: no index of the copy passes 2^31
        bits(cache)[int(place[page])] = bits(problem.k_cache)[page]
    return replace(
        problem, k_cache=cache, table=table, block_table=xp.asarray(table), label="moved"
    )


def assert_place_does_not_matter(pool, cache, page_elements: int, **settings) -> None:
    """`cache` is a view of `pool` whose pages are `page_elements` apart."""
    fill_poison(pool.view(cache.dtype))
    page_size, dtype = cache.shape[1], cache.dtype.name
    numbers = around(page_elements, cache.shape[0], np.random.default_rng(page_size))
    lengths = [2 * page_size - 1, (len(numbers) - 3) * page_size + 1, 0]  # that many pages
    low = gpu_problems.make(lengths, page_size=page_size, dtype=dtype, seed=page_size, **settings)
    high = moved(low, cache, numbers)
    expected, got = low.decode(), high.decode()
    gpu_oracle.assert_right(low, *expected)
    for name, a, b in zip(("out", "lse"), expected, got, strict=True):
        assert same(a, b), f"{name} differs on pages {sorted(numbers.tolist())}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", gpu_problems.PAGE_SIZES)
def test_pages_past_4_gib(pool, page_size, dtype):
    pages = POOL // (page_size * ROW)
    cache = pool[: pages * page_size * ROW].view(DTYPES[dtype]).reshape(pages, page_size, 1, ROW)
    assert_place_does_not_matter(pool, cache, page_size * ROW, h_q=16, s_q=2, causal=True)


@pytest.mark.parametrize("page_size", [16, 64])
def test_a_layer_of_a_packed_cache(pool, page_size):
    """The last of 61 layers, whose pages are 61 times as far apart."""
    stride = LAYERS * page_size * ROW
    pages = POOL // stride
    storage = pool[: pages * stride].view(DTYPES["bfloat16"])
    cache = storage.reshape(pages, LAYERS, page_size, 1, ROW)[:, LAYERS - 1]
    assert_place_does_not_matter(pool, cache, stride, h_q=128)


@pytest.mark.parametrize(
    "settings",
    [
        {"h_q": 16, "page_size": 64},
        {"h_q": 128, "page_size": 16, "dtype": "float16"},
        {"h_q": 16, "s_q": 2, "causal": True, "page_size": 256},
    ],
    ids=str,
)
def test_a_million_tokens(settings):
    problem = gpu_problems.make([MILLION, 70], **settings)
    gpu_oracle.assert_right(problem, *problem.decode())


def test_4096_requests():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 20 if DRY else 200, 64 if DRY else 4096)
    lengths[[3, 40]] = 300 if DRY else 30_000
    problem = gpu_problems.make(lengths, h_q=16, causal=True)
    gpu_oracle.assert_right(problem, *problem.decode())


def test_more_than_2_to_the_31_elements_of_q_and_out():
    """8,193 requests of 4 queries of 128 heads; the oracle looks at both ends and some between."""
    batch, s_q, h_q = (40, 2, 4) if DRY else (8193, 4, 128)
    assert DRY or batch * s_q * h_q * 512 > 2**31
    rng = np.random.default_rng(1)
    problem = gpu_problems.make(
        rng.integers(0, 20, batch), s_q=s_q, h_q=h_q, page_size=16, causal=True
    )
    ends = np.r_[:16, batch - 16 : batch]
    requests = np.unique(np.r_[ends, rng.integers(0, batch, 100)])
    gpu_oracle.assert_right(problem, *problem.decode(), requests=requests)
