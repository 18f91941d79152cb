"""append_mla_kv() on JAX arrays: k_cache is an operand whose memory the result takes.

Eager calls donate k_cache; inside jit, XLA writes in place where the caller donated it, or where it
can see that nobody else needs the old pages, and copies them otherwise. As with decoding, the
callback only queues the kernel, so that XLA can capture it.

JAX has no int64 unless jax_enable_x64 is set, so slots and positions may be int32 as well; the
kernel reads them as 64 bits each, which are made of two words.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..calls import append as call
from ..calls.arguments import APPEND
from ..errors import OptionError
from ..frameworks import HOST, ArrayInfo, framework
from .jax_callbacks import device_guard

jax: Any = importlib.import_module("jax")
jnp: Any = importlib.import_module("jax.numpy")
buffers: Any = importlib.import_module("jax.experimental.buffer_callback")

_CPU = 1  # kDLCPU
_WIDE = ("slot_mapping", "positions")  # what the kernel reads as 64 bits


class _Config(NamedTuple):
    """What is static in one traced call."""

    infos: tuple[tuple[str, ArrayInfo], ...]  # of the arrays that the call has
    interleaved: bool

    @property
    def operands(self) -> tuple[str, ...]:
        """k_cache first, whose memory is the result's."""
        names = dict(self.infos)
        return "k_cache", *[name for name in APPEND.names[:-1] if name in names]


def append(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    """append_mla_kv() of JAX arrays or tracers."""
    valid = call.validate(arrays, options)
    named = APPEND.named(arrays)
    infos = tuple((name, info._replace(device=HOST)) for name, info in valid.infos.items())
    config = _Config(infos, valid.interleaved)
    operands = [named[name] for name in config.operands]
    if 0 in valid.infos["rows"].shape:
        return named["k_cache"]
    is_traced = any(isinstance(x, jax.core.Tracer) for x in operands)
    return (_op if is_traced else _donating_op)(config)(*operands)


@functools.cache
def _op(config: _Config) -> Callable[..., Any]:
    """(the arrays of config.operands) -> k_cache."""

    def flashmla_append(*operands: Any) -> Any:  # what profiles and HLO dumps show
        wide = [
            _as_64_bits(x) if name in _WIDE else x
            for name, x in zip(config.operands, operands, strict=True)
        ]
        result = jax.ShapeDtypeStruct(operands[0].shape, operands[0].dtype)
        callback = _AppendCallback(config)
        callback.prepare()
        run = buffers.buffer_callback(
            callback, result, input_output_aliases={0: 0}, command_buffer_compatible=True
        )
        return run(*wide)

    def no_gradient(primals: Any, tangents: Any) -> Any:
        raise OptionError(
            "rows",
            "arrays that are not differentiated, since appending has no backward pass",
            "a call inside jax.grad, jax.jvp or jax.vjp",
            "Put jax.lax.stop_gradient around rows and k_cache.",
            APPEND.function,
        )

    one = jax.custom_jvp(flashmla_append)
    one.defjvp(no_gradient)
    op: Callable[..., Any] = jax.jit(one)
    return op


@functools.cache
def _donating_op(config: _Config) -> Callable[..., Any]:
    op: Callable[..., Any] = jax.jit(_op(config), donate_argnums=0)
    return op


def _as_64_bits(x: Any) -> Any:
    """int32 [n] as words [n, 2], the lower one first; int64 as it is."""
    return x if x.dtype == jnp.int64 else jnp.stack([x, x >> 31], axis=-1)


class _AppendCallback:
    """What XLA calls for append_mla_kv() of one configuration."""

    __name__ = "flashmla_append"  # what profiles show

    def __init__(self, config: _Config) -> None:
        self._config = config
        self._valid = call.Valid(framework("jax"), dict(config.infos), config.interleaved)
        self._calls: dict[int, call.AppendCall] = {}

    def prepare(self) -> None:
        """Loads the kernel on all GPUs of JAX, since capture forbids it."""
        if jax.default_backend() == "gpu":
            for device in jax.local_devices(backend="gpu"):
                self._call(device.local_hardware_id)

    def _call(self, ordinal: int) -> call.AppendCall:
        if ordinal not in self._calls:
            self._calls[ordinal] = call.make(self._valid, ordinal)
        return self._calls[ordinal]

    def __call__(self, ctx: Any, k_cache: Any, *operands: Any) -> None:
        kind, ordinal = map(int, operands[0].__dlpack_device__())
        named = dict(zip(self._config.operands, operands, strict=True))
        if kind == _CPU:
            self._on_host(k_cache, named)
            return
        named["k_cache"] = k_cache
        at = tuple(_pointer(named[name]) if name in named else 0 for name in APPEND.names)
        made = self._call(ordinal)
        with device_guard(ordinal):
            call.launch(made, at, ctx.stream)

    def _on_host(self, k_cache: Any, named: dict[str, Any]) -> None:
        views = {name: np.asarray(x) for name, x in named.items()}
        before, after = views.pop("k_cache"), np.asarray(k_cache)
        if before.ctypes.data != after.ctypes.data:
            after[...] = before
        for name in set(_WIDE) & set(views):
            views[name] = views[name].view(np.int64).reshape(-1)
        call.on_host(self._config.interleaved, after, **views)


def _pointer(buffer: Any) -> int:
    return int(buffer.__cuda_array_interface__["data"][0])
