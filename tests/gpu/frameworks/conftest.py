"""Fixtures of the framework tests on a GPU; everything here needs CuPy."""

from __future__ import annotations

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory to the others

import numpy as np
import pytest
from support.every_framework import DELAY_MS, GPU_FRAMEWORKS

import flashmla_cupy
from flashmla_cupy.gpu.decode_launch import DecodeLaunch


@pytest.fixture(params=GPU_FRAMEWORKS)
def framework(request):
    pytest.importorskip(request.param)
    return request.param


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def jax():
    return pytest.importorskip("jax")


@pytest.fixture(autouse=True)
def nothing_is_pending():
    yield
    flashmla_cupy.check()


@pytest.fixture
def launches(monkeypatch):
    """(stream, q, k_cache, out pointer) of every decode launch."""
    seen = []
    launch = DecodeLaunch.__call__

    def decode(self, stream, addresses, *args):
        seen.append((stream, addresses.q, addresses.k_cache, addresses.out))
        return launch(self, stream, addresses, *args)

    monkeypatch.setattr(DecodeLaunch, "__call__", decode)
    return seen


@pytest.fixture(scope="session")
def sleep():
    """sleep(stream): keeps a CuPy stream busy for DELAY_MS."""
    cupy = pytest.importorskip("cupy")
    kernel = cupy.RawKernel(
        r"""
        extern "C" __global__ void nap(long long nanoseconds) {
            long long start, now;
            asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
            do {
                asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
            } while (now - start < nanoseconds);
        }
        """,
        "nap",
    )

    def nap(stream):
        kernel((1,), (1,), (np.int64(DELAY_MS * 1_000_000),), stream=stream)

    nap(cupy.cuda.Stream.null)
    cupy.cuda.Device().synchronize()
    return nap
