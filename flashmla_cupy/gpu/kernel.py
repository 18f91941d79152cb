"""What the table of kernels says of one."""

from __future__ import annotations

from dataclasses import dataclass

from .parameters import Parameters

# The fields of struct Params (sm90_pieces.cuh) that all decode kernels have.
DECODE_FIELDS = """
    pointer tile_scheduler_metadata, cache_seqlens, block_table, out, lse
    pointer out_partial, row_partial, pairs
    uint64 epoch
    pointer refusal, refused
    int64 table_stride
    int batch, s_q, h_q, group, slab_rows, blocks, num_pages, page_tiles_log2, max_length
    int slots, causal, border_tiles
    float scale_log2
    """


@dataclass(frozen=True)
class Kernel:
    """A kernel of cuda_src. Its name is that of its `extern "C"` function."""

    name: str
    source: str  # file name in cuda_src
    archs: tuple[str, ...]
    threads: int  # of a block; a launch of schedule says how many
    parameters: Parameters
    shared_bytes: int = 0  # dynamic shared memory, at most
    dtypes: tuple[str, ...] = ()  # (): the same code for all
    page_sizes: tuple[int, ...] = ()  # tokens; the largest stands for all above, (): as above
    defines: tuple[str, ...] = ()  # macros that select this kernel of its source
    # What ptxas may use of a thread's registers, and spill in bytes: more is a fault of the code.
    registers: int = 128
    spill_bytes: int = 0
    mma_loops: int = 0  # innermost loops with matrix instructions
