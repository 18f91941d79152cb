"""JAX's transformations, threads and command buffers."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from support.every_framework import decode, get, same_bits
from support.gpu.sides import arrays_of
from support.problems import make_problem

pytestmark = pytest.mark.gpu
TESTS = Path(__file__).resolve().parents[2]


def test_jax_transformations(jax):
    p = make_problem([300, 70, 1, 129, 64, 0, 65, 5], s_q=2, h_q=16, causal=True)
    q, k_cache, table, lengths = arrays_of("jax", p)
    expected = decode(*arrays_of("cupy", p), causal=True)

    def step(q, k_cache, table, lengths):
        return decode(q, k_cache, table, lengths, causal=True)

    def fold(x):
        return x.reshape(2, 4, *x.shape[1:])

    mapped = jax.jit(jax.vmap(step, (0, None, 0, 0)))(fold(q), k_cache, fold(table), fold(lengths))
    P = jax.sharding.PartitionSpec
    n = jax.device_count()
    mesh = jax.make_mesh((n,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    heads, whole = (P(None, None, "x"), P(None, "x")), P()
    specs = heads[0], whole, whole, whole
    sharded = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=heads))(
        *(
            jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
            for x, spec in zip((q, k_cache, table, lengths), specs, strict=True)
        )
    )
    for got, want in zip(mapped, expected, strict=True):
        assert same_bits(np.asarray(got).reshape(want.shape), want)
    for got, want in zip(sharded, expected, strict=True):
        if n == 1:
            assert same_bits(np.asarray(got), want)
        else:  # the schedule of fewer heads may cut elsewhere
            np.testing.assert_allclose(
                get(got).astype(np.float32), get(want).astype(np.float32), rtol=2e-2, atol=2e-2
            )


def test_jax_in_a_fresh_thread(jax):
    """XLA may call back on a thread that has never used CUDA."""
    p = make_problem([300, 71], h_q=16)
    arrays, results = arrays_of("jax", p), []
    thread = threading.Thread(target=lambda: results.extend(map(get, decode(*arrays))))
    thread.start()
    thread.join()
    assert same_bits(results[0], decode(*arrays_of("cupy", p))[0])


COMMAND_BUFFER = """
    import sys, os
    sys.path.insert(0, sys.argv[1])
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    os.environ["XLA_FLAGS"] = "--xla_gpu_graph_min_graph_size=1"
    import statistics, time
    import jax, jax.numpy as jnp
    import numpy as np
    from jax.experimental.buffer_callback import buffer_callback
    from support.every_framework import decode, put, same_bits
    from support.problems import make_problem
    from flashmla_cupy import flash_mla_with_kvcache, get_mla_metadata
    from flashmla_cupy.gpu.decode_launch import DecodeLaunch

    p = make_problem([300, 70], h_q=16)
    arrays = [put("jax", x) for x in p.arrays()]
    expected = decode(*(put("cupy", x) for x in p.arrays()))
    calls, launch = [], DecodeLaunch.__call__
    DecodeLaunch.__call__ = lambda *a: calls.append(1) or launch(*a)
    metadata = get_mla_metadata(arrays[3], 16, 1)

    @jax.jit
    def step(q, k_cache, table, lengths, metadata, num_splits):
        q = q * 1
        out, lse = flash_mla_with_kvcache(
            q, k_cache, table, lengths, 512, metadata, num_splits
        )
        return out * 1, lse * 1

    for i in range(300):
        out, lse = step(*arrays, *metadata)
    assert same_bits(out, expected[0]) and same_bits(lse, expected[1])
    eager = flash_mla_with_kvcache(*arrays, 512, *metadata)
    assert same_bits(eager[0], expected[0])
    print("callbacks", len(calls))

    # The same program around a custom call that does next to nothing: one memset on the stream.
    import cupy
    def nothing(ctx, outs, *ins):
        for x in outs[:1]:
            pointer = x.__cuda_array_interface__["data"][0]
            cupy.cuda.runtime.memsetAsync(pointer, 0, 16, ctx.stream)

    @jax.jit
    def noop(q, k_cache, table, lengths, metadata, num_splits):
        q = q * 1
        shapes = (
            jax.ShapeDtypeStruct((2, 1, 16, 512), q.dtype),
            jax.ShapeDtypeStruct((2, 16, 1), jnp.float32),
        )
        call = buffer_callback(nothing, shapes, command_buffer_compatible=True)
        out, lse = call(q, k_cache, table, lengths, metadata, num_splits)
        return out * 1, lse * 1

    def host(calls, repeats=40, burst=20):
        # Of each; in turns, since the speed of a host changes.
        times = [[] for _ in calls]
        for _ in range(repeats):
            for call, mine in zip(calls, times):
                jax.block_until_ready(call(*arrays, *metadata))
                start = time.perf_counter()
                for _ in range(burst):
                    results = call(*arrays, *metadata)
                mine.append((time.perf_counter() - start) / burst * 1e6)
                jax.block_until_ready(results)
        return map(statistics.median, times)

    host((step, noop))
    print("host_us", *host((step, noop)))
"""


def test_jax_command_buffer(jax):
    """XLA replays the captured launches without Python; the host time is that of a no-op call."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMMAND_BUFFER), str(TESTS)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    words = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line)
    assert int(words["callbacks"]) <= 20
    ours, noop = map(float, words["host_us"].split())
    assert ours <= noop + 5
