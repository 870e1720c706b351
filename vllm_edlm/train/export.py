"""Write a trained model as a checkpoint that vLLM serves and stock `AutoConfig` loads.

An export is whole or not there: everything is written aside first, and config.json, without which
no folder is taken for a checkpoint, is moved into place last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from vllm_edlm.train.layouts import Layout, check_layout, layout_name, listed
from vllm_edlm.train.model_card import model_card
from vllm_edlm.train.served_config import checkpoint_config, eos_token_ids, generation_settings

if TYPE_CHECKING:
    from vllm_edlm.train.objective import Objective

_MASK_TOKEN = "<|mask|>"
# Inside the export's folder, so that moving is a rename even where that is a mount point.
_ASIDE = ".export"


def choose_mask_token(tokenizer: Any, causal_lm: Any, mask_token_id: int | None = None) -> int:
    """Decide on the mask token; adds one, and resizes the embeddings, where there is none.

    Order: the id that is asked for, the tokenizer's own mask token, a new token `<|mask|>`. The
    vocabulary grows by no more than that token: tensor-parallel serving pads it by itself.

    Raises:
        ValueError: the tokenizer has more tokens than the model, the id is outside the model's
            vocabulary, ends answers, or stands for ordinary text.
    """
    rows = causal_lm.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {rows}: it has no "
            "room for all of them, nor for a mask token"
        )
    chosen = tokenizer.mask_token_id if mask_token_id is None else mask_token_id
    if chosen is None:
        tokenizer.add_special_tokens({"mask_token": _MASK_TOKEN})
        chosen = tokenizer.mask_token_id
        # Vocabularies are often padded beyond the tokenizer; then there is a free row already.
        if chosen >= rows:
            causal_lm.resize_token_embeddings(chosen + 1, mean_resizing=True)
            rows = chosen + 1
    if not 0 <= chosen < rows:
        raise ValueError(f"mask token id {chosen} is outside the vocabulary (0..{rows - 1})")
    if chosen in eos_token_ids(causal_lm, tokenizer):
        raise ValueError(f"mask token id {chosen} is an EOS token; choose an unused id")
    # None where the id is one of the rows that the tokenizer does not reach.
    if (token := tokenizer.convert_ids_to_tokens(chosen)) is not None:
        if chosen not in tokenizer.added_tokens_decoder:
            raise ValueError(
                f"mask token id {chosen} is {token!r}, of which text is made; choose an added "
                f"token, or a row of the model beyond the tokenizer's {len(tokenizer)}"
            )
        tokenizer.mask_token = token
    return int(chosen)


def untie_head(causal_lm: Any) -> None:
    """Give the output head weights of its own, equal to the embeddings it shared."""
    head = causal_lm.get_output_embeddings()
    if head.weight is causal_lm.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    causal_lm.config.tie_word_embeddings = False


def export(
    directory: Path,
    causal_lm: Any,
    tokenizer: Any,
    objective: Objective,
    layout: Layout = "efficient_dlm",
    dtype: torch.dtype = torch.bfloat16,
    facts: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write config, weights, tokenizer, generation config and model card into `directory`.

    A tied head is exported tied. Beside the model, memory holds one shard at a time.

    Args:
        facts: what the model card says of the training, see `model_card`.
        max_shard_size: bytes, or text such as "5GB", of a weight file; a larger tensor has a file
            of its own.

    Raises:
        ValueError: the layout is unknown, the model cannot be served, or the weights are not all
            of the model's; the message names them.
        OSError: the folder cannot be written; an export that it held is left as it was.
    """
    check_layout(layout)
    config = checkpoint_config(causal_lm.config, objective, dtype)
    weights = _weights(causal_lm, layout)
    shards = _plan_shards(weights, dtype, max_shard_size)
    card = model_card(directory.resolve().name, objective, facts or {})
    with _all_or_nothing(directory) as aside:
        tokenizer.save_pretrained(aside)
        _write_shards(aside, weights, shards, dtype)
        _write_json(aside / "generation_config.json", generation_settings(causal_lm, tokenizer))
        card.save(aside / "README.md")
        _write_json(aside / "config.json", config)


def _weights(causal_lm: Any, layout: Layout) -> dict[str, Tensor]:
    """The weights as they are, under the layout's names."""
    weights = dict(causal_lm.state_dict())
    expected = _stock_shapes(causal_lm.config)
    if causal_lm.config.tie_word_embeddings:
        for shapes in (weights, expected):
            shapes.pop("lm_head.weight", None)
    found = {name: tensor.shape for name, tensor in weights.items()}
    if wrong := {name for name, _ in found.items() ^ expected.items()}:
        raise ValueError(
            f"cannot export: missing, unknown or of another shape than config.json says: "
            f"{listed(wrong)}"
        )
    return {layout_name(name, layout): tensor for name, tensor in weights.items()}


def _stock_shapes(config: Any) -> dict[str, torch.Size]:
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config)
    return {name: tensor.shape for name, tensor in stock.state_dict().items()}


def _plan_shards(
    weights: Mapping[str, Tensor], dtype: torch.dtype, max_shard_size: int | str
) -> StateDictSplit:
    exported = {
        name: torch.empty(tensor.shape, dtype=dtype, device="meta")
        for name, tensor in weights.items()
    }
    return split_torch_state_dict_into_shards(exported, max_shard_size=max_shard_size)


def _write_shards(
    folder: Path, weights: Mapping[str, Tensor], shards: StateDictSplit, dtype: torch.dtype
) -> None:
    for file, names in shards.filename_to_tensors.items():
        # No name holds the shard, so it is gone before the next one is made.
        save_file(
            {name: weights[name].detach().to("cpu", dtype).contiguous() for name in names},
            folder / file,
            metadata={"format": "pt"},
        )
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def _all_or_nothing(directory: Path) -> Iterator[Path]:
    """Yield a folder to write into; its files become the export if nothing fails."""
    aside = directory / _ASIDE
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        _move_in(aside, directory)
    except Exception as error:
        # A full disk has other types in safetensors and tokenizers.
        raise OSError(f"cannot write the export to {directory}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _move_in(aside: Path, directory: Path) -> None:
    (directory / "config.json").unlink(missing_ok=True)
    # Files of an earlier export that was cut into other shards would be loaded too.
    for stale in directory.glob("model*.safetensors*"):
        stale.unlink()
    for path in sorted(aside.iterdir(), key=lambda path: path.name == "config.json"):
        target = directory / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
