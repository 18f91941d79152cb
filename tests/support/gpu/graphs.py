"""Streams, and CUDA graphs that are captured on them; in a dry run, nothing of the kind."""

from __future__ import annotations

import contextlib

from support.gpu.arrays import DRY, xp


def new_stream():
    return contextlib.nullcontext() if DRY else xp.cuda.Stream(non_blocking=True)


def capture(stream, step):
    """(replay, what the step returned), of a step that has run before on this stream."""
    if DRY:
        return step, None
    stream.synchronize()
    stream.begin_capture()
    kept = step()
    graph = stream.end_capture()
    return lambda: graph.launch(stream), kept
