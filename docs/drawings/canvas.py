"""A small SVG canvas for the drawings of the documentation: shapes, arrows and two colour schemes.

Each drawing brings its own panel, so that it reads on a light page and on a dark one, and follows
the reader's preferred scheme where the browser tells it.
"""

from __future__ import annotations

from html import escape
from textwrap import wrap

# Fills that dark text reads on, in both schemes. A request, or a role, keeps its colour.
HUES = ("#6fc3b4", "#f0b263", "#9db7ec", "#e59aa8", "#b6cf72", "#c8a6e2")
LATENT, ROTARY, QUERY, PROBABILITY = HUES[0], HUES[1], HUES[2], HUES[3]

_STYLE = """
text{font:13px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;fill:#1d2730}
.panel{fill:#fafbfc;stroke:#d3dae0}.note{fill:#56626d}.title{font-weight:600;font-size:14px}
.on{fill:#13201d}.code{font-family:ui-monospace,Menlo,"DejaVu Sans Mono",monospace;font-size:12px}
.box{fill:none;stroke:#7b8893}.empty{fill:#e6eaee;stroke:#aab4bd}.line{fill:none;stroke:#56626d}
.head{fill:#56626d}.edge{stroke:#fafbfc;stroke-width:1}
@media (prefers-color-scheme:dark){text{fill:#e4eaef}.panel{fill:#1a2129;stroke:#36414c}
.note{fill:#a4b0bb}.on{fill:#13201d}.box{stroke:#8794a0}.empty{fill:#2a343e;stroke:#55616c}
.line{stroke:#a4b0bb}.head{fill:#a4b0bb}.edge{stroke:#1a2129}}
"""


class Canvas:
    """Shapes in the order they are drawn; `svg` is the whole file."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self._parts: list[str] = []

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str = "", kind: str = "edge"
    ) -> None:
        """A rectangle; its fill, or that of its class `kind`."""
        paint = f' fill="{fill}"' if fill else ""
        self._parts.append(
            f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}" rx="2"{paint}/>'
        )

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        """Words at a base line; `anchor` start, middle or end."""
        kinds = f' class="{kind}"' if kind else ""
        self._parts.append(
            f'<text{kinds} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def paragraph(self, x: float, y: float, words: str, columns: int = 116) -> None:
        """Wrapped notes, the first line at base line y."""
        for i, line in enumerate(wrap(words, columns)):
            self.text(x, y + 20 * i, line, "note")

    def label(self, x: float, y: float, width: float, height: float, words: str, fill: str) -> None:
        """A filled rectangle with words in its middle."""
        self.rect(x, y, width, height, fill)
        self.text(x + width / 2, y + height / 2 + 4.5, words, "on", "middle")

    def line(self, *points: tuple[float, float], arrow: bool = False, dashed: bool = False) -> None:
        """A line through the points, with an arrow head at its end if asked for."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        head = ' marker-end="url(#head)"' if arrow else ""
        self._parts.append(f'<polyline class="line" points="{path}"{dash}{head}/>')

    def brace(self, x: float, y: float, width: float, words: str) -> None:
        """A bracket under something, and words under the bracket."""
        self.line((x, y), (x, y + 5), (x + width, y + 5), (x + width, y))
        self.text(x + width / 2, y + 20, words, "note", "middle")

    @property
    def svg(self) -> str:
        size = f'width="{self.width}" height="{self.height}"'
        view = f'viewBox="0 0 {self.width} {self.height}"'
        head = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path class="head" d="M0 0 8 4 0 8z"/></marker></defs>'
        )
        panel = (
            f'<rect class="panel" x="0.5" y="0.5" width="{self.width - 1}" '
            f'height="{self.height - 1}" rx="8"/>'
        )
        body = "\n".join(self._parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {view} role="img">\n'
            f"<title>{escape(self.title)}</title>\n<style>{_STYLE}</style>\n{head}\n{panel}\n"
            f"{body}\n</svg>\n"
        )
