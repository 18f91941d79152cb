"""benchmarks/: what is compared, how it is summed up and what is said where it cannot run. Nothing
here needs a GPU or the peers; the problems and their reference need PyTorch.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import io
import json
import runpy
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flashmla_cupy.bench import cases as bench
from flashmla_cupy.build import compiler, nvrtc
from flashmla_cupy.gpu.kernels import Variant

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
if not FOLDER.is_dir():
    pytest.skip("the benchmarks are only in a checkout", allow_module_level=True)
sys.path.append(str(FOLDER))

import fetch_peers
import nvrtc_versions
import peers
import sparse_peers
from peers import Result, Row

# Cached tokens, q and out in bytes, and operations, of some cases, written out.
SIZES = {
    "mem.h16.b128.s4096": (128 * 4096, 2 * (128 * 4096 * 576 + 128 * 16 * 1088), 18253611008),
    "cmp.h128.q4.b64.s8192": (
        64 * 8192,
        2 * (64 * 8192 * 576 + 64 * 512 * 1088),
        2 * 64 * 8192 * 512 * 1088,
    ),
    "imb.thunder.b4.h16.q4": (53185, 2 * (53185 * 576 + 256 * 1088), 2 * 53185 * 64 * 1088),
    "imb.one_long.h16": (163328, 2 * (163328 * 576 + 1024 * 1088), 2 * 163328 * 16 * 1088),
}


# ---- cases --------------------------------------------------------------------------------------


def test_cases():
    names = [case.name for case in peers.CASES]
    assert len(names) == len(set(names)) == 43
    counts = {group: sum(name.startswith(f"{group}.") for name in names) for group in peers.GROUPS}
    assert counts == {"lat": 14, "imb": 6, "mem": 9, "cmp": 14}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    (case,) = peers.select([name])
    assert (sum(case.lengths), case.nbytes, peers.flops(case)) == SIZES[name]


def test_lengths_are_ragged_around_their_mean():
    (case,) = peers.select(["mem.h16.b64.s16384v"])
    assert sum(case.lengths) // 64 == 16237
    assert len(set(case.lengths)) > 60


def test_select():
    assert peers.select(["all"]) == list(peers.CASES)
    assert [case.name for case in peers.select(["h8"])] == ["mem.h8.b128.s4096"]
    both = peers.select(["imb", "lat"])
    assert both == [case for case in peers.CASES if case.name[:3] in ("imb", "lat")]
    with pytest.raises(peers.BenchmarkError, match="'flashmla'"):
        peers.select(["lat", "flashmla"])
    with pytest.raises(ValueError, match="'nonsense'"):
        peers.select(["nonsense"])


@pytest.mark.parametrize(
    ("name", "caches", "calls"),
    [("lat.h16.b1.s512", 12, 48), ("cmp.h128.q2.b128.s32768v", 1, 3), ("mem.h8", 7, 48)],
)
def test_calls_in_graph(name, caches, calls):
    (case,) = peers.select([name])
    assert peers.calls_in_graph(case, caches) == calls
    assert peers.calls_in_graph(case, 60) == 60


# ---- results ------------------------------------------------------------------------------------


def row(case: str, **us: float | None) -> Row:
    made = Row(case, {name: Result(us=time) for name, time in us.items()})
    made.compare()
    return made


def test_ratio():
    assert row("lat.a", ours=6, flashmla=10, fa3=8).ours_over_best_peer == 0.75
    assert row("lat.a", fa3=8, ours=12, flashmla=None).ours_over_best_peer == 1.5
    assert row("lat.a", ours=6).ours_over_best_peer is None
    assert row("lat.a", ours=None, fa3=8).ours_over_best_peer is None


def test_summary():
    rows = [row("lat.a", ours=1, fa3=2), row("lat.b", ours=4, fa3=2, flashmla=4)]
    rows += [row("lat.c", ours=None, fa3=1), row("mem.a", ours=9, fa3=10), row("cmp.a", ours=1)]
    found = peers.summary(rows)
    assert list(found) == ["lat", "mem"]
    assert found["lat"] == {"geometric_mean": pytest.approx(1), "worst": 2, "cases": 2}
    assert found["mem"]["geometric_mean"] == pytest.approx(0.9)


class _Timer:
    """Stands for the GPU: ours takes 100 us, a peer 200, metadata 5."""

    def capture(self, functions, calls):
        return functions[0]

    def in_turns_us(self, captured):
        return {name: 100.0 if name == "ours" else 200.0 for name in captured}

    def call_us(self, captured):
        return 5.0


class _Implementation:
    def __init__(self, problem):
        self.metadata = lambda: None

    def __call__(self):
        return [0.0] * 64


class _Broken:
    def __init__(self, problem):
        raise RuntimeError("no kernel\nfor this")


def test_run(monkeypatch, capsys):
    implementations = {"ours": _Implementation, "flashmla": _Broken, "fa3": _Implementation}
    gpu = SimpleNamespace(
        problems=lambda case: [None],
        reference=lambda problem, request: 0.0,
        error_of=lambda out, expected: (0.001, True),
        IMPLEMENTATIONS=implementations,
        Timer=_Timer,
    )
    torch = SimpleNamespace(
        __version__="2.11.0",
        version=SimpleNamespace(cuda="13.0"),
        cuda=SimpleNamespace(empty_cache=lambda: None),
    )
    monkeypatch.setitem(sys.modules, "peers_gpu", gpu)
    monkeypatch.setitem(sys.modules, "torch", torch)
    file = io.StringIO()
    assert not peers.run(peers.select(["imb"]), ("ours", "flashmla", "fa3"), "H200", file)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    shown = ["100.0", "+5.0", "failed", "200.0", "+5.0", "0.500", "455", "2060"]
    assert lines[3].split() == ["imb.one_long.h128", *shown]
    assert lines[-1].startswith("imb: geometric mean of ours / best peer 0.500 over 6 cases")
    assert "imb.one_long.h16: flashmla failed: RuntimeError: no kernel\n" in err
    written = json.loads(file.getvalue())
    assert written["groups"]["imb"] == {"geometric_mean": 0.5, "worst": 0.5, "cases": 6}
    assert written["cases"][0]["results"]["ours"]["metadata_us"] == 5
    assert written["cases"][0]["results"]["flashmla"]["us"] is None


# ---- FP8 caches and lists -----------------------------------------------------------------------


def test_sparse_cases(capsys):
    names = [case.name for case in sparse_peers.CASES]
    assert len(names) == len(set(names)) == 48
    (case,) = sparse_peers.select(["v32.h16.b128.q2"])
    assert (case.flops, case.nbytes) == (2 * 256 * 16 * 2048 * 1088, 256 * 2048 * 656)
    (case,) = sparse_peers.select(["v4.h64.b8"])
    assert (case.flops, case.nbytes) == (2 * 8 * 64 * 512 * 1024, 8 * 512 * 584)
    assert {case.kind for case in sparse_peers.select(["h64"])} == {"v32", "v4", "e4m3", "prefill"}
    assert len(sparse_peers.select(["prefill.h16", "v32"])) == 4 + 15
    assert sparse_peers.main(["--cases", "h6"]) == 2
    assert "There is no case 'h6'" in capsys.readouterr().err


def test_sparse_run(monkeypatch, capsys, tmp_path):
    gpu = SimpleNamespace(
        calls=lambda case: ([lambda: 1.0], [lambda: 1.0 if case.kind == "v32" else 2.0]),
        difference=lambda ours, peer, kind: (abs(ours - peer), ours == peer),
    )
    torch = SimpleNamespace(__version__="2.11.0", cuda=SimpleNamespace(empty_cache=lambda: None))
    monkeypatch.setattr(sparse_peers, "prepare", lambda folder: "H200")
    monkeypatch.setitem(sys.modules, "sparse_peers_gpu", gpu)
    monkeypatch.setitem(sys.modules, "peers_gpu", SimpleNamespace(Timer=_SparseTimer))
    monkeypatch.setitem(sys.modules, "torch", torch)
    results = tmp_path / "results.json"
    cases = ["v32.h64.b128.q1", "e4m3.h64.b1"]
    assert sparse_peers.main(["--cases", *cases, "--json", str(results)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split() == ["v32.h64.b128.q1.s8192", "100.0", "200.0", "0.500", "365", "1720"]
    assert lines[4].split(maxsplit=1)[1] == "failed: the results differ"
    first, second = json.loads(results.read_text())["cases"]
    assert first["ratio"] == 0.5
    assert second["ratio"] is None


class _SparseTimer:
    def capture(self, functions, calls):
        return functions[0]

    def in_turns_us(self, captured):
        return {"ours": 100.0, "peer": 200.0}


# ---- the command line ---------------------------------------------------------------------------


def test_arguments():
    found = peers.parser().parse_args(["there", "--impls", "ours", "fa3", "--cases", "lat", "h16"])
    assert found.folder == Path("there")
    assert (found.impls, found.cases, found.json) == (["ours", "fa3"], ["lat", "h16"], None)
    assert peers.parser().parse_args([]).folder == Path(fetch_peers.DEFAULT_FOLDER)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert peers.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("peers.py: error: ")
    assert err.count("\n") == 1
    return err


def test_peers_not_fetched(capsys, tmp_path):
    err = said(capsys, str(tmp_path))
    assert "_flashmla_C.abi3.so is missing" in err
    assert f"python benchmarks/fetch_peers.py {tmp_path}" in err


def test_no_torch(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "needs PyTorch" in said(capsys, "--impls", "ours")


def test_no_gpu(capsys, monkeypatch, tmp_path):
    torch = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", torch)
    results = tmp_path / "results.json"
    assert "finds no GPU" in said(capsys, "--impls", "ours", "--json", str(results))
    assert not results.exists()


def test_unknown_case(capsys):
    assert "'nonsense'" in said(capsys, "--cases", "nonsense")


@pytest.mark.parametrize(
    ("torch", "arguments", "words"),
    [
        (None, [], "needs PyTorch"),
        (SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False)), [], "finds no GPU"),
        (None, ["nonsense"], "'nonsense' is none of append, order, host"),
    ],
)
def test_a_cache_that_cannot_be_measured(capsys, monkeypatch, torch, arguments, words):
    monkeypatch.setitem(sys.modules, "torch", torch)
    benchmark = runpy.run_path(str(FOLDER / "cache.py"))
    assert benchmark["main"](arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("cache.py: error: ") and words in err
    assert err.count("\n") == 1


# ---- fetching -----------------------------------------------------------------------------------


def test_fetch(monkeypatch, capsys, tmp_path):
    """pip is asked for one wheel, of which the libraries stay and nothing else."""

    def run(command, check):
        assert command[1:4] == ["-m", "pip", "download"]
        assert command[-1] == fetch_peers.WHEEL
        with zipfile.ZipFile(Path(command[-2]) / "vllm-0.whl", "w") as wheel:
            for name in (*fetch_peers.LIBRARIES.values(), "vllm/other.py"):
                wheel.writestr(name, name)

    monkeypatch.setattr(fetch_peers.subprocess, "run", run)
    assert fetch_peers.main([str(tmp_path)]) == 0
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {".gitignore", *fetch_peers.LIBRARIES.values()}
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_fetch_sparse(monkeypatch, tmp_path):
    """The other wheel, to a folder of its own, where sparse_peers.py looks for it."""

    def run(command, check):
        assert command[-1] == fetch_peers.SPARSE_WHEEL
        with zipfile.ZipFile(Path(command[-2]) / "vllm-0.whl", "w") as wheel:
            for name in fetch_peers.SPARSE_LIBRARIES.values():
                wheel.writestr(name, name)

    monkeypatch.setattr(fetch_peers.subprocess, "run", run)
    monkeypatch.setattr(peers, "prepare", lambda folder, names: "H200")
    loaded = []
    torch = SimpleNamespace(ops=SimpleNamespace(load_library=loaded.append))
    monkeypatch.setitem(sys.modules, "torch", torch)
    with pytest.raises(peers.BenchmarkError, match=r"is missing.*--sparse"):
        sparse_peers.prepare(tmp_path)
    assert fetch_peers.main(["--sparse", str(tmp_path)]) == 0
    assert sparse_peers.prepare(tmp_path) == "H200"
    assert len(loaded) == 2


def test_fetch_that_fails(monkeypatch, capsys, tmp_path):
    def run(command, check):
        raise fetch_peers.subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(fetch_peers.subprocess, "run", run)
    assert fetch_peers.main([str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.endswith("pip could not download vllm==0.25.1 (exit status 1).\n")


# ---- problems -----------------------------------------------------------------------------------


def test_problems_and_reference():
    """Ours, which is NumPy here, agrees with the float32 reference, and a wrong result does not."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    gpu = importlib.import_module("peers_gpu")
    case = bench.Case("small", 3, 2, 4, (70, 1, 130), "given", True)
    problems = gpu.problems(case, "cpu")
    assert len(problems) == 12
    table = problems[0].block_table.tolist()
    assert sorted(table[0][:2] + table[1][:1] + table[2]) == list(range(6))
    assert all(problem.block_table is problems[0].block_table for problem in problems)
    assert not torch.equal(problems[0].k_cache, problems[1].k_cache)
    out = gpu.Ours(problems[1])()
    for i in (0, 2):
        error, agrees = gpu.error_of(out[i], gpu.reference(problems[1], i))
        assert agrees
        assert 0 < error < gpu.ATOL
        error, agrees = gpu.error_of(out[i], gpu.reference(problems[2], i))
        assert not agrees
    error, agrees = gpu.error_of(out[0] * np.nan, gpu.reference(problems[1], 0))
    assert not agrees


def test_kernels_of_an_nvrtc_in_a_folder(tmp_path, has_nvrtc, monkeypatch, capsys):
    """As pip install --target lays it out; the cubins are those of this NVRTC."""
    library = nvrtc.library().path
    if Path(library).parent.parent.parent.name != "nvidia":
        pytest.skip("NVRTC is of no wheel")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "nvidia").symlink_to(Path(library).parent.parent.parent)
    schedule = Variant("schedule")
    monkeypatch.setattr(nvrtc_versions, "all_variants", lambda: [schedule])
    arguments = ["compile", str(tmp_path / "own"), "--to", str(tmp_path / "cubins")]
    assert nvrtc_versions.main(arguments) == 0
    cubin = (tmp_path / "cubins" / "own" / "schedule.cubin").read_bytes()
    assert cubin == compiler.compile_variant(schedule).cubin
    assert "schedule" in capsys.readouterr().out
    (loaded,) = nvrtc_versions.from_folder(tmp_path / "cubins" / "own", [schedule])
    assert (loaded.variant, loaded.cubin) == (schedule, cubin)


SCRIPTS = sorted(
    path
    for folder in ("benchmarks", "examples")
    for path in (Path(peers.__file__).parents[1] / folder).glob("*.py")
)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_asks_of_the_package_is_there(path):
    """Some lines run on a GPU only, where a name that was changed would be noticed too late."""
    tree, modules = ast.parse(path.read_text()), {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or "flashmla_cupy" not in (node.module or ""):
            continue
        package = importlib.import_module(node.module)
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            if hasattr(package, "__path__") and importlib.util.find_spec(full):
                importlib.import_module(full)
            found = getattr(package, alias.name)
            if inspect.ismodule(found):
                modules[alias.asname or alias.name] = found
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            assert module is None or hasattr(module, node.attr), f"{node.value.id}.{node.attr}"
