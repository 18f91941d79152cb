"""Corrupt tables, corrupt lengths and stale metadata: the request is refused, and nothing else.

For each corruption: the rows of a refused request are NaN in out and lse; those of all others have
the same bits as without it (or lie within the bound, where the schedule became another one); no
byte beside or in an array is written that should not be; check() raises what the reference says
about the first bad request, once.
"""

from __future__ import annotations

import numpy as np
import pytest
from support.gpu import oracle as gpu_oracle
from support.gpu import problems as gpu_problems
from support.gpu.arrays import (
    DRY,
    INT_MAX,
    INT_MIN,
    all_nan,
    bits,
    fill_nan,
    host,
    mark,
    release_memory,
    same,
    xp,
)
from support.gpu.guards import Guards

import flashmla_cupy
from flashmla_cupy import DeviceCheckError, flash_mla_with_kvcache, get_mla_metadata, reference
from flashmla_cupy.schedule.sched_meta import stale_requests

pytestmark = mark

PROBLEMS = 4 if DRY else 20
CORRUPTIONS = 10  # of each problem, so 200 in all
SHAPES = ((1, 16, 1), (1, 128, 1), (2, 128, 1), (3, 12, 3), (1, 8, 2), (5, 3, 1), (70, 1, 1))


class Guarded:
    """A problem all of whose arrays lie between guards."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = np.random.default_rng((9, seed))
        batch = int(rng.integers(2, 6 if DRY else 40))
        lengths = rng.choice([*gpu_problems.EDGES, 500, 1000], batch)
        lengths[rng.integers(batch)] = 300 if DRY else rng.integers(2000, 12_000)
        s_q, h_q, h_kv = SHAPES[seed % (2 if DRY else len(SHAPES))]
        self.problem = p = gpu_problems.make(
            lengths,
            s_q=s_q,
            h_q=h_q // 8 if DRY else h_q,
            h_kv=h_kv,
            page_size=gpu_problems.PAGE_SIZES[seed % 5],
            dtype=("bfloat16", "float16")[seed // 5 % 2],
            causal=bool(seed % 3),
            table_padding=0,
            seed=seed,
        )
        self.guards = guards = Guards()
        p.q, p.k_cache = guards.copy("q", p.q), guards.copy("k_cache", p.k_cache)
        p.block_table = guards.copy("block_table", p.block_table)
        p.cache_seqlens = guards.copy("cache_seqlens", p.cache_seqlens)
        guards.forget("block_table")
        guards.forget("cache_seqlens")
        out, lse = p.outputs()
        self.out = guards.empty("out", out.shape, out.dtype)
        self.lse = guards.empty("lse", lse.shape, lse.dtype)
        self.metadata = self.new_metadata()
        self.good_table, self.good_lengths = p.table.copy(), p.lengths.copy()
        self.decode(self.metadata)
        gpu_oracle.assert_right(p, self.out, self.lse)
        self.good_out, self.good_lse = self.out.copy(), self.lse.copy()
        flashmla_cupy.check()

    def new_metadata(self):
        """Guarded, for the lengths of now."""
        made = self.problem.metadata()
        return [self.guards.copy(f"metadata {i}", x) for i, x in enumerate(made)]

    def decode(self, metadata) -> None:
        fill_nan(self.out)
        fill_nan(self.lse)
        self.problem.decode(metadata, self.out, self.lse)

    def violations(self, stale=None) -> dict[int, DeviceCheckError]:
        """What the reference refuses, by request."""
        p = self.problem
        found = {}
        for b in range(p.batch):
            is_stale = stale is not None and bool(stale[b])
            error = reference.violation(b, p.k_cache, p.table, p.lengths, is_stale)
            if error is not None:
                found[b] = error
        return found

    def verify(self, what: str, metadata, stale=None, bit_equal: bool = True) -> str | None:
        """One call with the arrays as they are; what is wrong with it, if anything."""
        p, refused = self.problem, self.violations(stale)
        self.decode(metadata)
        others = np.array([b for b in range(p.batch) if b not in refused], np.int64)
        index = xp.asarray(np.array(list(refused), np.int64))
        if refused and not all_nan(bits(self.out)[index].view(self.out.dtype)):
            return f"{what}: out of a refused request is not NaN"
        if refused and not all_nan(self.lse[index]):
            return f"{what}: lse of a refused request is not NaN"
        if bit_equal:
            index = xp.asarray(others)
            for name in ("out", "lse"):
                got, good = (bits(getattr(self, prefix + name)) for prefix in ("", "good_"))
                if not same(got[index], good[index]):
                    return f"{what}: {name} of another request has changed"
        else:
            report = gpu_oracle.check(p, self.out, self.lse, others, what)
            if report.wrong:
                return report.wrong
        changed = self.guards.changed()
        if changed:
            return f"{what}: written {changed}"
        if not np.array_equal(host(p.block_table), p.table):
            return f"{what}: block_table was written"
        if not np.array_equal(host(p.cache_seqlens), p.lengths):
            return f"{what}: cache_seqlens was written"
        return self._raised(what, refused)

    def _raised(self, what: str, refused: dict[int, DeviceCheckError]) -> str | None:
        """check() raises the first, then nothing."""
        expected = refused[min(refused)].args if refused else None
        raised = []
        for _ in range(2):
            try:
                flashmla_cupy.check()
                raised.append(None)
            except DeviceCheckError as error:
                raised.append(error.args)
        if raised != [expected, None]:
            return f"{what}: check() raised {raised}, expected {expected} and then nothing"
        return None


def collect(test, problems: int = PROBLEMS) -> None:
    """Runs test(guarded, round) for all problems and corruptions."""
    failures, count = [], 0
    for seed in range(problems):
        release_memory()
        guarded = Guarded(seed)
        for number in range(CORRUPTIONS):
            failures.append(test(guarded, f"problem {seed}, corruption {number}"))
            count += 1
    failures = [failure for failure in failures if failure is not None]
    print(f"\n{count} corruptions, {len(failures)} failures")
    assert not failures, f"{len(failures)} of {count}:\n" + "\n".join(failures[:10])


def test_corrupt_tables():
    def corrupt(g: Guarded, what: str) -> str | None:
        p, rng = g.problem, g.rng
        pages = p.k_cache.shape[0]
        values = (INT_MIN, INT_MAX, -1, pages, pages + 1, -pages, 2**30, 2147480000, 1 << 16)
        values = [value for value in values if not 0 <= value < pages]
        table = g.good_table.copy()
        used = np.argwhere(np.arange(table.shape[1]) < -(-p.lengths[:, None] // p.page_size))
        for at in rng.permutation(used)[: int(rng.integers(1, 5))]:
            table[tuple(at)] = rng.choice(values)
        p.set_table(table)
        problem = g.verify(what, g.metadata)
        p.set_table(g.good_table)
        return problem

    collect(corrupt)


def corrupt_lengths(g: Guarded):
    """Lengths of which some cannot be."""
    p, rng = g.problem, g.rng
    room = p.table.shape[1] * p.page_size
    values = (INT_MIN, INT_MIN + 1, INT_MAX, INT_MAX - 63, -1, -64, room + 1, room + 64, 2**30)
    lengths = g.good_lengths.copy()
    lengths[rng.permutation(p.batch)[: int(rng.integers(1, 4))]] = rng.choice(values)
    return lengths


def test_corrupt_lengths():
    """With the metadata of the good lengths, so that all others are split as before."""

    def corrupt(g: Guarded, what: str) -> str | None:
        g.problem.set_lengths(corrupt_lengths(g))
        problem = g.verify(what, g.metadata)
        g.problem.set_lengths(g.good_lengths)
        return problem

    collect(corrupt)


def test_corrupt_lengths_in_the_schedule_too():
    def corrupt(g: Guarded, what: str) -> str | None:
        g.problem.set_lengths(corrupt_lengths(g))
        problem = g.verify(what, g.problem.metadata(), bit_equal=False)
        g.problem.set_lengths(g.good_lengths)
        return problem

    collect(corrupt)


def test_stale_metadata():
    """Metadata of shorter lengths: who is refused follows from the records, see stale_requests."""

    def corrupt(g: Guarded, what: str) -> str | None:
        p, rng = g.problem, g.rng
        shorter = g.good_lengths.copy()
        chosen = rng.permutation(p.batch)[: int(rng.integers(1, 4))]
        shorter[chosen] = rng.integers(0, shorter[chosen] + 1)
        p.set_lengths(shorter)
        metadata = p.metadata()
        p.set_lengths(g.good_lengths)
        stale = stale_requests(host(metadata[0]), p.lengths)
        return g.verify(what, metadata, stale, bit_equal=False)

    collect(corrupt)


def test_the_next_call_raises_what_an_earlier_one_refused():
    g = Guarded(0)
    p = g.problem
    request = int(np.argmax(p.lengths))
    table = g.good_table.copy()
    table[request, 0] = INT_MAX
    p.set_table(table)
    g.decode(g.metadata)
    host(g.out)  # waits: the device has reported
    p.set_table(g.good_table)
    with pytest.raises(DeviceCheckError) as raised:
        g.decode(g.metadata)
    assert raised.value.args == (request, 0, "page id")
    g.decode(g.metadata)
    assert same(g.out, g.good_out)
    flashmla_cupy.check()


def test_huge_lengths_take_no_longer():
    """Lengths of 2^31 - 1 are refused before they are walked through."""
    p = gpu_problems.make([300] * 4, h_q=16)
    out, lse = p.outputs()
    p.set_lengths([INT_MAX] * 4)
    metadata = get_mla_metadata(p.cache_seqlens, p.rows, p.h_kv)
    options = {"causal": False, "out": out, "lse": lse}
    arrays = (p.q, p.k_cache, p.block_table, p.cache_seqlens, 512)
    if not DRY:
        begin, end = xp.cuda.Event(), xp.cuda.Event()
        flash_mla_with_kvcache(*arrays, *metadata, **options)  # compiles
        with pytest.raises(DeviceCheckError):
            flashmla_cupy.check()
        begin.record()
    flash_mla_with_kvcache(*arrays, *metadata, **options)
    if not DRY:
        end.record()
        end.synchronize()
        assert xp.cuda.get_elapsed_time(begin, end) < 100  # ms; 2^31 tokens would take seconds
    assert all_nan(out)
    assert all_nan(lse)
    with pytest.raises(DeviceCheckError):
        flashmla_cupy.check()
