"""Tokens in the memory of a cache: the bytes of all of them, of some, and how they are written.

The bytes of a token are its row and, in formats whose scales lie behind the rows of a page, a tail.
In 16-bit formats a row is its values, since no byte of it needs a look.
"""

from __future__ import annotations

from typing import Any

from .cache_format import CacheFormat
from .codes import Codes


def rows_and_tail(codes: Codes, k_cache: Any, format: CacheFormat) -> tuple[Any, Any]:
    """(rows [num_pages, page_size, h_kv, row_bytes], tails [num_pages, page_size, 1, tail_bytes]
    or None) of k_cache [num_pages, page_size, h_kv, width], as views where it has strides."""
    if not format.is_fp8:
        return k_cache, None
    data = k_cache.view(codes.uint8)
    if not format.tail_bytes:
        return data, None
    num_pages, page_size = data.shape[:2]
    page = data.reshape(num_pages, page_size * format.token_bytes)
    rows = page[:, : page_size * format.row_bytes]
    tails = page[:, page_size * format.row_bytes :]
    return (
        rows.reshape(num_pages, page_size, 1, format.row_bytes),
        tails.reshape(num_pages, page_size, 1, format.tail_bytes),
    )


def gathered(
    codes: Codes, k_cache: Any, format: CacheFormat, page: Any, offset: Any
) -> tuple[Any, Any]:
    """The same of the tokens at (page[...], offset[...]) alone: [..., h_kv, row_bytes] and
    [..., 1, tail_bytes] or None."""
    rows, tails = rows_and_tail(codes, k_cache, format)
    return rows[page, offset], None if tails is None else tails[page, offset]


def new_cache(codes: Codes, format: CacheFormat, rows: Any, tails: Any) -> Any:
    """A cache [num_pages, page_size, h_kv, width] of what `rows_and_tail` returns. New pages are
    padded where the format says so, but in JAX, whose arrays have no strides."""
    if tails is None:
        return rows
    num_pages, page_size = rows.shape[:2]
    row_bytes, tail_bytes = page_size * format.row_bytes, page_size * format.tail_bytes
    padding = format.page_bytes(page_size) - row_bytes - tail_bytes
    parts = [
        rows.reshape(num_pages, row_bytes),
        tails.reshape(num_pages, tail_bytes),
        codes.zeros((num_pages, padding), rows),
    ]
    return as_cache(codes.concatenate(parts), format, page_size)


def as_cache(pages: Any, format: CacheFormat, page_size: int) -> Any:
    """The cache [num_pages, page_size, 1, width] in pages [num_pages, page_bytes] of uint8: a view
    where arrays have strides."""
    used = pages[:, : page_size * format.token_bytes]
    return used.reshape(pages.shape[0], page_size, 1, format.width)
