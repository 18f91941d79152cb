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

from .. import interface
from ..bounded import Bounded
from ..calls import checks, layouts
from ..calls import decode as plans
from ..errors import DeviceMismatchError, OptionError
from ..frameworks import ArrayInfo, framework
from ..gpu.geometry import Geometry
from ..schedule.sched_meta import SchedMeta
from ..sizes import HEAD_DIM_V, METADATA_COLUMNS, NUM_SMS_CPU, num_sm_parts
from .jax_callbacks import Config, decode_callback, engine_of, launch_of, metadata_callback

jax: Any = importlib.import_module("jax")
jnp: Any = importlib.import_module("jax.numpy")
batching: Any = importlib.import_module("jax.custom_batching")
buffers: Any = importlib.import_module("jax.experimental.buffer_callback")

MAX_CALLS = 1024


class _Call(NamedTuple):
    """A signature that passed the checks."""

    run: Callable[..., tuple[Any, Any]]
    is_empty: bool
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    dtype: str


_calls: Bounded[Any, _Call] = Bounded(MAX_CALLS)


def decode(
    arrays: plans.Arrays, options: plans.Options, lazy: SchedMeta | None, key: Any
) -> tuple[Any, Any]:
    """flash_mla_with_kvcache() of JAX arrays or tracers. A SchedMeta is not bound: a tracer must
    not outlive its trace, so each such call makes its own schedule."""
    on_gpu = _placed({k: v for k, v in arrays._asdict().items() if v is not None}, layouts.DECODE)
    signature = None if key is None else (key, on_gpu)
    call = _calls.get(signature)
    if call is None:
        call = _checked(arrays, options, on_gpu)
        if signature is not None:
            _calls[signature] = call
    if not isinstance(arrays.q, jax.core.Tracer):
        interface.raise_pending()
    if call.is_empty:  # a callback that launches nothing would make an empty graph
        return jnp.zeros(call.out_shape, call.dtype), jnp.full(call.lse_shape, jnp.inf)
    operands = arrays[:4] if lazy is not None else arrays[:6]
    return call.run(*operands)


def metadata(cache_seqlens: Any, rows: int, h_kv: int) -> tuple[Any, Any]:
    """get_mla_metadata() of checked lengths: int32 [num_sm_parts, 8] and [batch + 1]."""
    on_gpu = _placed({"cache_seqlens": cache_seqlens}, interface.METADATA)
    rows = max(1, rows)
    parts = num_sm_parts(_num_sms(on_gpu), rows, h_kv)
    if cache_seqlens.shape[0] == 0:
        return jnp.zeros((parts, METADATA_COLUMNS), jnp.int32), jnp.zeros(1, jnp.int32)
    return _metadata_op(parts, rows, h_kv)(cache_seqlens)


# --- trace time --------------------------------------------------------------------------------


def _checked(arrays: plans.Arrays, options: plans.Options, on_gpu: bool) -> _Call:
    """Every check, on shapes and dtypes alone."""
    for name in ("out", "lse"):
        if getattr(arrays, name) is not None:
            raise OptionError(
                name,
                "None, since JAX arrays cannot be written",
                layouts.kind(getattr(arrays, name)),
                f"Leave {name} out; inside jax.jit XLA reuses the memory of donated arguments.",
            )
    valid = plans.validate(arrays, options)
    infos = valid.infos
    q = infos["q"]
    parts = _parts(q, infos["k_cache"], on_gpu)
    if not options.is_lazy:
        checks.metadata(infos["tile_scheduler_metadata"], infos["num_splits"], q.shape[0], parts)
    config = Config(
        valid.softmax_scale, valid.causal and q.shape[1] > 1, on_gpu, not options.is_lazy
    )
    is_empty = 0 in valid.out_shape
    return _Call(_decode_op(config), is_empty, valid.out_shape, valid.lse_shape, q.dtype)


def _parts(q: ArrayInfo, k_cache: ArrayInfo, on_gpu: bool) -> int:
    _, s_q, h_q, _ = q.shape
    h_kv = k_cache.shape[2]
    return num_sm_parts(_num_sms(on_gpu), max(1, s_q * h_q // h_kv), h_kv)


def _gpus() -> list[int]:
    """The CUDA ordinals of JAX's GPUs in this process."""
    return [device.local_hardware_id for device in jax.local_devices(backend="gpu")]


def _num_sms(on_gpu: bool) -> int:
    """Multiprocessors of a device. Makes the engines of all, whichever will run the call."""
    if not on_gpu:
        return NUM_SMS_CPU
    num_sms = [engine_of(ordinal).num_sms for ordinal in _gpus()]
    return num_sms[0]


def _placed(arrays: dict[str, Any], function: str) -> bool:
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
    """(q, k_cache, block_table, cache_seqlens[, metadata, num_splits]) -> (out, lse)."""

    def flashmla_decode(*operands: Any) -> Any:  # what profiles and HLO dumps show
        return one_batch(*operands)

    def fold(n: int, mapped: Any, q: Any, k_cache: Any, table: Any, lengths: Any, *_: Any) -> Any:
        # The mapped axis joins the batch. The metadata of each single batch is of no use then.
        if mapped[1]:
            raise OptionError(
                "k_cache",
                "one pool that all mapped requests share",
                "a k_cache that jax.vmap maps over",
                "Pass in_axes=None for k_cache: map q, block_table and cache_seqlens, and keep the"
                " pages of all requests in one pool.",
            )
        batch = []
        for x, is_mapped in zip((q, table, lengths), (mapped[0], *mapped[2:4]), strict=True):
            x = x if is_mapped else jnp.broadcast_to(x, (n, *x.shape))
            batch.append(x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]))
        q, table, lengths = batch
        out, lse = _decode_op(config._replace(with_metadata=False))(q, k_cache, table, lengths)
        results = (out.reshape(n, -1, *out.shape[1:]), lse.reshape(n, -1, *lse.shape[1:]))
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


def _call_back(
    config: Config, q: Any, k_cache: Any, table: Any, lengths: Any, *metadata: Any
) -> tuple[Any, Any]:
    """The custom call: the results, and as further outputs what the kernels need besides."""
    batch, s_q, h_q, _ = q.shape
    q_info, k_info, t_info = map(framework("jax").describe, (q, k_cache, table))
    parts = _parts(q_info, k_info, config.on_gpu)
    geometry = Geometry.of(q_info, k_info, t_info, parts)
    results = [
        jax.ShapeDtypeStruct((batch, s_q, h_q, HEAD_DIM_V), q.dtype),
        jax.ShapeDtypeStruct((batch, h_q, s_q), jnp.float32),
        jax.ShapeDtypeStruct((_prepared(geometry) if config.on_gpu else 1,), jnp.float32),
    ]
    if not metadata:
        results += _metadata_shapes(batch, parts)
    callback = decode_callback(config, geometry)
    call = buffers.buffer_callback(callback, tuple(results), command_buffer_compatible=True)
    out, lse, *_ = call(q, k_cache, table, lengths, *metadata)
    return out, lse


def _prepared(geometry: Geometry) -> int:
    """Compiles and loads the kernels on every GPU that may run the call, since capture allows
    neither; the scratch that they need, in floats."""
    floats = [launch_of(engine_of(ordinal), geometry).scratch_floats for ordinal in _gpus()]
    return max(1, *floats)


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
