"""The decode kernels as several versions of NVRTC compile them, timed beside one another.

    pip install --target nvrtc/12.6.77 nvidia-cuda-nvrtc-cu12==12.6.77        and so on
    python benchmarks/nvrtc_versions.py compile nvrtc/* --to cubins           needs no GPU
    python benchmarks/nvrtc_versions.py time cubins/13.0.88 cubins/12.6.77

`compile` makes a folder of cubins for each folder of a wheel, of the same name, and says what each
kernel uses. `time` launches the kernels of these folders in turns, from CUDA graphs in one process,
and prints the median of each, and its ratio to that of the first folder. The caches of a case are
larger than the L2 cache, so that it is cold for most of them.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from flashmla_cupy import flash_mla_with_kvcache, get_mla_metadata
from flashmla_cupy.build import compiler, nvrtc, nvrtc_library
from flashmla_cupy.calls import arguments, decode, metadata
from flashmla_cupy.calls.signatures import Signatures
from flashmla_cupy.gpu import engine
from flashmla_cupy.gpu.kernels import Variant, all_variants
from flashmla_cupy.sizes import HEAD_DIM, HEAD_DIM_V

CASES = ((128, 128, 4096), (128, 16, 4096), (64, 64, 8192))  # batch, query heads, tokens
PAGE_SIZE = 64
WARM, LAUNCHES = 5, 20
USED = ("dense_decode", "few_rows_decode", "combine", "schedule")


def compile_all(folders: Sequence[Path], to: Path) -> None:
    """The cubins of each NVRTC below `to`."""
    for folder in folders:
        paths = list(folder.glob("nvidia/*/lib/libnvrtc.so.*[0-9]"))
        if len(paths) != 1:
            sys.exit(f"{folder}: expected one NVRTC, as pip install --target puts it; got {paths}.")
        library = nvrtc_library.Library(str(paths[0].resolve()))
        place = to / folder.name
        place.mkdir(parents=True, exist_ok=True)
        with mock.patch.object(nvrtc, "library", lambda library=library: library):
            for variant in all_variants():
                if variant.kernel in USED:
                    # With an option it is neither looked up nor kept.
                    made = compiler.compile_variant(variant, extra_options=["-DNDEBUG"])
                    (place / f"{variant.name}.cubin").write_bytes(made.cubin)
                    used = made.resources
                    print(
                        f"{folder.name:10} {variant.name:24} {used.registers:4} registers,"
                        f" {used.spill_stores:3} spill bytes, {made.seconds:5.1f} s"
                    )


def from_folder(folder: Path, variants: Sequence[Variant]) -> Iterator[compiler.Compiled]:
    """In place of compiler.compile_variants."""
    for variant in variants:
        cubin = (folder / f"{variant.name}.cubin").read_bytes()
        yield compiler.Compiled(variant, cubin, "", None, 0.0, True)  # type: ignore[arg-type]


def time_all(folders: Sequence[Path]) -> None:
    """Prints a line for each case, with a column for each folder."""
    cupy: Any = importlib.import_module("cupy")
    stream = cupy.cuda.Stream(non_blocking=True)
    block = cupy.asarray(np.random.default_rng(0).standard_normal(1 << 22).astype(np.float16))
    print(" " * 34, *(f"{folder.name:>18}" for folder in folders))
    for batch, h_q, tokens in CASES:
        with stream:
            pages = batch * tokens // PAGE_SIZE
            order = np.random.default_rng(1).permutation(pages).reshape(batch, -1)
            arrays = (
                cupy.resize(block, (batch, 1, h_q, HEAD_DIM)),
                cupy.resize(block, (pages, PAGE_SIZE, 1, HEAD_DIM)),
                cupy.asarray(order.astype(np.int32)),
                cupy.full(batch, tokens, np.int32),
            )
            made = [graph(cupy, stream, folder, arrays, h_q) for folder in folders]
            samples: list[list[float]] = [[] for _ in folders]
            for _ in range(WARM + LAUNCHES):
                for (launch, *_), times in zip(made, samples, strict=True):
                    before, after = cupy.cuda.Event(), cupy.cuda.Event()
                    before.record(stream)
                    launch(stream)
                    after.record(stream)
                    stream.synchronize()
                    times.append(1e3 * cupy.cuda.get_elapsed_time(before, after))
        medians = [statistics.median(times[WARM:]) for times in samples]
        cells = (f"{median:9.1f} us, {median / medians[0]:4.2f}" for median in medians)
        print(f"batch {batch:3}, {h_q:3} heads, {tokens:5} tokens", *cells, flush=True)


def graph(cupy: Any, stream: Any, folder: Path, arrays: tuple[Any, ...], h_q: int) -> list[Any]:
    """How to launch a decode call with the kernels of that folder, and what that needs."""
    engine._engines.clear()  # the old one lives on in the graphs that it made
    decode._calls, metadata._calls = Signatures(arguments.DECODE), Signatures(arguments.METADATA)
    load = functools.partial(from_folder, folder)
    with mock.patch.object(engine, "compile_variants", load):
        made = get_mla_metadata(arrays[3], h_q, 1)
        out, lse = flash_mla_with_kvcache(*arrays, HEAD_DIM_V, *made)
        stream.synchronize()
        stream.begin_capture()
        flash_mla_with_kvcache(*arrays, HEAD_DIM_V, *made, out=out, lse=lse)
        captured = stream.end_capture()
    return [captured.launch, captured, made, out, lse, dict(engine._engines)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("compile", "time"))
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--to", type=Path, default=Path("cubins"), help="where cubins are put")
    options = parser.parse_args(argv)
    if options.what == "compile":
        compile_all(options.folders, options.to)
    else:
        time_all(options.folders)
    return 0


if __name__ == "__main__":
    sys.exit(main())
