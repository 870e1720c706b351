"""`vllm run-batch` over a file of requests, and `vllm chat`."""

import json
from pathlib import Path
from typing import Any

from serving import TINY_FLAGS, TINY_NAME, Server, run_command

from examples.convert.word_problems import Problem, grade, problems
from examples.demo import TINY_MATH


def request(name: str, problem: Problem, **options: Any) -> str:
    """One line of a batch file; vLLM takes chats there, but no completions."""
    chat = [{"role": "user", "content": problem.question}]
    body = {"model": TINY_NAME, "messages": chat, "temperature": 0, "max_tokens": 64} | options
    url = "/v1/chat/completions"
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body})


def test_run_batch(tiny_folder: Path, tmp_path: Path) -> None:
    questions = list(problems("heldout", 7, 4))
    lines = [request(str(i), question) for i, question in enumerate(questions)]
    lines.append(request("bad", questions[0], vllm_xargs={"diffusion_threshold": 2}))
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    run_command(
        *("vllm", "run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--model", str(TINY_MATH)),
        *("--served-model-name", TINY_NAME, "--tokenizer", str(tiny_folder / "tokenizer")),
        *TINY_FLAGS,
        cwd=tmp_path,
    )
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    answers = {line["custom_id"]: line for line in written}
    assert len(written) == len(answers) == len(lines)
    for i, question in enumerate(questions):
        (choice,) = answers[str(i)]["response"]["body"]["choices"]
        assert grade(choice["message"]["content"], question.result)
    assert answers["bad"]["response"]["status_code"] == 400
    assert "diffusion_threshold" in json.dumps(answers["bad"])


def test_vllm_chat(tiny_math: Server, tmp_path: Path) -> None:
    """One question on the command line, the answer streamed to the terminal."""
    (question,) = problems("heldout", 7, 1)
    command = ("vllm", "chat", "--url", f"{tiny_math.address}/v1", "--quick", question.question)
    output = run_command(*command, "--stats", cwd=tmp_path)
    answer, _, figures = output.partition("TTFT:")
    assert grade(answer, question.result)
    assert "tokens/s" in figures
