"""The oracle itself: its decoder against transformers, its rules against worked examples."""

import pytest
import torch
from checkpoints import (
    EOS_ID,
    MASK_ID,
    VOCABULARY_SIZE,
    CheckpointFactory,
    CheckpointSpec,
    tokenizer,
)
from oracle import Blocks, OracleResult, choose_reveals, generate, predict
from oracle_model import OracleModel, causal_mask
from transformers import AutoConfig, Qwen3ForCausalLM

PROMPT = torch.randint(5, 150, (29,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def model(checkpoint: CheckpointFactory) -> OracleModel:
    return OracleModel.load(checkpoint(CheckpointSpec()))


def decode(model: OracleModel, prompt: list[int], **changes: object) -> OracleResult:
    """A block-causal request of 19 tokens, with `changes`."""
    options = {
        "block_length": 8,
        "mask_token_id": MASK_ID,
        "prompt_attention": "block_causal",
        "max_tokens": 19,
        "max_model_len": 128,
        "threshold": 0.6,
    }
    return generate(model, prompt, **(options | changes))


@pytest.mark.parametrize("attention_bias", [False, True])
def test_causal_forward_equals_transformers(
    checkpoint: CheckpointFactory, attention_bias: bool
) -> None:
    path = checkpoint(
        CheckpointSpec("Qwen3ForCausalLM", "plain", attention_bias=attention_bias, seed=3)
    )
    ids = torch.randint(VOCABULARY_SIZE, (37,))
    with torch.inference_mode():
        expected = Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32)(ids[None]).logits[0]
        got = OracleModel.load(path).logits(ids, causal_mask(len(ids)))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_both_layouts_hold_one_model(checkpoint: CheckpointFactory) -> None:
    encoder, plain = (
        OracleModel.load(checkpoint(CheckpointSpec(layout=layout)))
        for layout in ("encoder", "plain")
    )
    assert encoder.weights.keys() == plain.weights.keys()
    assert all(torch.equal(encoder.weights[n], plain.weights[n]) for n in plain.weights)


def test_tokenizer_round_trip() -> None:
    text = "Hi there,\n2+2?"
    assert tokenizer().decode(tokenizer().encode(text)) == text
    assert (tokenizer().eos_token_id, tokenizer().mask_token_id) == (EOS_ID, MASK_ID)


def test_stock_configuration_reads_the_released_style(
    checkpoint: CheckpointFactory,
) -> None:
    config = AutoConfig.from_pretrained(checkpoint(CheckpointSpec(block_length=8)))
    assert (config.model_type, config.block_size, config.mask_token_id) == ("qwen3", 8, MASK_ID)


def test_masks_by_hand() -> None:
    grid = Blocks(2, "block_causal", 3).mask(5).int().tolist()
    assert grid == [[1, 1, 0, 0, 0]] * 2 + [[1, 1, 1, 1, 0]] * 2 + [[1] * 5]
    whole_prompt = Blocks(2, "bidirectional", 3).mask(6).int().tolist()
    assert whole_prompt == [[1, 1, 1, 0, 0, 0]] * 3 + [[1, 1, 1, 1, 1, 0]] * 2 + [[1] * 6]


@pytest.mark.parametrize(
    ("prompt_attention", "known", "expected"),
    [
        ("block_causal", 10, range(8, 16)),
        ("block_causal", 16, range(16, 20)),
        ("bidirectional", 10, range(10, 18)),
        ("bidirectional", 17, range(10, 18)),
        ("bidirectional", 18, range(18, 20)),
    ],
)
def test_open_block_and_the_short_last_one(
    prompt_attention: str, known: int, expected: range
) -> None:
    assert Blocks(8, prompt_attention, 10).open_block(known, max_model_len=20) == expected


@pytest.mark.parametrize(
    ("confidence", "threshold", "step", "max_steps", "expected"),
    [
        ([0.2, 0.9, 0.8], 0.8, 0, 3, {1, 2}),  # equal to the threshold counts
        ([0.2, 0.5, 0.5], 0.9, 0, 3, {1}),  # none reaches it: the lowest of the most confident
        ([0.2, 0.9, 0.8, 0.8, 0.1], 1.0, 0, 2, {1, 2, 3}),  # ceil(5/2) by the schedule
        ([0.2, 0.3], 1.0, 1, 2, {0, 1}),  # the last step reveals all
        ([0.95, 0.3, 0.91, 0.92], 0.9, 1, 3, {0, 2, 3}),  # the rule's choice is the larger
    ],
)
def test_reveals_by_hand(
    confidence: list[float], threshold: float, step: int, max_steps: int, expected: set[int]
) -> None:
    assert choose_reveals(confidence, threshold, step, max_steps) == expected


def test_prediction_never_is_the_mask_but_counts_its_probability() -> None:
    tokens, confidence = predict(torch.tensor([[1.0, 1.0, 5.0]]), mask_token_id=2)
    assert tokens == [0]  # the lowest id of equals
    assert confidence == pytest.approx([torch.tensor([1.0, 1.0, 5.0]).softmax(-1)[0].item()])


@pytest.mark.parametrize("prompt_attention", ["block_causal", "bidirectional"])
def test_thresholds_reveal_one_some_and_all(model: OracleModel, prompt_attention: str) -> None:
    runs = {
        threshold: decode(model, PROMPT, threshold=threshold, prompt_attention=prompt_attention)
        for threshold in (1.0, 0.6, 1e-6)
    }
    assert set(runs[1.0].revealed) == {1}
    assert len(set(runs[0.6].revealed)) > 2
    assert runs[1e-6].revealed == runs[1e-6].masked


def test_mask_token_is_often_the_likeliest_and_never_chosen(checkpoint: CheckpointFactory) -> None:
    """Of 48 masked positions; were it never, an engine that chooses it would pass."""
    model = OracleModel.load(checkpoint(CheckpointSpec(seed=4)))
    likeliest = []
    for length in (0, 4, 8, 12, 16, 20):
        inputs = torch.tensor([*PROMPT[: 8 + length], *[MASK_ID] * 8])
        mask = Blocks(8, "bidirectional", 8 + length).mask(len(inputs))
        likeliest += model.logits(inputs, mask)[-8:].argmax(-1).tolist()
        assert MASK_ID not in decode(model, PROMPT[: 8 + length]).token_ids
    assert 4 < likeliest.count(MASK_ID) < 44


def test_max_steps_bound_every_block(model: OracleModel) -> None:
    assert max(decode(model, PROMPT, threshold=1.0, max_steps=3).denoise_steps) == 3
    assert set(decode(model, PROMPT, threshold=1.0, max_steps=1).denoise_steps) == {1}


def test_every_prompt_token_counts(model: OracleModel) -> None:
    """Else equality with the engine would not see wrong keys and values."""
    expected = decode(model, PROMPT, ignore_eos=True).token_ids
    for position in range(len(PROMPT)):
        prompt = [*PROMPT]
        prompt[position] = 5 + (PROMPT[position] + 70) % 150
        assert decode(model, prompt, ignore_eos=True).token_ids != expected, position


def test_stop_token_ends_the_block_at_once(model: OracleModel) -> None:
    whole = decode(model, PROMPT, threshold=1.0, ignore_eos=True)
    stop = whole.token_ids[4]
    first = whole.token_ids.index(stop)
    cut = decode(model, PROMPT, threshold=1.0, ignore_eos=True, stop_token_ids=[stop])
    assert cut.token_ids == whole.token_ids[: first + 1]
    assert cut.finish_reason == "stop"
    assert cut.emitted[-1][-1] == stop
    assert sum(cut.denoise_steps) == len(cut.emitted) < len(whole.emitted)


def test_limits_cut_inside_a_block(model: OracleModel) -> None:
    by_tokens = decode(model, PROMPT, max_tokens=7, ignore_eos=True)
    by_length = decode(model, PROMPT, max_model_len=len(PROMPT) + 7, ignore_eos=True)
    assert [len(r.token_ids) for r in (by_tokens, by_length)] == [7, 7]
    assert by_tokens.finish_reason == by_length.finish_reason == "length"
    # A shorter last block is another computation: its tokens see fewer masks.
    assert by_tokens.token_ids[:3] == by_length.token_ids[:3]
