"""Fetches the kernels that peers.py and sparse_peers.py compare with, as their authors' users get
them.

    python benchmarks/fetch_peers.py [FOLDER]                         by default .peers
    python benchmarks/fetch_peers.py --sparse [FOLDER]

Downloads the wheel of vLLM 0.25.1 with pip (250 MB, not kept), for it ships the published builds of
FlashMLA and FlashAttention-3, and unpacks their two libraries (155 MB) into FOLDER. With --sparse,
it is the wheel of vLLM 0.33.0, whose FlashMLA is newer: its two libraries (14 MB) go to
FOLDER/sparse, for sparse_peers.py. All run on Linux on x86-64, in the PyTorch that the first wheel
is built for, 2.11 for CUDA 13. Needs pip, but
neither a GPU nor PyTorch. The libraries are under the licenses of their authors; FOLDER gets a
.gitignore, so that they are not committed by accident.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

WHEEL, SPARSE_WHEEL = "vllm==0.25.1", "vllm==0.33.0"
# By the name that peers.py gives each.
LIBRARIES = {
    "flashmla": "vllm/_flashmla_C.abi3.so",
    "fa3": "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
}
SPARSE_LIBRARIES = {
    "flashmla": "vllm/_flashmla_C.abi3.so",
    "extension": "vllm/_flashmla_extension_C.abi3.so",
}
SPARSE_FOLDER = "sparse"  # in FOLDER: some of these have the names of others
PLATFORMS = ("manylinux_2_31_x86_64", "manylinux_2_28_x86_64", "manylinux2014_x86_64")
DEFAULT_FOLDER = ".peers"


def add_folder(parser: argparse.ArgumentParser, what: str) -> None:
    """The argument FOLDER, which peers.py and sparse_peers.py take as well."""
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path(DEFAULT_FOLDER),
        metavar="FOLDER",
        help=f"{what} (default: {DEFAULT_FOLDER})",
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=f"Fetches the FlashMLA and FlashAttention-3 libraries of {WHEEL}."
    )
    add_folder(parser, "where the libraries go")
    parser.add_argument(
        "--sparse",
        action="store_true",
        help=f"fetch the FlashMLA libraries of {SPARSE_WHEEL} instead, for sparse_peers.py",
    )
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder
    wheel, names = WHEEL, LIBRARIES
    if arguments.sparse:
        folder, wheel, names = folder / SPARSE_FOLDER, SPARSE_WHEEL, SPARSE_LIBRARIES
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".gitignore").write_text("*\n", encoding="utf-8")
        with tempfile.TemporaryDirectory(dir=folder) as work:
            print(f"downloading {wheel}", file=sys.stderr)
            libraries = unpack(download(Path(work), wheel), folder, names)
    except subprocess.CalledProcessError as error:
        return fail(f"pip could not download {wheel} (exit status {error.returncode}).")
    except (KeyError, zipfile.BadZipFile) as error:
        return fail(f"The wheel of {wheel} is not as expected: {error}.")
    except OSError as error:
        return fail(f"{error}.")
    for library in libraries:
        print(f"{library}  {library.stat().st_size / 1e6:.1f} MB")
    return 0


def fail(sentence: str) -> int:
    print(f"fetch_peers.py: error: {sentence}", file=sys.stderr)
    return 2


def pip_command(folder: Path, wheel: str) -> list[str]:
    """Downloads into `folder` the one wheel, for Linux on x86-64, whatever Python runs this."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", "3.12"]
    command += ["--abi", "abi3"]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    return [*command, "--dest", str(folder), wheel]


def download(folder: Path, wheel: str) -> Path:
    """The path of the wheel's file, in `folder`."""
    subprocess.run(pip_command(folder, wheel), check=True)
    (file,) = folder.glob("*.whl")
    return file


def unpack(file: Path, folder: Path, names: Mapping[str, str]) -> list[Path]:
    """The paths of the libraries, unpacked into `folder` under their names in the wheel."""
    with zipfile.ZipFile(file) as archive:
        return [Path(archive.extract(name, folder)) for name in names.values()]


if __name__ == "__main__":
    sys.exit(main())
