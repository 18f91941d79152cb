"""What `flashmla-cupy info` prints: versions, GPUs, NVRTC and the kernel cache, for a bug report.

Every line is found on its own: what is missing is said in a sentence on its line, and the rest is
still shown. Nothing is compiled but NVRTC's empty program, which tells its exact build.
"""

from __future__ import annotations

import functools
import importlib
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ._version import __version__
from .build import cache_folder, compiler, nvrtc
from .errors import FlashMLAError, KernelCacheError
from .gpu import arch
from .gpu.kernels import all_variants

_LABEL_WIDTH = 14


def report() -> Iterator[str]:
    """The lines of `flashmla-cupy info`."""
    yield _line("flashmla-cupy", __version__)
    yield _line("Python", f"{platform.python_version()} on {platform.platform()}")
    for name in ("NumPy", "CuPy"):
        yield _line(name, _or_reason(functools.partial(_module_version, name)))
    for gpu in _or_reasons(_gpus):
        yield _line("GPU", gpu)
    yield _line("driver", _or_reason(_driver))
    yield _line("NVRTC", _or_reason(_nvrtc))
    yield _line("cache folder", _or_reason(cache_folder.directory))
    try:
        cache_folder.directory()
    except (KernelCacheError, OSError):  # said in that line, and there is nothing to list
        return
    yield ""
    yield from _or_reasons(_kernels)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns: the first to the left, as it holds names, the others to the
    right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, *rows):
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return lines


def _line(label: str, text: str) -> str:
    return f"{label:<{_LABEL_WIDTH}}{text}"


def _or_reasons(find: Callable[[], list[str]]) -> list[str]:
    """What `find` returns, or the one line that says why it cannot be had.

    Every exception counts: a damaged installation is what this command is run for."""
    try:
        return find()
    except FlashMLAError as error:
        return [str(error).splitlines()[0]]
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return [f"cannot be found: {type(error).__name__}: {first}"]


def _or_reason(find: Callable[[], str]) -> str:
    return _or_reasons(lambda: [find()])[0]


def _module_version(name: str) -> str:
    try:
        return str(importlib.import_module(name.lower()).__version__)
    except ImportError as error:
        return f"cannot be imported ({error}). Install it with: {nvrtc.INSTALL}."


def _runtime() -> Any:
    """CuPy's binding of the CUDA runtime."""
    return nvrtc.cupy_cuda().runtime


def _gpus() -> list[str]:
    runtime = _runtime()
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        return [f"none ({str(error).partition(':')[0]}); calls compute with NumPy"]
    return [_gpu(number, runtime.getDeviceProperties(number)) for number in range(count)]


def _gpu(number: int, facts: dict[str, Any]) -> str:
    major, minor = arch.capability(facts)
    name = facts["name"].decode()
    text = (
        f"{number}: {name}, compute capability {major}.{minor}, "
        f"{facts['multiProcessorCount']} SMs, {facts['totalGlobalMem'] / 2**30:.0f} GiB"
    )
    if arch.arch_of(facts) is None:
        text += f"; not supported, the kernels need {arch.CAPABILITIES}"
    return text


def _driver() -> str:
    version = int(_runtime().driverGetVersion())
    if not version:
        return "none"
    text = f"CUDA {version // 1000}.{version % 1000 // 10}"
    module = Path("/sys/module/nvidia/version")
    return f"{module.read_text().strip()}, {text}" if module.exists() else text


def _nvrtc() -> str:
    return f"{nvrtc.build()}, {nvrtc.library().path}"


def _kernels() -> list[str]:
    """The table of variants, and how many other entries the cache holds."""
    entries = compiler.cache_entries()
    try:
        found = [(variant, compiler.cached_variant(variant)) for variant in all_variants()]
    except FlashMLAError:  # no NVRTC: an entry cannot be told from one of another NVRTC
        plural = "kernel" if len(entries) == 1 else "kernels"
        return [f"The cache holds {len(entries)} {plural}; which of them fit, NVRTC would tell."]
    rows = []
    for variant, built in found:
        cells = ["-", "-", "-", "no"]
        if built is not None:
            used = built.resources
            cells = [str(used.registers), str(used.spill_stores), f"{built.seconds:.2f}", "yes"]
        rows.append((variant.name, *cells))
    lines = table(("kernel", "registers", "spill bytes", "seconds", "cached"), rows)
    others = len(entries) - sum(built is not None for _, built in found)
    size = sum(len(entry.cubin) for entry in entries)
    if others > 0:
        lines.append(
            f"{others} of {len(entries)} entries ({size / 1e3:.0f} kB in all) are of other sources "
            "or another NVRTC; flashmla-cupy clear-cache removes all."
        )
    return lines
