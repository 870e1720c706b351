"""A random Qwen3 of a few thousand parameters and a tokenizer to match."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import vllm_edlm.train.trainer as trainer_module
from examples.convert.tokenizer import build_tokenizer
from examples.convert.word_problems import problems, write_jsonl
from vllm_edlm.train.attention import implementation


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    shown = list(problems("train", 0, 300))
    return build_tokenizer((text for p in shown for text in (p.question, p.answer)), 512)


@pytest.fixture
def tiny_lm(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        attn_implementation=implementation("sdpa", torch.device("cpu")),
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="session")
def problem_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    write_jsonl(path, "train", 0, 64)
    return path


@pytest.fixture
def ar_directory(
    tmp_path: Path, tiny_lm: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> Path:
    directory = tmp_path / "ar"
    tiny_lm.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every training loss, in order."""
    seen: list[float] = []
    compute = trainer_module.ConversionTrainer.compute_loss

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        seen.append(loss.item())
        return loss

    monkeypatch.setattr(trainer_module.ConversionTrainer, "compute_loss", spy)
    return seen
