"""A decoding loop in JAX: one jitted scan over the tokens, the cache updated in place.

    python examples/jax_decode.py

The public functions take JAX arrays and tracers as they are; the kernels run inside the compiled
program, on XLA's stream and in XLA's memory. Without a Hopper GPU the same program calls the NumPy
reference, on a smaller problem.
"""

from __future__ import annotations

import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from flashmla_cupy import flash_mla_with_kvcache, get_mla_metadata

HEADS, D_QK, D_V, PAGE = 128, 576, 512, 64
SCALE = 0.1352  # DeepSeek-V3's; flashmla_cupy.deepseek computes that of a configuration
Q_SIZE = 0.3  # of queries: scores are then of order 1


def step(state, new):
    """One token for every request: append its latent row, count it, attend."""
    k_cache, block_table, lengths = state
    row, q = new  # [batch, 576], [batch, 1, heads, 576]
    page = jnp.take_along_axis(block_table, lengths[:, None] // PAGE, axis=1)[:, 0]
    k_cache = k_cache.at[page, lengths % PAGE, 0].set(row)
    lengths = lengths + 1
    metadata, num_splits = get_mla_metadata(lengths, HEADS, 1)  # once for all layers
    out, _ = flash_mla_with_kvcache(
        q,
        k_cache,
        block_table,
        lengths,
        D_V,
        metadata,
        num_splits,
        softmax_scale=SCALE,
        causal=True,
    )
    return (k_cache, block_table, lengths), out


@functools.partial(jax.jit, donate_argnums=0)  # the cache is written in place, not copied
def decode(k_cache, block_table, lengths, rows, queries):
    (k_cache, _, lengths), outs = jax.lax.scan(
        step, (k_cache, block_table, lengths), (rows, queries)
    )
    return k_cache, lengths, outs


def main() -> int:
    on_gpu = jax.default_backend() == "gpu"
    batch, longest, steps = (64, 8192, 100) if on_gpu else (3, 200, 4)
    if not on_gpu:
        print("JAX has no GPU here: computing with NumPy, inside the same jitted program.")

    rng = np.random.default_rng(0)
    columns = -(-(longest + steps) // PAGE)
    pages = rng.permutation(batch * columns).astype(np.int32)
    block_table = jnp.asarray(pages.reshape(batch, columns))
    lengths = jnp.asarray(rng.integers(1, longest, batch), jnp.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    k_cache = jax.random.normal(keys[0], (batch * columns, PAGE, 1, D_QK), jnp.bfloat16)
    rows = jax.random.normal(keys[1], (steps, batch, D_QK), jnp.bfloat16)
    queries = Q_SIZE * jax.random.normal(keys[2], (steps, batch, 1, HEADS, D_QK), jnp.bfloat16)
    print(f"problem   {batch} requests of {lengths.min()} to {lengths.max()} tokens, {steps} new")

    # Token by token, each call on its own.
    state, eager = (k_cache, block_table, lengths), []
    for new in zip(rows, queries, strict=True):
        state, out = step(state, new)
        eager.append(out)

    # All tokens in one compiled program.
    cache, total, outs = decode(k_cache, block_table, lengths, rows, queries)
    same = bool((jnp.stack(eager) == outs).all())
    print(f"scan      {'equals' if same else 'DIFFERS FROM'} the eager steps, bit for bit")
    ok = check(outs[-1], queries[-1], cache, block_table, total)
    if on_gpu:
        start = time.perf_counter()
        cache, total, outs = decode(cache, block_table, lengths, rows, queries)
        outs.block_until_ready()
        print(f"time      {(time.perf_counter() - start) / steps * 1e3:.3f} ms a step")
    print("PASS" if ok and same else "FAIL")
    return 0 if ok and same else 1


def check(out, q, k_cache, block_table, lengths) -> bool:
    """The last step of the shortest and of the longest request, against float64."""
    worst = 0.0
    for b in {int(lengths.argmin()), int(lengths.argmax())}:
        n = int(lengths[b])
        pages = k_cache[block_table[b, : -(-n // PAGE)]]
        latent = np.asarray(pages).reshape(-1, D_QK)[:n].astype(np.float64)
        score = SCALE * np.asarray(q[b, 0]).astype(np.float64) @ latent.T
        weight = np.exp(score - score.max(axis=1, keepdims=True))
        expected = weight / weight.sum(axis=1, keepdims=True) @ latent[:, :D_V]
        error = np.abs(np.asarray(out[b, 0]).astype(np.float64) - expected)
        worst = max(worst, float((error - 2**-7 * np.abs(expected)).max()))
    print(f"check     largest error beyond the rounding of bfloat16: {max(worst, 0):.1e}")
    return worst < 1e-3


if __name__ == "__main__":
    sys.exit(main())
