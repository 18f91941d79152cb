"""Sparse attention's query tokens as requests of the split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmla_cupy.schedule.lists import list_lengths, longest
from flashmla_cupy.schedule.sched_meta import stale_requests
from flashmla_cupy.schedule.split import plan
from flashmla_cupy.schedule.view import Schedule
from flashmla_cupy.sizes import num_sm_parts


def test_without_lengths_every_query_token_has_topk():
    got = list_lengths(2, 3, 100)
    assert got.dtype == np.int32
    assert got.tolist() == [100] * 6


def test_lengths_of_requests_and_of_query_tokens():
    of_requests = np.array([5, 0], np.int32)
    assert list_lengths(2, 3, 10, of_requests).tolist() == [5, 5, 5, 0, 0, 0]
    of_tokens = np.array([[1, 2, 3], [4, 5, 10]], np.int32)
    assert list_lengths(2, 3, 10, of_tokens).tolist() == [1, 2, 3, 4, 5, 10]


@pytest.mark.parametrize(("topk", "extra"), [(1, 0), (64, 1), (65, 70), (2**31 - 64, 63)])
def test_the_longest_is_that_of_full_lists(topk, extra):
    assert list_lengths(1, 1, topk, None, extra).tolist() == [longest(topk, extra)]


def test_no_request_has_no_lengths():
    for length in (np.zeros(0, np.int32), np.zeros((0, 3), np.int32)):
        assert list_lengths(0, 3, 10, length, 7, length).shape == (0,)


@pytest.mark.parametrize("length", [-1, 11, 2**31 - 1, -(2**31)])
def test_a_length_outside_its_list_counts_as_none(length):
    assert list_lengths(2, 1, 10, np.array([length, 3], np.int32)).tolist() == [0, 3]


def test_a_second_list_begins_with_a_new_tile():
    main, extra = np.array([0, 1, 64, 65], np.int32), np.array([3, 0, 70, 1], np.int32)
    got = list_lengths(4, 1, 128, main, 70, extra)
    assert got.tolist() == [3, 64, 134, 129]
    assert list_lengths(1, 2, 100, None, 7).tolist() == [135, 135]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 500), st.integers(1, 128), st.data())
def test_the_split_covers_every_list_once(batch, s_q, topk, h_q, data):
    length = np.array(
        data.draw(st.lists(st.integers(0, topk), min_size=batch, max_size=batch)), np.int32
    )
    lengths = list_lengths(batch, s_q, topk, length)
    parts = num_sm_parts(132, h_q, 1)
    metadata, num_splits = plan(lengths, parts, h_q, 1)
    assert num_splits.shape == (batch * s_q + 1,)
    assert not stale_requests(metadata, lengths).any()
    covered = np.zeros(batch * s_q, int)
    for piece in Schedule(metadata, num_splits, lengths).pieces:
        covered[piece.request] += piece.end - piece.begin
    assert (covered == -(-lengths // 64)).all()
    other = lengths.copy()
    other[-1] += 64
    assert stale_requests(metadata, other).tolist() == [False] * (batch * s_q - 1) + [True]
