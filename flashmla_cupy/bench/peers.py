"""Other libraries beside ours in `flashmla-cupy bench --peers`: flash_mla and flashinfer.

Whichever is installed gets the same arrays, as torch tensors over the same memory, on the same
stream; its metadata or plan is made before. A time counts only if the result agrees with ours.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from ..errors import OptionError
from ..sizes import HEAD_DIM, HEAD_DIM_V, ceil_div
from .problem import Problem

ATOL, RTOL = 8e-3, 2.01 / 128  # of results in bfloat16, as in examples/quickstart.py
WORKSPACE_BYTES = 256 << 20  # what FlashInfer's examples give it, twice

Calls = list[Callable[[], Any]]  # one for each block table; the result [batch, s_q, h_q, 512]


class CannotRun(Exception):
    """Why a peer has no call for a problem, in a few words."""


class Peers:
    """The peers of this environment. Raises OptionError where there is none."""

    def __init__(self) -> None:
        self.names = [name for name in PEERS if importlib.util.find_spec(name) is not None]
        if not self.names or importlib.util.find_spec("torch") is None:
            raise OptionError(
                "--peers",
                f"PyTorch and one of {', '.join(PEERS)}",
                "neither" if not self.names else "no PyTorch",
                "Install what shall be compared, or leave --peers out.",
                "bench",
            )
        self._torch: Any = importlib.import_module("torch")

    def calls(self, name: str, problem: Problem) -> Calls:
        """Raises CannotRun, and whatever the peer raises."""
        return PEERS[name](self._torch, problem)

    def agrees(self, theirs: Any, ours: Any) -> bool:
        """Whether a result, a tensor, is that of ours, a CuPy array."""
        torch, expected = self._torch, tensor(self._torch, ours).float()
        errors = (theirs.reshape(expected.shape).float() - expected).abs()
        return bool(torch.all(errors <= ATOL + RTOL * expected.abs()))

    def on(self, stream: int) -> AbstractContextManager[Any]:
        """Makes a CUDA stream the current one of PyTorch."""
        cuda = self._torch.cuda
        context: AbstractContextManager[Any] = cuda.stream(cuda.ExternalStream(stream))
        return context

    def capture(self, stream: int, body: Callable[[], None]) -> Callable[[], None]:
        """Captures what `body` launches on a stream into a graph; what launches that there."""
        cuda = self._torch.cuda
        graph = cuda.CUDAGraph()
        with self.on(stream):
            body()  # what is compiled and allocated at a first call
            cuda.synchronize()
        with cuda.graph(graph, stream=cuda.ExternalStream(stream)):
            body()

        def launch() -> None:
            with self.on(stream):
                graph.replay()

        return launch


def tensor(torch: Any, array: Any) -> Any:
    """A tensor over the memory of a CuPy or NumPy array. DLPack of either has no bfloat16."""
    if array.dtype.name == "bfloat16":
        return torch.from_dlpack(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_dlpack(array)


def _flash_mla(torch: Any, problem: Problem) -> Calls:
    library: Any = importlib.import_module("flash_mla")
    case = problem.case
    if case.page_size != 64:
        raise CannotRun("pages of 64 tokens only")
    q, k_cache, lengths = (
        tensor(torch, x) for x in (problem.q, problem.k_cache, problem.cache_seqlens)
    )
    metadata = library.get_mla_metadata(lengths, case.s_q * case.h_q, 1)

    def call(block_table: Any) -> Any:
        out, _ = library.flash_mla_with_kvcache(
            q, k_cache, block_table, lengths, HEAD_DIM_V, *metadata, causal=case.causal
        )
        return out

    return [functools.partial(call, tensor(torch, table)) for table in problem.block_tables]


def _flashinfer(torch: Any, problem: Problem) -> Calls:
    library: Any = importlib.import_module("flashinfer.mla")
    case = problem.case
    q = tensor(torch, problem.q).flatten(0, 1)
    k_cache = tensor(torch, problem.k_cache).squeeze(2)
    latent, rotary = slice(None, HEAD_DIM_V), slice(HEAD_DIM_V, None)
    parts = q[..., latent], q[..., rotary], k_cache[..., latent], k_cache[..., rotary]
    pages = [ceil_div(n, case.page_size) for n in case.lengths]
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)

    def prefix(counts: Sequence[int]) -> Any:
        return torch.tensor(np.concatenate([[0], np.cumsum(counts)]), dtype=torch.int32)

    def planned(block_table: Any) -> Callable[[], Any]:
        used = [row[:count] for row, count in zip(block_table, pages, strict=True)]
        wrapper = library.BatchMLAPagedAttentionWrapper(workspace, backend="fa3")
        wrapper.plan(
            prefix([case.s_q] * case.batch),
            prefix(pages),
            torch.cat(used),
            torch.tensor(case.lengths, dtype=torch.int32),
            case.h_q,
            HEAD_DIM_V,
            HEAD_DIM - HEAD_DIM_V,
            case.page_size,
            case.causal,
            HEAD_DIM**-0.5,
            q.dtype,
            q.dtype,
        )
        run: Callable[[], Any] = functools.partial(wrapper.run, *parts)
        return run

    return [planned(tensor(torch, table)) for table in problem.block_tables]


PEERS: dict[str, Callable[[Any, Problem], Calls]] = {
    "flash_mla": _flash_mla,
    "flashinfer": _flashinfer,
}
