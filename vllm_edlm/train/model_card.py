"""README.md of an export: what it was made from, how, and how to serve it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

if TYPE_CHECKING:
    from vllm_edlm.train.objective import Objective

logger = logging.getLogger(__name__)

_LICENCE_KEYS = ("license", "license_name", "license_link")
_PACKAGES = ("vllm-edlm", "torch", "transformers")
_TEXT = """
# {name}

A block-diffusion language model: it denoises blocks of {block_length} tokens, one block after the
other. Converted from {parent} with `edlm convert` of vllm-edlm, after the recipe of Efficient-DLM
(arXiv 2512.14067).

## Serve

With vLLM and the plugin vllm-edlm installed, where `DIR` is this folder:

```bash
vllm serve DIR
```

No option and no remote code is needed: `config.json` names block length and mask token.

## Training

| fact | value |
|---|---|
{facts}

## Limits

The conversion measures neither the accuracy nor the speed of this model; `edlm eval` does.
"""


def model_card(name: str, objective: Objective, facts: Mapping[str, Any]) -> ModelCard:
    """The card of an export; a licence is named only if the parent's own card names one.

    Args:
        name: of the model, its title.
        objective: what was trained; its fields stand among the facts.
        facts: further facts of the training by name; values may be mappings or lists.
            `parent` is the AR model, a folder or a hub name, as the user named it.
    """
    parent: str | None = facts.get("parent")
    folder = Path(parent) if parent is not None and Path(parent).is_dir() else None
    data = ModelCardData(
        # A folder of somebody's machine is no base model that anyone could look up.
        base_model=None if folder else parent,
        library_name="vllm",
        pipeline_tag="text-generation",
        tags=["vllm", "block-diffusion", "diffusion-language-model"],
        **_licence(folder / "README.md" if folder else parent),
    )
    text = _TEXT.format(
        name=name,
        block_length=objective.block_length,
        parent="an AR model" if parent is None else _cell(parent),
        facts=_table({**facts, **_objective_facts(objective), "versions": _versions()}),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _objective_facts(objective: Objective) -> dict[str, Any]:
    half_life = f", half-life ratio {objective.half_life_ratio:g}"
    return {
        "block length": objective.stages,
        "pattern": objective.pattern,
        "noise": objective.noise + (half_life if objective.noise == "position" else ""),
        "noise copies": objective.noise_copies,
        "token shift": objective.token_shift,
        "AR loss weight": objective.ar_loss_weight,
        "distillation weight": objective.distillation_weight,
        "mask token id": objective.mask_token_id,
        "seed": objective.seed,
    }


def _versions() -> dict[str, str]:
    return {package: version(package) for package in _PACKAGES}


def _table(facts: Mapping[str, Any]) -> str:
    """Rows of a Markdown table."""
    return "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in facts.items())


def _licence(card: Path | str | None) -> dict[str, Any]:
    """What a card says about the licence, as keyword arguments of `ModelCardData`.

    Args:
        card: a file, or a hub name.
    """
    if card is None:
        return {}
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except Exception as error:
        # Whatever is wrong with another's card, or with the network, must not cost an export.
        logger.info("the licence in the card %s is not known: %s", card, error)
        return {}
    return {key: data[key] for key in _LICENCE_KEYS if key in data}


def _cell(value: Any) -> str:
    """A value as text that fits into a cell of a Markdown table; of a path its last part."""
    if isinstance(value, Mapping):
        return ", ".join(f"{_cell(key)} {_cell(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str) and os.path.exists(value):
        value = Path(value).resolve().name
    return str(value).replace("|", "\\|").replace("\n", " ")
