"""Fetches the kernels that peers.py compares with, as their authors' users get them.

    python benchmarks/fetch_peers.py [FOLDER]                         by default .peers

Downloads the wheel of vLLM 0.25.1 with pip (250 MB, not kept), for it ships the published builds of
FlashMLA and FlashAttention-3, and unpacks their two libraries (155 MB) into FOLDER. They run on
Linux on x86-64, in the PyTorch that this wheel is built for, 2.11 for CUDA 13. Needs pip, but
neither a GPU nor PyTorch. The libraries are under the licenses of their authors; FOLDER gets a
.gitignore, so that they are not committed by accident.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

WHEEL = "vllm==0.25.1"
# By the name that peers.py gives each.
LIBRARIES = {
    "flashmla": "vllm/_flashmla_C.abi3.so",
    "fa3": "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
}
PLATFORMS = ("manylinux_2_31_x86_64", "manylinux_2_28_x86_64", "manylinux2014_x86_64")
DEFAULT_FOLDER = ".peers"


def add_folder(parser: argparse.ArgumentParser, what: str) -> None:
    """The argument FOLDER, which peers.py takes as well."""
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
    folder: Path = parser.parse_args(argv).folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".gitignore").write_text("*\n", encoding="utf-8")
        with tempfile.TemporaryDirectory(dir=folder) as work:
            print(f"downloading {WHEEL}", file=sys.stderr)
            libraries = unpack(download(Path(work)), folder)
    except subprocess.CalledProcessError as error:
        return fail(f"pip could not download {WHEEL} (exit status {error.returncode}).")
    except (KeyError, zipfile.BadZipFile) as error:
        return fail(f"The wheel of {WHEEL} is not as expected: {error}.")
    except OSError as error:
        return fail(f"{error}.")
    for library in libraries:
        print(f"{library}  {library.stat().st_size / 1e6:.1f} MB")
    return 0


def fail(sentence: str) -> int:
    print(f"fetch_peers.py: error: {sentence}", file=sys.stderr)
    return 2


def pip_command(folder: Path) -> list[str]:
    """Downloads into `folder` the one wheel, for Linux on x86-64, whatever Python runs this."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", "3.12"]
    command += ["--abi", "abi3"]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    return [*command, "--dest", str(folder), WHEEL]


def download(folder: Path) -> Path:
    """The path of the wheel, in `folder`."""
    subprocess.run(pip_command(folder), check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack(wheel: Path, folder: Path) -> list[Path]:
    """The paths of the libraries, unpacked into `folder` under their names in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return [Path(archive.extract(name, folder)) for name in LIBRARIES.values()]


if __name__ == "__main__":
    sys.exit(main())
