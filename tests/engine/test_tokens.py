"""Equality of tokens with the oracle: one request, then several, in both prompt modes."""

from dataclasses import replace

import pytest
from checkpoints import MASK_ID, tokenizer
from harness import MAX_MODEL_LEN, Ask, Engine, prompt
from vllm import SamplingParams
from vllm.config import CompilationMode

THRESHOLDS = {"one": 1.0, "some": 0.6, "all": 1e-6}


@pytest.fixture(params=["compiled", "bidirectional"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue(request.param)


def test_the_engines_are_what_their_names_say(compiled: Engine, bidirectional: Engine) -> None:
    def mode(engine: Engine) -> CompilationMode:
        return engine.config.compilation_config.mode

    assert mode(compiled) != CompilationMode.NONE
    assert mode(bidirectional) == CompilationMode.NONE
    assert compiled.config.cache_config.enable_prefix_caching
    assert not bidirectional.config.cache_config.enable_prefix_caching
    assert not bidirectional.config.scheduler_config.async_scheduling


@pytest.mark.parametrize("length", ["1", "B-1", "B", "B+1", "2B", "long"])
def test_prompt_lengths(engine: Engine, length: str) -> None:
    block = engine.served.block_length
    lengths = {"1": 1, "B-1": block - 1, "B": block, "B+1": block + 1, "2B": 2 * block}
    engine.assert_exact([Ask(prompt(lengths.get(length, 101), seed=1))])


@pytest.mark.parametrize("reveals", THRESHOLDS)
def test_thresholds(engine: Engine, reveals: str) -> None:
    block = engine.served.block_length
    ask = Ask(prompt(27, seed=2), 40, threshold=THRESHOLDS[reveals], max_steps=block)
    (expected,) = engine.assert_exact([ask])
    at_once = set(expected.revealed)
    assert {
        "one": at_once == {1},
        "some": len(at_once) > 2,
        "all": expected.revealed == expected.masked,
    }[reveals]


@pytest.mark.parametrize("name", ["compiled", "crowded", "bidirectional"])
def test_server_options_are_the_defaults(request: pytest.FixtureRequest, name: str) -> None:
    engine = request.getfixturevalue(name)
    ask = Ask(prompt(27, seed=2), max_tokens=60, threshold=None)
    (expected,) = engine.assert_exact([ask])
    for other in (1.0, 0.8, 0.6):
        assert expected.revealed != engine.expected(replace(ask, threshold=other)).revealed


@pytest.mark.parametrize("max_steps", [1, 3, None])
@pytest.mark.parametrize("threshold", [1.0, 0.6])
def test_max_steps(engine: Engine, max_steps: int | None, threshold: float) -> None:
    ask = Ask(prompt(21, seed=3), max_tokens=40, threshold=threshold, max_steps=max_steps)
    (expected,) = engine.assert_exact([ask])
    if max_steps is not None:
        assert max(expected.denoise_steps) == max_steps
        unbounded = engine.expected(replace(ask, max_steps=None))
        assert max(unbounded.denoise_steps) > max_steps  # the bound binds


@pytest.mark.parametrize("max_tokens", [1, 2, 7, 13, 33])
def test_odd_max_tokens(engine: Engine, max_tokens: int) -> None:
    (expected,) = engine.assert_exact([Ask(prompt(19, seed=4), max_tokens=max_tokens)])
    assert len(expected.token_ids) == max_tokens


@pytest.mark.parametrize("room", [1, 5, 21])
def test_last_block_is_shorter_at_the_end_of_the_context(engine: Engine, room: int) -> None:
    assert MAX_MODEL_LEN % engine.served.block_length
    assert room % engine.served.block_length
    ask = Ask(prompt(MAX_MODEL_LEN - room, seed=5), max_tokens=100)
    (expected,) = engine.assert_exact([ask])
    assert len(expected.token_ids) == room
    assert expected.finish_reason == "length"


def test_stop_token_and_eos_cut_the_block(engine: Engine) -> None:
    whole = engine.expected(Ask(prompt(30, seed=6), max_tokens=40)).token_ids
    stop = whole[11]
    ask = Ask(prompt(30, seed=6), max_tokens=40, stop_token_ids=(stop,))
    (expected,) = engine.assert_exact([ask])
    assert expected.finish_reason == "stop"
    assert expected.token_ids == whole[: whole.index(stop) + 1]


def test_stop_string_cuts_the_text(engine: Engine) -> None:
    whole = engine.expected(Ask(prompt(30, seed=6), max_tokens=40)).token_ids
    text = tokenizer().decode(whole, skip_special_tokens=True)
    stop = text[9:12]
    params = SamplingParams(
        temperature=0,
        max_tokens=40,
        ignore_eos=True,
        stop=[stop],
        extra_args={"diffusion_threshold": 0.6},
    )
    (output,) = engine.llm.generate({"prompt_token_ids": list(prompt(30, seed=6))}, params)
    assert output.outputs[0].text == text[: text.index(stop)]
    assert output.outputs[0].finish_reason == "stop"


def test_a_mask_token_in_the_prompt_is_known(engine: Engine) -> None:
    """What is masked is remembered, not read off token ids."""
    block = engine.served.block_length
    masks = (MASK_ID,) * 3
    for length in (block, block + 3, 2 * block - 1):
        engine.assert_exact([Ask(prompt(length - 3, seed=7) + masks)])


def mixed(engine: Engine) -> list[Ask]:
    """Eight requests: mixed lengths, thresholds, step bounds and ends."""
    block = engine.served.block_length
    lengths = (1, block - 1, block, block + 1, 3 * block, 61, 90, 127)
    return [
        Ask(
            prompt(length, seed=10 + i),
            max_tokens=(9, 40, 17, 33, 24, 1, 48, 31)[i],
            threshold=(0.6, 1.0, 1e-6, None)[i % 4],
            max_steps=(None, 3, 1)[i % 3],
            ignore_eos=i % 2 == 0,
        )
        for i, length in enumerate(lengths)
    ]


def test_eight_mixed_requests_at_once(engine: Engine) -> None:
    engine.assert_exact(mixed(engine))
    assert max(len(step.num_tokens) for step in engine.forwards) == 8


def test_order_and_company_do_not_matter(engine: Engine) -> None:
    """More requests than slots: slots are reused, by requests in another order."""
    engine.assert_exact([*reversed(mixed(engine)), *mixed(engine)[:5]])
