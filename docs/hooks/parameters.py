"""An extension of Griffe, which reads the docstrings for the API reference: arguments as tables.

The docstrings of this package list arguments in two columns,

    q           [batch, s_q, h_q, 576] bfloat16 or float16
    k_cache     [num_pages, page_size, h_kv, 576] of q's dtype; a second line
                lies under the first

which help() shows well and Markdown would run together. Here they become tables.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROW = re.compile(r"(\S(?:.*?\S)?) {2,}(?=\S)")
_DUNDER = re.compile(r"(?<![`\w])__\w+__(?![`\w])")  # bold, in Markdown


class Parameters(Extension):
    """Rewrites the two-column paragraphs of every docstring."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            paragraphs = _DUNDER.sub(r"`\g<0>`", obj.docstring.value).split("\n\n")
            obj.docstring.value = "\n\n".join(map(_tabulated, paragraphs))


def _tabulated(paragraph: str) -> str:
    """The paragraph, as a table if it is one of two columns and two rows or more."""
    lines = paragraph.split("\n")
    starts = [match.end() for line in lines if (match := _ROW.match(line))]
    if len(starts) < 2 or len(set(starts)) != 1:
        return paragraph
    column = starts[0]
    rows: list[list[str]] = []
    for line in lines:
        name, text = line[:column].strip(), line[column:].strip()
        if name and text and line[column - 2 : column] == "  ":
            rows.append([name, text])
        elif name:  # wider than its column; the text is in the next line
            rows.append([line.strip(), ""])
        elif rows:
            rows[-1][1] = f"{rows[-1][1]} {text}".strip()
        else:
            return paragraph
    cells = [(_code(name), text.replace("|", r"\|")) for name, text in rows]
    return "\n".join(["| argument | |", "|---|---|", *(f"| {a} | {b} |" for a, b in cells)])


def _code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))
