"""Markdown pages as tests read them: their code blocks, their links, and how to run a block."""

from __future__ import annotations

import ast
import importlib.util
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pytest
from support import hopper_gpu

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: the number of its first line in the page, and its text."""

    line: int
    code: str

    @property
    def frameworks(self) -> list[str]:
        """The frameworks that a Python block imports at its top level."""
        found = set()
        for node in self.tree.body:
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
        return sorted(found & {"cupy", "torch", "jax"})

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.code)

    @property
    def stored(self) -> set[str]:
        """The names that a Python block defines."""
        found = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.alias):
                found.add((node.asname or node.name).partition(".")[0])
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
        return found

    @property
    def loaded(self) -> set[str]:
        """The names that a Python block uses."""
        return {node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name)}

    @property
    def missing(self) -> str | None:
        """Why a Python block cannot run here; None if it can."""
        for name in self.frameworks:
            if importlib.util.find_spec(name) is None:
                return f"{name} is not installed"
            if name == "cupy" and (reason := hopper_gpu.missing()):
                return f"needs a Hopper GPU: {reason}"
        return None


@dataclass
class Page:
    """A Markdown file. `run` executes its Python blocks in one namespace, in their order."""

    path: Path
    names: dict[str, object] = field(default_factory=dict)
    done: int = 0  # how many of the Python blocks have been run or passed over
    absent: dict[str, str] = field(default_factory=dict)  # what those passed over define, and why

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    def blocks(self, language: str) -> list[Block]:
        return [
            Block(self.text[: match.start(2)].count("\n") + 1, match[2])
            for match in _FENCE.finditer(self.text)
            if match[1] == language
        ]

    @cached_property
    def python(self) -> list[Block]:
        return self.blocks("python")

    @cached_property
    def anchors(self) -> set[str]:
        """What a link to a heading of this page has after its #, by the rule of MkDocs."""
        headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", self.text), re.MULTILINE)
        words = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
        return {re.sub(r"[-\s]+", "-", heading) for heading in words}

    @property
    def links(self) -> list[str]:
        """The targets of links and pictures outside of code blocks."""
        targets: list[str] = _LINK.findall(_FENCE.sub("", self.text))
        return targets

    def broken(self) -> list[str]:
        """The links to files that do not exist, or to headings that their page does not have."""
        found = []
        for target in self.links:
            path, _, anchor = target.partition("#")
            there = self.path.parent / path if path else self.path
            if target.startswith("https://"):
                continue
            if not there.exists() or (anchor and anchor not in Page(there).anchors):
                found.append(target)
        return found

    def section(self, heading: str) -> str:
        """What stands below a heading, up to the next one of its level."""
        level = heading.partition(" ")[0]
        assert f"{heading}\n" in self.text, f"{self.path.name} has no {heading!r}"
        return self.text.partition(f"{heading}\n")[2].partition(f"\n{level} ")[0]

    def execute(self, block: Block, names: dict[str, object]) -> None:
        """Runs a block; tracebacks show its lines in the page."""
        exec(compile("\n" * (block.line - 1) + block.code, str(self.path), "exec"), names)

    def run(self, number: int) -> None:
        """Runs a Python block after those before it; skips if it, or one that it needs, cannot."""
        assert number >= self.done, "the blocks of a page run once, in their order"
        self.names.setdefault("__name__", self.path.stem)
        reason = None
        for block in self.python[self.done : number + 1]:
            reason = block.missing
            if reason is None and (needed := block.loaded & self.absent.keys()):
                reason = self.absent[min(needed)]
            for name in block.stored:
                if reason is not None:
                    self.absent[name] = reason
                else:
                    self.absent.pop(name, None)
            self.done += 1
            if reason is None:
                self.execute(block, self.names)
        if reason is not None:
            pytest.skip(reason)
