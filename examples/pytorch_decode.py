"""A decoding loop in PyTorch: one CUDA graph, captured once and replayed for every token.

    python examples/pytorch_decode.py

The graph holds the whole step: write the new tokens into the paged cache, count them, schedule,
attend. The schedule is made on the device from the lengths of the moment, so a replay is right for
whatever lengths it finds. Without a Hopper GPU the same step runs eagerly, on a smaller problem.
"""

from __future__ import annotations

import sys

import torch

from flashmla_cupy import flash_mla_with_kvcache, get_mla_metadata

HEADS, D_QK, D_V, PAGE = 128, 576, 512, 64
SCALE = 0.1352  # DeepSeek-V3's; flashmla_cupy.deepseek computes that of a configuration
Q_SIZE = 0.3  # of queries: scores are then of order 1
DTYPE = torch.bfloat16


def main() -> int:
    on_gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    device = torch.device("cuda" if on_gpu else "cpu")
    batch, longest, steps = (64, 8192, 100) if on_gpu else (3, 200, 4)
    if not on_gpu:
        print("No Hopper GPU found: computing on the CPU.")

    # Prompts of ragged lengths in a pool of pages, each sequence with room for the new tokens.
    torch.manual_seed(0)
    lengths = torch.randint(1, longest, (batch,), dtype=torch.int32, device=device)
    columns = -(-(longest + steps) // PAGE)
    pages = torch.randperm(batch * columns, device=device).to(torch.int32)
    block_table = pages.view(batch, columns)
    k_cache = torch.randn(batch * columns, PAGE, 1, D_QK, dtype=DTYPE, device=device)

    # What the model computes for each new token: one latent row, and a query for each head.
    rows = torch.randn(steps, batch, D_QK, dtype=DTYPE, device=device)
    queries = Q_SIZE * torch.randn(steps, batch, 1, HEADS, D_QK, dtype=DTYPE, device=device)
    row, q = torch.empty_like(rows[0]), torch.empty_like(queries[0])  # where a step finds them

    def step() -> torch.Tensor:
        at = lengths.long()
        page = block_table.gather(1, (at // PAGE)[:, None])[:, 0].long()
        k_cache[page, at % PAGE, 0] = row
        lengths.add_(1)
        metadata, num_splits = get_mla_metadata(lengths, HEADS, 1)  # once for all layers
        out, _ = flash_mla_with_kvcache(
            q,
            k_cache,
            block_table,
            lengths,
            D_V,
            metadata,
            num_splits,
            softmax_scale=SCALE,
            causal=True,
        )
        return out

    first = lengths.clone()
    eager = decode(step, row, q, rows, queries)
    print(f"problem   {batch} requests of {first.min()} to {first.max()} tokens, {steps} new each")
    ok = check(eager[-1], queries[-1], k_cache, block_table, lengths)
    if on_gpu:
        graph, out = capture(step, lengths)
        lengths.copy_(first)  # the same tokens again: the cache ends as it was

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        replayed = decode(replay, row, q, rows, queries)
        same = all(torch.equal(a, b) for a, b in zip(eager, replayed, strict=True))
        print(f"replay    {'equals' if same else 'DIFFERS FROM'} the eager steps, bit for bit")
        lengths.copy_(first)
        print(f"time      {milliseconds(step):.3f} ms a step eagerly,", end=" ")
        lengths.copy_(first)
        print(f"{milliseconds(graph.replay):.3f} ms as a graph")
        ok = ok and same
    print("PASS" if ok else "FAIL")
    return 0 if ok else 1


def decode(step, row, q, rows, queries) -> list[torch.Tensor]:
    """The outputs of all steps."""
    outs = []
    for new_row, new_q in zip(rows, queries, strict=True):
        row.copy_(new_row)
        q.copy_(new_q)
        outs.append(step().clone())
    return outs


def capture(step, lengths) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """The step as a graph, and where a replay leaves its output. Run the step once before."""
    before = lengths.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    lengths.copy_(before)
    return graph, out


def check(out, q, k_cache, block_table, lengths) -> bool:
    """The last step of the shortest and of the longest request, against float64."""
    worst = 0.0
    for b in {int(lengths.argmin()), int(lengths.argmax())}:
        n = int(lengths[b])
        latent = k_cache[block_table[b, : -(-n // PAGE)].long()].reshape(-1, D_QK)[:n].double()
        weight = torch.softmax(SCALE * q[b, 0].double() @ latent.T, dim=-1)
        expected = weight @ latent[:, :D_V]
        error = (out[b, 0].double() - expected).abs() - 2**-7 * expected.abs()
        worst = max(worst, float(error.max()))
    print(f"check     largest error beyond the rounding of bfloat16: {max(worst, 0):.1e}")
    return worst < 1e-3


def milliseconds(call, repeats: int = 50) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / repeats


if __name__ == "__main__":
    sys.exit(main())
