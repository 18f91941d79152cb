"""Negative controls: the tests of this folder fail when a result is wrong, and say what is."""

from __future__ import annotations

import contextlib

import numpy as np
import test_fail_closed
import test_grid
import test_needles
from support.gpu import oracle as gpu_oracle
from support.gpu import problems as gpu_problems
from support.gpu.arrays import bits, mark, xp

import flashmla_cupy

pytestmark = mark


def test_the_grid_finds_mistakes():
    case = test_grid.Case(3, 2, 140, 9, 3, is_causal=True)
    problem = test_grid.problem_of(case)
    out, lse = gpu_oracle.rounded_answer(problem)
    assert test_grid.worst_error(problem, out, lse) < 0.1
    for name, at, flip in (("out", (2, 1, 8, 511), 0x4000), ("lse", (0, 3, 1), 0x10000)):
        wrong = {"out": out.copy(), "lse": lse.copy()}
        bits(wrong[name])[at] ^= flip
        assert test_grid.worst_error(problem, **wrong) > 1, name
    bits(lse)[1, 0, 0] = 0x7F800000  # +inf, as if no key were seen
    assert test_grid.worst_error(problem, out, lse) == np.inf


def test_needles_find_mistakes():
    settings = {**test_needles.settings_of(0), "lengths": [200, 70, 1], "causal": True, "s_q": 4}
    problem = gpu_problems.make(**settings)
    haystack = test_needles.Haystack(problem, np.random.default_rng(0))
    assert haystack.finds.max() > 2
    assert (haystack.finds[2, :3] == -1).all()  # queries of a request of one token
    assert (haystack.finds[2, 3] >= 0).all()
    found = xp.asarray(haystack.finds)
    out = xp.ascontiguousarray(bits(haystack.rows)[found][..., :512]).view(problem.q.dtype)
    scale = problem.softmax_scale or 576**-0.5
    scores = np.array([*haystack.strength, np.inf]) * scale * 64 * 256
    lse = xp.asarray(scores[haystack.finds].swapaxes(1, 2).astype(np.float32))
    assert [int(x) for x in haystack.mistakes(out, lse)] == [0, 0]
    bits(out)[1, 0, 0, 5] ^= 1  # the last bit of one element
    lse[0, 0, 0] *= 1.00001
    assert [int(x) for x in haystack.mistakes(out, lse)] == [1, 1]


def test_fail_closed_finds_mistakes(monkeypatch):
    guarded = test_fail_closed.Guarded(0)
    decode = test_fail_closed.Guarded.decode
    problem, table = guarded.problem, guarded.good_table.copy()
    request = int(np.argmax(problem.lengths))
    other = 0 if request else 1
    table[request, 0] = -1
    problem.set_table(table)
    assert guarded.verify("right", guarded.metadata) is None

    def outcome(mistake):
        def wrong(self, metadata):
            decode(self, metadata)
            mistake()

        monkeypatch.setattr(test_fail_closed.Guarded, "decode", wrong)
        said = guarded.verify("wrong", guarded.metadata)
        with contextlib.suppress(flashmla_cupy.DeviceCheckError):
            flashmla_cupy.check()
        return said

    def forgets():
        with contextlib.suppress(flashmla_cupy.DeviceCheckError):
            flashmla_cupy.check()

    assert "not NaN" in outcome(lambda: bits(guarded.out)[request].fill(0))
    assert "not NaN" in outcome(lambda: bits(guarded.lse)[request].fill(0))
    assert "another request" in outcome(lambda: bits(guarded.out)[other].fill(1))
    assert "check() raised" in outcome(forgets)
    assert "table was written" in outcome(lambda: problem.block_table[other].fill(3))
    problem.set_table(table)
    guarded.guards._rooms[0][1][0] = 0
    assert "before q" in outcome(lambda: None)
