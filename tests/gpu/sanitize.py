"""Small configurations of every kernel variant, once each, for NVIDIA's compute-sanitizer.

    for tool in memcheck synccheck initcheck; do
        compute-sanitizer --tool $tool --error-exitcode 1 python tests/gpu/sanitize.py || exit 1
    done
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitize.py --racecheck

Both kinds of kernels: those over pages of tokens, and with `--gathered` those over lists of them
and FP8 caches. memcheck should get `--padding 512` as well. racecheck does not follow the order
that __syncwarp makes between a warp's accesses and the arrival of one of its lanes at an mbarrier,
so for it the kernels are compiled with EVERY_LANE_ARRIVES (sm90_shared.cuh). `--part 2/4` runs the
second quarter.

CuPy's memory pool is off, so that every array is an allocation of its own and the tools see its
ends. No other framework is used. The script prints how many configurations ran and fails if a
result is not what the float64 oracle says; `--fast` leaves the oracle out; so does racecheck, which
slows every kernel down.

A configuration is split where a request has more than one piece on a GPU of 132 multiprocessors.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

from support import sparse_oracle, sparse_problems
from support.gpu import oracle as gpu_oracle
from support.gpu import problems as gpu_problems
from support.gpu.arrays import DRY, DTYPES, host, synchronize, xp
from support.oracle import assert_within_bound

import flashmla_cupy
from flashmla_cupy.build import compiler
from flashmla_cupy.formats.cache_format import FORMATS

# (s_q, h_q, h_kv): few rows; two full blocks; two; positions in blocks of their own; many positions
# of one head; one full block.
SHAPES = ((1, 16, 1), (1, 128, 1), (2, 40, 1), (3, 6, 3), (70, 1, 1), (1, 64, 1))
# Lengths without and with splits; both with empty requests, and not multiples of a tile.
WHOLE = (0, 1, 65, 130)
SPLIT = (0, 1500, 17)


def configurations() -> list[dict]:
    """The arguments of make(): dtype x page size x split x causal, and the shapes and layouts in
    turns, then every shape with and without splits."""
    product = itertools.product(DTYPES, gpu_problems.PAGE_SIZES, (WHOLE, SPLIT), (False, True))
    chosen = [(*axes, SHAPES[i % len(SHAPES)]) for i, axes in enumerate(product)]
    more = itertools.product(DTYPES, (64,), (WHOLE, SPLIT), (False, True), SHAPES)
    return [
        {
            "lengths": lengths,
            "s_q": s_q,
            "h_q": h_q,
            "h_kv": h_kv,
            "page_size": page_size,
            "dtype": dtype,
            "causal": causal,
            "cache_layout": gpu_problems.CACHE_LAYOUTS[i % 5],
            "q_layout": gpu_problems.Q_LAYOUTS[i // 2 % 5],
            "seed": i,
        }
        for i, (dtype, page_size, lengths, causal, (s_q, h_q, h_kv)) in enumerate(
            dict.fromkeys([*chosen, *more])
        )
    ]


def gathered() -> list[dict]:
    """The arguments of make_sparse_problem(): every format with every number of heads, one piece
    and several, without and with lengths, a sink, a second cache; also products in bfloat16 over
    V3.2 and V4, and queries in e4m3."""
    sizes = ((70, 64), (900, 700))
    every = [(*axes, {}) for axes in itertools.product(FORMATS, (16, 64, 128), sizes)]
    every += [(format, 64, sizes[1], {"wide_fp8": True}) for format in ("v32", "v4")]
    every += [("e4m3", heads, sizes[1], {"q_dtype": "float8_e4m3fn"}) for heads in (16, 128)]
    return [
        {
            "format": format,
            "batch": 3,
            "s_q": 1 + i % 2,
            "h_q": heads,
            "s_k": s_k,
            "topk": topk,
            "page_size": (64, 16, 256, 48)[i % 4],
            "extra": (90, 33, 64) if i % 3 == 0 and format != "e4m3" else None,
            "lengths": ("none", "request", "query")[i % 3],
            "sink": i % 2 == 0,
            "seed": i,
            **more,
        }
        for i, (format, heads, (s_k, topk), more) in enumerate(every)
    ]


def run(settings: dict, with_oracle: bool) -> None:
    problem = gpu_problems.make(**settings)
    out, lse = problem.decode()
    synchronize()
    if with_oracle:
        gpu_oracle.assert_right(problem, out, lse)


def run_gathered(settings: dict, with_oracle: bool) -> None:
    from test_sparse import decode

    wide = settings.pop("wide_fp8", False)
    problem = sparse_problems.make_sparse_problem(**settings)
    problem.wide_fp8 = wide
    out, lse = decode(problem)
    synchronize()
    if with_oracle:
        expected = sparse_oracle.sparse_oracle(problem)
        assert_within_bound(host(out), host(lse), expected, str(settings))


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs every kernel variant once.")
    parser.add_argument("--gathered", action="store_true", help="lists of tokens and FP8 caches")
    parser.add_argument("--fast", action="store_true", help="without the oracle")
    parser.add_argument("--racecheck", action="store_true", help="every lane arrives; --fast")
    parser.add_argument("--part", default="1/1", help="2/4: the second quarter")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    if options.racecheck:
        compiler._BASE_OPTIONS += ("-DEVERY_LANE_ARRIVES",)
    if not DRY:
        xp.cuda.set_allocator(None)
    every, one = (gathered(), run_gathered) if options.gathered else (configurations(), run)
    count = 0
    for settings in every[part - 1 :: parts]:
        one(settings, not (options.fast or options.racecheck))
        flashmla_cupy.check()
        count += 1
    print(f"{count} configurations ran")


if __name__ == "__main__":
    main()
