"""The shape of one launch that gathers rows one by one: over an FP8 cache, or by lists of tokens.

With lists, each query token is a request of its own for the kernels, `group` of them to a request
of the call (see schedule/lists.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..schedule.lists import longest
from ..sizes import HEAD_DIM_V, METADATA_COLUMNS, ROWS_PER_BLOCK, ceil_div


class Pool(NamedTuple):
    """Pages of tokens. page_bytes: from one page to the next."""

    num_pages: int = 0
    page_size: int = 1
    page_bytes: int = 0

    @property
    def shift(self) -> int:
        """log2 of the page size, -1 if it is no power of two."""
        size = self.page_size
        return size.bit_length() - 1 if size & size - 1 == 0 else -1


NO_POOL = Pool()


@dataclass(frozen=True)
class GatherGeometry:
    """The sizes and strides (in elements) of one launch."""

    cache_format: str
    q_dtype: str
    dtype: str  # of out: that of q if that has 16 bits
    batch: int  # of the call
    s_q: int
    h_q: int
    d_qk: int
    q_strides: tuple[int, ...]  # of [batch, s_q, h_q, d_qk]
    pool: Pool
    table_stride: int  # of block_table, or of lists, from one request of the kernels to the next
    columns: int  # of block_table
    parts: int
    topk: int = 0  # 0: no lists
    extra_topk: int = 0
    extra_stride: int = 0
    extra_pool: Pool = NO_POOL
    length_group: int = 1  # query tokens that share a length
    outside_is_none: bool = False
    wide_fp8: bool = False

    @property
    def column_blocks(self) -> int:
        """Of 64 columns, in a key."""
        return self.d_qk // 64

    @property
    def group(self) -> int:
        """Requests of the kernels in one of the call."""
        return self.s_q if self.topk else 1

    @property
    def requests(self) -> int:
        return self.batch * self.group

    @property
    def positions(self) -> int:
        """Query positions of a request of the kernels."""
        return self.s_q // self.group

    @property
    def rows(self) -> int:
        return self.positions * self.h_q

    @property
    def slabs(self) -> int:
        _, position, head, _ = self.q_strides
        return 1 if position == self.h_q * head or self.positions == 1 else self.s_q

    @property
    def slab_rows(self) -> int:
        return self.rows // self.slabs

    @property
    def slab_blocks(self) -> int:
        return ceil_div(self.slab_rows, ROWS_PER_BLOCK)

    @property
    def max_length(self) -> int:
        """Tokens of a request of the kernels, at most."""
        if not self.topk:
            return min(self.columns * self.pool.page_size, 2**31 - 1)
        return longest(self.topk, self.extra_topk)

    # Scratch: partial results and words of pairs as of dense_decode (geometry.py), and then what a
    # schedule is made of, and one, for calls without: the lengths of the kernels' requests,
    # tile_scheduler_metadata and num_splits.

    @property
    def slots(self) -> int:
        return 2 * (self.parts - 1)

    @property
    def out_partial_bytes(self) -> int:
        return self.slots * self.rows * HEAD_DIM_V * 4

    @property
    def partial_bytes(self) -> int:
        return self.out_partial_bytes + self.slots * self.rows * 16

    @property
    def pair_words(self) -> int:
        return self.parts * self.slabs * self.slab_blocks

    @property
    def lengths_offset(self) -> int:
        return self.partial_bytes + 8 * self.pair_words

    @property
    def metadata_offset(self) -> int:
        return ceil_div(self.lengths_offset + 4 * self.requests, 16) * 16

    @property
    def num_splits_offset(self) -> int:
        return self.metadata_offset + 4 * METADATA_COLUMNS * self.parts

    @property
    def scratch_floats(self) -> int:
        return self.num_splits_offset // 4 + self.requests + 1


class GatherAddresses(NamedTuple):
    """Where the arrays of one call are; 0: it has no such array."""

    q: int
    cache: int
    table: int  # block_table or indices
    cache_seqlens: int
    tile_scheduler_metadata: int
    out: int
    lse: int
    scratch: int
    extra_cache: int = 0
    extra_indices: int = 0
    topk_length: int = 0
    extra_topk_length: int = 0
    attn_sink: int = 0
    descale_q: int = 0
    descale_k: int = 0
    max_logits: int = 0
