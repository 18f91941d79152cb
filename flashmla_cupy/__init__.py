"""Multi-head latent attention (MLA) decoding on Hopper GPUs, compiled at run time; NumPy elsewhere.

    metadata, num_splits = get_mla_metadata(cache_seqlens, s_q * h_q // h_kv, h_kv)
    out, lse = flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, 512, metadata, num_splits, causal=True
    )

FlashMLA's names and both of its call styles, for arrays of NumPy, CuPy, PyTorch, JAX and DLPack.
Importing this package imports none of CuPy, PyTorch and JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._version import __version__ as __version__
from .errors import (
    AliasingError,
    AlignmentError,
    ArgTypeError,
    ArgumentError,
    DeviceCheckError,
    DeviceMismatchError,
    DTypeError,
    FlashMLAError,
    ForkedProcessError,
    FrameworkMismatchError,
    KernelCacheError,
    KernelCacheWarning,
    KernelCompileError,
    KernelLoadError,
    MissingDependencyError,
    NoDeviceError,
    NVRTCNotFoundError,
    NVRTCVersionError,
    OptionError,
    OutOfPagesError,
    ReadOnlyError,
    ScalarError,
    SequenceError,
    ShapeError,
    StaleMetadataError,
    StepError,
    StrideError,
    UnsupportedArchError,
)

if TYPE_CHECKING:
    from .append import append_mla_kv
    from .cache.paged_cache import PagedKVCache
    from .formats.cache_format import CacheFormat
    from .formats.quantize import dequantize_kv, quantize_kv
    from .formats.write import write_kv
    from .interface import (
        check,
        flash_mla_sparse_fwd,
        flash_mla_with_kvcache,
        get_mla_metadata,
        register_torch_ops,
    )
    from .partials import merge_partials
    from .schedule.sched_meta import SchedMeta
    from .schedule.view import Schedule

__all__ = [
    "AliasingError",
    "AlignmentError",
    "ArgTypeError",
    "ArgumentError",
    "CacheFormat",
    "DTypeError",
    "DeviceCheckError",
    "DeviceMismatchError",
    "FlashMLAError",
    "ForkedProcessError",
    "FrameworkMismatchError",
    "KernelCacheError",
    "KernelCacheWarning",
    "KernelCompileError",
    "KernelLoadError",
    "MissingDependencyError",
    "NVRTCNotFoundError",
    "NVRTCVersionError",
    "NoDeviceError",
    "OptionError",
    "OutOfPagesError",
    "PagedKVCache",
    "ReadOnlyError",
    "ScalarError",
    "SchedMeta",
    "Schedule",
    "SequenceError",
    "ShapeError",
    "StaleMetadataError",
    "StepError",
    "StrideError",
    "UnsupportedArchError",
    "append_mla_kv",
    "check",
    "dequantize_kv",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "merge_partials",
    "quantize_kv",
    "register_torch_ops",
    "write_kv",
]

# The module of each name that is imported when it is first asked for: these need NumPy.
_LAZY = {
    "append_mla_kv": "append",
    "check": "interface",
    "flash_mla_sparse_fwd": "interface",
    "flash_mla_with_kvcache": "interface",
    "get_mla_metadata": "interface",
    "register_torch_ops": "interface",
    "SchedMeta": "schedule.sched_meta",
    "PagedKVCache": "cache.paged_cache",
    "merge_partials": "partials",
    "CacheFormat": "formats.cache_format",
    "dequantize_kv": "formats.quantize",
    "quantize_kv": "formats.quantize",
    "write_kv": "formats.write",
    "Schedule": "schedule.view",
}


def __getattr__(name: str) -> object:
    import importlib

    if name == "deepseek":
        return importlib.import_module(".deepseek", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value  # found at once the next time
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "deepseek"})


def _register_torch_ops() -> None:
    """Where torch is imported already, a saved program may be loaded next."""
    import contextlib
    import sys

    if "torch" in sys.modules:
        from .interface import register_torch_ops

        with contextlib.suppress(Exception):  # a torch that cannot: its first traced call says why
            register_torch_ops()


_register_torch_ops()
