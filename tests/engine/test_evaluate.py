"""`edlm eval` and the harness' model `edlm` on one engine: their figures are the oracle's."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import EOS_ID, CheckpointFactory, CheckpointSpec
from evaluated import (
    CELLS,
    PROMPTS,
    B,
    Evaluated,
    answer,
    likelihoods,
    spelt,
    usage,
    write_tasks,
)
from harness import MAX_MODEL_LEN, SMALL_ENGINE, Ask, Engine, Served, prompt, small_environment
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from oracle_model import OracleModel
from typer.testing import CliRunner

from vllm_edlm.cli import app
from vllm_edlm.evaluate import engine
from vllm_edlm.evaluate.grid import Cell
from vllm_edlm.evaluate.harness import BlockDiffusionHarness
from vllm_edlm.evaluate.order import log_of
from vllm_edlm.evaluate.tasks import TaskExam, TaskExaminee


@pytest.fixture(scope="module")
def served(checkpoint: CheckpointFactory) -> Iterator[Evaluated]:
    path = checkpoint(CheckpointSpec(block_length=B, seed=7))
    with small_environment():
        lm = BlockDiffusionHarness(
            str(path), threshold=0.4, batch_size="auto", enforce_eager=True, **SMALL_ENGINE
        )
    yield Evaluated(lm, Engine(Served(B, "block_causal"), lm.model, OracleModel.load(path)), path)
    engine.stop(lm.model)


@pytest.fixture
def one_engine(served: Evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands find the engine that is there already."""
    for name in ("vllm_edlm.evaluate.engine", "lm_eval.models.vllm_causallms"):
        monkeypatch.setattr(f"{name}.LLM", lambda **arguments: served.lm.model)
    for name in ("engine", "tasks"):
        monkeypatch.setattr(f"vllm_edlm.evaluate.{name}.stop", lambda llm: None)


def test_generation_is_the_oracles(served: Evaluated) -> None:
    options = {"until": [], "max_gen_toks": 24}
    requests = [
        Instance("generate_until", {}, (spelt(tokens), options), i)
        for i, tokens in enumerate(PROMPTS)
    ]
    cell = Cell("confidence", 0.4, B, B)
    expected = [answer(served.expected(tokens, cell)) for tokens in PROMPTS]
    assert served.lm.generate_until(requests) == expected


@pytest.mark.parametrize("context", [1, 7, 8, 21])
@pytest.mark.parametrize("continuation", [1, 9])
def test_the_chain_is_a_dense_forward_for_each_token(
    served: Evaluated, context: int, continuation: int
) -> None:
    text = prompt(context + continuation, seed=910 + context)
    pair = list(text[:context]), list(text[context:])
    ((value, is_greedy),) = served.lm._loglikelihood_tokens([(None, *pair)])
    assert value == pytest.approx(served.chain(*pair), abs=1e-4)
    assert not is_greedy


def test_what_is_generated_left_to_right_is_greedy(served: Evaluated) -> None:
    tokens = PROMPTS[0]
    one_by_one = Cell("prefix", 1.0, B, B)
    text = served.expected(tokens, one_by_one).token_ids[:9]
    requests = [(None, list(tokens), text), (None, list(tokens), [*text[:8], text[8] ^ 1])]
    likelihoods = served.lm._loglikelihood_tokens(requests)
    assert [is_greedy for _, is_greedy in likelihoods] == [True, False]


def test_a_long_context_is_cut_from_the_left(served: Evaluated) -> None:
    text = [*prompt(200, seed=920), *prompt(100, seed=921)]
    continuation = [20, 30, 40]
    ((value, _),) = served.lm._loglikelihood_tokens([(None, text, continuation)])
    kept = text[3 - MAX_MODEL_LEN :]
    ((same, _),) = served.lm._loglikelihood_tokens([(None, kept, continuation)])
    assert value == same


def test_a_continuation_that_does_not_fit_is_refused(served: Evaluated) -> None:
    with pytest.raises(ValueError, match=rf"length \({MAX_MODEL_LEN} tokens\), got 250"):
        served.lm._loglikelihood_tokens([(None, [5], [6] * MAX_MODEL_LEN)])


def test_rolling_likelihood_is_the_chain_from_the_end_token(served: Evaluated) -> None:
    text = prompt(20, seed=930)
    (value,) = served.lm.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (spelt(text),), 0)]
    )
    assert value == pytest.approx(served.chain([EOS_ID], text), abs=2e-4)


@pytest.mark.parametrize("context", [6, 7, 8])
def test_of_one_token_bound_and_chain_agree(served: Evaluated, context: int) -> None:
    text = list(prompt(context, seed=940))
    ((chain, is_greedy),) = served.lm._loglikelihood_tokens([(None, text, [60])])
    assert served.lm.bound.likelihood(text, [60]) == (pytest.approx(chain, abs=1e-4), is_greedy)


def test_likelihood_by_the_bound(served: Evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.lm, "likelihood", "bound")
    pair = list(prompt(9, seed=950)), list(prompt(12, seed=951))
    (found,) = served.lm._loglikelihood_tokens([(None, *pair)])
    assert found == served.lm.bound.likelihood(*pair)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, served: Evaluated) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, served)
    return folder


def test_tasks_over_the_grid(
    served: Evaluated, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.lm, "request_options", {})
    examinee = TaskExaminee(served.lm, TaskExam.load(["letters"], tasks))
    right = [answer(served.expected(tokens, CELLS[0])) for tokens in PROMPTS]
    for cell in CELLS:
        (result,) = examinee.sit(cell.extra_args)
        expected = [served.expected(tokens, cell) for tokens in PROMPTS]
        graded = [answer(got) == wanted for got, wanted in zip(expected, right, strict=True)]
        assert result.accuracy == pytest.approx(sum(graded) / 3)
        assert result.usage == usage(expected)


def test_multiple_choice(served: Evaluated, tasks: Path) -> None:
    report = simple_evaluate(
        model=served.lm,
        tasks=["choices"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = report["samples"]["choices"]
    for tokens, sample in zip(PROMPTS, samples, strict=True):
        found = [value for (value, _) in sample["filtered_resps"]]
        assert found == pytest.approx(likelihoods(served, tokens), abs=1e-4)


@pytest.mark.usefixtures("one_engine")
def test_harness_command(
    served: Evaluated, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generation and multiple choice in one run of the harness' own command."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    words = ["run", "--model", "edlm", "--model_args", f"pretrained={served.path},threshold=0.5"]
    words += ["--tasks", "letters,choices", "--include_path", str(tasks), "--batch_size", "auto"]
    words += ["--output_path", str(tmp_path)]
    result = CliRunner().invoke(app, ["eval", "harness", *words])
    assert result.exit_code == 0, result.output
    (report,) = tmp_path.glob("*/results_*.json")
    results = json.loads(report.read_text())["results"]
    assert results["letters"]["exact_match,none"] == 1.0
    values = [likelihoods(served, tokens) for tokens in PROMPTS]
    right = [value.index(max(value)) == 0 for value in values]
    assert results["choices"]["acc,none"] == pytest.approx(sum(right) / 3)


def test_tasks_of_likelihoods_have_no_grid(tasks: Path) -> None:
    with pytest.raises(ValueError, match="'choices' asks for multiple_choice"):
        TaskExam.load(["choices"], tasks)


def test_steps_of_every_position_are_the_oracles(served: Evaluated) -> None:
    log = log_of(served.lm.model)
    for seed, cell in enumerate([*CELLS[:2], Cell("factor", 0.8, B, B)]):
        # To the end of a block: the last canvas comes when the request is over.
        ask = Ask(
            prompt(21, seed=960 + seed), 27, cell.threshold, cell.max_steps, reveal=cell.reveal
        )
        (expected,) = served.engine.assert_exact([ask])
        blocks = log.take_blocks()
        assert [block.steps for block in blocks] == expected.denoise_steps
        counts = [block.revealed.count(i + 1) for block in blocks for i in range(block.steps)]
        assert counts == expected.revealed
        assert [block.known for block in blocks] == [5, 0, 0, 0]


@pytest.fixture
def questions(tmp_path: Path, served: Evaluated) -> Path:
    path = tmp_path / "questions.jsonl"
    with path.open("w") as file:
        for tokens in PROMPTS:
            right = answer(served.expected(tokens, CELLS[0]))
            file.write(json.dumps({"prompt": spelt(tokens), "answer": right}) + "\n")
    return path


@pytest.mark.usefixtures("one_engine")
def test_accuracy_command(served: Evaluated, questions: Path, tmp_path: Path) -> None:
    words = ["eval", "accuracy", served.path, "--data", questions, "--no-chat", "--max-tokens", 24]
    words += ["--reveal", "confidence", "--reveal", "steps", "--threshold", 0.5, "--threshold", 0.9]
    words += ["--max-steps", 8, "--max-steps", 2, "--output", tmp_path / "results"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "results" / "accuracy.json").read_text())
    assert len(content["rows"]) == 6
    for row in content["rows"]:
        cell = Cell(row["reveal"], row["threshold"], row["block length"], row["max steps"])
        results = [served.expected(tokens, cell) for tokens in PROMPTS]
        spent = usage(results)
        assert row["tokens per forward"] == pytest.approx(spent.tokens / spent.forwards)
    assert content["rows"][0]["accuracy"] == 1.0
    assert (tmp_path / "results" / "accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("one_engine")
def test_accuracy_command_on_tasks(served: Evaluated, tasks: Path, tmp_path: Path) -> None:
    words = ["eval", "accuracy", served.path, "--task", "letters", "--include-path", tasks]
    words += ["--threshold", 0.5, "--limit", 2, "--max-tokens", 12, "--output", tmp_path]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "accuracy.json").read_text())["rows"]
    spent = usage([served.expected(tokens, CELLS[0], 12) for tokens in PROMPTS[:2]])
    assert (row["task"], row["metric"]) == ("letters", "exact_match,none")
    assert row["tokens per answer"] == spent.tokens / 2
    assert row["tokens per forward"] == pytest.approx(spent.tokens / spent.forwards)


@pytest.mark.usefixtures("one_engine")
def test_order_command(served: Evaluated, questions: Path, tmp_path: Path) -> None:
    words = ["eval", "order", served.path, "--data", questions, "--no-chat", "--max-tokens", 40]
    words += ["--reveal", "prefix", "--threshold", 1.0, "--output", tmp_path / "results"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "results" / "order.json").read_text())
    whole = [row for row in content["rows"] if row["position"] == B - 1]
    assert whole[0]["share of steps"] == 1.0
    assert whole[0]["in the first step"] < 0.5
    assert any("prefix" in note and ": 1.000, mean" in note for note in content["notes"])


def test_a_chat_template_is_used_where_there_is_one(served: Evaluated) -> None:
    chat, plain = (
        engine.ask(served.lm.model, ["ab"], 8, None, chat=chat)[0].prompt_token_ids
        for chat in (None, False)
    )
    assert spelt(plain) == "ab"
    assert spelt(chat) == "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
