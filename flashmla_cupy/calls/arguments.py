"""The arguments of every call that computes, in one table a call.

Whatever handles the arrays of a call follows from its table: the order of its tuples of arrays and
of addresses, the alignment of each, which are written, the schema of the PyTorch op, the operands
of the JAX op and which of them jax.vmap may map. A new array is a row here, its check in `checks`
and its use. A tuple of arrays may end before the table does, with the last one that the call has.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import NoneType
from typing import Any, Literal

from ..sizes import HEAD_DIM, HEAD_DIM_ROPE, HEAD_DIM_V, METADATA_COLUMNS

# input: every call has it. schedule: the call makes it if it was given a SchedMeta. optional: calls
# may lack it. output: written; the call makes it unless the caller gave one.
Role = Literal["input", "schedule", "optional", "output"]

FLOATS = ("bfloat16", "float16")
E4M3 = ("float8_e4m3fn",)
BYTES = ("uint8", "int8", "float8_e4m3fn")  # of an FP8 cache
INT32 = ("int32",)
INT64 = ("int64",)
FLOAT32 = ("float32",)


def out_dtype(q_dtype: str) -> str:
    """Of out: that of q; bfloat16 for queries of a dtype that no result is of."""
    return q_dtype if q_dtype in FLOATS else "bfloat16"


@dataclass(frozen=True)
class Array:
    """An array of a call."""

    name: str
    axes: tuple[str | int, ...]  # what each axis counts, or how long it is
    dtypes: tuple[str, ...]  # those it may have
    alignment: int  # of its address, in bytes: 16 where a kernel moves 16 bytes at a time
    role: Role = "input"
    may_lack_axes: int = 0  # so many of the last ones

    @property
    def shape(self) -> str:
        """For people: "[batch, s_q, h_q, 576]"."""
        return f"[{', '.join(map(str, self.axes))}]"

    @property
    def is_batched(self) -> bool:
        """Whether its first axis is the batch, so that jax.vmap may fold another axis into it."""
        return self.axes[0] == "batch"


@dataclass(frozen=True)
class Option:
    """An argument that is no array."""

    name: str
    types: tuple[type, ...]  # the usual ones: 1, 1.0 and True are equal, and no key together
    schema: str = ""  # its type in the PyTorch op; "": the op does without


@dataclass(frozen=True)
class Table:
    """The arguments of one public function."""

    function: str
    arrays: tuple[Array, ...]
    options: tuple[Option, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(array.name for array in self.arrays)

    @cached_property
    def alignments(self) -> tuple[int, ...]:
        return tuple(array.alignment for array in self.arrays)

    @cached_property
    def outputs(self) -> tuple[int, ...]:
        """The positions of the outputs."""
        return tuple(i for i, array in enumerate(self.arrays) if array.role == "output")

    @cached_property
    def usual_types(self) -> frozenset[tuple[type, ...]]:
        """The types of options that may be kept in a key."""
        return frozenset(itertools.product(*(option.types for option in self.options)))

    def named(self, arrays: tuple[Any, ...]) -> dict[str, Any]:
        """The arrays by name, None for each that the call lacks."""
        return dict(itertools.zip_longest(self.names, arrays))

    def ordered(self, named: Mapping[str, Any]) -> tuple[Any, ...]:
        """The arrays in the order of the table, None for each that is not there."""
        return tuple(named.get(name) for name in self.names)

    def __getitem__(self, name: str) -> Array:
        return self.arrays[self.names.index(name)]

    def having(self, *roles: Role) -> tuple[Array, ...]:
        """The arrays of these roles."""
        return tuple(array for array in self.arrays if array.role in roles)

    def schema(self, *, with_outputs: bool) -> str:
        """The arguments of the PyTorch op: what every call has, the options, then what calls may
        lack and, if they are given to the op, the outputs."""
        arguments = [f"Tensor {array.name}" for array in self.having("input", "schedule")]
        arguments += [f"{option.schema} {option.name}" for option in self.options if option.schema]
        default = "" if with_outputs else "=None"  # nothing without one may follow
        arguments += [f"Tensor? {array.name}{default}" for array in self.having("optional")]
        if with_outputs:
            written = zip("abcdefgh", self.having("output"), strict=False)
            arguments += [f"Tensor({letter}!) {array.name}" for letter, array in written]
        return ", ".join(arguments)


DECODE = Table(
    "flash_mla_with_kvcache",
    (
        Array("q", ("batch", "s_q", "h_q", HEAD_DIM), FLOATS, 16),
        Array("k_cache", ("num_pages", "page_size", "h_kv", HEAD_DIM), FLOATS, 16),
        Array("block_table", ("batch", "max_pages"), INT32, 4),
        Array("cache_seqlens", ("batch",), INT32, 4),
        Array("tile_scheduler_metadata", ("num_sm_parts", METADATA_COLUMNS), INT32, 16, "schedule"),
        Array("num_splits", ("batch + 1",), INT32, 4, "schedule"),
        Array("out", ("batch", "s_q", "h_q", HEAD_DIM_V), FLOATS, 16, "output"),
        Array("lse", ("batch", "h_q", "s_q"), ("float32",), 4, "output"),
    ),
    (
        Option("head_dim_v", (int,)),
        Option("softmax_scale", (NoneType, float), "float"),
        Option("causal", (bool,), "bool"),
        Option("is_lazy", (bool,)),  # the metadata is a SchedMeta, and not among the arrays
    ),
)

METADATA = Table(
    "get_mla_metadata",
    (DECODE["cache_seqlens"],),
    (
        Option("num_q_tokens_per_head_k", (int,), "SymInt"),
        Option("num_heads_k", (int,), "int"),
        Option("num_heads_q", (NoneType, int)),
    ),
)

# FP8 caches and lists of tokens. A cache is of the formats.CacheFormat that its last axis and dtype
# say; d_qk is that of the format.

_SCHEDULE = DECODE.having("schedule")
_DESCALES = (
    Array("descale_q", (1,), FLOAT32, 4, "optional"),
    Array("descale_k", (1,), FLOAT32, 4, "optional"),
)
_OUT, _LSE = DECODE.having("output")

FP8_DECODE = Table(
    "flash_mla_with_kvcache",
    (
        Array("q", ("batch", "s_q", "h_q", "d_qk"), FLOATS + E4M3, 16),
        Array("k_cache", ("num_pages", "page_size", 1, "width"), BYTES, 16),
        DECODE["block_table"],
        DECODE["cache_seqlens"],
        *_SCHEDULE,
        *_DESCALES,
        _OUT,
        _LSE,
    ),
    (
        Option("head_dim_v", (int,)),
        Option("softmax_scale", (NoneType, float), "float"),
        Option("causal", (bool,), "bool"),
        Option("wide_fp8", (bool,), "bool"),
        Option("is_lazy", (bool,)),
    ),
)

SPARSE_DECODE = Table(
    "flash_mla_with_kvcache",
    (
        Array("q", ("batch", "s_q", "h_q", "d_qk"), FLOATS + E4M3, 16),
        Array("k_cache", ("num_pages", "page_size", 1, "width"), FLOATS + BYTES, 16),
        Array("indices", ("batch", "s_q", "topk"), INT32, 4),
        *_SCHEDULE,
        Array("topk_length", ("batch", "s_q"), INT32, 4, "optional", may_lack_axes=1),
        Array("attn_sink", ("h_q",), FLOAT32, 4, "optional"),
        Array(
            "extra_k_cache",
            ("extra_num_pages", "extra_page_size", 1, "width"),
            FLOATS + BYTES,
            16,
            "optional",
        ),
        Array("extra_indices_in_kvcache", ("batch", "s_q", "extra_topk"), INT32, 4, "optional"),
        Array("extra_topk_length", ("batch", "s_q"), INT32, 4, "optional", may_lack_axes=1),
        *_DESCALES,
        _OUT,
        _LSE,
    ),
    (
        Option("head_dim_v", (int,)),
        Option("softmax_scale", (NoneType, float), "float"),
        Option("is_fp8_kvcache", (bool,), "bool"),
        Option("wide_fp8", (bool,), "bool"),
        Option("is_lazy", (bool,)),
    ),
)

SPARSE_METADATA = Table(
    "get_mla_metadata",
    (
        DECODE["cache_seqlens"],  # of which only the batch counts
        *(SPARSE_DECODE[name] for name in ("topk_length", "extra_topk_length")),
        *(dataclasses.replace(array, role="output") for array in _SCHEDULE),
    ),
    (
        Option("num_q_tokens_per_head_k", (int,), "SymInt"),
        Option("num_heads_k", (int,), "int"),
        Option("num_heads_q", (int,), "int"),
        Option("topk", (int,), "SymInt"),
        Option("extra_topk", (int,), "SymInt"),
    ),
)

SPARSE_PREFILL = Table(
    "flash_mla_sparse_fwd",
    (
        Array("q", ("s_q", "h_q", "d_qk"), FLOATS, 16),
        Array("kv", ("s_kv", 1, "d_qk"), FLOATS, 16),
        Array("indices", ("s_q", 1, "topk"), INT32, 4),
        Array("attn_sink", ("h_q",), FLOAT32, 4, "optional"),
        Array("topk_length", ("s_q",), INT32, 4, "optional"),
        Array("out", ("s_q", "h_q", HEAD_DIM_V), FLOATS, 16, "output"),
        Array("max_logits", ("s_q", "h_q"), FLOAT32, 4, "output"),
        Array("lse", ("s_q", "h_q"), FLOAT32, 4, "output"),
    ),
    (Option("sm_scale", (float,), "float"), Option("d_v", (int,))),
)

SPARSE_PREFILL_PAGED = Table(  # the same over a paged cache of any CacheFormat
    "flash_mla_sparse_fwd",
    (
        Array("q", ("s_q", "h_q", "d_qk"), FLOATS + E4M3, 16),
        Array("kv", ("num_pages", "page_size", 1, "width"), FLOATS + BYTES, 16),
        SPARSE_PREFILL["indices"],
        *SPARSE_PREFILL.having("optional"),
        *_DESCALES,
        *SPARSE_PREFILL.having("output"),
    ),
    (
        Option("sm_scale", (float,), "float"),
        Option("d_v", (int,)),
        Option("wide_fp8", (bool,), "bool"),
    ),
)

_ANGLES = ("num_positions", HEAD_DIM_ROPE // 2)

APPEND = Table(
    "append_mla_kv",
    (
        Array("rows", ("n", "h_kv", HEAD_DIM), FLOATS, 16),
        Array("slot_mapping", ("n",), INT64, 8),
        Array("cos", _ANGLES, FLOAT32, 16, "optional"),
        Array("sin", _ANGLES, FLOAT32, 16, "optional"),
        Array("positions", ("n",), INT64, 8, "optional"),
        Array("k_cache", ("num_pages", "page_size", "h_kv", HEAD_DIM), FLOATS, 16, "output"),
    ),
    (Option("interleaved", (bool,), "bool"),),
)
