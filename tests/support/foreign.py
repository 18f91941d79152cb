"""Arrays of a framework that the library has never heard of: DLPack is all they speak."""

from __future__ import annotations

from typing import Any


class Foreign:
    """Around an array of NumPy or PyTorch, [any shape], in host memory unless `device` says
    otherwise, as DLPack names devices; counts how often it is exported."""

    def __init__(self, array: Any, device: tuple[int, int] = (1, 0)) -> None:
        self.array, self.device, self.exports = array, device, 0

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **options: Any) -> Any:
        self.exports += 1
        return self.array.__dlpack__(**options)
