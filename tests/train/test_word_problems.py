"""The task of tiny-math: split by construction, answers that are right, tokens that stream."""

from __future__ import annotations

import re

import pytest
from transformers import PreTrainedTokenizerFast

from examples.convert.word_problems import KINDS, grade, problem, problems, split_of


def test_held_out_questions_never_occur_in_training() -> None:
    train = {(p.kind, p.numbers) for p in problems("train", 0, 20_000)}
    train_questions = {p.question for p in problems("train", 0, 20_000)}
    heldout = list(problems("heldout", 1, 1000))
    assert all(split_of(p.kind, p.numbers) == "heldout" for p in heldout)
    assert all(split_of(*key) == "train" for key in train)
    assert not train & {(p.kind, p.numbers) for p in heldout}
    assert not train_questions & {p.question for p in heldout}


def test_every_step_of_an_answer_is_right_and_every_kind_occurs() -> None:
    shown = list(problems("train", 3, 2000))
    assert {p.kind for p in shown} == set(KINDS)
    for p in shown:
        for left, sign, right, result in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", p.answer):
            a, b = int(left), int(right)
            assert {"+": a + b, "-": a - b, "*": a * b}[sign] == int(result), p.answer
        assert grade(p.answer, p.result)
        assert all(str(number) in p.question for number in p.numbers)


def test_a_problem_depends_only_on_split_seed_and_index() -> None:
    assert problem("train", 0, 7) == list(problems("train", 0, 8))[7]
    assert problem("train", 1, 7) != problem("train", 0, 7)


@pytest.mark.parametrize(
    ("answer", "right"),
    [("1 + 1 = 2\n#### 12", True), ("#### 12 ", True), ("#### 13", False), ("12", False),
     ("#### 12 pens", False), ("#### 1 2", False), ("", False)],
)  # fmt: skip
def test_grading_is_exact(answer: str, right: bool) -> None:
    assert grade(answer, 12) == right


def test_digits_are_single_tokens_and_pieces_join_to_the_text(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for p in problems("heldout", 0, 50):
        ids = tokenizer(p.answer).input_ids
        pieces = [tokenizer.decode([i]) for i in ids]
        assert "".join(pieces) == p.answer
        assert all(len(piece.strip()) == 1 for piece in pieces if any(c.isdigit() for c in piece))
    strange = "Zoë paid 3€"
    assert tokenizer.decode(tokenizer(strange).input_ids) == strange
