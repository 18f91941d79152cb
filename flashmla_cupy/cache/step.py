"""A decoding step: room for new tokens of some sequences, written and attended to layer by layer,
then kept or dropped.

    step = cache.reserve(seqs, 1)
    for i in range(num_layers):
        step.write(latent[i], layer=i)             # [len(seqs), 1, 576]
        out, lse = step.attend(q[i], layer=i)
    step.commit()

Until then no other call changes these sequences: it would raise SequenceError. In a `with` block a
step that an exception leaves open is rolled back.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ..calls import scalars
from ..calls.wording import kind as kind_of
from ..errors import ArgTypeError, ScalarError, ShapeError, StepError
from ..frameworks import Adapter
from ..frameworks.shapes import shape_of
from .core import Core
from .page_table import Reservation
from .row_arrays import checked
from .sequence import Sequence
from .sequence_rows import Int32
from .tables import FreshTables, LastingTables, Tables


class Step:
    """Room for new tokens, from PagedKVCache.reserve().

    seqs      the sequences, in the order of every batch axis
    counts    how many new tokens each has room for, NumPy int32 [batch]
    tokens    the largest of them: the second axis of rows and queries. A sequence with fewer has
              its rows and queries at the end of this axis; what comes before is not used.

    block_table [batch, max_pages] int32, cache_seqlens [batch] int32, the new tokens included, and
    slot_mapping [batch, tokens] int64 (page * page_size + slot, -1 for none) are arrays beside the
    pool, of the cache's framework, for kernels of others. They are not to be written."""

    def __init__(
        self,
        core: Core,
        seqs: tuple[Sequence, ...],
        made: Reservation,
        tables: FreshTables | LastingTables,
        stream: int,
    ) -> None:
        self._core, self._made, self._tables = core, made, tables
        self._stream = stream  # on which the room was made
        self._holds = core.fences.holder(stream)  # and what keeps it alive
        self._metadata: dict[Any, Any] = {}
        self._state = "open"
        self.seqs = seqs
        self.counts: Int32 = made.end - made.begin
        self.counts.flags.writeable = False  # commit() goes by them
        self.tokens: int = made.slots.shape[1]

    def __repr__(self) -> str:
        return f"<{self._state} step of {len(self.seqs)} sequences, {self.counts.sum()} tokens>"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        # Two steps with the same pages would give them back twice.
        expected = "an object that can be copied or pickled"
        remedy = "Make another step with cache.reserve()."
        raise ArgTypeError("self", expected, "a step of a PagedKVCache", remedy, "Step")

    def __enter__(self) -> Step:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and self._state == "open":
            self.rollback()

    # --- what kernels take ---------------------------------------------------------------------

    @property
    def block_table(self) -> Any:
        return self._arrays(self._core.framework).block_table

    @property
    def cache_seqlens(self) -> Any:
        return self._arrays(self._core.framework).cache_seqlens

    @property
    def slot_mapping(self) -> Any:
        return self._arrays(self._core.framework).slot_mapping

    # --- what is done --------------------------------------------------------------------------

    def write(self, rows: Any, layer: int | None = None) -> None:
        """Writes the new tokens' rows of one layer, [batch, tokens, 576] or [batch, tokens, h_kv,
        576], or without `layer` those of all layers, [num_layers, ...], if there are several.

        rows has the cache's dtype and lies beside the pool, or in host memory. Raises StepError
        after commit() or rollback(), and an ArgumentError."""
        function = "Step.write"
        self._require_open(function)
        layers = slice(None)
        if layer is not None:
            layer = self._core.layer(layer, function)
            layers = slice(layer, layer + 1)
        rows, adapter = checked(
            self._core.pool, "rows", rows, 2, function, one_layer=layer is not None
        )
        self._require_batch("rows", rows.shape[1], rows.shape[2], function)
        self._core.write(rows, adapter, self._of(adapter).slot_mapping, layers)

    def attend(
        self,
        q: Any,
        layer: int = 0,
        *,
        softmax_scale: float | None = None,
        causal: bool = True,
    ) -> tuple[Any, Any]:
        """flash_mla_with_kvcache() of q [batch, tokens, h_q, 576] over the sequences, the new
        tokens included: write their rows of this layer first.

        q lies beside the pool, and out [batch, tokens, h_q, 512] and lse [batch, h_q, tokens] are
        of its framework. softmax_scale and causal are as there, but causal is True unless False is
        passed. Raises StepError after commit() or rollback(), and what
        flash_mla_with_kvcache() raises."""
        function = "Step.attend"
        self._require_open(function)
        layer = self._core.layer(layer, function)
        shape = shape_of(q, "q", function)
        if len(shape) == 4 and shape[1] > self.tokens:  # fewer are the last ones
            expected = f"at most the {self.tokens} tokens of the step in the second axis"
            remedy = "The axes of q are [batch, tokens, heads, 576]."
            raise ShapeError("q", expected, f"{shape}", remedy, function)
        return self._core.attend(
            q, layer, len(self.seqs), self._of, self._metadata, softmax_scale, causal, function
        )

    def commit(
        self,
        accepted: int | Iterable[int] | None = None,
        token_ids: Iterable[Iterable[int]] | None = None,
    ) -> None:
        """Keeps the first accepted[i] new tokens of each sequence, by default all, and ends the
        step; a number counts for all of them. The rows of those that are kept must be written.

        token_ids[i] are the ids of the kept tokens of seqs[i]. They are needed for sequences from
        begin() alone, and only if their pages are to be known prefixes too. Raises StepError after
        commit() or rollback(), and ScalarError or ShapeError for numbers that do not fit."""
        function = "Step.commit"
        self._require_open(function)
        kept = None if accepted is None else self._accepted(accepted, function)
        ids = None
        if token_ids is not None:
            counts = self.counts if kept is None else kept
            ids = _token_ids(token_ids, counts, function)
        self._end("committed", kept, ids)

    def rollback(self) -> None:
        """Drops the new tokens and ends the step: the sequences are what they were before it.
        Raises StepError after commit() or rollback()."""
        self._require_open("Step.rollback")
        self._end("rolled back", np.zeros(len(self.seqs), np.int32), None)

    # --- inside --------------------------------------------------------------------------------

    def _end(self, state: str, kept: Int32 | None, ids: list[Int32] | None) -> None:
        table = self._core.table
        if ids is not None:
            for row, tokens in zip(self._made.rows.tolist(), ids, strict=True):
                table.extend_known(row, tokens)
        table.settle(self._made, kept)
        self._state = state
        self._metadata.clear()
        if self._core.lasting_step is self:
            self._core.lasting_step = None

    def _require_open(self, function: str) -> None:
        if self._state != "open":
            remedy = "Make another one with cache.reserve()."
            raise StepError(f"{function}(): the step was {self._state} before. {remedy}")

    def _require_batch(self, name: str, batch: int, tokens: int, function: str) -> None:
        if (batch, tokens) != (len(self.seqs), self.tokens):
            expected = f"axes of {len(self.seqs)} sequences and {self.tokens} tokens"
            remedy = "Pass the rows of seqs[i] as rows[i], at the end of the axis of tokens."
            raise ShapeError(name, expected, f"{batch} and {tokens}", remedy, function)

    def _accepted(self, accepted: Any, function: str) -> Int32:
        kept = counts_of("accepted", accepted, len(self.seqs), function)
        if (kept > self.counts).any():
            i = int(np.flatnonzero(kept > self.counts)[0])
            expected = f"at most {self.counts[i]}, what was reserved for seqs[{i}]"
            remedy = "Reserve as many tokens as may be accepted."
            raise ScalarError("accepted", expected, f"{kept[i]}", remedy, function)
        return kept

    def _of(self, adapter: Adapter) -> Tables:
        """The arrays of a framework, ready on its current stream."""
        self._core.use(adapter, self._stream)
        return self._arrays(adapter)

    def _arrays(self, adapter: Adapter) -> Tables:
        if isinstance(self._tables, LastingTables):
            return self._tables.of(adapter, len(self.seqs), self.tokens)
        return self._core.fresh(self._tables, adapter, "Step")


def counts_of(name: str, value: Any, batch: int, function: str) -> Int32:
    """int32 [batch] of a number or of one for each sequence. Raises an ArgumentError."""
    expected = f"an integer, or {batch} of them, one for each sequence"
    remedy = "Pass a number or a list."
    array = _on_host(name, value, expected, remedy, function)
    if array.ndim == 0:
        return np.full(batch, scalars.integer(name, value, function), np.int32)
    if array.shape != (batch,):
        got = f"{len(array)} values" if array.ndim == 1 else f"an array of shape {array.shape}"
        raise ArgTypeError(name, expected, got, remedy, function)
    if array.dtype.kind not in "iu" and batch:
        got = f"values of {array.dtype}"
        raise ArgTypeError(name, "integers", got, remedy, function)
    if batch and not 0 <= int(array.min()) <= int(array.max()) <= scalars.INT_LIMIT:
        wrong = array[(array < 0) | (array > scalars.INT_LIMIT)][0]
        remedy = "A count of tokens is not negative."
        expected = f"integers from 0 to {scalars.INT_LIMIT}"
        raise ScalarError(name, expected, f"{wrong}", remedy, function)
    return array.astype(np.int32)


def tokens_of(name: str, value: Any, function: str) -> Int32:
    """Token ids as int32 [n]. Raises an ArgumentError."""
    array = _on_host(name, value, "a list of token ids", "Pass one id a token.", function)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        got = f"{array.dtype} {array.shape}"
        raise ArgTypeError(name, "a list of token ids", got, "Pass one id a token.", function)
    if array.size and not 0 <= int(array.min()) <= int(array.max()) <= scalars.INT_LIMIT:
        expected, remedy = f"ids from 0 to {scalars.INT_LIMIT}", "Pass the tokenizer's ids."
        raise ScalarError(name, expected, f"{array.min()} .. {array.max()}", remedy, function)
    return array.astype(np.int32)


def _token_ids(value: Any, counts: Int32, function: str) -> list[Int32]:
    try:
        lists = list(value)
    except TypeError:
        expected, remedy = "a list of token ids for each sequence", "Pass [[id, ...], ...]."
        raise ArgTypeError("token_ids", expected, kind_of(value), remedy, function) from None
    ids = [tokens_of("token_ids", one, function) for one in lists]
    if [len(one) for one in ids] != counts.tolist():
        expected = f"ids of {counts.tolist()} tokens, those that are kept"
        got = f"of {[len(one) for one in ids]}"
        raise ShapeError("token_ids", expected, got, "Pass a list for each sequence.", function)
    return ids


def _on_host(name: str, value: Any, expected: str, remedy: str, function: str) -> npt.NDArray[Any]:
    """value as a NumPy array. Raises ArgTypeError for lists of different lengths, and for arrays
    that are not in host memory."""
    try:
        return np.asarray(value)
    except Exception as error:  # whatever an array of another framework raises
        why = str(error).partition("\n")[0].partition(". ")[0]
        got = f"{kind_of(value)}, which NumPy cannot read"
        got += f" ({why})" if why else ""
        raise ArgTypeError(name, expected, got, remedy, function) from error
