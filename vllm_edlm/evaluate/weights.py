"""The weights of a checkpoint on disk, tensor by tensor."""

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from vllm_edlm.train.layouts import stock_name

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Weights(Mapping[str, Tensor]):
    """Tensors by transformers' own names, whatever the checkpoint calls them.

    A tensor is read when it is asked for, so two large models can be compared on a small machine.
    """

    def __init__(self, folder: Path) -> None:
        """Look up which file holds which tensor.

        Raises:
            ValueError: the folder holds no safetensors.
        """
        if not any((folder / name).is_file() for name in (_INDEX, _SINGLE)):
            raise ValueError(f"{folder} holds no weights: neither {_INDEX} nor {_SINGLE}")
        self._folder = folder

    @cached_property
    def _places(self) -> dict[str, tuple[Path, str]]:
        """File and name in it of every tensor."""
        index = self._folder / _INDEX
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            files = [_SINGLE]
        paths = [self._folder / file for file in files]
        return {stock_name(name): (path, name) for path in paths for name in _names(path)}

    @property
    def dtypes(self) -> list[str]:
        """Those of the tensors, as safetensors names them, such as BF16; no tensor is read."""
        found = set()
        for path in {path for path, _ in self._places.values()}:
            with safe_open(path, framework="pt") as file:
                found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        return sorted(found)

    def __getitem__(self, name: str) -> Tensor:
        path, name_there = self._places[name]
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name_there)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())
