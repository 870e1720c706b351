"""Exports hold the trained model whole, as serving, stock transformers and the oracle read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle_model import OracleModel
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, tiny_model
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import vllm_edlm.train.export as export_module
from vllm_edlm.train.export import export
from vllm_edlm.train.layouts import Layout, layout_name, load_causal_lm, stock_name
from vllm_edlm.train.objective import Objective

OBJECTIVE = Objective(block_length=8, mask_token_id=2)
LAYOUTS: tuple[Layout, ...] = ("efficient_dlm", "plain")
PREFIXES = {"efficient_dlm": ("encoder.", "diffusion_head."), "plain": ("model.", "lm_head.")}


def block_causal_mask(length: int) -> Tensor:
    block = torch.arange(length) // OBJECTIVE.block_length
    return block[:, None] >= block


def stock_logits(causal_lm: Any, tokens: Tensor) -> Tensor:
    mask = block_causal_mask(len(tokens))[None, None]
    with torch.no_grad():
        return causal_lm(input_ids=tokens[None], attention_mask=mask).logits[0]


def written_weights(directory: Path) -> dict[str, Tensor]:
    """Every tensor of an export, by the files and the index alone."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return load_file(directory / "model.safetensors")
    places = json.loads(index.read_text())["weight_map"]
    files = {file: load_file(directory / file) for file in sorted(set(places.values()))}
    held = {name: file for file, tensors in files.items() for name in tensors}
    assert held == places, "every tensor stands where the index says, and there alone"
    return {name: files[file][name] for name, file in places.items()}


@pytest.fixture(params=FAMILIES)
def family_lm(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Any:
    return tiny_model(request.param, len(tokenizer))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_independent_decoder_computes_the_same_from_an_export(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, family: str, layout: Layout, tied: bool
) -> None:
    trained = tiny_model(family, len(tokenizer), tie_word_embeddings=tied)
    export(tmp_path, trained, tokenizer, OBJECTIVE, layout, torch.float32)
    tokens = torch.randint(3, len(tokenizer), (40,), generator=torch.Generator().manual_seed(1))
    oracle = OracleModel.load(tmp_path)
    assert oracle.config["tie_word_embeddings"] is tied
    found = oracle.logits(tokens, block_causal_mask(len(tokens)))
    torch.testing.assert_close(found, stock_logits(trained, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_stock_class_loads_an_export_of_any_layout(
    family_lm: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, layout: Layout
) -> None:
    export(tmp_path, family_lm, tokenizer, OBJECTIVE, layout, torch.float32)
    again = load_causal_lm(str(tmp_path), torch.float32)
    assert type(again) is type(family_lm)
    for name, tensor in family_lm.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_names_every_tensor(
    family_lm: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, layout: Layout
) -> None:
    export(tmp_path, family_lm, tokenizer, OBJECTIVE, layout)
    backbone, head = PREFIXES[layout]
    weights = written_weights(tmp_path)
    assert head + "weight" in weights
    assert all(name.startswith((backbone, head)) for name in weights)
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights.values())


def test_shards_hold_every_weight_once_and_within_their_size(
    family_lm: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    largest = max(tensor.numel() for tensor in family_lm.state_dict().values()) * 4
    export(
        tmp_path, family_lm, tokenizer, OBJECTIVE, "plain", torch.float32, max_shard_size=largest
    )
    weights = written_weights(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    assert len(list(tmp_path.glob("*.safetensors"))) >= 2
    for path in tmp_path.glob("*.safetensors"):
        assert sum(tensor.nbytes for tensor in load_file(path).values()) <= largest
    assert weights.keys() == family_lm.state_dict().keys()
    for name, tensor in family_lm.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_only_one_shard_at_a_time_is_converted(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, written = tiny_model("qwen3", len(tokenizer)), []

    def spy(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        written.append({name: tensor.dtype for name, tensor in tensors.items()})

    monkeypatch.setattr(export_module, "save_file", spy)
    export(tmp_path, trained, tokenizer, OBJECTIVE, "plain", max_shard_size="10KB")
    assert len(written) > 2
    assert sum(map(len, written)) == len(trained.state_dict())
    assert {dtype for shard in written for dtype in shard.values()} == {torch.bfloat16}


def test_weights_that_are_not_the_models_are_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    lacking, wrapped, sharded = (tiny_model("qwen3", len(tokenizer)) for _ in range(3))
    del lacking.model.norm
    wrapped.adapter = torch.nn.Linear(2, 2)
    sharded.lm_head.weight = torch.nn.Parameter(sharded.lm_head.weight[::2])
    for wrong, name in (
        (lacking, "model.norm.weight"),
        (wrapped, "adapter.weight"),
        (sharded, "lm_head.weight"),
    ):
        with pytest.raises(ValueError, match=f"cannot export.*{name}"):
            export(tmp_path, wrong, tokenizer, OBJECTIVE)
    assert not list(tmp_path.iterdir())


def test_an_unknown_layout_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trained = tiny_model("qwen3", len(tokenizer))
    with pytest.raises(ValueError, match="unknown weight layout 'x'"):
        export(tmp_path, trained, tokenizer, OBJECTIVE, "x")  # type: ignore[arg-type]


def test_the_tokenizer_arrives_with_template_and_mask_token(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    export(tmp_path, tiny_model("qwen3", len(tokenizer)), tokenizer, OBJECTIVE)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == tokenizer.chat_template
    assert again.mask_token_id == tokenizer.mask_token_id == 2
    assert again("7 + 8").input_ids == tokenizer("7 + 8").input_ids


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_of_a_layout_lead_back_to_the_stock_ones(family_lm: Any, layout: Layout) -> None:
    for name in family_lm.state_dict():
        assert stock_name(layout_name(name, layout)) == name


def test_a_model_that_lacks_weights_is_not_loaded(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    export(tmp_path, tiny_model("qwen3", len(tokenizer)), tokenizer, OBJECTIVE)
    weights = written_weights(tmp_path)
    del weights["encoder.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"it lacks model\.layers\.0\.mlp\.up_proj\.weight"):
        load_causal_lm(str(tmp_path), torch.float32)
    with pytest.raises(ValueError, match=r"cannot load the model .*nothing"):
        load_causal_lm(str(tmp_path / "nothing"), torch.float32)
