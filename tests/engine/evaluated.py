"""The harness' model `edlm` beside the oracle, and tasks that the oracle knows the answers of."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoints import EOS_ID, MASK_ID, VOCABULARY
from harness import Ask, Engine, prompt
from oracle import Blocks, OracleResult

from vllm_edlm.evaluate.engine import Usage
from vllm_edlm.evaluate.grid import Cell
from vllm_edlm.evaluate.harness import BlockDiffusionHarness

B = 8
CELLS = [Cell("confidence", 0.5, B, B), Cell("steps", None, B, 2), Cell("prefix", 0.3, 4, 4)]
CHOICES = ["ab", "ac", "b"]
PROMPTS = [prompt(17, seed=900), prompt(24, seed=901), prompt(40, seed=902)]


@dataclass(frozen=True)
class Evaluated:
    """The harness' model, and the oracle beside its engine."""

    lm: BlockDiffusionHarness
    engine: Engine
    path: Path

    def expected(self, tokens: Sequence[int], cell: Cell, max_tokens: int = 24) -> OracleResult:
        ask = Ask(
            tuple(tokens),
            max_tokens,
            cell.threshold,
            cell.max_steps,
            ignore_eos=False,
            reveal=cell.reveal,
            canvas_length=cell.block_length,
        )
        return self.engine.expected(ask)

    def chain(self, context: Sequence[int], continuation: Sequence[int]) -> float:
        """One dense forward for each token, everything from it on masked."""
        text, total = [*context, *continuation], 0.0
        for position in range(len(context), len(text)):
            end = -(-(position + 1) // B) * B
            inputs = torch.tensor([*text[:position], *[MASK_ID] * (end - position)])
            logits = self.engine.oracle.logits(inputs, Blocks(B, "block_causal", 0).mask(end))
            total += logits[position].log_softmax(-1)[text[position]].item()
        return total


def spelt(tokens: Sequence[int]) -> str:
    return "".join(VOCABULARY[token] for token in tokens)


def answer(result: OracleResult) -> str:
    tokens = result.token_ids
    return spelt(tokens[:-1] if tokens[-1] == EOS_ID else tokens)


def usage(results: Sequence[OracleResult]) -> Usage:
    return Usage(
        len(results),
        sum(len(result.token_ids) for result in results),
        sum(sum(result.denoise_steps) for result in results),
    )


def likelihoods(served: Evaluated, tokens: Sequence[int]) -> list[float]:
    """Of all choices."""
    spelt = [[VOCABULARY.index(letter) for letter in choice] for choice in CHOICES]
    return [served.chain(tokens, choice) for choice in spelt]


def write_tasks(folder: Path, served: Evaluated) -> None:
    """A task that generates, graded by the answers of the first cell, and one with choices."""
    rows = [
        {
            "prompt": spelt(tokens),
            "answer": answer(served.expected(tokens, CELLS[0])),
            "choices": CHOICES,
        }
        for tokens in PROMPTS
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
    }
    letters = common | {
        "task": "letters",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "max_gen_toks": 24},
        "metric_list": [{"metric": "exact_match"}],
    }
    choices = common | {
        "task": "choices",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    for task in (letters, choices):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(task))
