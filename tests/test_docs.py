"""docs/: Python blocks of every page run, links lead somewhere, drawings and tables are current.

The blocks of a page run in their order, in one namespace; one that imports a framework that is not
installed skips, and so does one that imports CuPy at its top without a Hopper GPU.
"""

from __future__ import annotations

import inspect
import re
import runpy
import sys
from pathlib import Path

import pytest
from support.pages import Page

import flashmla_cupy
from flashmla_cupy import errors
from flashmla_cupy.__main__ import main
from flashmla_cupy.gpu.kernels import all_variants

PACKAGE = Path(flashmla_cupy.__file__).resolve().parent
ROOT = PACKAGE.parent
DOCS = ROOT / "docs"
if not DOCS.exists():
    pytest.skip("the package is not in its checkout", allow_module_level=True)

PAGES = {path.relative_to(DOCS).as_posix(): Page(path) for path in sorted(DOCS.rglob("*.md"))}
BLOCKS = [(name, number) for name, page in PAGES.items() for number in range(len(page.python))]


def label(name: str, number: int) -> str:
    return f"{name}:{PAGES[name].python[number].line}"


@pytest.fixture
def _no_other_name():
    """A page gives this package the name of another one, which other tests look for."""
    yield
    sys.modules.pop("flash_mla", None)


@pytest.mark.usefixtures("_no_other_name")
@pytest.mark.parametrize(("name", "number"), BLOCKS, ids=[label(*block) for block in BLOCKS])
def test_python_block(name, number, monkeypatch):
    monkeypatch.chdir(ROOT)
    PAGES[name].run(number)


def test_there_are_pages_and_blocks():
    assert len(PAGES) >= 9
    for name in ("semantics.md", "cache.md", "checkpoints.md", "sizes.md", "errors.md"):
        assert any(not block.frameworks for block in PAGES[name].python), name
    for framework in ("numpy", "cupy", "pytorch", "jax", "dlpack"):
        assert PAGES[f"frameworks/{framework}.md"].python, framework


@pytest.mark.parametrize("name", PAGES)
def test_links(name):
    assert PAGES[name].broken() == []


def test_every_page_is_in_the_site():
    listed = re.findall(
        r"^ +- (?:[\w ]+: )?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE
    )
    assert sorted(listed) == sorted(PAGES)


def test_drawings_are_current():
    drawings = runpy.run_path(str(DOCS / "drawings" / "draw.py"))["DRAWINGS"]
    assert {path.stem for path in (DOCS / "drawings").glob("*.svg")} == set(drawings)
    for name, draw in drawings.items():
        made = (DOCS / "drawings" / f"{name}.svg").read_text()
        assert made == draw().svg, f"{name}.svg: run docs/drawings/draw.py"


def test_commands_name_what_exists():
    commands = "".join(block.code for page in PAGES.values() for block in page.blocks("sh"))
    project = (ROOT / "pyproject.toml").read_text()
    table = project.partition("optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^([\w-]+) = \[", table, re.MULTILINE))
    groups = re.findall(r"\.\[([\w,-]+)\]", commands)
    used = {extra for group in groups for extra in group.split(",")}
    assert used
    assert used <= extras
    described = set(re.findall(r"^\| `([\w-]+)`", PAGES["getting-started.md"].text, re.MULTILINE))
    assert described == extras
    for path in re.findall(r"python (\S+\.py)", commands):
        assert (ROOT / path).exists(), path


def test_every_environment_variable_is_there():
    pattern = re.compile(r"FLASHMLA_CUPY_[A-Z_]+")
    code = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    section = PAGES["command-line.md"].section("## Environment variables")
    assert set(pattern.findall(section)) == set(pattern.findall(code))


def test_every_command_is_there(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    ([a-z-]+)(?: |$)", capsys.readouterr().out, re.MULTILINE)
    assert commands
    section = PAGES["command-line.md"].section("## Commands")
    assert re.findall(r"^\| `([a-z-]+)`", section, re.MULTILINE) == commands


def test_every_kernel_is_there():
    text = PAGES["kernels.md"].text
    for source in {variant.source for variant in all_variants()}:
        assert f"[{source}](../cuda_src/{source})" in text


def test_every_reason_to_refuse_is_in_errors():
    table = PAGES["errors.md"].section("## What is found on the device")
    reasons = set(re.findall(r"`([^`]+)`", "".join(re.findall(r"^\| (`[^|]+) \|", table, re.M))))
    assert reasons == {*errors._REASONS, "foreign metadata"}


def test_every_room_of_the_package_is_described():
    section = PAGES["contributing.md"].section("## The house")
    rooms = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path.is_dir() and list(path.glob("*.py")))
    } - {"_version.py"}
    described = set(re.findall(r"`([\w.]+(?:\.py|/))`", section)) - {"cuda_src/"}
    assert {room for room in described if "test_" not in room} == rooms


def test_every_public_name_is_in_the_reference():
    """Functions and classes in api.md, errors in errors.md, which shows a whole module."""
    reference = set(re.findall(r"^::: flashmla_cupy\.(\w+)$", PAGES["api.md"].text, re.MULTILINE))
    public = set(flashmla_cupy.__all__)
    assert reference == public - set(vars(errors))
    assert "::: flashmla_cupy.errors" in PAGES["errors.md"].text


def test_messages_in_troubleshooting_are_those_of_the_code():
    """A heading in quotation marks is what a reader searches for: some words of a message."""
    code = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    code = re.sub(r'"\s*f?"', "", code)  # a message over several lines
    headings = re.findall(r'^## "([^"]+)"', PAGES["troubleshooting.md"].text, re.MULTILINE)
    assert len(headings) >= 5
    for words in headings:
        pattern = re.escape(words).replace(r"9\.0", r"(?:9\.0|\{arch\.CAPABILITIES\})")
        assert re.search(pattern, code), words


def test_arguments_of_a_docstring_become_a_table():
    """What MkDocs shows of the two columns of arguments, in which a name may be too wide."""
    pytest.importorskip("griffe")
    tabulated = runpy.run_path(str(DOCS / "hooks" / "parameters.py"))["_tabulated"]
    text = inspect.getdoc(flashmla_cupy.flash_mla_with_kvcache)
    rows = [row for part in text.split("\n\n") for row in tabulated(part).split("\n")]
    table = {row.split("|")[1].strip(): row for row in rows if row.startswith("| `")}
    assert {"`q`", "`tile_scheduler_metadata`, `num_splits`", "`out`, `lse`"} <= table.keys()
    assert table["`k_cache`"].endswith("128 or 256; V is its first 512 columns |")
    for prose in ("One line.", "a = 1\nb  = 2", "Two  spaces in a sentence.\nAnd a second line."):
        assert tabulated(prose) == prose
