"""Calls on the emulated GPU (tests/emulator), which NumPy arrays count as arrays of."""

from __future__ import annotations

import numpy as np

from flashmla_cupy import check, flash_mla_with_kvcache, get_mla_metadata
from flashmla_cupy.errors import DeviceCheckError


def decode(problem, metadata=None):
    """(out, lse) of one call, into arrays that held NaN."""
    batch, s_q, h_q, _ = problem.q.shape
    out = np.full((batch, s_q, h_q, 512), np.nan, problem.q.dtype)
    lse = np.full((batch, h_q, s_q), np.nan, np.float32)
    return decode_into(problem, metadata or metadata_of(problem), out, lse)


def decode_into(problem, metadata, out, lse):
    return flash_mla_with_kvcache(
        *problem.arrays(), 512, *metadata, **problem.options(), out=out, lse=lse
    )


def metadata_of(problem):
    return get_mla_metadata(problem.cache_seqlens, problem.rows, problem.h_kv)


def bits(out, lse) -> bytes:
    return out.tobytes() + lse.tobytes()


def refusal() -> tuple[int, str] | None:
    """(request, reason) that the kernels refused since the last time."""
    try:
        check()
    except DeviceCheckError as error:
        return error.request, error.reason
    return None
