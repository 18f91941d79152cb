"""The handle of a sequence."""

from __future__ import annotations

from collections import Counter
from typing import Any, NoReturn

from ..errors import ArgTypeError, SequenceError


class Sequence:
    """A handle for one sequence of one cache. It is valid until free(), and never stands for
    another sequence."""

    __slots__ = ("number", "owner")

    def __init__(self, owner: object, number: int) -> None:
        self.owner = owner  # a tag of the table, not the table: a handle keeps no pool alive
        self.number = number

    def __repr__(self) -> str:
        return f"<sequence {self.number}>"

    def __copy__(self) -> Sequence:
        return self  # it is what it is by identity

    def __deepcopy__(self, memo: Any) -> Sequence:
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        expected = "an object that can be pickled"
        remedy = "A handle is of use in the process of its cache alone."
        raise ArgTypeError("self", expected, "a sequence handle", remedy, "Sequence")


def require_distinct(handles: tuple[Any, ...], function: str) -> None:
    """Raises SequenceError for a sequence that comes twice."""
    if len(set(handles)) != len(handles):
        seq, times = max(Counter(handles).items(), key=lambda item: item[1])
        remedy = "Give each sequence all its rows in one entry."
        raise SequenceError(f"{function}(): {seq} comes {times} times in seqs. {remedy}")
