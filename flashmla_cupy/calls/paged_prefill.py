"""flash_mla_sparse_fwd() over a paged cache of any format: a place in its lists is
page * page_size + offset, and one outside of the pool is no token."""

from __future__ import annotations

from typing import Any

from .. import reference_sparse
from ..errors import ArgumentError, DeviceCheckError
from . import fits, gathered
from .arguments import SPARSE_PREFILL_PAGED
from .operation import Operation, Valid, Views
from .sparse_prefill import (
    FUNCTION,
    fits_int32,
    lists,
    outputs,
    refused,
    scale_and_width,
    work_over,
)


def _validate(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> Valid:
    try:
        return _checked(arrays, options)
    except ArgumentError as error:
        raise error.of(FUNCTION) from error.__cause__


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
    fits_int32("q", q)
    expected = outputs(infos, options)
    fits.outputs(SPARSE_PREFILL_PAGED, infos, expected)
    return Valid(framework, infos, (scale, wide_fp8), expected)


def _compute(valid: Valid, views: Views) -> DeviceCheckError | None:
    named: dict[str, Any] = dict(views)
    return reference_sparse.prefill(
        named["q"],
        named["kv"],
        named["indices"],
        valid.options[0],
        attn_sink=named["attn_sink"],
        topk_length=named["topk_length"],
        descale_q=named["descale_q"],
        descale_k=named["descale_k"],
        out=named["out"],
        max_logits=named["max_logits"],
        lse=named["lse"],
    ).violation


def _on_gpu(valid: Valid) -> gathered.Work:
    return work_over(valid.infos["kv"], valid, wide_fp8=valid.options[1])


PAGED_PREFILL = Operation(
    name="sparse_prefill_paged",
    table=SPARSE_PREFILL_PAGED,
    outputs=outputs,
    validate=_validate,
    refused=refused,
    compute=_compute,
    on_gpu=_on_gpu,
)
