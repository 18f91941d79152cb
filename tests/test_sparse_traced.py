"""FP8 caches and lists of tokens under torch.compile, export and fake tensors, and under JAX's
transformations, on the CPU: the eager results, bit for bit."""

from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import numpy as np
import pytest
from support.every_framework import get, same_bits
from support.sparse_calls import here, keywords, schedule
from support.sparse_problems import as_prompt, make_sparse_problem

from flashmla_cupy import (
    DeviceCheckError,
    OptionError,
    StaleMetadataError,
    check,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
)
from flashmla_cupy.sizes import num_sm_parts

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")
if jax.default_backend() != "cpu":
    pytest.skip("needs JAX on the CPU: run with JAX_PLATFORMS=cpu", allow_module_level=True)
P = jax.sharding.PartitionSpec

NAMES = (
    "q",
    "k_cache",
    "indices",
    "topk_length",
    "attn_sink",
    "extra_k_cache",
    "extra_indices_in_kvcache",
    "extra_topk_length",
)
PROBLEM = make_sparse_problem(
    "v32", batch=4, s_q=2, topk=70, extra=(50, 20, 8), lengths="query", extra_lengths="request"
)
SCALE = PROBLEM.softmax_scale


def attend(*arrays, metadata=None, **outputs):
    named = dict(zip(NAMES, arrays, strict=True))
    q, k_cache = named.pop("q"), named.pop("k_cache")
    made = metadata or get_mla_metadata()
    return flash_mla_with_kvcache(
        q, k_cache, None, None, 512, *made, SCALE, is_fp8_kvcache=True, **named, **outputs
    )


def arrays_of(framework: str):
    named = keywords(PROBLEM, framework)
    return [named[name] for name in NAMES]


EXPECTED = attend(*arrays_of("numpy"))


def assert_expected(results):
    for got, want in zip(results, EXPECTED, strict=True):
        got = get(got)
        assert same_bits(got.reshape(want.shape), want)


def dense_fp8(q, k_cache, table, lengths):
    made = get_mla_metadata(lengths, q.shape[1] * q.shape[2], 1, is_fp8_kvcache=True)
    return flash_mla_with_kvcache(
        q, k_cache, table, lengths, 512, *made, SCALE, True, is_fp8_kvcache=True
    )


def dense_arrays(framework: str):
    pages = -(-60 // 64)
    table = (np.arange(4, dtype=np.int32)[:, None] + np.arange(pages, dtype=np.int32)) % 3
    cache = np.random.default_rng(0).integers(0, 0x70, (4, 64, 1, 656)).astype(np.uint8)
    cache[..., 512:528] = np.full(4, 2.0**-6, "<f4").view(np.uint8)
    lengths = np.array([60, 0, 1, 33], np.int32)
    return [here(framework, x) for x in (PROBLEM.q, cache, table, lengths)]


def prompt(framework: str):
    rng = np.random.default_rng(0)
    arrays = (
        PROBLEM.q[:, 0],
        (rng.standard_normal((90, 1, 576)) / 5).astype(PROBLEM.q.dtype),
        rng.integers(-20, 110, (4, 1, 33)).astype(np.int32),
        rng.standard_normal(8).astype(np.float32),
        np.array([33, 0, 7, 20], np.int32),
    )
    return [here(framework, x) for x in arrays]


def prefill(q, kv, indices, attn_sink, topk_length):
    return flash_mla_sparse_fwd(q, kv, indices, 0.05, 512, attn_sink, topk_length)


PAGES = as_prompt(make_sparse_problem("v32", batch=1, s_q=4, topk=33, lengths="query"))


def pages(framework: str):
    names = "q", "kv", "indices", "attn_sink", "topk_length"
    return [here(framework, PAGES[name]) for name in names]


def paged_prefill(q, kv, indices, attn_sink, topk_length):
    return flash_mla_sparse_fwd(q, kv, indices, 0.05, 512, attn_sink, topk_length, wide_fp8=True)


CALLS = {
    "sparse": (attend, arrays_of),
    "fp8": (dense_fp8, dense_arrays),
    "prompt": (prefill, prompt),
    "pages": (paged_prefill, pages),
}


# --- PyTorch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_compiled_calls(name, dynamic):
    function, arrays = CALLS[name]
    want = function(*arrays("numpy"))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    got = compiled(*arrays("torch"))
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


def test_compiled_calls_with_given_metadata_and_outputs():
    made = tuple(schedule(PROBLEM, "torch").values())

    def step(out, lse, *arrays):
        attend(*arrays, metadata=made, out=out, lse=lse)
        return out.clone(), lse

    out, lse = (torch.zeros(x.shape, dtype=d) for x, d in zip(
        EXPECTED, (torch.bfloat16, torch.float32), strict=True
    ))  # fmt: skip
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_expected(compiled(out, lse, *arrays_of("torch")))
    assert_expected((out, lse))
    only_out = torch.zeros_like(out)
    compiled = torch.compile(
        lambda *a: attend(*a, out=only_out)[1], fullgraph=True, backend="aot_eager"
    )
    assert same_bits(compiled(*arrays_of("torch")), EXPECTED[1])
    assert same_bits(only_out, EXPECTED[0])


def test_layers_of_a_compiled_step_share_one_schedule():
    graphs = []

    def backend(graph, _):
        graphs.append(str(graph.graph))
        return graph.forward

    def step(*arrays):
        made = get_mla_metadata()
        first = attend(*arrays, metadata=made)
        second = attend(*arrays, metadata=made)
        return first[0] + second[0]

    torch.compile(step, fullgraph=True, backend=backend)(*arrays_of("torch"))
    assert graphs[0].count("flashmla_cupy.sparse_metadata") == 1
    assert graphs[0].count("flashmla_cupy.sparse_decode") == 2


@pytest.mark.parametrize("name", CALLS)
def test_export(name):
    function, arrays = CALLS[name]

    class Layer(torch.nn.Module):
        def forward(self, *given):
            return function(*given)

    exported = torch.export.export(Layer(), tuple(arrays("torch"))).module()
    want = function(*arrays("numpy"))
    assert all(same_bits(a, b) for a, b in zip(exported(*arrays("torch")), want, strict=True))


def test_opcheck():
    from flashmla_cupy.traced import torch_operations  # noqa: F401 (registers the ops)

    ops = torch.ops.flashmla_cupy
    q, k_cache, indices, length, sink, extra, extra_indices, extra_length = arrays_of("torch")
    made = tuple(schedule(PROBLEM, "torch").values())
    optional = length, sink, extra, extra_indices, extra_length, None, None
    sparse = (q, k_cache, indices, *made, SCALE, True, False, *optional)
    dense = dense_arrays("torch")
    of_dense = get_mla_metadata(dense[3], 16, 1)
    p_q, p_kv, p_indices, *p_optional = prompt("torch")
    out, lse = (torch.zeros_like(torch.as_tensor(get(x).astype(np.float32))) for x in EXPECTED)
    lengths = torch.zeros(4, dtype=torch.int32)
    of_pages = pages("torch")
    for op, args in (
        (ops.sparse_metadata, (lengths, 16, 1, 8, 70, 20, length, extra_length)),
        (ops.sparse_decode, sparse),
        (ops.sparse_decode_out, (*sparse, out.bfloat16(), lse)),
        (ops.fp8_decode, (*dense, *of_dense, SCALE, True, False, None, None)),
        (ops.sparse_prefill, (p_q, p_kv, p_indices, 0.05, *p_optional)),
        (ops.sparse_prefill_paged, (*of_pages[:3], 0.05, True, *of_pages[3:])),
    ):
        results = torch.library.opcheck(op.default, args)
        assert set(results.values()) == {"SUCCESS"}, results


def test_fake_tensors_give_shapes():
    mode = torch._subclasses.FakeTensorMode()
    with mode:
        out, lse = attend(*[mode.from_tensor(x) for x in arrays_of("torch")])
        tokens = prefill(*[mode.from_tensor(x) for x in prompt("torch")])
    assert (out.shape, out.dtype) == ((4, 2, 8, 512), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((4, 8, 2), torch.float32)
    assert [tuple(x.shape) for x in tokens] == [(4, 8, 512), (4, 8), (4, 8)]


def test_gradients_are_refused_with_the_reason():
    q, *rest = arrays_of("torch")
    q.requires_grad_()
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        with pytest.raises(Exception, match="no backward pass"):
            function(q, *rest)


def test_gradients_through_given_outputs_are_refused():
    q, *rest = arrays_of("torch")
    out, lse = torch.zeros(4, 2, 8, 512, dtype=torch.bfloat16), torch.zeros(4, 8, 2)

    def into(q):
        return attend(q, *rest, out=out, lse=lse)[1].sum()

    with pytest.raises(Exception, match="no backward pass"):
        torch.compile(into, fullgraph=True, backend="aot_eager")(q.clone().requires_grad_())
    with torch.no_grad():
        torch.compile(into, fullgraph=True, backend="aot_eager")(q.clone().requires_grad_())


def test_forward_gradients_are_refused():
    forward_ad = torch.autograd.forward_ad
    q, *rest = arrays_of("torch")
    attend(q, *rest)
    with forward_ad.dual_level():
        with pytest.raises(OptionError, match=r"no gradient, .* got one with a tangent"):
            attend(forward_ad.make_dual(q, q), *rest)
        assert_expected(attend(q, *rest))


@pytest.mark.parametrize("later", ["eager", "compile", "export", "fake"])
@pytest.mark.parametrize("first", ["export", "fake", "eager"])
def test_a_schedule_means_nothing_in_another_trace(first, later):
    """A SchedMeta that lives longer than the program that met it first."""
    made = get_mla_metadata()
    arrays = arrays_of("torch")

    class Layer(torch.nn.Module):
        def forward(self, *given):
            return attend(*given, metadata=made)

    def run(how):
        if how == "export":
            return torch.export.export(Layer(), tuple(arrays)).module()(*arrays)
        if how == "compile":
            return torch.compile(Layer(), fullgraph=True, backend="aot_eager")(*arrays)
        if how == "fake":
            mode = torch._subclasses.FakeTensorMode()
            with mode:
                return Layer()(*[mode.from_tensor(x) for x in arrays])
        return Layer()(*arrays)

    run(first)
    results = run(later)
    if later != "fake":
        assert_expected(results)


@pytest.mark.parametrize("empty", ["batch", "s_q", "h_q"])
def test_compiled_calls_with_nothing_to_compute(empty):
    q, k_cache, indices, length, sink, extra, extra_indices, extra_length = arrays_of("torch")
    if empty == "h_q":
        q, sink = q[:, :, :0], sink[:0]
    elif empty == "s_q":
        q, indices, length, extra_indices = (x[:, :0] for x in (q, indices, length, extra_indices))
    else:
        q, indices, length, extra_indices, extra_length = (
            x[:0] for x in (q, indices, length, extra_indices, extra_length)
        )
    arrays = q, k_cache, indices, length, sink, extra, extra_indices, extra_length
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*arrays), attend(*arrays), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype and not got.numel()


def test_compiled_bad_shapes_name_the_argument():
    arrays = arrays_of("torch")
    arrays[2] = arrays[2][0]
    with pytest.raises(Exception, match=r"ShapeError.*'indices'"):
        torch.compile(attend, fullgraph=True, backend="aot_eager")(*arrays)


# --- JAX ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_jit(name):
    function, arrays = CALLS[name]
    want = function(*arrays("numpy"))
    got = jax.jit(function)(*arrays("jax"))
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
    shapes = jax.eval_shape(function, *arrays("jax"))
    assert [x.shape for x in shapes] == [x.shape for x in want]


def test_jit_with_metadata():
    made = tuple(schedule(PROBLEM, "jax").values())
    assert_expected(jax.jit(lambda *a: attend(*a, metadata=made))(*arrays_of("jax")))


IN_AXES = (0, None, 0, 0, None, None, 0, 0)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_vmap_joins_the_batch(wrap):
    folded = [
        x if axis is None else x.reshape(2, 2, *x.shape[1:])
        for x, axis in zip(arrays_of("jax"), IN_AXES, strict=True)
    ]
    made = tuple(here("jax", x) for x in get_mla_metadata(np.zeros(2, np.int32), 16, 1, 8, topk=70))
    assert_expected(wrap(jax.vmap(attend, in_axes=IN_AXES))(*folded))
    given = wrap(jax.vmap(lambda *a: attend(*a, metadata=made), in_axes=IN_AXES))(*folded)
    assert_expected(given)


def test_vmap_over_no_call():
    arrays = [
        x if axis is None else x.reshape(2, 2, *x.shape[1:])[:0]
        for x, axis in zip(arrays_of("jax"), IN_AXES, strict=True)
    ]
    out, lse = jax.vmap(attend, in_axes=IN_AXES)(*arrays)
    assert (out.shape, lse.shape) == ((0, 2, 2, 8, 512), (0, 2, 8, 2))
    q, k_cache, table, lengths = dense_arrays("jax")
    cache = jnp.zeros((*k_cache.shape[:3], 576), q.dtype)

    def dense(q, table, lengths):
        made = get_mla_metadata(lengths, q.shape[1] * q.shape[2], 1)
        return flash_mla_with_kvcache(q, cache, table, lengths, 512, *made)

    out, lse = jax.vmap(dense)(q[None][:0], table[None][:0], lengths[None][:0])
    assert (out.shape, lse.shape) == ((0, 4, 2, 8, 512), (0, 4, 8, 2))


def test_vmap_over_the_cache_is_refused():
    q, k_cache, *rest = arrays_of("jax")
    axes = (None, 0, *[None] * 6)
    with pytest.raises(OptionError, match=r"k_cache: expected one k_cache .* in_axes=None"):
        jax.vmap(attend, in_axes=axes)(q, k_cache[None], *rest)


def test_vmap_of_prompts():
    q, kv, indices, sink, length = prompt("jax")
    want = prefill(*prompt("numpy"))
    got = jax.vmap(prefill, in_axes=(0, None, 0, None, 0))(
        jnp.stack([q, q]), kv, jnp.stack([indices, indices]), sink, jnp.stack([length, length])
    )
    for array, expected in zip(got, want, strict=True):
        assert same_bits(array[0], expected) and same_bits(array[1], expected)


@pytest.mark.parametrize("check_vma", [False, True])
def test_shard_map_over_requests(check_vma):
    mesh = jax.make_mesh((4,), ("x",))
    specs = tuple(P() if axis is None else P("x") for axis in IN_AXES)
    sharded = jax.shard_map(
        attend, mesh=mesh, in_specs=specs, out_specs=P("x"), check_vma=check_vma
    )
    placed = [
        jax.device_put(x, jax.NamedSharding(mesh, spec))
        for x, spec in zip(arrays_of("jax"), specs, strict=True)
    ]
    assert_expected(jax.jit(sharded)(*placed))


def test_jax_has_no_outputs_to_give_and_no_gradient():
    arrays = arrays_of("jax")
    with pytest.raises(OptionError, match="out: expected None"):
        attend(*arrays, out=jnp.zeros((4, 2, 8, 512), jnp.bfloat16))
    with pytest.raises(OptionError, match="no backward pass"):
        jax.grad(lambda q: attend(q, *arrays[1:])[1].sum())(arrays[0])


def test_what_a_jitted_call_refuses_is_reported():
    arrays = arrays_of("numpy")
    arrays[2] = np.full_like(arrays[2], -1)
    arrays[3] = np.full_like(arrays[3], 5)
    arrays[2][3, 1, :5] = -7, 0, 1, 2, 3
    out, _ = jax.jit(attend)(*(here("jax", x) for x in arrays))
    assert np.isnan(np.asarray(out, np.float32)[3, 1]).all()
    with pytest.raises(DeviceCheckError, match="entry 0 of a list of indices"):
        check()


def test_empty_results_need_no_callback():
    q, k_cache, indices, *rest = arrays_of("jax")
    out, lse = attend(q[:0], k_cache, indices[:0], *[
        x[:0] if axis == 0 else x for x, axis in zip(rest, IN_AXES[3:], strict=True)
    ])  # fmt: skip
    assert out.shape == (0, 2, 8, 512) and lse.shape == (0, 8, 2)


# --- JAX on a pretended GPU --------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs whose launches are recorded: (ordinal, what, stream, addresses, the rest)."""
    from flashmla_cupy.calls import gathered
    from flashmla_cupy.traced import jax_operations

    launches = []

    def engine_of(ordinal):
        def gather(geometry):
            return lambda *call: launches.append((ordinal, geometry, *call))

        def list_schedule(*sizes):
            return lambda *call: launches.append((ordinal, sizes, *call))

        return SimpleNamespace(num_sms=78, gather=gather, list_schedule=list_schedule)

    for module in (gathered, jax_operations):
        monkeypatch.setattr(module, "engine_of", engine_of)
    monkeypatch.setattr(jax_operations, "placed", lambda *_: True)
    monkeypatch.setattr(jax_operations, "gpus", lambda: [0, 1])
    monkeypatch.setattr(jax_operations, "device_guard", lambda _: contextlib.nullcontext())
    made = []
    callback = jax_operations._Callback
    monkeypatch.setattr(
        jax_operations, "_Callback", lambda *a: made.append(callback(*a)) or made[-1]
    )
    jax_operations._op.cache_clear()
    yield SimpleNamespace(launches=launches, callbacks=made)
    jax_operations._op.cache_clear()


def device_buffer(pointer, device=1):
    interface = {"data": (pointer, False), "shape": (8,)}
    return SimpleNamespace(
        __cuda_array_interface__=interface, __dlpack_device__=lambda: (2, device)
    )


def test_jax_on_a_gpu_launches_with_scratch_of_xlas(gpus):
    arrays = arrays_of("jax")[:5]  # without a second cache

    def step(*arrays):
        return attend(*arrays, None, None, None)

    text = jax.jit(step).lower(*arrays).as_text()
    (callback,) = gpus.callbacks
    work = callback._works[1]
    assert f"tensor<{work.scratch_floats}xf32>" in text
    assert gpus.launches == []
    results = [device_buffer(i) for i in (200, 201, 300)]
    callback(SimpleNamespace(stream=77), results, *map(device_buffer, range(100, 105)))
    ((ordinal, geometry, stream, addresses, scale, causal, num_splits),) = gpus.launches
    assert (ordinal, stream, scale, causal, num_splits) == (1, 77, SCALE, False, 0)
    assert (geometry.batch, geometry.s_q, geometry.topk, geometry.parts) == (4, 2, 70, 78)
    named = addresses._asdict()
    want = {
        "q": 100, "cache": 101, "table": 102, "topk_length": 103, "attn_sink": 104, "out": 200,
        "lse": 201, "scratch": 300, "tile_scheduler_metadata": 0,
    }  # fmt: skip
    assert {name: named[name] for name in want} == want


def test_jax_on_a_gpu_makes_the_metadata_of_its_multiprocessors(gpus):
    def step(lengths):
        return get_mla_metadata(lengths, 16, 1, 8, topk=70)

    shapes = jax.eval_shape(step, jnp.zeros(4, jnp.int32))
    assert [x.shape for x in shapes] == [(78, 8), (9,)]
    (callback,) = gpus.callbacks
    results = [device_buffer(i, 0) for i in (200, 201, 300)]
    callback(SimpleNamespace(stream=7), results, device_buffer(100, 0))
    assert gpus.launches == [(0, ((8, 2, 70, 0), 78, 8), 7, (0, 0), 300, (200, 201))]
    empty = get_mla_metadata(jnp.zeros(0, jnp.int32), 16, 1, 8, topk=70)
    assert [x.shape for x in empty] == [(78, 8), (1,)]


@pytest.mark.parametrize("name", ["sparse", "fp8"])
def test_jax_on_a_gpu_takes_the_metadata_of_its_multiprocessors_alone(gpus, name):
    arrays, rows = (arrays_of("jax")[:5], 8) if name == "sparse" else (dense_arrays("jax"), 16)
    requests = 8 if name == "sparse" else 4

    def step(metadata, *arrays):
        if name == "sparse":
            return attend(*arrays, None, None, None, metadata=metadata)
        q, k_cache, table, lengths = arrays
        return flash_mla_with_kvcache(
            q, k_cache, table, lengths, 512, *metadata, is_fp8_kvcache=True
        )

    def shapes(num_sms):
        parts = num_sm_parts(num_sms, rows, 1)
        metadata = jnp.zeros((parts, 8), jnp.int32), jnp.zeros(requests + 1, jnp.int32)
        return [x.shape for x in jax.eval_shape(step, metadata, *arrays)]

    assert shapes(78) == [(4, 2, 8, 512), (4, 8, 2)]
    with pytest.raises(StaleMetadataError, match="78 rows"):
        shapes(132)
