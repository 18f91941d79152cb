"""Whether tensors are like those of an earlier call, by one call into PyTorch.

torch.compile guards its code with the same function. Reading shapes, strides, dtypes and devices
one by one takes several times as long. Without the function, which is not public, nothing is
remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class Facts:
    """A tuple of facts that remembers its hash."""

    __slots__ = ("_hash", "_values")

    def __init__(self, values: tuple[Any, ...]) -> None:
        self._values, self._hash = values, hash(values)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return type(other) is Facts and self._values == other._values


class Guards:
    """The facts of the tensors of a call, for each number of tensors that calls have had.

    They are remembered when two calls in a row have had them: making a guard takes as long as
    reading the facts some times."""

    def __init__(self, make: Callable[..., Any] | None, is_nested: Callable[[Any], bool]) -> None:
        """`make` is PyTorch's TensorGuards, None if it has none. `is_nested` tells of a tensor
        whether it is a nested one: a guard ends the process when it is asked about such a one."""
        self._make, self._is_nested = make, is_nested
        self._found: dict[int, tuple[Callable[..., bool], Facts]] = {}
        self._last: Facts | None = None

    def find(self, tensors: Sequence[Any]) -> Facts | None:
        """The facts, if these tensors have those of remembered ones."""
        found = self._found.get(len(tensors))
        if found is None:
            return None
        try:
            if any(map(self._is_nested, tensors)) or not found[0](*tensors):
                return None
        except TypeError:  # not all of them are tensors
            return None
        self._last = None  # so two misses in a row are none with a hit between them
        return found[1]

    def remember(self, tensors: Sequence[Any], facts: Facts) -> None:
        """Not for tensors that require a gradient, as the guard is blind to the mode."""
        if facts != self._last or self._make is None:
            self._last = facts
            return
        self._last = None
        try:
            guard = self._make(
                *tensors,
                dynamic_dims_sizes=[list(x.shape) for x in tensors],
                dynamic_dims_strides=[list(x.stride()) for x in tensors],
            )
        except Exception:  # of another PyTorch
            self._make = None
        else:
            self._found[len(tensors)] = guard.check, facts
