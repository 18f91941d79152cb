"""PyTorch's CUDA graphs and compiler."""

from __future__ import annotations

import pytest
from support.every_framework import decode, same_bits
from support.gpu.sides import arrays_of, cupy
from support.problems import make_problem

from flashmla_cupy import flash_mla_with_kvcache, get_mla_metadata

pytestmark = pytest.mark.gpu


def test_torch_graph_is_right_for_other_lengths(torch):
    p = make_problem([300, 70, 129], s_q=2, h_q=16, causal=True)
    q, k_cache, table, lengths = arrays_of("torch", p)
    full = lengths.clone()
    decode(q, k_cache, table, lengths, causal=True)  # compiles and loads before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode(q, k_cache, table, lengths, causal=True)
    for new in (full, full // 2, full * 0, torch.tensor([5, 64, 65]).int().cuda()):
        lengths.copy_(new)
        graph.replay()
        expected = decode(q, k_cache, table, new.clone(), causal=True)
        assert same_bits(out, expected[0])
        assert same_bits(lse, expected[1])


def test_torch_graph_with_outputs_of_the_caller_allocates_only_scratch(torch):
    arrays = arrays_of("torch", make_problem([300, 70], h_q=16))
    metadata = get_mla_metadata(arrays[3], 16, 1)
    out, lse = flash_mla_with_kvcache(*arrays, 512, *metadata)
    mine, my_lse = torch.empty_like(out), torch.empty_like(lse)
    pool = cupy.get_default_memory_pool().total_bytes()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flash_mla_with_kvcache(*arrays, 512, *metadata, out=mine, lse=my_lse)
    graph.replay()
    assert same_bits(mine, out)
    assert cupy.get_default_memory_pool().total_bytes() == pool


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_compile(torch, mode):
    @torch.compile(fullgraph=True, dynamic=mode == "default", mode=mode)
    def step(q, k_cache, table, lengths):
        out, lse = decode(q * 2, k_cache, table, lengths, causal=True)
        return out + 0, lse + 0

    for lengths in ([300, 70, 129], [1, 64], [500]) if mode == "default" else ([300, 70],) * 4:
        q, *rest = arrays_of("torch", make_problem(lengths, s_q=2, h_q=16, causal=True))
        got = [x.clone() for x in step(q, *rest)]
        for mine, expected in zip(got, decode(q * 2, *rest, causal=True), strict=True):
            assert same_bits(mine, expected)


def test_torch_opcheck(torch):
    from flashmla_cupy.traced import torch_op  # noqa: F401 (registers the ops)

    arrays = arrays_of("torch", make_problem([70, 5], s_q=2, h_q=4))
    metadata = get_mla_metadata(arrays[3], 8, 1)
    for op, args in (
        (torch.ops.flashmla_cupy.metadata, (arrays[3], 8, 1)),
        (torch.ops.flashmla_cupy.decode, (*arrays, *metadata, 0.04, True)),
    ):
        results = torch.library.opcheck(op.default, args)
        assert set(results.values()) == {"SUCCESS"}, results
