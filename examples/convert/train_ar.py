"""Train the autoregressive tiny-math model: a stock Qwen3ForCausalLM, with transformers.Trainer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainingArguments,
    set_seed,
)

from examples.convert.tokenizer import build_tokenizer
from examples.convert.word_problems import problems
from vllm_edlm.train.checkpoints import CheckpointingTrainer, last_checkpoint
from vllm_edlm.train.documents import Document, Source, read_documents

_IGNORED = -100  # the label that torch's cross entropy leaves out
_TOKENIZER_PROBLEMS = 4000


class CausalRows(Dataset[dict[str, Tensor]]):
    """One document per row, padded on the right to one length (static shapes compile once)."""

    def __init__(self, documents: list[Document], pad: int) -> None:
        self._documents = documents
        self._pad = pad
        self._length = max(len(d.tokens) for d in documents)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        document = self._documents[index]
        missing = self._length - len(document.tokens)
        labels = [
            token if in_loss else _IGNORED
            for token, in_loss in zip(document.tokens, document.in_loss, strict=True)
        ]
        return {
            "input_ids": torch.tensor(document.tokens + [self._pad] * missing),
            "labels": torch.tensor(labels + [_IGNORED] * missing),
        }


def tiny_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """The task's tokenizer, trained on the first training problems."""
    shown = problems("train", seed, _TOKENIZER_PROBLEMS)
    return build_tokenizer((text for p in shown for text in (p.question, p.answer)), 1024)


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """Qwen3 shape with 3.4M parameters; the vocabulary is rounded up to whole 64s."""
    return Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class _PartOfASchedule(CheckpointingTrainer):
    """Stops at `max_steps` of a learning-rate schedule laid out for more."""

    schedule_steps = 2200

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        return super().create_scheduler(self.schedule_steps, optimizer)


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(args.output / "checkpoints"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=100,
        weight_decay=0.01,
        adam_beta2=0.98,
        seed=args.seed,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        torch_compile=args.compile,
        logging_steps=25,
        save_steps=500,
        save_total_limit=1,
        report_to=[],
    )


def main() -> None:
    """Train, or go on from the last checkpoint, and write model and tokenizer to `output`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="JSONL with prompt and response")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    set_seed(args.seed)
    tokenizer = tiny_tokenizer(args.seed)
    model = Qwen3ForCausalLM(tiny_config(tokenizer))
    documents = list(read_documents(Source(str(args.data)), tokenizer))
    rows = CausalRows(documents, tokenizer.pad_token_id)
    arguments = training_arguments(args)
    trainer = _PartOfASchedule(model=model, args=arguments, train_dataset=rows)
    checkpoint = last_checkpoint(args.output / "checkpoints")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
