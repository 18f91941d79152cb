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

    def __init__(self, make: Callable[..., Any] | None) -> None:
        """`make` is PyTorch's TensorGuards, None if it has none."""
        self._make = make
        # Number of tensors -> (guard, facts). A guard must not be asked about a nested tensor: it
        # has no strides, which ends the process.
        self.found: dict[int, tuple[Callable[..., bool], Facts]] = {}
        self.last: Facts | None = None  # None after a hit: two misses in a row have none between

    def remember(self, tensors: Sequence[Any], facts: Facts) -> None:
        """Not for tensors that require a gradient, as the guard is blind to the mode."""
        if facts != self.last or self._make is None:
            self.last = facts
            return
        # The older object of the two, which whoever kept it finds again without a comparison.
        facts, self.last = self.last, None
        try:
            guard = self._make(
                *tensors,
                dynamic_dims_sizes=[list(x.shape) for x in tensors],
                dynamic_dims_strides=[list(x.stride()) for x in tensors],
            )
        except Exception:  # of another PyTorch
            self._make = None
        else:
            self.found[len(tensors)] = guard.check, facts
