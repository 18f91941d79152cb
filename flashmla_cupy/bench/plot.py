"""`flashmla-cupy bench --plot`: time against one size at a time, beside the roofline.

A sweep varies the batch, the tokens of each request, the query heads or the page size. The roofline
of a case is the time in which this GPU could read its bytes or make its products, whichever is
longer, at the ceilings that `bench` has measured. A cliff is a step where twice the work takes more
than 2.3 times as long.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import MissingDependencyError, OptionError
from ..sizes import PAGE_SIZES
from . import run as bench_run
from .cases import Case

CLIFF = 2.3
FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Sweep:
    """A line of the plot: cases that differ in one size only."""

    axis: str
    label: str
    sizes: tuple[int, ...]
    cases: tuple[Case, ...]
    doubles: bool = True  # each step does twice the work


def _sweeps() -> tuple[Sweep, ...]:
    batches = tuple(2**i for i in range(13))
    lengths = tuple(2**i for i in range(6, 21))
    heads = tuple(2**i for i in range(8))
    found = []
    for h in (16, 128):
        cases = (Case(f"scale.batch.h{h}.b{b}", b, 1, h, 1024) for b in batches)
        found.append(Sweep("requests", f"{h} heads, 1024 tokens each", batches, tuple(cases)))
    for h in (16, 128):
        cases = (Case(f"scale.tokens.h{h}.s{s}", 1, 1, h, s) for s in lengths)
        found.append(Sweep("tokens of one request", f"{h} heads", lengths, tuple(cases)))
    for b, s in ((8, 8192), (64, 4096)):
        cases = (Case(f"scale.heads.b{b}.h{h}", b, 1, h, s) for h in heads)
        label = f"{b} requests of {s} tokens"
        found.append(Sweep("query heads", label, heads, tuple(cases)))
    for h in (16, 128):
        pages = (Case(f"scale.pages.h{h}.p{p}", 64, 1, h, 4096, page_size=p) for p in PAGE_SIZES)
        label = f"{h} heads, 64 requests of 4096 tokens"
        found.append(Sweep("tokens of a page", label, PAGE_SIZES, tuple(pages), doubles=False))
    return tuple(found)


SWEEPS = _sweeps()
CASES = tuple(case for sweep in SWEEPS for case in sweep.cases)


def roofline_us(case: Case, read_gbps: float, matmul_tflops: float | None) -> float:
    """The least time of a case; without a measured matrix product, that of its bytes."""
    bytes_us = case.nbytes / read_gbps / 1e3
    return bytes_us if matmul_tflops is None else max(bytes_us, case.flops / matmul_tflops / 1e6)


def steps(sweep: Sweep, us: Sequence[float]) -> list[tuple[float, str]]:
    """(ratio of times, what it is) of each step of a sweep that doubles the work."""
    if not sweep.doubles:
        return []
    pairs = zip(sweep.sizes, sweep.sizes[1:], us, us[1:])  # noqa: B905, the last has no step
    return [
        (after / before, f"{small} to {large} {sweep.axis}, {sweep.label}")
        for small, large, before, after in pairs
    ]


def verdict(us_of: dict[str, float]) -> list[str]:
    """Lines for people: the cliffs, or the worst step; `us_of` are microseconds by case name."""
    found = [step for sweep in SWEEPS for step in steps(sweep, _times(sweep, us_of))]
    cliffs = sorted((step for step in found if step[0] > CLIFF), reverse=True)
    if cliffs:
        return [f"cliff: {ratio:.2f} times as long from {what}" for ratio, what in cliffs]
    ratio, what = max(found)
    return [f"no cliff: twice the work takes at most {ratio:.2f} times as long ({what})"]


def run(path: str, json_path: str | None = None) -> None:
    """Times the sweeps, draws them into the file at `path` and tells of cliffs.

    As bench_run.run; also raises OptionError for another format than .png, .svg and .pdf."""
    figure_type = _figure_for(path)
    bench_run.current_gpu()  # raises before the file is made
    with open(path, "wb") as file:
        report = bench_run.run(CASES, json_path)
        draw(figure_type, report, file, Path(path).suffix)
    for line in verdict({row["case"]: row["us"] for row in report["cases"]}):
        print(line)


def _figure_for(path: str) -> Any:
    """matplotlib's Figure, for drawing into a file of that name."""
    if Path(path).suffix not in FORMATS:
        remedy = "The ending tells the format."
        raise OptionError("--plot", f"a file *{', *'.join(FORMATS)}", repr(path), remedy, "bench")
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise MissingDependencyError(
            f"bench: --plot needs matplotlib, which cannot be imported ({error}). Install it with:"
            " pip install 'flashmla-cupy[plot]'."
        ) from error


def draw(figure_type: Any, report: dict[str, Any], file: IO[bytes], suffix: str) -> None:
    """Draws the results of `bench`, as its JSON has them, with the roofline dashed."""
    us_of = {row["case"]: row["us"] for row in report["cases"]}
    axes = tuple(dict.fromkeys(sweep.axis for sweep in SWEEPS))
    figure = figure_type(figsize=(11, 8.5), layout="constrained")
    figure.suptitle(f"flashmla-cupy {report['version']} on {report['device']}")
    plots = figure.subplots(math.ceil(len(axes) / 2), 2, squeeze=False).flat
    for plot, axis in zip(plots, axes, strict=True):
        for number, sweep in enumerate(sweep for sweep in SWEEPS if sweep.axis == axis):
            color = f"C{number}"
            roofline = [
                roofline_us(case, report["read_gbps"], report["matmul_tflops"])
                for case in sweep.cases
            ]
            plot.plot(sweep.sizes, _times(sweep, us_of), "o-", color=color, label=sweep.label)
            plot.plot(sweep.sizes, roofline, "--", color=color, linewidth=1)
        plot.set_xscale("log", base=2)
        plot.set_yscale("log")
        plot.set_xlabel(axis)
        plot.set_ylabel("microseconds (dashed: roofline)")
        plot.margins(y=0.15)
        plot.grid(alpha=0.3)
        plot.legend()
    figure.savefig(file, format=suffix.removeprefix("."), dpi=150)


def _times(sweep: Sweep, us_of: dict[str, float]) -> list[float]:
    return [us_of[case.name] for case in sweep.cases]
