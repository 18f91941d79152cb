"""`flashmla-cupy bench`: microseconds, TFLOPS and GB/s of the decode call on this GPU.

A case is FlashMLA's: batch, queries a sequence, query heads, cached tokens; one kv head, bfloat16,
pages of 64 or another size, in scattered order. Through the public functions alone, with out= and
lse=.

How a call is timed: calls are captured in a CUDA graph, so that no Python runs between them, and
the graph is replayed between two CUDA events. The calls rotate over distinct pages, of 400 MB or
more in all, so that the L2 cache is cold. A kernel of one element comes before each call, so that
neighbours do not overlap; the time of a graph of these alone is taken off. After 0.1 s of warm-up
under the same load, the median of 7 samples of 30 ms or more counts. The scheduling metadata is
made once, before, as a model makes it once for all of its layers.

TFLOPS counts 2 * h_q * (576 + 512) for each query and each key that it sees; GB/s counts every
cached token once, q and out. Both are also given in percent of what this GPU was measured to do in
the same way just before: to read 4 GiB, and to multiply two float16 matrices of 8192 x 8192. A GPU
at its power limit is slower the longer it works, so compare figures of one run.

With peers (peers.py), each is timed in the same way after ours, over 12 caches at most.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .._version import __version__
from ..build import nvrtc
from ..errors import NoDeviceError, UnsupportedArchError
from ..gpu.arch import arch_of
from . import timer as timing
from .cases import Case
from .peers import Peers


@dataclass(frozen=True)
class Row:
    """A result. The percentages are of the measured ceilings; None where one was not measured."""

    case: str
    us: float
    tflops: float
    gbps: float
    matmul_percent: float | None
    read_percent: float | None
    peers_us: dict[str, float | str] = field(default_factory=dict)  # or why there is no time


def run(
    cases: Sequence[Case], json_path: str | None = None, peers: Peers | None = None
) -> dict[str, Any]:
    """Times the cases, those of peers as well, and prints a line for each; progress goes to stderr.
    Returns what --json writes.

    The file at `json_path` is written at the end, but opened before the work. Raises NoDeviceError,
    UnsupportedArchError or MissingDependencyError where it cannot run, and OSError for the file."""
    device = current_gpu()
    if json_path is None:
        return _run(cases, device, peers)
    with open(json_path, "w", encoding="utf-8") as file:
        report = _run(cases, device, peers)
        json.dump(report, file, indent=1)
        file.write("\n")
    return report


def _run(cases: Sequence[Case], device: dict[str, Any], peers: Peers | None) -> dict[str, Any]:
    """Prints the results, and returns them for JSON."""
    timer = timing.GPUTimer(device["multiProcessorCount"])
    gpu = device["name"].decode()
    _progress("measuring the read bandwidth and the matrix product")
    read, matmul = timer.read_gbps(), timer.matmul_tflops()
    product = "not measured (no cuBLAS: pip install nvidia-cublas-cu12)"
    if matmul is not None:
        product = f"{matmul:.0f} TFLOPS"
    _progress("")
    print(f"flashmla-cupy {__version__} on {gpu}, {device['multiProcessorCount']} SMs")
    print(f"ceilings: read {read:.0f} GB/s, matrix product {product}")
    width = max(len(case.name) for case in cases)
    head = f"{'case':{width}}  {'us':>9} {'TFLOPS':>7} {'GB/s':>6} {'% matmul':>9} {'% read':>7}"
    for name in peers.names if peers else ():
        head += f" {name:>11} {'ratio':>6}"
    print(head)
    rows = []
    for i, case in enumerate(cases, 1):
        _progress(f"[{i}/{len(cases)}] {case.name}")
        beside: dict[str, float | str] = {}
        if peers:
            us, beside = timer.peers_us(case, peers)
        else:
            us = timer.decode_us(case)
        tflops, gbps = case.flops / us / 1e6, case.nbytes / us / 1e3
        share = None if matmul is None else 100 * tflops / matmul
        row = Row(case.name, us, tflops, gbps, share, 100 * gbps / read, beside)
        rows.append(row)
        _progress("")
        shown = "-" if share is None else f"{share:.0f}"
        print(
            f"{row.case:{width}}  {us:9.1f} {tflops:7.1f} {gbps:6.0f} {shown:>9} "
            f"{row.read_percent:7.0f}" + "".join(_beside(us, time) for time in beside.values()),
            flush=True,
        )
        for name, why in beside.items():
            if isinstance(why, str):
                print(f"{case.name}: {name}: {why}", file=sys.stderr, flush=True)
    return {
        "version": __version__,
        "device": gpu,
        "num_sms": device["multiProcessorCount"],
        "nvrtc": nvrtc.build(),
        "read_gbps": read,
        "matmul_tflops": matmul,
        "cases": [asdict(row) for row in rows],
    }


def _beside(us: float, theirs: float | str) -> str:
    """A peer's microseconds, and the ratio of ours to them: under 1, ours is faster."""
    if isinstance(theirs, str):
        return f" {'-':>11} {'-':>6}"
    return f" {theirs:11.1f} {us / theirs:6.2f}"


def current_gpu() -> dict[str, Any]:
    """The properties of the current GPU, which must be one that the kernels run on."""
    cuda = nvrtc.cupy_cuda()
    if not cuda.is_available():
        raise NoDeviceError("bench needs a Hopper GPU, and CUDA finds no GPU on this machine.")
    facts: dict[str, Any] = cuda.runtime.getDeviceProperties(cuda.Device().id)
    if arch_of(facts) is None:
        raise UnsupportedArchError(
            f"bench needs a Hopper GPU (compute capability 9.0), and {facts['name'].decode()} has "
            f"{facts['major']}.{facts['minor']}."
        )
    return facts


def _progress(text: str) -> None:
    """What is being done, on stderr: one line that changes on a terminal, else a line each."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)
