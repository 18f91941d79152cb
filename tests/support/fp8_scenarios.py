"""Problems for the kernel for many query rows over FP8 caches (sm90_fp8_decode.cu), and scenarios,
which compute some on emulated GPUs and check the results: each makes these by gpu(num_sms), and
takes a format of FORMATS. Keys and scales are exact in that kernel, so the bound has no share for
their rounding."""

from __future__ import annotations

import numpy as np
import pytest
from support import sparse_calls
from support.oracle import assert_within_bound
from support.sparse_dense import dense_problem
from support.sparse_oracle import pool_values, sparse_oracle
from support.sparse_problems import BEYOND, BFLOAT16, E4M3, make_sparse_problem, poison

from flashmla_cupy import check, flash_mla_with_kvcache, get_mla_metadata
from flashmla_cupy.errors import DeviceCheckError
from flashmla_cupy.formats.quantize import quantize_kv

U16 = 2.0**-11  # of P, in float16
FORMATS = ("v32", "v4", "e4m3", "e4m3_q")  # the last one with queries in e4m3


# ---- problems ---------------------------------------------------------------------------------


def make(format, **sizes):
    """A problem whose tokens have scales of their own."""
    q_dtype = "float8_e4m3fn" if format == "e4m3_q" else "bfloat16"
    problem = make_sparse_problem(format.removesuffix("_q"), q_dtype=q_dtype, **sizes)
    if problem.descale_k is not None:
        problem.descale_k = np.array([0.05], np.float32)
    rng = np.random.default_rng(sizes.get("seed", 0))

    def spread(values):
        values *= np.exp2(rng.integers(-1, 3, (len(values), 1)))

    remake(problem, spread)
    return problem


def remake(problem, change):
    """Changes the numbers of the cache's slots and quantizes them anew."""
    cache, indices, _ = problem.pool
    descale = problem.descale_k
    values = np.nan_to_num(
        pool_values(cache, problem.format, 1.0 if descale is None else float(descale[0]))
    )
    change(values)
    kv = values.reshape(*cache.shape[:3], -1).astype(BFLOAT16)
    made = quantize_kv(kv, problem.format, pow2_scales=True, descale_k=descale)
    poison(made, problem.format, np.setdiff1d(np.arange(len(values)), indices))
    problem.pool = problem.pool._replace(k_cache=made)


def with_levels(problem, levels, rows=slice(None)):
    """Adds about 10 a level to the logits, in log2, of the tokens of each list, for some rows."""

    def change(values):
        for (listed,) in problem.pool.indices:
            is_there = (listed >= 0) & (listed < len(values))
            values[listed[is_there], 0] = levels[is_there]

    remake(problem, change)
    problem.q[..., 0] = 0
    problem.q[:, :, rows, 0] = 224


def assert_right(emulator, problem, orders=2, what=""):
    """Within the bound, and the same bits in so many orders of threads."""
    want, seen = sparse_oracle(problem, p=U16, s=0), set()
    for order in range(orders):
        emulator.seed, emulator.resident = emulator.seed + 1, 1 + order % 3
        out, lse = sparse_calls.call(problem)
        assert_within_bound(out, lse, want, what)
        seen.add(out.tobytes() + lse.tobytes())
    assert len(seen) == 1, "the bits depend on the order of threads"


def pieces(problem):
    return np.diff(sparse_calls.schedule(problem)["num_splits"]).tolist()


# ---- scenarios --------------------------------------------------------------------------------


def races(gpu, format):
    """Lists whole, in pairs and in three pieces and more, several in a part; rows past the slab."""
    for seed, (num_sms, h_q, lengths, page_size, expected) in enumerate(
        [
            (5, 64, [640, 20, 333], 1, [3, 1, 2]),
            (1, 40, [200, 0, 70, 1, 64, 33, 129, 64, 10], 64, [1] * 9),
            (4, 65, [640], 53, [2]),
            (5, 17, [640, 640], 64, [3, 3]),
        ]
    ):
        emulator = gpu(num_sms)
        emulator.seed = 10 * seed
        sizes = {"batch": len(lengths), "h_q": h_q, "topk": max(lengths), "page_size": page_size}
        problem = make(format, **sizes, s_k=max(lengths) - 9, seed=seed)
        problem.pool = problem.pool._replace(topk_length=np.array(lengths, np.int32))
        for (listed,), length in zip(problem.pool.indices, lengths, strict=True):
            listed[length:] = BEYOND
        remake(problem, lambda values: None)  # with poison in all that is not listed any more
        assert pieces(problem) == expected
        assert_right(emulator, problem, 5 if num_sms == 1 else 2, f"number {seed}")
    check()


def rises(gpu, format):
    """Maxima that rise in late tiles: in each tile, in every other one, by one token of one warp;
    in all rows, and in some."""
    place = np.arange(640)
    tile = place // 64
    for seed, (levels, rows) in enumerate(
        [
            (tile, slice(None)),
            (tile // 2 * 2, slice(3, 60, 19)),
            (np.where(place % 64 == 7 + 16 * (tile % 4), tile + 1, 0), slice(None)),
            (np.where(place % 64 == 60, tile + 1, 0), slice(41, 42)),
            (np.where(tile % 3 == 2, tile, 0), slice(0, 30)),
            (np.where(place == 200, 15, 0), slice(8, 24)),  # all before is negligible
        ]
    ):
        num_sms = (4, 1, 2)[seed % 3]  # and so many pieces
        emulator = gpu(num_sms)
        emulator.seed = 10 * seed
        problem = make(
            format, batch=1, h_q=64, s_k=650, topk=640, varlen=False, sink=False, seed=seed
        )
        assert pieces(problem) == [num_sms]
        with_levels(problem, levels.astype(float), rows)
        assert_right(emulator, problem, what=f"number {seed}")
    check()


def halves(gpu, format):
    """Requests in more than two pieces, with columns that are much larger in one half of O."""
    for large in (slice(0, 256), slice(256, 512)):
        emulator = gpu(num_sms=5)
        problem = make(
            format, batch=1, h_q=64, s_k=700, topk=640, varlen=False, sink=False, kv_size=0.02
        )

        def change(values, large=large):
            values[:, large] *= 64
            values[:, 512:] *= 32

        remake(problem, change)
        assert pieces(problem)[0] > 2
        problem.softmax_scale = 2e-2
        assert_right(emulator, problem)
    check()


def dense(gpu, format):
    """Causal, with three positions and lengths from 0 to 130 tokens."""
    lengths = [1, 2, 3, 0, 17, 63, 64, 65, 66, 67, 128, 129, 130]
    for num_sms, h_q in ((1, 7), (5, 40)):
        emulator = gpu(num_sms)
        arrays, lists = dense_problem(
            format.removesuffix("_q"), lengths, s_q=3, h_q=h_q, page_size=16, causal=True
        )
        if format == "e4m3_q":
            lists.q = arrays["q"] = arrays["q"].astype(E4M3)
        want, seen = sparse_oracle(lists, p=U16, s=0), set()
        for emulator.seed in range(2):
            out, lse = flash_mla_with_kvcache(
                **arrays,
                head_dim_v=512,
                tile_scheduler_metadata=get_mla_metadata()[0],
                causal=True,
                is_fp8_kvcache=True,
            )
            assert_within_bound(out, lse, want, f"{h_q} heads")
            seen.add(out.tobytes() + lse.tobytes())
        assert len(seen) == 1, "the bits depend on the order of threads"
    check()


def sizes_of_queries(gpu, format):
    """Heads whose queries differ by powers of ten, with a softmax scale that suits the largest, and
    one that suits others."""
    for softmax_scale in (2.0**-17, 2.0**-7):
        emulator = gpu(num_sms=2)
        problem = make(
            format, batch=1, h_q=33, s_k=200, topk=150, sink=False, softmax_scale=softmax_scale
        )
        least, most = (-1.5, 2.6) if format == "e4m3_q" else (-3, 4)
        size = 10 ** np.linspace(least, most, 33)[np.random.default_rng(1).permutation(33)]
        q = problem.q.astype(np.float64) * size[:, None]
        problem.q = q.astype(problem.q.dtype)
        assert_right(emulator, problem)
    check()


def bad_rows(gpu, format):
    """An index outside of the pool makes NaN of its query token, and of no other."""
    gpu(num_sms=2)
    problem = make(format, batch=2, h_q=20, topk=70, s_k=90, varlen=False, sink=False)
    right, right_lse = sparse_calls.call(problem)
    problem.pool.indices[1, 0, 66] = np.prod(problem.pool.k_cache.shape[:2])
    out, lse = sparse_calls.call(problem)
    with pytest.raises(DeviceCheckError):
        check()
    is_nan = np.isnan(out[1].astype(np.float32)).all() and np.isnan(lse[1]).all()
    assert is_nan, "a bad row does not reach all of its request"
    assert out[0].tobytes() == right[0].tobytes() and lse[0].tobytes() == right_lse[0].tobytes()
