"""A schedule as an inline SVG Gantt chart for notebooks: a row a part, a colour a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .view import Piece, Schedule

WIDTH = 760
HEIGHT_LIMIT = 560  # rows get thinner rather than the chart taller


def svg(schedule: Schedule) -> str:
    """The chart; the tooltip of each bar says what it is. Time runs to the right, in tiles."""
    row = max(3, min(16, HEIGHT_LIMIT // max(1, schedule.parts)))
    scale = WIDTH / max(1, schedule.makespan)
    filled = [0] * schedule.parts
    bars = []
    for piece in schedule.pieces:
        bars.append(_bar(piece, filled[piece.part] * scale, scale, row))
        filled[piece.part] += piece.end - piece.begin
    height = row * schedule.parts
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img"><title>{schedule!r}</title>'
        f"{''.join(bars)}</svg>"
    )


def _bar(piece: Piece, x: float, scale: float, row: int) -> str:
    """Neighbouring requests differ in hue by the golden angle; split pieces are paler."""
    hue, lightness = piece.request * 137 % 360, 72 if piece.split else 55
    kind = "split" if piece.split else "whole"
    return (
        f'<rect x="{x:.1f}" y="{piece.part * row}" '
        f'width="{max(0.2, (piece.end - piece.begin) * scale - 0.3):.1f}" height="{row - 1}" '
        f'fill="hsl({hue} 60% {lightness}%)"><title>part {piece.part}: request {piece.request}, '
        f"tiles {piece.begin}:{piece.end} ({kind})</title></rect>"
    )
