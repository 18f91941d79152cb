"""For the GPU tests; run dry, without a GPU, they compute with NumPy and expect what a GPU does."""

from __future__ import annotations

import pytest

from flashmla_cupy import reference


@pytest.fixture(autouse=True)
def _lengths_are_looked_at_as_on_a_gpu(monkeypatch):
    """A bad length in host memory is refused before anything is computed; on a GPU, later."""
    monkeypatch.setattr(reference, "bad_length", lambda *_: -1)
