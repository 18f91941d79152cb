"""PyTorch on the CPU: eager, torch.compile with dynamic shapes, export, and the registered ops.

The reference computes, so results equal NumPy's bit for bit. tests/gpu has the GPU halves.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from support.every_framework import CASES, decode, put, same_bits
from support.problems import make_problem

from flashmla_cupy import (
    append_mla_kv,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
)
from flashmla_cupy.errors import OptionError
from flashmla_cupy.frameworks import HOST

torch = pytest.importorskip("torch")
CompileCounterWithBackend = pytest.importorskip("torch._dynamo.testing").CompileCounterWithBackend


def tensors(problem):
    return [put("torch", x, HOST) for x in problem.arrays()]


def step(*arrays):
    return decode(*arrays, None, True)


def two_layers(*arrays):
    """Two layers that share FlashMLA's lazy metadata."""
    return layers(get_mla_metadata()[0], *arrays)


def layers(lazy, q, k_cache, block_table, cache_seqlens):
    arrays = q, k_cache, block_table, cache_seqlens
    out, _ = flash_mla_with_kvcache(*arrays, 512, lazy, causal=True)
    q = torch.nn.functional.pad(out, (0, 64))
    return flash_mla_with_kvcache(q, *arrays[1:], 512, lazy, causal=True)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_table_equals_numpy(case):
    p = case.problem()
    out, lse = decode(*tensors(p), **p.options())
    expected = decode(*p.arrays(), **p.options())
    assert isinstance(out, torch.Tensor)
    assert same_bits(out, expected[0])
    assert same_bits(lse, expected[1])


def test_strided_tensors_and_outputs_of_the_caller():
    p = make_problem([70, 5], s_q=2, h_q=4)
    q, k_cache, *rest = tensors(p)
    wide = torch.zeros(2, 2, 8, 576, dtype=q.dtype)
    wide[:, :, ::2] = q
    out, lse = torch.zeros(2, 2, 4, 512, dtype=q.dtype), torch.zeros(2, 4, 2)
    lazy, _ = get_mla_metadata()
    got = flash_mla_with_kvcache(wide[:, :, ::2], k_cache, *rest, 512, lazy, out=out, lse=lse)
    assert got[0] is out
    assert got[1] is lse
    assert same_bits(out, decode(*p.arrays())[0])


INDUCTOR = pytest.param(
    "inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
)
LENGTHS = ([5, 64, 65], [70, 3], [1, 2, 3, 400], [0, 500])


@pytest.mark.parametrize("function", [step, two_layers])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", INDUCTOR])
def test_compiled_with_dynamic_batch_and_lengths(function, backend):
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for lengths in LENGTHS:
        arrays = tensors(make_problem(lengths, s_q=2, h_q=8, causal=True))
        for got, expected in zip(compiled(*arrays), function(*arrays), strict=True):
            assert same_bits(got, expected)
    assert counter.frame_count <= 2  # the largest problem may have another number of columns


@pytest.mark.parametrize("given", ["out", "lse", "out and lse"])
def test_compiled_with_outputs_of_the_caller(given):
    arrays = tensors(make_problem([70, 5], s_q=2, h_q=4))
    expected = step(*arrays)
    out = torch.zeros_like(expected[0]) if "out" in given else None
    lse = torch.zeros_like(expected[1]) if "lse" in given else None

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(out, lse):
        lazy, _ = get_mla_metadata()
        return flash_mla_with_kvcache(*arrays, 512, lazy, causal=True, out=out, lse=lse)

    for got, mine, want in zip(call(out, lse), (out, lse), expected, strict=True):
        assert same_bits(got, want)
        assert mine is None or same_bits(mine, want)


def test_compiled_with_metadata_that_an_eager_call_has_bound():
    arrays = tensors(make_problem([70, 5], s_q=2, h_q=4))
    lazy, _ = get_mla_metadata()
    expected = flash_mla_with_kvcache(*arrays, 512, lazy, causal=True)
    compiled = torch.compile(flash_mla_with_kvcache, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(*arrays, 512, lazy, causal=True)[0], expected[0])


@pytest.mark.parametrize("made", ["inside", "outside"])
def test_compiled_layers_share_one_schedule(made):
    arrays = tensors(make_problem([70, 5], s_q=2, h_q=4))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    lazy, _ = get_mla_metadata()
    if made == "inside":
        got = torch.compile(two_layers, fullgraph=True, backend=backend)(*arrays)
    else:
        got = torch.compile(layers, fullgraph=True, backend=backend)(lazy, *arrays)
        assert not lazy.have_initialized
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert targets.count("flashmla_cupy.metadata") == 1
    assert targets.count("flashmla_cupy.decode") == 2
    for mine, expected in zip(got, two_layers(*arrays), strict=True):
        assert same_bits(mine, expected)
    for mine, expected in zip(layers(lazy, *arrays), got, strict=True):  # eager, with the same
        assert same_bits(mine, expected)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, *arrays):
            return step(*arrays)

    arrays = tensors(make_problem([70, 5], s_q=2, h_q=4))
    exported = torch.export.export(Layer(), tuple(arrays)).module()
    assert same_bits(exported(*arrays)[0], step(*arrays)[0])


def test_opcheck():
    """Schema, autograd registration, fake tensors, and tracing with dynamic shapes."""
    from flashmla_cupy.traced import torch_op  # noqa: F401 (registers the ops)

    arrays = tensors(make_problem([70, 5], s_q=2, h_q=4))
    metadata, num_splits = get_mla_metadata(arrays[3], 8, 1)
    inputs = (*arrays, metadata, num_splits, 0.04, True)
    out, lse = torch.zeros(2, 2, 4, 512, dtype=torch.bfloat16), torch.zeros(2, 4, 2)
    ops = torch.ops.flashmla_cupy
    for op, args in (
        (ops.metadata, (arrays[3], 8, 1)),
        (ops.decode, inputs),
        (ops.decode_out, (*inputs, out, lse)),
    ):
        results = torch.library.opcheck(op.default, args)
        assert set(results.values()) == {"SUCCESS"}, results


def test_fake_tensors_give_shapes():
    mode = torch._subclasses.FakeTensorMode()
    with mode:
        fakes = [mode.from_tensor(x) for x in tensors(make_problem([70, 5], s_q=2, h_q=4))]
        out, lse = step(*fakes)
    assert (out.shape, out.dtype) == ((2, 2, 4, 512), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 4, 2), torch.float32)


def test_compiled_gradients_are_refused_with_the_reason():
    q, *rest = tensors(make_problem([70, 5], s_q=2, h_q=4))
    expected = step(q, *rest)
    q.requires_grad_()
    with pytest.raises(Exception, match="decoding has no backward pass"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(q, *rest)
    with torch.no_grad():
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(q, *rest)
    assert same_bits(got[0], expected[0])
    metadata, num_splits = get_mla_metadata(rest[2], 8, 1)
    out, _ = torch.ops.flashmla_cupy.decode(
        q.detach(), *rest, metadata, num_splits, 576**-0.5, True
    )
    assert same_bits(out, expected[0])


def test_compiled_bad_shapes_name_the_argument():
    q, *rest = tensors(make_problem([70, 5], s_q=2, h_q=4))
    with pytest.raises(Exception, match=r"ShapeError.*'q'"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(q[..., :512], *rest)


@pytest.mark.parametrize("place", [0, 1])  # of q and of the cache
def test_negative_views_are_refused(place):
    arrays = tensors(make_problem([70, 5], s_q=2, h_q=4))
    arrays[place] = torch._neg_view(arrays[place])
    with pytest.raises(OptionError, match="negative bit") as caught:
        step(*arrays)
    assert caught.value.argument == ("q", "k_cache")[place]
    arrays[place] = arrays[place].resolve_neg()
    step(*arrays)


def test_gradients_of_the_outputs_are_refused():
    arrays = tensors(make_problem([70, 5], s_q=2, h_q=4))
    out = torch.zeros(2, 2, 4, 512, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(OptionError, match="out: expected a tensor that needs no gradient"):
        flash_mla_with_kvcache(*arrays, 512, get_mla_metadata()[0], out=out)
    assert np.isfinite(step(*arrays)[1].numpy()).all()


# --- what autograd is told of writes ------------------------------------------------------------


def versions(*written):
    return [x._version for x in written]


def test_autograd_notices_rows_written_into_a_cache_it_has_saved():
    k_cache = torch.ones(3, 16, 1, 576, dtype=torch.float16)
    weight = torch.ones_like(k_cache, requires_grad=True)
    loss = (weight * k_cache).sum()
    append_mla_kv(k_cache, torch.full((2, 576), 7, dtype=torch.float16), torch.tensor([0, 5]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("given", [("out",), ("lse",), ("out", "lse")])
def test_outputs_of_the_caller_have_another_version(given, compiled):
    arrays = tensors(make_problem([70, 5], s_q=2, h_q=4))
    out, lse = torch.zeros(2, 2, 4, 512, dtype=torch.bfloat16), torch.zeros(2, 4, 2)
    outputs = {name: {"out": out, "lse": lse}[name] for name in given}

    def call(arrays, outputs):
        return flash_mla_with_kvcache(*arrays, 512, get_mla_metadata()[0], **outputs)[0]

    if compiled:
        call = torch.compile(call, backend="aot_eager")
    call(arrays, outputs)
    assert all(versions(*outputs.values()))
    assert not any(versions(*arrays, *({out, lse} - set(outputs.values()))))


def test_outputs_of_a_prompt_have_another_version():
    q, kv = torch.zeros(3, 16, 576).half(), torch.zeros(20, 1, 576).half()
    lists = torch.zeros(3, 1, 8, dtype=torch.int32)
    outputs = {"out": torch.zeros(3, 16, 512).half(), "max_logits": torch.zeros(3, 16)}
    flash_mla_sparse_fwd(q, kv, lists, 0.1, **outputs)
    assert versions(*outputs.values(), q, kv, lists) == [1, 1, 0, 0, 0]


def test_outputs_without_a_version():
    """Those made in inference mode."""
    arrays = tensors(make_problem([70, 5], s_q=2, h_q=4))
    with torch.inference_mode():
        out = torch.zeros(2, 2, 4, 512, dtype=torch.bfloat16)
        flash_mla_with_kvcache(*arrays, 512, get_mla_metadata()[0], out=out)
    assert same_bits(out, flash_mla_with_kvcache(*arrays, 512, get_mla_metadata()[0])[0])
