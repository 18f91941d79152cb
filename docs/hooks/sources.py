"""A hook of MkDocs: links to files of the checkout, as ../cuda_src/merge.cuh, work in the site.

The pages are also read as they lie in the checkout, where such a link opens the file. For the site
every file that a page links to becomes a page of its own, and the link leads there. A link to a
file that does not exist is left as it is, and is then an error of a strict build.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)\)")
_LANGUAGES = {".cu": "cuda", ".cuh": "cuda", ".h": "cpp", ".py": "python", ".toml": "toml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each file of the checkout that a page links to."""
    pages = [file for file in files.documentation_pages() if file.abs_src_path]
    wanted: set[str] = set()
    for page in pages:
        for match in _LINK.finditer(Path(page.abs_src_path or "").read_text()):
            path = _in_checkout(page, match[1])
            if path is not None:
                wanted.add(path)
    for path in sorted(wanted):
        page = File.generated(config, _page_of(path), content=_shown(path))
        page.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points the links at those pages."""

    def there(match: re.Match[str]) -> str:
        path = _in_checkout(page.file, match[1])
        if path is None:
            return match[0]
        here = posixpath.dirname(page.file.src_uri)
        return f"]({posixpath.relpath(_page_of(path), here or '.')})"

    return _LINK.sub(there, markdown)


def _in_checkout(page: File, target: str) -> str | None:
    """The file that a link of the page leads to, from the root of the checkout; None if it is a
    page of the documentation, or not a file."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.src_uri), target))
    is_outside = not path.startswith(("docs/", "../"))
    return path if is_outside and (_ROOT / path).is_file() else None


def _page_of(path: str) -> str:
    return f"source/{path}.md"


def _shown(path: str) -> str:
    """The text of the page: the file, as it is."""
    language = _LANGUAGES.get(os.path.splitext(path)[1], "text")
    text = (_ROOT / path).read_text().rstrip("\n")
    front = f"---\ntitle: {path}\nsearch: {{exclude: true}}\nhide: [toc]\n---\n"
    return f"{front}\n# {path}\n\n````{language}\n{text}\n````\n"
