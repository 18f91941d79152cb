"""The kernel for many query rows over FP8 caches, on the GPU in software (tests/emulator), by way
of the public functions and against the float64 oracle.

Each test has a scenario. The last ones break the kernel on purpose, one thing at a time, and run a
scenario with it: that has to fail.
"""

from __future__ import annotations

import pytest
from emulator import device
from support.fp8_scenarios import (
    FORMATS,
    bad_rows,
    dense,
    halves,
    races,
    rises,
    sizes_of_queries,
)

pytestmark = pytest.mark.skipif(
    device.host_compiler() is None, reason="needs a host C++ compiler: c++, g++ or clang++"
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return device.Kernels(tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scenario", [races, rises, halves, dense, sizes_of_queries, bad_rows])
def test_right(monkeypatch, kernels, scenario, format):
    scenario(lambda num_sms: device.install(monkeypatch, kernels, num_sms), format)


# ---- broken kernels ----------------------------------------------------------------------------

NOTICED = (
    "out of bound|order of threads|deadlock|arrivals|fence.proxy|no array is|does not reach|"
    "do not agree"
)
BROKEN = {  # file, text, what takes its place, scenario
    "K is read before it is there": (
        "scores",
        "mbarrier_wait(full(place.stage), place.phase);",
        "",
        races,
        "v4",
    ),
    "K of the next tile is read without a look at its barrier": (
        "scores",
        "tiles_left > 1 && is_full(behind)",
        "tiles_left > 1",
        races,
        "v4",
    ),
    "warps multiply the same with different instructions": (
        "scores",
        "      keys.compute(s, states, bits, place.stage, to_release);\n",
        "      if (uniform(warp_in_group()) == 0) {\n"
        "        keys.compute(s, states, bits, place.stage, to_release);\n"
        "      } else {\n"
        "        keys.compute(s, states, bits, place.stage, to_release);\n"
        "      }\n",
        races,
        "e4m3",
    ),
    "S is read before it is computed": ("keys", "wgmma_wait_group<0>();", "", races, "e4m3"),
    "sums of e4m3 are added before they are computed": (
        "e4m3_keys",
        "      wgmma_wait_group<0>();\n",
        "",
        races,
        "e4m3_q",
    ),
    "fragments of K in e4m3 are overwritten while wgmma reads them": (
        "e4m3_keys",
        "      wgmma_commit_group();\n",
        "      wgmma_commit_group();\n      if (chunk + 1 < CHUNKS) load(rows, chunk + 1);\n",
        races,
        "e4m3_q",
    ),
    "chunks of K in e4m3 all meet the first columns of Q": (
        "e4m3_keys",
        " + chunk * (Q_BLOCK_BYTES >> 4)",
        "",
        dense,
        "e4m3_q",
    ),
    "V is read before it is there": (
        "values",
        "mbarrier_wait(full(place.stage), place.phase);",
        "",
        races,
        "v4",
    ),
    "P is read before it is written": (
        "values",
        "mbarrier_wait(p_ready(place.stage), place.phase);",
        "",
        races,
        "e4m3",
    ),
    "P is read without a fence": ("values", "fence_proxy_async_of_others();", "", races, "e4m3"),
    "a stage is released before P V is computed": (
        "values",
        "wgmma_wait_group<0>();",
        "",
        races,
        "e4m3",
    ),
    "Q is replaced before the last S": (
        "scores",
        ("      keys.compute(s, states,", "    queries.ask_ahead(params, request);"),
        (
            "      if (tiles_left == 1) queries.ask_ahead(params, request);\n"
            "      keys.compute(s, states,",
            "",
        ),
        races,
        "v4",
    ),
    "Q is prepared without a fence": ("queries", "fence_proxy_async();", "", races, "e4m3_q"),
    "rows of Q are not scaled": (
        "queries",
        "by = row_scale(",
        "by = row_scale(0.f * ",
        sizes_of_queries,
        "v32",
    ),
    "a stage is filled while it is read": (
        "loader",
        "mbarrier_wait(empty(place.stage), place.phase ^ 1);",
        "",
        races,
        "v4",
    ),
    "fragments of K are overwritten while wgmma reads them": (
        "keys",
        "if (n >= UNITS_IN_USE) wgmma_wait_group<UNITS_IN_USE - 1>();",
        "",
        races,
        "v32",
    ),
    "fragments of V are overwritten while wgmma reads them": (
        "values",
        "if (i >= IN_USE) wgmma_wait_group<IN_USE - 1>();",
        "",
        rises,
        "e4m3",
    ),
    "missing rows are not cleared": (
        "loader",
        "clear_rows(rows, ~mine & ALL_TOKENS, bads);",
        "",
        races,
        "e4m3",
    ),
    "missing rows are seen": ("loader", "mine | bads);", "0xffff);", races, "e4m3"),
    "bad rows are zeros": ("loader", "bad >> i & 1 ? 0x7f7f7f7f : 0;", "0;", bad_rows, "e4m3"),
    "scales of V4 are not stored": (
        "loader",
        "st_shared_u64(to + SCALES, scales);",
        "",
        races,
        "v4",
    ),
    "scales of V32 are those of another block": (
        "convert",
        "(block >> 1) * 4",
        "(block >> 2) * 4",
        halves,
        "v32",
    ),
    "two rows of K have the same scale": (
        "keys",
        "scale_at(rows.row + 8 * STAGED_ROW, block)",
        "scale_at(rows.row, block)",
        races,
        "v4",
    ),
    "rotary columns of V4 are permuted": (
        "queries",
        ("{x(a.x), x(a.y), x(a.z), x(a.w)}", "{x(b.x), x(b.y), x(b.z), x(b.w)}"),
        ("{x(a.x), x(a.z), x(b.x), x(b.z)}", "{x(a.y), x(a.w), x(b.y), x(b.w)}"),
        races,
        "v4",
    ),
    "a maximum rises and O stays": ("values", "shrink(o, place.stage);", ";", rises, "e4m3"),
    "a maximum rises and l stays": (
        "scores",
        "l[c] *= factor.x, l[c + 1] *= factor.y;",
        "",
        rises,
        "e4m3",
    ),
    "a maximum rises and P stays": (
        "scores",
        "          store_p(s, sums, states, place.stage);\n",
        "",
        rises,
        "e4m3",
    ),
    "the warps do not hear that a maximum rises": (
        "scores",
        "rises = bar_or(SCORE_BARRIER, GROUP_THREADS, exceeds);",
        "bar_or(SCORE_BARRIER, GROUP_THREADS, exceeds);\nrises = __ballot_sync(~0u, exceeds) != 0;",
        rises,
        "e4m3",
    ),
    "the warps do not wait for each other's maxima": (
        "scores",
        "states, WARP_MAXIMA, true);\n  bar_sync(SCORE_BARRIER, GROUP_THREADS);\n",
        "states, WARP_MAXIMA, true);\n",
        rises,
        "e4m3",
    ),
    "factors are read before they are written": (
        "scores",
        "row), factor);\n  }\n  bar_sync(SCORE_BARRIER, GROUP_THREADS);\n",
        "row), factor);\n  }\n",
        rises,
        "e4m3",
    ),
    "the results of a piece are overwritten": (
        "scores",
        "mbarrier_wait(results_free(), results_phase);",
        "",
        races,
        "e4m3",
    ),
    "the warps do not wait for each other's sums": (
        "scores",
        "row_state(of_block) + 4);\n  bar_sync(SCORE_BARRIER, GROUP_THREADS);\n",
        "row_state(of_block) + 4);\n",
        races,
        "e4m3",
    ),
    "the results are stored before they are there": (
        "values",
        "mbarrier_wait(results_ready(), results_phase);",
        "",
        races,
        "e4m3",
    ),
    "halves are scaled as those of the other half of O": (
        "results",
        "ld_shared_v4_f32(row_float(of_half,",
        "ld_shared_v4_f32(row_float(LARGEST + (1 - half) * GROUP_WARPS * ROWS * 4,",
        halves,
        "e4m3",
    ),
    "the warps do not wait for each other's largest values": (
        "results",
        "  if (!walks) bar_sync(VALUE_BARRIERS + half, GROUP_THREADS);\n",
        "",
        halves,
        "e4m3",
    ),
    "rows see what the first position sees": (
        "scores",
        "to_border + (int)ld_shared_u32(row_float(POSITIONS, my_column(c)))",
        "to_border",
        dense,
        "e4m3",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_kernel_is_noticed(monkeypatch, tmp_path, kernels, what):
    name, right, wrong, scenario, format = BROKEN[what]
    pairs = [(right, wrong)] if isinstance(right, str) else list(zip(right, wrong, strict=True))

    def edit(file, text):
        for before, after in pairs if file == f"sm90_fp8_{name}.cuh" else ():
            assert text.count(before) == 1, f"{file} has changed"
            text = text.replace(before, after)
        return text

    broken = device.Kernels(tmp_path, edit, kernels)
    with pytest.raises(AssertionError, match=NOTICED), monkeypatch.context() as patch:
        scenario(lambda num_sms: device.install(patch, broken, num_sms), format)
