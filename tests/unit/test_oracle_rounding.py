"""Rounding decides where a confidence meets its threshold, and nowhere beside it."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from checkpoints import MASK_ID, CheckpointFactory, CheckpointSpec
from oracle import Blocks, OracleResult, generate
from oracle_model import OracleModel
from oracle_reveal import Statistics
from oracle_rounding import RoundedModel, answers, assert_possible

LENGTH = 16
# Within and beyond what rounding does to a confidence.
CLOSE, APART = 5e-7, 0.01


@pytest.fixture(scope="module")
def model(checkpoint: CheckpointFactory) -> OracleModel:
    return OracleModel.load(checkpoint(CheckpointSpec()))


def decode(prompt: list[int], threshold: float, model: OracleModel | RoundedModel) -> OracleResult:
    return generate(
        model,
        prompt,
        block_length=8,
        mask_token_id=MASK_ID,
        prompt_attention="block_causal",
        max_tokens=24,
        max_model_len=128,
        threshold=threshold,
    )


def confidences(model: OracleModel, prompt: list[int]) -> Iterator[float]:
    """Of the masked positions in a request's first step, but for the surest."""
    ids = torch.tensor([*prompt, *[MASK_ID] * 8])
    rows = model.logits(ids, Blocks(8, "block_causal", LENGTH).mask(len(ids)))[-8:]
    tokens = rows.index_fill(1, torch.tensor([MASK_ID]), -torch.inf).argmax(-1).tolist()
    told = [Statistics.of(row, token, MASK_ID) for row, token in zip(rows, tokens, strict=True)]
    yield from sorted(position.confidence for position in told)[:-1]


def close_call(model: OracleModel) -> tuple[list[int], float]:
    """A prompt and a confidence that alone decides between two answers, as the threshold moves."""
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(5, 150, (LENGTH,), generator=generator).tolist()
        for confidence in confidences(model, prompt):
            below, just_below, just_above, above = (
                decode(prompt, confidence + change, model).token_ids
                for change in (-APART, -CLOSE, CLOSE, APART)
            )
            if below == just_below != just_above == above:
                return prompt, confidence
    pytest.fail("no prompt has an answer that hangs on one confidence")


def texts(model: OracleModel, prompt: list[int], threshold: float) -> set[tuple[int, ...]]:
    found = answers(partial(decode, prompt, threshold), model)
    return {tuple(answer.token_ids) for answer in found}


def test_only_at_the_threshold_itself(model: OracleModel) -> None:
    """A threshold that close to a confidence gives both answers, one further off a single one."""
    prompt, confidence = close_call(model)
    below, above = (texts(model, prompt, confidence + change) for change in (-APART, APART))
    assert len(below) == len(above) == 1
    assert below != above
    for change in (-CLOSE, CLOSE):
        assert texts(model, prompt, confidence + change) == below | above


def accept(wanted: OracleResult, answer: OracleResult) -> None:
    assert answer.token_ids == wanted.token_ids


def test_the_other_answer_passes_there_and_fails_elsewhere(model: OracleModel) -> None:
    prompt, confidence = close_call(model)
    for change in (-CLOSE, -APART):
        other = decode(prompt, confidence - change, model)
        with nullcontext() if change == -CLOSE else pytest.raises(AssertionError):
            assert_possible(
                partial(accept, other), partial(decode, prompt, confidence + change), model
            )


def test_no_other_answer_passes(model: OracleModel) -> None:
    prompt, confidence = close_call(model)
    wrong = decode(prompt[1:], confidence, model)
    with pytest.raises(AssertionError):
        assert_possible(partial(accept, wrong), partial(decode, prompt, confidence), model)
