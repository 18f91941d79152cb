"""flash_mla_with_kvcache() of FP8 caches with block_table: every query token sees its request."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import reference
from ..errors import DeviceCheckError
from ..schedule import split
from ..schedule.sched_meta import Configuration, stale_requests
from ..sizes import NUM_SMS_CPU, num_sm_parts
from . import checks, fits, gathered, scalars
from .arguments import FP8_DECODE
from .operation import Operation, Valid, Views


def _validate(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> Valid:
    head_dim_v, softmax_scale, causal, wide_fp8, is_lazy = options
    scalars.head_dim_v(head_dim_v)
    causal = scalars.causal(causal)
    named = dict(zip(FP8_DECODE.names, arrays, strict=True))
    checks.metadata_kind(named["tile_scheduler_metadata"], named["num_splits"], is_lazy)
    framework, infos, sizes = fits.described(FP8_DECODE, arrays)
    q, k_cache = infos["q"], infos["k_cache"]
    found = fits.cache("k_cache", k_cache)
    checks.page_size(k_cache, is_divisible=not found.tail_bytes)
    fits.query(q, found, k_cache.dtype)
    fits.wide_fp8(wide_fp8, q, found)
    fits.descales(infos, found)
    batch, s_q, h_q = sizes["batch"], sizes["s_q"], sizes["h_q"]
    checks.table(infos["block_table"], batch, k_cache.shape[1])
    checks.lengths(infos["cache_seqlens"], batch)
    outputs = fits.decode_outputs(infos, options)
    fits.outputs(FP8_DECODE, infos, outputs)
    page_size, name = k_cache.shape[1], framework.name
    configuration = Configuration(name, q.device, batch, s_q, h_q, 1, page_size, causal, found.name)
    scale = scalars.softmax_scale(softmax_scale, found.d_qk)
    checked = scale, causal and s_q > 1, wide_fp8
    return Valid(framework, infos, checked, outputs, configuration)


def _refused(valid: Valid, views: Views) -> DeviceCheckError | None:
    named: dict[str, Any] = dict(views)
    page_size = valid.infos["k_cache"].shape[1]
    request = reference.bad_length(named["cache_seqlens"], named["block_table"], page_size)
    return DeviceCheckError(request, -1, "length", False) if request >= 0 else None


def _schedule(valid: Valid, views: Views) -> tuple[np.ndarray, np.ndarray]:
    _, s_q, h_q, _ = valid.infos["q"].shape
    lengths: Any = views["cache_seqlens"]
    parts = num_sm_parts(NUM_SMS_CPU, s_q * h_q, 1)
    return split.plan(lengths, parts, s_q * h_q, 1, gathered=True)


def _compute(valid: Valid, views: Views) -> DeviceCheckError | None:
    named: dict[str, Any] = dict(views)
    metadata, lengths = named["tile_scheduler_metadata"], named["cache_seqlens"]
    return reference.decode(
        named["q"],
        named["k_cache"],
        named["block_table"],
        lengths,
        *valid.options[:2],
        descale_q=named["descale_q"],
        descale_k=named["descale_k"],
        stale=None if metadata is None else stale_requests(metadata, lengths),
        out=named["out"],
        lse=named["lse"],
    ).violation


def _on_gpu(valid: Valid) -> gathered.Work:
    q, cache, table = (valid.infos[name] for name in ("q", "k_cache", "block_table"))
    _, s_q, h_q, _ = q.shape
    geometry = gathered.geometry_of(
        cache,
        q,
        table_stride=gathered.rows_of(table),
        columns=table.shape[1],
        parts=num_sm_parts(gathered.num_sms_of(q.device), s_q * h_q, 1),
        wide_fp8=valid.options[2],
    )
    scale, causal, _ = valid.options
    names = "k_cache", "block_table"
    return gathered.GpuWork(valid.framework, geometry, q.device, (scale, causal), names)


FP8 = Operation(
    name="fp8_decode",
    table=FP8_DECODE,
    outputs=fits.decode_outputs,
    validate=_validate,
    refused=_refused,
    compute=_compute,
    schedule=_schedule,
    on_gpu=_on_gpu,
)
