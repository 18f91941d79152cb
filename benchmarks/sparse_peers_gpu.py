"""The calls behind sparse_peers.py, which says what is timed and how. Needs PyTorch and, but for
`difference` and `lists`, a Hopper GPU and the peer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from flashmla_cupy import (
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
    quantize_kv,
)
from flashmla_cupy.bench.timer import COLD_BYTES
from flashmla_cupy.sizes import HEAD_DIM, HEAD_DIM_V, ceil_div

if TYPE_CHECKING:
    from sparse_peers import Case

Call = Callable[[], torch.Tensor]
PAGE_SIZE = 64
MOST_PROBLEMS = 48
POOL_TOKENS = 1 << 20  # where there are no more in use
ATOL, RTOL = 4e-3, 0.02
RMS_OF_E4M3 = 0.03  # relative; measured 0.011
SCALE = HEAD_DIM**-0.5
PEER_HEADS = 64  # FlashMLA decodes so many at least


def difference(ours: torch.Tensor, peer: torch.Tensor, kind: str) -> tuple[float, bool]:
    """The largest one, and whether all are as small as FP8 and bfloat16 make them. Over all of an
    e4m3 cache the peer rounds P to e4m3, where small weights vanish: there mean squares count."""
    found = (ours.float() - peer.float()).abs()
    if kind == "e4m3":
        rms = found.square().mean().sqrt() / peer.float().square().mean().sqrt()
        return found.max().item(), bool(rms <= RMS_OF_E4M3)
    return found.max().item(), bool((found <= ATOL + RTOL * peer.float().abs()).all())


def lists(queries: int, tokens: int, s_kv: int, pool: int, device: str) -> torch.Tensor:
    """int32 [queries, tokens]: of each query token, different ones of s_kv in a row in the pool."""
    made = torch.empty(queries, tokens, dtype=torch.int32, device=device)
    for i in range(0, queries, 64):
        n = min(64, queries - i)
        chosen = torch.rand(n, s_kv, device=device).topk(tokens, 1).indices
        begins = torch.randint(0, pool - s_kv + 1, (n, 1), device=device)
        made[i : i + n] = chosen + begins
    return made


def calls(case: Case) -> tuple[list[Call], list[Call]]:
    """Ours and the peer's, over the same arrays."""
    made = {"v32": _sparse, "v4": _sparse, "e4m3": _e4m3, "prefill": _prefill}[case.kind](case)
    return [ours for ours, _ in made], [peer for _, peer in made]


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(torch.bfloat16)


def _problems(case: Case) -> int:
    return min(MOST_PROBLEMS, ceil_div(COLD_BYTES, case.nbytes))


def _pool(format: str, d_qk: int) -> torch.Tensor:
    """An FP8 cache. The pages of v4 lie in one array, padded."""
    pages = POOL_TOKENS // PAGE_SIZE
    if format == "v4":
        return quantize_kv(_normal(pages, PAGE_SIZE, 1, d_qk), format)
    quarter = pages // 4  # at a time, since it takes room
    return torch.cat([quantize_kv(_normal(quarter, PAGE_SIZE, 1, d_qk), format) for _ in range(4)])


def _sparse(case: Case) -> list[tuple[Call, Call]]:
    d_qk, scale = case.d_qk, case.d_qk**-0.5
    pool = _pool(case.kind, d_qk)
    meta, splits = get_mla_metadata(
        torch.full((case.batch,), case.s_kv, dtype=torch.int32, device="cuda"),
        case.s_q * case.h_q,
        num_heads_q=case.h_q,
        is_fp8_kvcache=True,
        topk=case.tokens,
    )

    def problem() -> tuple[Call, Call]:
        q = _normal(case.batch, case.s_q, case.h_q, d_qk)
        padded = torch.zeros(case.batch, case.s_q, max(PEER_HEADS, case.h_q), d_qk).to(q)
        padded[:, :, : case.h_q] = q
        indices = lists(case.queries, case.tokens, case.s_kv, POOL_TOKENS, "cuda")
        indices = indices.view(case.batch, case.s_q, case.tokens)
        plan: list[Any] = [None, None]

        def ours() -> torch.Tensor:
            arrays = (q, pool, None, None, HEAD_DIM_V, meta, splits, scale)
            return flash_mla_with_kvcache(*arrays, is_fp8_kvcache=True, indices=indices)[0]

        def peer() -> torch.Tensor:
            out, _, *plan[:] = torch.ops._flashmla_C.sparse_decode_fwd(
                *(padded, pool, indices, None, None, *plan),
                *(None, None, None, HEAD_DIM_V, scale, None, False),
            )
            return out[:, :, : case.h_q]

        return ours, peer

    return [problem() for _ in range(_problems(case))]


def _e4m3(case: Case) -> list[tuple[Call, Call]]:
    ops = torch.ops._flashmla_extension_C
    pages = case.s_kv // PAGE_SIZE
    lengths = torch.full((case.batch,), case.s_kv, dtype=torch.int32, device="cuda")
    one = torch.ones(1, device="cuda")
    meta, splits = get_mla_metadata(lengths, case.h_q, 1, is_fp8_kvcache=True)
    plan = ops.get_mla_decoding_metadata_dense_fp8(lengths, case.h_q, 1)

    def problem() -> tuple[Call, Call]:
        parts = [_normal(pages, PAGE_SIZE, 1, HEAD_DIM).to(torch.float8_e4m3fn) for _ in lengths]
        pool = torch.cat([part.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
        table = torch.randperm(len(pool), device="cuda").int().view(case.batch, pages)
        q = _normal(case.batch, 1, case.h_q, HEAD_DIM).to(torch.float8_e4m3fn)

        def ours() -> torch.Tensor:
            arrays = (q, pool, table, lengths, HEAD_DIM_V, meta, splits, SCALE)
            return flash_mla_with_kvcache(*arrays, is_fp8_kvcache=True)[0]

        def peer() -> torch.Tensor:
            arrays = (q, pool, HEAD_DIM_V, lengths, table, SCALE, False, *plan, one, one)
            return ops.fwd_kvcache_mla_fp8(*arrays)[0]

        return ours, peer

    return [problem() for _ in range(min(12, _problems(case)))]


def _prefill(case: Case) -> list[tuple[Call, Call]]:
    kv = _normal(case.s_kv, 1, HEAD_DIM)
    q = _normal(case.s_q, case.h_q, HEAD_DIM)
    indices = lists(case.s_q, case.tokens, case.s_kv, case.s_kv, "cuda")[:, None]

    def ours() -> torch.Tensor:
        return flash_mla_sparse_fwd(q, kv, indices, SCALE)[0]

    def peer() -> torch.Tensor:
        arrays = (q, kv, indices, SCALE, HEAD_DIM_V, None, None, None)
        return torch.ops._flashmla_C.sparse_prefill_fwd(*arrays)[0]

    return [(ours, peer)]
