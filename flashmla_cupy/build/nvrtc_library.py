"""One NVRTC library: its file, its version, and a compilation with it. Needs no GPU.

CuPy's binding always takes the first NVRTC that it finds. This one takes the file that it is
given, so that an NVRTC too new for the driver can be passed over, and it loads NVRTC's builtins
from beside that file: some builds look for them only where the system's loader does, and find them
by luck, when another library happens to have loaded them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal


class NVRTCError(Exception):
    """A call of NVRTC failed: its name for the error, and what it wrote about the program."""

    def __init__(self, status: str, log: str = "") -> None:
        super().__init__(status)
        self.log = log


class Library:
    """An NVRTC that is loaded from `path`, a file or a name that the system's loader knows."""

    def __init__(self, path: str) -> None:
        """Raises OSError if it cannot be loaded."""
        self._nvrtc = ctypes.CDLL(path)
        self._nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        self.path = path
        if not os.path.isabs(path):
            with contextlib.suppress(OSError):  # then it goes by the name that it was found under
                self.path = loaded_path(path)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = major.value, minor.value
        # A library that is loaded once is found again under its name.
        windows = f"nvrtc-builtins64_{major.value}{minor.value}.dll"
        linux = f"libnvrtc-builtins.so.{major.value}.{minor.value}"
        name = windows if sys.platform == "win32" else linux
        self.builtins = os.path.join(os.path.dirname(self.path), name)
        with contextlib.suppress(OSError):  # perhaps NVRTC finds them elsewhere
            self._keep = ctypes.CDLL(self.builtins)

    def supported_archs(self) -> list[int]:
        """The virtual architectures that it compiles for, 90 for compute_90."""
        count = ctypes.c_int()
        self._check(self._nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        archs = (ctypes.c_int * count.value)()
        self._check(self._nvrtc.nvrtcGetSupportedArchs(archs))
        return list(archs)

    def compile(
        self,
        source: bytes,
        name: str,
        headers: Mapping[str, bytes],
        options: Sequence[str],
        product: Literal["CUBIN", "PTX"],
    ) -> tuple[bytes, str]:
        """(product, log) of one program. `headers` are the files that it can include, by name.

        Raises NVRTCError."""
        nvrtc, program = self._nvrtc, ctypes.c_void_p()
        strings = ctypes.c_char_p * len(headers)
        created = nvrtc.nvrtcCreateProgram(
            ctypes.byref(program),
            ctypes.c_char_p(source),
            name.encode(),
            len(headers),
            strings(*headers.values()),
            strings(*(header.encode() for header in headers)),
        )
        self._check(created)
        try:
            given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = nvrtc.nvrtcCompileProgram(program, len(options), given)
            log = self._get(program, "ProgramLog").decode(errors="replace").strip("\0\n ")
            self._check(status, log)
            return self._get(program, product), log
        finally:
            nvrtc.nvrtcDestroyProgram(ctypes.byref(program))

    def _get(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        room = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._nvrtc, f"nvrtcGet{what}")(program, room))
        return room.raw

    def _check(self, status: int, log: str = "") -> None:
        if status:
            name = self._nvrtc.nvrtcGetErrorString(status) or b"unknown"
            raise NVRTCError(f"{name.decode()} ({status})", log)


def loaded_path(name: str) -> str:
    """Where the shared library `name`, "libnvrtc.so.12", was loaded from, by the memory map of this
    process.

    Raises OSError if it is not loaded, or where there is no such map."""
    pattern = re.compile(rf"\s(/\S.*/{re.escape(name)}[.\d]*)$")
    for line in Path("/proc/self/maps").read_text().splitlines():
        if found := pattern.search(line):
            return found[1]
    raise OSError(f"{name} is not loaded")
