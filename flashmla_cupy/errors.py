"""The errors: one class for each kind of mistake, each message a sentence that says what to do.

    FlashMLAError
    +- ArgumentError         also a ValueError or TypeError; .argument .expected .got .remedy
    +- environment errors    also a RuntimeError, ImportError or ValueError
    +- DeviceCheckError      found on the device: .request .column .reason
    +- OutOfPagesError, SequenceError, StepError   of PagedKVCache

No error is raised after a launch, an allocation or a change of state, except DeviceCheckError,
which reports what an earlier call found in the values of block_table, cache_seqlens or metadata.
"""

from __future__ import annotations


class FlashMLAError(Exception):
    """Base of every error of this package."""


class ArgumentError(FlashMLAError):
    """An argument that cannot be used: which one, what was expected, what came, what to do."""

    def __init__(
        self,
        argument: str,
        expected: str,
        got: str,
        remedy: str,
        function: str = "flash_mla_with_kvcache",
    ) -> None:
        # The parts are the args of the exception, so that it can be pickled and copied.
        self.args = (argument, expected, got, remedy, function)
        self.argument = argument
        self.expected = expected
        self.got = got
        self.remedy = remedy
        self.function = function

    def of(self, function: str) -> ArgumentError:
        """The same error, as one of that function."""
        return type(self)(self.argument, self.expected, self.got, self.remedy, function)

    def __str__(self) -> str:
        return (
            f"{self.function}(): {self.argument}: expected {self.expected}, got {self.got}. "
            f"{self.remedy}"
        )


class ArgTypeError(ArgumentError, TypeError):
    """Not the kind of object the argument takes."""


class FrameworkMismatchError(ArgumentError, TypeError):
    """Arrays of two frameworks in one call, or of a framework that is not supported."""


class DTypeError(ArgumentError, TypeError):
    """An array of another element type."""


class ShapeError(ArgumentError, ValueError):
    """An array of another rank or shape, or a size that is not supported."""


class StrideError(ArgumentError, ValueError):
    """A memory layout that the kernels cannot read or write."""


class AlignmentError(ArgumentError, ValueError):
    """An address, or a distance between rows, that is not a multiple of what the hardware needs."""


class DeviceMismatchError(ArgumentError, ValueError):
    """Arrays on two devices in one call, or on a device that is not supported."""


class ScalarError(ArgumentError, ValueError):
    """A number out of its range."""


class OptionError(ArgumentError, ValueError):
    """An option that is not supported, or that contradicts another."""


class StaleMetadataError(ArgumentError, ValueError):
    """Scheduling metadata that was made for another configuration."""


class ReadOnlyError(ArgumentError, ValueError):
    """An output array that may not be written."""


class AliasingError(ArgumentError, ValueError):
    """An output array that shares memory with another argument."""


class NoDeviceError(FlashMLAError, RuntimeError):
    """There is no CUDA GPU, or no driver."""


class UnsupportedArchError(FlashMLAError, RuntimeError):
    """The GPU is not of compute capability 9.0 (Hopper)."""


class NVRTCVersionError(FlashMLAError, RuntimeError):
    """The NVRTC library is too old for the kernels or too new for the driver."""


class KernelCompileError(FlashMLAError, RuntimeError):
    """NVRTC refused a kernel; `log` holds what it said."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message, log)
        self.log = log

    def __str__(self) -> str:
        return f"{self.args[0]}\n{self.log}" if self.log else str(self.args[0])


class KernelLoadError(FlashMLAError, RuntimeError):
    """The driver cannot load a compiled kernel."""


class ForkedProcessError(FlashMLAError, RuntimeError):
    """The process was forked after the GPU had been used; CUDA cannot go on in the child."""


class MissingDependencyError(FlashMLAError, ImportError):
    """A package that this call needs is not installed."""


class NVRTCNotFoundError(MissingDependencyError):
    """The NVRTC library is not installed."""


class KernelCacheError(FlashMLAError, ValueError):
    """An environment variable of the kernel cache has a value that is not understood."""


class KernelCacheWarning(UserWarning):
    """The kernel cache cannot be trusted or used; kernels stay in memory."""


_REASONS = {
    "page id": (
        "column {column} of its block_table row is not a page of k_cache",
        "Every entry of the first ceil(cache_seqlens / page_size) columns must lie in"
        " [0, num_pages).",
    ),
    "length": (
        "its cache_seqlens entry is negative or exceeds block_table.shape[1] * page_size",
        "Pass lengths that the table can hold.",
    ),
    "index": (
        "entry {column} of a list of indices is no slot of k_cache",
        "Entries are -1 for no token, or page * page_size + offset.",
    ),
    "extra index": (
        "entry {column} of a list of extra_indices_in_kvcache is no slot of extra_k_cache",
        "Entries are -1 for no token, or page * page_size + offset.",
    ),
    "topk_length": (
        "its topk_length is negative or exceeds the width of indices",
        "Pass lengths from 0 to indices.shape[-1].",
    ),
    "extra topk_length": (
        "its extra_topk_length is negative or exceeds the width of extra_indices_in_kvcache",
        "Pass lengths from 0 to extra_indices_in_kvcache.shape[-1].",
    ),
    "stale metadata": (
        "the scheduling metadata was made for other cache_seqlens or another configuration",
        "Call get_mla_metadata() again whenever the lengths change.",
    ),
}


class DeviceCheckError(FlashMLAError, RuntimeError):
    """A request that an earlier call refused because of a value in its arrays.

    The request's rows of out and lse are NaN; those of the other requests are right. `request` is
    its index in the batch, `reason` is "page id", "length" or "stale metadata", and `column` is
    the column of block_table for "page id", else -1. With the reason "foreign metadata", for arrays
    that get_mla_metadata() did not make, `request` is -1, and no row is to be used.

    With lists of tokens, of which each query token has its own, the rows are those of one query
    token of the request: for "index" and "extra index", whose `column` is the place in the list,
    and for "topk_length" and "extra topk_length". In `function` "flash_mla_sparse_fwd" each query
    token is a request.

    `is_earlier` is False for lengths in host memory, which are looked at before anything is
    computed: the call itself raises, and has written nothing.
    """

    def __init__(
        self,
        request: int,
        column: int,
        reason: str,
        is_earlier: bool = True,
        function: str = "flash_mla_with_kvcache",
    ) -> None:
        said: tuple[object, ...] = (is_earlier, function)  # of which no default need be shown
        if function == "flash_mla_with_kvcache":
            said = () if is_earlier else (False,)
        super().__init__(request, column, reason, *said)
        self.request = request
        self.column = column
        self.reason = reason
        self.is_earlier = is_earlier
        self.function = function

    def __str__(self) -> str:
        if self.reason == "foreign metadata":
            return (
                "An earlier flash_mla_with_kvcache() call was given tile_scheduler_metadata that"
                " get_mla_metadata() did not make for its batch. Its out and lse are not to be"
                " used. Pass both results of get_mla_metadata() as they are."
            )
        what, remedy = _REASONS.get(self.reason, (self.reason, ""))
        what = what.format(column=self.column)
        if not self.is_earlier:
            return f"{self.function}() refused request {self.request}: {what}. {remedy}"
        return (
            f"An earlier {self.function}() call refused request {self.request}: {what}. Its"
            f" out and lse are NaN. {remedy}"
        ).rstrip()


class OutOfPagesError(FlashMLAError, RuntimeError):
    """The pool has fewer pages to give than the call needs; nothing was changed.

    needed pages, of which `free` are free, `evictable` hold known prefixes that nobody uses, and
    `pending` were freed but may still be read by launched work. With the pending ones there may be
    enough: PagedKVCache.wait() makes them free, and freeing further sequences does not help."""

    def __init__(self, needed: int, free: int, evictable: int = 0, pending: int = 0) -> None:
        super().__init__(needed, free, evictable, pending)
        self.needed = needed
        self.free = free
        self.evictable = evictable
        self.pending = pending

    def __str__(self) -> str:
        also = f" and {self.evictable} can be evicted" if self.evictable else ""
        remedy = "Give sequences back with free(), or make the pool with a larger num_pages."
        if self.pending:
            also += f"; {self.pending} wait for launched work"
            if self.free + self.evictable + self.pending >= self.needed:
                remedy = "Call wait(), which makes those free, and try again."
        return (
            f"The call needs {self.needed} more pages but only {self.free} are free{also}. "
            f"{remedy} Nothing was changed."
        )


class SequenceError(FlashMLAError, RuntimeError):
    """A sequence handle that is unknown to this cache or was freed, or a sequence that is not in
    the state that the call needs."""


class StepError(FlashMLAError, RuntimeError):
    """A step of a PagedKVCache that was committed or rolled back already, or that the call does
    not fit."""
