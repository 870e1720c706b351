"""A step's virtual rows on the device, as attention backends take them.

Legend for shapes: R rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_edlm.compat.vllm_api import async_tensor_h2d
from vllm_edlm.virtual_rows import VirtualRows


class AttentionRows(NamedTuple):
    """Rows on the device.

    Attributes:
        query_start: int32 [R + 1] offsets of the rows' queries in the batch's tokens.
        kv_length: int32 [R] positions that each row attends to.
        block_tables: of each KV cache group, int32 [R, KV pages].
    """

    query_start: Tensor
    kv_length: Tensor
    block_tables: list[Tensor]


class RowBuffers:
    """Where rows are written, at the same addresses in every step, as CUDA graphs need them.

    A step with more rows than there is room for runs prompts, which no graph captures; it gets
    tensors of its own.

    Args:
        num_rows: the most rows of a step without prompts.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.num_rows = num_rows
        self.device = device
        self.query_start = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
        self.kv_length = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.request = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.block_tables: list[Tensor] = []

    def write(self, rows: VirtualRows, block_tables: Sequence[Tensor]) -> AttentionRows:
        """Copy rows to the device.

        Args:
            block_tables: of each KV cache group, [requests, KV pages].
        """
        num_rows = len(rows.request)
        if num_rows > self.num_rows:
            return RowBuffers(num_rows, self.device).write(rows, block_tables)
        request = async_tensor_h2d(rows.request, out=self.request[:num_rows])
        return AttentionRows(
            async_tensor_h2d(rows.query_start, out=self.query_start[: num_rows + 1]),
            async_tensor_h2d(rows.kv_length, out=self.kv_length[:num_rows]),
            [
                torch.index_select(table, 0, request, out=buffer[:num_rows])
                for table, buffer in zip(block_tables, self._tables_like(block_tables), strict=True)
            ],
        )

    def _tables_like(self, block_tables: Sequence[Tensor]) -> list[Tensor]:
        """Buffers as wide as the tables, which vLLM sizes after the model state is made."""
        widths = [table.shape[1] for table in block_tables]
        if [buffer.shape[1] for buffer in self.block_tables] != widths:
            self.block_tables = [
                table.new_zeros(self.num_rows, table.shape[1]) for table in block_tables
            ]
        return self.block_tables
