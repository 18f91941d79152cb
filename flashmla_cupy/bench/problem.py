"""The arrays of a case of the benchmark, which `timer` makes and `peers` reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .cases import Case


@dataclass(frozen=True)
class Problem:
    """The arrays of a case. One block table for each cache of the pool that k_cache holds."""

    case: Case
    q: Any
    k_cache: Any
    block_tables: list[Any]
    cache_seqlens: Any
    out: Any
    lse: Any
