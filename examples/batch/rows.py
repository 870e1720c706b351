"""One row of a batch: what it asks for, and what is added to it.

A row holds `prompt` (a text) or `messages` (a chat), any of the options in `OPTIONS` and any
`diffusion_*` option; its other keys are passed through. None is the same as no key.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from examples.batch.sampling import (
    DIFFUSION,
    OPTIONS,
    check_names_of_options,
    check_text,
    refused_options,
    sampling_of,
)
from vllm_edlm.options import shown

PROMPTS = ("prompt", "messages")

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


def is_read(key: str) -> bool:
    """Whether a key of a row means anything here; the others are only passed through."""
    return key in {*PROMPTS, *OPTIONS, *refused_options()} or key.startswith(DIFFUSION)


def request_of(row: Mapping[str, Any], defaults: Mapping[str, Any]) -> Request:
    """What a row asks for.

    Args:
        defaults: options of rows that do not name them, `max_tokens` among them.

    Raises:
        ValueError: no prompt or two, an option that is not supported, or as `sampling_of`.
    """
    given = {key: value for key, value in row.items() if value is not None}
    check_names_of_options(given)
    if ("prompt" in given) == ("messages" in given):
        found = "both" if "prompt" in given else "neither"
        raise ValueError(f"a row must have either 'prompt' or 'messages', this has {found}")
    return Request(
        prompt=check_text("prompt", given["prompt"]) if "prompt" in given else None,
        messages=_messages(given["messages"]) if "messages" in given else None,
        sampling=sampling_of({**defaults, **given}),
    )


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"messages must be a list of at least one message, got {shown(value)}")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(value)]


def _message(name: str, value: Any) -> Message:
    if not isinstance(value, dict) or set(value) != {"role", "content"}:
        raise ValueError(f"{name} must be an object of 'role' and 'content', got {shown(value)}")
    return {key: check_text(f"{name}.{key}", value[key]) for key in ("role", "content")}
