"""The exact values of some tokens of a cache in host memory: what the reference computes with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .arguments import cache_format
from .codes import codes_of
from .layout import gathered
from .quantize import decoded

Float64 = npt.NDArray[np.float64]


class TokenValues:
    """Looks tokens of a NumPy cache up: [num_pages, page_size, h_kv, width] of a format.

    descale_k is the scale of the e4m3 format, float32 [1]; None: 1."""

    def __init__(self, k_cache: npt.NDArray[Any], descale_k: Any = None) -> None:
        _, self.format = cache_format(k_cache, None, "TokenValues")
        self.num_pages, self.page_size = k_cache.shape[:2]
        self.slots = self.num_pages * self.page_size
        self._cache = k_cache
        self._descale = None if descale_k is None else np.float32(np.asarray(descale_k).item())

    def __call__(self, slots: npt.NDArray[Any]) -> Float64:
        """The tokens in the slots [n], page * page_size + offset: [n, h_kv, d_qk]."""
        codes = codes_of("numpy")
        page, offset = np.divmod(slots, self.page_size)
        row, tail = gathered(codes, self._cache, self.format, page, offset)
        values: Float64 = decoded(codes, row, tail, self.format, self._descale, "float64")
        return values
