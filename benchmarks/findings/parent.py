"""The AR parent of all conversions: a stock Qwen3 of 0.16 million parameters."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainingArguments,
    set_seed,
)

from benchmarks.findings.task import build_tokenizer
from examples.convert.train_ar import CausalRows
from vllm_edlm.train.checkpoints import CheckpointingTrainer, last_checkpoint
from vllm_edlm.train.documents import Source, read_documents

STEPS = 150
BATCH = 64
LEARNING_RATE = 3e-3
SEED = 0


def config(vocabulary: int, end: int, pad: int) -> Qwen3Config:
    """Three layers, hidden size 64."""
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        eos_token_id=end,
        pad_token_id=pad,
    )


def train_parent(data: Path, output: Path) -> None:
    """Train on JSONL, or go on from the last checkpoint; nothing where the model is written."""
    if (output / "config.json").exists():
        return
    set_seed(SEED)
    tokenizer = build_tokenizer()
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = Qwen3ForCausalLM(config(len(tokenizer), end, pad))
    rows = CausalRows(list(read_documents(Source(str(data)), tokenizer)), pad)
    trainer = CheckpointingTrainer(model, _arguments(output), train_dataset=rows)
    checkpoint = last_checkpoint(output / "checkpoints")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, do_sample=False)
    tokenizer.save_pretrained(output)
    model.save_pretrained(output)


def _arguments(output: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output / "checkpoints"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=30,
        adam_beta2=0.98,
        seed=SEED,
        use_cpu=True,
        logging_steps=50,
        save_steps=200,
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
    )
