"""The package as installed: a light import, public names that resolve, versions that agree, and the
files that a wheel must carry.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flashmla_cupy
from flashmla_cupy import errors
from flashmla_cupy.build import compiler
from flashmla_cupy.gpu.kernels import all_variants

PACKAGE = Path(flashmla_cupy.__file__).resolve().parent
ROOT = PACKAGE.parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

# The tests also run against an installed wheel.
needs_checkout = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="the package is not in its checkout"
)


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after the statement."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_deepseek_is_an_attribute_of_the_package():
    assert "numpy" in loaded_by("import flashmla_cupy; flashmla_cupy.deepseek.softmax_scale")


HEAVY = {"cupy", "cupy_backends", "torch", "jax", "jaxlib", "numpy", "ml_dtypes"}


# NumPy comes with the first function that is used; the command line starts without it, too, so that
# --help is quick and `info` works in a broken installation.
@pytest.mark.parametrize("statement", ["import flashmla_cupy", "import flashmla_cupy.__main__"])
def test_import_is_light(statement):
    assert not loaded_by(statement) & HEAVY


def test_public_functions_import_numpy_only():
    loaded = loaded_by("from flashmla_cupy import *")
    assert loaded & HEAVY == {"numpy", "ml_dtypes"}


@pytest.mark.parametrize("name", flashmla_cupy.__all__)
def test_public_name(name):
    value = getattr(flashmla_cupy, name)
    assert value.__name__ == name
    assert inspect.getdoc(value)
    assert value.__doc__, f"{name} inherits its docstring"


def test_all_is_complete():
    assert flashmla_cupy.__all__ == sorted(set(flashmla_cupy.__all__))
    assert set(flashmla_cupy.__all__) <= set(dir(flashmla_cupy))
    found = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value.__module__ == errors.__name__
    }
    assert found <= set(flashmla_cupy.__all__), "an error that is not public"


def test_unknown_name():
    with pytest.raises(AttributeError, match="has no attribute 'decode'"):
        flashmla_cupy.decode  # noqa: B018


def test_every_module_says_what_it_is_for():
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


@needs_checkout
def test_version_is_the_top_of_the_changelog():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == flashmla_cupy.__version__


def test_typed():
    assert (PACKAGE / "py.typed").exists()


def test_cuda_sources_are_found():
    sources = compiler._sources()
    assert {variant.source for variant in all_variants()} <= sources.keys()
    included = {
        name.decode()
        for text in sources.values()
        for name in re.findall(rb'#include "(.+?)"', text)
    }
    assert included <= sources.keys()


def test_entry_point():
    module = importlib.import_module("flashmla_cupy.__main__")
    assert callable(module.main)


@needs_checkout
@pytest.mark.parametrize("cuda", ["cuda12", "cuda13"])
def test_extra_for_jax_on_gpus(cuda):
    """JAX, CuPy and NVRTC for one CUDA; the extra `jax` brings wheels for the CPU."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    ours, jax = extras[f"jax-{cuda}"]
    assert ours == f"flashmla-cupy[{cuda}]"
    assert jax.startswith(f"jax[{cuda}]")
    assert any(requirement.startswith(f"cupy-{cuda}x") for requirement in extras[cuda])
