"""The calls under torch.compile, torch.export and fake tensors: ops, each one node to a compiler.

Eager calls do not come this way, since the dispatcher takes longer than the launch. What the ops
run is the eager call, so the results are its results, bit for bit. The ops are registered when this
file is imported, at the first traced call or by `register_torch_ops()`:

    flashmla_cupy::metadata     cache_seqlens -> (tile_scheduler_metadata, num_splits)
    flashmla_cupy::decode       returns new out and lse
    flashmla_cupy::decode_out   writes into the caller's
    flashmla_cupy::append       writes rows into k_cache (torch_append)

Their arguments follow from `arguments`. Shapes and lengths may be dynamic. There is no backward: it
raises.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from ..calls import checks, scalars
from ..calls.arguments import DECODE, METADATA
from ..calls.decode import eager as eager_decode
from ..calls.decode import validate
from ..calls.metadata import eager as eager_metadata
from ..calls.metadata import sizes
from ..calls.metadata import validate as validate_metadata
from ..errors import ShapeError
from ..frameworks.torch_tensors import needs_gradient
from ..schedule.sched_meta import SchedMeta
from ..sizes import HEAD_DIM, HEAD_DIM_V, METADATA_COLUMNS, NUM_SMS_CPU, num_sm_parts
from . import torch_checks

torch: Any = importlib.import_module("torch")

_library: Any = torch.library.Library("flashmla_cupy", "DEF")  # the ops live as long as it does
# Strides are part of the contract: a compiler that copied the cache to change them would cost more
# than the call.
TAGS = tuple(
    getattr(torch.Tag, name)
    for name in ("needs_exact_strides", "pt2_compliant_tag")
    if hasattr(torch.Tag, name)
)
# Positions among the arrays of the call. Compilers trace what uses them, so they are made here.
_POSITIONS = {name: i for i, name in enumerate(DECODE.names)}
_TENSORS = tuple(_POSITIONS[array.name] for array in DECODE.having("input", "schedule"))
_OPTIONAL = tuple(_POSITIONS[array.name] for array in DECODE.having("optional"))
_AXES, _METADATA_AXES = torch_checks.axes_of(DECODE), torch_checks.axes_of(METADATA)
_METADATA, _SPLITS = _POSITIONS["tile_scheduler_metadata"], _POSITIONS["num_splits"]
_OUT, _LSE = DECODE.outputs
_NONE = (None,) * len(DECODE.arrays)


# --- what the compiler traces ------------------------------------------------------------------


def metadata(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Any, Any]:
    """get_mla_metadata() as an op."""
    torch_checks.tensors(METADATA.function, _METADATA_AXES, arrays)
    rows, h_kv = sizes(options, torch_checks.integer)
    torch_checks.facts(METADATA, arrays, lambda known: validate_metadata(known, (1, 1, None)))
    made: tuple[Any, Any] = torch.ops.flashmla_cupy.metadata(arrays[0], rows, h_kv)
    return made


def decode(
    arrays: tuple[Any, ...], options: tuple[Any, ...], lazy: SchedMeta | None
) -> tuple[Any, Any]:
    """flash_mla_with_kvcache() as an op. The first layer that uses a SchedMeta makes it, for the
    others too; it stays unbound, so that an eager call would make it again."""
    head_dim_v, softmax_scale, causal, is_lazy = options
    scalars.head_dim_v(head_dim_v)
    scale = scalars.softmax_scale(softmax_scale)
    scalars.causal(causal)
    tensors = [*arrays, *_NONE[len(arrays) :]]
    checks.metadata_kind(tensors[_METADATA], tensors[_SPLITS], is_lazy)
    torch_checks.tensors(DECODE.function, _AXES, tensors)
    known = torch_checks.facts(DECODE, tensors, lambda known: validate(known, options))
    if known is not None and not is_lazy:
        num_sms = torch_checks.num_sms_of(tensors[0])
        if num_sms:
            known.require_metadata(known.parts(num_sms))
    q, k_cache = tensors[0], tensors[1]
    if lazy is not None:
        h_kv = k_cache.shape[2] or 1  # none is refused when the op runs
        rows, lengths = q.shape[1] * q.shape[2] // h_kv, tensors[3]
        tensors[_METADATA], tensors[_SPLITS] = schedule_of(
            lazy, q, lambda: torch.ops.flashmla_cupy.metadata(lengths, rows, h_kv)
        )
    inputs = *[tensors[i] for i in _TENSORS], scale, causal, *[tensors[i] for i in _OPTIONAL]
    out, lse = tensors[_OUT], tensors[_LSE]
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


def schedule_of(lazy: SchedMeta, q: Any, make: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """The metadata of a SchedMeta in the trace that meets q: made by the first layer of the trace
    that uses it. Fake tensors mean nothing in another trace, nor to an eager call."""
    if torch.compiler.is_dynamo_compiling():
        if lazy.tile_scheduler_metadata is None:
            lazy.tile_scheduler_metadata, lazy.num_splits = make()
        return lazy.tile_scheduler_metadata, lazy.num_splits
    mode = getattr(q, "fake_mode", None)
    if mode is None or lazy.of_trace[0] is not mode:
        lazy.of_trace = mode, *make()
    _, metadata, num_splits = lazy.of_trace
    return metadata, num_splits


# --- what the ops do ---------------------------------------------------------------------------


def _metadata(cache_seqlens: Any, rows: int, h_kv: int) -> tuple[Any, Any]:
    return eager_metadata((cache_seqlens,), (rows or 1, h_kv, None))  # no rows of an empty q


def _decode(*inputs: Any) -> tuple[Any, Any]:
    """Inputs in the order of the schema, with or without the outputs."""
    arrays: list[Any] = [None] * len(DECODE.arrays)
    rest = list(inputs)
    for i in _TENSORS:
        arrays[i] = rest.pop(0)
    scale, causal = rest.pop(0), rest.pop(0)
    for i in (*_OPTIONAL, *DECODE.outputs):
        arrays[i] = rest.pop(0) if rest else None
    return eager_decode(tuple(arrays), (HEAD_DIM_V, scale, causal, False), is_op=True)


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


def _fake_decode(q: Any, k_cache: Any, *inputs: Any) -> tuple[Any, Any]:
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


def refuse_gradients(name: str, inputs: tuple[Any, ...]) -> None:
    """For ops that write into an argument: autograd does not come to them, as PyTorch takes no
    backward formula for such, and whoever asked for a gradient would not learn that there is
    none."""
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise needs_gradient(name)


def _fake_decode_out(*inputs: Any) -> None:
    refuse_gradients("q", inputs)


def _no_backward(ctx: Any, *gradients: Any) -> Any:
    raise needs_gradient("q")


def _register() -> None:
    arguments = METADATA.schema(with_outputs=False)
    _library.define(f"metadata({arguments}) -> (Tensor, Tensor)", tags=TAGS)
    arguments = DECODE.schema(with_outputs=False)
    _library.define(f"decode({arguments}) -> (Tensor, Tensor)", tags=TAGS)
    arguments = DECODE.schema(with_outputs=True)
    _library.define(f"decode_out({arguments}) -> ()", tags=TAGS)
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
