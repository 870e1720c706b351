"""Exports of `edlm convert`, served: the tokens that the trainer's own forward would choose.

Every family, axis and layout is in some case. The decoder beside the engine is the oracle's, over
the model that was trained: each step is a forward over a joint sequence, as in training. So what
is trained, what is exported and what is served are held together.
"""

import copy
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import MASK_ID, VOCABULARY, VOCABULARY_SIZE, CheckpointFactory, CheckpointSpec
from harness import Ask, Engine, Served, prompt
from torch import Tensor
from typer.testing import CliRunner

import vllm_edlm.train.convert as convert_module
from vllm_edlm.cli import app
from vllm_edlm.options import PROMPT_ATTENTIONS
from vllm_edlm.train.joint import join, predictors
from vllm_edlm.train.model import BlockDiffusionLM
from vllm_edlm.train.noise import Corruption
from vllm_edlm.train.objective import Objective

B = 8
# Some reveal one position a step, some several.
THRESHOLDS = (1.0, 0.5, 0.1)
RECIPE = (
    *("--row-length", "64", "--batch-size", "4", "--steps", "8", "--warmup-steps", "2"),
    *("--learning-rate", "3e-3", "--no-bf16", "--dtype", "float32", "--block-length", f"{B}"),
)


# Random models stand for AR models; their weights spread confidences. Llama's have biases.
PARENTS = {
    "qwen3": CheckpointSpec("EfficientDLM", "plain", prompt_attention=None),
    "qwen2": CheckpointSpec("EfficientDLMQwen2ForCausalLM", "plain", prompt_attention=None),
    "llama": CheckpointSpec(
        "EfficientDLMLlamaForCausalLM", "plain", prompt_attention=None, attention_bias=True
    ),
}


@dataclass(frozen=True)
class Case:
    """An AR model's family, how it is converted, and what the export is to be served as."""

    family: str
    options: tuple[str, ...]
    served: Served


CASES = {
    "clean context": Case("qwen3", (), Served(B, "block_causal")),
    "noisy context": Case("llama", ("--pattern", "block_noisy"), Served(B, "block_causal")),
    "token shift": Case(
        "qwen2",
        ("--token-shift", "--layout", "plain"),
        Served(B, "block_causal", token_shift=True),
    ),
    "joint": Case(
        "llama", ("--ar-loss-weight", "1", "--layout", "plain"), Served(B, "causal_grid")
    ),
    "joint, token shift": Case(
        "qwen3",
        ("--ar-loss-weight", "1", "--token-shift", "--layout", "plain"),
        Served(B, "causal_grid", token_shift=True),
    ),
    "LoRA": Case("qwen2", ("--lora-rank", "4"), Served(B, "block_causal")),
    "bidirectional": Case("qwen2", ("--pattern", "bidirectional"), Served(B, "bidirectional")),
    "bidirectional, token shift": Case(
        "llama",
        ("--pattern", "bidirectional", "--token-shift"),
        Served(B, "bidirectional", token_shift=True),
    ),
}


@dataclass(frozen=True)
class JointForwards:
    """The trained model as the oracle's decoder asks it, by the trainer's forward.

    Whatever is masked stands in the noisy copy, every block before it in the clean half if training
    has one: the mask that the oracle made is not looked at.
    """

    causal_lm: Any
    objective: Objective

    @torch.no_grad()
    def logits(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits [T, V] of `tokens` [T]; only the rows that predict a masked token are set."""
        masked = tokens[None] == MASK_ID
        position = torch.arange(len(tokens))[None]
        row = {
            "tokens": tokens[None],
            "in_loss": torch.ones_like(masked),
            "position_ids": position,
            "document_ids": torch.zeros_like(position),
        }
        corruption = Corruption(masked, torch.ones(masked.shape))
        batch = join(row, [corruption], self.objective, B, drop_unused=False)
        hidden = BlockDiffusionLM(self.causal_lm, self.objective).hidden_states(batch)
        predicting = masked[0].nonzero()[:, 0] - int(self.objective.token_shift)
        logits = torch.full((len(tokens), VOCABULARY_SIZE), torch.nan)
        logits[predicting] = self.causal_lm.get_output_embeddings()(hidden[predictors(batch)])
        return logits


@dataclass(frozen=True)
class StockForwards:
    """The trained model under the oracle's mask.

    Training a bidirectional model shows the prompt what comes after it; a served prompt has been
    run before.
    """

    causal_lm: Any

    @classmethod
    def of(cls, causal_lm: Any) -> "StockForwards":
        """A copy of the trained model with stock attention."""
        stock = copy.deepcopy(causal_lm)
        stock.set_attn_implementation("sdpa")
        return cls(stock)

    @torch.no_grad()
    def logits(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits [T, V] of `tokens` [T] under `mask` [T, T]."""
        logits: Tensor = self.causal_lm(tokens[None], attention_mask=mask[None, None]).logits
        return logits[0]


def write_texts(path: Path) -> None:
    """Rising runs of letters, with a step of their own each."""
    rng = random.Random(0)
    runs = [
        range(rng.randint(5, 40), 150, rng.randint(1, 4))[: rng.randint(5, 60)] for _ in range(99)
    ]
    path.write_text("\n\n".join("".join(VOCABULARY[i] for i in run) for run in runs))


@dataclass(frozen=True)
class Exported:
    """The engine over an export, with the trainer's model as its oracle's."""

    engine: Engine
    stock: StockForwards

    def served_otherwise(self, ask: Ask, prompt_attention: str) -> list[int]:
        """The answer to `ask` if prompts were seen in another way than in training."""
        served = replace(self.engine.served, prompt_attention=prompt_attention)
        other = replace(self.engine, served=served, oracle=self.stock)
        return other.expected(ask).token_ids


def convert(parent: Path, folder: Path, options: tuple[str, ...]) -> tuple[Any, Objective]:
    """Convert `parent` to `folder`/out; the trained model, adapters and all, and its aim."""
    write_texts(folder / "text.txt")
    trained: list[tuple[Any, Objective]] = []
    train = convert_module.train

    def spy(trainer: Any, recipe: Any) -> Any:
        causal_lm = train(trainer, recipe)
        trained.append((copy.deepcopy(causal_lm).eval(), trainer.objective))
        return causal_lm

    command = ["convert", str(parent), "--data", f"{folder}/text.txt"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_module, "train", spy)
        result = CliRunner().invoke(
            app, [*command, "--output", f"{folder}/out", *RECIPE, *options, "--check"]
        )
    assert result.exit_code == 0, result.output
    return trained[0]


@pytest.fixture(scope="module", params=CASES)
def exported(
    request: pytest.FixtureRequest,
    checkpoint: CheckpointFactory,
    tmp_path_factory: pytest.TempPathFactory,
) -> Exported:
    case, folder = CASES[request.param], tmp_path_factory.mktemp("export")
    causal_lm, objective = convert(checkpoint(PARENTS[case.family]), folder, case.options)
    engine = Engine.start(folder / "out", case.served, enforce_eager=True)
    stock = StockForwards.of(causal_lm)
    whole_prompt = case.served.prompt_attention == "bidirectional"
    engine.oracle = stock if whole_prompt else JointForwards(causal_lm, objective)
    return Exported(engine, stock)


# Around whole blocks.
PROMPTS = [prompt(length, seed=length) for length in (1, B - 1, B, B + 1, 3 * B, 45)]


def test_served_tokens_are_the_trainers(exported: Exported) -> None:
    """Answers of several blocks; all prompts at once, then one alone."""
    asks = [Ask(ids, 3 * B + 2, threshold) for ids in PROMPTS for threshold in THRESHOLDS]
    results = exported.engine.assert_exact(asks)
    exported.engine.assert_exact(asks[4:5])
    most = {
        threshold: max(max(result.revealed) for result in results[i :: len(THRESHOLDS)])
        for i, threshold in enumerate(THRESHOLDS)
    }
    assert most[1.0] <= 2 < most[0.1], "a threshold did not do what it is here for"
    assert len({token for result in results for token in result.token_ids}) > 20, "too dull"


def test_equal_tokens_say_how_prompts_were_seen(exported: Exported) -> None:
    """Else the test above would show little: any other way gives other tokens."""
    asks = [Ask(ids, 3 * B + 2, threshold=0.5) for ids in PROMPTS]
    own = exported.engine.served.prompt_attention
    answers = {
        mode: [exported.served_otherwise(ask, mode) for ask in asks] for mode in PROMPT_ATTENTIONS
    }
    assert answers[own] == [exported.engine.expected(ask).token_ids for ask in asks]
    assert [mode for mode in answers if answers[mode] == answers[own]] == [own]
