"""The committed tiny-math checkpoint: within its limits, and what its card says it is."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from examples.convert.word_problems import problem

TINY_MATH = Path("examples/checkpoints/tiny-math")


def test_size_and_weight_names() -> None:
    weights = load_file(TINY_MATH / "model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) <= 6_000_000
    assert (TINY_MATH / "model.safetensors").stat().st_size <= 12_000_000
    assert all(name.startswith(("encoder.", "diffusion_head.")) for name in weights)


def test_config_and_tokenizer_agree() -> None:
    config = AutoConfig.from_pretrained(TINY_MATH)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MATH)
    assert config.architectures == ["EfficientDLM"]
    assert config.mask_token_id == tokenizer.mask_token_id
    assert config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) <= config.vocab_size
    question = problem("heldout", 1, 0).question
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == f"<|user|>{question}<|assistant|>"


def test_the_card_repeats_the_measured_figures() -> None:
    report = json.loads((TINY_MATH / "evaluation" / "accuracy.json").read_text())
    card = (TINY_MATH / "README.md").read_text()
    assert any(note.startswith("1000 questions") for note in report["notes"])
    assert [row["model"] for row in report["rows"]] == ["AR", *["diffusion"] * 4]
    for row in report["rows"]:
        shown = f"| {row['accuracy']:.1%} | {row['tokens per forward']:.2f} |"
        assert shown in card, row
