"""Chats: the loss is on the assistant's messages and what ends them, whatever the template."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from vllm_edlm.train.chat import chat_tokens

# <|user|> and <|pad|> stand in for a chat format's marks; <|im_end|> is the tokenizer's EOS.
_TURN = "<|user|>{{ message.role }}\n{{ message.content }}"
_OPEN = "<|user|>assistant\n"
_PROMPT = "{% if add_generation_prompt %}" + _OPEN + "{% endif %}"


def template(turn: str, before: str = "", prompt: str = _PROMPT) -> str:
    return before + "{% for message in messages %}" + turn + "{% endfor %}" + prompt


CHATML = template(_TURN + "<|im_end|>\n")
OTHER_END = template(_TURN + "<|pad|>\n")  # the end of a turn is not EOS, as with base models
NO_END = template("{{ message.role }}: {{ message.content }}\n", prompt="")
THINKING_LAST = template(
    "<|user|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}think {% endif %}"
    "{{ message.content }}<|im_end|>\n"
)
COUNTING = template(_TURN + "<|im_end|>", before="{{ messages | length }} messages")


def with_template(tokenizer: PreTrainedTokenizerFast, chat_template: str | None) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = chat_template
    return changed


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def in_loss(messages: list[Any], tokenizer: Any) -> list[str]:
    """The stretches of text that are in the loss."""
    tokens, flags = chat_tokens(messages, tokenizer)
    assert len(tokens) == len(flags)
    stretches: list[list[int]] = []
    for index, (token, wanted) in enumerate(zip(tokens, flags, strict=True)):
        if wanted:
            if index == 0 or not flags[index - 1]:
                stretches.append([])
            stretches[-1].append(token)
    return [tokenizer.decode(stretch) for stretch in stretches]


def written(messages: list[Any], tokenizer: Any) -> str:
    return str(tokenizer.decode(chat_tokens(messages, tokenizer)[0]))


TWO_TURNS = [
    says("system", "Be short."),
    says("user", "Mia has 12."),
    says("assistant", "12 pens."),
    says("user", "And Leo?"),
    says("assistant", "Leo has 3."),
]


def test_the_loss_is_on_every_assistant_message_and_its_end(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    chatml = with_template(tokenizer, CHATML)
    assert in_loss(TWO_TURNS, chatml) == ["12 pens.<|im_end|>", "Leo has 3.<|im_end|>"]
    assert written(TWO_TURNS, chatml) == (
        "<|user|>system\nBe short.<|im_end|>\n"
        "<|user|>user\nMia has 12.<|im_end|>\n<|user|>assistant\n12 pens.<|im_end|>\n"
        "<|user|>user\nAnd Leo?<|im_end|>\n<|user|>assistant\nLeo has 3.<|im_end|>"
    )


def test_the_prompt_is_that_of_a_served_request(tokenizer: PreTrainedTokenizerFast) -> None:
    chatml = with_template(tokenizer, CHATML)
    tokens, flags = chat_tokens(TWO_TURNS, chatml)
    request = chatml.apply_chat_template(TWO_TURNS[:-1], add_generation_prompt=True)
    assert tokens[: len(request.input_ids)] == request.input_ids
    assert all(flags[len(request.input_ids) :])


def test_eos_stands_behind_an_end_of_turn_that_is_another_token(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    other = with_template(tokenizer, OTHER_END)
    assert in_loss(TWO_TURNS, other) == ["12 pens.<|pad|>", "Leo has 3.<|pad|><|im_end|>"]


def test_a_template_without_an_end_leaves_it_to_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = with_template(tokenizer, NO_END)
    single = [says("user", "Mia has 12."), says("assistant", "12 pens.")]
    assert written(single, bare) == "user: Mia has 12.\nassistant: 12 pens.\n<|im_end|>"
    with pytest.raises(ValueError, match="marks no end of an assistant message"):
        chat_tokens(TWO_TURNS, bare)


def test_what_a_template_writes_into_the_last_answer_alone_is_learned(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    thinking = with_template(tokenizer, THINKING_LAST)
    assert in_loss(TWO_TURNS, thinking) == ["12 pens.<|im_end|>", "think Leo has 3.<|im_end|>"]


def test_what_follows_the_last_answer_is_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    thinking = with_template(tokenizer, THINKING_LAST)
    followed = [*TWO_TURNS, says("user", "Bye")]
    assert chat_tokens(followed, thinking) == chat_tokens(TWO_TURNS, thinking)


def test_an_answer_that_begins_like_the_prompt_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    chatml = with_template(tokenizer, CHATML)
    # The prompt's last newline and the answer's first may become one token; it is the answer's.
    (stretch,) = in_loss([says("user", "Go."), says("assistant", "\n\n12")], chatml)
    assert stretch.endswith("12<|im_end|>")
    assert "assistant" not in stretch


def test_an_empty_answer_is_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    assert in_loss([says("user", "Go."), says("assistant", "")], tokenizer) == ["<|im_end|>"]


def test_absent_fields_of_a_table_do_not_reach_the_template(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    turn = "<|user|>{{ message.content }}{% if message.name is defined %}named{% endif %}<|im_end|>"
    named = with_template(tokenizer, template(turn, prompt="<|user|>"))
    rows = [says("user", "Hi.") | {"name": None}, says("assistant", "Ho.") | {"name": None}]
    assert written(rows, named) == "<|user|>Hi.<|im_end|><|user|>Ho.<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no message is the assistant's"),
        ([says("user", "Hi")], "no message is the assistant's"),
        ([says("human", "Hi")], "unknown role 'human' of a message; allowed: system, user, assist"),
        ([{"content": "Hi"}], "unknown role None"),
        ([{"role": "user"}], "a message needs 'role' and 'content'"),
        ([{"role": "user", "content": ["Hi"]}], "a message needs 'role' and 'content'"),
        (["Hi"], "a message needs 'role' and 'content' .* got 'Hi'"),
        ([says("system", "Be"), says("assistant", "x")], "refuses the messages: only the roles"),
    ],
)
def test_bad_messages(
    tokenizer: PreTrainedTokenizerFast, messages: list[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        chat_tokens(messages, tokenizer)


def test_a_template_that_rewrites_the_beginning_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(ValueError, match="changes the prompt once it is answered"):
        chat_tokens(TWO_TURNS, with_template(tokenizer, COUNTING))


def test_a_tokenizer_without_a_template_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="chats need a tokenizer with a chat template"):
        chat_tokens(TWO_TURNS, with_template(tokenizer, None))
