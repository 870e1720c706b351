"""Every sampling parameter: its effect is real, and the engine's answer is the oracle's."""

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from checkpoints import EOS_ID
from harness import Ask, Engine, prompt
from oracle_sampling import GREEDY, Sampling
from vllm import CompletionOutput

SAMPLED = Sampling(temperature=1.3, seed=11)
FREE = Ask(prompt(27, seed=203), max_tokens=40, threshold=0.3)


@pytest.fixture(params=["compiled", "bidirectional"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (GREEDY, {"temperature": 1.0, "seed": 11}),
        (SAMPLED, {"temperature": 0.7}),
        (SAMPLED, {"seed": -(2**40)}),
        (SAMPLED, {"top_p": 0.6}),
        (SAMPLED, {"top_k": 2}),
        (SAMPLED, {"min_p": 0.3}),
        (GREEDY, {"repetition_penalty": 1.6}),
        (GREEDY, {"repetition_penalty": 0.7}),
        (GREEDY, {"frequency_penalty": 1.5}),
        (GREEDY, {"presence_penalty": 2.0}),
        (GREEDY, {"logit_bias": ((70, 8.0), (80, -100.0), (90, 9.0))}),
        (GREEDY, {"allowed_token_ids": tuple(range(20, 60))}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_parameter_alone(engine: Engine, base: Sampling, changes: dict[str, Any]) -> None:
    ask = replace(FREE, sampling=replace(base, **changes))
    (expected,) = engine.assert_exact([ask])
    without = engine.expected(replace(FREE, sampling=base))
    assert expected.token_ids != without.token_ids


def spellable(tokens: list[int]) -> bool:
    """Whether the tokens are letters, not specials nor what bad words are stripped of."""
    return all(6 <= token < 150 for token in tokens)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_bad_words(engine: Engine, length: int) -> None:
    """Words of the free answer are banned: across block borders, and where many are revealed."""
    ask = replace(FREE, max_steps=2)
    free = engine.expected(ask).token_ids
    runs = [free[i : i + length] for i in range(len(free) - length + 1)]
    words = tuple(tuple(run) for run in runs if spellable(run))[::3]
    (expected,) = engine.assert_exact([replace(ask, sampling=Sampling(bad_words=words))])
    got = expected.token_ids
    assert not set(words) & {tuple(got[i : i + length]) for i in range(len(got))}


def test_bad_words_do_not_begin_in_the_prompt(engine: Engine) -> None:
    """As in vLLM: the prompt's last letter and the answer's first are no word."""
    word = (FREE.prompt[-1], engine.expected(FREE).token_ids[0])
    (expected,) = engine.assert_exact([replace(FREE, sampling=Sampling(bad_words=(word,)))])
    assert expected.token_ids[0] == word[1]


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_min_tokens_put_off_stops(engine: Engine, ignore_eos: bool) -> None:
    stops = {*engine.expected(FREE).token_ids[2:5]}
    ask = replace(FREE, stop_token_ids=tuple(stops), ignore_eos=ignore_eos)
    early = engine.expected(ask)
    (late,) = engine.assert_exact([replace(ask, sampling=Sampling(min_tokens=13))])
    assert early.finish_reason == "stop"
    assert len(early.token_ids) < 13 <= len(late.token_ids)
    assert not {EOS_ID, *stops} & {*late.token_ids[:12]}


def test_min_tokens_put_off_eos(engine: Engine) -> None:
    """The end is wanted all the time; position 13 is the first that may have it."""
    ending = Sampling(logit_bias=((EOS_ID, 100.0),), min_tokens=13)
    asks = [replace(FREE, ignore_eos=ignore, sampling=ending) for ignore in (False, True)]
    stopped, ignored = engine.assert_exact(asks)
    assert stopped.token_ids.index(EOS_ID) == ignored.token_ids.index(EOS_ID) == 13
    assert (stopped.finish_reason, ignored.finish_reason) == ("stop", "length")


def random_sampling(rng: random.Random) -> Sampling:
    """Any combination of all parameters."""

    def maybe(value: Any, default: Any) -> Any:
        return value if rng.random() < 0.4 else default

    letters = range(6, 150)
    temperature = rng.choice((0.0, 0.5, 1.0, 1.7))
    return Sampling(
        temperature=temperature,
        seed=rng.randint(-(2**63), 2**63 - 1),
        top_k=maybe(rng.randint(1, 40), 0),
        top_p=maybe(rng.uniform(0.2, 1), 1.0),
        min_p=maybe(rng.uniform(0, 0.4), 0.0),
        repetition_penalty=maybe(rng.uniform(0.7, 1.8), 1.0),
        frequency_penalty=maybe(rng.uniform(-1, 2), 0.0),
        presence_penalty=maybe(rng.uniform(-1, 2), 0.0),
        logit_bias=maybe(tuple((i, rng.uniform(-9, 6)) for i in rng.sample(letters, 5)), ()),
        allowed_token_ids=maybe(tuple(rng.sample(letters, 30)), ()),
        min_tokens=maybe(rng.randint(1, 9), 0),
        bad_words=maybe(tuple(pairwise(rng.choices(letters, k=30))), ()),
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["compiled", "bidirectional", "crowded"])
def test_parameters_together(request: pytest.FixtureRequest, name: str, seed: int) -> None:
    rng = random.Random(seed)
    asks = [
        Ask(
            prompt(rng.randint(1, 70), seed=210 + i),
            max_tokens=rng.randint(9, 40),
            threshold=rng.choice((1.0, 0.6, 0.3, 0.1)),
            max_steps=rng.choice((None, 1, 3)),
            stop_token_ids=tuple(rng.sample(range(5, 150), 4)),
            sampling=random_sampling(rng),
            logprobs=rng.choice((None, 0, 3)),
        )
        for i in range(8)
    ]
    request.getfixturevalue(name).assert_exact(asks)


def tokens(output: CompletionOutput) -> list[int]:
    return list(output.token_ids)


def test_same_seed_same_answer_in_any_company(engine: Engine) -> None:
    ask = replace(FREE, sampling=SAMPLED)
    (alone,) = engine.generate([ask])
    for place in (0, 3, 7):
        others = [
            Ask(prompt(9 * i, seed=220 + i), sampling=replace(SAMPLED, seed=i + place))
            for i in range(1, 8)
        ]
        together = engine.generate([*others[:place], ask, *others[place:]])
        assert tokens(together[place].outputs[0]) == tokens(alone.outputs[0])


def test_different_seeds_differ(engine: Engine) -> None:
    asks = [replace(FREE, sampling=replace(SAMPLED, seed=seed)) for seed in range(8)]
    answers = {tuple(expected.token_ids) for expected in engine.assert_exact(asks)}
    assert len(answers) == 8


def test_without_a_seed_every_answer_is_another(engine: Engine) -> None:
    asks = [replace(FREE, sampling=replace(SAMPLED, seed=None))] * 4
    answers = {tuple(output.outputs[0].token_ids) for output in engine.generate(asks)}
    assert len(answers) == 4


def test_several_choices_have_seeds_in_a_row(engine: Engine) -> None:
    """As in vLLM: the i-th choice is what the seed + i gives."""
    params = replace(FREE, sampling=SAMPLED).sampling_params()
    params.n = 3
    (output,) = engine.llm.generate({"prompt_token_ids": list(FREE.prompt)}, params)
    for i, choice in enumerate(output.outputs):
        seeded = replace(FREE, sampling=replace(SAMPLED, seed=11 + i))
        assert tokens(choice) == engine.expected(seeded).token_ids


@pytest.mark.parametrize("name", ["compiled", "crowded", "bidirectional"])
@pytest.mark.parametrize("top", [0, 1, 5, 20])
def test_logprobs(request: pytest.FixtureRequest, name: str, top: int) -> None:
    """Raw, processed and as logits, of the step that revealed the token."""
    engine = request.getfixturevalue(name)
    samplings = [
        GREEDY,
        SAMPLED,
        replace(SAMPLED, temperature=0.6, top_p=0.9),
        replace(SAMPLED, top_k=12, presence_penalty=1.0),
        Sampling(repetition_penalty=1.5, logit_bias=((70, 4.0),)),
    ]
    engine.assert_exact([replace(FREE, sampling=s, logprobs=top) for s in samplings])


def test_logprobs_modes_are_what_the_engines_are_served_with(
    compiled: Engine, crowded: Engine, bidirectional: Engine
) -> None:
    modes = {e.config.model_config.logprobs_mode for e in (compiled, crowded, bidirectional)}
    assert modes == {"raw_logprobs", "processed_logprobs", "processed_logits"}


def test_preemption(crowded: Engine) -> None:
    """Seeds, penalties, words, log-probabilities: nothing is forgotten with the KV pages."""
    samplings = [
        replace(SAMPLED, repetition_penalty=1.3),
        replace(SAMPLED, frequency_penalty=0.8, top_k=9),
        Sampling(presence_penalty=1.5, min_tokens=50),
        replace(SAMPLED, bad_words=tuple(pairwise(range(20, 120))), min_p=0.05),
    ]
    asks = [
        Ask(
            prompt(40 + 3 * i, seed=230 + i),
            max_tokens=60,
            threshold=(1.0, 0.4)[i % 2],
            sampling=sampling,
            logprobs=3,
        )
        for i, sampling in enumerate(samplings)
    ]
    crowded.assert_exact(asks)
    assert sum(len(step.preempted) for step in crowded.forwards) > 1
