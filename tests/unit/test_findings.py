"""The reproduction of the paper's findings: its task, its plan, its verdicts."""

from collections import Counter
from itertools import pairwise, product

import pytest

from benchmarks.findings.conversions import BATCH, ROW_LENGTH, STEPS, Conversion
from benchmarks.findings.design import SEEDS, Arm, Claim, Finding, with_seed
from benchmarks.findings.plan import BASE, FINDINGS, work
from benchmarks.findings.scores import Point, Score, grade
from benchmarks.findings.tables import Measured, directions_table, finding_table
from benchmarks.findings.task import (
    ANSWER_TOKENS,
    OPERATIONS,
    PROMPT_TOKENS,
    STATES,
    TABLE,
    Item,
    build_tokenizer,
    items,
    run_machine,
    split_of,
)
from benchmarks.findings.verdicts import (
    DISAGREE,
    FAILS,
    HOLDS,
    NO_DIFFERENCE,
    UNKNOWN,
    judge,
    word_for,
)
from vllm_edlm.train.chat import chat_tokens


def test_the_machine_is_total_and_mostly_invertible() -> None:
    assert set(TABLE) == set(OPERATIONS)
    assert all(len(row) == len(STATES) and set(row) <= set(STATES) for row in TABLE.values())
    assert sorted(len(set(row)) for row in TABLE.values()) == [1, 1, 4, 4, 4, 4]


def test_an_answer_is_the_states_in_order() -> None:
    assert run_machine("a", "014") == "b" + "a" + "a"
    for question, answer in items("train", 0, 20):
        states = question[-1] + answer
        for operation, (before, after) in zip(question[:-1], pairwise(states), strict=True):
            assert TABLE[operation][STATES.index(before)] == after


def test_no_heldout_question_is_trained_on() -> None:
    train = {item.question for item in items("train", 0, 3000)}
    heldout = {item.question for item in items("heldout", 0, 300)}
    assert len(train) == 3000
    assert len(heldout) == 300
    assert not train & heldout
    assert {split_of(question) for question in train} == {"train"}
    assert {split_of(question) for question in heldout} == {"heldout"}


def test_items_depend_on_split_and_seed_alone() -> None:
    assert list(items("train", 0, 5)) == list(items("train", 0, 9))[:5]
    assert list(items("train", 0, 5)) != list(items("train", 1, 5))


def test_a_document_fills_a_row_with_the_answer_in_the_loss() -> None:
    tokenizer = build_tokenizer()
    question, answer = next(items("train", 0, 1))
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    tokens, in_loss = chat_tokens(chat, tokenizer)
    assert in_loss == [False] * PROMPT_TOKENS + [True] * ANSWER_TOKENS
    assert len(tokens) == ROW_LENGTH
    assert tokenizer.decode(tokens[:-1]) == question + answer
    assert tokens[-1] == tokenizer.eos_token_id


def test_every_conversion_is_trained_once_a_seed() -> None:
    conversions = [conversion for conversion, _ in work()]
    assert len(conversions) == len(set(conversions))
    names = [conversion.name for conversion in conversions]
    assert len(names) == len(set(names)), "two conversions would share a folder"
    assert set(Counter(c.seed for c in conversions).values()) == {len(conversions) // len(SEEDS)}
    assert [c.seed for c in conversions] == sorted(c.seed for c in conversions)


def test_the_plan_measures_every_figure_that_a_direction_needs() -> None:
    planned = dict(work())
    for finding in FINDINGS:
        arms = {arm.label: arm for arm in finding.arms}
        assert len(arms) == len(finding.arms)
        for claim in finding.claims:
            for label, where in (*claim.more, *claim.less):
                conversion = with_seed(arms[label].conversion, SEEDS[-1])
                assert finding.drift or where in planned[conversion], (claim.text, label, where)


@pytest.mark.parametrize(
    ("name", "axis", "values"),
    [
        ("noise", "half_life_ratio", {None, 0.5, 0.25, 0.1, 0.05}),
        ("blocks", "block_length", {2, 4, 8, 16}),
        ("tokens", "steps", {STEPS // 4, STEPS // 2, STEPS, 2 * STEPS}),
        ("lora", "lora_rank", {4, 16, None}),
    ],
)
def test_a_finding_varies_its_own_axis_alone(name: str, axis: str, values: set[object]) -> None:
    (finding,) = (finding for finding in FINDINGS if finding.name == name)
    assert {getattr(arm.conversion, axis) for arm in finding.arms} == values
    for arm in finding.arms:
        assert vars(arm.conversion) | {axis: None} == vars(BASE) | {axis: None}


def test_points_have_whole_steps() -> None:
    for conversion, points in work():
        for point in points:
            assert point.block_length % point.parallel == 0, conversion
            steps = point.extra_args["diffusion_max_steps"]
            assert steps * point.parallel == point.block_length


def test_a_recipe_is_the_commands_default_but_for_what_is_said(tmp_path) -> None:
    recipe = Conversion(half_life_ratio=0.1, steps=50).recipe(tmp_path, tmp_path, tmp_path / "out")
    assert (recipe.noise, recipe.half_life_ratio, recipe.steps) == ("position", 0.1, 50)
    assert (recipe.batch_size, recipe.weight_decay, recipe.teacher) == (BATCH, 0.0, None)
    assert Conversion(lora_rank=4).recipe(tmp_path, tmp_path, tmp_path / "out").lora_alpha == 8
    assert Conversion().recipe(tmp_path, tmp_path, tmp_path / "out").noise == "uniform"


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ((0.3, 0.02, 0.1), HOLDS),
        ((-0.3, -0.02, -0.1), FAILS),
        ((0.3, -0.02, 0.1), DISAGREE),
        ((0.3, 0.005, 0.1), DISAGREE),
        ((0.01, -0.01, 0.0), NO_DIFFERENCE),
        ((0.3,), HOLDS),
        ((), UNKNOWN),
    ],
)
def test_verdicts(differences: tuple[float, ...], word: str) -> None:
    assert word_for(differences, margin=0.01) == word


def test_seeds_are_compared_pairwise_and_only_where_both_sides_have_them() -> None:
    claim = Claim("more", (("a", "x"),), (("b", "x"),))
    values = {("a", "x"): {0: 0.5, 1: 0.9, 2: 1.0}, ("b", "x"): {0: 0.4, 1: 0.95}}
    verdict = judge(claim, values, margin=0.01)
    assert verdict.word == DISAGREE
    assert verdict.differences == pytest.approx((0.1, -0.05))


def test_grades() -> None:
    expected = [Item("q", "abca"), Item("q", "abca"), Item("q", "abca")]
    score = grade(["abca", "abdd", "ab"], expected, 4.0)
    assert vars(score) == pytest.approx(vars(Score(1 / 3, 2 / 3, 4.0)))


def test_tables_say_what_became_of_each_direction() -> None:
    at = Point(8, 2)
    arms = (Arm("new", BASE, (at,), ("38.41",)), Arm("old", Conversion(steps=1), (at,)))
    claim = Claim("new beats old", (("new", at),), (("old", at),))
    finding = Finding("toy", "A toy", arms, (claim,))
    exact = {arms[0].label: (0.9, 0.8, 0.7), arms[1].label: (0.5, 0.6, 0.1)}
    scores = {
        with_seed(arm.conversion, seed): {at: Score(exact[arm.label][seed], 0.9, 2.0)}
        for arm, seed in product(arms, SEEDS)
    }
    measured = Measured(scores, {}, Score(1.0, 1.0, 1.0), 200)
    first, second = finding_table(finding, measured).rows
    assert first["right answers"] == pytest.approx(0.8)
    assert [first[f"right answers, seed {seed}"] for seed in SEEDS] == [0.9, 0.8, 0.7]
    assert (first["paper (%)"], second["paper (%)"]) == ("38.41", None)
    (row,) = directions_table([finding], measured).rows
    assert (row["here"], row["seeds"]) == (HOLDS, 3)
    assert row["mean difference"] == pytest.approx(0.4)
