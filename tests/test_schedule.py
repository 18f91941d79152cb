"""The split of a batch: what any schedule must satisfy, checked without repeating how it is made.

`problems_of` reads the records as the decode kernel does and lists what is wrong with them. That
the device makes the same records is the business of tests/gpu/test_schedule_gpu.py; here, only its
constants are compared.
"""

from __future__ import annotations

import copy
import pickle
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from support.oracle import assert_within_bound, oracle
from support.problems import make_problem

import flashmla_cupy
from flashmla_cupy.errors import ArgTypeError, ArgumentError, DTypeError, ScalarError, ShapeError
from flashmla_cupy.schedule import split as schedule
from flashmla_cupy.schedule import view
from flashmla_cupy.schedule.sched_meta import SchedMeta, stale_requests
from flashmla_cupy.schedule.view import Schedule
from flashmla_cupy.sizes import num_sm_parts

SOURCE = Path(__file__).parent.parent / "cuda_src" / "schedule.cu"
INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
EDGES = (0, 1, 63, 64, 65, -1, INT_MIN, INT_MAX, INT_MAX - 63, 4096)


def tiles_of(length: int) -> int:
    return (max(length, 0) + 63) // 64


def problems_of(metadata, num_splits, lengths) -> list[str]:
    """What is wrong with a schedule, in words; nothing if it is right."""
    lengths = [int(n) for n in lengths]
    batch, wrong = len(lengths), []
    pieces: list[list[tuple[int, int, int | None]]] = [[] for _ in range(batch)]
    where: list[list[int]] = [[] for _ in range(batch)]  # the parts of the pieces
    flags = [0] * len(metadata)
    slots = 0  # those given away so far
    for part, row in enumerate(metadata.tolist()):
        first, begin, last, end, slot, first_tiles, last_tiles, _ = row
        flags[part], slot = slot >> 16 & 3, slot & 0xFFFF
        if last == -1:
            if any((first, begin, end, slot, flags[part], first_tiles, last_tiles)):
                wrong.append(f"part {part} is empty and not zero")
            continue
        if not 0 <= first <= last < batch:
            wrong.append(f"part {part}: requests {first} to {last} of {batch}")
            continue
        if slot != slots:
            wrong.append(f"part {part}: slot {slot}, but {slots} are taken")
        if (first_tiles, last_tiles) != (tiles_of(lengths[first]), tiles_of(lengths[last])):
            wrong.append(f"part {part}: recorded tiles are not those of the lengths")
        for request in range(first, last + 1):
            count = tiles_of(lengths[request])
            start = begin if request == first else 0
            stop = end if request == last else count
            where[request].append(part)
            if (start, stop) == (0, count):
                pieces[request].append((start, stop, None))
                continue
            if request not in (first, last):
                wrong.append(f"part {part}: request {request} is split in the middle of the part")
            pieces[request].append((start, stop, slots))
            slots += 1
    if slots > 2 * (len(metadata) - 1):
        wrong.append(f"{slots} split pieces do not fit the partial results")
    for request, found in enumerate(pieces):
        count = tiles_of(lengths[request])
        edges = [0, *(stop for _, stop, _ in found)]
        if [start for start, _, _ in found] != edges[:-1] or edges[-1] != count:
            wrong.append(f"request {request}: {found} do not cover {count} tiles")
        if not found or (count and any(start >= stop for start, stop, _ in found)):
            wrong.append(f"request {request}: no piece, or an empty one")
        if count == 0 and len(found) != 1:
            wrong.append(f"request {request} has no tile and {len(found)} pieces")
        own = [slot for _, _, slot in found]
        if len(own) > 1 and own != list(range(own[0], own[0] + len(own))):
            wrong.append(f"request {request}: slots {own}")
        if num_splits[request + 1] - num_splits[request] != len(found):
            wrong.append(f"request {request}: num_splits does not say {len(found)} pieces")
    pairs = [0] * len(metadata)
    for found in where:
        if len(found) == 2:  # combine.cu takes two pieces for a pair
            pairs[found[0]] |= 2
            pairs[found[1]] |= 1
    if flags != pairs:
        wrong.append(f"pairs {pairs} are marked {flags}")
    split = [(found[0][2], request) for request, found in enumerate(pieces) if len(found) > 1]
    listed = [slot << 20 | request for slot, request in split]
    listed += [slots << 20 | schedule.MAX_BATCH] * (len(metadata) - len(split))
    if metadata[:, 7].tolist() != listed:
        wrong.append(f"column 7 is {metadata[:, 7].tolist()}, not {listed}")
    if num_splits[0] != 0 or len(num_splits) != batch + 1:
        wrong.append("num_splits does not begin at 0, or has another length")
    return wrong


def random_case(seed: int) -> tuple[np.ndarray, int, int, int]:
    """(lengths, parts, rows, h_kv) of one of the kinds of batches that differ in how they split."""
    rng = np.random.default_rng(seed)
    batch = int(rng.integers(1, 9) if rng.random() < 0.4 else rng.integers(1, 200))
    lengths = [
        lambda: rng.integers(0, 300, batch),  # requests of less than a part each
        lambda: rng.integers(0, 30000, batch),
        lambda: np.full(batch, rng.integers(1, 70000)),  # all alike
        lambda: rng.choice(EDGES, batch),
        lambda: np.where(rng.random(batch) < 0.7, 0, rng.integers(0, 5000, batch)),
        lambda: np.where(rng.random(batch) < 0.02, 131072, 512),  # one long among short
        lambda: rng.integers(INT_MIN, INT_MAX + 1, batch),  # whatever a stale buffer holds
    ][seed % 7]()
    parts = int(rng.choice([1, 2, 16, 33, 66, 132]) if rng.random() < 0.6 else rng.integers(1, 133))
    return lengths.astype(np.int32), parts, int(rng.choice([1, 16, 64, 128, 512])), seed % 3 + 1


@pytest.mark.parametrize("block", range(8))
def test_random_batches(block):
    for seed in range(block * 400, (block + 1) * 400):
        lengths, parts, rows, h_kv = random_case(seed)
        metadata, num_splits = schedule.plan(lengths, parts, rows, h_kv)
        assert metadata.shape == (parts, 8)
        assert metadata.dtype == num_splits.dtype == np.int32
        assert problems_of(metadata, num_splits, lengths) == [], f"seed {seed}"
        assert not stale_requests(metadata, lengths).any(), f"seed {seed}"


@pytest.mark.parametrize("parts", range(1, 133))
def test_every_number_of_parts(parts):
    lengths = np.random.default_rng(parts).integers(0, 9000, 40).astype(np.int32)
    assert problems_of(*schedule.plan(lengths, parts, 16, 1), lengths) == []


@pytest.mark.parametrize("length", EDGES)
@pytest.mark.parametrize("batch", [1, 2, 133])
def test_edge_lengths(batch, length):
    lengths = np.full(batch, length, np.int32)
    assert problems_of(*schedule.plan(lengths, 132, 128, 1), lengths) == []


@pytest.mark.parametrize("batch", [4096, 20000])
def test_large_batches(batch):
    rng = np.random.default_rng(batch)
    for lengths in (
        rng.integers(0, 5000, batch),
        np.full(batch, INT_MAX),
        rng.choice(EDGES, batch),
    ):
        lengths = lengths.astype(np.int32)
        assert problems_of(*schedule.plan(lengths, 132, 64, 1), lengths) == []


def test_65536_requests_of_the_largest_length():
    """The largest costs there are: an overflow would show as parts out of order."""
    lengths = np.full(65536, INT_MAX, np.int32)
    metadata, _ = schedule.plan(lengths, 128, 64, 8)
    assert not stale_requests(metadata, lengths).any()
    assert set(np.diff(metadata[:, 0])) == {512}  # 65536 requests alike, in 128 parts


def test_longer_than_the_schedule_counts():
    """Beyond its even share of 2^26 tiles a request counts as that: the cuts are the same."""
    lengths = np.full(100, 6400, np.int32)
    lengths[50] = INT_MAX
    most = schedule.MOST_TILES // 100 * 64
    assert most < INT_MAX
    metadata, num_splits = schedule.plan(lengths, 132, 16, 1)
    assert problems_of(metadata, num_splits, lengths) == []
    lengths[50] = most
    same, same_splits = schedule.plan(lengths, 132, 16, 1)
    assert np.array_equal(num_splits, same_splits)
    assert np.array_equal(metadata[:, :3], same[:, :3])


def test_no_request():
    metadata, num_splits = schedule.plan(np.zeros(0, np.int32), 5, 16, 1)
    assert metadata.tolist() == [[0, 0, -1, 0, 0, 0, 0, schedule.MAX_BATCH]] * 5
    assert num_splits.tolist() == [0]


def test_requests_without_tiles_are_one_part():
    metadata, num_splits = schedule.plan(np.zeros(7, np.int32), 3, 16, 1)
    first = metadata[0].tolist()
    assert first[:4] == [0, 0, 6, 0] and first[5:] == [0, 0, schedule.MAX_BATCH]
    assert first[4] % 2**18 == 0  # below the check
    assert (metadata[1:, 2] == -1).all()
    assert num_splits.tolist() == list(range(8))


def test_same_lengths_same_schedule():
    lengths, parts, rows, h_kv = random_case(1)
    one, two = (schedule.plan(lengths.copy(), parts, rows, h_kv) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


# ---- which requests metadata fits ---------------------------------------------------------------


def test_a_request_whose_recorded_tiles_are_others_is_stale():
    """One part has all three, whole. Of the first and the last one the tiles are recorded; the one
    between them is computed with the length it has."""
    lengths = np.array([100, 100, 100], np.int32)
    metadata, _ = schedule.plan(lengths, 1, 16, 1)
    assert metadata[0, :4].tolist() == [0, 0, 2, 2]
    for request, expected in [(0, True), (1, False), (2, True)]:
        for length in (300, 0, 64):
            changed = lengths.copy()
            changed[request] = length
            assert stale_requests(metadata, changed).tolist() == [
                expected and other == request for other in range(3)
            ]
    # A part that ends inside of a request records how long that is, though it covers less.
    lengths = np.array([6400], np.int32)
    metadata, _ = schedule.plan(lengths, 4, 16, 1)
    assert len(Schedule(metadata, np.array([0, 4], np.int32), lengths).pieces) == 4
    for column, part in ((6, 0), (5, 3)):
        changed = metadata.copy()
        changed[part, column] += 1
        assert stale_requests(changed, lengths).all()
    assert not stale_requests(metadata, lengths).any()


def test_requests_without_tokens_after_those_of_the_metadata_fit():
    lengths = np.array([700, 0, 300, 0], np.int32)
    metadata, _ = schedule.plan(lengths, 4, 16, 1)
    padded = np.concatenate([lengths, np.zeros(4, np.int32)])
    assert not stale_requests(metadata, padded).any()
    padded[[5, 6]] = 1, -5
    assert stale_requests(metadata, padded).tolist() == [False] * 5 + [True, False, False]
    # A request without tokens that the metadata has, and one after a request that it has not.
    one, _ = schedule.plan(lengths[:1], 4, 16, 1)
    assert stale_requests(one, lengths).tolist() == [False, False, True, False]


# ---- SchedMeta ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_a_copy_of_a_bound_sched_meta_is_unbound(copied):
    """It keeps no array, and so no address, of the original; its first call makes its own."""
    problem = make_problem([300, 70], h_q=4)
    original, _ = flashmla_cupy.get_mla_metadata()
    expected = flashmla_cupy.flash_mla_with_kvcache(*problem.arrays(), 512, original)
    assert original.have_initialized
    made = copied(original)
    assert type(made) is SchedMeta and not made.have_initialized
    assert made.tile_scheduler_metadata is None and made.num_splits is None
    problem.cache_seqlens[:] = 130, 64  # of another step
    out, lse = flashmla_cupy.flash_mla_with_kvcache(*problem.arrays(), 512, made)
    assert_within_bound(out, lse, oracle(*problem.arrays()))
    assert made.tile_scheduler_metadata is not original.tile_scheduler_metadata
    problem.cache_seqlens[:] = 300, 70
    again = flashmla_cupy.flash_mla_with_kvcache(*problem.arrays(), 512, original)
    assert all(map(np.array_equal, again, expected))
    flashmla_cupy.check()


def test_a_sched_meta_holds_no_address():
    """What it keeps is its configuration and the two arrays, and those of a trace."""
    problem = make_problem([300], h_q=4)
    made, _ = flashmla_cupy.get_mla_metadata()
    flashmla_cupy.flash_mla_with_kvcache(*problem.arrays(), 512, made)
    kept = {name: getattr(made, name) for name in SchedMeta.__slots__}
    assert set(kept) == {"bound", "tile_scheduler_metadata", "num_splits", "of_trace"}
    assert kept["of_trace"] == (None, None, None)
    address = made.tile_scheduler_metadata.ctypes.data
    assert address not in made.bound


# ---- quality ---------------------------------------------------------------------------------


# name, lengths, rows -> at least this much of the parts' time is work, at most so many split pieces
QUALITY = [
    ("alike, a part each: no split", [4096] * 128, 16, 0.96, 0),
    ("alike, two for each part: no split", [8192] * 132, 128, 1.0, 0),
    ("one request over all parts", [131072], 16, 0.95, 132),
    ("alike, one for two parts", [8192] * 32, 128, 0.90, 96),
    ("one long among short", [131072] + [512] * 63, 16, 0.80, 140),
    ("ragged", list(range(1000, 8000, 55)), 128, 0.97, 130),
    ("thunder", [4641, 45118, 1730, 1696], 64, 0.78, 140),
    ("short, for half of the parts: by size", list(range(256, 1024, 12)), 64, 0.60, 90),
]


@pytest.mark.parametrize(
    ("lengths", "rows", "balance", "split"),
    [row[1:] for row in QUALITY],
    ids=[r[0] for r in QUALITY],
)
def test_balance_and_splits(lengths, rows, balance, split):
    made = Schedule.of(lengths, rows)
    assert made.balance >= balance
    assert sum(piece.split for piece in made.pieces) <= split


def test_few_tiles_take_few_parts():
    """Eight tiles do not occupy 132 multiprocessors."""
    busy = sum(load > 0 for load in Schedule.of([512], 16).loads)
    assert 1 <= busy <= 8


def test_no_part_is_much_longer_than_the_mean():
    """Long requests are shared evenly whatever the batch: a part exceeds the mean by less than the
    longest limit on pieces, twice, or by a request that was better left whole."""
    for seed in range(300):
        lengths, parts, rows, h_kv = random_case(seed)
        counted = schedule.MOST_TILES // len(lengths) * 64  # tokens of a request, at most
        lengths = np.minimum(lengths.astype(np.int64), counted).astype(np.int32)
        made = Schedule(*schedule.plan(lengths, parts, rows, h_kv), lengths)
        mean = sum(made.loads) / parts
        assert made.makespan <= mean + max(64, tiles_of(int(lengths.max()))), f"seed {seed}"


# ---- the checker, and the device's constants ---------------------------------------------------


def mutations(metadata: np.ndarray, num_splits: np.ndarray):
    """Faults of the kinds that a wrong scheduler makes, one at a time."""
    part = int(np.flatnonzero(metadata[:, 1] > 0)[0])  # begins inside a request
    for name, row, column, step in [
        ("gap", part, 1, 1),
        ("overlap", part, 1, -1),
        ("short end", part - 1, 3, -1),
        ("slot twice", part, 4, -1),
        ("slot left out", part, 4, 1),
        ("tiles of the first request", part, 5, 1),
        ("tiles of the last request", part, 6, -1),
        ("request left out", part, 0, 1),
        ("request past the end", len(metadata) - 1, 2, 1),
        ("column 7", 0, 7, 1),
    ]:
        changed = metadata.copy()
        changed[row, column] += step
        yield name, changed, num_splits
    changed = num_splits.copy()
    changed[-1] += 1
    yield "num_splits", metadata, changed
    yield "part left out", np.delete(metadata, part, axis=0), num_splits


def test_the_checker_finds_planted_faults():
    lengths = np.array([4641, 45118, 1730, 1696], np.int32)
    metadata, num_splits = schedule.plan(lengths, 33, 64, 1)
    assert problems_of(metadata, num_splits, lengths) == []
    for name, *changed in mutations(metadata, num_splits):
        assert problems_of(*changed, lengths), name


def checks_of(metadata: np.ndarray, batch: int) -> list[int]:
    """The check that each row should have, by its formula."""
    factor, found = 0x9E3779B1, []
    for part, row in enumerate(metadata.tolist()):
        values = [*row[:4], row[4] % 2**18, *row[5:], part, batch]
        total = sum(pow(factor, place, 2**32) * value for place, value in enumerate(values, 1))
        found.append(total % 2**32 >> 18)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_every_row_has_its_check(seed):
    lengths, parts, rows, h_kv = random_case(seed)
    metadata, _ = schedule.plan(lengths, parts, rows, h_kv)
    batch = len(lengths)
    check = (metadata[:, 4].view(np.uint32) >> 18).tolist()
    assert check == checks_of(metadata, batch)
    assert np.array_equal(schedule.sealed(metadata, batch), metadata)
    if parts > 20:
        # What is not made for this part of this batch does not pass, with few exceptions.
        passed = np.equal(check[::-1], checks_of(metadata[::-1], batch)).sum()
        assert passed <= parts % 2 + 2
        assert np.equal(check, checks_of(metadata, batch + 1)).sum() <= 2
    assert checks_of(np.zeros((3, 8), np.int32), 1) != [0, 0, 0]


def test_constants_of_the_device():
    """schedule.cu repeats the constants; different ones would make another schedule."""
    found = dict(re.findall(r"^constexpr int ([A-Z_]+) = (\d+);", SOURCE.read_text(), re.MULTILINE))
    ours = {
        name: value
        for name, value in vars(schedule).items()
        if re.fullmatch("[A-Z][A-Z_]+", name) and isinstance(value, int)
    }
    # No part of the kernel, or written in another way.
    elsewhere = {
        "BEGINS_IN_PAIR",
        "CHECK_FACTOR",
        "CHECK_SHIFT",
        "FEW",
        "ENDS_IN_PAIR",
        "MAX_BATCH",
        "MOST_SHARED_BYTES",
        "MOST_TILES",
        "NUM_SMS_CPU",
        "PARTIAL_ROWS",
        "PREFIX_ENTRIES",
        "TOKENS_PER_TILE",
        "T_MOST",
        "T_PAIR",
        "T_PAIR_OF_FEW",
        "T_SPLIT",
        "T_SPLIT_OF_FEW",
        "T_TILE_MEM",
        "T_TILE_MEM_GATHERED",
    }
    assert {name: int(value) for name, value in found.items()} == {
        name: value for name, value in ours.items() if name not in elsewhere
    }
    text = SOURCE.read_text()
    assert "constexpr int WHOLE = 1 << 30;" in text
    assert "constexpr int T_MOST = (1 << 28) - 1;" in text
    assert (schedule._WHOLE, schedule.T_MOST) == (1 << 30, (1 << 28) - 1)
    marks = "constexpr int BEGINS_IN_PAIR = 1 << 16, ENDS_IN_PAIR = 1 << 17;"
    metadata = SOURCE.with_name("metadata.cuh").read_text()
    assert marks in metadata
    assert (schedule.BEGINS_IN_PAIR, schedule.ENDS_IN_PAIR) == (1 << 16, 1 << 17)
    assert f"constexpr int CHECK_SHIFT = {schedule.CHECK_SHIFT};" in metadata
    assert f"CHECK_FACTOR = 0x{schedule.CHECK_FACTOR:X};" in metadata
    assert "constexpr int REQUEST_BITS = 20, " in metadata
    for name in ("schedule.cu", "sm90_pieces.cuh", "combine.cu"):
        text = SOURCE.with_name(name).read_text()
        assert '#include "metadata.cuh"' in text
        assert "REQUEST_BITS =" not in text
        assert "BEGINS_IN_PAIR =" not in text
    assert schedule.MAX_BATCH == (1 << 20) - 1


def test_what_is_gathered_is_cut_finer():
    """Where a tile takes longer, more and shorter pieces pay; not where it does not."""
    lengths = np.full(8, 2048, np.int32)
    for rows, finer in ((64, 2), (16, 1)):
        pieces = [
            schedule.plan(lengths, 132, rows, 1, gathered=gathered)[1][-1]
            for gathered in (False, True)
        ]
        assert pieces[1] == finer * pieces[0]
        sizes = [schedule.launch_sizes(8, 132, rows, 1, gathered) for gathered in (False, True)]
        assert (sizes[0] == sizes[1]) == (finer == 1)


@pytest.mark.parametrize("batch", [1, 4, 5, 128, 16384, 16385, 20000, 65536, 10**6])
def test_launch_sizes(batch):
    """The block has a warp for 29 parts of each candidate; the cost prefix fits what is reserved,
    and the steps of its search reach all of it."""
    for parts in (1, 29, 30, 132, schedule.MAX_PARTS):
        made = schedule.launch_sizes(batch, parts, 16, 1)
        lanes, warps, candidates = made.block
        assert (lanes, candidates) == (32, schedule.CANDIDATES)
        assert 29 * (warps - 1) < parts <= 29 * warps
        assert lanes * warps * candidates <= 1024
        assert made.params[:3] == (batch, parts, schedule.MOST_TILES // batch)
        shift, step = made.params[3:5]
        entries = ((batch - 1) >> shift) + 1
        assert entries <= schedule.PREFIX_ENTRIES
        assert shift == 0 or ((batch - 1) >> (shift - 1)) + 1 > schedule.PREFIX_ENTRIES
        assert 4 * step >= entries and (step == 1 or step < entries)
        assert step.bit_length() % 2 == 1 and step & (step - 1) == 0  # a power of four
        assert 4 * (4 * step + 1) == made.shared_bytes <= schedule.MOST_SHARED_BYTES


# ---- for people ------------------------------------------------------------------------------


def test_one_line():
    made = flashmla_cupy.Schedule.of([4096] * 132, 128)
    assert repr(made) == (
        "Schedule(batch=132, rows=128, 66 parts, 132 pieces, makespan 128 tiles, balance 100%)"
    )
    assert made.parts == num_sm_parts(132, 128, 1) == 66


@pytest.mark.parametrize("method", ["get", "cpu", None])
def test_from_metadata_reads_arrays_of_any_framework(method):
    made = Schedule.of([4641, 45118, 1730, 1696], 64)

    class Elsewhere:
        def __init__(self, array):
            setattr(self, str(method), lambda: array)

    arrays = made.tile_scheduler_metadata, made.num_splits, made.cache_seqlens
    read = Schedule.from_metadata(*(map(Elsewhere, arrays) if method else arrays))
    assert read.pieces == made.pieces
    assert repr(read) == repr(made).replace("rows=64, ", "")


def test_the_metadata_of_the_public_function():
    lengths = np.array([300, 0, 70000], np.int32)
    made = Schedule.of(lengths, 32, 2)
    metadata, num_splits = flashmla_cupy.get_mla_metadata(lengths, 32, 2)
    assert np.array_equal(metadata, made.tile_scheduler_metadata)
    assert np.array_equal(num_splits, made.num_splits)


@pytest.mark.parametrize("lengths", [[], [0, 0], [64], [4641, 45118, 1730, 1696], [500] * 300])
def test_chart(lengths):
    """Well-formed, with a bar and a tooltip for each piece, inside the picture; a row for each part
    that has work, named, above an axis that begins at 0 and fits the longest part."""
    made = Schedule.of(lengths, 16)
    root = ElementTree.fromstring(made._repr_svg_())
    bars = root.findall("{*}rect")
    assert len(bars) == len(made.pieces)
    for bar, piece in zip(bars, made.pieces, strict=True):
        title = bar.find("{*}title").text
        assert f"request {piece.request}, tiles {piece.begin}:{piece.end}" in title
        assert float(bar.get("x")) + float(bar.get("width")) <= float(root.get("width")) + 0.5
        assert float(bar.get("y")) + float(bar.get("height")) <= float(root.get("height"))
    busy = [part for part, load in enumerate(made.loads) if load]
    rows = {bar.get("y"): piece.part for bar, piece in zip(bars, made.pieces, strict=True)}
    assert sorted(rows.values()) == busy, "a row is not one part's, or empty"
    texts = [(text.text, float(text.get("x"))) for text in root.findall("{*}text")]
    names = [int(text.removeprefix("part ")) for text, _ in texts if text.startswith("part ")]
    assert names == sorted(names) and set(names) <= set(busy) and len(names) >= min(len(busy), 2)
    assert any(text == "tiles of 64 tokens" for text, _ in texts)
    ticks = axis_of(root)
    assert min(ticks) == 0 and max(ticks) <= made.makespan <= 2 * max(ticks)
    for bar, piece in zip(bars, made.pieces, strict=True):
        if float(bar.get("x")) == ticks[0]:  # it begins at tile 0, so it ends at its tiles
            end = float(bar.get("x")) + float(bar.get("width"))
            for tile, x in ticks.items():
                assert (piece.end - piece.begin >= tile) == (end + 0.5 >= x), "another scale"


def axis_of(root) -> dict[int, float]:
    """Tile -> where the axis has it: the numbers that stand below a line."""
    lines = {path.get("d").split()[0].removeprefix("M") for path in root.findall("{*}path")}
    return {
        int(text.text): float(text.get("x"))
        for text in root.findall("{*}text")
        if text.get("x") in lines and text.text.isdigit() and text.get("fill") == view.GREY
    }


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        (([100], 16, 0), ScalarError, "num_heads_k"),
        (([100], 16, -1), ScalarError, "num_heads_k"),
        (([100], 16, 1, 0), ScalarError, "num_sms"),
        (([100], 0), ScalarError, "num_q_tokens_per_head_k"),
        (([100], -16), ScalarError, "num_q_tokens_per_head_k"),
        (([100], 16.0), ArgTypeError, "num_q_tokens_per_head_k"),
        (([100], None), ArgTypeError, "num_q_tokens_per_head_k"),
        (([100], True), ArgTypeError, "num_q_tokens_per_head_k"),
        (([100.0], 16), DTypeError, "cache_seqlens"),
        (([True], 16), DTypeError, "cache_seqlens"),
        ((["100"], 16), DTypeError, "cache_seqlens"),
        ((np.ones(3, np.float16), 16), DTypeError, "cache_seqlens"),
        ((None, 16), ArgTypeError, "cache_seqlens"),
        (([None], 16), ArgTypeError, "cache_seqlens"),
        (([[1, 2], [3]], 16), ArgTypeError, "cache_seqlens"),
        ((100, 16), ShapeError, "cache_seqlens"),
        (([[100]], 16), ShapeError, "cache_seqlens"),
        (([2**31], 16), ScalarError, "cache_seqlens"),
        (([-(2**31) - 1], 16), ScalarError, "cache_seqlens"),
        (([2**70], 16), ArgTypeError, "cache_seqlens"),
        (({}, 16), ArgTypeError, "cache_seqlens"),
        ((np.ma.array([100, 200], mask=[True, False]), 16), ArgTypeError, "cache_seqlens"),
    ],
)
def test_what_cannot_be_a_schedule_is_a_named_error(arguments, error, named):
    with pytest.raises(error, match=rf"^Schedule\.of\(\): {named}: expected .*, got ") as caught:
        Schedule.of(*arguments)
    assert caught.value.argument == named


def test_tensors_without_values_are_no_lengths():
    torch = pytest.importorskip("torch")
    with pytest.raises(ArgTypeError, match="cache_seqlens: expected integers"):
        Schedule.of(torch.zeros(3, dtype=torch.int32, device="meta"), 16)


def test_integers_of_any_kind_are_lengths():
    expected = Schedule.of([300, 0, 70000], 32).tile_scheduler_metadata
    for dtype in (np.int64, np.uint32, np.int32):
        made = Schedule.of(np.array([300, 0, 70000], dtype), np.int64(32))
        assert np.array_equal(made.tile_scheduler_metadata, expected)
    assert Schedule.of((), 16).pieces == []


def test_metadata_of_another_shape_is_a_named_error():
    made = Schedule.of([300, 500], 32)
    arrays = made.tile_scheduler_metadata, made.num_splits, made.cache_seqlens
    for place, wrong, named in [
        (0, arrays[0][:, :7], "tile_scheduler_metadata"),
        (0, arrays[0].ravel(), "tile_scheduler_metadata"),
        (1, arrays[1][:-1], "num_splits"),
        (2, arrays[2].astype(np.float32), "cache_seqlens"),
    ]:
        with pytest.raises(ArgumentError, match=rf"^Schedule\.from_metadata\(\): {named}: "):
            Schedule.from_metadata(*arrays[:place], wrong, *arrays[place + 1 :])
