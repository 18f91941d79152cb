"""JAX on the CPU: eager and under every transformation; and what the callback does on a GPU.

The reference computes, so results equal NumPy's bit for bit. Four CPU devices stand for a mesh.
tests/gpu has the GPU halves.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import numpy as np
import pytest
from support.every_framework import CASES, decode, put, same_bits
from support.fake_device import install
from support.problems import make_problem

import flashmla_cupy
from flashmla_cupy import flash_mla_with_kvcache, get_mla_metadata, reference
from flashmla_cupy.calls.arguments import DECODE
from flashmla_cupy.errors import (
    DeviceCheckError,
    DeviceMismatchError,
    DTypeError,
    OptionError,
    ShapeError,
    StaleMetadataError,
)
from flashmla_cupy.frameworks import HOST

jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")
jax_op = pytest.importorskip("flashmla_cupy.traced.jax_op")
jax_callbacks = pytest.importorskip("flashmla_cupy.traced.jax_callbacks")
if jax.default_backend() != "cpu":
    pytest.skip("needs JAX on the CPU: run with JAX_PLATFORMS=cpu", allow_module_level=True)
P = jax.sharding.PartitionSpec

PROBLEM = make_problem([5, 64, 65, 128, 1, 0, 77, 100], s_q=2, h_q=8, causal=True)


def arrays_of(problem):
    return [put("jax", x, HOST) for x in problem.arrays()]


ARRAYS = arrays_of(PROBLEM)
EXPECTED = decode(*PROBLEM.arrays(), causal=True)


def step(q, k_cache, block_table, cache_seqlens):
    return decode(q, k_cache, block_table, cache_seqlens, None, True)


def assert_expected(results):
    for got, want in zip(results, EXPECTED, strict=True):
        assert same_bits(np.asarray(got).reshape(want.shape), want)


def folded(x, *axes):
    """x [8, ...] with its first axis divided."""
    return x.reshape(*axes, *x.shape[1:])


@pytest.fixture
def launches(monkeypatch):
    """The shapes of q in each run of the reference."""
    seen, run = [], reference.decode
    monkeypatch.setattr(
        reference, "decode", lambda q, *a, **k: seen.append(q.shape) or run(q, *a, **k)
    )
    return seen


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_table_equals_numpy(case):
    p = case.problem()
    out, lse = decode(*arrays_of(p), **p.options())
    expected = decode(*p.arrays(), **p.options())
    assert isinstance(out, jax.Array)
    assert same_bits(out, expected[0])
    assert same_bits(lse, expected[1])


def test_jit():
    assert_expected(jax.jit(step)(*ARRAYS))


def test_without_jit():
    with jax.disable_jit():
        assert_expected(step(*ARRAYS))


def test_lazy_metadata_inside_and_outside_of_jit():
    """It stays unbound: a tracer must not outlive its trace."""
    lazy, none = get_mla_metadata()

    def call(*arrays):
        return flash_mla_with_kvcache(*arrays, 512, lazy, none, causal=True)

    assert_expected(jax.jit(call)(*ARRAYS))
    assert_expected(call(*ARRAYS))
    assert not lazy.have_initialized


def test_metadata_equals_numpy():
    for got, want in zip(
        jax.jit(get_mla_metadata, static_argnums=(1, 2))(ARRAYS[3], 16, 1),
        get_mla_metadata(PROBLEM.cache_seqlens, 16, 1),
        strict=True,
    ):
        assert same_bits(got, want)


def test_eval_shape(launches):
    out, lse = jax.eval_shape(step, *ARRAYS)
    assert (out.shape, out.dtype) == ((8, 2, 8, 512), jnp.bfloat16)
    assert (lse.shape, lse.dtype) == ((8, 8, 2), jnp.float32)
    assert launches == []


def test_scan(launches):
    """Three steps, each one token longer."""
    q, k_cache, table, lengths = ARRAYS

    def body(now, _):
        return jnp.minimum(now + 1, lengths), decode(q, k_cache, table, now)

    _, (outs, lses) = jax.jit(lambda n: jax.lax.scan(body, n, None, length=3))(lengths // 2)
    assert launches == [q.shape] * 3
    full = PROBLEM.cache_seqlens
    for i in range(3):
        out, lse = decode(*PROBLEM.arrays()[:3], np.minimum(full // 2 + np.int32(i), full))
        assert same_bits(outs[i], out)
        assert same_bits(lses[i], lse)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_vmap_is_one_launch(launches, wrap):
    q, k_cache, table, lengths = ARRAYS
    mapped = wrap(jax.vmap(step, in_axes=(0, None, 0, 0)))
    assert_expected(mapped(folded(q, 2, 4), k_cache, folded(table, 2, 4), folded(lengths, 2, 4)))
    assert launches == [q.shape]


def test_nested_vmap_is_one_launch(launches):
    q, k_cache, table, lengths = ARRAYS
    mapped = jax.jit(jax.vmap(jax.vmap(step, (0, None, 0, 0)), (1, None, 1, 1), (0, 0)))
    q, table, lengths = (folded(x, 2, 2, 2).swapaxes(0, 1) for x in (q, table, lengths))
    assert_expected(mapped(q, k_cache, table, lengths))
    assert launches == [ARRAYS[0].shape]


def test_vmap_over_queries_alone_shares_the_rest():
    q, k_cache, table, lengths = ARRAYS
    out, _ = jax.vmap(step, (0, None, None, None))(jnp.stack([q, q * 2]), k_cache, table, lengths)
    assert same_bits(out[0], EXPECTED[0])
    assert same_bits(out[1], step(q * 2, k_cache, table, lengths)[0])


def test_vmap_with_metadata_from_outside():
    """A schedule of one batch is of no use for all: the folded call makes its own."""
    q, k_cache, table, lengths = ARRAYS
    metadata, num_splits = get_mla_metadata(lengths[:4], 16, 1)

    def call(q, table, lengths):
        arrays = q, k_cache, table, lengths
        return flash_mla_with_kvcache(*arrays, 512, metadata, num_splits, causal=True)

    assert_expected(jax.vmap(call)(*(folded(x, 2, 4) for x in (q, table, lengths))))


def test_vmapped_metadata_is_that_of_each_batch():
    made = jax.vmap(lambda n: get_mla_metadata(n, 16, 1))(folded(ARRAYS[3], 2, 4))
    for i in range(2):
        want = get_mla_metadata(PROBLEM.cache_seqlens[4 * i : 4 * i + 4], 16, 1)
        assert same_bits(made[0][i], want[0])
        assert same_bits(made[1][i], want[1])


def test_vmap_over_the_cache_is_refused():
    q, k_cache, table, lengths = ARRAYS
    with pytest.raises(OptionError, match=r"k_cache: expected one pool .* in_axes=None"):
        jax.vmap(step, (None, 0, None, None))(q, k_cache[None], table, lengths)


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("over", ["requests", "heads"])
def test_shard_map(launches, over, kind, check_vma):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    specs, results = (P("x"), P(), P("x"), P("x")), P("x")
    if over == "heads":
        specs, results = (P(None, None, "x"), P(), P(), P()), (P(None, None, "x"), P(None, "x"))
    sharded = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=results, check_vma=check_vma)
    placed = [
        jax.device_put(x, jax.NamedSharding(mesh, spec))
        for x, spec in zip(ARRAYS, specs, strict=True)
    ]
    assert_expected(jax.jit(sharded)(*placed))
    shape = (2, 2, 8, 576) if over == "requests" else (8, 2, 2, 576)
    assert launches == [shape] * 4


def test_donated_cache_is_appended_to_in_place():
    """The usual decoding step: write the new rows, attend, give the cache back."""
    q, k_cache, table, _ = ARRAYS
    lengths = jnp.full(8, 1, jnp.int32)
    rows = jax.random.normal(jax.random.key(0), (8, 576)).astype(k_cache.dtype)

    def body(k_cache, rows):
        k_cache = k_cache.at[table[:, 0], 0, 0].set(rows)
        return k_cache, decode(q, k_cache, table, lengths)

    used = set(np.asarray(table[:, 0]).tolist())
    table = table.at[5, 0].set(min(set(range(len(k_cache))) - used))  # of the empty request
    expected = jax.jit(body)(k_cache, rows)
    mine = k_cache + 0
    address = mine.unsafe_buffer_pointer()
    updated, results = jax.jit(body, donate_argnums=0)(mine, rows)
    assert mine.is_deleted()
    assert updated.unsafe_buffer_pointer() == address
    for got, want in zip(results, expected[1], strict=True):
        assert same_bits(got, want)
    assert same_bits(results[0][:, 0, 0], rows[:, :512])  # a softmax over one key


def test_gradients_are_refused_and_stop_gradient_passes():
    q, *rest = ARRAYS

    def loss(q):
        return step(q, *rest)[0].astype(jnp.float32)[0, 0, 0, 0]

    for differentiate in (jax.grad(loss), jax.jit(jax.grad(loss))):
        with pytest.raises(OptionError, match=r"no backward pass.*stop_gradient"):
            differentiate(q)
    weighted = jax.grad(lambda w: w * loss(jax.lax.stop_gradient(q * w.astype(q.dtype))))
    assert weighted(jnp.float32(1)) == loss(q)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({0: lambda x: x[..., :512]}, ShapeError, "q: expected a last axis of 576"),
        ({0: lambda x: x[:, 0]}, ShapeError, "q: expected four axes"),
        ({0: lambda x: x.astype(jnp.float32)}, DTypeError, "q: expected bfloat16 or float16"),
        ({1: lambda x: x.astype(jnp.float16)}, DTypeError, "k_cache: expected bfloat16"),
        ({1: lambda x: x[:, :48]}, ShapeError, "k_cache: expected a page_size"),
        ({2: lambda x: x[:3]}, ShapeError, "block_table: expected one row for each of the 8"),
        ({3: lambda x: x.astype(jnp.int16)}, DTypeError, "cache_seqlens: expected int32"),
        ({3: lambda x: x[:4]}, ShapeError, "cache_seqlens: expected shape (8,)"),
    ],
)
def test_bad_arguments_are_named_at_trace_time(launches, changes, error, words):
    def call(q, k_cache, table, lengths):
        changed = [
            changes.get(i, lambda x: x)(x) for i, x in enumerate((q, k_cache, table, lengths))
        ]
        return flash_mla_with_kvcache(*changed, 512, get_mla_metadata()[0])

    for way in (jax.jit(call), call, lambda *a: jax.eval_shape(call, *a)):
        with pytest.raises(error) as caught:
            way(*ARRAYS)
        assert words in str(caught.value)
    assert launches == []


def test_outputs_of_the_caller_are_refused():
    with pytest.raises(OptionError, match="JAX arrays cannot be written"):
        flash_mla_with_kvcache(*ARRAYS, 512, get_mla_metadata()[0], out=ARRAYS[0])


def test_metadata_of_another_configuration_is_refused():
    metadata, num_splits = get_mla_metadata(ARRAYS[3], 1000, 1)
    with pytest.raises(StaleMetadataError, match="tile_scheduler_metadata"):
        flash_mla_with_kvcache(*ARRAYS, 512, metadata, num_splits)


def test_two_devices_are_both_named():
    one, two = jax.devices()[:2]
    q, k_cache, *rest = ARRAYS
    with pytest.raises(
        DeviceMismatchError, match=r"k_cache: .*cpu:0, where q is, got one on.*cpu:1"
    ):
        step(jax.device_put(q, one), jax.device_put(k_cache, two), *rest)


def test_sharded_arrays_belong_into_shard_map():
    mesh = jax.make_mesh((4,), ("x",))
    q = jax.device_put(ARRAYS[0], jax.NamedSharding(mesh, P("x")))
    with pytest.raises(DeviceMismatchError, match=r"q: .* sharded over 4 devices.*shard_map"):
        flash_mla_with_kvcache(q, *ARRAYS[1:], 512, get_mla_metadata()[0])


def test_a_refused_request_is_reported_by_check_and_by_the_next_eager_call():
    q, k_cache, table, lengths = ARRAYS
    bad = table.at[1, 0].set(99)
    for report in (flashmla_cupy.check, lambda: step(*ARRAYS)):
        out, _ = jax.jit(step)(q, k_cache, bad, lengths)
        assert np.isnan(np.asarray(out[1], np.float32)).all()
        assert same_bits(out[0], EXPECTED[0][0])
        with pytest.raises(DeviceCheckError, match="request 1"):
            report()
    flashmla_cupy.check()


def test_an_empty_batch_calls_nothing(launches):
    q, k_cache, table, lengths = ARRAYS
    out, lse = jax.jit(step)(q[:0], k_cache, table[:0], lengths[:0])
    assert (out.shape, lse.shape) == ((0, 2, 8, 512), (0, 8, 2))
    assert launches == []


def test_one_trace_serves_many_calls(monkeypatch):
    """Eager calls of one signature are neither checked nor compiled again."""
    monkeypatch.setattr(jax_op, "_calls", {})
    step(*ARRAYS)
    monkeypatch.setattr(jax_op, "_checked", None)
    before = jax_op.decode_callback.cache_info().misses
    for _ in range(3):
        step(*ARRAYS)
    assert jax_op.decode_callback.cache_info().misses == before


# --- on a pretended GPU: what the callbacks launch -----------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    fake = install(monkeypatch)
    monkeypatch.setattr(jax_callbacks, "device_guard", fake.framework.device_guard)
    return fake


def device_buffer(pointer, shape, device):
    interface = {"data": (pointer, False), "shape": shape}
    return SimpleNamespace(
        shape=shape, __cuda_array_interface__=interface, __dlpack_device__=lambda: (2, device)
    )


def test_tracing_for_gpus_prepares_all_of_them_and_asks_for_scratch(gpu, monkeypatch):
    """Capture allows no loading, so every GPU's engine is asked while tracing; launches wait."""
    monkeypatch.setattr(jax_op, "placed", lambda *_: True)
    monkeypatch.setattr(jax_op, "gpus", lambda: [0, 1])
    prepared = []
    for device, engine in gpu.engines.items():

        def prepare(geometry, device=device):
            prepared.append((device, geometry.batch))
            return SimpleNamespace(scratch_floats=1000 + device)

        engine.prepare = prepare
    mapped = jax.vmap(step, (0, None, 0, 0))
    q, k_cache, table, lengths = ARRAYS
    text = (
        jax.jit(mapped)
        .lower(folded(q, 2, 4), k_cache, folded(table, 2, 4), folded(lengths, 2, 4))
        .as_text()
    )
    assert {(0, 8), (1, 8)} <= set(prepared)
    assert "tensor<1001xf32>" in text
    assert gpu.launches == []


@pytest.mark.parametrize("with_metadata", [True, False])
def test_the_callback_launches_on_the_stream_and_device_it_is_called_for(gpu, with_metadata):
    info = flashmla_cupy.frameworks.framework("jax").describe
    geometry = jax_op.Geometry.of(*map(info, ARRAYS[:3]), parts=7)
    config = jax_op.Config(0.5, True, True, DECODE.names[: 6 if with_metadata else 4])
    callback = jax_op.decode_callback(config, geometry)
    operands = [device_buffer(i, (8,), 1) for i in range(100, 106 if with_metadata else 104)]
    results = [device_buffer(i, (8,), 1) for i in range(200, 203 if with_metadata else 205)]
    callback(SimpleNamespace(stream=77), tuple(results), *operands)
    assert gpu.engines[0].launches == []
    ((what, stream, addresses, *rest),) = gpu.engines[1].launches
    new_splits = 0 if with_metadata else 204
    assert (what, stream, rest) == ("decode", 77, [geometry, 0.5, True, new_splits])
    assert geometry.q_strides == (9216, 4608, 576, 1)
    metadata = 104 if with_metadata else 203
    assert addresses == (100, 101, metadata, 103, 102, 200, 201, 202)


def test_the_metadata_callback_launches(gpu):
    callback = jax_op.metadata_callback(7, 16, 1)
    results = [device_buffer(200, (7, 8), 0), device_buffer(201, (4,), 0)]
    callback(SimpleNamespace(stream=77), results, device_buffer(100, (3,), 0))
    assert gpu.engines[0].launches == [("schedule", 77, 100, 3, 7, 16, 1, 200, 201)]


def test_a_gpu_that_the_trace_did_not_expect_is_refused():
    """The scratch of a call that was traced for the CPU is too small."""
    info = flashmla_cupy.frameworks.framework("jax").describe
    geometry = jax_op.Geometry.of(*map(info, ARRAYS[:3]), parts=7)
    callback = jax_op.decode_callback(jax_op.Config(0.5, True, False, DECODE.names[:6]), geometry)
    operands = [device_buffer(i, (8,), 1) for i in range(6)]
    with pytest.raises(RuntimeError, match="traced for the CPU"):
        callback(SimpleNamespace(stream=77), (), *operands)
