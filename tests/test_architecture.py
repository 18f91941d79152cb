"""The house: which file imports which, read off the sources. Data flows one way, in no circle.

Imports inside functions and for type checking count as well. A file's own package does not: Python
imports it first whatever the file says, and the package's __init__ looks names up when asked.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import flashmla_cupy

ROOT = Path(flashmla_cupy.__file__).resolve().parent
PACKAGE = ROOT.name
MOST_LINES = 330  # of a file of Python
MOST_KERNEL_LINES = 500  # of a file of CUDA


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in ROOT.rglob("*.py")}


def imports_of(module: str, source: str, modules=MODULES) -> set[str]:
    """The modules of this package that the source imports, anywhere in it."""
    is_package = modules[module].name == "__init__.py"
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")
                above = above[: len(above) - node.level + is_package]
                base = ".".join([*above, *filter(None, [node.module])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        known = [name for name in names if name in modules]
        # `from ..calls import checks` is an import of the module checks, not of what calls holds.
        found |= {name for name in known if not any(k.startswith(f"{name}.") for k in known)}
    return found - {module, PACKAGE}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import one another, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def graph_of_the_package() -> dict[str, set[str]]:
    return {name: imports_of(name, path.read_text()) for name, path in MODULES.items()}


def test_no_import_circle():
    assert circles(graph_of_the_package()) == []


def test_a_circle_would_be_found():
    graph = graph_of_the_package()
    graph[f"{PACKAGE}.sizes"].add(f"{PACKAGE}.interface")
    (found,) = circles(graph)
    assert {f"{PACKAGE}.sizes", f"{PACKAGE}.interface"} <= set(found)
    inside = "def f():\n    from ..interface import check\n"
    assert imports_of(f"{PACKAGE}.calls.decode", inside) == {f"{PACKAGE}.interface"}
    typed = "if TYPE_CHECKING:\n    from .gpu import engine\n"
    assert imports_of(f"{PACKAGE}.info", typed) == {f"{PACKAGE}.gpu.engine"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_file_says_what_it_is_for_and_is_one_idea_long(module):
    source = MODULES[module].read_text()
    assert ast.get_docstring(ast.parse(source))
    assert source.count("\n") <= MOST_LINES


@pytest.mark.parametrize(
    "path", sorted((ROOT.parent / "cuda_src").glob("*.cu*")), ids=lambda p: p.name
)
def test_every_kernel_file_says_what_it_is_for(path):
    source = path.read_text()
    assert source.startswith("// ")
    assert source.count("\n") <= MOST_KERNEL_LINES


def test_files_of_tests_have_names_of_their_own():
    """Or pytest takes one for the other, and refuses both."""
    names = [path.name for path in (ROOT.parent / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
