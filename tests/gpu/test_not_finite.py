"""NaN and Inf in live keys: they reach what the definition says, and never another request."""

from __future__ import annotations

import numpy as np
import pytest
from support.gpu import problems as gpu_problems
from support.gpu.arrays import DRY, DTYPES, host, mark, put_tokens, same, to_float, xp

import flashmla_cupy
from flashmla_cupy import reference

pytestmark = mark

LONG = 300 if DRY else 3000  # split into many pieces on a GPU


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("s_q", "h_q", "h_kv", "dtype"),
    [(3, 16, 2, "bfloat16"), (2, 64, 1, "float16"), (5, 3, 1, "bfloat16")],
)
def test_what_is_not_finite_is_where_the_reference_has_it(value, s_q, h_q, h_kv, dtype):
    """In keys that all queries see, or all but the first, or the last query alone."""
    lengths = [LONG, 200, 64, 130]
    for request, back in [(0, 1), (1, s_q - 1), (0, LONG), (3, 1), (1, 130)]:
        p = gpu_problems.make(
            lengths, s_q=s_q, h_q=h_q, h_kv=h_kv, dtype=dtype, causal=True, garbage=(0,), seed=back
        )
        before = p.decode()
        metadata = p.metadata()
        position, head = lengths[request] - back, h_kv - 1
        page, slot = p.table[request, position // 64], position % 64
        row = host(to_float(p.k_cache[int(page), int(slot), head])).copy()
        for column in (5, 570):
            spoiled = row.copy()
            spoiled[column] = value
            put_tokens(
                p.k_cache, [page], [slot], head, xp.asarray(spoiled.astype(DTYPES[dtype])[None])
            )
            out, lse = p.decode(metadata)
            flashmla_cupy.check()
            expected = reference.decode(
                host(p.q)[[request]],
                host(p.k_cache),
                p.table[[request]],
                p.lengths[[request]],
                causal=True,
            )
            got, got_lse = host(to_float(out[request])), host(lse[request])
            where = f"request {request}, {back} from the end, column {column}"
            assert np.array_equal(np.isnan(got), np.isnan(expected.out[0])), where
            assert np.array_equal(np.isnan(got_lse), np.isnan(expected.lse[0])), where
            others = [r for r in range(4) if r != request]
            for r in others:
                assert same(out[r], before[0][r]) and same(lse[r], before[1][r]), where
