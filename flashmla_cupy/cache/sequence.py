"""The handle of a sequence."""

from __future__ import annotations

from typing import Any, NoReturn

from ..errors import ArgTypeError


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
