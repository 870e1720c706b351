"""One row of a batch: what it asks for, and what is added to it.

A row holds `prompt` (a text) or `messages` (a chat), any of the options in `OPTIONS` and any
`diffusion_*` option; its other keys are passed through. None is the same as no key.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vllm_edlm.options import shown

DIFFUSION = "diffusion_"
OPTIONS = {
    "max_tokens": int,
    "temperature": float,
    "seed": int,
    "top_p": float,
    "top_k": int,
    "min_p": float,
}
DEFAULTS: dict[str, Any] = {"max_tokens": 512, "temperature": 0}
# What goes to the engine is written with integers of 64 bits.
MAX_INT = 2**63 - 1

Message = dict[str, str]


@dataclass(frozen=True)
class Request:
    """What a row asks for: a prompt or, where that is None, the messages of a chat.

    Attributes:
        sampling: arguments of vLLM's `SamplingParams`, `max_tokens` and `extra_args` among them.
    """

    prompt: str | None
    messages: list[Message] | None
    sampling: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What is added to a row; None where the row could not be answered.

    Attributes:
        finish_reason: "stop" or "length".
        tokens: of the answer.
        forwards: that denoised the answer.
        error: why there is no answer; None if there is one.
    """

    answer: str | None = None
    finish_reason: str | None = None
    tokens: int | None = None
    forwards: int | None = None
    error: str | None = None

    def named(self, prefix: str) -> dict[str, Any]:
        """The values by the names they have in the output."""
        return {prefix + name: value for name, value in asdict(self).items()}


def check_names(keys: Iterable[str], prefix: str) -> None:
    """Refuse a row whose keys are also names of what is added to it.

    Raises:
        ValueError: the first such key.
    """
    added = Result().named(prefix)
    for key in keys:
        if key in added:
            raise ValueError(f"key {key!r} is a name of the output's; choose others with --prefix")


def request_of(row: Mapping[str, Any], defaults: Mapping[str, Any]) -> Request:
    """What a row asks for.

    Args:
        defaults: options of rows that do not name them, `max_tokens` among them.

    Raises:
        ValueError: no prompt or two, or an option of a wrong type. Ranges are checked by vLLM,
            and so are the names of `diffusion_*` options.
    """
    given = {key: value for key, value in row.items() if value is not None}
    if ("prompt" in given) == ("messages" in given):
        found = "both" if "prompt" in given else "neither"
        raise ValueError(f"a row must have either 'prompt' or 'messages', this has {found}")
    return Request(
        prompt=_text("prompt", given["prompt"]) if "prompt" in given else None,
        messages=_messages(given["messages"]) if "messages" in given else None,
        sampling=sampling_of({**defaults, **given}),
    )


def sampling_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `SamplingParams` among the keys of a row.

    Raises:
        ValueError: an option of a wrong type.
    """
    sampling = {name: _number(name, options[name]) for name in OPTIONS if name in options}
    extra = {name: value for name, value in options.items() if name.startswith(DIFFUSION)}
    return sampling | {"extra_args": extra}


def _number(name: str, value: Any) -> int | float:
    kind = OPTIONS[name]
    is_number = isinstance(value, (int, float) if kind is float else int)
    if isinstance(value, bool) or not is_number:
        wanted = "a number" if kind is float else "an integer"
        raise ValueError(f"{name} must be {wanted}, got {shown(value)}")
    if not math.isfinite(value) or abs(value) > MAX_INT:
        raise ValueError(f"{name} must be of a magnitude of at most 2**63 - 1, got {shown(value)}")
    return kind(value)


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"messages must be a list of at least one message, got {shown(value)}")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(value)]


def _message(name: str, value: Any) -> Message:
    if not isinstance(value, dict) or set(value) != {"role", "content"}:
        raise ValueError(f"{name} must be an object of 'role' and 'content', got {shown(value)}")
    return {key: _text(f"{name}.{key}", value[key]) for key in ("role", "content")}


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be valid Unicode: {error}") from error
    return value
