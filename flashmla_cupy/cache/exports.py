"""The tables of a cache in the forms that other libraries take."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..calls import scalars
from ..errors import SequenceError, ShapeError
from ..frameworks import Adapter
from .page_table import PageTable
from .sequence_rows import Index
from .views import array_of


def tables_of(
    table: PageTable, rows: Index, width: Any, adapter: Adapter, device: int, function: str
) -> tuple[Any, Any]:
    """(block_table [batch, width], cache_seqlens [batch]) of a framework: FlashMLA's and vLLM's
    form. Raises ShapeError if a sequence has more pages."""
    width = scalars.integer("width", width, function, least=1)
    block_table, cache_seqlens = table.export(rows, width)
    if block_table.shape[1] > width:
        expected = f"at least {block_table.shape[1]}, the pages of the longest sequence"
        raise ShapeError("width", expected, f"{width}", "Ask for more columns.", function)
    return (
        array_of(block_table, adapter.name, device),
        array_of(cache_seqlens, adapter.name, device),
    )


def csr(
    table: PageTable,
    rows: Index,
    seqs: tuple[Any, ...],
    adapter: Adapter,
    device: int,
    function: str,
) -> tuple[Any, Any, Any]:
    """(indptr, indices, last_page_len), int32, of a framework: FlashInfer's form."""
    lengths = table.reserved[rows]
    if (lengths == 0).any():
        seq = seqs[int(np.flatnonzero(lengths == 0)[0])]
        raise SequenceError(
            f"{function}(): {seq} has no tokens, and last_page_len is at least 1. Leave it out."
        )
    pages = -(-lengths // table.page_size)
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    parts = [table.pages_of(int(row)) for row in rows]
    indices = np.concatenate([np.zeros(0, np.int32), *parts])
    last = (lengths - (pages - 1) * table.page_size).astype(np.int32)
    indptr, indices, last = (array_of(x, adapter.name, device) for x in (indptr, indices, last))
    return indptr, indices, last
