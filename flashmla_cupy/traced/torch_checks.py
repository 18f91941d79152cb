"""What traced calls refuse before an op becomes part of the trace, by the functions that check
eager calls, so that both raise the same.

Options, and what is no tensor, are refused in every trace. Shapes, strides and dtypes are checked
where a trace knows them all and Dynamo does not follow the checks: a symbolic length that is
compared becomes a guard, for which torch.export refuses dynamic axes. What is left to the ops they
check when they run, on tensors with memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..calls import scalars
from ..calls.arguments import Table
from ..calls.wording import kind
from ..errors import ArgTypeError, ArgumentError, FrameworkMismatchError, ShapeError
from ..frameworks import EXPECTED, HOST, Adapter, ArrayInfo, by_type, framework_of
from ..frameworks.torch_tensors import no_kernels, no_memory
from ..sizes import NUM_SMS_CPU

torch: Any = importlib.import_module("torch")

_APART = 1 << 48  # bytes between the addresses of two stand-ins
_KNOWS_EXPORTS = hasattr(torch.compiler, "is_exporting")
_symbolic_int: type = torch.SymInt
# Whether a comparison holds whatever the symbolic shapes are; makes no guard.
_is_known: Callable[[Any], bool] = importlib.import_module(
    "torch.fx.experimental.symbolic_shapes"
).statically_known_true


class Axes(NamedTuple):
    """What a trace checks of an array in any case; plain values, which compilers can trace."""

    name: str
    shape: str  # for people
    least: int  # axes
    most: int
    is_needed: bool


def axes_of(table: Table, *needed: str) -> tuple[Axes, ...]:
    """Of the arrays of a table; needed: those that every call has besides the inputs."""
    return tuple(
        Axes(
            array.name,
            array.shape,
            len(array.axes) - array.may_lack_axes,
            len(array.axes),
            array.role == "input" or array.name in needed,
        )
        for array in table.arrays
    )


def tensors(function: str, axes: tuple[Axes, ...], arrays: tuple[Any, ...] | list[Any]) -> None:
    """Raises for what is no tensor, and for a tensor with another number of axes."""
    for x, (name, shape, least, most, is_needed) in zip(arrays, axes, strict=False):
        if x is None and not is_needed:
            continue
        if not isinstance(x, torch.Tensor):
            raise _no_tensor(x, name, function)
        if not least <= x.dim() <= most:
            remedy = f"See {function}() for the shapes."
            raise ShapeError(name, f"shape {shape}", f"{tuple(x.shape)}", remedy, function)


def _no_tensor(x: Any, name: str, function: str) -> ArgumentError:
    is_array = isinstance(x, np.ndarray)
    if not torch.compiler.is_dynamo_compiling():  # which would guard on all modules
        try:
            framework_of(x, name)
        except ArgumentError as error:
            return error.of(function)
        is_array = True
    if is_array:
        remedy = f"Convert {name} to torch; a call takes arrays of one framework."
        got = f"{type(x).__name__}"
        return FrameworkMismatchError(name, "a torch.Tensor, as others are", got, remedy, function)
    remedy = f"This call needs {name}: pass it." if x is None else "Put the data into an array."
    return ArgTypeError(name, EXPECTED, kind(x), remedy, function)


def integer(name: str, value: Any, function: str, least: int = 0) -> Any:
    """scalars.integer(), but nothing bounds a symbolic shape that is exported. Dynamo shows what
    follows from one as an int, and NumPy's integers as arrays, whose values the op checks."""
    if isinstance(value, _symbolic_int):
        return value
    if torch.compiler.is_dynamo_compiling():
        if type(value) is int:
            if _KNOWS_EXPORTS and not torch.compiler.is_exporting():  # a guard does no harm
                is_wrong = value < least or value > scalars.INT_LIMIT
            else:
                is_wrong = _is_known(value < least) or _is_known(value > scalars.INT_LIMIT)
            return scalars.integer(name, value, function, least) if is_wrong else value
        if isinstance(value, np.ndarray) and value.ndim == 0:
            return value
    return scalars.integer(name, value, function, least)


@dataclass(frozen=True, slots=True)
class _StandIn:
    """Stands for a tensor, where the checks look at its facts."""

    info: ArrayInfo


class _Traced(Adapter):
    name = "torch"

    def describe(self, x: Any, argument: str = "array") -> ArrayInfo:
        info: ArrayInfo = x.info
        return info


by_type[_StandIn] = _Traced()


def facts(
    table: Table,
    arrays: tuple[Any, ...] | list[Any],
    validate: Callable[[tuple[Any, ...]], Any],
) -> Any:
    """What validate() says of arrays like these; None where it cannot be asked."""
    if torch.compiler.is_dynamo_compiling():
        return None
    given = [x for x in arrays if x is not None]
    for name, x in zip(table.names, arrays, strict=False):
        if x is not None and (x.is_nested or x.layout is not torch.strided):
            raise no_memory(x, name, "nested" if x.is_nested else f"{x.layout}").of(table.function)
    if not all(type(n) is int for x in given for n in (*x.shape, *x.stride(), x.storage_offset())):
        return None
    is_one_device = len({x.device for x in given}) == 1
    for name, x in zip(table.names, arrays, strict=False):
        if not is_one_device and x is not None and x.device.type not in ("cpu", "cuda"):
            raise no_kernels(x, name).of(table.function)
    places = {id(x): i + 1 for i, x in enumerate(given)}

    def info(x: Any) -> ArrayInfo:
        address = places[id(x)] * _APART + x.storage_offset() * x.element_size()
        dtype = str(x.dtype).removeprefix("torch.")
        # Where all lie in one place, it does not matter to the checks which, and a GPU is let be.
        device = HOST if is_one_device or x.device.type == "cpu" else x.device.index or 0
        return ArrayInfo(address, tuple(x.shape), tuple(x.stride()), dtype, device)

    return validate(tuple(None if x is None else _StandIn(info(x)) for x in arrays))


def num_sms_of(x: Any) -> int:
    """Multiprocessors of the device of a tensor; 0: it is not there."""
    if x.device.type != "cuda":
        return NUM_SMS_CPU
    if not torch.cuda.is_available():
        return 0
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count)
