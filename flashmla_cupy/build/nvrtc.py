"""The NVRTC library through CuPy's thin binding: which one is there, and one compilation with it.

Needs no GPU. Everything here imports CuPy inside the functions.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..errors import (
    KernelCacheError,
    KernelCompileError,
    MissingDependencyError,
    NVRTCNotFoundError,
    NVRTCVersionError,
)
from . import cubin_cache

OLDEST = (12, 4)
INSTALL = 'pip install "flashmla-cupy[cuda12]" (or [cuda13] for CUDA 13)'


def binding() -> Any:
    """CuPy's binding, cupy.cuda.nvrtc, or a sentence that says how to install it."""
    try:
        cuda: Any = importlib.import_module("cupy.cuda")
    except ImportError as error:
        raise MissingDependencyError(
            f"CuPy is needed to compile the kernels, but it cannot be imported ({error}). "
            f"Install it with: {INSTALL}."
        ) from error
    except OSError as error:  # CuPy creates its own cache directory when it is imported
        raise MissingDependencyError(
            f"CuPy cannot be imported ({error}). Set CUPY_CACHE_DIR to a directory you can write."
        ) from error
    if cuda.runtime.is_hip:
        raise MissingDependencyError(
            "This CuPy is built for ROCm; the kernels are for NVIDIA Hopper GPUs. In a fresh "
            f"environment: {INSTALL}."
        )
    return cuda.nvrtc


@functools.lru_cache(maxsize=1)
def version() -> tuple[int, int]:
    """(major, minor) of the NVRTC that CuPy finds, whatever CUDA version CuPy was built for.

    Raises NVRTCNotFoundError without one, NVRTCVersionError when it is older than 12.4, or when a
    driver is present that is a major version behind and so could not load the cubins.
    """
    nvrtc = binding()
    try:
        major, minor = nvrtc.getVersion()
    except (RuntimeError, OSError, ImportError) as error:
        raise NVRTCNotFoundError(
            f"NVRTC, the CUDA run-time compiler, is not installed ({type(error).__name__}). "
            f"Install it with: {INSTALL}."
        ) from error
    if (major, minor) < OLDEST:
        raise NVRTCVersionError(
            f"NVRTC {major}.{minor} is too old for the kernels, which need 12.4 or newer. Run: "
            f'pip install --upgrade "nvidia-cuda-nvrtc-cu{major}>=12.4".'
        )
    driver = _driver_version()
    if driver and major > driver // 1000:
        remedy = "Update the driver"
        if driver >= 12000:
            extra = f"flashmla-cupy[cuda{driver // 1000}]"
            remedy += f', or in a fresh environment run: pip install "{extra}"'
        raise NVRTCVersionError(
            f"NVRTC {major}.{minor} makes code for CUDA {major}, but the driver supports CUDA "
            f"{driver // 1000}.{driver % 1000 // 10}. {remedy}."
        )
    return int(major), int(minor)


def _driver_version() -> int:
    """CUDA version of the driver, such as 12040; 0 without one."""
    runtime: Any = importlib.import_module("cupy.cuda").runtime
    try:
        return int(runtime.driverGetVersion())
    except runtime.CUDARuntimeError:
        return 0


@functools.lru_cache(maxsize=1)
def build() -> str:
    """The exact build, "12.9 V12.9.86 CL-36037853".

    NVRTC says it in the PTX of an empty program. As that takes tens of milliseconds, it is kept in
    the disk cache, by the file that NVRTC was loaded from."""
    major, minor = version()
    key = _key_of_file()
    try:
        kept = cubin_cache.load(key) if key else None
    except KernelCacheError:  # whoever needs the cache for more than this will say so
        key = kept = None
    if kept is not None:
        return str(kept.metadata["nvrtc"])
    ptx, _ = compile_program(b"", "empty.cu", {}, ("-arch=sm_90",), "PTX")
    patterns = (rb"release [\d.]+, (\S+)", rb"Build ID: (\S+)")
    found = [match[1].decode() for pattern in patterns if (match := re.search(pattern, ptx))]
    named = " ".join([f"{major}.{minor}", *found])
    if key:
        cubin_cache.store(key, {"nvrtc": named}, b"")
    return named


def _key_of_file() -> str | None:
    """Of the disk cache, for what is known of the file that NVRTC was loaded from; None if that
    cannot be found out."""
    try:
        path = library_path("libnvrtc")
        status = os.stat(path)
    except OSError:
        return None
    facts = f"nvrtc {path} {status.st_size} {status.st_mtime_ns}"
    return hashlib.sha256(facts.encode()).hexdigest()


def library_path(name: str) -> str:
    """Where the shared library `name` was loaded from, by the memory map of this process.

    Raises OSError if it is not loaded, or where there is no such map."""
    pattern = re.compile(rf"\s(/\S.*/{re.escape(name)}\.so[.\d]*)$")
    for line in Path("/proc/self/maps").read_text().splitlines():
        if found := pattern.search(line):
            return found[1]
    raise OSError(f"{name} is not loaded")


def compile_program(
    source: bytes,
    name: str,
    headers: Mapping[str, bytes],
    options: tuple[str, ...],
    product: Literal["CUBIN", "PTX"],
) -> tuple[bytes, str]:
    """(product, log) of one NVRTC program."""
    nvrtc = binding()
    program = nvrtc.createProgram(
        source.decode(), name, list(headers.values()), [header.encode() for header in headers]
    )
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program).strip("\0\n ")
            if "BUILTIN" in str(error) or "libnvrtc-builtins" in log:
                raise NVRTCNotFoundError(
                    f"NVRTC does not find its own libnvrtc-builtins ({error}). Reinstall it with: "
                    f"{INSTALL}."
                ) from error
            raise KernelCompileError(
                f"NVRTC {'.'.join(map(str, nvrtc.getVersion()))} cannot compile {name} with "
                f"{' '.join(options)} ({error}).",
                log,
            ) from error
        return getattr(nvrtc, f"get{product}")(program), nvrtc.getProgramLog(program).strip("\0\n ")
    finally:
        nvrtc.destroyProgram(program)
