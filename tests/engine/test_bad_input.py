"""Bad input is an error that names the thing: at start-up, or for that one request."""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints import VOCABULARY_SIZE, CheckpointFactory, CheckpointSpec
from harness import MAX_MODEL_LEN, SMALL_ENGINE, Ask, Engine, Served, prompt
from vllm import LLM, EngineArgs, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.executor.ray_executor import RayDistributedExecutor

from vllm_edlm.compat.request_checks import MAX_LOGPROBS, sizes


def assert_not_loaded(path: Path, tensor: str) -> None:
    """Start-up fails and names the tensor, under the checkpoint's name or under vLLM's."""
    bare = tensor.removeprefix("encoder.").removeprefix("model.")
    named = "(diffusion|lm)_head.weight" if "_head." in bare else re.escape(bare)
    with pytest.raises(ValueError, match=named):
        LLM(model=str(path), enforce_eager=True, **SMALL_ENGINE)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("encoder", "encoder.layers.1.mlp.down_proj.weight"),
        ("encoder", "encoder.layers.1.self_attn.k_proj.weight"),
        ("encoder", "encoder.layers.0.mlp.up_proj.weight"),
        ("encoder", "diffusion_head.weight"),
        ("plain", "model.embed_tokens.weight"),
        ("plain", "lm_head.weight"),
    ],
)
def test_missing_tensor(checkpoint: CheckpointFactory, layout: str, name: str) -> None:
    assert_not_loaded(checkpoint(CheckpointSpec(layout=layout, missing_tensor=name)), name)


@pytest.mark.parametrize(
    "name",
    [
        "encoder.layers.0.mlp.adapter.weight",
        "encoder.layers.2.mlp.up_proj.weight",
        "encoder.layers.0.self_attn.o_proj.bias",
        "mtp.weight",
    ],
)
def test_unknown_tensor(checkpoint: CheckpointFactory, name: str) -> None:
    assert_not_loaded(checkpoint(CheckpointSpec(unknown_tensor=name)), name)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("mask_token_id", VOCABULARY_SIZE, f"mask_token_id.*{VOCABULARY_SIZE}"),
        ("mask_token_id", -1, "mask_token_id.*-1"),
        ("mask_token_id", None, "mask_token_id.*None"),
        ("block_size", 0, "block_size.*0"),
        ("block_size", None, "block_size.*None"),
        ("prompt_attention", "diagonal", "prompt_attention.*diagonal"),
        ("dlm_type", "dream", "dlm_type.*dream"),
        ("use_sliding_window", True, "use_sliding_window"),
    ],
)
def test_bad_configuration(checkpoint: CheckpointFactory, key: str, value: Any, named: str) -> None:
    path = checkpoint(CheckpointSpec(config_overrides={key: value}))
    with pytest.raises(ValueError, match=named):
        EngineArgs(model=str(path), **SMALL_ENGINE).create_engine_config()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"edlm": {"threshold": 0}}, "threshold.*0"),
        ({"edlm": {"threshold": 1.5}}, r"threshold.*1\.5"),
        ({"edlm": {"threshold": "x"}}, "threshold.*x"),
        ({"edlm": {"threshold": math.nan}}, "threshold.*nan"),
        ({"edlm": {"prompt_attention": "causal"}}, "prompt_attention.*'causal'"),
        ({"edlm": {"prompt_attention": "causal_grid"}}, "prompt_attention.*'causal_grid'"),
        ({"edlm": {"reveal": "guess"}}, "reveal.*guess"),
        ({"edlm": {"reveal": "steps", "threshold": 0.5}}, r"threshold.*steps.*0\.5"),
        ({"edlm": {"treshold": 0.5}}, "treshold"),
        ({"edlm": {"adaptive_canvas": 0}}, "adaptive_canvas.*0"),
        ({"edlm": {"adaptive_canvas": "yes"}}, "adaptive_canvas.*yes.*true or false"),
        ({"edlm": 3}, "edlm.*3"),
    ],
)
def test_bad_server_options(
    checkpoint: CheckpointFactory, options: dict[str, Any], named: str
) -> None:
    args = EngineArgs(
        model=str(checkpoint(CheckpointSpec())), additional_config=options, **SMALL_ENGINE
    )
    with pytest.raises(ValueError, match=named):
        args.create_engine_config()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"canvas_length": 0}, "canvas_length"),
        ({"canvas_length": 8, "max_denoising_steps": 0}, "max_denoising_steps.*0"),
        ({"canvas_length": 8, "max_denoising_steps": 9}, "max_denoising_steps.*9"),
        ({"canvas": 8}, "canvas"),
    ],
)
def test_bad_diffusion_config(
    checkpoint: CheckpointFactory, options: dict[str, Any], named: str
) -> None:
    path = checkpoint(CheckpointSpec())
    with pytest.raises((ValueError, TypeError), match=named):
        EngineArgs(model=str(path), diffusion_config=options, **SMALL_ENGINE).create_engine_config()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"pipeline_parallel_size": 2, "async_scheduling": True}, "async.*pipeline parallelism"),
        (
            {
                "pipeline_parallel_size": 2,
                "distributed_executor_backend": RayDistributedExecutor,
            },
            "pipeline parallelism.*legacy Ray",
        ),
        ({"kv_sharing_fast_prefill": True}, "fast.prefill"),
        ({"max_num_batched_tokens": 15}, "max_num_batched_tokens.*16.*15"),
        (
            {
                "long_prefill_token_threshold": 32,
                "additional_config": {"edlm": {"prompt_attention": "bidirectional"}},
            },
            "long_prefill_token_threshold.*bidirectional",
        ),
    ],
)
def test_unsupported_feature(
    checkpoint: CheckpointFactory, options: dict[str, Any], named: str
) -> None:
    args = EngineArgs(model=str(checkpoint(CheckpointSpec())), **(SMALL_ENGINE | options))
    with pytest.raises((ValueError, NotImplementedError), match=named):
        args.create_engine_config()


def test_counting_nans_is_refused(
    checkpoint: CheckpointFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # vLLM reads its environment once in a process, so not as the variable.
    wanted = SimpleNamespace(VLLM_COMPUTE_NANS_IN_LOGITS=True)
    monkeypatch.setattr("vllm_edlm.config.envs", wanted)
    args = EngineArgs(model=str(checkpoint(CheckpointSpec())), **SMALL_ENGINE)
    with pytest.raises(ValueError, match="VLLM_COMPUTE_NANS_IN_LOGITS is not supported"):
        args.create_engine_config()


BAD_EXTRA_ARGS = [
    ({"diffusion_threshold": 0}, r"diffusion_threshold.*\(0, 1\].*0"),
    ({"diffusion_threshold": 1.5}, r"diffusion_threshold.*\(0, 1\].*1\.5"),
    ({"diffusion_threshold": "x"}, r"diffusion_threshold.*\(0, 1\].*x"),
    ({"diffusion_threshold": math.nan}, r"diffusion_threshold.*\(0, 1\].*nan"),
    ({"diffusion_threshold": True}, "diffusion_threshold.*True"),
    ({"diffusion_threshold": None}, "diffusion_threshold.*None"),
    ({"diffusion_max_steps": 0}, "diffusion_max_steps.*1.*8.*0"),
    ({"diffusion_max_steps": 9}, "diffusion_max_steps.*1.*8.*9"),
    ({"diffusion_max_steps": 2.5}, r"diffusion_max_steps.*2\.5"),
    ({"diffusion_canvas_length": 0}, "diffusion_canvas_length.*1.*8.*0"),
    ({"diffusion_canvas_length": 9}, "diffusion_canvas_length.*1.*8.*9"),
    ({"diffusion_reveal": "guess"}, "diffusion_reveal.*confidence.*guess"),
    ({"diffusion_reveal": "steps", "diffusion_threshold": 0.5}, "diffusion_threshold.*steps"),
    ({"diffusion_treshold": 0.5}, "diffusion_treshold"),
]
MAX_TOKENS = 2**31 - 1 - MAX_MODEL_LEN
NO_MEANING = [{"prompt_logprobs": 1}, {"thinking_token_budget": 5}]
TOO_MUCH = [
    ({"allowed_token_ids": [7] * 1025}, "allowed_token_ids.*1024.*1025"),
    ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias"),
    ({"min_tokens": 2**40, "max_tokens": 2**40}, f"min_tokens.*{MAX_MODEL_LEN}"),
    ({"max_tokens": MAX_TOKENS + 1}, f"max_tokens.*{MAX_TOKENS}.*{MAX_TOKENS + 1}"),
    ({"stop_token_ids": list(range(128)), "min_tokens": 1}, "stop_token_ids.*128"),
    ({"seed": 2**70}, "seed"),
    ({"bad_words": ["ab" * 1000]}, "bad_words.*1024.*2000"),
]


def assert_refused(engine: Engine, params: SamplingParams, named: str) -> None:
    """A good request, then the bad one: the call fails, and the good one is served again."""
    good = Ask(prompt(20, seed=80))
    prompts = [{"prompt_token_ids": list(good.prompt)}] * 2
    with pytest.raises(VLLMValidationError, match=named):
        engine.llm.generate(prompts, [good.sampling_params(), params], use_tqdm=False)
    engine.assert_exact([good])


@pytest.mark.parametrize(("extra_args", "named"), BAD_EXTRA_ARGS)
def test_bad_request_option(compiled: Engine, extra_args: dict[str, Any], named: str) -> None:
    assert_refused(compiled, SamplingParams(temperature=0, extra_args=extra_args), named)


@pytest.mark.parametrize("option", NO_MEANING, ids=lambda option: next(iter(option)))
def test_parameter_without_meaning(compiled: Engine, option: dict[str, Any]) -> None:
    assert_refused(compiled, SamplingParams(temperature=0, **option), next(iter(option)))


@pytest.mark.parametrize(("option", "named"), TOO_MUCH, ids=lambda value: str(value)[:20])
def test_more_than_the_runner_holds(compiled: Engine, option: dict[str, Any], named: str) -> None:
    assert_refused(compiled, SamplingParams(temperature=0, **option), named)


@pytest.mark.parametrize(("asked", "size"), [(None, 0), (5, 5), (-1, VOCABULARY_SIZE)])
def test_the_whole_vocabulary_is_many_logprobs(
    compiled: Engine, asked: int | None, size: int
) -> None:
    """vLLM lets -1 pass where `max_logprobs` is -1; the runner holds no more than so many."""
    params = SamplingParams(temperature=0, logprobs=asked)
    assert sizes(params, compiled.llm.model_config)["logprobs"] == (size, MAX_LOGPROBS)


def test_a_prompt_that_goes_on_later(compiled: Engine) -> None:
    processor = compiled.llm.llm_engine.input_processor
    with pytest.raises(VLLMValidationError, match="Input streaming is not supported"):
        processor.process_inputs("session", {}, SamplingParams(), ("generate",), resumable=True)


def test_as_many_tokens_as_the_runner_can_count(compiled: Engine) -> None:
    """The context ends the answer."""
    longest = {"prompt_token_ids": list(prompt(MAX_MODEL_LEN - 1, seed=80))}
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=MAX_TOKENS)
    [answer] = compiled.llm.generate(longest, params, use_tqdm=False)
    assert answer.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("rule", ["confidence", "steps"])
def test_a_grammar_wants_the_prefix_rule(compiled: Engine, rule: str) -> None:
    grammar = StructuredOutputsParams(choice=["yes", "no"])
    params = SamplingParams(
        temperature=0, structured_outputs=grammar, extra_args={"diffusion_reveal": rule}
    )
    assert_refused(compiled, params, f"diffusion_reveal.*prefix.*{rule}")


@pytest.mark.parametrize("name", ["compiled", "crowded", "bidirectional"])
def test_prompt_longer_than_the_context(request: pytest.FixtureRequest, name: str) -> None:
    engine = request.getfixturevalue(name)
    too_long = {"prompt_token_ids": [*prompt(MAX_MODEL_LEN), 7]}
    with pytest.raises(VLLMValidationError, match=str(MAX_MODEL_LEN)):
        engine.llm.generate(too_long, SamplingParams(temperature=0), use_tqdm=False)
    engine.assert_exact([Ask(prompt(20, seed=81))])


@pytest.mark.parametrize("budget", ["max_num_batched_tokens", "max_num_scheduled_tokens"])
def test_bidirectional_prompt_longer_than_a_step(
    checkpoint: CheckpointFactory, budget: str
) -> None:
    """It cannot be cut, so it is refused; one that just fits is served."""
    spec = CheckpointSpec(prompt_attention="bidirectional", seed=4)
    served = Served(spec.block_length, "bidirectional")
    engine = Engine.start(checkpoint(spec), served, enforce_eager=True, **{budget: 64})
    with pytest.raises(VLLMValidationError, match=r"65.*64.*block_causal"):
        engine.generate([Ask(prompt(65, seed=82))])
    engine.assert_exact([Ask(prompt(64, seed=82)), Ask(prompt(63, seed=83)), Ask(prompt(9))])


def test_bidirectional_prompt_and_its_shifted_block_longer_than_a_step(
    checkpoint: CheckpointFactory,
) -> None:
    """The prompt's end predicts the block's first position, so a step holds both."""
    shifted = {"token_shift": True, "dlm_type": "dream"}
    spec = CheckpointSpec(prompt_attention="bidirectional", seed=4, config_overrides=shifted)
    served = Served(spec.block_length, "bidirectional", token_shift=True)
    options = {"enforce_eager": True, "max_num_batched_tokens": 64, "max_model_len": 96}
    engine = Engine.start(checkpoint(spec), served, **options)
    fits = 64 - spec.block_length
    with pytest.raises(VLLMValidationError, match=rf"{fits + 1}.*65 tokens.*64.*block_causal"):
        engine.generate([Ask(prompt(fits + 1, seed=82))])
    engine.assert_exact([Ask(prompt(fits, seed=82)), Ask(prompt(fits - 1, seed=83))])
