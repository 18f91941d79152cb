"""flash_mla_sparse_fwd(): a prompt whose query tokens each see the tokens that their list names."""

from __future__ import annotations

from typing import Any

from .. import reference_sparse
from ..errors import (
    ArgTypeError,
    DeviceCheckError,
    DTypeError,
    OptionError,
    ShapeError,
)
from ..frameworks import ArrayInfo
from ..sizes import HEAD_DIM_V, NUM_SMS_CPU, num_sm_parts
from . import fits, gathered, scalars
from .arguments import SPARSE_PREFILL, out_dtype
from .operation import Operation, Output, Valid, Views, naming
from .scalars import INT_LIMIT
from .wording import kind, show

FUNCTION = SPARSE_PREFILL.function
WIDTHS = (576, 512)  # d_qk: with the rotary columns beside V's, or among them


def outputs(
    named: dict[str, Any], options: tuple[Any, ...], num_sms: int = NUM_SMS_CPU
) -> tuple[Output, ...]:
    q = named["q"]
    s_q, h_q, _ = q.shape
    dtype = out_dtype(str(q.dtype).removeprefix("torch."))
    row = Output((s_q, h_q), "float32")
    return Output((s_q, h_q, HEAD_DIM_V), dtype), row, row


def _checked(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> Valid:
    scale = scale_and_width(*options)
    framework, infos, sizes = fits.described(SPARSE_PREFILL, arrays)
    q, kv, indices = infos["q"], infos["kv"], infos["indices"]
    if q.dtype != kv.dtype:
        remedy = "Convert q to the dtype of kv."
        raise DTypeError("q", f"{kv.dtype}, the dtype of kv", show(q), remedy)
    if sizes["d_qk"] not in WIDTHS:
        remedy = "Concatenate the latent part and the rotary part."
        raise ShapeError("q", "a last axis of 576 or 512 columns", show(q), remedy)
    lists(indices)
    requests(q)
    fits_int32("kv", kv)
    expected = outputs(infos, options)
    fits.outputs(SPARSE_PREFILL, infos, expected)
    return Valid(framework, infos, (scale,), expected)


def scale_and_width(sm_scale: Any, d_v: Any) -> float:
    """The two numbers of a call; the scale."""
    if scalars.integer("d_v", d_v, FUNCTION) != HEAD_DIM_V:
        remedy = "V is the first 512 columns of kv."
        raise OptionError("d_v", f"{HEAD_DIM_V}", f"{d_v}", remedy)
    if sm_scale is None:
        remedy = "Pass the scale of the scores, such as q.shape[-1] ** -0.5."
        raise ArgTypeError("sm_scale", "a real number", kind(sm_scale), remedy)
    return scalars.softmax_scale(sm_scale, name="sm_scale")


def lists(indices: ArrayInfo) -> None:
    if indices.shape[2] < 1:
        remedy = "Pass -1 where there is no token."
        raise ShapeError("indices", "lists of at least one entry", show(indices), remedy)


def requests(q: ArrayInfo) -> None:
    """Query tokens are requests of the split, and the numbers of rows fit int32."""
    fits.requests("q", q, q.shape[0])
    fits_int32("q", q)


def fits_int32(name: str, info: ArrayInfo) -> None:
    rows = info.shape[0] * info.shape[1]
    if rows > INT_LIMIT:
        expected = f"at most {INT_LIMIT} rows, so that their numbers fit int32"
        raise ShapeError(name, expected, show(info), "Split the prompt.")


def compute(valid: Valid, views: Views) -> DeviceCheckError | None:
    """The first of the options is the scale; keys side by side have no descales."""
    named: dict[str, Any] = dict(views)
    return reference_sparse.prefill(
        named["q"],
        named["kv"],
        named["indices"],
        valid.options[0],
        attn_sink=named["attn_sink"],
        topk_length=named["topk_length"],
        descale_q=named.get("descale_q"),
        descale_k=named.get("descale_k"),
        out=named["out"],
        max_logits=named["max_logits"],
        lse=named["lse"],
    ).violation


def refused(valid: Valid, views: Views) -> DeviceCheckError | None:
    topk = valid.infos["indices"].shape[2]
    token = reference_sparse.bad_length(topk, views["topk_length"])
    reason = "topk_length"
    return DeviceCheckError(token, -1, reason, False, FUNCTION) if token >= 0 else None


def _on_gpu(valid: Valid) -> gathered.Work:
    kv = valid.infos["kv"]  # as a pool of pages of one token
    token = kv.strides[0] if kv.shape[0] > 1 else kv.shape[2]
    cache = kv._replace(shape=(kv.shape[0], 1, 1, kv.shape[2]), strides=(token, token, token, 1))
    return work_over(cache, valid)


def work_over(cache: ArrayInfo, valid: Valid, **of: Any) -> gathered.Work:
    """What a GPU does for a call with its keys in this cache; `of`: more of the geometry."""
    q, indices = (valid.infos[name] for name in ("q", "indices"))
    s_q, h_q, _ = q.shape
    row, head, column = q.strides  # a query token is a request
    of_requests = q._replace(shape=(s_q, 1, *q.shape[1:]), strides=(row, head * h_q, head, column))
    geometry = gathered.geometry_of(
        cache,
        of_requests,
        table_stride=indices.strides[0] if s_q > 1 else indices.shape[2],
        columns=indices.shape[2],
        parts=num_sm_parts(gathered.num_sms_of(q.device), h_q, 1),
        topk=indices.shape[2],
        outside_is_none=True,
        **of,
    )
    options, names = (valid.options[0], False), ("kv", "indices")
    return gathered.GpuWork(valid.framework, geometry, q.device, options, names)


PREFILL = Operation(
    name="sparse_prefill",
    table=SPARSE_PREFILL,
    outputs=outputs,
    validate=naming(FUNCTION, _checked),
    refused=refused,
    compute=compute,
    on_gpu=_on_gpu,
)
