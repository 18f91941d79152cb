"""The calls on JAX arrays: eager, and inside jit, scan, vmap, shard_map and eval_shape.

One traced op is one `buffer_callback`: XLA allocates operands, results and scratch, and calls back
with their addresses and with the stream to launch on (`jax_callbacks`). The callback only queues
kernels, so XLA can capture it in a CUDA graph (a command buffer) and replay it without Python. What
capture forbids, compiling and loading modules, happens at trace time: this file. So do all checks,
with the argument's name in the message.

vmap over requests becomes a larger batch, in one launch with a schedule of its own. JAX knows
nothing of what the callback does, so a call on sharded arrays belongs inside jax.shard_map.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from ..bounded import Bounded
from ..calls import refusals
from ..calls.arguments import DECODE, METADATA
from ..calls.decode import validate
from ..calls.metadata import validate as validate_metadata
from ..calls.wording import kind
from ..errors import DeviceMismatchError, OptionError
from ..frameworks import framework
from ..gpu.engine import engine_of
from ..gpu.geometry import Geometry
from ..schedule.sched_meta import SchedMeta
from ..sizes import HEAD_DIM_V, METADATA_COLUMNS, NUM_SMS_CPU, num_sm_parts
from .jax_callbacks import Config, decode_callback, metadata_callback

jax: Any = importlib.import_module("jax")
jnp: Any = importlib.import_module("jax.numpy")
batching: Any = importlib.import_module("jax.custom_batching")
buffers: Any = importlib.import_module("jax.experimental.buffer_callback")

MAX_CALLS = 1024


class _Call(NamedTuple):
    """A signature that passed the checks."""

    run: Callable[..., tuple[Any, Any]]
    operands: tuple[int, ...]  # positions of the arrays that it takes
    is_empty: bool
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    dtype: str


_calls: Bounded[Any, _Call] = Bounded(MAX_CALLS)


def decode(
    arrays: tuple[Any, ...], options: tuple[Any, ...], lazy: SchedMeta | None
) -> tuple[Any, Any]:
    """flash_mla_with_kvcache() of JAX arrays or tracers. A SchedMeta is not bound: a tracer must
    not outlive its trace, so each such call makes its own schedule."""
    on_gpu = placed(DECODE.named(arrays), DECODE.function)
    signature = _signature(arrays, options, on_gpu)
    call = _calls.get(signature)
    if call is None:
        call = _checked(arrays, options, on_gpu)
        if signature is not None:
            _calls[signature] = call
    if not isinstance(arrays[0], jax.core.Tracer):
        refusals.raise_pending()
    if call.is_empty:  # a callback that launches nothing would make an empty graph
        return jnp.zeros(call.out_shape, call.dtype), jnp.full(call.lse_shape, jnp.inf)
    return call.run(*[arrays[i] for i in call.operands])


def metadata(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Any, Any]:
    """get_mla_metadata(): int32 [num_sm_parts, 8] and [batch + 1]."""
    _, lengths, rows, h_kv = validate_metadata(arrays, options)
    on_gpu = placed({"cache_seqlens": arrays[0]}, METADATA.function)
    parts = num_sm_parts(_num_sms(on_gpu), rows, h_kv)
    if lengths.shape[0] == 0:
        return jnp.zeros((parts, METADATA_COLUMNS), jnp.int32), jnp.zeros(1, jnp.int32)
    return _metadata_op(parts, rows, h_kv)(arrays[0])


# --- trace time --------------------------------------------------------------------------------


def _signature(arrays: tuple[Any, ...], options: tuple[Any, ...], on_gpu: bool) -> Any:
    """What the checks look at; None where something is no JAX array, or an unusual option."""
    if tuple(map(type, options)) not in DECODE.usual_types:
        return None
    describe = framework("jax").describe
    try:
        return *[None if x is None else describe(x) for x in arrays], options, on_gpu
    except Exception:  # the checks will say what it is
        return None


def _checked(arrays: tuple[Any, ...], options: tuple[Any, ...], on_gpu: bool) -> _Call:
    """Every check, on shapes and dtypes alone."""
    named = DECODE.named(arrays)
    for name in (array.name for array in DECODE.having("output")):
        if named[name] is not None:
            raise OptionError(
                name,
                "None, since JAX arrays cannot be written",
                kind(named[name]),
                f"Leave {name} out; inside jax.jit XLA reuses the memory of donated arguments.",
            )
    valid = validate(arrays, options)
    operands = [i for i, x in enumerate(arrays) if x is not None]
    with_metadata = "tile_scheduler_metadata" in valid.infos
    if with_metadata:
        valid.require_metadata(valid.parts(_num_sms(on_gpu)))
    names = tuple(DECODE.names[i] for i in operands)
    config = Config(
        valid.softmax_scale, valid.causal and valid.infos["q"].shape[1] > 1, on_gpu, names
    )
    return _Call(
        _decode_op(config),
        tuple(operands),
        0 in valid.out_shape,
        valid.out_shape,
        valid.lse_shape,
        valid.infos["q"].dtype,
    )


def gpus() -> list[int]:
    """The CUDA ordinals of JAX's GPUs in this process."""
    return [device.local_hardware_id for device in jax.local_devices(backend="gpu")]


def _num_sms(on_gpu: bool) -> int:
    """Multiprocessors of a device. Makes the engines of all, whichever will run the call."""
    if not on_gpu:
        return NUM_SMS_CPU
    num_sms = [engine_of(ordinal).num_sms for ordinal in gpus()]
    return num_sms[0]


def placed(arrays: dict[str, Any], function: str) -> bool:
    """Whether the call will run on a GPU, as far as can be known while tracing. Raises
    DeviceMismatchError for arrays of two devices, and for one that is sharded over several."""
    first: tuple[str, Any] | None = None
    on_gpu: bool | None = None
    for name, array in arrays.items():
        if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
            continue
        devices = array.sharding.device_set
        if len(devices) > 1 and not array.is_fully_replicated:
            raise DeviceMismatchError(
                name,
                "an array on one device",
                f"one that is sharded over {len(devices)} devices",
                "Call it inside jax.shard_map, where each device decodes its own shard.",
                function,
            )
        on_gpu = bool(on_gpu) or next(iter(devices)).platform == "gpu"
        if not getattr(array, "committed", True):
            continue
        if first is None:
            first = name, devices
        elif devices != first[1]:
            raise DeviceMismatchError(
                name,
                f"an array on {_show(first[1])}, where {first[0]} is",
                f"one on {_show(devices)}",
                f"Move {name} with jax.device_put; a call takes arrays of one device.",
                function,
            )
    return jax.default_backend() == "gpu" if on_gpu is None else on_gpu


def _show(devices: Any) -> str:
    return ", ".join(sorted(map(str, devices)))


# --- the ops -----------------------------------------------------------------------------------


@functools.cache
def _decode_op(config: Config) -> Callable[..., tuple[Any, Any]]:
    """(the arrays of config.operands) -> (out, lse)."""

    def flashmla_decode(*operands: Any) -> Any:  # what profiles and HLO dumps show
        return one_batch(*operands)

    def fold(n: int, mapped: Any, *operands: Any) -> Any:
        # The mapped axis joins the batch. The metadata of each single batch is of no use then.
        batch, names, each = [], [], 0  # requests of each call that is mapped
        for name, x, is_mapped in zip(config.operands, operands, mapped, strict=True):
            if DECODE[name].role == "schedule":
                continue
            if DECODE[name].is_batched:
                x = x if is_mapped else jnp.broadcast_to(x, (n, *x.shape))
                each = x.shape[1]
                x = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
            elif is_mapped:
                raise OptionError(
                    name,
                    "one pool that all mapped requests share",
                    "one that jax.vmap maps over",
                    f"Pass in_axes=None for {name}: map q, block_table and cache_seqlens, and keep"
                    " the pages of all requests in one pool.",
                )
            batch.append(x)
            names.append(name)
        if n:
            out, lse = _decode_op(config._replace(operands=tuple(names)))(*batch)
        else:
            _, s_q, h_q, _ = batch[0].shape
            out = jnp.zeros((0, s_q, h_q, HEAD_DIM_V), batch[0].dtype)
            lse = jnp.zeros((0, h_q, s_q))
        results = out.reshape(n, each, *out.shape[1:]), lse.reshape(n, each, *lse.shape[1:])
        return results, (True, True)

    def no_gradient(primals: Any, tangents: Any) -> Any:
        raise OptionError(
            "q",
            "arrays that are not differentiated, since decoding has no backward pass",
            "a call inside jax.grad, jax.jvp or jax.vjp",
            "Put jax.lax.stop_gradient around q and k_cache.",
        )

    foldable = batching.custom_vmap(functools.partial(_call_back, config))
    foldable.def_vmap(fold)
    one_batch = jax.custom_jvp(foldable)
    one_batch.defjvp(no_gradient)
    op: Callable[..., tuple[Any, Any]] = jax.jit(flashmla_decode)
    return op


def _call_back(config: Config, *operands: Any) -> tuple[Any, Any]:
    """The custom call: the results, and as further outputs what the kernels need besides."""
    describe = framework("jax").describe
    infos = dict(zip(config.operands, map(describe, operands), strict=True))
    (batch, s_q, h_q, _), h_kv = infos["q"].shape, infos["k_cache"].shape[2]
    parts = num_sm_parts(_num_sms(config.on_gpu), max(1, s_q * h_q // h_kv), h_kv)
    geometry = Geometry.of(infos["q"], infos["k_cache"], infos["block_table"], parts)
    callback = decode_callback(config, geometry)
    # Compiled and loaded on every GPU that may run the call, since capture allows neither.
    floats = callback.prepare(gpus()) if config.on_gpu else 0
    results = [
        jax.ShapeDtypeStruct((batch, s_q, h_q, HEAD_DIM_V), infos["q"].dtype),
        jax.ShapeDtypeStruct((batch, h_q, s_q), jnp.float32),
        jax.ShapeDtypeStruct((max(1, floats),), jnp.float32),
    ]
    if not config.has_metadata:
        results += _metadata_shapes(batch, parts)
    call = buffers.buffer_callback(callback, tuple(results), command_buffer_compatible=True)
    out, lse, *_ = call(*operands)
    return out, lse


def _metadata_shapes(batch: int, parts: int) -> list[Any]:
    return [
        jax.ShapeDtypeStruct((parts, METADATA_COLUMNS), jnp.int32),
        jax.ShapeDtypeStruct((batch + 1,), jnp.int32),
    ]


@functools.cache
def _metadata_op(parts: int, rows: int, h_kv: int) -> Callable[[Any], tuple[Any, Any]]:
    """cache_seqlens -> (metadata, num_splits). Under vmap one schedule a mapped batch, which a
    decode that is folded does without, so that XLA drops it."""

    def flashmla_metadata(cache_seqlens: Any) -> Any:
        shapes = tuple(_metadata_shapes(cache_seqlens.shape[0], parts))
        callback = metadata_callback(parts, rows, h_kv)
        call = buffers.buffer_callback(callback, shapes, command_buffer_compatible=True)
        return call(cache_seqlens)

    op: Callable[[Any], tuple[Any, Any]] = jax.jit(batching.sequential_vmap(flashmla_metadata))
    return op
