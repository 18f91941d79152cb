"""Ways from one framework to another on a GPU, each on streams of its own.

A producer writes q on its own stream after a long sleep; a consumer takes q over, decodes and
reads back, all on its own stream. Everything is warmed up first, so that no compilation waits for
the sleep.
"""

from __future__ import annotations

import contextlib
import time

import numpy as np
import pytest
from support.every_framework import DELAY_MS, decode, get, put
from support.problems import make_problem

cupy = pytest.importorskip("cupy")


def arrays_of(framework, problem):
    return [put(framework, x) for x in problem.arrays()]


class Foreign:
    """An array that speaks DLPack only; ordered=False drops the consumer's stream."""

    def __init__(self, owner, ordered=True):
        self.owner, self.ordered = owner, ordered
        self.shape = owner.shape

    def __dlpack_device__(self):
        return self.owner.__dlpack_device__()

    def __dlpack__(self, *, stream=None, **options):
        return self.owner.__dlpack__(stream=stream if self.ordered else -1, **options)


PROBLEM = make_problem([300, 70, 1, 129], s_q=2, h_q=16, causal=True)


class CupySide:
    name = "cupy"

    def __init__(self):
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.source = put("cupy", PROBLEM.q)
        self.rest = arrays_of("cupy", PROBLEM)[1:]

    def use(self):
        return self.stream

    def late_q(self, sleep):
        q = cupy.zeros_like(self.source)
        self.stream.synchronize()
        cupy.cuda.Device().synchronize()
        with self.stream:
            sleep(self.stream)
            q[...] = self.source
        return q

    def take(self, x):
        return cupy.from_dlpack(x)

    def read(self, x):
        return x.get(stream=self.stream)


class TorchSide:
    name = "torch"

    def __init__(self):
        import torch

        self.torch, self.stream = torch, torch.cuda.Stream()
        self.source = put("torch", PROBLEM.q)
        self.rest = arrays_of("torch", PROBLEM)[1:]

    def use(self):
        return self.torch.cuda.stream(self.stream)

    def late_q(self, sleep):
        q = self.torch.zeros_like(self.source)
        self.torch.cuda.synchronize()
        with self.use():
            sleep(cupy.cuda.Stream.from_external(self.stream))
            q.copy_(self.source)
        return q

    def take(self, x):
        return self.torch.from_dlpack(x)

    def read(self, x):
        return get(x)  # .cpu() copies on the current stream and waits for it


class JaxSide:
    name = "jax"

    def __init__(self):
        import jax

        self.jax = jax
        self.source = put("jax", PROBLEM.q)
        self.rest = arrays_of("jax", PROBLEM)[1:]

        @jax.jit
        def late(q, n):
            """q, after n dependent matrix products."""
            x = jax.numpy.full((4096, 4096), 1 / 4096, jax.numpy.float32)
            x = jax.lax.fori_loop(0, n, lambda _, x: x @ x * 1.0, x)
            return q + (x[0, 0] * 0).astype(q.dtype)

        self.late = late
        late(self.source, 1).block_until_ready()
        start = time.perf_counter()
        late(self.source, 50).block_until_ready()
        self.rounds = int(50 * DELAY_MS / 1e3 / (time.perf_counter() - start)) + 1

    def use(self):
        return contextlib.nullcontext()  # XLA has its own streams

    def late_q(self, sleep):
        return self.late(self.source, self.rounds)

    def take(self, x):
        return self.jax.dlpack.from_dlpack(x)

    def read(self, x):
        return np.asarray(x)


SIDES = {"cupy": CupySide, "torch": TorchSide, "jax": JaxSide}


def handed_over(producer, consumer, sleep, ordered=True):
    """(out, lse) of the consumer for the q of the producer."""
    with producer.use():
        late = producer.late_q(sleep)
        with consumer.use():  # nested: the producer's stream stays current in its framework
            q = consumer.take(Foreign(late, ordered))
            results = [consumer.read(x) for x in decode(q, *consumer.rest, causal=True)]
    cupy.cuda.Device().synchronize()
    return results
