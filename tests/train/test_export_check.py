"""`edlm convert --check`: a faithful export passes, in either type; any other is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, tiny_model
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vllm_edlm.train.attention import implementation
from vllm_edlm.train.check import TOLERANCE, check
from vllm_edlm.train.documents import Document
from vllm_edlm.train.export import export
from vllm_edlm.train.layouts import Layout
from vllm_edlm.train.masks import Pattern
from vllm_edlm.train.objective import Objective
from vllm_edlm.train.packing import PackedRows

OBJECTIVE = Objective(block_length=8, mask_token_id=2)
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def rows(tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Tensor]]:
    """Two rows of several documents with a prompt each."""
    generator = torch.Generator().manual_seed(1)
    documents = []
    for prompt, answer in ((6, 21), (3, 40), (5, 11), (1, 30)):
        tokens = torch.randint(5, len(tokenizer), (prompt + answer,), generator=generator)
        documents.append(Document(tokens.tolist(), [False] * prompt + [True] * answer))
    return list(islice(PackedRows(documents, 64, 8, tokenizer.eos_token_id), 2))


def trained_model(family: str, tokenizer: PreTrainedTokenizerFast, **overrides: Any) -> Any:
    model = tiny_model(family, len(tokenizer), **overrides)
    model.set_attn_implementation(implementation("sdpa", torch.device("cpu")))
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_faithful_export_passes(
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, Tensor]],
    tmp_path: Path,
    family: str,
    dtype: torch.dtype,
) -> None:
    trained = trained_model(family, tokenizer)
    export(tmp_path, trained, tokenizer, OBJECTIVE, dtype=dtype, max_shard_size="10KB")
    result = check(tmp_path, trained, OBJECTIVE, rows)
    assert result.dtype == dtype
    assert 0 < result.tokens <= sum(int(row["in_loss"].sum()) for row in rows)
    assert result.rounded.largest <= TOLERANCE
    assert result.rounded.equal_argmax == 1.0
    if dtype == torch.bfloat16:
        assert result.trained.largest > TOLERANCE, "rounding is seen, and is no error"
    assert f"logits of {result.tokens} masked tokens" in str(result)


@pytest.mark.parametrize(
    "axes",
    [
        {"pattern": Pattern.bidirectional},
        {"token_shift": True},
        {"ar_loss_weight": 0.5},
        {"noise": "uniform", "noise_copies": 2},
        {"growth": (2, 8)},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["efficient_dlm", "plain"])
def test_every_objective_can_be_checked(
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, Tensor]],
    tmp_path: Path,
    axes: dict[str, Any],
    layout: Layout,
) -> None:
    objective = Objective(8, 2, **axes)
    trained = trained_model("qwen3", tokenizer, tie_word_embeddings=True)
    export(tmp_path, trained, tokenizer, objective, layout)
    assert check(tmp_path, trained, objective, rows).rounded.largest <= TOLERANCE


def change_config(**values: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def change_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(directory: Path) -> None:
        path = directory / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return rewrite


UP = "encoder.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_weights(lambda t: t[UP].add_(0.01)), "is not the trained model: logits of"),
        (change_weights(lambda t: t[UP].fill_(float("nan"))), "is not the trained model"),
        (change_weights(lambda t: t.pop(UP)), r"it lacks model\.layers\.1\.mlp\.up_proj\.weight"),
        (change_weights(lambda t: t.update(more=torch.ones(1))), "not a part of it: more"),
        (change_config(rms_norm_eps=1e-2), "is not the trained model"),
        (
            change_config(rope_parameters={"rope_type": "default", "rope_theta": 100.0}),
            "is not the trained model",
        ),
        (change_config(dtype="bfloat16"), "is not the trained model"),
        (change_config(block_size=4), "block_size in .* must be 8, got 4"),
        (change_config(token_shift=True), "token_shift in .* must be False, got True"),
        (lambda directory: (directory / "config.json").unlink(), "config.json is missing"),
    ],
)
def test_a_damaged_export_is_refused(
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, Tensor]],
    tmp_path: Path,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    trained = trained_model("llama", tokenizer)
    export(tmp_path, trained, tokenizer, OBJECTIVE, dtype=torch.float32)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        check(tmp_path, trained, OBJECTIVE, rows)


def test_rows_without_a_masked_token_are_refused(
    tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    trained = trained_model("qwen3", tokenizer)
    export(tmp_path, trained, tokenizer, OBJECTIVE)
    nothing = [row | {"in_loss": torch.zeros_like(row["in_loss"])} for row in rows]
    with pytest.raises(ValueError, match="no token of the 2 rows to check with is masked"):
        check(tmp_path, trained, OBJECTIVE, nothing)


def test_the_trained_weights_are_left_as_they_are(
    tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    trained = trained_model("qwen3", tokenizer)
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    export(tmp_path, trained, tokenizer, OBJECTIVE)
    check(tmp_path, trained, OBJECTIVE, rows)
    assert all(torch.equal(before[name], t) for name, t in trained.state_dict().items())
