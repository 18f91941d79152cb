"""flash_mla_sparse_fwd() over a paged cache of any format: a place in its lists is
page * page_size + offset, and one outside of the pool is no token."""

from __future__ import annotations

from typing import Any

from . import fits, gathered
from .arguments import SPARSE_PREFILL_PAGED
from .operation import Operation, Valid, naming
from .sparse_prefill import (
    FUNCTION,
    compute,
    lists,
    outputs,
    refused,
    requests,
    scale_and_width,
    work_over,
)


def _checked(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> Valid:
    sm_scale, d_v, wide_fp8 = options
    scale = scale_and_width(sm_scale, d_v)
    framework, infos, _ = fits.described(SPARSE_PREFILL_PAGED, arrays)
    q, kv = infos["q"], infos["kv"]
    found = fits.cache("kv", kv)
    fits.query(q, found, kv.dtype, "kv")
    fits.wide_fp8(wide_fp8, q, found, "kv")
    fits.descales(infos, found, "kv")
    lists(infos["indices"])
    requests(q)
    expected = outputs(infos, options)
    fits.outputs(SPARSE_PREFILL_PAGED, infos, expected)
    return Valid(framework, infos, (scale, wide_fp8), expected)


def _on_gpu(valid: Valid) -> gathered.Work:
    return work_over(valid.infos["kv"], valid, wide_fp8=valid.options[1])


PAGED_PREFILL = Operation(
    name="sparse_prefill_paged",
    table=SPARSE_PREFILL_PAGED,
    outputs=outputs,
    validate=naming(FUNCTION, _checked),
    refused=refused,
    compute=compute,
    on_gpu=_on_gpu,
)
