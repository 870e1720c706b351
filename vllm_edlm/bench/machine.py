"""What a measurement ran on: the machine, the versions, and the rates its roofline rests on."""

import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from vllm_edlm.bench.roofline import Rates
from vllm_edlm.compat.vllm_api import custom_ops

PACKAGES = ("vllm-edlm", "vllm", "torch", "transformers")
# Larger than any cache.
BUFFER_BYTES = 2**30
# Rows, input and output features of the product that gives the matrix rate.
PRODUCT = (2048, 2048, 4096)
REPETITIONS = 10


def facts(command: str) -> dict[str, str | int | float]:
    """Command, date, commit, machine and versions; no host names, no paths.

    Args:
        command: as the user gave it.
    """
    return {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        **_hardware(),
        "operating system": f"{platform.system()} {platform.release().split('-')[0]}",
        "Python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def commit() -> str:
    """Short commit of the measured code, and whether the code differs from it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "not a checkout"
    return f"{head} with changes" if _git("status", "--porcelain", "--", ".") else head


def _git(*arguments: str) -> str | None:
    """Output of git about this package, None outside a repository or without git."""
    package = Path(__file__).resolve().parents[1]
    try:
        result = subprocess.run(
            ["git", "-C", package, *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def _hardware() -> dict[str, str | int | float]:
    # Only the command that measures needs them.
    import cpuinfo
    import psutil

    hardware = {
        "CPU": cpuinfo.get_cpu_info()["brand_raw"],
        "CPU cores": psutil.cpu_count(),
        "memory (GiB)": psutil.virtual_memory().total / 2**30,
    }
    if torch.cuda.is_available():
        hardware["GPU"] = torch.cuda.get_device_name()
    return hardware


def measure_rates(device: str, dtype: str) -> Rates:
    """Measure the roofline of this process, with as many threads as torch has here.

    Bandwidth is the best of a sum over a large buffer and of a product of one row with a large
    matrix; the matrix rate that of a large product. Products run as torch does them and, where
    the CPU build has them, with packed oneDNN weights.

    Args:
        device: as torch names it.
        dtype: name of a torch type, such as "bfloat16".
    """
    bandwidth = max(_bandwidths(device, getattr(torch, dtype)))
    return Rates(bandwidth, max(_matmul_rates(device, getattr(torch, dtype))), dtype)


def _bandwidths(device: str, dtype: torch.dtype) -> Iterator[float]:
    buffer = torch.ones(BUFFER_BYTES // 4, device=device)
    yield BUFFER_BYTES / _best_seconds(buffer.sum)
    del buffer
    inputs = PRODUCT[1]
    weight = torch.ones(
        BUFFER_BYTES // (inputs * dtype.itemsize), inputs, device=device, dtype=dtype
    )
    for product in _products(weight, torch.ones(1, inputs, device=device, dtype=dtype)):
        yield weight.nbytes / _best_seconds(product)


def _matmul_rates(device: str, dtype: torch.dtype) -> Iterator[float]:
    rows, inputs, outputs = PRODUCT
    weight = torch.ones(outputs, inputs, device=device, dtype=dtype)
    for product in _products(weight, torch.ones(rows, inputs, device=device, dtype=dtype)):
        yield 2 * rows * inputs * outputs / _best_seconds(product)


def _products(weight: Tensor, rows: Tensor) -> Iterator[Callable[[], Tensor]]:
    """Ways of computing rows [R, I] times weight [O, I] transposed."""
    yield lambda: rows @ weight.T
    if weight.device.type == "cpu" and custom_ops._supports_onednn:
        packed = custom_ops.create_onednn_mm(weight.T)
        yield lambda: custom_ops.onednn_mm(packed, rows, None)


def _best_seconds(run: Callable[[], object]) -> float:
    """Least time of several runs; the first one, which may compile, does not count."""
    run()
    return min(_seconds(run) for _ in range(REPETITIONS))


def _seconds(run: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for what a GPU has to do, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
