"""What the tests of the CPU twins share: a comparison of every argument, and the twins in place."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_edlm.compat import cpu_kernels


def assert_same(
    twin: Callable[..., None],
    reference: Callable[..., None],
    *args: Any,
    tolerance: float = 0.0,
    **constexprs: int,
) -> None:
    """Run both on copies of `args` and compare all of them afterwards.

    `tolerance` is relative and absolute, for tensors of floats only; NaN equals NaN.
    """
    copies = [[a.clone() if torch.is_tensor(a) else a for a in args] for _ in range(2)]
    twin(*copies[0], **constexprs)
    reference(*copies[1], **constexprs)
    for position, (mine, expected) in enumerate(zip(*copies, strict=True)):
        if torch.is_tensor(mine):
            allowed = tolerance if mine.is_floating_point() else 0.0
            torch.testing.assert_close(
                mine,
                expected,
                rtol=allowed,
                atol=allowed,
                equal_nan=True,
                msg=lambda text, position=position: f"argument {position}: {text}",
            )


def install_twins() -> None:
    """vLLM's runner with the twins in place, as in a CPU worker; skips where that cannot be.

    Both the worker's patches of `torch` and the swapped kernels stay for the whole process. They
    break no other test: these kernels cannot be called at all here without the twins.
    """
    platforms = pytest.importorskip("vllm.platforms")
    if not platforms.current_platform.is_cpu():
        pytest.skip("the CPU worker's patches would break another platform's streams")
    pytest.importorskip("vllm.v1.worker.cpu.shm")
    if not cpu_kernels.install():
        pytest.skip("Triton is usable here: nothing is replaced")
