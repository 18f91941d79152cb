"""What the table of kernels says of one."""

from __future__ import annotations

from dataclasses import dataclass

from .parameters import Parameters


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
