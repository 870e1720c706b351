"""Every way to compute attention against SDPA under one dense mask, in stock decoders."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from tests.train.decoders import (
    FAMILIES,
    ROWS,
    assert_equals_dense,
    dense,
    run,
    tiny_model,
    with_gradients,
)
from tests.train.grids import LAYOUTS, joint_grid, rows_of
from vllm_edlm.train.attention import (
    ATTENTIONS,
    FLEX,
    attention_inputs,
    implementation,
    sdpa,
    xformers,
)
from vllm_edlm.train.masks import Grid, Pattern, dense_mask

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles for sequences of any length; no T here is a multiple of 16."""
    monkeypatch.setattr(sdpa, "WHOLE_MASK", 0)
    monkeypatch.setattr(sdpa, "TILE_QUERIES", 16)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("family", FAMILIES)
def test_tiles_equal_dense_in_every_family(family: str) -> None:
    assert_equals_dense(tiny_model(family), sdpa.NAME, joint_grid(ROWS, 4))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("pattern", "causal", "copies"), LAYOUTS)
@pytest.mark.parametrize("queries", [7, 64, 1000])
def test_tiles_equal_dense_in_every_layout(
    monkeypatch: pytest.MonkeyPatch, pattern: Pattern, causal: bool, copies: int, queries: int
) -> None:
    monkeypatch.setattr(sdpa, "TILE_QUERIES", queries)
    grid = joint_grid(ROWS, 4, pattern, causal, copies)
    assert_equals_dense(tiny_model(), sdpa.NAME, grid)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("reentrant", [False, True])
def test_tiles_under_gradient_checkpointing(reentrant: bool) -> None:
    model, grid = tiny_model().train(), joint_grid(ROWS, 4)
    expected = dense(model, grid)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.set_attn_implementation(sdpa.NAME)
    torch.testing.assert_close(with_gradients(model, grid), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_tiles")
def test_tiles_under_autocast() -> None:
    model, grid = tiny_model(), joint_grid(ROWS, 4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = dense(model, grid)
        model.set_attn_implementation(sdpa.NAME)
        tiled = with_gradients(model, grid)
    # bf16 keeps eight bits, and sums are taken in another order.
    torch.testing.assert_close(tiled, expected, rtol=0, atol=0.03)


def test_short_sequences_share_one_mask_among_layers() -> None:
    grid = joint_grid(ROWS, 4)
    inputs = attention_inputs(sdpa.NAME, grid)
    assert torch.equal(inputs.pop("attention_mask"), dense_mask(grid))
    assert not inputs
    assert_equals_dense(tiny_model(), sdpa.NAME, grid)


def test_tiles_leave_out_keys_that_no_query_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "TILE_QUERIES", 128)
    tiles = sdpa.tiles(joint_grid(rows_of([512, 0]), 4))
    assert [len(tile.queries) for tile in tiles] == [128] * 8
    noisy, clean = tiles[1], tiles[5]
    last_block = 4
    assert noisy.keys.tolist() == [*range(128, 256), *range(512, 768 - last_block)]
    assert clean.keys.tolist() == [*range(512, 768)]


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made, backward included."""

    numel = 0
    backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        self.backward |= "attention" in str(func) and "backward" in str(func)
        return result


def largest_tensor(model: PreTrainedModel, grid: Grid) -> int:
    with LargestTensor() as largest:
        run(model, grid).sum().backward()
    assert largest.backward
    return largest.numel


def test_no_quadratic_tensor_at_4096_tokens() -> None:
    model = tiny_model(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    model.set_attn_implementation(sdpa.NAME)
    short, long = (joint_grid(rows_of([tokens, 0]), 32) for tokens in (256, 4096))
    assert largest_tensor(model, short) == 512**2, "the whole mask is seen where there is one"
    assert largest_tensor(model, long) < 8192**2 / 4


@pytest.mark.parametrize(("pattern", "causal", "copies"), LAYOUTS)
def test_flex_equals_dense_in_a_model(pattern: Pattern, causal: bool, copies: int) -> None:
    model, grid = tiny_model(), joint_grid(ROWS, 4, pattern, causal, copies)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = run(model, grid, attention_mask=dense_mask(grid))
        model.set_attn_implementation(FLEX)
        torch.testing.assert_close(run(model, grid), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("pattern", "causal", "copies"), LAYOUTS)
@pytest.mark.parametrize("attention", ["flex", "sdpa", "xformers"])
def test_every_attention_trains_alike_on_a_gpu(
    attention: str, pattern: Pattern, causal: bool, copies: int
) -> None:
    if attention == "xformers":
        pytest.importorskip("xformers", reason="xformers is not installed")
    grid = joint_grid(ROWS, 4, pattern, causal, copies)
    on_gpu = {
        name: getattr(grid, name).cuda() for name in ("copy", "document", "block", "position")
    }
    grid, model = replace(grid, **on_gpu), tiny_model().cuda()
    with torch.autocast("cuda", torch.bfloat16):
        expected = dense(model, grid)
        model.set_attn_implementation(implementation(attention, CUDA))
        # bf16 keeps eight bits, and sums are taken in another order.
        torch.testing.assert_close(with_gradients(model, grid), expected, rtol=0, atol=0.03)


def test_auto_takes_flex_where_it_trains() -> None:
    assert implementation("auto", CUDA) == implementation("flex", CUDA) == FLEX
    assert implementation("auto", CPU) == implementation("sdpa", CPU) == sdpa.NAME


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("flex", "'flex' trains on cuda or xpu only, not on cpu"),
        ("xformers", "'xformers' trains on cuda only, not on cpu"),
        ("eager", f"must be one of {', '.join(ATTENTIONS)}, not 'eager'"),
    ],
)
def test_what_cannot_run_is_refused(attention: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        implementation(attention, CPU)


def test_xformers_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(ValueError, match="install vllm-edlm with its extra 'xformers'"):
        implementation("xformers", CUDA)


@pytest.mark.parametrize("name", [sdpa.NAME, xformers.NAME])
def test_a_forward_without_the_mask_is_refused(name: str) -> None:
    model = tiny_model()
    model.set_attn_implementation(name)
    with pytest.raises(ValueError, match="attention_inputs"):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))


def test_other_implementations_take_no_joint_sequence() -> None:
    with pytest.raises(ValueError, match="'eager' knows no joint sequences"):
        attention_inputs("eager", joint_grid(ROWS, 4))
