"""FP8 caches and lists of tokens: this library beside FlashMLA, as published, on one Hopper GPU.

    pip install '.[cuda13]' torch==2.11.0
    python benchmarks/fetch_peers.py --sparse
    python benchmarks/sparse_peers.py [FOLDER] [--cases v32 prefill.h64] [--json FILE]

The peer is FlashMLA in the wheel of vLLM 0.33.0, the last one with kernels for Hopper. The cases:

    v32       decoding over an FP8 cache of 656 bytes a token, each query token with its own list
    v4        the same of 584 bytes a token
    e4m3      decoding over all of an FP8 cache of 576 bytes a token
    prefill   flash_mla_sparse_fwd over bfloat16

Lists have 2048 tokens of `s_kv`, in v4 512, chosen at random. FlashMLA decodes 64 or 128 heads:
for 16 it gets 64 of which 48 are zeros, as its users do it. Over 576 bytes both get q in e4m3.

A time counts only if the results of both agree. What is timed and how is as in peers.py: calls in a
CUDA graph, the implementations in turns under sustained load, metadata made before. Calls rotate
over different lists or requests, of 400 MB in all, so that they find nothing of theirs in the L2
cache; those of a prompt find there what the call itself has read. TFLOPS counts
2 * h_q * (d_qk + 512) for each token of a list; GB/s its bytes in the cache. The ratio is that of
our time to the peer's: under 1, ours is faster. Boards differ, so compare figures of one run only.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peers
from fetch_peers import SPARSE_FOLDER, SPARSE_LIBRARIES, SPARSE_WHEEL, add_folder
from peers import BenchmarkError

from flashmla_cupy import __version__
from flashmla_cupy.errors import FlashMLAError
from flashmla_cupy.sizes import HEAD_DIM, HEAD_DIM_V

if TYPE_CHECKING:
    from peers_gpu import Timer

BYTES = {"v32": 656, "v4": 584, "e4m3": 576, "prefill": 1152}  # of a token
D_QK = {"v4": 512}  # otherwise HEAD_DIM
TOPK, TOPK_V4 = 2048, 512
MOST_CALLS = 48  # of a graph


@dataclass(frozen=True)
class Case:
    """`tokens` are those that each query token attends to, of `s_kv`."""

    kind: str
    h_q: int
    batch: int
    s_q: int
    s_kv: int
    tokens: int

    @property
    def name(self) -> str:
        size = f"q{self.s_q}" if self.kind == "prefill" else f"b{self.batch}.q{self.s_q}"
        return f"{self.kind}.h{self.h_q}.{size}.s{self.s_kv}"

    @property
    def d_qk(self) -> int:
        return D_QK.get(self.kind, HEAD_DIM)

    @property
    def queries(self) -> int:
        return self.batch * self.s_q

    @property
    def flops(self) -> int:
        return 2 * self.queries * self.h_q * self.tokens * (self.d_qk + HEAD_DIM_V)

    @property
    def nbytes(self) -> int:
        return self.queries * self.tokens * BYTES[self.kind]


def _cases() -> tuple[Case, ...]:
    made = []
    for h_q in (128, 64, 16):
        for batch, s_q in ((1, 1), (8, 1), (32, 1), (128, 1), (128, 2)):
            made.append(Case("v32", h_q, batch, s_q, 8192, TOPK))
    for h_q in (128, 64, 16):
        for batch in (1, 8, 32, 128):
            made.append(Case("v4", h_q, batch, 1, 8192, TOPK_V4))
    for h_q in (128, 64, 16):
        for batch, s_kv in ((132, 8192), (16, 65536), (1, 32768)):
            made.append(Case("e4m3", h_q, batch, 1, s_kv, s_kv))
    for h_q in (128, 64, 16):
        for s_q, s_kv in ((4096, 8192), (4096, 32768), (4096, 65536), (512, 32768)):
            made.append(Case("prefill", h_q, 1, s_q, s_kv, TOPK))
    return tuple(made)


CASES = _cases()


def select(words: Sequence[str]) -> list[Case]:
    """The cases whose names contain one of these words, from dot to dot; "all" for all."""
    for word in words:
        if word != "all" and not any(_is_in(word, case) for case in CASES):
            raise BenchmarkError(f"There is no case {word!r}.")
    return [case for case in CASES if "all" in words or any(_is_in(w, case) for w in words)]


def _is_in(word: str, case: Case) -> bool:
    return f".{word}." in f".{case.name}."


@dataclass
class Row:
    """Of one case: microseconds, or why there are none."""

    case: str
    ours_us: float | None = None
    peer_us: float | None = None
    tflops: float | None = None  # ours
    gbps: float | None = None
    difference: float | None = None  # the largest
    failure: str | None = None

    @property
    def ratio(self) -> float | None:
        return None if self.ours_us is None or not self.peer_us else self.ours_us / self.peer_us


def measure(case: Case, timer: Timer) -> Row:
    """Compares and times both in one case."""
    gpu: Any = importlib.import_module("sparse_peers_gpu")
    row = Row(case.name)
    try:
        ours, peer = gpu.calls(case)
        row.difference, agrees = gpu.difference(ours[0](), peer[0](), case.kind)
        if not agrees:
            row.failure = "the results differ"
            return row
        compute_us = case.flops / peers.ASSUMED_TFLOPS / 1e6
        ideal_us = max(compute_us, case.nbytes / peers.ASSUMED_GBPS / 1e3)
        calls = int(max(len(ours), min(MOST_CALLS, peers.GRAPH_US / ideal_us)))
        captured = {"ours": timer.capture(ours, calls), "peer": timer.capture(peer, calls)}
        us = timer.in_turns_us(captured)
    except Exception as error:  # a peer's may be any; the other cases go on
        row.failure = f"{type(error).__name__}: {error}".splitlines()[0]
        return row
    row.ours_us, row.peer_us = us["ours"], us["peer"]
    row.tflops, row.gbps = case.flops / us["ours"] / 1e6, case.nbytes / us["ours"] / 1e3
    return row


def line_of(row: Row) -> str:
    """The row as it is printed."""
    if row.ours_us is None or row.peer_us is None:
        return f"{row.case:26} failed: {row.failure}"
    return (
        f"{row.case:26} {row.ours_us:9.1f} {row.peer_us:9.1f} {row.ratio:7.3f} "
        f"{row.tflops:7.0f} {row.gbps:6.0f}"
    )


def prepare(folder: Path) -> str:
    """Loads the peer; the name of the GPU. Raises BenchmarkError for what is missing."""
    libraries = [folder / SPARSE_FOLDER / name for name in SPARSE_LIBRARIES.values()]
    for library in libraries:
        if not library.is_file():
            raise BenchmarkError(
                f"The peer is not in {folder}: {library} is missing. "
                f"python benchmarks/fetch_peers.py --sparse {folder} fetches it."
            )
    device = peers.prepare(folder, (peers.OURS,))
    torch: Any = importlib.import_module("torch")
    for library in libraries:
        try:
            torch.ops.load_library(str(library))
        except (OSError, RuntimeError) as error:
            raise BenchmarkError(
                f"{library} cannot be loaded into PyTorch {torch.__version__}: "
                f"{error.__cause__ or error}."
            ) from None
    return device


def run(cases: Sequence[Case], device: str) -> list[Row]:
    """Measures and prints."""
    import torch
    from peers_gpu import Timer

    timer, rows = Timer(), []
    print(f"flashmla-cupy {__version__}, {SPARSE_WHEEL}, PyTorch {torch.__version__} on {device}")
    print("microseconds of one call, ours and the peer's; ours / peer's; our TFLOPS, GB/s")
    print(f"{'case':26} {'ours':>9} {'peer':>9} {'ratio':>7} {'TFLOPS':>7} {'GB/s':>6}", flush=True)
    for case in cases:
        row = measure(case, timer)
        torch.cuda.empty_cache()
        rows.append(row)
        print(line_of(row), flush=True)
    return rows


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description="Times FP8 caches and lists of tokens beside FlashMLA on a Hopper GPU.",
        epilog="The exit status is 1 if a case failed, 2 if nothing ran.",
    )
    add_folder(made, "where fetch_peers.py put the peer")
    made.add_argument(
        "--cases",
        nargs="+",
        default=("all",),
        metavar="CASE",
        help="parts of names: all (default), v32, v4, e4m3, prefill, h64, prefill.h16, ...",
    )
    made.add_argument("--json", metavar="FILE", help="write the results to FILE as well")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        cases = select(arguments.cases)
        device = prepare(arguments.folder)
        with contextlib.ExitStack() as files:
            file = None
            if arguments.json is not None:
                file = files.enter_context(open(arguments.json, "w", encoding="utf-8"))
            rows = run(cases, device)
            if file is not None:
                facts = {"version": __version__, "peer": SPARSE_WHEEL, "device": device}
                made = [{**asdict(row), "ratio": row.ratio} for row in rows]
                json.dump({**facts, "cases": made}, file, indent=1)
                file.write("\n")
        return 1 if any(row.failure for row in rows) else 0
    except (BenchmarkError, FlashMLAError, OSError) as error:
        print("sparse_peers.py: error:", *str(error).split(), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
