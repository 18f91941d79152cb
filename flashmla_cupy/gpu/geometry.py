"""The shape of one decode launch.

All query rows of a kv head share its V, so their order within a tile is free. `Geometry` says how
the rows of q are cut into row blocks, one thread block each, times `parts` (the rows of
tile_scheduler_metadata), which cut the tokens of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..frameworks import ArrayInfo
from ..sizes import HEAD_DIM_V, ROWS_PER_BLOCK, ceil_div


@dataclass(frozen=True)
class Geometry:
    """The sizes and strides (in elements) of one decode launch.

    A row block never straddles two slabs. There is one slab, of all rows of a kv head, when the
    query positions lie evenly behind one another (a contiguous q with one kv head) or there is
    only one; else each query position is a slab. Row r of slab s belongs to query position
    s + r // group and to head kv_head * group + r % group.
    """

    dtype: str
    batch: int
    s_q: int
    h_q: int
    h_kv: int
    q_strides: tuple[int, ...]  # of [batch, s_q, h_q, 576]
    num_pages: int
    page_size: int
    k_strides: tuple[int, ...]  # of [num_pages, page_size, h_kv, 576]
    max_pages: int
    table_stride: int
    parts: int

    @classmethod
    def of(cls, q: ArrayInfo, k_cache: ArrayInfo, block_table: ArrayInfo, parts: int) -> Geometry:
        """The launch for these arrays; q and k_cache with plain strides (`layouts.plain`)."""
        batch, s_q, h_q, _ = q.shape
        num_pages, page_size, h_kv, _ = k_cache.shape
        return cls(
            dtype=q.dtype,
            batch=batch,
            s_q=s_q,
            h_q=h_q,
            h_kv=h_kv,
            q_strides=tuple(q.strides),
            num_pages=num_pages,
            page_size=page_size,
            k_strides=tuple(k_cache.strides),
            max_pages=block_table.shape[1],
            table_stride=block_table.strides[0] if batch > 1 else block_table.shape[1],
            parts=parts,
        )

    @property
    def group(self) -> int:
        """Query heads of one kv head."""
        return self.h_q // self.h_kv

    @property
    def rows(self) -> int:
        """Query rows of one kv head."""
        return self.s_q * self.group

    @property
    def slabs(self) -> int:
        _, position, head, _ = self.q_strides
        even = self.h_kv == 1 and position == self.h_q * head
        return 1 if even or self.s_q == 1 else self.s_q

    @property
    def slab_rows(self) -> int:
        return self.rows // self.slabs

    @property
    def slab_blocks(self) -> int:
        """Row blocks of a slab."""
        return ceil_div(self.slab_rows, ROWS_PER_BLOCK)

    @property
    def row_blocks(self) -> int:
        """Row blocks of all kv heads: thread blocks of a part."""
        return self.h_kv * self.slabs * self.slab_blocks

    @property
    def partial_slots(self) -> int:
        """At most so many pieces of split requests: a part holds the end of one request and the
        beginning of another."""
        return 2 * (self.parts - 1)

    # Scratch holds the partial results, out [slots, s_q * h_q, 512] and, of each row, 16 bytes
    # with its lse and scales (merge.cuh), and then a 64-bit word for every thread block
    # (sm90_pair.cuh).

    @property
    def out_partial_bytes(self) -> int:
        return self.partial_rows * HEAD_DIM_V * 4

    @property
    def partial_bytes(self) -> int:
        """With row_partial."""
        return self.out_partial_bytes + self.partial_rows * 16

    @property
    def partial_rows(self) -> int:
        return self.partial_slots * self.s_q * self.h_q

    @property
    def pair_words(self) -> int:
        return self.parts * self.row_blocks if self.partial_slots else 0

    @property
    def scratch_floats(self) -> int:
        return self.partial_bytes // 4 + 2 * self.pair_words


class Addresses(NamedTuple):
    """Where the arrays of one decode launch are; those after the first two are parameters of
    dense_decode, in its order."""

    q: int
    k_cache: int
    tile_scheduler_metadata: int
    cache_seqlens: int
    block_table: int
    out: int
    lse: int
    scratch: int
