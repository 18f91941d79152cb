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
from flashmla_cupy.__main__ import main
from flashmla_cupy.gpu.kernels import all_variants

PACKAGE = Path(flashmla_cupy.__file__).resolve().parent
ROOT = PACKAGE.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
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


def test_commands_name_what_exists():
    commands = "".join(block.code for block in PAGE.blocks("sh"))
    project = (ROOT / "pyproject.toml").read_text()
    extras = set(re.findall(r"^(\w+) = \[", project.partition("optional-dependencies]")[2], re.M))
    used = {extra for group in re.findall(r"\[([\w,]+)\]", commands) for extra in group.split(",")}
    assert used
    assert used <= extras
    for path in re.findall(r"python (\S+\.py)", commands):
        assert (ROOT / path).exists(), path


def test_every_environment_variable_is_there():
    pattern = re.compile(r"FLASHMLA_CUPY_[A-Z_]+")
    code = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    assert set(pattern.findall(TEXT)) == set(pattern.findall(code))


def test_every_command_is_there(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    ([a-z-]+)(?: |$)", capsys.readouterr().out, re.MULTILINE)
    assert commands
    section = TEXT.partition("## Command line")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `([a-z-]+)`", section, re.MULTILINE) == commands


def test_every_kernel_is_there():
    section = TEXT.partition("## How it works")[2].partition("\n## ")[0]
    for source in {variant.source for variant in all_variants()}:
        assert f"[{source}](cuda_src/{source})" in section
