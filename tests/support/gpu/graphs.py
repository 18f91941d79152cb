"""Streams, and CUDA graphs that are captured on them; in a dry run, nothing of the kind."""

from __future__ import annotations

import contextlib

from support.gpu.arrays import DRY, xp


def new_stream():
    return contextlib.nullcontext() if DRY else xp.cuda.Stream(non_blocking=True)


def capture(stream, step):
    """(replay, what the step returned), of a step that has run before on this stream.

    A step that fails leaves no capture behind, which would fail all that comes after it."""
    if DRY:
        return step, None
    stream.synchronize()
    stream.begin_capture()
    try:
        kept = step()
    except BaseException:
        with contextlib.suppress(Exception):  # the capture may be invalid; it ends all the same
            stream.end_capture()
        raise
    graph = stream.end_capture()
    return lambda: graph.launch(stream), kept
