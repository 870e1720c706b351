"""Everything that `edlm convert` lets one choose, and what Trainer makes of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments

from vllm_edlm.train.layouts import Layout
from vllm_edlm.train.masks import Pattern
from vllm_edlm.train.noise import NoiseKind
from vllm_edlm.train.objective import Objective

Schedule = Literal["cosine", "wsd"]
LogTo = Literal["none", "tensorboard"]
Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Recipe:
    """The choices of one conversion; the command's help explains each."""

    model: str
    data: str
    output: Path
    data_split: str
    data_subset: str | None
    row_length: int
    shuffle_buffer: int
    skip_long: bool
    block_length: int
    mask_token_id: int | None
    noise: NoiseKind
    half_life_ratio: float
    noise_copies: int
    pattern: Pattern
    token_shift: bool
    ar_loss_weight: float
    growth: tuple[int, ...]
    teacher: str | None
    distillation_weight: float
    steps: int
    batch_size: int
    accumulate: int
    learning_rate: float
    schedule: Schedule
    warmup_steps: int | None
    min_learning_rate_ratio: float
    decay_ratio: float
    weight_decay: float
    max_grad_norm: float
    lora_rank: int | None
    lora_alpha: float
    seed: int
    bf16: bool
    attention: str
    gradient_checkpointing: bool
    fsdp: bool
    compile: bool
    save_steps: int
    log_steps: int
    log_to: LogTo
    layout: Layout
    dtype: Dtype

    def __post_init__(self) -> None:
        """Refuse what makes no sense before anything is loaded (`ValueError`)."""
        self.objective(mask_token_id=0)
        if self.attention == "xformers" and not self.bf16:
            raise ValueError("attention 'xformers' computes in bf16 alone, not in fp32 (no-bf16)")

    @property
    def checkpoints(self) -> Path:
        """Where training checkpoints are kept."""
        return self.output / "checkpoints"

    @property
    def warmup(self) -> int:
        """Steps up to the peak: as asked, else a tenth of all, 100 at most."""
        return min(100, self.steps // 10) if self.warmup_steps is None else self.warmup_steps

    @property
    def export_dtype(self) -> torch.dtype:
        """Of the exported weights."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def objective(self, mask_token_id: int) -> Objective:
        """What is learned, once the mask token is known.

        Raises:
            ValueError: an axis is out of range, or cannot be combined with another.
        """
        return Objective(
            block_length=self.block_length,
            mask_token_id=mask_token_id,
            noise=self.noise,
            half_life_ratio=self.half_life_ratio,
            noise_copies=self.noise_copies,
            seed=self.seed,
            pattern=Pattern(self.pattern),
            token_shift=self.token_shift,
            ar_loss_weight=self.ar_loss_weight,
            growth=self.growth,
            distillation_weight=self.distillation_weight if self.teacher is not None else 0.0,
        )

    def facts(self, processes: int) -> dict[str, Any]:
        """The training's part of the model card; the objective's part is not repeated."""
        rows = self.steps * self.batch_size * self.accumulate * processes
        facts = {
            "parent": self.model,
            "data": self.data,
            "steps": self.steps,
            "tokens": rows * self.row_length,
            "rows per step": rows // self.steps,
            "row length": self.row_length,
            "learning rate": self.learning_rate,
            "schedule": self.schedule,
            "warm-up steps": self.warmup,
            "weight decay": self.weight_decay,
            "precision": "bf16 autocast, fp32 weights" if self.bf16 else "fp32",
        }
        if self.lora_rank is not None:
            facts["LoRA"] = {"rank": self.lora_rank, "alpha": self.lora_alpha}
        if self.teacher is not None:
            facts["teacher"] = self.teacher
        return facts


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """AdamW with warm-up and, by default, a cosine down to a minimum, as in the paper's recipe.

    Raises:
        ValueError: options exclude each other, or do not fit the way the command was launched.
    """
    _check_launch(recipe)
    arguments = TrainingArguments(
        output_dir=str(recipe.checkpoints),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.learning_rate,
        **_schedule(recipe),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        bf16=recipe.bf16,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        fsdp=recipe.fsdp,  # type: ignore[arg-type]  # a string is the deprecated way
        # Joint sequences of two processes differ in length, so each makes its own.
        accelerator_config={"dispatch_batches": False},
        # One worker prepares batches beside a GPU; more would not keep the order of rows.
        dataloader_num_workers=int(torch.cuda.is_available()),
        logging_steps=min(recipe.log_steps, recipe.steps),
        save_steps=recipe.save_steps,
        save_total_limit=2,
        report_to=_reports(recipe),
    )
    if recipe.fsdp and recipe.bf16:
        # Losses and the sums of gradients would else be rounded to bf16, which they are not by DDP.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        arguments.fsdp_plugin_args["mixed_precision_policy"] = policy
    return arguments


def _check_launch(recipe: Recipe) -> None:
    """Whether processes and devices are such as the recipe needs (else `ValueError`)."""
    gpus, processes = torch.cuda.device_count(), int(os.environ.get("WORLD_SIZE", "1"))
    if gpus > 1 and processes == 1:
        raise ValueError(
            f"{gpus} GPUs need a process each: torchrun --nproc-per-node {gpus} -m vllm_edlm.cli "
            "convert ...; or name one in CUDA_VISIBLE_DEVICES"
        )
    if recipe.fsdp and (gpus == 0 or processes == 1):
        raise ValueError(
            f"fsdp needs several processes with a GPU each, got {processes} and {gpus} GPUs; "
            "start them with torchrun or accelerate launch"
        )


def _schedule(recipe: Recipe) -> dict[str, Any]:
    """Trainer's arguments for the learning rate over the steps."""
    minimum = recipe.min_learning_rate_ratio
    decay_steps = int(recipe.decay_ratio * recipe.steps) if recipe.schedule == "wsd" else 0
    if recipe.warmup + decay_steps > recipe.steps:
        raise ValueError(
            f"warmup_steps ({recipe.warmup}) and the steps of the decay ({decay_steps}) "
            f"must not be more than the {recipe.steps} steps"
        )
    if recipe.schedule == "cosine":
        name, options = "cosine_with_min_lr", {"min_lr_rate": minimum}
    else:
        name = "warmup_stable_decay"
        options = {"num_decay_steps": decay_steps, "min_lr_ratio": minimum}
    return {
        "lr_scheduler_type": name,
        "lr_scheduler_kwargs": options,
        "warmup_steps": recipe.warmup,
    }


def _reports(recipe: Recipe) -> list[str]:
    if recipe.log_to == "none":
        return []
    if find_spec("tensorboard") is None:
        raise ValueError(
            "log_to 'tensorboard' needs the package tensorboard: install vllm-edlm with its extra "
            "'train'"
        )
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(recipe.output / "tensorboard")
    return ["tensorboard"]
