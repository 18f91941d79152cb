"""The operations of `calls` on JAX arrays, eager and traced, as `jax_op` does for the calls with
kernels: one callback on the CPU, whose buffers live only during the call. Arrays on a GPU are
refused while tracing.

vmap folds the mapped axis into the batch where the operation has one, else it maps in turn.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..calls import fp8_decode, refusals, sparse_decode, sparse_metadata, sparse_prefill
from ..calls.operation import Operation, Output
from ..calls.wording import kind
from ..errors import OptionError
from ..frameworks import framework, numpy_dtype
from ..schedule.sched_meta import SchedMeta
from .jax_op import placed

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
    )
}
_EMPTY = {"lse": np.inf, "max_logits": -np.inf}  # of a query token that sees nothing


class _Config(NamedTuple):
    """What is static in one traced call, besides shapes and dtypes."""

    operation: str
    options: tuple[Any, ...]  # of the table
    operands: tuple[str, ...]  # names of the arrays, in their order

    @property
    def table(self) -> Any:
        return _OPERATIONS[self.operation].table


def run(
    operation: Operation, arrays: tuple[Any, ...], options: tuple[Any, ...], lazy: SchedMeta | None
) -> tuple[Any, ...]:
    """The results. A SchedMeta is not bound: a tracer must not outlive its trace, and on the CPU
    there is no schedule to make."""
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
    if placed(dict(zip(table.names, arrays, strict=True)), table.function):
        raise operation.no_kernel("one on a GPU")
    if not isinstance(arrays[0], jax.core.Tracer):
        refusals.raise_pending()
    if valid.is_empty:
        outputs = zip(table.having("output"), valid.outputs, strict=True)
        return tuple(
            jnp.full(output.shape, _EMPTY.get(array.name, 0), output.dtype)
            for array, output in outputs
        )
    names = tuple(name for name, x in zip(table.names, arrays, strict=True) if x is not None)
    operands = [x for x in arrays if x is not None]
    results: tuple[Any, ...] = _op(_Config(operation.name, options, names))(*operands)
    return results


@functools.cache
def _op(config: _Config) -> Callable[..., tuple[Any, ...]]:
    """(the arrays of config.operands) -> the results."""
    table = config.table

    def op(*operands: Any) -> Any:
        return one_batch(*operands)

    op.__name__ = f"flashmla_{config.operation}"  # what profiles and HLO dumps show

    def fold(n: int, mapped: Any, *operands: Any) -> Any:
        """The mapped axis joins the batch. The schedule of each batch is of no use then."""
        batch, names = [], []
        for name, x, is_mapped in zip(config.operands, operands, mapped, strict=True):
            if table[name].role == "schedule":
                continue
            if table[name].is_batched:
                x = x if is_mapped else jnp.broadcast_to(x, (n, *x.shape))
                x = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
            elif is_mapped:
                raise OptionError(
                    name,
                    f"one {name} for all mapped requests",
                    f"a {name} that jax.vmap maps over",
                    f"Pass in_axes=None for {name}: map what has the batch in its first axis.",
                    table.function,
                )
            batch.append(x)
            names.append(name)
        *most, _ = config.options  # is_lazy
        folded = config._replace(operands=tuple(names), options=(*most, True))
        results = _op(folded)(*batch)
        return tuple(x.reshape(n, -1, *x.shape[1:]) for x in results), (True,) * len(results)

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


def _call_back(config: _Config, *operands: Any) -> tuple[Any, ...]:
    """The custom call."""
    operation = _OPERATIONS[config.operation]
    outputs = operation.outputs(dict(zip(config.operands, operands, strict=True)), config.options)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, numpy_dtype(x.dtype)) for x in outputs)
    dtypes = tuple(str(x.dtype) for x in operands)
    # Buffers of this type cannot be looked at from Python; those of bytes can.
    plain = [x.view(jnp.uint8) if x.dtype == jnp.float8_e4m3fn else x for x in operands]
    callback = _callback(config, dtypes, outputs)
    results: tuple[Any, ...] = buffers.buffer_callback(callback, shapes)(*plain)
    return results


@functools.cache  # one object a configuration: JAX compiles again for another callback
def _callback(
    config: _Config, dtypes: tuple[str, ...], outputs: tuple[Output, ...]
) -> Callable[..., None]:
    operation, table = _OPERATIONS[config.operation], config.table
    names = [array.name for array in table.having("output")]

    def host(ctx: Any, results: Any, *operands: Any) -> None:
        views: dict[str, Any] = dict.fromkeys(table.names)
        for name, x, dtype in zip(config.operands, operands, dtypes, strict=True):
            array = np.asarray(x)
            views[name] = array.view(numpy_dtype(dtype)) if array.dtype != dtype else array
        arrays = tuple(views.values())
        views.update(zip(names, map(np.asarray, results), strict=True))
        valid = operation.validate(arrays, config.options)
        operation.run_on_host(valid._replace(framework=framework("numpy")), views)

    return host
