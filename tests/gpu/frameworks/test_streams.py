"""The right stream, and the right order from one framework to another.

Right order gives the result for the q that was written. The negative control takes q over without
ordering and must see something else, or the test proves nothing.
"""

from __future__ import annotations

import itertools
import time

import pytest
from support.every_framework import DELAY_MS, GPU_FRAMEWORKS, decode, get, in_threads, same_bits
from support.gpu.sides import (
    PROBLEM,
    SIDES,
    CupySide,
    Foreign,
    TorchSide,
    arrays_of,
    cupy,
    handed_over,
)
from support.problems import make_problem

from flashmla_cupy import flash_mla_with_kvcache, get_mla_metadata

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("source", "to"), [*itertools.permutations(GPU_FRAMEWORKS, 2)])
def test_order_from_one_framework_to_another(source, to, sleep):
    pytest.importorskip(source)
    pytest.importorskip(to)
    producer, consumer = SIDES[source](), SIDES[to]()
    handed_over(producer, consumer, sleep)  # warm-up
    for got, want in zip(
        handed_over(producer, consumer, sleep),
        decode(*arrays_of("cupy", PROBLEM), causal=True),
        strict=True,
    ):
        assert same_bits(got, want)


@pytest.mark.parametrize(
    ("source", "to"), [("cupy", "torch"), ("cupy", "jax"), ("torch", "cupy"), ("torch", "jax")]
)
def test_without_order_the_same_test_fails(source, to, sleep):
    """The negative control: stream=-1 asks the producer not to order anything. (What memory of
    JAX's holds before its time is not known, so JAX is no producer here.)"""
    pytest.importorskip(source)
    pytest.importorskip(to)
    producer, consumer = SIDES[source](), SIDES[to]()
    handed_over(producer, consumer, sleep)  # warm-up
    out, _ = handed_over(producer, consumer, sleep, ordered=False)
    assert not same_bits(out, decode(*arrays_of("cupy", PROBLEM), causal=True)[0])


@pytest.mark.parametrize("name", ["cupy", "torch"])
@pytest.mark.parametrize("right", [True, False], ids=["current-stream", "negative-control"])
def test_the_launch_is_on_the_current_stream(name, right, sleep, launches):
    """q appears late on a side stream. Decoded with that stream current, it is seen; decoded with
    another one current, it is not."""
    pytest.importorskip(name)
    side, other = SIDES[name](), SIDES[name]()
    expected = decode(side.source, *side.rest, causal=True)[0]
    handed_over(side, side, sleep)  # warm-up
    late = side.late_q(sleep)
    with (side if right else other).use():
        out, _ = decode(late, *side.rest, causal=True)
        got = (side if right else other).read(out)
    handle = side.stream.ptr if name == "cupy" else side.stream.cuda_stream
    assert (launches[-1][0] == handle) is right
    assert same_bits(got, expected) is right
    cupy.cuda.Device().synchronize()


def test_a_torch_stream_may_be_current_in_cupy(torch, launches):
    stream = torch.cuda.Stream()
    with cupy.cuda.Stream.from_external(stream):
        out, _ = decode(*arrays_of("cupy", PROBLEM), causal=True)
    assert launches[-1][0] == stream.cuda_stream
    stream.synchronize()
    assert same_bits(out, decode(*arrays_of("cupy", PROBLEM), causal=True)[0])


@pytest.mark.parametrize("name", ["cupy", "torch"])
def test_the_host_does_not_wait(name, sleep):
    pytest.importorskip(name)
    side = SIDES[name]()
    decode(side.source, *side.rest, causal=True)
    late = side.late_q(sleep)
    start = time.perf_counter()
    with side.use():
        decode(late, *side.rest, causal=True)
    assert time.perf_counter() - start < DELAY_MS / 1e3 / 2
    cupy.cuda.Device().synchronize()


def test_foreign_producers_are_ordered_before_cupys_stream(torch, sleep):
    """The arrays go straight into the public call, as any framework's would."""
    producer, expected = TorchSide(), decode(*arrays_of("cupy", PROBLEM), causal=True)[0]
    consumer = CupySide()
    for ordered in (True, True, False):  # the first is the warm-up
        with producer.use():
            late = producer.late_q(sleep)
            with consumer.use():
                arrays = [Foreign(late, ordered), *consumer.rest]
                out = consumer.read(decode(*arrays, causal=True)[0])
        cupy.cuda.Device().synchronize()
        assert same_bits(out, expected) is ordered


@pytest.mark.parametrize("name", ["cupy", "torch"])
def test_threads_on_streams_of_their_own(name):
    """Four threads, four streams, 10,000 calls each; every 100th result is compared."""
    pytest.importorskip(name)
    problems = [make_problem([300 + i, 70], h_q=16, seed=i) for i in range(4)]
    wrong = []

    def work(i):
        try:
            side = SIDES[name]()
            arrays = arrays_of(name, problems[i])
            cupy.cuda.Device().synchronize()
            with side.use():
                metadata = get_mla_metadata(arrays[3], 16, 1)
                for call in range(10_000):
                    out, lse = flash_mla_with_kvcache(*arrays, 512, *metadata)
                    if call % 100 == 0:
                        got = side.read(out).tobytes(), side.read(lse).tobytes()
                        if got != serial[i]:
                            wrong.append((i, call))
        except Exception as error:
            wrong.append((i, repr(error)))

    serial = [tuple(get(x).tobytes() for x in decode(*arrays_of("cupy", p))) for p in problems]
    in_threads(work, 4)
    assert wrong == []
