"""Kernel parameters by name: where each lies in the packed bytes, and what a launch takes of them.

`Parameters` declares them once, in the words of the CUDA source. Whatever seldom changes is packed
by name; a run of neighbours that changes with every call is packed by one `struct.Struct`.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

LETTERS = {"pointer": "Q", "uint64": "Q", "int64": "q", "int": "i", "float": "f"}


class Run:
    """Neighbouring parameters, to be packed together: `pack_into(buffer, offset, *values)`."""

    def __init__(self, layout: str, offset: int) -> None:
        self.offset = offset
        self.pack_into = struct.Struct(layout).pack_into


class Parameters:
    """The parameters of a kernel, in the order of its source.

    declaration: a line for neighbours of one type, "int batch, s_q". as_struct: the kernel takes
    them as one struct, and not each by itself. tensor_maps: so many CUtensorMaps come before."""

    def __init__(self, declaration: str, *, as_struct: bool = False, tensor_maps: int = 0) -> None:
        self.as_struct, self.tensor_maps = as_struct, tensor_maps
        self.letters: dict[str, str] = {}
        self.offsets: dict[str, int] = {}
        packed = ""
        for line in filter(str.strip, declaration.splitlines()):
            kind, _, names = line.strip().partition(" ")
            for name in names.split(","):
                letter = LETTERS[kind]
                self.letters[name.strip()] = letter
                # A repeat count of 0 adds nothing but alignment.
                self.offsets[name.strip()] = struct.calcsize(f"{packed}0{letter}")
                packed += letter
        self.size = struct.calcsize(f"{packed}0Q")

    def run(self, names: Sequence[str]) -> Run:
        """The packing of neighbours. Raises ValueError unless `names` are such, in their order."""
        everything = tuple(self.letters)
        first = everything.index(names[0])
        if everything[first : first + len(names)] != tuple(names):
            raise ValueError(f"Not neighbours in {everything}: {names}.")
        return Run("".join(self.letters[name] for name in names), self.offsets[names[0]])


class Arguments:
    """The packed parameters of a kernel, and the array of their addresses that a launch takes."""

    def __init__(self, parameters: Parameters, others: Arguments | None = None) -> None:
        """others: those of a kernel that is launched with this one. What both have under one name
        is one and the same, and is packed there."""
        self.buffer = ctypes.create_string_buffer(parameters.size)
        start = ctypes.addressof(self.buffer)
        packed = {name: start + offset for name, offset in parameters.offsets.items()}
        shared = {} if others is None else others.addresses
        self.addresses: dict[str, int] = {name: shared.get(name, at) for name, at in packed.items()}
        # The parameters that `pack` sets: those that are packed here.
        self._own = {
            name: (parameters.letters[name], offset)
            for name, offset in parameters.offsets.items()
            if name not in shared
        }
        addresses = [start] if parameters.as_struct else list(self.addresses.values())
        addresses = [0] * parameters.tensor_maps + addresses
        self._pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        self.address = ctypes.addressof(self._pointers)

    def pack(self, **values: float) -> None:
        """Sets parameters by name. Slow beside a `Run`; KeyError for what is not packed here."""
        for name, value in values.items():
            letter, offset = self._own[name]
            struct.pack_into(letter, self.buffer, offset, value)

    def set_maps(self, first: tuple[int, int], second: tuple[int, int]) -> None:
        """Where four tensor maps are: two of one array, two of another."""
        pointers = self._pointers
        pointers[0], pointers[1] = first
        pointers[2], pointers[3] = second

    def set_q_maps(self, maps: tuple[int, int]) -> None:
        """Where two tensor maps are, of one array."""
        self._pointers[0], self._pointers[1] = maps
