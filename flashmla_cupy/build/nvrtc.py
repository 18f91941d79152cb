"""NVRTC, CUDA's run-time compiler: which of those that are installed, and one compilation with it.

Needs no GPU. Taken is the newest that the driver takes: an NVRTC of a later major version makes
code that the driver cannot load. Of one major version, the first in the order of `installed`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from ..errors import (
    KernelCacheError,
    KernelCompileError,
    MissingDependencyError,
    NVRTCNotFoundError,
    NVRTCVersionError,
)
from ..gpu import driver
from ..locks import Lock
from . import cubin_cache
from .nvrtc_library import Library, NVRTCError

OLDEST = (12, 4)
NEWEST_MAJOR = 19  # whose names the system's loader is asked for; there is none yet
INSTALL = 'pip install "flashmla-cupy[cuda12]" (or [cuda13] for CUDA 13)'

_FILE = re.compile(r"libnvrtc\.so\.(\d+)|nvrtc64_(\d+)0_0\.dll")
_lock = Lock()


def cupy_cuda() -> Any:
    """CuPy's module cupy.cuda, or a sentence that says how to install it."""
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
    return cuda


# ---- which one -------------------------------------------------------------------------------


def version() -> tuple[int, int]:
    """(major, minor) of the NVRTC that compiles the kernels; raises what `library` raises."""
    return library().version


def library() -> Library:
    """The NVRTC that compiles the kernels, loaded at the first call.

    Raises MissingDependencyError without CuPy, NVRTCNotFoundError without an NVRTC, and
    NVRTCVersionError when all are older than 12.4 or too new for the driver."""
    with _lock:  # not two at once: the builtins are loaded after the library
        return _chosen()


@functools.lru_cache(maxsize=1)
def _chosen() -> Library:
    cupy_cuda()  # nothing can be launched without
    newest = _driver_version() // 1000 or NEWEST_MAJOR  # without a driver, any may be right
    found = sorted(installed(), key=lambda file: -file[1])
    too_old = None
    for path, major in found:
        if major <= newest and (library := _load(path)):
            if library.version >= OLDEST:
                return library
            too_old = too_old or library
    for major in range(newest, OLDEST[0] - 1, -1):
        if (library := _load(_name(major))) and library.version >= OLDEST:
            return library
    if too_old is not None:
        major, minor = too_old.version
        raise NVRTCVersionError(
            f"NVRTC {major}.{minor} is too old for the kernels, which need 12.4 or newer "
            f'({too_old.path}). Run: pip install --upgrade "{_package(major)}>=12.4".'
        )
    for path, _ in found:
        if library := _load(path):
            raise _too_new(library, _driver_version())
    raise NVRTCNotFoundError(
        "NVRTC, the CUDA run-time compiler, is not installed: there is no libnvrtc in the folders "
        f"of sys.path, the environment, $CUDA_PATH or the system. Install it with: {INSTALL}."
    )


def installed() -> Iterator[tuple[str, int]]:
    """(path, major version) of every NVRTC in the places where it is usually installed."""
    seen = set()
    for folder in _folders():
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue
        for name in names:
            path = os.path.join(folder, name)
            if (match := _FILE.fullmatch(name)) and (real := os.path.realpath(path)) not in seen:
                seen.add(real)
                yield path, int(match[1] or match[2])


def _folders() -> Iterator[Path]:
    """Folders that may hold NVRTC: of wheels, as pip puts them wherever Python looks for packages;
    of the loader's variable, of conda, of a toolkit."""
    for entry in sys.path:
        wheels = Path(entry or os.curdir).absolute() / "nvidia"
        yield from sorted(wheels.glob("*/lib"))
        yield from sorted(wheels.glob("*/bin"))  # on Windows
        yield from sorted(wheels.glob("*/bin/x86_64"))
    for entry in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep):
        if os.path.isabs(entry):
            yield Path(entry)
    roots = [os.environ.get(name) for name in ("CONDA_PREFIX", "CUDA_PATH", "CUDA_HOME")]
    for root in filter(None, [sys.prefix, *roots, "/usr/local/cuda"]):
        for part in (
            "lib",
            "lib64",
            "bin",
            "bin/x64",
            "targets/x86_64-linux/lib",
            "targets/sbsa-linux/lib",
        ):
            yield Path(root) / part


def _name(major: int) -> str:
    """What the system's loader knows it by."""
    return f"nvrtc64_{major}0_0.dll" if sys.platform == "win32" else f"libnvrtc.so.{major}"


def _package(major: int) -> str:
    """The wheel that holds it."""
    return "nvidia-cuda-nvrtc" if major >= 13 else f"nvidia-cuda-nvrtc-cu{major}"


def _load(path: str) -> Library | None:
    try:
        return Library(path)
    except (OSError, AttributeError):  # for another machine, or no NVRTC
        return None


def _too_new(library: Library, driver_version: int) -> NVRTCVersionError:
    major, minor = library.version
    remedy = "Update the driver"
    if driver_version >= 12000:
        extra = f"flashmla-cupy[cuda{driver_version // 1000}]"
        remedy += f', or in a fresh environment run: pip install "{extra}"'
    return NVRTCVersionError(
        f"NVRTC {major}.{minor} ({library.path}) makes code for CUDA {major}, but the driver "
        f"supports CUDA {driver_version // 1000}.{driver_version % 1000 // 10}. {remedy}."
    )


def _driver_version() -> int:
    """CUDA version of the driver, such as 12040; 0 without one."""
    return driver.version()


# ---- its build -------------------------------------------------------------------------------


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
        path = library().path
        status = os.stat(path)
    except OSError:
        return None
    facts = f"nvrtc {path} {status.st_size} {status.st_mtime_ns}"
    return hashlib.sha256(facts.encode()).hexdigest()


# ---- a compilation ---------------------------------------------------------------------------


def compile_program(
    source: bytes,
    name: str,
    headers: Mapping[str, bytes],
    options: tuple[str, ...],
    product: Literal["CUBIN", "PTX"],
) -> tuple[bytes, str]:
    """(product, log) of one NVRTC program. Raises KernelCompileError, NVRTCNotFoundError if a part
    of NVRTC is missing, and what `library` raises."""
    nvrtc = library()
    try:
        return nvrtc.compile(source, name, headers, options, product)
    except NVRTCError as error:
        number = ".".join(map(str, nvrtc.version))
        if "BUILTIN" in str(error) or "libnvrtc-builtins" in error.log:
            raise _no_builtins(nvrtc, error) from error
        raise KernelCompileError(
            f"NVRTC {number} cannot compile {name} with {' '.join(options)} ({error}).", error.log
        ) from error


def _no_builtins(nvrtc: Library, error: NVRTCError) -> NVRTCNotFoundError:
    package = f"{_package(nvrtc.version[0])}=={nvrtc.version[0]}.{nvrtc.version[1]}.*"
    folder, file = os.path.split(nvrtc.builtins)
    if os.path.exists(nvrtc.builtins):
        what = f"cannot load {nvrtc.builtins}, one of its own files"
    else:
        what = f"does not find {file}, one of its own files, which belongs in {folder}"
    said = " ".join(error.log.split()) or "nothing"
    return NVRTCNotFoundError(
        f"NVRTC {nvrtc.version[0]}.{nvrtc.version[1]} ({nvrtc.path}) {what} ({error}). It says: "
        f'{said}. Install the same version again: pip install --force-reinstall "{package}".'
    )
