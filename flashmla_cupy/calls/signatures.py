"""Calls that were checked before: every kind of call keeps what its checks found by signature.

The signature of a call is all that the checks look at except addresses: framework, shapes,
strides, dtypes, device and options. `Signatures.find` takes the signature of a call and looks it
up. Addresses are looked at on every call: `Checked.accepts` tests their alignment and that the
outputs overlap nothing; the checks say what is wrong with them.

Both run for every layer of every token, so they are written for speed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ..bounded import Bounded
from ..frameworks import HOST, ArrayInfo, by_type, framework_of
from .arguments import Table
from .layouts import span

MAX_SIGNATURES = 1024  # a bound, not a policy: a decoding loop needs a few
MAX_ADDRESSES = 4096  # of one signature; a model has as many caches as layers
ABSENT = ArrayInfo(0, (), (), "", HOST)  # stands for an array the call does not have

Pointers = tuple[int, ...]  # addresses of the arrays; 0 for one that the call does not have
Call = TypeVar("Call")


def spans(table: Table, infos: dict[str, ArrayInfo]) -> tuple[tuple[int, int], ...]:
    """The bytes that each array covers, relative to its address."""
    return tuple(span(infos.get(name, ABSENT)) for name in table.names)


def pointers(table: Table, infos: dict[str, ArrayInfo]) -> Pointers:
    """The addresses of the arrays."""
    return tuple(infos.get(name, ABSENT).ptr for name in table.names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A signature that passed the checks; calls add what follows from it."""

    table: Table
    spans: tuple[tuple[int, int], ...]
    # Addresses that accepts() has found right; most calls come again with the same ones.
    accepted: Bounded[Pointers, bool] = field(
        default_factory=lambda: Bounded(MAX_ADDRESSES), compare=False, repr=False
    )

    def accepts(self, pointers: Pointers) -> bool:
        """Whether all addresses are aligned and the outputs overlap nothing."""
        if pointers in self.accepted:
            return True
        for pointer, alignment in zip(pointers, self.table.alignments, strict=False):
            if pointer % alignment:
                return False
        written = [i for i in self.table.outputs if i < len(pointers) and pointers[i]]
        if any(self._overlaps(i, pointers) for i in written):
            return False
        self.accepted[pointers] = True
        return True

    def _overlaps(self, output: int, pointers: Pointers) -> bool:
        low, high = self.spans[output]
        begin, end = pointers[output] + low, pointers[output] + high
        for i, (pointer, (low, high)) in enumerate(zip(pointers, self.spans, strict=False)):
            if i != output and pointer + low < end and begin < pointer + high:
                return True
        return False


class Signatures(Generic[Call]):
    """What the checks of one kind of call found, by signature."""

    def __init__(self, table: Table) -> None:
        self._first = table.names[0]
        self._known: Bounded[Any, Call] = Bounded(MAX_SIGNATURES)

    def find(
        self, arrays: tuple[Any, ...], options: tuple[Any, ...], is_usual: bool
    ) -> tuple[Call | None, Pointers, Any]:
        """(call, pointers, key): the call if this signature was seen, and the addresses of its
        arrays; key None: it cannot be kept. is_usual: whether the options are of the types that
        the table names, which the caller tests one by one, in a tenth of the time."""
        if not is_usual:
            return None, (), None
        try:
            first = arrays[0]
            adapter = by_type.get(type(first)) or framework_of(first, self._first)
            facts, pointers = adapter.signature(arrays)
            key = facts, options
            return self._known.get(key), pointers, key
        except Exception:  # no arrays, or none of one framework: the checks find out and say so
            return None, (), None

    def keep(self, key: Any, call: Call) -> Call:
        """Keeps a checked call under the key that find() gave."""
        if key is not None:
            self._known[key] = call
        return call
