"""The operations of `calls` on JAX arrays, eager and traced, as `jax_op` does for dense decoding of
16-bit caches: one callback, whose buffers live only during the call. What no kernel takes is
refused while tracing. On a GPU a call makes a schedule of its own, in its scratch.

vmap folds the mapped axis into the batch where the operation has one, else it maps in turn.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from ..calls import (
    fp8_decode,
    paged_prefill,
    refusals,
    sparse_decode,
    sparse_metadata,
    sparse_prefill,
)
from ..calls.gathered import Work
from ..calls.operation import Operation
from ..calls.wording import kind
from ..errors import OptionError
from ..frameworks import framework, numpy_dtype
from ..gpu.engine import engine_of
from ..schedule.sched_meta import SchedMeta
from ..sizes import NUM_SMS_CPU
from .jax_callbacks import CPU, device_guard, pointer_of
from .jax_op import gpus, placed

jax: Any = importlib.import_module("jax")
jnp: Any = importlib.import_module("jax.numpy")
batching: Any = importlib.import_module("jax.custom_batching")
buffers: Any = importlib.import_module("jax.experimental.buffer_callback")

_OPERATIONS = {
    operation.name: operation
    for operation in (
        fp8_decode.FP8,
        sparse_decode.SPARSE,
        sparse_metadata.METADATA,
        sparse_prefill.PREFILL,
        paged_prefill.PAGED_PREFILL,
    )
}
_EMPTY = {"lse": np.inf, "max_logits": -np.inf}  # of a query token that sees nothing


class _Config(NamedTuple):
    """What is static in one traced call, besides shapes and dtypes."""

    operation: str
    options: tuple[Any, ...]  # of the table
    operands: tuple[str, ...]  # names of the arrays, in their order
    on_gpu: bool

    @property
    def table(self) -> Any:
        return _OPERATIONS[self.operation].table


def run(
    operation: Operation, arrays: tuple[Any, ...], options: tuple[Any, ...], lazy: SchedMeta | None
) -> tuple[Any, ...]:
    """The results. A SchedMeta is not bound: a tracer must not outlive its trace."""
    table = operation.table
    for i in table.outputs:
        if arrays[i] is not None:
            name = table.names[i]
            raise OptionError(
                name,
                "None, since JAX arrays cannot be written",
                kind(arrays[i]),
                f"Leave {name} out; inside jax.jit XLA reuses the memory of donated arguments.",
                table.function,
            )
    valid = operation.validate(arrays, options)
    on_gpu = placed(dict(zip(table.names, arrays, strict=True)), table.function)
    valid.require_metadata(_num_sms(on_gpu))
    if not isinstance(arrays[0], jax.core.Tracer):
        refusals.raise_pending()
    given = {name: x for name, x in zip(table.names, arrays, strict=True) if x is not None}
    if valid.is_empty:
        return _empty(_Config(operation.name, options, tuple(given), on_gpu), given.values())
    if on_gpu and table.having("schedule"):  # the call makes its own
        given = {name: x for name, x in given.items() if table[name].role != "schedule"}
        options = (*options[:-1], True)  # is_lazy
    config = _Config(operation.name, options, tuple(given), on_gpu)
    results: tuple[Any, ...] = _op(config)(*given.values())
    return results


def _empty(config: _Config, operands: Iterable[Any]) -> tuple[Any, ...]:
    """The results of a call that has nothing to compute."""
    named = dict(zip(config.operands, operands, strict=True))
    operation = _OPERATIONS[config.operation]
    outputs = operation.outputs(named, config.options, _num_sms(config.on_gpu))
    return tuple(
        jnp.full(output.shape, _EMPTY.get(array.name, 0), output.dtype)
        for array, output in zip(config.table.having("output"), outputs, strict=True)
    )


@functools.cache
def _op(config: _Config) -> Callable[..., tuple[Any, ...]]:
    """(the arrays of config.operands) -> the results."""
    table = config.table

    def op(*operands: Any) -> Any:
        return one_batch(*operands)

    op.__name__ = f"flashmla_{config.operation}"  # what profiles and HLO dumps show

    def fold(n: int, mapped: Any, *operands: Any) -> Any:
        """The mapped axis joins the batch. The schedule of each batch is of no use then."""
        batch, names, each = [], [], 0  # requests of each call that is mapped
        for name, x, is_mapped in zip(config.operands, operands, mapped, strict=True):
            if table[name].role == "schedule":
                continue
            if table[name].is_batched:
                x = x if is_mapped else jnp.broadcast_to(x, (n, *x.shape))
                each = x.shape[1]
                x = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
            elif is_mapped:
                raise OptionError(
                    name,
                    f"one {name} for all mapped requests",
                    "one that jax.vmap maps over",
                    f"Pass in_axes=None for {name}: map what has the batch in its first axis.",
                    table.function,
                )
            batch.append(x)
            names.append(name)
        *most, _ = config.options  # is_lazy
        folded = config._replace(operands=tuple(names), options=(*most, True))
        results = _op(folded)(*batch) if n else _empty(folded, batch)
        return tuple(x.reshape(n, each, *x.shape[1:]) for x in results), (True,) * len(results)

    def no_gradient(primals: Any, tangents: Any) -> Any:
        raise OptionError(
            table.names[0],
            "arrays that are not differentiated, since attention here has no backward pass",
            "a call inside jax.grad, jax.jvp or jax.vjp",
            f"Put jax.lax.stop_gradient around the arguments of {table.function}().",
            table.function,
        )

    call = functools.partial(_call_back, config)
    if table.options[-1].name == "is_lazy":
        mapped_call = batching.custom_vmap(call)
        mapped_call.def_vmap(fold)
    else:
        mapped_call = batching.sequential_vmap(call)
    one_batch = jax.custom_jvp(mapped_call)
    one_batch.defjvp(no_gradient)
    jitted: Callable[..., tuple[Any, ...]] = jax.jit(op)
    return jitted


def _num_sms(on_gpu: bool) -> int:
    """Multiprocessors of the device that will run a call."""
    return engine_of(gpus()[0]).num_sms if on_gpu else NUM_SMS_CPU


class _Kind(NamedTuple):
    """Of an operand."""

    dtype: str
    shape: tuple[int, ...]


def _kind(x: Any) -> _Kind:
    return _Kind(str(x.dtype), tuple(x.shape))


def _call_back(config: _Config, *operands: Any) -> tuple[Any, ...]:
    """The custom call; on a GPU with its scratch as a further output."""
    operation = _OPERATIONS[config.operation]
    named = dict(zip(config.operands, operands, strict=True))
    works: dict[int, Work] = {}
    floats = 0
    if config.on_gpu:  # compiled and loaded now on every GPU, since a graph capture allows neither
        valid = operation.validate(config.table.ordered(named), config.options)
        for ordinal in gpus():
            infos = {name: x._replace(device=ordinal) for name, x in valid.infos.items()}
            works[ordinal] = operation.on_gpu(valid._replace(infos=infos))
        floats = max(work.scratch_floats for work in works.values())
    outputs = operation.outputs(named, config.options, _num_sms(config.on_gpu))
    shapes = [jax.ShapeDtypeStruct(x.shape, numpy_dtype(x.dtype)) for x in outputs]
    shapes += [jax.ShapeDtypeStruct((floats,), jnp.float32)] if config.on_gpu else []
    # Buffers of this type cannot be looked at from Python; those of bytes can.
    plain = [x.view(jnp.uint8) if x.dtype == jnp.float8_e4m3fn else x for x in operands]
    callback = _Callback(config, tuple(map(_kind, operands)), works)
    call = buffers.buffer_callback(callback, tuple(shapes), command_buffer_compatible=config.on_gpu)
    results: tuple[Any, ...] = call(*plain)
    return tuple(results[: len(outputs)])


class _Callback:
    """What XLA calls."""

    def __init__(self, config: _Config, kinds: tuple[_Kind, ...], works: dict[int, Work]) -> None:
        self._config, self._kinds, self._works = config, kinds, works
        self.__name__ = f"flashmla_{config.operation}"
        self._outputs = [array.name for array in config.table.having("output")]

    # JAX compiles again for another callback, so those of one configuration are equal.

    def __eq__(self, other: object) -> bool:
        return type(other) is _Callback and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> Any:
        return self._config, self._kinds, tuple(self._works)

    def __call__(self, ctx: Any, results: Any, *operands: Any) -> None:
        kind, ordinal = map(int, operands[0].__dlpack_device__())
        if kind == CPU:
            self._on_host(results, operands)
            return
        if ordinal not in self._works:
            raise RuntimeError(
                "A call that was traced for the CPU runs on a GPU. Make the GPU JAX's default"
                " backend: put cuda first in JAX_PLATFORMS, or leave it unset."
            )
        at = dict(zip(self._config.operands, map(pointer_of, operands), strict=True))
        *written, scratch = map(pointer_of, results)
        at.update(zip(self._outputs, written, strict=True))
        with device_guard(ordinal):
            self._works[ordinal].launch(ctx.stream, at, scratch)

    def _on_host(self, results: Any, operands: Any) -> None:
        table, operation = self._config.table, _OPERATIONS[self._config.operation]
        views: dict[str, Any] = dict.fromkeys(table.names)
        for name, x, of in zip(self._config.operands, operands, self._kinds, strict=True):
            array = np.asarray(x)
            views[name] = array if array.dtype == of.dtype else array.view(numpy_dtype(of.dtype))
        arrays = tuple(views.values())
        written = results[: len(self._outputs)]
        views.update(zip(self._outputs, map(np.asarray, written), strict=True))
        valid = operation.validate(arrays, self._config.options)
        operation.run_on_host(valid._replace(framework=framework("numpy")), views)
