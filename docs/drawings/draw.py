"""Draws the pictures of the documentation, docs/drawings/*.svg. A test sees that they are current.

    python docs/drawings/draw.py

Needs NumPy and this package alone: the split is the one that the library makes, and sizes are those
of the kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parents[1])]

from canvas import HUES, LATENT, PROBABILITY, QUERY, ROTARY, Canvas  # noqa: E402

from flashmla_cupy import Schedule  # noqa: E402

HEADS, NOPE, ROPE, VALUE, LATENT_COLUMNS = 128, 128, 64, 128, 512  # DeepSeek-V3


def mla() -> Canvas:
    """What is cached of a token, to scale, and what a decoding call reads and writes."""
    mha_bytes = 2 * HEADS * (NOPE + ROPE + VALUE)
    mla_bytes = 2 * (LATENT_COLUMNS + ROPE)
    c = Canvas(840, 396, "What MLA caches, and what a decoding call reads")
    title = "What the cache holds of one token, in one layer of DeepSeek-V3 (to scale)"
    c.text(24, 30, title, "title")
    width = 792
    for head in range(HEADS):
        x, w = 24 + width * head / HEADS, width / HEADS
        key = w * (NOPE + ROPE) / (NOPE + ROPE + VALUE)
        c.rect(x, 42, key, 26, HUES[4], "")
        c.rect(x + key, 42, w - key - 0.8, 26, HUES[5], "")
    words = f"multi-head attention: a key and a value for each of 128 heads, {mha_bytes:,} bytes"
    c.text(24, 86, words, "note")
    row = width * mla_bytes / mha_bytes
    latent = row * LATENT_COLUMNS / (LATENT_COLUMNS + ROPE)
    c.rect(24, 98, latent, 26, LATENT, "")
    c.rect(24 + latent, 98, row - latent, 26, ROTARY, "")
    words = (
        f"MLA: 512 latent and 64 rotary columns, {mla_bytes:,} bytes, {mha_bytes / mla_bytes:.0f}"
        " times less; all 128 query heads read this one row"
    )
    c.text(44, 116, words, "note")

    words = "One decoding call: two requests, of 150 and 70 tokens, in pages of 64"
    c.text(24, 162, words, "title")
    table, lengths, page = [[3, 0, 5], [1, 2, 4]], [150, 70], 64
    hue = [HUES[0], HUES[2]]
    c.text(24, 190, "block_table", "code")
    c.text(136, 190, "cache_seqlens", "code")
    for b, pages in enumerate(table):
        y = 200 + 34 * b
        for i, number in enumerate(pages):
            if i < -(-lengths[b] // page):
                c.label(24 + 32 * i, y, 30, 26, str(number), hue[b])
            else:
                c.rect(24 + 32 * i, y, 30, 26, kind="empty")
                c.text(39 + 32 * i, y + 17.5, "any", "note", "middle")
        c.text(180, y + 18, str(lengths[b]), anchor="middle")
    c.text(24, 288, "an entry past the", "note")
    c.text(24, 305, "length is never read", "note")
    c.line((218, 229), (280, 229), arrow=True)

    c.text(286, 190, "k_cache [6, 64, 1, 576]", "code")
    for number in range(6):
        x, y = 286 + 62 * (number % 3), 200 + 66 * (number // 3)
        b, i = next((b, row.index(number)) for b, row in enumerate(table) if number in row)
        tokens = min(max(lengths[b] - page * i, 0), page)
        c.rect(x, y, 56, 58, kind="empty")
        if tokens:
            c.rect(x, y, 56, 58 * tokens / page, hue[b])
        c.text(x + 28, y + 46, f"page {number}", "on" if tokens == page else "", "middle")
    c.paragraph(286, 346, "grey slots hold no token: what lies there, NaN too, changes no bit", 26)

    c.text(520, 190, "q [2, 1, 128, 576]", "code")
    c.label(520, 200, 100, 26, "latent 512", QUERY)
    c.label(620, 200, 36, 26, "64", ROTARY)
    c.label(520, 262, 136, 56, "softmax(q Kᵀ) V", PROBABILITY)
    c.paragraph(520, 346, "V: the first 512 columns of the same rows", 26)
    c.line((588, 228), (588, 258), arrow=True)
    c.line((472, 290), (516, 290), arrow=True)
    c.text(696, 254, "out", "code")
    c.label(696, 262, 120, 26, "[2, 1, 128, 512]", LATENT)
    c.text(696, 310, "lse", "code")
    c.label(696, 318, 80, 26, "[2, 128, 1]", HUES[4])
    c.line((658, 275), (692, 275), arrow=True)
    c.line((658, 310), (676, 310), (676, 331), (692, 331), arrow=True)
    return c


def split() -> Canvas:
    """The split of a ragged batch, as the library makes it for a GPU of eight multiprocessors."""
    lengths, parts = [3000, 500, 9000, 250, 1300, 4200], 8
    schedule = Schedule.of(lengths, 64, 1, num_sms=parts)
    tiles = [-(-n // 64) for n in lengths]
    starts = [sum(tiles[:b]) for b in range(len(tiles) + 1)]
    c = Canvas(840, 392, "The split of a ragged batch over eight parts")
    words = (
        "The tiles (64 tokens) of all requests form a line, which is cut into parts of equal cost"
    )
    c.text(24, 30, words, "title")
    scale = 792 / starts[-1]
    for b, count in enumerate(tiles):
        x, w = 24 + scale * starts[b], scale * count
        c.rect(x, 62, w, 28, HUES[b])
        if w > 22:
            c.text(x + w / 2, 81, f"request {b}" if w > 70 else str(b), "on", "middle")
        if w > 120:
            words = f"{lengths[b]:,} tokens, {count} tiles"
            c.text(x + w / 2, 56, words, "note", "middle")
    for piece in schedule.pieces:
        if piece.begin:
            x = 24 + scale * (starts[piece.request] + piece.begin)
            c.line((x, 58), (x, 98), dashed=True)
    c.text(24, 118, "dashed: a cut inside a request; its pieces are merged afterwards", "note")

    words = "Each part is computed by one column of thread blocks; time runs to the right"
    c.text(24, 152, words, "title")
    scale = 690 / schedule.makespan
    filled = [0] * parts
    for piece in schedule.pieces:
        x, w = 90 + scale * filled[piece.part], scale * (piece.end - piece.begin)
        y = 164 + 23 * piece.part
        c.rect(x, y, w, 20, HUES[piece.request])
        words = f"{piece.request}: {piece.begin}..{piece.end}" if w > 60 else str(piece.request)
        if w > 12:
            c.text(x + w / 2, y + 14.5, words, "on", "middle")
        filled[piece.part] += piece.end - piece.begin
    for part in range(parts):
        c.text(24, 178 + 23 * part, f"part {part}", "note")
    words = (
        f"As the library splits it: {len(schedule.pieces)} pieces, the longest part has"
        f" {schedule.makespan} tiles, the mean is {schedule.balance:.0%} of it."
    )
    c.text(24, 372, words, "note")
    return c


def ring() -> Canvas:
    """The three stages of shared memory, and who reads and writes each."""
    c = Canvas(840, 356, "The ring of three stages in shared memory")
    words = "Shared memory of a thread block: a ring of three stages, each a tile of K"
    c.text(24, 30, words, "title")
    states = [
        "P has overwritten the rotary block; both matrix warpgroups read P and V",
        "has arrived; the softmax warpgroup computes S from all nine of its blocks",
        "is on its way: TMA fills each half, which has a barrier of its own",
    ]
    for stage, state in enumerate(states):
        y = 52 + 70 * stage
        c.text(24, y + 28, f"tile {4 + stage}")
        for block in range(9):
            x = 84 + 44 * block
            if block == 8:
                c.label(x, y, 40, 46, *(("rope", ROTARY) if stage else ("P", PROBABILITY)))
            elif stage < 2:
                c.label(x, y, 40, 46, f"V{block}", LATENT)
            else:
                c.rect(x, y, 40, 46, *((LATENT, "edge") if block < 3 else ("", "empty")))
        c.paragraph(492, y + 20, state, 48)
    c.brace(84, 244, 172, "half 0: columns 0..255")
    c.brace(260, 244, 216, "half 1: 256..511, rotary")
    c.paragraph(
        24,
        296,
        "A column block is 64 tokens by 128 bytes, a stage 73,728 bytes, and three of them 221,184"
        " of the 232,448 that a block can have. P of a tile [64 rows, 64 tokens] is as large as its"
        " rotary block, which S no longer needs: that is why three stages fit. Q comes through the"
        " ring once a request, into the registers of the softmax warpgroup.",
    )
    return c


def timeline() -> Canvas:
    """Who does what while a thread block computes the tiles of a request."""
    c = Canvas(840, 340, "The timeline of a thread block")
    words = "One thread block over four tiles of a request; time runs to the right"
    c.text(24, 30, words, "title")
    matrix = (164, 194)
    lanes = ("TMA, half 0", "TMA, half 1", "softmax", "matrix, half 0", "matrix, half 1")
    for name, y in zip(lanes, (50, 80, 122, *matrix), strict=True):
        c.text(24, y + 18, name)
    period, first = 100, 244  # of a tile; where S of tile 0 begins
    for i, x in enumerate((140, 180, 220, 260, 496)):  # Q and two tiles fill the ring
        for y in (50, 80):
            c.label(x, y, 36, 26, f"K{i - 1}" if i else "Q", LATENT if i else QUERY)
    c.label(222, 122, 18, 26, "Q", QUERY)
    for tile in range(4):
        x = first + period * tile
        c.label(x, 122, 64, 26, f"S{tile}=QKᵀ", HUES[5])
        c.label(x + 64, 122, 30, 26, f"P{tile}", PROBABILITY)
        for y in matrix:
            x = first + 156 + period * tile - 4 * (tile == 3)
            c.label(x, y, 92, 26, f"O += P{tile} V{tile}", ROTARY)
    c.label(642, 122, 40, 26, "lse", HUES[4])
    for y in matrix:
        c.label(790, y, 34, 26, "out", HUES[4])
    c.paragraph(
        24,
        250,
        "If the next tile has arrived, its S is issued first, and P V of this tile is released"
        " 8 of the 36 steps before the end of that S: so the tensor cores go from S to P V and"
        " back, and P is computed meanwhile. Otherwise P V is released at once. K3 waits for a"
        " stage: its half 0 until matrix half 0 has read tile 0, its half 1 until both have,"
        " since P lies there. Each matrix warpgroup holds O, 64 rows by 256 columns, in 128 of a"
        " thread's 160 registers.",
    )
    return c


def pair() -> Canvas:
    """The two pieces of a request that neighbouring parts share."""
    c = Canvas(840, 254, "A pair: two pieces of a request, merged without a second kernel")
    c.text(24, 30, "A pair: request 2 is cut once, between neighbouring parts", "title")
    c.text(24, 72, "part 4")
    c.label(90, 54, 380, 26, "request 1", HUES[2])
    c.label(470, 54, 200, 26, "front of request 2", HUES[0])
    c.text(24, 132, "part 5")
    c.label(90, 114, 240, 26, "back of request 2", HUES[0])
    c.label(330, 114, 330, 26, "request 3", HUES[5])
    c.line((329, 142), (329, 160), (665, 160), (665, 84), arrow=True)
    words = "its partial result lies in memory, and a word says so, before the front ends"
    c.text(90, 182, words, "note")
    c.label(670, 54, 70, 26, "merge", HUES[4])
    c.paragraph(
        24,
        214,
        "The front finds the word written: it fetches the rows of the back into the ring, which is"
        " free by then, and writes out and lse. If the word is not there yet, it does not wait: the"
        " combine kernel merges the two, to the same bits.",
    )
    return c


DRAWINGS: dict[str, Callable[[], Canvas]] = {
    "mla": mla, "split": split, "ring": ring, "timeline": timeline, "pair": pair
}  # fmt: skip


def main() -> None:
    for name, draw in DRAWINGS.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg)


if __name__ == "__main__":
    main()
