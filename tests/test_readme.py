"""README.md: its Python blocks run, and what it names exists.

A block runs after the earlier blocks that need NumPy alone, whose names it may use. Blocks that
import a framework that is not installed skip, and so do blocks that import CuPy at their top
without a Hopper GPU.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest
from support import hopper_gpu

import flashmla_cupy
from flashmla_cupy.__main__ import main
from flashmla_cupy.gpu.kernels import all_variants

PACKAGE = Path(flashmla_cupy.__file__).resolve().parent
ROOT = PACKAGE.parent
README = ROOT / "README.md"
if not README.exists():
    pytest.skip("the package is not in its checkout", allow_module_level=True)
TEXT = README.read_text()

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[int, str]]:
    """(line number, text) of each block of the language."""
    return [
        (TEXT[: match.start(2)].count("\n") + 1, match[2])
        for match in _FENCE.finditer(TEXT)
        if match[1] == language
    ]


def frameworks(code: str) -> list[str]:
    """The frameworks that a block imports at its top level."""
    found = set()
    for node in ast.parse(code).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return sorted(found & {"cupy", "torch", "jax"})


PYTHON = blocks("python")


@pytest.mark.parametrize("number", range(len(PYTHON)), ids=[f"line{line}" for line, _ in PYTHON])
def test_python_block(number):
    line, code = PYTHON[number]
    for name in frameworks(code):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
        if name == "cupy" and (reason := hopper_gpu.missing()):
            pytest.skip(f"needs a Hopper GPU: {reason}")
    names: dict[str, object] = {"__name__": f"readme_line{line}"}
    for earlier_line, earlier in PYTHON[:number]:
        if not frameworks(earlier):
            run(earlier, earlier_line, names)
    run(code, line, names)


def run(code: str, line: int, names: dict[str, object]) -> None:
    """Executes a block; tracebacks show its lines in README.md."""
    exec(compile("\n" * (line - 1) + code, str(README), "exec"), names)


def test_there_are_blocks_to_run():
    assert len([code for _, code in PYTHON if not frameworks(code)]) >= 4


def test_links():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_commands_name_what_exists():
    commands = "".join(code for _, code in blocks("sh"))
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
