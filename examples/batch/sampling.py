"""The options of a row: which of vLLM's sampling parameters it may name, and with what values."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from vllm_edlm.options import shown

DIFFUSION = "diffusion_"
DEFAULTS: dict[str, Any] = {"max_tokens": 512, "temperature": 0}
# What goes to the engine is written with integers of 64 bits.
MAX_INT = 2**63 - 1


@dataclass(frozen=True)
class Number:
    """Takes a number from `least` to `most`.

    Attributes:
        is_open: `least` itself is not allowed.
    """

    kind: type[int] | type[float]
    least: int
    most: int
    is_open: bool = False

    def __call__(self, name: str, value: Any) -> int | float:
        """The value as a number of its kind; `ValueError` if it is none or out of range."""
        is_number = isinstance(value, (int, self.kind)) and not isinstance(value, bool)
        # Compared before it is a float: an integer of JSON may be larger than any.
        if not is_number or not self._has(value):
            wanted = "an integer" if self.kind is int else "a number"
            interval = f"{'(' if self.is_open else '['}{self.least}, {self.most}]"
            raise ValueError(f"{name} must be {wanted} in {interval}, got {shown(value)}")
        return self.kind(value)

    def _has(self, value: int | float) -> bool:
        return self.least <= value <= self.most and not (self.is_open and value == self.least)


def check_text(name: str, value: Any) -> str:
    """The value; `ValueError` if it is no text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be valid Unicode: {error}") from error
    return value


def _texts(name: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise ValueError(f"{name} must be a text or a list of texts, got {shown(value)}")
    return [check_text(f"{name}[{i}]", text) for i, text in enumerate(texts)]


def _token_ids(name: str, value: Any) -> list[int | float]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list of token ids, got {shown(value)}")
    token_id = Number(int, 0, MAX_INT)
    return [token_id(f"{name}[{i}]", item) for i, item in enumerate(value)]


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {shown(value)}")
    return value


OPTIONS: dict[str, Callable[[str, Any], Any]] = {
    "max_tokens": Number(int, 1, MAX_INT),
    "min_tokens": Number(int, 0, MAX_INT),
    "temperature": Number(float, 0, 2),
    "seed": Number(int, -MAX_INT, MAX_INT),
    "top_p": Number(float, 0, 1, is_open=True),
    "top_k": Number(int, -1, MAX_INT),
    "min_p": Number(float, 0, 1),
    "presence_penalty": Number(float, -2, 2),
    "frequency_penalty": Number(float, -2, 2),
    "repetition_penalty": Number(float, 0, MAX_INT, is_open=True),
    "stop": _texts,
    "stop_token_ids": _token_ids,
    "include_stop_str_in_output": _flag,
    "ignore_eos": _flag,
    "bad_words": _texts,
    "allowed_token_ids": _token_ids,
    "skip_special_tokens": _flag,
}


@cache
def refused_options() -> frozenset[str]:
    """vLLM's other parameters: nobody who names one should believe that it is followed."""
    # Not where shards are read: that needs no vLLM.
    from vllm import SamplingParams

    return frozenset(SamplingParams.__struct_fields__) - OPTIONS.keys()


def check_names_of_options(keys: Iterable[str]) -> None:
    """Refuse a row that names an option of vLLM's which is not supported.

    Raises:
        ValueError: the first such key, and what is allowed.
    """
    for key in keys:
        if key in refused_options():
            allowed = ", ".join((*OPTIONS, f"{DIFFUSION}*"))
            raise ValueError(f"{key} is not supported in a batch; the options are {allowed}")


def sampling_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `SamplingParams` among the keys of a row.

    Raises:
        ValueError: an option of a wrong type or out of range. What options mean together, and to
            a model, is checked by vLLM, and so are `diffusion_*` options.
    """
    sampling = {
        name: check(name, options[name]) for name, check in OPTIONS.items() if name in options
    }
    extra = {name: value for name, value in options.items() if name.startswith(DIFFUSION)}
    return sampling | {"extra_args": extra}
