"""flash_mla_with_kvcache() with indices: every query token sees the tokens that its list names."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import reference_sparse
from ..errors import ArgTypeError, DeviceCheckError, ShapeError
from ..formats.cache_format import format_of
from ..frameworks import ArrayInfo
from ..schedule import split
from ..schedule.lists import list_lengths, longest
from ..schedule.sched_meta import Configuration, stale_requests
from ..sizes import NUM_SMS_CPU, num_sm_parts
from . import checks, fits, gathered, scalars
from .arguments import SPARSE_DECODE
from .operation import Operation, Valid, Views
from .scalars import INT_LIMIT
from .wording import show


def _validate(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> Valid:
    head_dim_v, softmax_scale, is_fp8_kvcache, wide_fp8, is_lazy = options
    scalars.head_dim_v(head_dim_v)
    named = dict(zip(SPARSE_DECODE.names, arrays, strict=True))
    checks.metadata_kind(named["tile_scheduler_metadata"], named["num_splits"], is_lazy)
    framework, infos, sizes = fits.described(SPARSE_DECODE, arrays)
    q, k_cache = infos["q"], infos["k_cache"]
    found = fits.cache("k_cache", k_cache)
    scalars.says_fp8(is_fp8_kvcache, found.is_fp8, show(k_cache))
    fits.query(q, found, k_cache.dtype)
    fits.wide_fp8(wide_fp8, q, found)
    fits.descales(infos, found)
    _lists(infos, "")
    _extra(infos)
    batch, s_q, h_q = sizes["batch"], sizes["s_q"], sizes["h_q"]
    fits.requests("q", q, batch * s_q)
    outputs = fits.decode_outputs(infos, options)
    fits.outputs(SPARSE_DECODE, infos, outputs)
    configuration = Configuration(
        framework.name,
        q.device,
        batch,
        s_q,
        h_q,
        1,
        sizes["page_size"],
        False,
        found.name,
        sizes["topk"],
        sizes.get("extra_page_size", 0),
        sizes.get("extra_topk", 0),
    )
    scale = scalars.softmax_scale(softmax_scale, found.d_qk)
    return Valid(framework, infos, (scale, wide_fp8), outputs, configuration)


def _lists(infos: dict[str, ArrayInfo], prefix: str) -> None:
    name = f"{prefix}indices_in_kvcache" if prefix else "indices"
    if infos[name].shape[2] < 1:
        remedy = "Pass -1 where there is no token."
        raise ShapeError(name, "lists of at least one entry", show(infos[name]), remedy)


def _extra(infos: dict[str, ArrayInfo]) -> None:
    """The second pool comes with its lists, and in the format of the first."""
    names = "extra_k_cache", "extra_indices_in_kvcache"
    for name, other in (names, names[::-1]):
        if name in infos and other not in infos:
            remedy = f"Pass {other}, or leave {name} out."
            raise ArgTypeError(other, f"an array, since {name} is one", "None", remedy)
    if "extra_topk_length" in infos and names[1] not in infos:
        remedy = "Leave extra_topk_length out."
        raise ArgTypeError(names[1], "an array, for extra_topk_length", "None", remedy)
    if names[0] not in infos:
        return
    cache, extra = infos["k_cache"], infos[names[0]]
    found = fits.cache(names[0], extra)
    if found != format_of(cache.dtype, cache.shape[3]):
        expected = f"the format of k_cache, {show(cache)}"
        raise ShapeError(names[0], expected, show(extra), "Make both caches of one format.")
    _lists(infos, "extra_")
    indices, extra_indices = infos["indices"], infos[names[1]]
    if longest(indices.shape[2], extra_indices.shape[2]) > INT_LIMIT:
        expected = f"at most {INT_LIMIT} tokens in both lists, as int32 holds; indices: "
        expected += show(indices)
        raise ShapeError(names[1], expected, show(extra_indices), "Pass shorter lists.")


def _lengths(valid: Valid, views: Views) -> np.ndarray:
    """The lengths of the split's requests: [batch * s_q]."""
    batch, s_q, topk = valid.infos["indices"].shape
    extra = valid.infos.get("extra_indices_in_kvcache")
    return list_lengths(
        batch,
        s_q,
        topk,
        views["topk_length"],
        0 if extra is None else extra.shape[2],
        views["extra_topk_length"],
    )


def _refused(valid: Valid, views: Views) -> DeviceCheckError | None:
    lists = ("indices", "topk_length"), ("extra_indices_in_kvcache", "extra_topk_length")
    for name, length in lists:
        if name in valid.infos:
            topk = valid.infos[name].shape[2]
            request = reference_sparse.bad_length(topk, views[length])
            if request >= 0:
                return DeviceCheckError(request, -1, length.replace("extra_", "extra "), False)
    return None


def _schedule(valid: Valid, views: Views) -> tuple[np.ndarray, np.ndarray]:
    h_q = valid.infos["q"].shape[2]
    parts = num_sm_parts(NUM_SMS_CPU, h_q, 1)
    return split.plan(_lengths(valid, views), parts, h_q, 1, gathered=True)


def _compute(valid: Valid, views: Views) -> DeviceCheckError | None:
    scale, _ = valid.options
    named: dict[str, Any] = dict(views)
    metadata = named["tile_scheduler_metadata"]
    stale = None if metadata is None else stale_requests(metadata, _lengths(valid, views))
    return reference_sparse.decode(
        named["q"],
        named["k_cache"],
        named["indices"],
        scale,
        topk_length=named["topk_length"],
        attn_sink=named["attn_sink"],
        extra_k_cache=named["extra_k_cache"],
        extra_indices=named["extra_indices_in_kvcache"],
        extra_topk_length=named["extra_topk_length"],
        descale_q=named["descale_q"],
        descale_k=named["descale_k"],
        stale=stale,
        out=named["out"],
        lse=named["lse"],
    ).violation


def _on_gpu(valid: Valid) -> gathered.Work:
    infos = valid.infos
    q, cache, indices = (infos[name] for name in ("q", "k_cache", "indices"))
    _, s_q, h_q, _ = q.shape
    extra = infos.get("extra_indices_in_kvcache")
    given = [infos[name] for name in ("topk_length", "extra_topk_length") if name in infos]
    if s_q > 1 and len({len(info.shape) for info in given}) > 1:
        raise ShapeError(
            "extra_topk_length",
            "as many axes as topk_length, on a GPU",
            show(infos["extra_topk_length"]),
            "Pass both as [batch], or both as [batch, s_q].",
        )
    per_token = any(len(info.shape) == 2 for info in given)
    geometry = gathered.geometry_of(
        cache,
        q,
        table_stride=gathered.even_rows("indices", indices),
        columns=indices.shape[2],
        parts=num_sm_parts(gathered.num_sms_of(q.device), h_q, 1),
        topk=indices.shape[2],
        length_group=1 if per_token else s_q,
        wide_fp8=valid.options[1],
        **(
            {}
            if extra is None
            else {
                "extra_topk": extra.shape[2],
                "extra_stride": gathered.even_rows("extra_indices_in_kvcache", extra),
                "extra_pool": gathered.pool_of(infos["extra_k_cache"]),
            }
        ),
    )
    options, names = (valid.options[0], False), ("k_cache", "indices")
    return gathered.GpuWork(valid.framework, geometry, q.device, options, names)


SPARSE = Operation(
    name="sparse_decode",
    table=SPARSE_DECODE,
    outputs=fits.decode_outputs,
    validate=_validate,
    refused=_refused,
    compute=_compute,
    schedule=_schedule,
    on_gpu=_on_gpu,
)
