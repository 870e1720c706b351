"""Measuring clients: `vllm bench serve` and `lm_eval`."""

import json
from pathlib import Path
from typing import Any

import pytest
from serving import NAME, TINY_NAME, RandomServer, Server, run_command

from examples.convert.word_problems import write_jsonl

TASKS = Path(__file__).parent / "lm_eval_tasks"
COMMITTED = "vllm:diffusion_num_committed_tokens_total"
POSITIONS = "vllm:diffusion_num_canvas_positions_total"
NUM_QUESTIONS = 20


def test_bench_serve(server: RandomServer, tmp_path: Path) -> None:
    """64 requests of mixed lengths are answered, and the diffusion figures are the server's."""
    before = server.counter(COMMITTED), server.counter(POSITIONS)
    output = run_command(
        *("vllm", "bench", "serve", "--base-url", server.address, "--model", NAME),
        *("--tokenizer", str(server.tokenizer_path), "--dataset-name", "random"),
        *("--random-input-len", "60", "--random-output-len", "40", "--random-range-ratio", "0.8"),
        *("--num-prompts", "64", "--ignore-eos", "--temperature", "0", "--max-concurrency", "16"),
        *("--save-result", "--save-detailed", "--result-filename", "bench.json"),
        cwd=tmp_path,
    )
    result = json.loads((tmp_path / "bench.json").read_text())
    assert (result["completed"], result["failed"]) == (64, 0)
    assert len(set(result["input_lens"])) > 10 < len(set(result["output_lens"]))
    assert result["total_output_tokens"] == sum(result["output_lens"]) > 64
    assert "Diffusion Decoding" in output
    committed, positions = server.counter(COMMITTED), server.counter(POSITIONS)
    assert result["diffusion_committed_tokens"] == committed - before[0]
    assert result["diffusion_canvas_positions"] == positions - before[1]
    assert result["diffusion_committed_tokens"] >= result["total_output_tokens"]
    assert result["diffusion_committed_per_step"] > 1


@pytest.mark.parametrize(
    ("model", "endpoint"),
    [("local-completions", "completions"), ("local-chat-completions", "chat/completions")],
)
def test_lm_eval(tiny_math: Server, tmp_path: Path, model: str, endpoint: str) -> None:
    """The harness gets nearly every held-out question right, as the model does."""
    write_jsonl(tmp_path / "word_problems.jsonl", "heldout", seed=7, count=NUM_QUESTIONS)
    address = f"model={TINY_NAME},base_url={tiny_math.address}/v1/{endpoint},num_concurrent=4"
    tokenizer = f",tokenizer={tiny_math.tokenizer_path},tokenizer_backend=huggingface"
    run_command(
        *("lm_eval", "run", "--model", model, "--apply_chat_template"),
        *("--model_args", address + (tokenizer if model == "local-completions" else "")),
        *("--tasks", "word_problems", "--include_path", str(TASKS)),
        *("--output_path", "results", "--log_samples"),
        cwd=tmp_path,
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path / "huggingface"),
    )
    (report,) = tmp_path.glob("results/*/results_*.json")
    score = json.loads(report.read_text())["results"]["word_problems"]
    assert score["exact_match,final-number"] >= 0.9
    (samples,) = tmp_path.glob("results/*/samples_*.jsonl")
    answers: list[dict[str, Any]] = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(answers) == NUM_QUESTIONS
    assert all("####" in answer["resps"][0][0] for answer in answers)
