"""NVRTC: from our CUDA sources to cubins, without a toolkit, a host compiler or a GPU.

A `Variant` (gpu/kernels.py) names one specialisation of one kernel; its macros are the only
difference between variants of a source. Compiled kernels live in a memo of the process and in
`cubin_cache`, under a key that holds everything that can change the code: all sources, the
options, the exact NVRTC build and the version of this package. Sources include nothing but one
another, from memory, so no include path and no header of a toolkit can change the result.

CuPy's own `RawModule(code=...)` is not used: it adds `-arch=sm_90`, which lacks wgmma, needs a
GPU to compile, and does not hash included files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .._version import __version__
from ..errors import KernelCacheError, KernelCacheWarning, KernelCompileError
from ..gpu.kernels import Variant
from ..locks import Lock
from . import cubin_cache, nvrtc

_BASE_OPTIONS = ("--std=c++17", "--ptxas-options=-v")
_KEY_SCHEMA = 1  # raise it when the meaning of an entry changes

_logger = logging.getLogger("flashmla_cupy")
_memo: dict[Variant, Compiled] = {}
_locks: dict[Variant, Lock] = {}  # of those that are or were being compiled
_locks_lock = Lock()


@dataclass(frozen=True)
class Resources:
    """What ptxas says of a kernel: registers a thread, the rest in bytes; `shared` is static."""

    registers: int
    stack_frame: int
    spill_stores: int
    spill_loads: int
    shared: int


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel. `seconds` is what compiling it took, then or, if `cached`, earlier."""

    variant: Variant
    cubin: bytes = field(repr=False)
    log: str = field(repr=False)
    resources: Resources
    seconds: float
    cached: bool


def compile_variant(
    variant: Variant, *, extra_options: Iterable[str] = (), refresh: bool = False
) -> Compiled:
    """Return `variant` compiled, from memory or the disk cache if it is there. Thread-safe.

    extra_options: further NVRTC options; the result is then neither looked up nor kept.
    refresh: compile again and replace what is kept, for a cubin that the driver will not load.

    Raises MissingDependencyError, NVRTCNotFoundError, NVRTCVersionError, KernelCompileError, and
    KernelCacheError for an environment variable with a value that is not understood.
    """
    if isinstance(extra_options, str):
        raise TypeError(f"extra_options: expected a sequence of options, got {extra_options!r}.")
    if options := tuple(extra_options):
        built = _build(variant, (*_options(variant), *options), _sources())
        _announce(built, "not cached")
        return built
    with _locks_lock:
        lock = _locks.setdefault(variant, Lock())
    # One thread compiles it and the others wait. Whatever ends that, an error or Ctrl-C, lets the
    # next one try.
    with lock:
        found = None if refresh else _memo.get(variant)
        if found is None:
            found = _memo[variant] = _load_or_build(variant, refresh)
        return found


def compile_variants(variants: Iterable[Variant]) -> list[Compiled]:
    """`compile_variant` for each, in parallel: NVRTC runs outside the interpreter lock."""
    wanted = list(variants)
    with ThreadPoolExecutor(max(1, min(len(wanted), os.cpu_count() or 1))) as pool:
        return list(pool.map(compile_variant, wanted))


def cached_variant(variant: Variant) -> Compiled | None:
    """`variant` as the disk cache holds it for these sources and this NVRTC; never compiles."""
    entry = cubin_cache.load(cache_key(variant, _sources()))
    return None if entry is None else _from_entry(variant, entry)


def cache_entries() -> list[cubin_cache.Entry]:
    """All entries of the disk cache, those of other versions included, for `info`.

    Metadata keys: "name", "resources", "seconds", "log", "nvrtc", "version", "created" (epoch).
    """
    return [entry for entry in cubin_cache.entries() if entry.cubin]  # nvrtc.build has one without


def cache_key(variant: Variant, sources: Mapping[str, bytes]) -> str:
    """SHA-256, in hex, over everything that decides which code `variant` becomes."""
    parts = {
        "schema": _KEY_SCHEMA,
        "version": __version__,
        "nvrtc": nvrtc.build(),
        "source": variant.source,
        "options": _options(variant),
        "sources": {name: hashlib.sha256(text).hexdigest() for name, text in sources.items()},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# ---- one variant -----------------------------------------------------------------------------


def _options(variant: Variant) -> tuple[str, ...]:
    return (f"-arch={variant.arch}", *_BASE_OPTIONS, *variant.macros)


def _load_or_build(variant: Variant, refresh: bool) -> Compiled:
    verify = _switch("FLASHMLA_CUPY_CACHE_VERIFY")
    _switch("FLASHMLA_CUPY_VERBOSE")  # a bad value is reported before the work, not after
    sources = _sources()
    key = cache_key(variant, sources)
    entry = None if refresh else cubin_cache.load(key)
    kept = None if entry is None else _from_entry(variant, entry)
    if kept and not verify:
        _logger.debug("loaded %s from the cache", variant.name)
        return kept
    options = _options(variant)
    if verify and nvrtc.version() >= (12, 9):  # NVRTC's own cache would be compared with itself
        options += ("--no-cache",)
    built = _build(variant, options, sources)
    if kept and kept.cubin == built.cubin:
        return kept
    if kept:
        warnings.warn(
            f"The cached {variant.name} differs from a fresh compilation, and is replaced.",
            KernelCacheWarning,
            stacklevel=2,
        )
    metadata = {
        "name": variant.name,
        "resources": asdict(built.resources),
        "seconds": built.seconds,
        "log": built.log,
        "nvrtc": nvrtc.build(),
        "version": __version__,
        "created": time.time(),
    }
    path = cubin_cache.store(key, metadata, built.cubin)
    _announce(built, f"cached in {os.path.dirname(path)}" if path else "kept in memory")
    return built


def _build(variant: Variant, options: tuple[str, ...], sources: Mapping[str, bytes]) -> Compiled:
    if variant.source not in sources:
        raise KernelCompileError(
            f"cuda_src holds no {variant.source}. Reinstall flashmla-cupy.", ""
        )
    nvrtc.version()
    headers = {name: text for name, text in sources.items() if not name.endswith(".cu")}
    start = time.perf_counter()
    cubin, log = nvrtc.compile_program(
        sources[variant.source], variant.source, headers, options, "CUBIN"
    )
    seconds = time.perf_counter() - start
    resources = parse_resources(log).get(variant.entry)
    if resources is None:
        if "--no-cache" not in options and nvrtc.version() >= (12, 9):
            # NVRTC's own cache may return a cubin without the log of the compilation.
            return _build(variant, (*options, "--no-cache"), sources)
        raise KernelCompileError(f"{variant.source} holds no kernel {variant.entry}.", log)
    return Compiled(variant, cubin, log, resources, seconds, cached=False)


def _from_entry(variant: Variant, entry: cubin_cache.Entry) -> Compiled:
    data = entry.metadata
    resources = Resources(**data["resources"])
    return Compiled(variant, entry.cubin, data["log"], resources, data["seconds"], cached=True)


def parse_resources(log: str) -> dict[str, Resources]:
    """Resources of each kernel in the log of `--ptxas-options=-v`, by its name."""
    found = {}
    for block in log.split("Compiling entry function '")[1:]:
        frame = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        )
        registers = re.search(r"Used (\d+) registers", block)
        shared = re.search(r"(\d+) bytes smem", block)
        if frame and registers:
            found[block.split("'")[0]] = Resources(
                registers=int(registers[1]),
                stack_frame=int(frame[1]),
                spill_stores=int(frame[2]),
                spill_loads=int(frame[3]),
                shared=int(shared[1]) if shared else 0,
            )
    return found


def _sources() -> dict[str, bytes]:
    """Every file of cuda_src: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "cuda_src", package.parent / "cuda_src"):
        if folder.is_dir():
            files = sorted(path for path in folder.iterdir() if path.suffix in (".cu", ".cuh"))
            return {path.name: path.read_bytes() for path in files}
    raise KernelCompileError("The CUDA sources are missing. Reinstall flashmla-cupy.", "")


def _switch(variable: str) -> bool | None:
    """An environment variable that is 0 or 1; None when it is not set."""
    value = os.environ.get(variable)
    if value not in (None, "0", "1"):
        raise KernelCacheError(f"{variable}: expected 0 or 1, got {value!r}. Set one, or unset it.")
    return None if value is None else value == "1"


def _announce(built: Compiled, where: str) -> None:
    """One INFO line a compile, shown on stderr where a person waits and nobody set up logging."""
    used = built.resources
    line = (
        f"compiled {built.variant.name} for {built.variant.arch} in {built.seconds:.2g} s: "
        f"{used.registers} registers, {used.spill_stores} spill bytes, {where}"
    )
    _logger.info(line)
    show = _switch("FLASHMLA_CUPY_VERBOSE")
    if show is None:
        watched = "IPython" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())
        show = watched and not _logger.hasHandlers()
    if show:
        print(f"flashmla_cupy: {line}", file=sys.stderr)
