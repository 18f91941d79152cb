"""Calls over FP8 caches and lists of tokens: what such a call is, and how it runs in host memory.

An Operation is a public function, or one of the things that it does: the table of its arguments,
its checks, and how its results are computed by the definitions in NumPy. PyTorch's ops and JAX's
follow from the same (`traced`). Arrays on a GPU go to its kernels, by way of `gathered`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..errors import ArgumentError, DeviceCheckError
from ..frameworks import HERE, HOST, Adapter, ArrayInfo, elsewhere
from ..schedule.sched_meta import Configuration, SchedMeta, bind_lock
from ..sizes import num_sm_parts
from . import checks, refusals, scalars
from .arguments import Table
from .gathered import Work, num_sms_of
from .signatures import Checked, Pointers, Signatures, pointers, spans

Arrays = tuple[Any, ...]
Results = tuple[Any, ...]
Views = dict[str, np.ndarray | None]  # of all arrays of the table


class Output(NamedTuple):
    """What a result is."""

    shape: tuple[int, ...]
    dtype: str


class Valid(NamedTuple):
    """What the checks leave of a call's arguments."""

    framework: Adapter
    infos: dict[str, ArrayInfo]  # of the arrays that the call has
    options: tuple[Any, ...]  # what `compute` needs of them
    outputs: tuple[Output, ...]
    configuration: Configuration | None = None  # what a SchedMeta is bound to

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute: results without elements, or, of no requests,
        metadata of zeros."""
        first = next(iter(self.infos.values()))
        return 0 in first.shape

    def require_metadata(self, num_sms: int) -> None:
        """Checks the two arrays of the schedule, if given, whose size depends on the device: it has
        so many multiprocessors."""
        of = self.configuration
        if of is None or "tile_scheduler_metadata" not in self.infos:
            return
        requests, rows = (of.batch * of.s_q, of.h_q) if of.topk else (of.batch, of.s_q * of.h_q)
        schedule = self.infos["tile_scheduler_metadata"], self.infos["num_splits"]
        checks.metadata(*schedule, requests, num_sm_parts(num_sms, max(1, rows), 1))


def naming(function: str, checks: Callable[[Arrays, Arrays], Valid]) -> Callable[..., Valid]:
    """The checks of an operation; their errors name the public function."""

    def validate(arrays: Arrays, options: Arrays) -> Valid:
        try:
            return checks(arrays, options)
        except ArgumentError as error:
            raise error.of(function) from error.__cause__

    return validate


@dataclass(frozen=True, kw_only=True, slots=True)
class OperationCall(Checked):
    """A signature that passed the checks."""

    valid: Valid
    new: tuple[Callable[[], Any], ...]  # makes each output
    work: Work | None  # what a GPU does; None: arrays in host memory, or nothing to compute


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One kind of call."""

    name: str  # of the PyTorch op, and in JAX's profiles
    table: Table
    # (arrays by name, options, multiprocessors) -> what the results are; of symbolic shapes too.
    outputs: Callable[[dict[str, Any], tuple[Any, ...], int], tuple[Output, ...]]
    # (arrays, options) of the table -> Valid; raises an ArgumentError. Every check but
    # Valid.require_metadata().
    validate: Callable[[Arrays, tuple[Any, ...]], Valid]
    # A length in host memory that cannot be, which raises before anything is computed; or None.
    refused: Callable[[Valid, Views], DeviceCheckError | None]
    # Writes the outputs; the first request that it has to refuse, or None.
    compute: Callable[[Valid, Views], DeviceCheckError | None]
    # (tile_scheduler_metadata, num_splits) for a SchedMeta; None: there is none.
    schedule: Callable[[Valid, Views], tuple[np.ndarray, np.ndarray]] | None = None
    # What a GPU does for such calls; raises an ArgumentError for what no kernel takes.
    on_gpu: Callable[[Valid], Work]
    _calls: Signatures[OperationCall] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_calls", Signatures(self.table))

    def __hash__(self) -> int:
        return hash(self.name)

    def eager(
        self,
        arrays: Arrays,
        options: tuple[Any, ...],
        lazy: SchedMeta | None = None,
        otherwise: Callable[..., Results] | None = None,
        *,
        is_op: bool = False,
    ) -> Results:
        """The results, in the order of the table's outputs; lazy: the SchedMeta that stands for the
        arrays of the schedule.

        otherwise(where, operation, arrays, options, lazy) makes the call if the arrays have no
        address, where `frameworks.elsewhere` says. is_op: a compiled program makes the call, in
        which a bad length in host memory is reported later, as on a GPU, and does not raise."""
        is_usual = tuple(map(type, options)) in self.table.usual_types
        call, addresses, key = self._calls.find(arrays, options, is_usual)
        if call is None or not call.accepts(addresses):
            where = elsewhere(arrays)
            if where and otherwise is not None:
                return otherwise(where, self, arrays, options, lazy)
            call, addresses = self._make(arrays, options, key)
        refusals.raise_pending()
        given = dict(zip(self.table.names, arrays, strict=True))
        device = call.valid.infos[self.table.names[0]].device
        if device != HOST:
            guard = call.valid.framework.device_guard(device)
            if guard is HERE:  # the usual case; entering a context that does nothing takes time
                return self._run_on_gpu(call, given, addresses, lazy)
            with guard:
                return self._run_on_gpu(call, given, addresses, lazy)
        view = call.valid.framework.to_numpy
        views = {name: None if x is None else view(x) for name, x in given.items()}
        if not (is_op or call.valid.is_empty):
            scalars.descales(views, self.table.function)
            violation = self.refused(call.valid, views)
            if violation is not None:
                raise violation
        names = [array.name for array in self.table.having("output")]
        for name, new in zip(names, call.new, strict=True):
            if given[name] is None:
                given[name] = new()
                views[name] = view(given[name])
            else:
                call.valid.framework.written(given[name])
        if call.valid.is_empty:
            _clear(given[name] for name in names)
        else:
            self.run_on_host(call.valid, views, lazy)
        return tuple(given[name] for name in names)

    def _run_on_gpu(
        self,
        call: OperationCall,
        given: dict[str, Any],
        addresses: Pointers,
        lazy: SchedMeta | None,
    ) -> Results:
        """Allocates what is missing and launches, on the current device; nothing here waits for
        it."""
        at = dict(zip(self.table.names, addresses, strict=False))
        names = [array.name for array in self.table.having("output")]
        for name, new in zip(names, call.new, strict=True):
            if given[name] is None:
                given[name] = new()
                at[name] = call.valid.framework.pointer(given[name])
            else:
                call.valid.framework.written(given[name])
        if call.work is not None:
            call.work(at, lazy, call.valid.configuration)
        else:
            _clear(given[name] for name in names)
        return tuple(given[name] for name in names)

    def run_on_host(self, valid: Valid, views: Views, lazy: SchedMeta | None = None) -> None:
        """Writes the outputs among the views, and reports what had to be refused."""
        framework, configuration = valid.framework, valid.configuration
        if lazy is not None and self.schedule is not None and configuration is not None:
            with bind_lock:
                if lazy.bound is None:
                    made = [_copy(framework, array) for array in self.schedule(valid, views)]
                    lazy.bind(configuration, *made)
            lazy.require(configuration)
            views["tile_scheduler_metadata"] = framework.to_numpy(lazy.tile_scheduler_metadata)
        refusals.report(self.compute(valid, views))

    def _make(
        self, arrays: Arrays, options: tuple[Any, ...], key: Any
    ) -> tuple[OperationCall, Pointers]:
        valid = self.validate(arrays, options)
        device = valid.infos[self.table.names[0]].device
        valid.require_metadata(num_sms_of(device))
        allocator = valid.framework.allocator
        call = OperationCall(
            table=self.table,
            spans=spans(self.table, valid.infos),
            valid=valid,
            new=tuple(allocator(output.shape, output.dtype, device) for output in valid.outputs),
            work=None if device == HOST or valid.is_empty else self.on_gpu(valid),
        )
        return self._calls.keep(key, call), pointers(self.table, valid.infos)


def _clear(results: Iterable[Any]) -> None:
    """Of an empty call: most have no elements anyway."""
    for array in results:
        array[...] = 0


def _copy(framework: Adapter, array: np.ndarray) -> Any:
    """An int32 array of the framework."""
    new = framework.empty(array.shape, "int32", HOST)
    framework.to_numpy(new)[...] = array
    return new
