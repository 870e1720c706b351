"""Chats as training tokens: the model's own template, with the loss on what the assistant says."""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError

_ROLES = ("system", "user", "assistant")


def chat_tokens(messages: list[Any], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The tokens of a chat up to the end of its last assistant message, and which are in the loss.

    In the loss is what the model writes when it is served: from the end of the prompt that a
    request for an assistant message has, to the token that ends the message, that one included.

    Args:
        messages: dictionaries with `role`, `content` and whatever else the chat template reads.
        tokenizer: a fast one, for its character offsets.

    Raises:
        ValueError: a message is malformed, none is the assistant's, or the chat template is
            missing, refuses the messages, writes the beginning of a chat differently once the chat
            goes on, or does not mark where a message ends.
    """
    answers = _answers(messages)
    messages = [{k: v for k, v in m.items() if v is not None} for m in messages[: answers[-1] + 1]]
    text = _render(messages, tokenizer)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [end for _, end in encoding.offset_mapping]
    # A token that reaches beyond the prompt belongs to the answer.
    starts = [bisect_right(ends, _prompt_length(messages[:i], text, tokenizer)) for i in answers]
    return _with_loss(list(encoding.input_ids), starts, tokenizer)


def _answers(messages: list[Any]) -> list[int]:
    """Which messages are the assistant's; all are checked."""
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"a message needs 'role' and 'content' (text), got {message!r}")
        if message.get("role") not in _ROLES:
            allowed = ", ".join(_ROLES)
            raise ValueError(
                f"unknown role {message.get('role')!r} of a message; allowed: {allowed}"
            )
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError("no message is the assistant's, so there is nothing to learn")
    return answers


def _prompt_length(messages: list[Any], text: str, tokenizer: Any) -> int:
    """Characters of the prompt of a request with these messages, with which `text` must begin."""
    prompt = _render(messages, tokenizer, add_generation_prompt=True)
    if not text.startswith(prompt):
        raise ValueError("the chat template changes the prompt once it is answered")
    return len(prompt)


def _render(messages: list[Any], tokenizer: Any, **options: bool) -> str:
    if tokenizer.chat_template is None:
        raise ValueError("chats need a tokenizer with a chat template, and this one has none")
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from error
    return text


def _with_loss(
    tokens: list[int], starts: list[int], tokenizer: Any
) -> tuple[list[int], list[bool]]:
    """Put loss on the answers that begin at `starts`, each up to the special token that ends it.

    That token need not be EOS (a base model's EOS often is not its template's end of a turn), so
    the last answer gets EOS behind it. What the template writes after that is never generated.
    """
    eos = tokenizer.eos_token_id
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    end = next((token for token in tokens[starts[-1] :] if token in special), None)
    if end is None:  # no mark behind the last answer: EOS is its end
        tokens, end = [*tokens, eos], eos
    in_loss = [False] * len(tokens)
    for start, limit in pairwise([*starts, len(tokens)]):
        if end not in tokens[start:limit]:
            raise ValueError("the chat template marks no end of an assistant message")
        stop = tokens.index(end, start) + 1
        in_loss[start:stop] = [True] * (stop - start)
    last = [eos] if end != eos else []
    return tokens[:stop] + last, in_loss[:stop] + [True] * len(last)
