"""Multi-head latent attention (MLA) decoding on Hopper GPUs, compiled at run time; NumPy elsewhere.

    metadata, num_splits = get_mla_metadata(cache_seqlens, s_q * h_q // h_kv, h_kv)
    out, lse = flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, 512, metadata, num_splits, causal=True
    )

FlashMLA's names and both of its call styles, for NumPy and CuPy arrays and PyTorch tensors.
Importing this package imports none of CuPy, PyTorch and JAX.
"""

from __future__ import annotations

from .errors import (
    AliasingError,
    AlignmentError,
    ArgTypeError,
    ArgumentError,
    CacheConfigError,
    CacheTrustWarning,
    DeviceCheckError,
    DeviceMismatchError,
    DTypeError,
    FlashMLAError,
    ForkedProcessError,
    FrameworkMismatchError,
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
    StrideError,
    UnsupportedArchError,
)

__version__ = "0.1.0"

_LAZY = {
    "check": "interface",
    "flash_mla_with_kvcache": "interface",
    "get_mla_metadata": "interface",
    "SchedMeta": "metadata",
    "PagedKVCache": "paged_cache",
    "merge_partials": "merge",
    "Schedule": "schedule",
}


def __getattr__(name: str) -> object:
    import importlib

    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
