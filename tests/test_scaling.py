"""`bench --plot`: its cases, the roofline, cliffs, the picture; a timer stands for the GPU."""

from __future__ import annotations

import json
import sys

import pytest
from support import fake_timer

from flashmla_cupy.__main__ import main
from flashmla_cupy.bench import cases as bench
from flashmla_cupy.bench import plot as scaling

REPORT = {"read_gbps": 4000.0, "matmul_tflops": 500.0, "version": "1", "device": "H200"}


@pytest.fixture
def timer(monkeypatch):
    """Twice the roofline, and 5 us."""
    kind = fake_timer.install(monkeypatch)
    kind.decode_us = lambda self, case: 5 + 2 * scaling.roofline_us(case, 4000.0, 500.0)
    return kind


def test_the_sweeps_reach_from_end_to_end():
    ends = {}
    for sweep in scaling.SWEEPS:
        assert len(sweep.sizes) == len(sweep.cases)
        ends.setdefault(sweep.axis, set()).add((sweep.sizes[0], sweep.sizes[-1]))
    assert ends == {
        "requests": {(1, 4096)},
        "tokens of one request": {(64, 2**20)},
        "query heads": {(1, 128)},
        "tokens of a page": {(16, 256)},
    }
    names = [case.name for case in scaling.CASES]
    assert len(set(names)) == len(names)


def test_a_step_doubles_the_work():
    for sweep in scaling.SWEEPS:
        for small, large in zip(sweep.cases, sweep.cases[1:], strict=False):
            assert (large.flops == 2 * small.flops) is sweep.doubles, sweep.label


def test_roofline():
    memory = bench.Case("m", 128, 1, 16, 4096)
    compute = bench.Case("c", 128, 4, 128, 4096)
    assert scaling.roofline_us(memory, 4000, 500) == memory.nbytes / 4e6
    assert scaling.roofline_us(compute, 4000, 500) == compute.flops / 5e8
    assert scaling.roofline_us(compute, 4000, None) == compute.nbytes / 4e6


def test_cliffs_are_told():
    us_of = {case.name: 100.0 for case in scaling.CASES}
    assert scaling.verdict(us_of)[0].startswith("no cliff: twice the work takes at most 1.00")
    for large in range(9, 13):
        us_of[f"scale.batch.h16.b{2**large}"] = 240.0
    us_of["scale.heads.b8.h128"] = 260.0
    assert scaling.verdict(us_of) == [
        "cliff: 2.60 times as long from 64 to 128 query heads, 8 requests of 8192 tokens",
        "cliff: 2.40 times as long from 256 to 512 requests, 16 heads, 1024 tokens each",
    ]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot(capsys, tmp_path, timer, suffix):
    pytest.importorskip("matplotlib")
    picture, results = tmp_path / f"scaling{suffix}", tmp_path / "results.json"
    assert main(["bench", "--plot", str(picture), "--json", str(results)]) == 0
    out = capsys.readouterr().out
    assert "no cliff: twice the work takes at most 2.0" in out
    assert len(json.loads(results.read_text())["cases"]) == len(scaling.CASES)
    content = picture.read_bytes()
    if suffix == ".png":
        assert content.startswith(b"\x89PNG") and len(content) > 20_000
    else:
        assert b"</svg>" in content
        assert content.count(b"<path") > 2 * len(scaling.SWEEPS)


def test_what_is_drawn():
    """Each sweep's times and its roofline, in the order of its sizes."""
    figure_type = pytest.importorskip("matplotlib.figure").Figure
    made = []

    class Figure(figure_type):
        def savefig(self, file, **options):
            made.append(self)

    rows = [{"case": case.name, "us": float(i + 1)} for i, case in enumerate(scaling.CASES)]
    scaling.draw(Figure, REPORT | {"cases": rows}, None, ".png")
    lines = [line for axes in made[0].axes for line in axes.get_lines()]
    assert len(lines) == 2 * len(scaling.SWEEPS)
    us_of = {row["case"]: row["us"] for row in rows}
    for sweep, times, roofline in zip(scaling.SWEEPS, lines[::2], lines[1::2], strict=True):
        assert tuple(times.get_xdata()) == sweep.sizes
        assert list(times.get_ydata()) == [us_of[case.name] for case in sweep.cases]
        assert list(roofline.get_ydata()) == [
            scaling.roofline_us(case, 4000.0, 500.0) for case in sweep.cases
        ]


def test_another_format_is_refused_before_the_work(capsys, tmp_path, timer):
    timer.decode_us = None
    assert main(["bench", "--plot", str(tmp_path / "a.jpeg")]) == 2
    assert "expected a file *.png, *.svg, *.pdf" in capsys.readouterr().err


def test_other_options_are_refused(capsys):
    assert main(["bench", "--plot", "a.png", "--cases", "lat"]) == 2
    assert "--plot" in capsys.readouterr().err


def test_without_matplotlib(capsys, monkeypatch, tmp_path, timer):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = tmp_path / "a.png"
    assert main(["bench", "--plot", str(path)]) == 2
    assert "pip install 'flashmla-cupy[plot]'" in capsys.readouterr().err
    assert not path.exists()


def test_without_a_gpu_no_file_is_made(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if cupy.cuda.is_available():
        pytest.skip("there is a GPU")
    path = tmp_path / "a.png"
    assert main(["bench", "--plot", str(path)]) == 2
    assert "bench needs a Hopper GPU" in capsys.readouterr().err
    assert not path.exists()


def test_a_file_that_cannot_be_written(capsys, tmp_path, timer):
    pytest.importorskip("matplotlib")
    timer.decode_us = None
    assert main(["bench", "--plot", str(tmp_path / "none" / "a.png")]) == 2
    assert "No such file" in capsys.readouterr().err
