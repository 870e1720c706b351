"""`edlm convert`, run by torchrun; the environment may break it as a machine would.

EDLM_TEST_NAN="rank,forward": that forward of that process gives NaN.
EDLM_TEST_FSDP: shards over CPU processes, which torch can, though accelerate asks for GPUs.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

import vllm_edlm.train.recipe as recipe_module
from vllm_edlm.cli import app
from vllm_edlm.train.model import BlockDiffusionLM, TokenLosses


def break_forward(rank: int, number: int) -> None:
    """Make one process's forward give NaN."""
    forward, calls = BlockDiffusionLM.forward, iter(range(1000))

    def broken(self: Any, batch: Any) -> TokenLosses:
        losses = forward(self, batch)
        is_now = next(calls) == number and int(os.environ["RANK"]) == rank
        return losses._replace(masked=losses.masked * float("nan")) if is_now else losses

    BlockDiffusionLM.forward = broken  # type: ignore[method-assign]


def shard_over_cpus() -> None:
    """Have accelerate treat CPU processes with an FSDP plugin as it does GPUs."""
    start = AcceleratorState.__init__

    def patched(self: Any, *args: Any, **options: Any) -> None:
        start(self, *args, **options)
        if options.get("fsdp_plugin") is not None:
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = options["fsdp_plugin"]

    AcceleratorState.__init__ = patched  # type: ignore[method-assign]
    recipe_module._check_launch = lambda _: None  # asks for GPUs, too


if __name__ == "__main__":
    if "EDLM_TEST_FSDP" in os.environ:
        shard_over_cpus()
    if "EDLM_TEST_NAN" in os.environ:
        break_forward(*map(int, os.environ["EDLM_TEST_NAN"].split(",")))
    app()
