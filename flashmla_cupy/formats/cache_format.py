"""CacheFormat: where the numbers of a token lie in the bytes of a page.

A cache is [num_pages, page_size, h_kv, width], and its format follows from the width and the dtype:

    name          width  bytes  d_qk  one token
    bfloat16        576   1152   576  512 latent and 64 rotary columns, side by side
    float16         576   1152   576  the same
    bfloat16_512    512   1024   512  448 and 64
    float16_512     512   1024   512  the same
    v32             656    656   576  512 e4m3 | 4 float32 scales, one for 128 columns | 64 bfloat16
    e4m3            576    576   576  512 and 64 e4m3; one float32 for all tokens is an argument
    v4              584    584   512  448 e4m3 | 64 bfloat16 || 7 e8m0 scales, one for 64 columns,
                                      and a byte that means nothing

v32 is the cache of DeepSeek-V3.2 ("fp8_ds_mla"), v4 that of DeepSeek-V4; both are FlashMLA's, whose
tests (tests/quant.py) and README describe them. Caches of bytes have one kv head, and any of the
dtypes uint8, int8 and float8_e4m3fn.

In v4 the scales of a page lie behind all of its rows: a page of n tokens is n rows of 576 bytes,
then n times 8 bytes. Its array has the width 584 all the same, so that page_size * width bytes
make a page; a row of that array is not a token. New pages are padded to a multiple of 576 bytes.

The value of an e4m3 column is its number times the scale of its group: exact in float64. A scale of
e8m0 with the byte b is 2^(b - 127), and NaN where b is 255 (OCP Microscaling Formats, version 1.0,
5.4.1). V is the first 512 columns: in formats of 512 columns all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..sizes import HEAD_DIM_V

BYTES = ("uint8", "int8", "float8_e4m3fn")  # dtypes of a cache of bytes
ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1, "float8_e8m0fnu": 1}


@dataclass(frozen=True)
class Columns:
    """Neighbouring columns of a token that are stored alike."""

    count: int
    dtype: str
    offset: int  # of the first one in the row, in bytes

    @property
    def nbytes(self) -> int:
        return self.count * ITEMSIZES[self.dtype]


@dataclass(frozen=True)
class Scales:
    """The scales of a token's latent columns, one for each group of neighbours."""

    count: int
    group: int  # columns of one scale
    dtype: str
    nbytes: int  # of a token, with what means nothing
    offset: int | None  # in the row, in bytes; None: behind all rows of the page


@dataclass(frozen=True)
class CacheFormat:
    """One format; FORMATS holds them all, and `format_of` finds that of an array."""

    name: str
    dtypes: tuple[str, ...]  # of the array; the first is what new arrays have
    width: int  # of the array's last axis, in elements
    nope: Columns  # the latent columns without rotary embedding, from 0 on
    rope: Columns  # the rotary columns, which follow them
    scales: Scales | None = None
    page_multiple: int = 1  # of bytes: what new pages are padded to

    @property
    def d_qk(self) -> int:
        """Columns of a key, and of a query."""
        return self.nope.count + self.rope.count

    @property
    def is_fp8(self) -> bool:
        """Whether the latent columns are e4m3: what is_fp8_kvcache says."""
        return self.nope.dtype == "float8_e4m3fn"

    @property
    def has_descale(self) -> bool:
        """Whether one scale for the whole cache, descale_k, comes beside it."""
        return self.is_fp8 and self.scales is None

    @property
    def token_bytes(self) -> int:
        """Bytes of a token, its scales included."""
        return self.row_bytes + self.tail_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes between the rows of neighbouring tokens of a page."""
        return self.rope.offset + self.rope.nbytes

    @property
    def tail_bytes(self) -> int:
        """Bytes a token behind the rows of its page."""
        behind = self.scales is not None and self.scales.offset is None
        return self.scales.nbytes if self.scales is not None and behind else 0

    def page_bytes(self, page_size: int) -> int:
        """Bytes of a new page, padding included."""
        multiple = self.page_multiple
        return -(-page_size * self.token_bytes // multiple) * multiple

    def __repr__(self) -> str:
        return f"CacheFormat({self.name!r}, {self.token_bytes} bytes a token, d_qk {self.d_qk})"


def _plain(dtype: str, nope: int) -> CacheFormat:
    """Latent and 64 rotary columns of a 16-bit dtype side by side."""
    name = dtype if nope == HEAD_DIM_V else f"{dtype}_{nope + 64}"
    return CacheFormat(
        name, (dtype,), nope + 64, Columns(nope, dtype, 0), Columns(64, dtype, 2 * nope)
    )


BFLOAT16 = _plain("bfloat16", 512)
FLOAT16 = _plain("float16", 512)
BFLOAT16_512 = _plain("bfloat16", 448)
FLOAT16_512 = _plain("float16", 448)
V32 = CacheFormat(
    "v32",
    BYTES,
    656,
    Columns(512, "float8_e4m3fn", 0),
    Columns(64, "bfloat16", 528),
    Scales(4, 128, "float32", 16, 512),
)
E4M3 = CacheFormat(
    "e4m3",
    BYTES,
    576,
    Columns(512, "float8_e4m3fn", 0),
    Columns(64, "float8_e4m3fn", 512),
)
V4 = CacheFormat(
    "v4",
    BYTES,
    584,
    Columns(448, "float8_e4m3fn", 0),
    Columns(64, "bfloat16", 448),
    Scales(7, 64, "float8_e8m0fnu", 8, None),
    page_multiple=576,
)

FORMATS = {
    format.name: format for format in (BFLOAT16, FLOAT16, BFLOAT16_512, FLOAT16_512, V32, E4M3, V4)
}
_by_array = {
    (dtype, format.width): format for format in FORMATS.values() for dtype in format.dtypes
}


def format_of(dtype: str, width: int) -> CacheFormat | None:
    """The format of a cache of this dtype whose last axis has `width` elements; None: there is
    none."""
    return _by_array.get((dtype, width))
