"""Batches that are filled up behind their metadata, as serving engines use a captured graph.

The graph of one decode call is captured for a batch of `SIZE`. A step has fewer requests: its
metadata is made for them alone and copied into the graph's, num_splits repeats its last value, and
the lengths behind are 0. The results of the step's requests have the bits of a call of them alone;
the others give out 0 and lse +inf.
"""

from __future__ import annotations

import numpy as np
import pytest
from support.gpu import problems as gpu_problems
from support.gpu.arrays import DRY, all_nan, bits, fill_nan, host, mark, same, synchronize, xp
from support.gpu.graphs import capture, new_stream

import flashmla_cupy
from flashmla_cupy import DeviceCheckError, flash_mla_with_kvcache, get_mla_metadata

pytestmark = mark

SIZE = 6 if DRY else 64
LENGTH = 150 if DRY else 3000


def zero(x) -> bool:
    return not bool(bits(x).any())


@pytest.mark.parametrize(("s_q", "h_q", "h_kv"), [(1, 16, 1), (1, 128, 1), (2, 24, 2)])
def test_a_captured_batch_is_filled_up(s_q, h_q, h_kv):
    rng = np.random.default_rng(h_q)
    stream = new_stream()
    with stream:
        lengths = rng.integers(1, LENGTH, SIZE)
        p = gpu_problems.make(
            lengths, s_q=s_q, h_q=h_q, h_kv=h_kv, causal=True, table_padding=0, seed=h_q
        )
        out, lse = p.outputs()
        metadata, num_splits = p.metadata()
        table = p.table.copy()
        p.decode((metadata, num_splits), out, lse)  # compiles, loads, allocates
        replay, _kept = capture(stream, lambda: p.decode((metadata, num_splits), out, lse))
        for real in (SIZE, SIZE - 1, SIZE // 2 + 1, 3, 1):
            now = np.where(np.arange(SIZE) < real, lengths, 0)
            p.set_lengths(now)
            garbage = rng.choice(gpu_problems.GARBAGE, table.shape)
            p.set_table(np.where(now[:, None] > 0, table, garbage))
            made, splits = get_mla_metadata(p.cache_seqlens[:real], p.rows, h_kv)
            metadata[...] = made
            num_splits[: real + 1] = splits
            num_splits[real + 1 :] = splits[-1]
            fill_nan(out)
            fill_nan(lse)
            replay()
            few = flash_mla_with_kvcache(
                p.q[:real], p.k_cache, p.block_table[:real], p.cache_seqlens[:real], 512, made,
                splits, causal=True,
            )  # fmt: skip
            flashmla_cupy.check()
            assert same(out[:real], few[0]) and same(lse[:real], few[1])
            assert zero(out[real:]) and bool(xp.isposinf(lse[real:]).all())


def test_a_request_with_tokens_behind_the_metadata_is_refused():
    p = gpu_problems.make([300, 64, 900, 70, 0], h_q=128)
    metadata, num_splits = get_mla_metadata(p.cache_seqlens[:3], p.rows, 1)
    num_splits = xp.asarray(np.append(host(num_splits), [host(num_splits)[-1]] * 2))
    out, lse = p.decode((metadata, num_splits))
    synchronize()
    assert all_nan(out[3]) and all_nan(lse[3])
    assert zero(out[4]) and bool(xp.isposinf(lse[4]).all())
    with pytest.raises(DeviceCheckError) as raised:
        flashmla_cupy.check()
    assert raised.value.args == (3, -1, "stale metadata")
    p.set_lengths([300, 64, 900, 0, 0])
    few = p.decode((metadata, num_splits))
    flashmla_cupy.check()
    assert same(out[:3], few[0][:3]) and same(lse[:3], few[1][:3])
