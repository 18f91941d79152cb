"""append.cu on a GPU: 1,000 random ragged cases with the bits of the definition, guard bytes round
every pool untouched."""

from __future__ import annotations

import numpy as np
import pytest
from support.append_cases import Case

pytestmark = pytest.mark.gpu


def test_random_appends_have_the_bits_of_the_definition():
    import cupy

    from flashmla_cupy.gpu.append_launch import (
        NO_ROTATION,
        CacheLaunches,
        PoolGeometry,
        Rotary,
        Rows,
    )
    from flashmla_cupy.gpu.engine import engine_of

    launches = {name: CacheLaunches(engine_of(0), name) for name in ("bfloat16", "float16")}
    stream = cupy.cuda.get_current_stream().ptr
    rotated = 0
    for seed in range(1000):
        case = Case(seed, most_pages=4, most_batch=9, most_tokens=7)
        memory, rows = cupy.asarray(case.pool.memory), cupy.asarray(case.memory)
        slots, rotation = cupy.asarray(case.slots), NO_ROTATION
        if case.rotation:
            cos, sin, positions = (cupy.asarray(x) for x in list(case.rotation.values())[:3])
            rotation = Rotary(
                cos.data.ptr,
                sin.data.ptr,
                positions.data.ptr,
                len(cos),
                case.rotation["interleaved"],
            )
            rotated += 1
        layers, batch, tokens = case.shape[:3]
        launches[case.name].append(
            stream,
            PoolGeometry(*case.pool.geometry(memory.data.ptr)),
            Rows(rows.data.ptr, *case.bits.strides[:4], layers, batch, tokens),
            slots.data.ptr,
            rotation,
        )
        found = memory.get()
        wrong = np.flatnonzero(found != case.expected)
        assert not wrong.size, f"seed {seed}: {wrong.size} elements, first at {wrong[0]}"
    assert rotated > 500
