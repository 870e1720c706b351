"""What a round says of itself."""

import json
from pathlib import Path

import pytest

from vllm_edlm.bench.load import Forward, Load, Round, Trace
from vllm_edlm.bench.shapes import Shape, write_config


def trace(*outputs: tuple[float, int], start: float = 0.0, denoise_steps: int = 1) -> Trace:
    """A request that got so many tokens at these times."""
    made = Trace(start, denoise_steps=denoise_steps)
    for time, count in outputs:
        made.take(range(count), time)
    return made


def test_random_prompts_are_the_loads_own() -> None:
    load = Load(concurrency=2, num_requests=3, prompt_length=5, output_length=1, seed=4)
    prompts = load.prompt_tokens(100)
    assert [len(prompt) for prompt in prompts] == [5, 5, 5]
    assert prompts == load.prompt_tokens(100)
    assert len({tuple(prompt) for prompt in prompts}) == 3
    many = Load(1, 1, 2000, 1).prompt_tokens(6)[0]
    assert set(many) == {2, 3, 4}, "no special tokens, no mask token"


def test_explicit_prompts_repeat() -> None:
    load = Load(1, 3, 2, 1, prompts=((7, 8), (9,)))
    assert load.prompt_tokens(10) == [[7, 8], [9], [7, 8]]


def test_a_request_counts_from_its_arrival() -> None:
    one = trace((1.5, 4), (2.0, 0), (2.5, 2), (4.5, 2), start=1.0)
    assert one.time_to_first_token == 0.5
    assert one.gaps == [1.0, 2.0]
    assert one.time_per_token == 3.0 / 4, "the first output's tokens took no time after it"


def test_one_output_has_no_time_per_token() -> None:
    assert trace((1.0, 16)).time_per_token is None
    assert Round(1.0, (), (trace((1.0, 16)),)).time_per_output_token == []


def test_a_round_adds_up_its_requests() -> None:
    traces = (trace((1, 8), (2, 8), denoise_steps=4), trace((3, 8), denoise_steps=4))
    made = Round(4.0, (Forward((8, 8), (16, 16), 4),), traces)
    assert made.tokens == 24
    assert made.tokens_per_second == 6.0
    assert made.tokens_per_forward == 3.0
    assert made.time_to_first_token == [1, 3]
    assert made.inter_token == [1]


@pytest.mark.parametrize("block_length", [None, 16])
def test_a_shape_is_written_and_read(tmp_path: Path, block_length: int | None) -> None:
    shape = Shape(layers=3, vocabulary=77)
    folder = write_config(shape, tmp_path / "new", block_length)
    assert Shape.of_checkpoint(folder) == shape
    config = json.loads((folder / "config.json").read_text())
    architecture = "Qwen3ForCausalLM" if block_length is None else "EfficientDLM"
    assert config["architectures"] == [architecture]
    assert config.get("block_size") == block_length
    assert config.get("mask_token_id") == (None if block_length is None else 76)
