"""The whole conversion: load an AR model, train it as a block-diffusion model, export it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from vllm_edlm.train.data import PackedRows, read_documents
from vllm_edlm.train.export import (
    SUPPORTED_MODEL_TYPES,
    Layout,
    choose_mask_token,
    export,
    untie_head,
)
from vllm_edlm.train.model import BlockDiffusionLM
from vllm_edlm.train.noise import NoiseKind
from vllm_edlm.train.trainer import ConversionTrainer, Objective, last_checkpoint, steps_done


@dataclass(frozen=True)
class Recipe:
    """Everything `edlm convert` lets one choose; the command's help explains each."""

    model: str
    data: Path
    output: Path
    block_length: int
    half_life_ratio: float
    noise: NoiseKind
    noise_copies: int
    mask_token_id: int | None
    row_length: int
    steps: int
    batch_size: int
    learning_rate: float
    min_learning_rate_ratio: float
    warmup_steps: int
    weight_decay: float
    save_steps: int
    seed: int
    bf16: bool
    compile: bool
    layout: Layout
    attention: str


def convert(recipe: Recipe) -> None:
    """Train and export by the recipe; goes on from the last checkpoint in `output`, if any.

    Raises:
        ValueError: an option, the data or the model does not fit; the message names it.
        TrainingDivergedError: the loss became NaN or infinite.
    """
    set_seed(recipe.seed)
    tokenizer, causal_lm = _load(recipe)
    mask_token_id = choose_mask_token(tokenizer, causal_lm, recipe.mask_token_id)
    objective = Objective(
        block_length=recipe.block_length,
        mask_token_id=mask_token_id,
        noise=recipe.noise,
        half_life_ratio=recipe.half_life_ratio,
        noise_copies=recipe.noise_copies,
        seed=recipe.seed,
    )
    untie_head(causal_lm)
    documents = read_documents(recipe.data, tokenizer)
    rows = PackedRows(documents, recipe.row_length, recipe.block_length, tokenizer.eos_token_id)
    train(BlockDiffusionLM(causal_lm), rows, objective, recipe)
    export(recipe.output, causal_lm, tokenizer, objective, recipe.layout)


def train(model: BlockDiffusionLM, rows: PackedRows, objective: Objective, recipe: Recipe) -> None:
    """Run the training loop, or what is left of it; weights change in place."""
    if recipe.compile:
        # Only the backbone: the number of masked tokens, and so the head's shape, always changes.
        model.causal_lm.base_model.compile()
    arguments = training_arguments(recipe)
    checkpoint = last_checkpoint(Path(str(arguments.output_dir)))
    if checkpoint and steps_done(checkpoint) >= recipe.steps:
        # Stopped between the last step and the export: Trainer would take one step too many.
        load_model(model, Path(checkpoint) / "model.safetensors")
        return
    trainer = ConversionTrainer(model, arguments, rows, objective)
    trainer.train(resume_from_checkpoint=checkpoint)


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """AdamW with warm-up and a cosine down to a minimum, as in the paper's recipe."""
    return TrainingArguments(
        output_dir=str(recipe.output / "checkpoints"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.min_learning_rate_ratio},
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        seed=recipe.seed,
        bf16=recipe.bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=min(25, recipe.steps),
        save_steps=recipe.save_steps,
        save_total_limit=2,
        report_to=[],
    )


def _load(recipe: Recipe) -> tuple[Any, Any]:
    """Tokenizer and fp32 model, checked before anything expensive happens."""
    if not recipe.data.is_file():
        raise ValueError(f"data file {recipe.data} does not exist")
    try:
        tokenizer = AutoTokenizer.from_pretrained(recipe.model)
        causal_lm = AutoModelForCausalLM.from_pretrained(
            recipe.model, dtype=torch.float32, attn_implementation=recipe.attention
        )
    except OSError as error:
        raise ValueError(f"cannot load the model {recipe.model}: {error}") from error
    if causal_lm.config.model_type not in SUPPORTED_MODEL_TYPES:
        allowed = ", ".join(SUPPORTED_MODEL_TYPES)
        raise ValueError(
            f"{recipe.model} is of model type {causal_lm.config.model_type!r}; allowed: {allowed}"
        )
    return tokenizer, causal_lm
