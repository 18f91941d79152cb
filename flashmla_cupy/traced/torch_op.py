"""The calls under torch.compile and torch.export: ops that the compiler sees as one node each.

Eager calls do not come this way, since the dispatcher takes longer than the launch. What the ops
run is the eager call, so the results are its results, bit for bit. The ops are registered when a
compiler first traces a call:

    flashmla_cupy::metadata     cache_seqlens -> (tile_scheduler_metadata, num_splits)
    flashmla_cupy::decode       returns new out and lse
    flashmla_cupy::decode_out   writes into the caller's

Shapes and lengths may be dynamic. There is no backward: it raises.
"""

from __future__ import annotations

import importlib
from typing import Any

from .. import interface
from ..errors import ShapeError
from ..frameworks.torch_tensors import needs_gradient
from ..schedule.sched_meta import SchedMeta
from ..sizes import HEAD_DIM, HEAD_DIM_V, METADATA_COLUMNS, NUM_SMS_CPU, num_sm_parts

torch: Any = importlib.import_module("torch")

_INPUTS = (
    "Tensor q, Tensor k_cache, Tensor block_table, Tensor cache_seqlens,"
    " Tensor tile_scheduler_metadata, Tensor num_splits, float softmax_scale, bool causal"
)
_library: Any = torch.library.Library("flashmla_cupy", "DEF")  # the ops live as long as it does
# Strides are part of the contract: a compiler that copied the cache to change them would cost more
# than the call.
_TAGS = tuple(
    getattr(torch.Tag, name)
    for name in ("needs_exact_strides", "pt2_compliant_tag")
    if hasattr(torch.Tag, name)
)


# --- what the compiler traces ------------------------------------------------------------------


def traced_metadata(cache_seqlens: Any, rows: int, h_kv: int) -> tuple[Any, Any]:
    """get_mla_metadata() with arguments, as an op."""
    made: tuple[Any, Any] = torch.ops.flashmla_cupy.metadata(cache_seqlens, rows, h_kv)
    return made


def traced_decode(
    q: Any,
    k_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    head_dim_v: int,
    tile_scheduler_metadata: Any,
    num_splits: Any,
    softmax_scale: float | None,
    causal: bool,
    out: Any,
    lse: Any,
) -> tuple[Any, Any]:
    """flash_mla_with_kvcache() as an op. The first layer that uses a SchedMeta makes it, for the
    others too; it stays unbound, so that an eager call would make it again."""
    if head_dim_v != HEAD_DIM_V:
        remedy = f"V is the first {HEAD_DIM_V} columns of k_cache; pass {HEAD_DIM_V}."
        raise ShapeError("head_dim_v", f"{HEAD_DIM_V}", f"{head_dim_v}", remedy)
    if type(tile_scheduler_metadata) is SchedMeta:
        lazy = tile_scheduler_metadata
        if lazy.tile_scheduler_metadata is None:
            h_kv = k_cache.shape[2]
            rows = q.shape[1] * q.shape[2] // h_kv
            made = torch.ops.flashmla_cupy.metadata(cache_seqlens, rows, h_kv)
            lazy.tile_scheduler_metadata, lazy.num_splits = made
        tile_scheduler_metadata, num_splits = lazy.tile_scheduler_metadata, lazy.num_splits
    scale = HEAD_DIM**-0.5 if softmax_scale is None else softmax_scale
    inputs = (
        q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits, scale, causal
    )  # fmt: skip
    if out is None and lse is None:
        results: tuple[Any, Any] = torch.ops.flashmla_cupy.decode(*inputs)
        return results
    batch, s_q, h_q, _ = q.shape
    if out is None:
        out = q.new_empty((batch, s_q, h_q, HEAD_DIM_V))
    if lse is None:
        lse = q.new_empty((batch, h_q, s_q), dtype=torch.float32)
    torch.ops.flashmla_cupy.decode_out(*inputs, out, lse)
    return out, lse


# --- what the ops do ---------------------------------------------------------------------------


def _metadata(cache_seqlens: Any, rows: int, h_kv: int) -> tuple[Any, Any]:
    return interface.get_mla_metadata(cache_seqlens, rows, h_kv)


def _decode(
    q: Any,
    k_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    metadata: Any,
    num_splits: Any,
    scale: float,
    causal: bool,
    out: Any = None,
    lse: Any = None,
) -> tuple[Any, Any]:
    return interface.flash_mla_with_kvcache(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        HEAD_DIM_V,
        metadata,
        num_splits,
        scale,
        causal,
        out=out,
        lse=lse,
    )


def _decode_out(*inputs: Any) -> None:
    _decode(*inputs)


# --- what the compiler knows of them -----------------------------------------------------------


def _fake_metadata(cache_seqlens: Any, rows: int, h_kv: int) -> tuple[Any, Any]:
    torch._check(cache_seqlens.dim() == 1)
    device = cache_seqlens.device
    num_sms = NUM_SMS_CPU
    if device.type == "cuda":
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    parts = num_sm_parts(num_sms, max(1, rows), h_kv)
    return (
        cache_seqlens.new_empty((parts, METADATA_COLUMNS), dtype=torch.int32),
        cache_seqlens.new_empty((cache_seqlens.shape[0] + 1,), dtype=torch.int32),
    )


def _fake_decode(
    q: Any,
    k_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    metadata: Any,
    num_splits: Any,
    scale: float,
    causal: bool,
) -> tuple[Any, Any]:
    for name, x in (("q", q), ("k_cache", k_cache)):
        if x.dim() != 4 or x.shape[3] != HEAD_DIM:
            expected = f"four axes, the last of {HEAD_DIM}"
            remedy = "See flash_mla_with_kvcache() for the shapes."
            raise ShapeError(name, expected, f"{tuple(x.shape)}", remedy)
    batch, s_q, h_q, _ = q.shape
    return (
        q.new_empty((batch, s_q, h_q, HEAD_DIM_V)),
        q.new_empty((batch, h_q, s_q), dtype=torch.float32),
    )


def _fake_decode_out(*inputs: Any) -> None:
    return None


def _no_backward(ctx: Any, *gradients: Any) -> Any:
    raise needs_gradient("q")


def _register() -> None:
    _library.define(
        "metadata(Tensor cache_seqlens, SymInt rows, int h_kv) -> (Tensor, Tensor)", tags=_TAGS
    )
    _library.define(f"decode({_INPUTS}) -> (Tensor, Tensor)", tags=_TAGS)
    _library.define(f"decode_out({_INPUTS}, Tensor(a!) out, Tensor(b!) lse) -> ()", tags=_TAGS)
    implementations: dict[str, tuple[Any, Any]] = {
        "metadata": (_metadata, _fake_metadata),
        "decode": (_decode, _fake_decode),
        "decode_out": (_decode_out, _fake_decode_out),
    }
    for name, (real, fake) in implementations.items():
        for device in ("CUDA", "CPU"):
            _library.impl(name, real, device)
        torch.library.register_fake(f"flashmla_cupy::{name}", fake, lib=_library)
    torch.library.register_autograd("flashmla_cupy::decode", _no_backward, lib=_library)


_register()
