"""The problems, implementations and timing behind peers.py, which says what is timed and how.

Needs PyTorch; all but `problems`, `reference` and `Ours` need a Hopper GPU as well.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashmla_cupy import flash_mla_with_kvcache, get_mla_metadata
from flashmla_cupy.bench.cases import Case
from flashmla_cupy.bench.peers import ATOL, RTOL
from flashmla_cupy.bench.timer import COLD_BYTES, PEERS_TABLES
from flashmla_cupy.sizes import HEAD_DIM, HEAD_DIM_V, ceil_div

PAGE_SIZE = 64  # the only one that every peer has
ROUNDS, WARM_SECONDS, TIMED_SECONDS = 3, 0.06, 0.12


@dataclass
class Problem:
    """The arrays of one call, as every implementation gets them."""

    q: torch.Tensor  # [batch, s_q, h_q, 576] bfloat16
    k_cache: torch.Tensor  # [num_pages, 64, 1, 576] bfloat16
    block_table: torch.Tensor  # [batch, max_pages] int32
    cache_seqlens: torch.Tensor  # [batch] int32
    cu_seqlens_q: torch.Tensor  # [batch + 1] int32
    max_seqlen: int
    softmax_scale: float
    causal: bool


def problems(case: Case, device: str = "cuda") -> list[Problem]:
    """Problems of one block table over distinct caches: calls that rotate over them find none of
    their pages in the L2 cache, unless it holds 12 such caches."""
    generator = torch.Generator(device=device).manual_seed(0)
    pages = [ceil_div(n, PAGE_SIZE) for n in case.lengths]
    total = sum(pages)
    copies = min(PEERS_TABLES, ceil_div(COLD_BYTES, total * PAGE_SIZE * HEAD_DIM * 2))
    order = torch.randperm(total, device=device, generator=generator).to(torch.int32)
    block_table = torch.zeros(case.batch, max(pages), dtype=torch.int32, device=device)
    for row, share in zip(block_table, order.split(pages), strict=True):
        row[: len(share)] = share
    cache_seqlens = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    ends = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * case.s_q

    def normal(*shape: int) -> torch.Tensor:
        array = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return array.normal_(generator=generator)

    made = []
    for _ in range(copies):
        k_cache = normal(total, PAGE_SIZE, 1, HEAD_DIM)
        q = normal(case.batch, case.s_q, case.h_q, HEAD_DIM)
        arrays = (q, k_cache, block_table, cache_seqlens, ends)
        made.append(Problem(*arrays, max(case.lengths), HEAD_DIM**-0.5, case.causal))
    return made


def reference(problem: Problem, request: int) -> torch.Tensor:
    """The result [s_q, h_q, 512] of one request by the definition, in float32."""
    length, s_q = int(problem.cache_seqlens[request]), problem.q.shape[1]
    pages = problem.block_table[request, : ceil_div(length, PAGE_SIZE)].long()
    k = problem.k_cache[pages].reshape(-1, HEAD_DIM)[:length].float()
    scores = torch.einsum("qhd,kd->qhk", problem.q[request].float(), k) * problem.softmax_scale
    if problem.causal:
        keys = torch.arange(length, device=k.device)
        last = length - s_q + torch.arange(s_q, device=k.device)
        scores.masked_fill_((keys > last[:, None])[:, None], -math.inf)
    return torch.softmax(scores, -1) @ k[:, :HEAD_DIM_V]


def error_of(out: torch.Tensor, expected: torch.Tensor) -> tuple[float, bool]:
    """The largest error of a result, and whether all are within the tolerance."""
    errors = (out.float() - expected).abs()
    return errors.max().item(), bool((errors <= ATOL + RTOL * expected.abs()).all())


# --- implementations ---------------------------------------------------------------------------


class Ours:
    """This library. `metadata` makes the scheduling metadata that the calls share."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._metadata = self.metadata()

    def metadata(self) -> tuple[Any, Any]:
        rows = self._problem.q.shape[1] * self._problem.q.shape[2]
        return get_mla_metadata(self._problem.cache_seqlens, rows, 1)

    def __call__(self) -> torch.Tensor:
        p = self._problem
        arrays = (p.q, p.k_cache, p.block_table, p.cache_seqlens)
        scale, causal = p.softmax_scale, p.causal
        out, _ = flash_mla_with_kvcache(
            *arrays, HEAD_DIM_V, *self._metadata, softmax_scale=scale, causal=causal
        )
        return out


class FlashMLA:
    """The dense decode kernel of FlashMLA. Its first call makes the metadata of the others."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._metadata: tuple[Any, Any] = (None, None)

    def __call__(self) -> torch.Tensor:
        p = self._problem
        out, _, *metadata = torch.ops._flashmla_C.dense_decode_fwd(
            p.q,
            p.k_cache,
            HEAD_DIM_V,
            p.cache_seqlens,
            p.block_table,
            p.softmax_scale,
            p.causal,
            *self._metadata,
            None,  # out
        )
        self._metadata = (metadata[0], metadata[1])
        return out


class FlashAttention3:
    """FlashAttention-3 with `q_v`: keys are the 64 rotary columns, values the 512 latent ones."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._q = problem.q.flatten(0, 1)
        self._metadata = self.metadata()

    def metadata(self) -> torch.Tensor:
        p = self._problem
        batch, s_q, h_q, _ = p.q.shape
        return torch.ops._vllm_fa3_C.get_scheduler_metadata(
            *(batch, s_q, p.max_seqlen, h_q, 1),
            *(HEAD_DIM - HEAD_DIM_V, HEAD_DIM_V, torch.bfloat16),
            *(p.cache_seqlens, p.cu_seqlens_q),
            *(None, None, None, None),  # cu_seqlens_k, cu_seqlens_k_new, seqused_q, leftpad_k
            *(PAGE_SIZE, 0),  # page_size, max_seqlen_k_new
            *(p.causal, -1, -1, False),  # is_causal, window_size_left, _right, has_softcap
            *(0, None, 0),  # num_splits (chosen by it), pack_gqa, sm_margin
        )

    def __call__(self) -> torch.Tensor:
        p = self._problem
        k, v = p.k_cache[..., HEAD_DIM_V:], p.k_cache[..., :HEAD_DIM_V]
        out: torch.Tensor = torch.ops._vllm_fa3_C.fwd(
            *(self._q[..., HEAD_DIM_V:], k, v),
            *(None, None, self._q[..., :HEAD_DIM_V], None),  # k_new, v_new, q_v, out
            *(p.cu_seqlens_q, None, None),  # cu_seqlens_q, _k, _k_new
            *(None, p.cache_seqlens, p.q.shape[1], p.max_seqlen),  # seqused_q, _k, max_seqlen_q, _k
            *(p.block_table, None, None),  # page_table, kv_batch_idx, leftpad_k
            *(None, None, None),  # rotary_cos, rotary_sin, seqlens_rotary
            *(None, None, None),  # q_descale, k_descale, v_descale
            *(p.softmax_scale, p.causal, -1, -1),  # ..., window_size_left, _right
            *(0.0, True),  # softcap, is_rotary_interleaved
            *(self._metadata, 0, None, 0),  # ..., num_splits, pack_gqa, sm_margin
            *(None, 1, 0, None),  # s_aux, cp_world_size, cp_rank, cp_tot_seqused_k
        )[0]
        return out.view(*p.q.shape[:3], HEAD_DIM_V)


IMPLEMENTATIONS: dict[str, Callable[[Problem], Any]] = {
    "ours": Ours,
    "flashmla": FlashMLA,
    "fa3": FlashAttention3,
}


def load(library: Path) -> None:
    """Registers the ops of a peer. Raises OSError where it does not fit this PyTorch."""
    torch.ops.load_library(str(library))


# --- timing ------------------------------------------------------------------------------------


@dataclass
class Captured:
    """A CUDA graph of `calls` calls, and the stream that it is launched on."""

    graph: torch.cuda.CUDAGraph
    stream: torch.cuda.Stream
    calls: int


class Timer:
    """Times graphs of calls between which a tiny kernel runs, whose own time is taken off."""

    def __init__(self) -> None:
        self._elements = torch.zeros(64, device="cuda")
        self._gap_us = 0.0
        self._gap_us = self._replay_us(self.capture([], 50))

    def capture(self, functions: Sequence[Callable[[], Any]], calls: int) -> Captured:
        """A graph of `calls` calls that rotate over `functions`, the tiny kernel before each."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for function in functions:  # what is compiled, loaded and allocated at a first call
                function()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for i in range(calls):
                    self._elements.add_(1.0)
                    if functions:
                        functions[i % len(functions)]()
            graph.replay()
            torch.cuda.synchronize()
        return Captured(graph, stream, calls)

    def call_us(self, captured: Captured) -> float:
        """Microseconds of one call."""
        return self._replay_us(captured) - self._gap_us

    def in_turns_us(self, captured: Mapping[str, Captured]) -> dict[str, float]:
        """Microseconds of one call of each: the median of the rounds. Each round begins with
        another, for at the power limit whoever came first would be ahead."""
        names = list(captured)
        times: dict[str, list[float]] = {name: [] for name in names}
        for i in range(ROUNDS if names else 0):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(self.call_us(captured[name]))
        return {name: statistics.median(samples) for name, samples in times.items()}

    def _replay_us(self, captured: Captured) -> float:
        """Microseconds of a call and the tiny kernel, after some time under the same load."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def replay() -> None:
            captured.graph.replay()
            torch.cuda.synchronize()

        with torch.cuda.stream(captured.stream):
            begin = time.perf_counter()
            while time.perf_counter() - begin < WARM_SECONDS:
                replay()
            begin, replays = time.perf_counter(), 0
            start.record(captured.stream)
            while replays == 0 or time.perf_counter() - begin < TIMED_SECONDS:
                replay()
                replays += 1
            stop.record(captured.stream)
            torch.cuda.synchronize()
        return float(start.elapsed_time(stop)) * 1e3 / replays / captured.calls
