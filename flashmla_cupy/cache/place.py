"""Where a new pool lies: what the arguments `device` and `framework` stand for."""

from __future__ import annotations

import importlib
from typing import Any

from ..calls import scalars
from ..calls.wording import kind
from ..errors import MissingDependencyError, NoDeviceError, OptionError
from ..frameworks import HOST
from ..gpu.arch import arch_of


def place_of(device: Any, name: Any, function: str) -> int:
    """The CUDA device number that `device` stands for, or HOST; name: the framework that is asked
    for. Raises an ArgumentError, as `function`, or NoDeviceError or MissingDependencyError."""
    device = named_place(device, function)
    if device == HOST or (device is None and isinstance(name, str) and name == "numpy"):
        return HOST
    try:
        cuda: Any = importlib.import_module("cupy").cuda
    except ImportError as error:
        if device is None:
            return HOST
        remedy = "Install flashmla-cupy[cuda12], or pass device='cpu' for NumPy."
        message = f"{function}(): device {device} needs CuPy, which cannot be imported. {remedy}"
        raise MissingDependencyError(message) from error
    count = cuda.runtime.getDeviceCount() if cuda.is_available() else 0
    if device is None:  # the current GPU, if the kernels run on it
        current = int(cuda.Device().id) if count else HOST
        fits = count and arch_of(cuda.runtime.getDeviceProperties(current))
        return current if fits else HOST
    if not count:
        remedy = "Check the driver with nvidia-smi, or pass device='cpu' for NumPy."
        raise NoDeviceError(f"{function}(): device {device}: CUDA does not work here. {remedy}")
    if device >= count:
        there = "the only one is 0" if count == 1 else f"there are {count}, 0 to {count - 1}"
        raise NoDeviceError(f"{function}(): no CUDA device {device}: {there}. Pass one of them.")
    return int(device)


def named_place(device: Any, function: str) -> int | None:
    """HOST or a CUDA device number, whether there is such a device or not; None for None."""
    if type(device).__module__.partition(".")[0] == "torch":
        device = _of_torch(device, function)
    if isinstance(device, str):
        if device == "cpu":
            return HOST
        expected, remedy = "a CUDA device number, 'cpu' or None", "Pass 0 for the first GPU."
        raise OptionError("device", expected, f"{device!r}", remedy, function)
    return None if device is None else scalars.integer("device", device, function)


def _of_torch(device: Any, function: str) -> Any:
    """What a torch.device stands for: "cpu" or a number; anything else of PyTorch as it is."""
    torch: Any = importlib.import_module("torch")
    if not isinstance(device, torch.device) or device.type == "cpu":
        return "cpu" if isinstance(device, torch.device) else device
    if device.type != "cuda":
        expected = "a torch.device of type cuda or cpu"
        remedy = "Pass 0 for the first GPU, or 'cpu'."
        raise OptionError("device", expected, f"{device}", remedy, function)
    if device.index is not None:  # 0 is one, too
        return device.index
    if not torch.cuda.is_available():
        remedy = "Pass a CUDA device number, or device='cpu'."
        message = f"{function}(): device cuda: CUDA does not work in this PyTorch. {remedy}"
        raise NoDeviceError(message)
    return torch.cuda.current_device()


def framework_at(name: Any, place: int, function: str) -> str:
    """The framework of a pool's array; None stands for NumPy or CuPy, by the place. Raises an
    ArgumentError, as `function`, or MissingDependencyError."""
    usual = "numpy" if place == HOST else "cupy"
    if name is None:
        return usual
    if not isinstance(name, str) or name not in (usual, "torch"):
        expected = f"'{usual}' or 'torch', whose arrays can lie there, or None"
        remedy = "NumPy's arrays lie on the CPU and CuPy's on a GPU."
        raise OptionError("framework", expected, kind(name), remedy, function)
    try:
        module: Any = importlib.import_module(name)
    except ImportError as error:
        message = f"{function}(): framework {name!r} cannot be imported. Install {name}."
        raise MissingDependencyError(message) from error
    if name == "torch" and place != HOST and not module.cuda.is_available():
        remedy = "Install a PyTorch that was built for CUDA, or leave framework out."
        message = f"{function}(): framework 'torch': CUDA does not work in this PyTorch. {remedy}"
        raise MissingDependencyError(message)
    return str(name)
