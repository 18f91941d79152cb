"""MLA decoding over several devices with jax.shard_map: split by heads, by context, and by both.

    python examples/sharded_decode_jax.py

Heads (tensor parallel): each device holds the whole cache and some query heads. MLA has one kv
head, so the cache cannot be split by heads, only repeated; nothing is communicated.

Context (context parallel): each device holds some pages of every request and decodes all heads over
them. All gather the partial out and lse, and merge_partials() makes the result of the whole: 4.2 MB
a device for 32 requests, however long they are.

Both: a mesh of (heads, context).

The results equal those of one device: by heads bit for bit on CPUs, and on GPUs up to where the
schedule, which depends on the number of heads, cuts long requests; by context up to the rounding of
the partial results to bfloat16. Without GPUs four CPU devices stand for the mesh. This runs on any
number of GPUs; it has been tried on one and on two.

In torch.distributed the same is, on each rank, with its own pages, block_table and lengths:

    out, lse = flash_mla_with_kvcache(q, my_pages, my_table, my_lengths, 512, *my_metadata, scale)
    outs, lses = out.new_empty(n, *out.shape), lse.new_empty(n, *lse.shape)
    dist.all_gather_into_tensor(outs, out)
    dist.all_gather_into_tensor(lses, lse)
    out, lse = merge_partials(outs, lses)
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flashmla_cupy import flash_mla_with_kvcache, get_mla_metadata
from flashmla_cupy.partials import merge_partials

HEADS, D_QK, D_V, PAGE = 128, 576, 512, 64
SCALE = 0.1352  # DeepSeek-V3's; flashmla_cupy.deepseek computes that of a configuration
Q_SIZE = 0.3  # of queries: scores are then of order 1


def decode(q, k_cache, block_table, lengths):
    """(out, lse) of the heads, pages and lengths that this device has."""
    metadata, num_splits = get_mla_metadata(lengths, q.shape[1] * q.shape[2], 1)
    return flash_mla_with_kvcache(
        q, k_cache, block_table, lengths, D_V, metadata, num_splits, softmax_scale=SCALE
    )


def decode_context(q, k_cache, block_table, lengths):
    """(out, lse) over the pages of all devices along the axis "context"."""
    out, lse = decode(q, k_cache, block_table[0], lengths[0])
    outs, lses = (jax.lax.all_gather(x, "context") for x in (out, lse))
    return merge_partials(outs, lses)


def deal(pages: np.ndarray, lengths: np.ndarray, n: int):
    """Deals the pages of each request out to n devices, in turn.

    pages [batch, columns] numbers all pages 0 .. batch * columns - 1 of a pool. Returns the order
    in which the pool must lie, so that each device's share is one slice of it, and for each device
    block_table [n, batch, columns / n], numbered within the slice, and lengths [n, batch]."""
    batch, columns = pages.shape
    share = pages.reshape(batch, columns // n, n).transpose(2, 0, 1)  # [n, batch, columns / n]
    order = share.reshape(-1)
    table = np.arange(batch * columns // n, dtype=np.int32).reshape(batch, columns // n)
    tokens = np.clip(lengths[:, None] - PAGE * np.arange(columns), 0, PAGE)  # of each page
    held = tokens.reshape(batch, columns // n, n).sum(axis=1).T
    return order, np.broadcast_to(table, (n, *table.shape)), held.astype(np.int32)


def main() -> int:
    devices = jax.device_count()
    on_gpu = jax.default_backend() == "gpu"
    batch, longest = (32, 32768) if on_gpu else (3, 700)
    if not on_gpu:
        print(f"JAX has no GPU here: NumPy computes, on {devices} CPU devices.")
    by_context = 2 if devices % 2 == 0 else 1

    rng = np.random.default_rng(0)
    columns = -(-longest // (PAGE * devices)) * devices
    pages = rng.permutation(batch * columns).astype(np.int32).reshape(batch, columns)
    lengths = rng.integers(1, longest, batch).astype(np.int32)
    lengths[0] = 3  # all in one page: most devices hold nothing of this request
    keys = jax.random.split(jax.random.key(0), 2)
    k_cache = jax.random.normal(keys[0], (batch * columns, PAGE, 1, D_QK), jnp.bfloat16)
    q = Q_SIZE * jax.random.normal(keys[1], (batch, 1, HEADS, D_QK), jnp.bfloat16)
    print(f"problem   {batch} requests of {lengths.min()} to {lengths.max()} tokens, {HEADS} heads")

    whole = decode(q, k_cache, jnp.asarray(pages), jnp.asarray(lengths))

    mesh = jax.make_mesh((devices,), ("heads",), axis_types=(AxisType.Auto,))
    specs = P(None, None, "heads"), P(), P(), P()
    results = P(None, None, "heads"), P(None, "heads")
    heads = run(mesh, decode, specs, results, q, k_cache, pages, lengths)
    errors = [difference(a, b) for a, b in zip(heads, whole, strict=True)]
    print(f"heads     {devices} x {HEADS // devices} heads: ", end="")
    print(f"out differs by at most {errors[0]:.1e}, lse by {errors[1]:.1e}")

    ok = errors[0] < 2e-2 and errors[1] < 1e-4 if on_gpu else errors == [0, 0]
    for n, m in ((1, devices), (devices // by_context, by_context)):
        mesh = jax.make_mesh((n, m), ("heads", "context"), axis_types=(AxisType.Auto,) * 2)
        specs = P(None, None, "heads"), P("context"), P("context"), P("context")
        order, table, held = deal(pages, lengths, m)
        merged = run(mesh, decode_context, specs, results, q, k_cache[order], table, held)
        errors = [difference(a, b) for a, b in zip(merged, whole, strict=True)]
        print(f"context   {n} x {HEADS // n} heads, {m} x {1 / m:.0%} of the pages: ", end="")
        print(f"out differs by at most {errors[0]:.1e}, lse by {errors[1]:.1e}")
        ok = ok and errors[0] < 2e-2 and errors[1] < 1e-4
    print("PASS" if ok else "FAIL")
    return 0 if ok else 1


def run(mesh, function, specs, results, *arrays):
    """The function on the mesh, each array placed as its spec says before the call."""
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)
    ]
    sharded = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=results, check_vma=False)
    return jax.jit(sharded)(*placed)


def difference(a, b) -> float:
    """The largest difference, relative to what is larger than 1."""
    a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
    return float((np.abs(a - b) / np.maximum(1, np.abs(b))).max())


if __name__ == "__main__":
    sys.exit(main())
