"""The CPU twins against scalar loops written from vLLM's Triton sources, and through its wrappers.

Each reference takes the arguments of its kernel and does, program by program, what the Triton
source says. A comparison covers every argument, so a write outside the kernel's places shows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.kernel_comparison import assert_same, install_twins
from vllm_edlm.compat import cpu_kernels
from vllm_edlm.compat.cpu_kernels import arrays, block_table, input_batch

SEEDS = range(20)
SLOTS, MAX_LEN, MAX_TOKENS, DRAFTS, VOCABULARY, PAD = 6, 24, 64, 4, 9, -1


def i32(values: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.int32)


def noise(rng: np.random.Generator, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Random content for a buffer, so that a missing or an extra write shows."""
    return torch.tensor(rng.integers(0, VOCABULARY, shape), dtype=dtype)


def padded_borders(lengths: np.ndarray) -> torch.Tensor:
    """Cumulative lengths with two more rows than requests, as vLLM pads `query_start_loc`."""
    return i32(np.pad(np.cumsum(lengths), (1, 2), mode="constant", constant_values=(0, 77)))


@dataclass
class Batch:
    """A random, valid step: some rows in prefill, some at its end, some generating."""

    slots: torch.Tensor  # [R] int64, distinct
    query_start_loc: torch.Tensor  # [R + 3]
    computed: torch.Tensor  # [SLOTS]
    prefill: torch.Tensor  # [SLOTS]
    seq_lens: torch.Tensor  # [SLOTS], the first R filled
    tokens: torch.Tensor  # [SLOTS, MAX_LEN]

    @classmethod
    def draw(cls, rng: np.random.Generator, shortest: int = 0) -> "Batch":
        slots = rng.permutation(SLOTS)[: rng.integers(0, SLOTS + 1)]
        lengths = rng.integers(shortest, MAX_LEN // 3, len(slots))
        computed = rng.integers(0, MAX_LEN // 3, SLOTS)
        # Prompts that end before, in and after the step, each at its very borders too.
        prefill = computed + rng.integers(-2, 5, SLOTS)
        prefill[slots] += rng.integers(0, 2, len(slots)) * lengths
        return cls(
            slots=torch.tensor(slots),
            query_start_loc=padded_borders(lengths),
            computed=i32(computed),
            prefill=i32(np.maximum(prefill, 0)),
            seq_lens=i32([*(computed[slots] + lengths), *[0] * (SLOTS - len(slots))]),
            tokens=noise(rng, SLOTS, MAX_LEN),
        )

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.query_start_loc[: len(self.slots) + 1].numpy())


def prefill_inputs(ids, ahead, _1, num_ahead, slots, qsl, tokens, _2, prefill, computed, **_):
    for b, slot in enumerate(slots.tolist()):
        done, end = int(computed[slot]), int(prefill[slot])
        if done >= end:
            continue
        query_len = int(qsl[b + 1] - qsl[b])
        for i in range(query_len):
            ids[qsl[b] + i] = tokens[slot, done + i]
        for i in range(num_ahead):
            place = done + query_len + i
            ahead[i, slot] = tokens[slot, place] if place < end else 0


@pytest.mark.parametrize("seed", SEEDS)
def test_prepare_prefill_inputs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    b = Batch.draw(rng)
    ahead = noise(rng, 3, SLOTS)
    num_ahead = int(rng.integers(1, 4))
    args = (noise(rng, MAX_TOKENS), ahead, SLOTS, num_ahead, b.slots, b.query_start_loc)
    state = (b.tokens, MAX_LEN, b.prefill, b.computed)
    assert_same(
        input_batch.prepare_prefill_inputs,
        prefill_inputs,
        *args,
        *state,
        BLOCK_SIZE=1024,
        LOOKAHEAD_BLOCK=4,
    )


def pos_seq_lens(pos, seq_lens, slots, qsl, computed, max_num_reqs, **_):
    for b in range(len(slots), max_num_reqs):
        seq_lens[b] = 0
    for b, slot in enumerate(slots.tolist()):
        query_len = int(qsl[b + 1] - qsl[b])
        seq_lens[b] = computed[slot] + query_len
        for i in range(query_len):
            pos[qsl[b] + i] = computed[slot] + i


@pytest.mark.parametrize("seed", SEEDS)
def test_prepare_pos_seq_lens(seed: int) -> None:
    rng = np.random.default_rng(seed)
    b = Batch.draw(rng)
    pos = noise(rng, MAX_TOKENS, dtype=torch.int64)
    args = (pos, noise(rng, SLOTS + 2), b.slots, b.query_start_loc, b.computed, SLOTS + 2)
    assert_same(input_batch.prepare_pos_seq_lens, pos_seq_lens, *args, BLOCK_SIZE=1024)


def combine(ids, slots, last, qsl, seq_lens, prefill, drafts, _, cu, indices, **constexprs):
    num_new = constexprs["NUM_NEW_SAMPLED_TOKENS"]
    for b, slot in enumerate(slots.tolist()):
        num_logits = int(cu[b + 1] - cu[b])
        num_drafts = num_logits - num_new
        query_end = int(qsl[b + 1])
        for i in range(num_logits):
            indices[cu[b] + i] = query_end - num_logits + i
        if seq_lens[b] <= prefill[slot]:
            continue
        if num_new > 0 and seq_lens[b] - num_logits >= prefill[slot]:
            ids[query_end - num_logits] = last[slot, 0]
        for i in range(num_drafts):
            ids[query_end - num_drafts + i] = drafts[slot, i]


@pytest.mark.parametrize("num_new", [0, 1])
@pytest.mark.parametrize("seed", SEEDS)
def test_combine_sampled_and_draft_tokens(seed: int, num_new: int) -> None:
    rng = np.random.default_rng(seed)
    b = Batch.draw(rng, shortest=1)
    num_logits = np.minimum(rng.integers(0, DRAFTS + 1, len(b.slots)) + num_new, b.lengths)
    cu_num_logits = padded_borders(num_logits)
    args = (
        noise(rng, MAX_TOKENS),
        b.slots,
        noise(rng, SLOTS, 1, dtype=torch.int64),
        b.query_start_loc,
        b.seq_lens,
        b.prefill,
        noise(rng, SLOTS, DRAFTS, dtype=torch.int64),
        DRAFTS,
        cu_num_logits,
        noise(rng, int(num_logits.sum()), dtype=torch.int64),
    )
    constexprs = {"NUM_NEW_SAMPLED_TOKENS": num_new, "BLOCK_SIZE": 8}
    assert_same(input_batch.combine_sampled_and_draft_tokens, combine, *args, **constexprs)


def num_sampled_and_rejected(sampled, rejected, seq_lens, cu, slots, prefill):
    for b, slot in enumerate(slots.tolist()):
        chunked = seq_lens[b] < prefill[slot]
        sampled[b] = 0 if chunked else sampled[b]
        rejected[b] = 0 if chunked else cu[b + 1] - cu[b] - sampled[b]


@pytest.mark.parametrize("seed", SEEDS)
def test_get_num_sampled_and_rejected(seed: int) -> None:
    rng = np.random.default_rng(seed)
    b = Batch.draw(rng)
    n = len(b.slots)
    cu_num_logits = padded_borders(rng.integers(0, 5, n))
    args = (noise(rng, n), noise(rng, n), b.seq_lens, cu_num_logits, b.slots, b.prefill)
    assert_same(input_batch.get_num_sampled_and_rejected, num_sampled_and_rejected, *args)


def post(
    slots, computed, last, counts, _1, sampled, _2, emitted, rejected, qsl, tokens, _3, total, **_
):
    for b, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        length, n = int(total[slot]), int(emitted[b])
        if n > 0:
            last[slot, 0] = sampled[b, n - 1]
            total[slot] = length + n
        for i in range(n):
            tokens[slot, length + i] = sampled[b, i]
            if counts is not None:
                counts[slot, sampled[b, i]] += 1
        query_len = 0 if qsl is None else int(qsl[b + 1] - qsl[b])
        computed[slot] += query_len - int(rejected[b])


@pytest.mark.parametrize("with_counts", [True, False])
@pytest.mark.parametrize("with_queries", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_post_update(seed: int, with_queries: bool, with_counts: bool) -> None:
    rng = np.random.default_rng(seed)
    b = Batch.draw(rng)
    n = len(b.slots)
    slots = torch.where(torch.tensor(rng.random(n) < 0.2), -1, b.slots)
    args = (
        slots,
        b.computed,
        noise(rng, SLOTS, 1, dtype=torch.int64),
        noise(rng, SLOTS, VOCABULARY) if with_counts else None,
        VOCABULARY,
        noise(rng, n, DRAFTS + 1, dtype=torch.int64) % 3,  # few values: duplicates in a row
        DRAFTS + 1,
        i32(rng.integers(0, DRAFTS + 2, n)),
        i32(rng.integers(0, DRAFTS + 2, n)),
        b.query_start_loc if with_queries else None,
        b.tokens,
        MAX_LEN,
        i32(rng.integers(0, MAX_LEN - DRAFTS, SLOTS)),
    )
    assert_same(input_batch.post_update, post, *args, num_warps=1)


def post_computed(slots, computed, qsl):
    for b, slot in enumerate(slots.tolist()):
        computed[slot] += qsl[b + 1] - qsl[b]


@pytest.mark.parametrize("seed", SEEDS)
def test_post_update_num_computed_tokens(seed: int) -> None:
    b = Batch.draw(np.random.default_rng(seed))
    twin = input_batch.post_update_num_computed_tokens
    assert_same(twin, post_computed, b.slots, b.computed, b.query_start_loc)


def expand(slots, expanded, local_pos, cu, **_):
    for b, slot in enumerate(slots.tolist()):
        for i in range(int(cu[b + 1] - cu[b])):
            expanded[cu[b] + i] = slot
            local_pos[cu[b] + i] = i


@pytest.mark.parametrize("seed", SEEDS)
def test_expand_idx_mapping(seed: int) -> None:
    rng = np.random.default_rng(seed)
    b = Batch.draw(rng)
    # Longer than the logits rows: what lies beyond must stay.
    buffers = (noise(rng, MAX_TOKENS, dtype=torch.int64), noise(rng, MAX_TOKENS))
    args = (b.slots, *buffers, b.query_start_loc)
    assert_same(input_batch.expand_idx_mapping, expand, *args, BLOCK_SIZE=8)


@dataclass
class Tables:
    """Block tables of several KV cache groups, with the [G] tensors a kernel gets for them."""

    tables: list[torch.Tensor]

    @classmethod
    def draw(cls, rng: np.random.Generator, widths: list[int]) -> "Tables":
        return cls([noise(rng, SLOTS, width) for width in widths])

    def clone(self) -> "Tables":
        return Tables([t.clone() for t in self.tables])

    @property
    def pointers(self) -> torch.Tensor:
        return torch.tensor([t.data_ptr() for t in self.tables], dtype=torch.uint64)

    @property
    def strides(self) -> torch.Tensor:
        return torch.tensor([t.stride(0) for t in self.tables])

    def assert_equal(self, other: "Tables") -> None:
        for mine, expected in zip(self.tables, other.tables, strict=True):
            assert torch.equal(mine, expected)


@pytest.mark.parametrize("widths", [[5], [3, 8]])
@pytest.mark.parametrize("seed", SEEDS)
def test_gather_block_tables(seed: int, widths: list[int]) -> None:
    rng = np.random.default_rng(seed)
    b, source, target = Batch.draw(rng), Tables.draw(rng, widths), Tables.draw(rng, widths)
    num_reqs = len(b.slots)
    padded = int(rng.integers(num_reqs, SLOTS + 1))
    num_blocks = i32([rng.integers(0, width + 1, SLOTS) for width in widths])
    expected = target.clone()
    for group, width in enumerate(widths):
        for row in range(padded):
            slot = int(b.slots[row]) if row < num_reqs else None
            for i in range(width if slot is None else int(num_blocks[group, slot])):
                value = 0 if slot is None else source.tables[group][slot, i]
                expected.tables[group][row, i] = value
    pointers = (source.pointers, target.pointers, source.strides)
    grid = (len(widths), padded)
    kernel = cpu_kernels.GridKernel(block_table.gather_block_tables)
    kernel[grid](b.slots, *pointers, num_blocks, SLOTS, num_reqs, BLOCK_SIZE=1024)
    target.assert_equal(expected)


@pytest.mark.parametrize("page_sizes", [[4], [2, 8]])
@pytest.mark.parametrize("seed", SEEDS)
def test_compute_slot_mappings(seed: int, page_sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    b = Batch.draw(rng)
    n, groups = len(b.slots), len(page_sizes)
    tables = Tables.draw(rng, [MAX_LEN // size for size in page_sizes])
    slots = torch.where(torch.tensor(rng.random(n) < 0.3), -1, b.slots)
    pos = torch.tensor(rng.integers(0, MAX_LEN, MAX_TOKENS))
    enabled = torch.tensor(rng.random(groups) < 0.6)
    mappings = noise(rng, groups, MAX_TOKENS, dtype=torch.int64)
    expected = mappings.clone()
    used = int(b.query_start_loc[n])
    for group, size in enumerate(page_sizes):
        expected[group, used:] = PAD
        for row, slot in enumerate(slots.tolist()):
            for t in range(int(b.query_start_loc[row]), int(b.query_start_loc[row + 1])):
                page = int(tables.tables[group][slot, pos[t] // size])
                known = slot >= 0 and enabled[group]
                expected[group, t] = page * size + int(pos[t]) % size if known else PAD
    block_table.compute_slot_mappings(
        *(MAX_TOKENS, slots, b.query_start_loc, pos, tables.pointers, tables.strides),
        *(i32(page_sizes), enabled, enabled, mappings, MAX_TOKENS, 0),
        CP_SIZE=1,
        CP_INTERLEAVE=1,
        PAD_ID=PAD,
        TRITON_BLOCK_SIZE=1024,
    )
    assert torch.equal(mappings, expected)


def test_slot_ids_beyond_int32() -> None:
    table = i32([[2**28]])
    mappings = torch.zeros(1, 1, dtype=torch.int64)
    block_table.compute_slot_mappings(
        *(1, torch.tensor([0]), i32([0, 1]), torch.tensor([3]), Tables([table]).pointers),
        *(torch.tensor([1]), i32([16]), torch.tensor([True]), None, mappings, 1, 0),
        CP_SIZE=1,
        PAD_ID=PAD,
    )
    assert mappings.item() == 2**32 + 3


def test_context_parallelism_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="decode_context_parallel_size"):
        block_table.compute_slot_mappings(*[None] * 12, CP_SIZE=2, PAD_ID=PAD)


@dataclass
class Writes:
    """Staged writes: distinct rows, lengths from one entry to the row's rest."""

    rows: torch.Tensor
    starts: torch.Tensor
    contents: torch.Tensor
    cu_lens: torch.Tensor

    @classmethod
    def draw(cls, rng: np.random.Generator, width: int, dtype: torch.dtype) -> "Writes":
        rows = rng.permutation(SLOTS)[: rng.integers(0, SLOTS + 1)]
        starts = rng.integers(0, width, len(rows))
        cu_lens = np.cumsum([rng.integers(1, width - s + 1) for s in starts], dtype=np.int64)
        contents = noise(rng, int(cu_lens[-1]) if len(rows) else 0, dtype=dtype)
        return cls(i32(rows), i32(starts), contents, i32(cu_lens))

    @property
    def args(self) -> tuple[torch.Tensor, ...]:
        return self.rows, self.starts, self.contents, self.cu_lens

    def write(self, tensor_of: Callable[[int], torch.Tensor]) -> None:
        """Entry by entry; `tensor_of` takes a write's number to its target."""
        for n in range(len(self.rows)):
            first = int(self.cu_lens[n - 1]) if n > 0 else 0
            for i in range(first, int(self.cu_lens[n])):
                flat, stride = tensor_of(n).view(-1), tensor_of(n).stride(0)
                flat[self.rows[n] * stride + self.starts[n] + i - first] = self.contents[i]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("shape", [(SLOTS,), (SLOTS, 1), (SLOTS, 7)])
@pytest.mark.parametrize("seed", SEEDS)
def test_apply_write(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    writes = Writes.draw(rng, shape[1] if len(shape) > 1 else 1, dtype)
    output = noise(rng, *shape, dtype=dtype)
    expected = output.clone()
    writes.write(lambda _: expected)
    constexprs = {"BLOCK_SIZE": 1024, "MULTI_GROUP": False}
    block_table.apply_write(output, output.stride(0), *writes.args, None, **constexprs)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_apply_write_to_several_groups(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables = Tables.draw(rng, [5, 8, 5])
    expected = tables.clone()
    writes = Writes.draw(rng, 5, torch.int32)
    groups = i32(rng.integers(0, 3, len(writes.rows)))
    writes.write(lambda n: expected.tables[int(groups[n])])
    constexprs = {"BLOCK_SIZE": 1024, "MULTI_GROUP": True}
    block_table.apply_write(tables.pointers, tables.strides, *writes.args, groups, **constexprs)
    tables.assert_equal(expected)


def test_ragged_treats_negative_lengths_as_empty() -> None:
    row, offset = arrays.ragged(np.array([2, -3, 0, 1]))
    assert row.tolist() == [0, 0, 3]
    assert offset.tolist() == [0, 1, 0]


@pytest.fixture(scope="module")
def installed() -> None:
    install_twins()


def test_install_leaves_a_usable_triton_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_utils = pytest.importorskip("vllm.triton_utils")
    dispatcher = pytest.importorskip("vllm.triton_utils.dispatcher")
    registered: list[dict] = []
    monkeypatch.setattr(triton_utils, "HAS_TRITON", True)
    monkeypatch.setattr(dispatcher, "register_kernels", registered.append)
    assert cpu_kernels.install.__wrapped__() is False
    assert registered == []


@pytest.mark.usefixtures("installed")
def test_installing_again_changes_nothing() -> None:
    from vllm.v1.worker.gpu import input_batch as runner

    before = runner._post_update_kernel
    assert cpu_kernels.install() is True
    assert runner._post_update_kernel is before


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("page_sizes", [[4], [4, 2]])
def test_runner_block_tables(page_sizes: list[int]) -> None:
    from vllm.v1.worker.gpu.block_table import BlockTables

    groups = len(page_sizes)
    tables = BlockTables(page_sizes, SLOTS, 16, [3] * groups, torch.device("cpu"))
    for slot, pages in ((4, [7, 8]), (1, [5])):
        tables.append_block_ids(slot, (pages,) * groups, overwrite=True)
    tables.append_block_ids(1, ([6],) * groups, overwrite=False)
    tables.apply_staged_writes()
    slots = torch.tensor([1, 4])
    for gathered in tables.gather_block_tables(slots, num_reqs_padded=3):
        assert gathered.tolist() == [[5, 6, 0], [7, 8, 0], [0, 0, 0]]
    borders, positions = i32([0, 2, 3]), torch.tensor([0, 3, 1])
    mappings = tables.compute_slot_mappings(slots, borders, positions, num_tokens_padded=4)
    assert mappings.tolist() == [[20, 23, 29, PAD], [10, 13, 15, PAD]][:groups]


@pytest.mark.usefixtures("installed")
def test_runner_step_of_a_request() -> None:
    """A prompt of 3 with 2 drafts in one step, through the runner's own functions."""
    from vllm.v1.worker.gpu import input_batch as runner
    from vllm.v1.worker.gpu.states import RequestState

    state = RequestState(SLOTS, MAX_LEN, MAX_TOKENS, DRAFTS, VOCABULARY, torch.device("cpu"))
    state.add_request("r", 3, [7, 8, 6], num_computed_tokens=0, max_tokens=4)
    state.apply_staged_writes()
    slot = state.req_id_to_index["r"]
    state.draft_tokens[slot, :2] = torch.tensor([4, 5])
    slots, borders, logits_borders = torch.tensor([slot]), i32([0, 5]), i32([0, 2])
    buffers = runner.InputBuffers(SLOTS, MAX_TOKENS, torch.device("cpu"))
    tokens, prefill = state.all_token_ids.gpu, state.prefill_len.gpu
    computed = state.num_computed_tokens.gpu

    expanded, local = runner.expand_idx_mapping(slots, 2, logits_borders, DRAFTS)
    assert (expanded.tolist(), local.tolist()) == ([slot, slot], [0, 1])
    runner.prepare_prefill_inputs(
        buffers.input_ids, state.next_prefill_tokens, slots, borders, tokens, prefill, computed
    )
    runner.prepare_pos_seq_lens(slots, borders, computed, buffers.positions, buffers.seq_lens)
    assert buffers.seq_lens.tolist() == [5] + [0] * (SLOTS - 1)
    indices = runner.combine_sampled_and_draft_tokens(
        *(buffers.input_ids, slots, state.last_sampled_tokens, borders, buffers.seq_lens, prefill),
        *(state.draft_tokens, logits_borders, 2, 0),
    )
    assert indices.tolist() == [3, 4]
    assert buffers.input_ids[:5].tolist() == [7, 8, 6, 4, 5]
    assert buffers.positions[:5].tolist() == [0, 1, 2, 3, 4]

    counts = torch.zeros(SLOTS, VOCABULARY, dtype=torch.int32)
    sampled, rejected = runner.get_num_sampled_and_rejected(
        i32([1]), buffers.seq_lens, logits_borders, slots, prefill
    )
    runner.post_update(
        *(slots, computed, state.last_sampled_tokens, counts, torch.tensor([[4, 0]]), sampled),
        *(rejected, borders, tokens, state.total_len.gpu),
    )
    assert (computed[slot], state.total_len.gpu[slot], counts[slot, 4]) == (4, 4, 1)
    assert tokens[slot, :4].tolist() == [7, 8, 6, 4]
    runner.post_update_num_computed_tokens(slots, computed, borders)
    assert computed[slot] == 9
