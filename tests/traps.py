"""Checkpoints that would run code of their own, and leave a mark, if somebody let them."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, dynamic_module_utils

MODULE = """\
from pathlib import Path
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

Path({mark!r}).touch()


class Config(Qwen3Config):
    pass


class Model(Qwen3ForCausalLM):
    pass


class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "trap.Config",
    "AutoModel": "trap.Model",
    "AutoModelForCausalLM": "trap.Model",
}


class Sprung:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def name_code(checkpoint: Path, mark: Path, **config: object) -> None:
    """Let config.json and tokenizer_config.json name classes in a module that touches `mark`.

    Args:
        checkpoint: its folder, which is changed.
        mark: a file that is not there.
        config: further entries of config.json.
    """
    (checkpoint / "trap.py").write_text(MODULE.format(mark=str(mark)))
    _update(checkpoint / "config.json", auto_map=AUTO_MAP, **config)
    auto_map = {"AutoTokenizer": [None, "trap.Tokenizer"]}
    _update(checkpoint / "tokenizer_config.json", auto_map=auto_map)


def pickle_weights(checkpoint: Path, mark: Path) -> None:
    """Put a pickle that touches `mark` in the place of the weights."""
    (checkpoint / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Sprung(mark)}, checkpoint / "pytorch_model.bin")


def assert_code_is_live(checkpoint: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who trusts the checkpoint leaves the mark, which is removed again."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(mark.parent / "modules"))
    AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
    mark.unlink()


def assert_pickle_is_live(mark: Path) -> None:
    """Who unpickles such an object leaves the mark, which is removed again."""
    pickle.loads(pickle.dumps(Sprung(mark)))
    mark.unlink()


def _update(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
