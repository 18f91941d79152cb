"""FP8 caches and lists of tokens in every framework on a GPU: within the bound of the definition,
and the same bits in CuPy, PyTorch and JAX, eager, compiled and jitted."""

from __future__ import annotations

import numpy as np
import pytest
from support.every_framework import get, put, same_bits
from support.oracle import assert_within_bound
from support.sparse_calls import keywords, schedule_arguments
from support.sparse_oracle import (
    flashmla_allclose,
    largest_logits,
    prefill_oracle,
    sparse_oracle,
)
from support.sparse_problems import as_prompt, make_sparse_problem, prefill_problem

from flashmla_cupy import flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata
from flashmla_cupy.formats.cache_format import FORMATS

pytestmark = pytest.mark.gpu
RAW = 2.0**-10  # see tests/gpu/test_sparse.py


def placed(framework: str, named: dict) -> dict:
    return {
        name: put(framework, value) if isinstance(value, np.ndarray) else value
        for name, value in named.items()
    }


def results(framework: str, problem, wrap=lambda f: f):
    """Through the framework, with the metadata of both styles."""
    named = placed(framework, keywords(problem))
    static = {n: v for n, v in named.items() if v is None or isinstance(v, (int, float))}
    arrays = {n: v for n, v in named.items() if n not in static}
    lengths, *rows = schedule_arguments(problem)
    lengths = put(framework, lengths)

    def lazy(**arrays):
        return flash_mla_with_kvcache(
            **arrays, **static, tile_scheduler_metadata=get_mla_metadata()[0]
        )

    def explicit(lengths, **arrays):
        sizes = {"topk": arrays["indices"].shape[2], "topk_length": arrays["topk_length"]}
        metadata, num_splits = get_mla_metadata(lengths, *rows, **sizes)
        return flash_mla_with_kvcache(
            **arrays, **static, tile_scheduler_metadata=metadata, num_splits=num_splits
        )

    return wrap(lazy)(**arrays), wrap(explicit)(lengths, **arrays)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_lists(format, wide):
    if wide and format not in ("v32", "v4"):
        pytest.skip("as without")
    problem = make_sparse_problem(
        format, batch=5, s_q=2, h_q=32, topk=300, s_k=900, page_size=16, lengths="query",
        q_dtype="float8_e4m3fn" if format == "e4m3" else "bfloat16",
    )  # fmt: skip
    problem.wide_fp8 = wide
    problem.pool = problem.pool._replace(  # lists for JAX, whose arrays have no gaps
        indices=np.ascontiguousarray(problem.pool.indices)
    )
    expected = sparse_oracle(problem, k=RAW)
    first = results("cupy", problem)[0]
    assert_within_bound(*map(get, first), expected, format)
    wraps = {"cupy": lambda f: f}
    try:
        import torch

        torch.compiler.reset()  # each format is a compilation more of one function
        wraps["torch"] = lambda f: f
        wraps["torch.compile"] = lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")
    except ImportError:
        pass
    try:
        import jax

        wraps["jax"] = lambda f: f
        wraps["jax.jit"] = jax.jit
    except ImportError:
        pass
    for name, wrap in wraps.items():
        for pair in results(name.partition(".")[0], problem, wrap):
            for got, want in zip(pair, first, strict=True):
                assert same_bits(get(got), get(want)), f"{name} {format}"


@pytest.mark.parametrize("format", ["v32", "v4", "e4m3", "bfloat16_512"])
def test_prompts_over_pages(framework, format):
    problem = make_sparse_problem(
        format, batch=1, s_q=33, h_q=16, topk=128, s_k=500, page_size=16, lengths="query",
        q_dtype="float8_e4m3fn" if format == "e4m3" else "bfloat16",
    )  # fmt: skip
    out, top, lse = map(get, flash_mla_sparse_fwd(**placed(framework, as_prompt(problem))))
    assert_within_bound(out[None], lse.T[None], sparse_oracle(problem, k=RAW))
    flashmla_allclose(top, largest_logits(problem), 1e-4, 1e-3, 1e-5)


def test_prompts(framework):
    problem = prefill_problem(33, 16, 576, 500, 128)
    got = flash_mla_sparse_fwd(**placed(framework, problem))
    out, top, lse = prefill_oracle(**problem)
    flashmla_allclose(get(got[0]), out, 8e-4, 3.01 / 128, 7e-6)
    flashmla_allclose(get(got[1]), top, 1e-6, 2.01 / 65536, 1e-7)
    flashmla_allclose(get(got[2]), lse, 1e-6, 2.01 / 65536, 1e-7)


def test_a_torch_graph_of_a_step(torch):
    problem = make_sparse_problem("v32", batch=9, h_q=64, topk=500, s_k=900, varlen=False)
    named = placed("torch", keywords(problem))

    def step():
        return flash_mla_with_kvcache(**named, tile_scheduler_metadata=get_mla_metadata()[0])

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step()
    generator = np.random.default_rng(0)
    for _ in range(20):
        order = generator.permutation(problem.pool.indices.reshape(-1))
        named["indices"].copy_(put("torch", order.reshape(problem.pool.indices.shape)))
        graph.replay()
        want = step()
        assert same_bits(get(out), get(want[0])) and same_bits(get(lse), get(want[1]))


def test_jax_maps_and_shards(jax):
    """A batch folded by vmap, and a command buffer that is replayed with other lists."""
    problem = make_sparse_problem("v32", batch=4, h_q=16, topk=128, s_k=500, varlen=False)
    named = placed("jax", keywords(problem))
    static = {n: v for n, v in named.items() if v is None or isinstance(v, (int, float))}
    q, cache, sink = named["q"], named["k_cache"], named["attn_sink"]

    def step(q, indices):
        return flash_mla_with_kvcache(
            q=q, k_cache=cache, indices=indices, attn_sink=sink, **static,
            tile_scheduler_metadata=get_mla_metadata()[0],
        )  # fmt: skip

    jitted, indices = jax.jit(step), named["indices"]
    want = jitted(q, indices)
    mapped = jax.jit(jax.vmap(step))(q.reshape(2, 2, *q.shape[1:]), indices.reshape(2, 2, 1, -1))
    assert same_bits(np.asarray(mapped[0]).reshape(want[0].shape), np.asarray(want[0]))
    assert_within_bound(*map(np.asarray, want), sparse_oracle(problem, k=RAW))
    rng = np.random.default_rng(0)
    for _ in range(20):
        problem.pool.indices[...] = rng.permutation(problem.pool.indices.reshape(-1)).reshape(
            problem.pool.indices.shape
        )
        got = jitted(q, put("jax", problem.pool.indices))
        assert_within_bound(*map(np.asarray, got), sparse_oracle(problem, k=RAW))
