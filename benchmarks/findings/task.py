"""The task: follow a machine of four states through a list of operations.

The machine's table is fixed and not in the question, so it must sit in the weights. An answer names
the state after every operation: each is one look-up given the state before it, and a chain of
look-ups without it. So a model that reveals tokens together has to compose look-ups, and pays for
parallelism in accuracy, as a language model does. How long a chain is differs from token to token:
most operations permute the states, but two of them lead to the same state from everywhere.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Split = Literal["train", "heldout"]

STATES, OPERATIONS = "abcd", "012345"
# Row of an operation: the state that follows each of `STATES`.
TABLE = {"0": "bcda", "1": "bacd", "2": "cadb", "3": "adbc", "4": "aaaa", "5": "cccc"}
LENGTH = 15  # operations; with the start, and with the answer's end, whole blocks of up to 16
PROMPT_TOKENS = ANSWER_TOKENS = LENGTH + 1

PAD, END, MASK = "<|pad|>", "<|end|>", "<|mask|>"
_HELDOUT_ONE_IN = 10
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}" + END + "{% endif %}{% endfor %}"
)


class Item(NamedTuple):
    """A question, operations and then a start, and its answer, the states that follow.

    Every state is the one before it and the operation `LENGTH` tokens before that: one rule, for
    the first of them too.
    """

    question: str
    answer: str


def run_machine(start: str, operations: str) -> str:
    """The state after each of the operations."""
    states, state = [], start
    for operation in operations:
        state = TABLE[operation][STATES.index(state)]
        states.append(state)
    return "".join(states)


def split_of(question: str) -> Split:
    """Which side of the split a question is on: a function of the question alone."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") % _HELDOUT_ONE_IN == 0 else "train"


def items(split: Split, seed: int, count: int) -> Iterator[Item]:
    """The first `count` items of a split: the same for the same arguments."""
    rng = random.Random(f"{split}/{seed}")
    found = 0
    while found < count:
        question = "".join(rng.choices(OPERATIONS, k=LENGTH)) + rng.choice(STATES)
        if split_of(question) == split:
            found += 1
            yield Item(question, run_machine(question[-1], question[:-1]))


def write_jsonl(path: Path, split: Split, seed: int, count: int) -> None:
    """Write prompt and response of each item, as `edlm convert --data` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": q, "response": a} for q, a in items(split, seed, count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and the three special tokens."""
    words = [PAD, END, MASK, *STATES, *OPERATIONS]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=PAD)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        mask_token=MASK,
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
