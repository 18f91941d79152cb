"""Calls whose arrays have no address to launch with: what `interface` does not do itself.

JAX arrays go to `jax_op`, since memory and order are XLA's. Arrays of any other framework are
imported through DLPack, as views, and then called with like CuPy's or NumPy's own. Fake tensors of
torch, which have a shape and no memory, go to `torch_op`, as all do that torch.compile traces.
"""

from __future__ import annotations

from typing import Any

from ..calls import decode as plans
from ..calls.layouts import DECODE
from ..errors import ArgumentError
from ..frameworks import framework_of, is_foreign
from ..schedule.sched_meta import SchedMeta


def without_address(
    arrays: plans.Arrays, options: plans.Options, lazy: SchedMeta | None, key: Any
) -> tuple[Any, Any] | None:
    """The results of flash_mla_with_kvcache() for such arrays; None for all others.

    `key` is the signature that plans.find() made, None if it made none."""
    if is_fake(arrays.q):
        from . import torch_op

        metadata = arrays.tile_scheduler_metadata if lazy is None else lazy
        inputs = (*_positional(arrays, options, metadata), arrays.out, arrays.lse)
        return torch_op.traced_decode(*inputs)
    if any(is_foreign(array) for array in arrays):
        return _foreign(arrays, options, lazy)
    try:
        name = framework_of(arrays.q, "q").name
    except ArgumentError:  # `plans.make` will say so
        return None
    if name == "jax":
        from . import jax_op

        return jax_op.decode(arrays, options, lazy, key)
    return None


def is_fake(x: Any) -> bool:
    """Whether x is a tensor of torch's FakeTensorMode."""
    return type(x).__name__ == "FakeTensor"


def imported(argument: str, array: Any, function: str) -> Any:
    """A view of an array of another framework. Raises an ArgumentError of that function."""
    from ..frameworks.dlpack import from_dlpack

    try:
        return from_dlpack(array, argument)
    except ArgumentError as error:
        raise error.of(function) from error.__cause__


def _foreign(
    arrays: plans.Arrays, options: plans.Options, lazy: SchedMeta | None
) -> tuple[Any, Any]:
    from ..interface import flash_mla_with_kvcache

    views = plans.Arrays(
        *(
            imported(name, array, DECODE) if is_foreign(array) else array
            for name, array in arrays._asdict().items()
        )
    )
    metadata = views.tile_scheduler_metadata if lazy is None else lazy
    positional = _positional(views, options, metadata)
    out, lse = flash_mla_with_kvcache(*positional, out=views.out, lse=views.lse)
    return out if arrays.out is None else arrays.out, lse if arrays.lse is None else arrays.lse


def _positional(arrays: plans.Arrays, options: plans.Options, metadata: Any) -> tuple[Any, ...]:
    """The positional arguments of flash_mla_with_kvcache(), up to causal."""
    scalars = options.softmax_scale, options.causal
    return *arrays[:4], options.head_dim_v, metadata, arrays.num_splits, *scalars
