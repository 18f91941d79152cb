"""What `flashmla-cupy bench` times: the cases by name, and what each must compute and move.

A case is FlashMLA's: batch, queries a sequence, query heads, cached tokens; one kv head, bfloat16,
pages of 64 or another size, in scattered order. `run` says how a call is timed.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..errors import OptionError
from ..sizes import HEAD_DIM, HEAD_DIM_V, PAGE_SIZES

_ELEMENT = 2  # bytes of a bfloat16

Lengths = int | tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One problem. `spread` says how `length` makes the length of each request: "fixed", "normal"
    (around it, half of it the standard deviation), "uniform" (between two), "given" (each)."""

    name: str
    batch: int
    s_q: int
    h_q: int
    length: Lengths
    spread: str = "fixed"
    causal: bool = False
    page_size: int = 64

    @functools.cached_property
    def lengths(self) -> list[int]:
        if isinstance(self.length, int):
            if self.spread == "fixed":
                return [self.length] * self.batch
            rng, mean = random.Random(0), self.length
            draws = [rng.normalvariate(mean, mean / 2) for _ in range(self.batch)]
            return [int(max(draw, self.s_q, 4)) for draw in draws]
        if self.spread == "uniform":
            rng, (low, high) = random.Random(1), self.length
            return [rng.randint(low, high) for _ in range(self.batch)]
        return list(self.length)

    @property
    def flops(self) -> int:
        """Of the two products, over the keys that each query sees."""
        hidden = [self.s_q - 1 - i if self.causal else 0 for i in range(self.s_q)]
        visible = sum(max(0, n - k) for n in self.lengths for k in hidden)
        return 2 * self.h_q * visible * (HEAD_DIM + HEAD_DIM_V)

    @property
    def nbytes(self) -> int:
        """What must be moved: every cached token, q and out, once."""
        rows = self.batch * self.s_q * self.h_q
        return _ELEMENT * (sum(self.lengths) * HEAD_DIM + rows * (HEAD_DIM + HEAD_DIM_V))


def _cases() -> Iterator[Case]:
    # FlashMLA's performance cases; where s_q is 1, causal or not is the same.
    for s in (4096, 8192, 16384, 32768):
        yield Case(f"flashmla.h128.q1.b128.s{s}v", 128, 1, 128, s, "normal")
        yield Case(f"flashmla.h128.q2.b128.s{s}v", 128, 2, 128, s, "normal")
        yield Case(f"flashmla.h128.q2.b128.s{s}v.causal", 128, 2, 128, s, "normal", True)
    # Few query rows a token: bandwidth-bound.
    for h in (16, 32, 64):
        yield Case(f"mem.h{h}.b128.s4096", 128, 1, h, 4096)
        yield Case(f"mem.h{h}.b64.s16384v", 64, 1, h, 16384, "normal")
    yield Case("mem.h16.b16.s65536", 16, 1, 16, 65536)
    yield Case("mem.h16.b128.s1024", 128, 1, 16, 1024)
    yield Case("mem.h8.b128.s4096", 128, 1, 8, 4096)
    # Many query rows a token: tensor-core-bound.
    for s in (1024, 4096, 8192, 16384, 32768):
        yield Case(f"cmp.h128.q1.b128.s{s}v", 128, 1, 128, s, "normal")
    for s in (4096, 8192, 16384, 32768):
        yield Case(f"cmp.h128.q2.b128.s{s}v", 128, 2, 128, s, "normal", True)
    yield Case("cmp.h128.q4.b64.s8192", 64, 4, 128, 8192, causal=True)
    yield Case("cmp.h128.q1.b132.s8192", 132, 1, 128, 8192)
    yield Case("cmp.h128.q1.b32.s8192", 32, 1, 128, 8192)
    yield Case("cmp.h64.q2.b128.s8192v", 128, 2, 64, 8192, "normal", True)
    yield Case("cmp.h16.q4.b132.s4096", 132, 4, 16, 4096, causal=True)
    # Few requests: latency.
    for h in (128, 16):
        for s in (512, 2048, 8192, 32768, 131072):
            yield Case(f"lat.h{h}.b1.s{s}", 1, 1, h, s)
        yield Case(f"lat.h{h}.b8.s4096v", 8, 1, h, 4096, "normal")
        yield Case(f"lat.h{h}.b32.s1024", 32, 1, h, 1024)
    # Very unequal lengths. ThunderMLA published the last four.
    for h in (128, 16):
        yield Case(f"imb.one_long.h{h}", 64, 1, h, (131072, *[512] * 63), "given")
    yield Case("imb.thunder.b4.h16.q4", 4, 4, 16, (4641, 45118, 1730, 1696), "given", True)
    yield Case("imb.thunder.b1.64k.h16", 1, 1, 16, 65536)
    yield Case("imb.thunder.b64.h16.q4", 64, 4, 16, (256, 1024), "uniform", True)
    yield Case("imb.thunder.b64.s512.q2", 64, 2, 16, 512, causal=True)


CASES = tuple(_cases())
GROUPS = tuple(dict.fromkeys(case.name.partition(".")[0] for case in CASES))


def select(words: Sequence[str]) -> list[Case]:
    """The cases of these groups, or whose name contains one of these words; "all" for all.

    Raises OptionError for a word that selects nothing."""
    chosen: set[Case] = set()
    for word in words:
        key = f"{word}." if word in GROUPS else "" if word == "all" else word
        found = [case for case in CASES if key in case.name]
        if not found:
            remedy = "flashmla-cupy bench --list prints the names."
            expected = f"all, one of {', '.join(GROUPS)}, or a part of a case's name"
            raise OptionError("--cases", expected, repr(word), remedy, "bench")
        chosen.update(found)
    return [case for case in CASES if case in chosen]


def with_page_sizes(cases: Sequence[Case], page_sizes: Sequence[int]) -> list[Case]:
    """Each case with each of these page sizes, which its name then ends with.

    Raises OptionError for a size that the kernels do not have."""
    for page_size in page_sizes:
        if page_size not in PAGE_SIZES:
            expected = f"one of {', '.join(map(str, PAGE_SIZES))}"
            remedy = "Without the option, pages have 64 tokens."
            raise OptionError("--page-size", expected, str(page_size), remedy, "bench")
    return [
        replace(case, name=f"{case.name}.p{page_size}", page_size=page_size)
        for case in cases
        for page_size in page_sizes
    ]


def listing(cases: Sequence[Case]) -> list[str]:
    """A line for each case: its name, and what must be computed and moved."""
    width = max(len(case.name) for case in cases)
    return [
        f"{case.name:{width}}  {case.flops / 1e9:9.1f} GFLOP {case.nbytes / 1e6:8.1f} MB"
        for case in cases
    ]
