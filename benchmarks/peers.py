"""This library beside FlashMLA and FlashAttention-3, as published, on one Hopper GPU.

    pip install '.[cuda13]' torch==2.11.0
    python benchmarks/fetch_peers.py
    python benchmarks/peers.py [FOLDER] [--impls ours fa3] [--cases lat h16] [--json FILE]

The cases are those of `flashmla-cupy bench`, without its group flashmla: `lat` of few requests,
`imb` of very unequal lengths, `mem` of few query rows a token and `cmp` of many.

Every implementation gets the same tensors and block tables. The result for one sequence is compared
with a float32 reference; a time counts only if it agrees. Then calls are captured in a CUDA graph,
so that no Python runs between them. They rotate over distinct caches, of 400 MB in all but never
more than 12, so that the L2 cache is cold, except in `lat` with one request of 512 or 2048 tokens.
A tiny kernel comes before each call, so that neighbours do not overlap; the time of a graph of
these alone is taken off. The implementations take turns under sustained load, 0.06 s to settle and
0.12 s timed, in an order that changes each round, and the median of 3 rounds counts: heavy cases
run at the power limit of the board, where a short burst flatters whoever runs first.

Microseconds are those of one decode call with its combine kernel. Scheduling metadata is made once,
before, as a model makes it once for all of its layers; what that takes is timed apart ("+"), except
FlashMLA's, which its first call makes. TFLOPS counts 2 * s_q * h_q * (576 + 512) for each cached
token, as FlashMLA's own test does, hidden by the causal mask or not; GB/s counts every cached token
once, q and out. The ratio is that of our time to the best peer's: under 1, ours is faster. A group
is summed up by the geometric mean. Boards differ, so compare figures of one run only.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fetch_peers import LIBRARIES, WHEEL, add_folder

from flashmla_cupy import __version__
from flashmla_cupy.bench import cases as bench
from flashmla_cupy.bench.cases import Case
from flashmla_cupy.build import nvrtc
from flashmla_cupy.errors import FlashMLAError
from flashmla_cupy.sizes import HEAD_DIM, HEAD_DIM_V

if TYPE_CHECKING:
    from peers_gpu import Timer

GROUPS = ("lat", "imb", "mem", "cmp")
CASES = tuple(case for case in bench.CASES if case.name.partition(".")[0] in GROUPS)
OURS, PEERS = "ours", tuple(LIBRARIES)
# A graph holds so many calls, or as many as a GPU of these TFLOPS and GB/s makes in so many us.
MAX_CALLS, GRAPH_US = 48, 12_000
ASSUMED_TFLOPS, ASSUMED_GBPS = 600, 4000
METADATA_CALLS = 20


class BenchmarkError(Exception):
    """Why there can be no comparison, in a sentence."""


@dataclass
class Result:
    """Of one implementation in one case; either `failure` or the figures."""

    us: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    metadata_us: float | None = None  # None where the metadata cannot be made apart
    error: float | None = None  # the largest, of the sequence that was compared
    failure: str | None = None


@dataclass
class Row:
    case: str
    results: dict[str, Result] = field(default_factory=dict)
    ours_over_best_peer: float | None = None

    def compare(self) -> None:
        """Sets the ratio, where ours and a peer were timed."""
        times = {name: result.us for name, result in self.results.items() if result.us is not None}
        ours = times.pop(OURS, None)
        if ours is not None and times:
            self.ours_over_best_peer = ours / min(times.values())


def select(words: Sequence[str]) -> list[Case]:
    """The cases of these groups, or whose name contains one of these words; "all" for all."""
    for word in words:
        if not any(case in CASES for case in bench.select([word])):
            raise BenchmarkError(f"The cases of {word!r} are not compared with the peers.")
    return [case for case in bench.select(words) if case in CASES]


def flops(case: Case) -> int:
    """As FlashMLA's own test counts them, hidden keys included."""
    return 2 * sum(case.lengths) * case.s_q * case.h_q * (HEAD_DIM + HEAD_DIM_V)


def calls_in_graph(case: Case, caches: int) -> int:
    """Each cache once at least."""
    ideal_us = max(flops(case) / ASSUMED_TFLOPS / 1e6, case.nbytes / ASSUMED_GBPS / 1e3)
    return int(max(caches, min(MAX_CALLS, GRAPH_US / ideal_us)))


def summary(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Of each group that has ratios: their geometric mean, the worst, and how many there are."""
    found = {}
    for group in GROUPS:
        ratios = [
            row.ours_over_best_peer
            for row in rows
            if row.case.startswith(f"{group}.") and row.ours_over_best_peer is not None
        ]
        if ratios:
            mean = statistics.geometric_mean(ratios)
            found[group] = {"geometric_mean": mean, "worst": max(ratios), "cases": len(ratios)}
    return found


# --- the run -----------------------------------------------------------------------------------


def prepare(folder: Path, names: Sequence[str]) -> str:
    """Loads the peers; the name of the GPU. Raises BenchmarkError or a FlashMLAError for what is
    missing."""
    libraries = {name: folder / LIBRARIES[name] for name in names if name in LIBRARIES}
    for library in libraries.values():
        if not library.is_file():
            raise BenchmarkError(
                f"The peers are not in {folder}: {library} is missing. "
                f"python benchmarks/fetch_peers.py {folder} fetches them."
            )
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        raise BenchmarkError(
            f"The benchmark needs PyTorch ({error}): pip install torch==2.11.0, for which the "
            f"peers are built."
        ) from None
    if not torch.cuda.is_available():
        raise BenchmarkError(
            "The benchmark needs a Hopper GPU, and PyTorch finds no GPU on this machine."
        )
    name: str = torch.cuda.get_device_name()
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        raise BenchmarkError(
            f"The benchmark needs a Hopper GPU (compute capability 9.0), and {name} has "
            f"{major}.{minor}."
        )
    if OURS in names:
        nvrtc.cupy_cuda()  # says what is missing of CuPy
    gpu = importlib.import_module("peers_gpu")
    for peer, library in libraries.items():
        try:
            gpu.load(library)
        except (OSError, RuntimeError) as error:
            raise BenchmarkError(
                f"{peer} cannot be loaded into PyTorch {torch.__version__}: "
                f"{error.__cause__ or error}. "
                f"{WHEEL} is built for Linux on x86-64, PyTorch 2.11 and CUDA 13."
            ) from None
    return name


def measure(case: Case, names: Sequence[str], timer: Timer) -> Row:
    """Checks and times the implementations of these names in one case."""
    gpu: Any = importlib.import_module("peers_gpu")
    problems = gpu.problems(case)
    calls = calls_in_graph(case, len(problems))
    request = case.batch // 2
    expected = gpu.reference(problems[0], request)
    row, decode, metadata = Row(case.name), {}, {}
    keep = []  # the arrays that the graphs use
    for name in names:
        result = row.results[name] = Result()
        try:
            functions = [gpu.IMPLEMENTATIONS[name](problem) for problem in problems]
            keep.append(functions)
            result.error, agrees = gpu.error_of(functions[0]()[request], expected)
            if not agrees:
                result.failure = "its result differs from the reference's"
                continue
            captured = timer.capture(functions, calls)
            if hasattr(functions[0], "metadata"):
                metadata[name] = timer.capture([functions[0].metadata], METADATA_CALLS)
            decode[name] = captured
        except Exception as error:  # a peer's may be any; the others go on
            result.failure = f"{type(error).__name__}: {error}".splitlines()[0]
    for name, us in timer.in_turns_us(decode).items():
        result = row.results[name]
        result.us, result.tflops = us, flops(case) / us / 1e6
        result.gbps = case.nbytes / us / 1e3
    for name in decode.keys() & metadata.keys():
        row.results[name].metadata_us = timer.call_us(metadata[name])
    row.compare()
    return row


def line_of(row: Row, width: int) -> str:
    """The row as it is printed."""
    cells = [f"{row.case:{width}}"]
    for result in row.results.values():
        shown = "failed" if result.us is None else f"{result.us:.1f}"
        extra = "" if result.metadata_us is None else f"+{result.metadata_us:.1f}"
        cells.append(f"{shown:>8} {extra:<6}")
    ratio = row.ours_over_best_peer
    cells.append("     -" if ratio is None else f"{ratio:6.3f}")
    ours = row.results.get(OURS)
    if ours is not None and ours.tflops is not None:
        cells.append(f"{ours.tflops:7.0f} {ours.gbps:6.0f}")
    return " ".join(cells)


def run(cases: Sequence[Case], names: Sequence[str], device: str, file: IO[str] | None) -> bool:
    """Measures, prints and writes; whether nothing failed."""
    import torch
    from peers_gpu import Timer

    timer, rows = Timer(), []
    width = max(len(case.name) for case in cases)
    print(f"flashmla-cupy {__version__}, {WHEEL}, PyTorch {torch.__version__} on {device}")
    print("microseconds of one decode call, + of its metadata; ours / best peer; TFLOPS, GB/s")
    heads = " ".join(f"{name:>8} {'+':<6}" for name in names)
    print(f"{'case':{width}} {heads}  ratio  TFLOPS   GB/s", flush=True)
    for case in cases:
        row = measure(case, names, timer)
        torch.cuda.empty_cache()
        rows.append(row)
        print(line_of(row, width), flush=True)
        for name, result in row.results.items():
            if result.failure is not None:
                print(f"{row.case}: {name} failed: {result.failure}", file=sys.stderr, flush=True)
    groups = summary(rows)
    for group, found in groups.items():
        print(
            f"{group}: geometric mean of ours / best peer {found['geometric_mean']:.3f} over "
            f"{found['cases']} cases, worst {found['worst']:.3f}"
        )
    if file is not None:
        facts = {"version": __version__, "peers": WHEEL, "device": device}
        facts |= {"torch": str(torch.__version__), "cuda": str(torch.version.cuda)}
        results = {**facts, "groups": groups, "cases": [asdict(row) for row in rows]}
        json.dump(results, file, indent=1)
        file.write("\n")
    return all(result.failure is None for row in rows for result in row.results.values())


# --- the command line --------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description="Times this library beside FlashMLA and FlashAttention-3 on a Hopper GPU.",
        epilog="The exit status is 1 if an implementation failed in a case, 2 if nothing ran.",
    )
    add_folder(made, "where fetch_peers.py put the peers")
    made.add_argument(
        "--impls", nargs="+", choices=(OURS, *PEERS), default=(OURS, *PEERS), help="default: all"
    )
    made.add_argument(
        "--cases",
        nargs="+",
        default=("all",),
        metavar="CASE",
        help=f"groups or parts of names: all (default), {', '.join(GROUPS)}, h16, ...",
    )
    made.add_argument("--json", metavar="FILE", help="write the results to FILE as well")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    names = tuple(dict.fromkeys(arguments.impls))
    try:
        cases = select(arguments.cases)
        device = prepare(arguments.folder, names)
        with contextlib.ExitStack() as files:
            file = None
            if arguments.json is not None:
                file = files.enter_context(open(arguments.json, "w", encoding="utf-8"))
            return 0 if run(cases, names, device, file) else 1
    except (BenchmarkError, FlashMLAError, OSError) as error:
        print("peers.py: error:", *str(error).split(), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
