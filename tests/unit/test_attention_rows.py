"""Rows on the device: what they hold, and that their addresses stay."""

import numpy as np
import pytest
import torch

from vllm_edlm.attention_rows import AttentionRows, RowBuffers
from vllm_edlm.virtual_rows import VirtualRows

TABLE = torch.arange(12, dtype=torch.int32).view(3, 4)


def rows(*requests: int) -> VirtualRows:
    """Rows of two tokens each."""
    count = len(requests)
    return VirtualRows(np.array(requests), 2 * np.arange(count + 1), 10 + np.arange(count))


def addresses(written: AttentionRows) -> list[int]:
    tensors = (written.query_start, written.kv_length, *written.block_tables)
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("requests", [(0,), (0, 2, 2), (1, 0, 1, 2, 2, 0)])
def test_what_rows_hold(requests: tuple[int, ...]) -> None:
    written = RowBuffers(4, torch.device("cpu")).write(rows(*requests), [TABLE, TABLE + 100])
    count = len(requests)
    assert written.query_start.tolist() == [2 * i for i in range(count + 1)]
    assert written.kv_length.tolist() == [10 + i for i in range(count)]
    assert [table.tolist() for table in written.block_tables] == [
        [TABLE[i].tolist() for i in requests],
        [(TABLE[i] + 100).tolist() for i in requests],
    ]
    assert {written.query_start.dtype, written.kv_length.dtype} == {torch.int32}


def test_addresses_stay_but_for_steps_of_prompts() -> None:
    buffers = RowBuffers(4, torch.device("cpu"))
    first = addresses(buffers.write(rows(0, 0, 1), [TABLE]))
    prompts = addresses(buffers.write(rows(0, 0, 0, 1, 2), [TABLE]))
    assert not set(first) & set(prompts)
    assert addresses(buffers.write(rows(2, 1, 1, 0), [TABLE.clone()])) == first


def test_tables_of_another_width() -> None:
    buffers = RowBuffers(2, torch.device("cpu"))
    buffers.write(rows(0), [TABLE[:, :2]])
    assert buffers.write(rows(2), [TABLE]).block_tables[0].tolist() == [TABLE[2].tolist()]
