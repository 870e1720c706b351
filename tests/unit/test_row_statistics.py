"""Row statistics in torch, and their Triton kernel in Triton's interpreter, beside plain Python."""

import importlib
import importlib.util
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_edlm.kernels import row_statistics as in_torch

Implementation = Callable[..., Any]
"""Called with a function's name and its arguments."""


def call_torch(name: str, *args: Any) -> Any:
    return getattr(in_torch, name)(*args)


def use_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


def call_kernel(name: str, *args: Any) -> Any:
    return getattr(importlib.import_module("vllm_edlm.kernels.row_statistics_triton"), name)(*args)


@pytest.fixture(scope="module", params=["torch", "Triton's interpreter"])
def call(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    """The interpreter has a process of its own: it is chosen when kernels are imported."""
    if request.param == "torch":
        yield call_torch
        return
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=use_interpreter) as child:
        yield lambda *args: child.submit(call_kernel, *args).result()


def expected_token(row: list[float], mask_token_id: int) -> int:
    ids = [i for i in range(len(row)) if i != mask_token_id]
    nans = [i for i in ids if math.isnan(row[i])]
    return nans[0] if nans else max(ids, key=lambda i: (row[i], -i))


def expected_probability(row: list[float], token: int) -> float:
    top = max(row)
    if any(math.isnan(x) or x == math.inf for x in row) or top == -math.inf:
        return 0.0
    return math.exp(row[token] - top) / math.fsum(math.exp(x - top) for x in row)


def assert_probabilities(found: torch.Tensor, rows: list[list[float]], tokens: list[int]) -> None:
    assert found.dtype == torch.float32
    wanted = torch.tensor(
        [expected_probability(*each) for each in zip(rows, tokens, strict=True)],
        dtype=torch.float64,
    )
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=1e-30)


def filled(share: float, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Puts a value into a share of a row's logits, at random."""
    return lambda row: row.masked_fill(torch.rand(row.shape) < share, value)


def banned_beginning(row: torch.Tensor) -> torch.Tensor:
    """Whole chunks and tiles in which every token is banned."""
    return torch.where(torch.arange(len(row)) < len(row) // 2, -math.inf, row)


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "spread": lambda row: row,
    "ties everywhere": lambda row: row.sign(),
    "ties at the top": filled(0.002, 20.0),
    "half banned": filled(0.5, -math.inf),
    "beginning banned": banned_beginning,
    "almost all banned": filled(0.999, -math.inf),
    "all banned": filled(1.0, -math.inf),
    "infinite": filled(0.1, math.inf),
    "not a number": filled(0.1, math.nan),
}


@st.composite
def rows_of_logits(draw: st.DrawFn) -> torch.Tensor:
    """[R, V] logits of all kinds, as a part of a larger tensor."""
    kinds = draw(st.lists(st.sampled_from(sorted(KINDS)), max_size=8))
    vocab_size = draw(st.sampled_from([9001, 5001, 4096, 1025, 1024, 100, 3, 2]))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    whole = torch.randn(len(kinds), vocab_size + 5).mul_(4).repeat_interleave(2, dim=0)
    for row, kind in zip(whole[::2], kinds, strict=True):
        row.copy_(KINDS[kind](row))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return whole.to(dtype)[::2, 3 : 3 + vocab_size]


@settings(max_examples=100)
@given(logits=rows_of_logits(), data=st.data())
def test_against_plain_python(
    call: Implementation, logits: torch.Tensor, data: st.DataObject
) -> None:
    last = logits.shape[1] - 1
    ids = st.sampled_from([0, last, last // 2]) | st.integers(0, last)
    mask_token_id = data.draw(ids)
    rows = logits.tolist()
    before = logits.clone()
    token, confidence = call("row_statistics", logits, mask_token_id)
    assert token.dtype == torch.int64
    assert token.tolist() == [expected_token(row, mask_token_id) for row in rows]
    assert_probabilities(confidence, rows, token.tolist())
    assert torch.equal(call("probability", logits, token), confidence), "equal to the bit"
    other = data.draw(st.lists(ids, min_size=len(rows), max_size=len(rows)))
    probability = call("probability", logits, torch.tensor(other, dtype=torch.int64))
    assert_probabilities(probability, rows, other)
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)


def test_likeliest_mask_token_and_banned_rows(call: Implementation) -> None:
    banned = -math.inf
    logits = torch.tensor([[9.0, 1.0, 1.0], [9.0, banned, banned], [banned, banned, banned]])
    token, confidence = call("row_statistics", logits, 0)
    assert token.tolist() == [1, 1, 1], "never the mask token"
    assert confidence[0].item() == pytest.approx(1 / (2 + math.exp(8)))
    assert confidence[1:].tolist() == [0.0, 0.0]


def test_rows_do_not_depend_on_each_other(call: Implementation) -> None:
    logits = torch.randn(70, 20_011, generator=torch.Generator().manual_seed(0)) * 4
    logits = logits.bfloat16()
    token, confidence = call("row_statistics", logits, 7)
    same = {
        "one at a time": [logits[i : i + 1] for i in range(0, 70, 23)],
        "in another place": [logits[i:].contiguous() for i in range(0, 70, 23)],
        "as fp32": [logits[i : i + 2].float() for i in range(0, 70, 23)],
    }
    for how, parts in same.items():
        for part, start in zip(parts, range(0, 70, 23), strict=True):
            some = slice(start, start + len(part))
            alone = call("row_statistics", part, 7)
            assert torch.equal(alone[0], token[some]), how
            assert torch.equal(alone[1], confidence[some]), how


class LargestResult(TorchDispatchMode):
    """Notes the size of the largest new tensor, in bytes."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits.untyped_storage().data_ptr()
        self.size = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            storage = tensor.untyped_storage()
            if storage.data_ptr() != self.logits:
                self.size = max(self.size, storage.nbytes())
        return result


def test_no_copy_beyond_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_torch, "TILE_BYTES", 100_000)
    monkeypatch.setattr(in_torch, "MAX_TILE_BYTES", 200_000)
    logits = torch.zeros(100, 5000)
    with LargestResult(logits) as largest:
        in_torch.row_statistics(logits, 0)
        in_torch.probability(logits, torch.zeros(100, dtype=torch.int64))
    assert 5000 * 4 <= largest.size <= 200_000


@pytest.mark.parametrize("chooses", [True, False])
def test_kernel_compiles(chooses: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a GPU, of which none is needed: the interpreter takes more than the compiler does."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vllm_edlm.kernels import row_statistics_triton as in_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    numbers = dict.fromkeys(["row_stride", "vocab_size", "mask_token_id"], "i32")
    pointers = {"logits_ptr": "*bf16", "token_ptr": "*i64", "probability_ptr": "*fp32"}
    constants = {"chooses": chooses, "columns": in_triton.COLUMNS}
    names = in_triton._row_statistics_kernel.arg_names
    types = {**numbers, **pointers, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        in_triton._row_statistics_kernel, {name: types[name] for name in names}, constants
    )
    compiled = triton.compile(source, GPUTarget("cuda", 80, 32), in_triton.OPTIONS)
    assert "_row_statistics_kernel" in compiled.asm["ptx"]
