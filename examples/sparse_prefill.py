"""A prompt, then one more token, through a layer as in DeepSeek-V3.2, in PyTorch.

    python examples/sparse_prefill.py

Every query token of the prompt sees the TOPK tokens before it that the indexer likes best, and all
of them while there are fewer (flash_mla_sparse_fwd, over bfloat16 rows). The rows then go into an
FP8 cache, and the next token attends to it (flash_mla_with_kvcache with indices). Both results are
compared with plain attention under a mask of the same tokens. Computed on the CPU.
"""

from __future__ import annotations

import sys

import torch

from flashmla_cupy import (
    dequantize_kv,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
    quantize_kv,
)

HEADS, D_QK, D_V, PAGE = 16, 576, 512, 64
INDEX_HEADS, INDEX_DIM, TOPK = 8, 64, 48
PROMPT = 200
# DeepSeek-V3's; flashmla_cupy.deepseek.softmax_scale() computes that of a configuration.
SCALE = 0.1352


def chosen(scores: torch.Tensor) -> torch.Tensor:
    """The TOPK best tokens of each row of scores [n, tokens]; -1 where scores are -inf."""
    best = scores.topk(TOPK, dim=1)
    return torch.where(best.values > -torch.inf, best.indices, -1).int()


def index_scores(q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_j w_j relu(q_j . k_s): DeepSeek-V3.2-Exp, equation 1. [n, tokens]"""
    return torch.einsum("nj,njs->ns", weights, torch.relu(q @ keys.T))


def masked(q: torch.Tensor, rows: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Attention over all rows [tokens, 576] under a mask of the chosen ones: [n, HEADS, 512]."""
    seen = torch.zeros(len(q), len(rows) + 1, dtype=torch.bool)
    seen.scatter_(1, indices.long() % (len(rows) + 1), True)  # -1 falls into the last column
    scores = SCALE * q.double() @ rows.double().T
    scores = scores.masked_fill(~seen[:, None, :-1], -torch.inf)
    return scores.softmax(-1) @ rows.double()[:, :D_V]


def largest_error(out: torch.Tensor, want: torch.Tensor) -> float:
    return float((out.double() - want).abs().max() / want.abs().max())


def main() -> int:
    torch.manual_seed(0)
    rows = torch.randn(PROMPT + 1, D_QK).bfloat16()  # of the prompt and of the next token
    q = (0.3 * torch.randn(PROMPT + 1, HEADS, D_QK)).bfloat16()
    index_q = torch.randn(PROMPT + 1, INDEX_HEADS, INDEX_DIM)
    index_keys = torch.randn(PROMPT + 1, INDEX_DIM)
    weights = torch.rand(PROMPT + 1, INDEX_HEADS)

    # A token sees itself and what came before it: causality lies in the lists.
    scores = index_scores(index_q, index_keys, weights)
    future = torch.ones(PROMPT + 1, PROMPT + 1, dtype=torch.bool).triu(1)
    lists = chosen(scores.masked_fill(future, -torch.inf))

    prompt = lists[:PROMPT]
    out, max_logits, _ = flash_mla_sparse_fwd(
        q[:PROMPT], rows[:PROMPT, None], prompt[:, None].contiguous(), SCALE
    )
    error = largest_error(out, masked(q[:PROMPT], rows[:PROMPT], prompt))
    print(f"prefill of {PROMPT} tokens: off by {error:.2g} of the largest value")
    largest = ", ".join(f"{score:.2f}" for score in max_logits[-1, :4].tolist())
    print(f"largest score of the last token, by head: {largest}, ...")

    # The rows into pages, in any order; a token's slot is page * PAGE + offset.
    pages = -(-(PROMPT + 1) // PAGE)
    order = torch.randperm(pages)
    padded = torch.zeros(pages * PAGE, D_QK).bfloat16()
    padded[: PROMPT + 1] = rows
    pool = torch.empty(pages, PAGE, 1, D_QK).bfloat16()
    pool[order] = padded.view(pages, PAGE, 1, D_QK)
    k_cache = quantize_kv(pool, "v32")

    last = lists[PROMPT:]
    slots = torch.where(last < 0, -1, order[last // PAGE] * PAGE + last % PAGE).int()
    metadata, _ = get_mla_metadata()
    out, _ = flash_mla_with_kvcache(
        q[PROMPT:][None],
        k_cache,
        None,
        None,
        D_V,
        metadata,
        softmax_scale=SCALE,
        is_fp8_kvcache=True,
        indices=slots[None],
    )
    cached = dequantize_kv(k_cache)[order].view(-1, D_QK)[: PROMPT + 1]
    exact = largest_error(out[0], masked(q[PROMPT:], cached, last))
    fp8 = largest_error(out[0], masked(q[PROMPT:], rows, last))
    print(f"the next token: off by {exact:.2g}; beside a bfloat16 cache by {fp8:.2g}")
    if max(error, exact) >= 2**-7 or fp8 >= 0.1:
        return 1
    print("PASS")
    return 0


if __name__ == "__main__":
    sys.exit(main())
