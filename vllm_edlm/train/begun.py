"""A conversion goes on by the recipe that it was begun with, and by no other.

The recipe lies beside the checkpoints. Without it the same command with one option changed would
take weights of one training for those of another, or train the one half by this and half by that.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_edlm.train.checkpoints import last_checkpoint
from vllm_edlm.train.recipe import Recipe

RECORD = "recipe.json"
# How a training runs and what is written of it; the weights do not depend on it but for rounding.
_FREE = (
    *("output", "attention", "gradient_checkpointing", "fsdp", "compile"),
    *("save_steps", "log_steps", "log_to", "layout", "dtype"),
)
_PLACES = ("model", "data", "teacher")


def check_begun(recipe: Recipe, processes: int) -> None:
    """Refuse a recipe that is not the one that `output`'s checkpoints were trained by.

    Args:
        processes: that train together; a step's rows may be spread over them in any way.

    Raises:
        ValueError: it differs; the message names every difference.
    """
    record = recipe.checkpoints / RECORD
    if last_checkpoint(recipe.checkpoints) is None or not record.exists():
        return
    begun, now = json.loads(record.read_text(encoding="utf-8")), _facts(recipe, processes)
    differences = [
        f"{name} {begun.get(name)!r}, not {now.get(name)!r}"
        for name in sorted({*begun, *now})
        if begun.get(name) != now.get(name)
    ]
    if differences:
        raise ValueError(
            f"output {recipe.output} holds a conversion begun with {'; '.join(differences)}: go on "
            "with the same options, or name another output"
        )


def record_begun(recipe: Recipe, processes: int) -> None:
    """Write the recipe beside the checkpoints to come; whole or not at all."""
    recipe.checkpoints.mkdir(parents=True, exist_ok=True)
    aside = recipe.checkpoints / f"{RECORD}.part"
    aside.write_text(json.dumps(_facts(recipe, processes), indent=2), encoding="utf-8")
    aside.replace(recipe.checkpoints / RECORD)


def _facts(recipe: Recipe, processes: int) -> dict[str, Any]:
    facts = {name: value for name, value in asdict(recipe).items() if name not in _FREE}
    facts["rows_per_step"] = facts.pop("batch_size") * facts.pop("accumulate") * processes
    facts |= {name: _place(facts[name]) for name in _PLACES}
    facts |= {"growth": list(recipe.growth), "warmup_steps": recipe.warmup}
    return facts


def _place(name: str | None) -> str | None:
    """A file or folder by its whole path, a hub name as it is."""
    return str(Path(name).resolve()) if name is not None and Path(name).exists() else name
