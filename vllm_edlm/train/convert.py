"""The whole conversion: load an AR model, train it as a block-diffusion model, export it."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils.logging import disable_progress_bar

from vllm_edlm.train.attention import implementation
from vllm_edlm.train.begun import check_begun, record_begun
from vllm_edlm.train.check import Check, check
from vllm_edlm.train.checkpoints import last_checkpoint, steps_done
from vllm_edlm.train.documents import Source, read_documents
from vllm_edlm.train.export import choose_mask_token, export, untie_head
from vllm_edlm.train.layouts import load_causal_lm
from vllm_edlm.train.lora import add_lora, merge_lora
from vllm_edlm.train.model import BlockDiffusionLM
from vllm_edlm.train.packing import PackedRows
from vllm_edlm.train.plan import Plan, plan
from vllm_edlm.train.recipe import Recipe, training_arguments
from vllm_edlm.train.served_config import check_convertible
from vllm_edlm.train.teacher import load_teacher
from vllm_edlm.train.trainer import ConversionTrainer

logger = logging.getLogger(__name__)

_CHECKED_ROWS = 2


def convert(recipe: Recipe, check_export: bool = False) -> Check | None:
    """Train and export by the recipe; goes on from the last checkpoint in `output`, if any.

    Returns:
        With `check_export`, and in the main process: how the export compares to the trained model.

    Raises:
        ValueError: an option, the data or the model does not fit, or `output` holds a conversion by
            another recipe; the message names it. Or the export does not compute what the trained
            model does.
        TrainingDivergedError: the loss became NaN or infinite.
        CheckpointError, OSError: a checkpoint or the export cannot be written.
    """
    trainer, tokenizer = prepare(recipe)
    causal_lm = train(trainer, recipe)
    if causal_lm is None:
        return None
    if recipe.lora_rank is not None:
        causal_lm = merge_lora(causal_lm)
    facts, dtype = recipe.facts(trainer.args.world_size), recipe.export_dtype
    export(recipe.output, causal_lm, tokenizer, trainer.objective, recipe.layout, dtype, facts)
    if not check_export:
        return None
    rows = list(islice(trainer.train_dataset, _CHECKED_ROWS))
    return check(recipe.output, causal_lm, trainer.objective, rows)


def dry_run(recipe: Recipe) -> Plan:
    """What the conversion would take: tokens, steps, memory, time; `output` stays untouched.

    Raises:
        ValueError: as `convert`.
    """
    with tempfile.TemporaryDirectory() as aside:
        trainer, _ = prepare(replace(recipe, output=Path(aside)))
        return plan(trainer)


def prepare(recipe: Recipe) -> tuple[ConversionTrainer, Any]:
    """Everything up to the first step: the trainer, which holds model and data; the tokenizer."""
    set_seed(recipe.seed)
    arguments = training_arguments(recipe)
    if arguments.process_index > 0:
        disable_progress_bar()  # one process shows what all of them do
    check_begun(recipe, arguments.world_size)
    attention = implementation(recipe.attention, arguments.device)
    tokenizer = _load_tokenizer(recipe)
    rows = _rows(recipe, tokenizer)
    causal_lm = load_causal_lm(recipe.model, torch.float32, attention)
    objective = recipe.objective(choose_mask_token(tokenizer, causal_lm, recipe.mask_token_id))
    _set_up(causal_lm, recipe)
    teacher = None
    if recipe.teacher is not None:
        dtype = torch.bfloat16 if recipe.bf16 else torch.float32
        teacher = load_teacher(recipe.teacher, tokenizer, objective, dtype, attention)
    model = BlockDiffusionLM(causal_lm, objective, teacher)
    return ConversionTrainer(model, arguments, rows, objective, recipe.row_length), tokenizer


def _load_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer, once it is clear that the model can be converted, and where to."""
    for role, place in (("model", recipe.model), ("teacher", recipe.teacher)):
        if place is not None and recipe.output.resolve() == Path(place).resolve():
            raise ValueError(
                f"output {recipe.output} holds the {role}, which the export would replace"
            )
    try:
        config = AutoConfig.from_pretrained(recipe.model, trust_remote_code=False)
        check_convertible(config)
        _check_lengths(recipe, config.max_position_embeddings)
        return AutoTokenizer.from_pretrained(recipe.model, trust_remote_code=False)
    except OSError as error:
        raise ValueError(f"cannot load the model {recipe.model}: {error}") from error


def _check_lengths(recipe: Recipe, context: int) -> None:
    """Whether blocks, and the documents of a row, fit into what the model can be served with."""
    if recipe.block_length > context:
        raise ValueError(
            f"block_length must be at most {context}, the model's context "
            f"(max_position_embeddings in config.json), got {recipe.block_length}"
        )
    if recipe.row_length > context:
        logger.warning(
            "rows of %d tokens are longer than the model's context of %d: documents that go beyond "
            "it train positions that will not be served",
            recipe.row_length,
            context,
        )


def _rows(recipe: Recipe, tokenizer: Any) -> PackedRows:
    source = Source(recipe.data, recipe.data_split, recipe.data_subset)
    rows = PackedRows(
        read_documents(source, tokenizer),
        recipe.row_length,
        recipe.block_length,
        tokenizer.eos_token_id,
        shuffle_buffer=recipe.shuffle_buffer,
        seed=recipe.seed,
        skip_long=recipe.skip_long,
    )
    next(iter(rows))  # data that cannot be read is better known before the model is loaded
    return rows


def _set_up(causal_lm: Any, recipe: Recipe) -> None:
    """Choose which weights train and how the backbone runs, in place."""
    untie_head(causal_lm)
    if recipe.lora_rank is not None:
        add_lora(causal_lm, recipe.lora_rank, recipe.lora_alpha)
    if recipe.gradient_checkpointing:
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    if recipe.compile:
        # Only the backbone: the number of masked tokens, and so the head's shape, always changes.
        causal_lm.base_model.compile()


def train(trainer: ConversionTrainer, recipe: Recipe) -> Any:
    """Run the training loop, or what is left of it.

    Returns:
        The trained causal LM, its weights whole; None in processes other than the main one.
    """
    checkpoint = last_checkpoint(recipe.checkpoints)
    if trainer.is_world_process_zero():
        record_begun(recipe, trainer.args.world_size)
    if checkpoint and steps_done(checkpoint) >= recipe.steps:
        # Stopped between the last step and the export: Trainer would take one step too many.
        load_model(trainer.model, checkpoint / "model.safetensors")
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.is_fsdp_enabled:
            return _gathered(trainer, recipe)
    return trainer.model.causal_lm if trainer.is_world_process_zero() else None


def _gathered(trainer: ConversionTrainer, recipe: Recipe) -> Any:
    """The whole causal LM on the CPU of the main process, from the shards of all."""
    weights = trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.is_world_process_zero():
        return None
    sharded = trainer.model.causal_lm
    causal_lm = AutoModelForCausalLM.from_config(
        sharded.config, dtype=torch.float32, attn_implementation=sharded.config._attn_implementation
    )
    causal_lm.generation_config = sharded.generation_config
    if recipe.lora_rank is not None:
        add_lora(causal_lm, recipe.lora_rank, recipe.lora_alpha)
    BlockDiffusionLM(causal_lm, trainer.objective).load_state_dict(weights)
    return causal_lm
