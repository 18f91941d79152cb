"""get_mla_metadata() with topk: the split of query tokens that are requests of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import ArgTypeError, DeviceCheckError, ScalarError
from ..schedule import split
from ..schedule.lists import list_lengths, longest
from ..sizes import METADATA_COLUMNS, NUM_SMS_CPU, num_sm_parts
from . import fits, gathered, scalars
from .arguments import SPARSE_METADATA
from .operation import Operation, Output, Valid, Views, naming
from .scalars import INT_LIMIT

FUNCTION = SPARSE_METADATA.function
Sizes = tuple[int, int, int, int, int]


def _outputs(
    named: dict[str, Any], options: tuple[Any, ...], num_sms: int = NUM_SMS_CPU
) -> tuple[Output, ...]:
    rows, _, h_q, _, _ = options
    batch, s_q = named["cache_seqlens"].shape[0], rows // h_q
    parts = num_sm_parts(num_sms, h_q, 1)
    return Output((parts, METADATA_COLUMNS), "int32"), Output((batch * s_q + 1,), "int32")


def _checked(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> Valid:
    rows, _, h_q, topk, extra_topk = checked = sizes(options)
    if rows % h_q:
        remedy = "Pass s_q * num_heads_q."
        expected = f"a multiple of num_heads_q = {h_q}"
        raise ScalarError("num_q_tokens_per_head_k", expected, f"{rows}", remedy, FUNCTION)
    if longest(topk, extra_topk) > INT_LIMIT:
        expected = f"with topk = {topk} at most {INT_LIMIT} tokens in both lists, as int32 holds"
        remedy = "Pass the width of extra_indices_in_kvcache."
        raise ScalarError("extra_topk", expected, f"{extra_topk}", remedy, FUNCTION)
    framework, infos, lengths = fits.described(SPARSE_METADATA, arrays)
    s_q = rows // h_q
    fits.same_s_q(infos, s_q)
    fits.requests("cache_seqlens", infos["cache_seqlens"], lengths["batch"] * s_q)
    if "extra_topk_length" in infos and not extra_topk:
        remedy = "Pass the width of extra_indices_in_kvcache."
        raise ScalarError("extra_topk", "at least 1, with extra_topk_length", "0", remedy)
    num_sms = gathered.num_sms_of(infos["cache_seqlens"].device)
    return Valid(framework, infos, checked, _outputs(infos, checked, num_sms))


def sizes(options: tuple[Any, ...], of_shapes: Callable[..., int] = scalars.integer) -> Sizes:
    """The five numbers, checked; those that may follow from shapes, by that function."""
    rows, h_kv, h_q, topk, extra_topk = options
    integer = scalars.integer
    rows = of_shapes("num_q_tokens_per_head_k", rows, FUNCTION, least=1)
    if integer("num_heads_k", h_kv, FUNCTION) != 1:
        remedy = "Lists of tokens go with one kv head, that of MLA."
        raise ScalarError("num_heads_k", "1 with topk", f"{h_kv}", remedy, FUNCTION)
    if h_q is None:
        remedy = "Pass the query heads: rows / num_heads_q is s_q, and each query token has a list."
        raise ArgTypeError("num_heads_q", "an integer with topk", "None", remedy, FUNCTION)
    h_q = integer("num_heads_q", h_q, FUNCTION, least=1)
    topk = of_shapes("topk", topk, FUNCTION, least=1)
    return rows, 1, h_q, topk, of_shapes("extra_topk", extra_topk, FUNCTION)


def _compute(valid: Valid, views: Views) -> DeviceCheckError | None:
    rows, _, h_q, topk, extra_topk = valid.options
    named: dict[str, Any] = dict(views)
    batch, s_q = len(named["cache_seqlens"]), rows // h_q
    length, extra = named["topk_length"], named["extra_topk_length"]
    lengths = list_lengths(batch, s_q, topk, length, extra_topk, extra)
    parts = num_sm_parts(NUM_SMS_CPU, h_q, 1)
    made = split.plan(lengths, parts, h_q, 1, gathered=True)
    named["tile_scheduler_metadata"][...], named["num_splits"][...] = made
    return None


def _refused(valid: Valid, views: Views) -> DeviceCheckError | None:
    """Nothing: decoding refuses the same lengths."""
    return None


def _on_gpu(valid: Valid) -> gathered.Work:
    rows, _, h_q, topk, extra_topk = valid.options
    infos = valid.infos
    batch, s_q = infos["cache_seqlens"].shape[0], rows // h_q
    given = [infos[name] for name in ("topk_length", "extra_topk_length") if name in infos]
    per_token = any(len(info.shape) == 2 for info in given)
    sizes = batch * s_q, 1 if per_token else s_q, topk, extra_topk
    device = infos["cache_seqlens"].device
    return gathered.ListMetadataWork(valid.framework, device, sizes, h_q)


METADATA = Operation(
    name="sparse_metadata",
    table=SPARSE_METADATA,
    outputs=_outputs,
    validate=naming(FUNCTION, _checked),
    refused=_refused,
    compute=_compute,
    on_gpu=_on_gpu,
)
