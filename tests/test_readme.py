"""README.md: its Python blocks run, and what it names exists.

A block runs after the earlier blocks that need NumPy alone, whose names it may use. Blocks that
import a framework that is not installed skip, and so do blocks that import CuPy at their top
without a Hopper GPU.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.pages import Page

import flashmla_cupy

PACKAGE = Path(flashmla_cupy.__file__).resolve().parent
ROOT = PACKAGE.parent
README = ROOT / "README.md"
if not README.exists():
    pytest.skip("the package is not in its checkout", allow_module_level=True)
PAGE = Page(README)
TEXT = PAGE.text
PYTHON = PAGE.python


@pytest.mark.parametrize(
    "number", range(len(PYTHON)), ids=[f"line{block.line}" for block in PYTHON]
)
def test_python_block(number):
    block = PYTHON[number]
    if block.missing is not None:
        pytest.skip(block.missing)
    names: dict[str, object] = {"__name__": f"readme_line{block.line}"}
    for earlier in PYTHON[:number]:
        if not earlier.frameworks:
            PAGE.execute(earlier, names)
    PAGE.execute(block, names)


def test_there_are_blocks_to_run():
    assert len([block for block in PYTHON if not block.frameworks]) >= 4


def test_links():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    assert PAGE.broken() == []


def test_commands_name_what_exists():
    commands = "".join(block.code for block in PAGE.blocks("sh"))
    project = (ROOT / "pyproject.toml").read_text()
    table = project.partition("optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^([\w-]+) = \[", table, re.MULTILINE))
    used = {extra for group in re.findall(r"\[([\w,-]+)\]", commands) for extra in group.split(",")}
    assert used
    assert used <= extras
    for path in re.findall(r"python (\S+\.py)", commands):
        assert (ROOT / path).exists(), path


def test_it_is_short():
    assert TEXT.count("\n") <= 210


def test_the_commands_stand_first():
    """From a fresh clone, each complete: they are what a visitor tries."""
    assert [block.code for block in PAGE.blocks("sh")][:2] == [
        "pip install '.[cuda12]' && python examples/quickstart.py\n",
        "pip install '.[cuda12,test]' && python -m pytest\n",
    ]


def test_functions_that_it_names_are_there():
    """The map says in which file a stranger finds a function: `name` in [file](path)."""
    named = re.findall(r"`(\w+)` in \[[\w.]+\]\(([\w/.]+)\)", TEXT)
    assert len(named) >= 4
    for name, path in named:
        assert re.search(rf"\b{name}\(", (ROOT / path).read_text()), f"{name} in {path}"
