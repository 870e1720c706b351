"""The oracle itself: its decoder against transformers, its rules against worked examples."""

from itertools import pairwise

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
from oracle import Blocks, OracleResult, generate
from oracle_model import OracleModel, causal_mask
from oracle_sampling import Sampling
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


def test_causal_mask_by_hand() -> None:
    """A prompt of three and a complete block of two, token by token; the open block of two."""
    expected = [[int(j <= i) for j in range(7)] for i in range(5)] + [[1] * 7] * 2
    assert Blocks(2, "causal", 3).mask(7).int().tolist() == expected


def test_mask_of_causal_prompts_on_the_grid() -> None:
    """Two complete blocks of two, token by token; the open block, with the prompt's last token."""
    expected = [[int(j <= i) for j in range(6)] for i in range(4)] + [[1] * 6] * 2
    assert Blocks(2, "causal_grid", 5).mask(6).int().tolist() == expected


@pytest.mark.parametrize(
    ("prompt_attention", "known", "expected"),
    [
        ("block_causal", 10, range(8, 16)),
        ("block_causal", 16, range(16, 20)),
        ("bidirectional", 10, range(10, 18)),
        ("bidirectional", 17, range(10, 18)),
        ("bidirectional", 18, range(18, 20)),
        ("causal", 17, range(10, 18)),
        ("causal_grid", 17, range(16, 20)),
    ],
)
def test_open_block_and_the_short_last_one(
    prompt_attention: str, known: int, expected: range
) -> None:
    assert Blocks(8, prompt_attention, 10).open_block(known, max_model_len=20) == expected


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


def test_equal_seeds_give_equal_answers(model: OracleModel) -> None:
    answers = [
        decode(model, PROMPT, sampling=Sampling(temperature=1.0, seed=seed)).token_ids
        for seed in (7, 7, 8, 9)
    ]
    assert answers[0] == answers[1]
    assert len(set(map(tuple, answers))) == 3


def test_logits_are_those_of_the_revealing_step(model: OracleModel) -> None:
    result = decode(model, PROMPT, max_steps=1)
    ids = torch.tensor([*PROMPT, *result.token_ids])[: len(PROMPT) + 3]
    assert len(result.raw_logits) == len(result.processed_logits) == len(result.token_ids)
    whole = model.logits(
        torch.cat((ids[: len(PROMPT)], torch.full((3,), MASK_ID))),
        Blocks(8, "block_causal", 1).mask(32),
    )
    torch.testing.assert_close(torch.stack(result.raw_logits[:3]), whole[len(PROMPT) :])
    for raw, processed in zip(result.raw_logits, result.processed_logits, strict=True):
        changed = (raw != processed).nonzero().flatten().tolist()
        assert changed == [MASK_ID]


def test_no_bad_word_is_written_however_many_are_revealed_at_once(model: OracleModel) -> None:
    options = {"max_steps": 1, "max_tokens": 40, "ignore_eos": True}
    free = decode(model, PROMPT, **options).token_ids
    words = tuple(pairwise(free))[3:20]
    sampling = Sampling(bad_words=words)
    result = decode(model, PROMPT, sampling=sampling, **options)
    assert not set(words) & set(pairwise(result.token_ids))
    assert 1 in result.revealed


def test_min_tokens_put_off_the_end(model: OracleModel) -> None:
    whole = decode(model, PROMPT, threshold=1.0, ignore_eos=True).token_ids
    stop = [whole[4]]
    result = decode(
        model, PROMPT, threshold=1.0, stop_token_ids=stop, sampling=Sampling(min_tokens=9)
    )
    assert not {*stop, EOS_ID} & {*result.token_ids[:8]}
    assert len(result.token_ids) >= 9


def test_grammar_trims_what_it_refuses(model: OracleModel) -> None:
    """Even and odd ids in turn, several at a time where they happen to fit."""

    def alternating(output: list[int]) -> range:
        return range(len(output) % 2, MASK_ID, 2)

    options = {"rule": "prefix", "threshold": 0.05, "max_tokens": 40}
    result = decode(model, PROMPT, grammar=alternating, ignore_eos=True, **options)
    assert [token % 2 for token in result.token_ids] == [0, 1] * 20
    runs = list(map(len, result.emitted))
    assert min(runs) >= 1
    assert any(n > 1 for n in runs)
    assert any(n < revealed for n, revealed in zip(runs, result.revealed, strict=True))


def test_shifted_rows_predict_the_next_position(model: OracleModel) -> None:
    result = decode(model, PROMPT[:16], token_shift=True, max_steps=1, max_tokens=3)
    ids = torch.tensor([*PROMPT[:16], *[MASK_ID] * 8])
    rows = model.logits(ids, Blocks(8, "block_causal", 16).mask(24))[15:18]
    torch.testing.assert_close(torch.stack(result.raw_logits), rows)


def test_a_shifted_block_begins_in_its_first_step(model: OracleModel) -> None:
    """Beside the surest position; unless that is the first one itself."""
    result = decode(model, PROMPT[:16], token_shift=True, rule="steps", max_tokens=40)
    firsts = [i for i, masked in enumerate(result.masked) if masked == 8]
    assert len(firsts) == 5
    assert all(result.emitted[i] for i in firsts)
    assert 2 in {result.revealed[i] for i in firsts}


@pytest.mark.parametrize("rule", ["margin", "entropy", "factor", "prefix", "steps"])
def test_every_rule_decodes_otherwise(model: OracleModel, rule: str) -> None:
    by_rule, by_confidence = (
        decode(model, PROMPT, rule=name, threshold=0.5, max_tokens=40, ignore_eos=True)
        for name in (rule, "confidence")
    )
    assert by_rule.revealed != by_confidence.revealed


def test_prompt_modes_differ(model: OracleModel) -> None:
    answers = {
        tuple(decode(model, PROMPT, prompt_attention=mode, ignore_eos=True).token_ids)
        for mode in ("block_causal", "bidirectional", "causal", "causal_grid")
    }
    assert len(answers) == 4
