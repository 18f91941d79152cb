"""The command line: flashmla-cupy info | warmup | bench | clear-cache.

Results go to stdout, progress, warnings and errors to stderr. An error of the package or of the
operating system is one line; the exit status is then 2, as for a wrong argument.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NoReturn, TextIO, TypeAlias

from ._version import __version__
from .errors import FlashMLAError, KernelCacheError, KernelCompileError, OptionError
from .gpu.kernels import DTYPES, all_variants
from .sizes import PAGE_SIZES

_PROGRAM = "flashmla-cupy"

# What add_subparsers() returns has no public name.
_Commands: TypeAlias = Any


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command, by default that of sys.argv, and returns the exit status."""
    _show_any_name()
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], None] = arguments.command
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            command(arguments)
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has left
        with contextlib.suppress(OSError, ValueError):  # no second complaint when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (FlashMLAError, OSError) as error:
        print(f"{_PROGRAM}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def _show_any_name() -> None:
    """Lets a path be printed whatever it holds and whatever the output can show."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # replaced by another kind, or closed
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


class _Parser(argparse.ArgumentParser):
    """Without arguments it shows its help, and for a slip of the keyboard what was meant."""

    def error(self, message: str) -> NoReturn:
        if "arguments are required: COMMAND" in message:
            self.print_help(sys.stderr)
            self.exit(2)
        super().error(message + self._suggestion(message))

    def _suggestion(self, message: str) -> str:
        if found := re.search(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", message):
            wrong, known = found[1], re.findall(r"[\w-]+", found[2])
        elif found := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            wrong, known = found[1], re.findall(r"--[a-z-]+", self.format_help())
        else:
            return ""
        near = difflib.get_close_matches(wrong, known, n=1)
        return f". Did you mean {near[0]}?" if near else ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Complains of unknown options itself, so that a command names its own."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=_PROGRAM,
        description="MLA decode attention for Hopper GPUs, compiled at run time.",
        epilog="Environment: FLASHMLA_CUPY_CACHE_DIR names another folder for compiled kernels.",
    )
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_info(commands)
    _add_warmup(commands)
    _add_bench(commands)
    _add_clear_cache(commands)
    return parser


def _add(
    commands: _Commands,
    name: str,
    command: Callable[[argparse.Namespace], None],
    summary: str,
    details: str = "",
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {details}".rstrip()
    )
    parser.set_defaults(command=command)
    return parser


# ---- info --------------------------------------------------------------------------------------


def _add_info(commands: _Commands) -> None:
    _add(
        commands,
        "info",
        _info,
        "show versions, GPUs, and the compiled kernels in the cache",
        "Works without a GPU, CuPy or NVRTC, and says what is missing. Compiles no kernel.",
    )


def _info(arguments: argparse.Namespace) -> None:
    from .info import report

    for line in report():
        print(line)


# ---- warmup ------------------------------------------------------------------------------------


def _add_warmup(commands: _Commands) -> None:
    parser = _add(
        commands,
        "warmup",
        _warmup,
        "compile the kernels into the cache",
        "Needs CuPy and NVRTC but no GPU, so that an image can be built with a full cache: let "
        "FLASHMLA_CUPY_CACHE_DIR name a folder that its users can read, and keep the variable. "
        "Compiles all kernels, or those that the given dtypes and page sizes need.",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        type=_dtype,
        choices=tuple(DTYPES),
        default=tuple(DTYPES),
        help="dtypes of q and k_cache, bf16 and fp16 for short (default: both)",
    )
    parser.add_argument(
        "--page-size",
        nargs="+",
        type=int,
        choices=PAGE_SIZES,
        default=PAGE_SIZES,
        help="page sizes of k_cache (default: all; 64, 128 and 256 share their kernels)",
    )


def _dtype(name: str) -> str:
    """A dtype, also by the short name that kernels have it by."""
    return {short: long for long, short in DTYPES.items()}.get(name, name)


def _warmup(arguments: argparse.Namespace) -> None:
    from .build import cache_folder, compiler
    from .info import table

    wanted = tuple(product(arguments.dtype, arguments.page_size))
    variants = [
        variant for variant in all_variants() if any(variant.serves(*caches) for caches in wanted)
    ]
    # The lines below tell what the log would, on a terminal where nobody set up logging.
    quiet = logging.NullHandler()
    logger = logging.getLogger("flashmla_cupy")
    logger.addHandler(quiet)
    start = time.perf_counter()
    try:
        found = compiler.compile_variants(variants)
    finally:
        logger.removeHandler(quiet)
    seconds = time.perf_counter() - start
    rows = [
        (
            built.variant.name,
            str(built.resources.registers),
            str(built.resources.spill_stores),
            f"{built.seconds:.2f}",
            "found in the cache" if built.cached else "compiled",
        )
        for built in found
    ]
    for line in table(("kernel", "registers", "spill bytes", "seconds", ""), rows):
        print(line)
    folder = cache_folder.directory()
    print(f"{len(found)} kernels in {seconds:.2f} s; cache folder: {folder}")


# ---- bench -------------------------------------------------------------------------------------


def _add_bench(commands: _Commands) -> None:
    parser = _add(
        commands,
        "bench",
        _bench,
        "time the decode call on this GPU",
        "Prints microseconds, TFLOPS and GB/s of each case, and how much that is of the matrix "
        "product and of the read bandwidth measured on the same GPU. Needs a Hopper GPU.",
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="CASE",
        help="groups or parts of names: flashmla (default; FlashMLA's performance cases), mem, "
        "cmp, lat, imb, all, h16, ...",
    )
    parser.add_argument(
        "--list", action="store_true", help="print the cases (default: all) and stop"
    )
    parser.add_argument(
        "--page-size",
        nargs="+",
        type=int,
        metavar="TOKENS",
        help="each case with pages of so many tokens: 16, 32, 64 (default), 128, 256",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results to FILE as well")
    parser.add_argument(
        "--peers",
        action="store_true",
        help="beside flash_mla and flashinfer, whichever is installed; needs PyTorch",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="instead of cases, time against batch, tokens, query heads and page size, drawn "
        "beside the roofline into FILE (.png, .svg or .pdf); needs matplotlib",
    )


def _bench(arguments: argparse.Namespace) -> None:
    from .bench import cases as bench
    from .bench import plot as scaling
    from .bench import run as bench_run

    if arguments.plot:
        if arguments.cases or arguments.page_size or arguments.list or arguments.peers:
            remedy = "It has cases of its own."
            expected, got = "no --cases, --page-size, --list or --peers beside it", "one of them"
            raise OptionError("--plot", expected, got, remedy, "bench")
        scaling.run(arguments.plot, arguments.json)
        return
    cases = bench.select(arguments.cases or ["all" if arguments.list else "flashmla"])
    if arguments.page_size:
        cases = bench.with_page_sizes(cases, arguments.page_size)
    if arguments.list:
        for line in bench.listing(cases):
            print(line)
        return
    peers = None
    if arguments.peers:
        from .bench.peers import Peers

        peers = Peers()
    bench_run.run(cases, arguments.json, peers)


# ---- clear-cache -------------------------------------------------------------------------------


def _add_clear_cache(commands: _Commands) -> None:
    _add(
        commands,
        "clear-cache",
        _clear_cache,
        "remove the compiled kernels from the cache",
        "Removes cache entries of any version, and no other file. Fails if the folder cannot be "
        "trusted, or if an entry stays.",
    )


def _clear_cache(arguments: argparse.Namespace) -> None:
    from .build import cache_folder, cubin_cache

    folder = cache_folder.directory()
    cubin_cache.require_usable()
    files, size = cubin_cache.clear()
    plural = "file" if files == 1 else "files"
    print(f"Removed {files} {plural}, {size / 1e3:.0f} kB, from {folder}.")
    if left := cubin_cache.require_usable():
        plural = "file" if left == 1 else "files"
        raise KernelCacheError(f"{left} {plural} of {folder} could not be removed.")


# ---- messages ----------------------------------------------------------------------------------


def _one_line(error: BaseException) -> str:
    """The message, and of a compiler's log the first error."""
    if isinstance(error, KernelCompileError):
        complaints = [line for line in error.log.splitlines() if "error" in line]
        return " ".join([str(error.args[0]), *complaints[:1]])
    return " ".join(str(error).split("\n"))


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"{_PROGRAM}: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
