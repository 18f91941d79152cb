"""The table of kernels: what each is compiled for, how it is launched, and its parameters.

Compiling, the disk cache, `warmup`, `info`, launching and the tests of the machine code all read
it. A further dtype, page size or architecture of a kernel is a change of its row, and a further
kernel is a row and a file of cuda_src.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

from .gather_kernels import GATHERING
from .kernel import DECODE_FIELDS
from .kernel import Kernel as Kernel
from .parameters import Parameters

USUAL_ARCH = "sm_90a"  # of Hopper GPUs; names of variants leave it out
DTYPES = {"bfloat16": "bf16", "float16": "fp16"}  # of q and k_cache; as names of kernels have them


DECODE_PARAMETERS = Parameters(
    DECODE_FIELDS,
    as_struct=True,
    tensor_maps=4,  # of q and of k_cache, two each
)

DENSE_DECODE = Kernel(
    "dense_decode",
    "sm90_dense_decode.cu",
    ("sm_90a",),
    384,
    DECODE_PARAMETERS,
    shared_bytes=232304,  # SHARED_BYTES
    dtypes=("bfloat16", "float16"),
    page_sizes=(64, 32, 16),
    registers=168,  # 384 threads of a block; setmaxnreg shares them out anew by role
    spill_bytes=64,
    mma_loops=2,  # Q K^T with softmax, and P V
)

FEW_ROWS_DECODE = Kernel(
    "few_rows_decode",
    "sm90_few_rows_decode.cu",
    ("sm_90a",),
    384,
    DECODE_PARAMETERS,
    shared_bytes=114968,  # SHARED_BYTES
    dtypes=("bfloat16", "float16"),
    page_sizes=(64, 32, 16),
    registers=168,
    mma_loops=2,  # Q K^T with softmax, and P V
)

COMBINE = Kernel(
    "combine",
    "combine.cu",
    ("sm_90a",),
    256,
    Parameters(
        """
        pointer tile_scheduler_metadata, out_partial, row_partial, out, lse, pairs
        int words, batch, s_q, h_q, group, slots, parts, slab_rows
        """
    ),
    dtypes=("bfloat16", "float16"),
)

SCHEDULE = Kernel(
    "schedule",
    "schedule.cu",
    ("sm_90a",),
    32,
    Parameters(
        """
        pointer cache_seqlens
        int batch, parts, most_tiles, shift, step
        float tile_longer
        int piece_memory, split_time, pair_time
        pointer tile_scheduler_metadata, num_splits
        """
    ),
    shared_bytes=65540,  # MOST_SHARED_BYTES of schedule/split.py
    registers=64,
)

APPEND = Kernel(
    "append",
    "append.cu",
    ("sm_90a",),
    256,
    Parameters(
        """
        pointer rows, slot_mapping, pool, cos, sin, positions
        int64 layer_stride, batch_stride, token_stride, head_stride
        int64 pool_layer_stride, page_stride, slot_stride, pool_head_stride
        int64 slots, num_positions
        int vectors, heads, tokens, total, page_size_log2, interleaved, rotary_blocks
        """
    ),
    dtypes=("bfloat16", "float16"),
    registers=64,
)

COPY_PAGES = Kernel(
    "copy_pages",
    "copy_pages.cu",
    ("sm_90a",),
    256,
    Parameters(
        """
        pointer pool, pages
        int64 layer_stride, page_stride, slot_stride, head_stride
        int vectors, heads, page_size, copies
        """
    ),
    registers=64,
)

UPDATE_TABLES = Kernel(
    "update_tables",
    "update_tables.cu",
    ("sm_90a",),
    256,
    Parameters(
        """
        pointer staged, slot_mapping, cache_seqlens, block_table
        int slots, lengths, changes
        """
    ),
    registers=32,
)

ROWS_PER_BLOCK_OF_FEW = 16  # query rows of a block of few_rows_decode

KERNELS = (
    DENSE_DECODE,
    FEW_ROWS_DECODE,
    COMBINE,
    SCHEDULE,
    APPEND,
    COPY_PAGES,
    UPDATE_TABLES,
    *GATHERING,
)


def kernel_of(name: str, arch: str) -> Kernel:
    """The row of a kernel for an architecture. Raises ValueError."""
    for kernel in KERNELS:
        if kernel.name == name and arch in kernel.archs:
            return kernel
    known = ", ".join(f"{kernel.name} for {' and '.join(kernel.archs)}" for kernel in KERNELS)
    raise ValueError(f"Variant: kernel: expected one of {known}, got {name!r} for {arch!r}.")


@dataclass(frozen=True)
class Variant:
    """One kernel to compile: a name of the table, and one of each of the choices in its row; None
    where it has none, so that equal kernels are equal variants. Anything else is a ValueError."""

    kernel: str
    dtype: str | None = None
    page_size: int | None = None
    arch: str = USUAL_ARCH

    def __post_init__(self) -> None:
        row = self.row
        for name, choices in (("dtype", row.dtypes), ("page_size", row.page_sizes)):
            got = getattr(self, name)
            if got not in (choices or (None,)):
                raise ValueError(
                    f"Variant: {name} of {self.kernel}: expected {choices or None}, got {got!r}."
                )

    @property
    def row(self) -> Kernel:
        return kernel_of(self.kernel, self.arch)

    @property
    def name(self) -> str:
        """For people: "dense_decode_bf16_p64", "combine_fp16", "schedule"."""
        dtype = "" if self.dtype is None else f"_{DTYPES[self.dtype]}"
        page = "" if self.page_size is None else f"_p{self.page_size}"
        arch = "" if self.arch == USUAL_ARCH else f"_{self.arch}"
        return f"{self.kernel}{dtype}{page}{arch}"

    @property
    def source(self) -> str:
        """File name in cuda_src."""
        return self.row.source

    @property
    def entry(self) -> str:
        """Name of the `extern "C"` kernel function."""
        return self.kernel

    @property
    def macros(self) -> tuple[str, ...]:
        """The NVRTC options that select this variant of its source."""
        dtype = () if self.dtype is None else (f"-DDTYPE_{DTYPES[self.dtype].upper()}",)
        page = () if self.page_size is None else (f"-DPAGE_SIZE={self.page_size}",)
        return (*(f"-D{name}" for name in self.row.defines), *dtype, *page)

    def serves(self, dtype: str, page_size: int) -> bool:
        """Whether calls with a k_cache of this dtype and page size launch it."""
        if self.dtype not in (None, dtype):
            return False
        return self.page_size in (None, min(page_size, max(self.row.page_sizes, default=0)))


def all_variants() -> tuple[Variant, ...]:
    """Every variant that the library can select."""
    return tuple(
        Variant(kernel.name, dtype, size, arch)
        for kernel in KERNELS
        for arch, dtype, size in product(
            kernel.archs, kernel.dtypes or (None,), kernel.page_sizes or (None,)
        )
    )


@cache
def select(kernel: str, arch: str, dtype: str, page_size: int) -> Variant:
    """The variant of a kernel that calls with such a k_cache launch. Raises ValueError."""
    row = kernel_of(kernel, arch)
    return Variant(
        kernel,
        dtype if row.dtypes else None,
        min(page_size, max(row.page_sizes)) if row.page_sizes else None,
        arch,
    )


def decode_kernel(slab_rows: int) -> Kernel:
    """The kernel that decodes calls with so many query rows of a slab (geometry.py), of any dtype
    and page size: few_rows_decode where they fit one of its blocks, else dense_decode."""
    return FEW_ROWS_DECODE if slab_rows <= ROWS_PER_BLOCK_OF_FEW else DENSE_DECODE
