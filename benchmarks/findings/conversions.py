"""One conversion of the AR parent: `edlm convert` in this process, with the options of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vllm_edlm.train.command import recipe_defaults
from vllm_edlm.train.convert import convert
from vllm_edlm.train.recipe import Recipe

STEPS = 300
BATCH = 32
ROW_LENGTH = 32  # tokens of a question with its answer
LEARNING_RATE = 2e-3
BLOCK_LENGTH = 8
LORA_SCALE = 2.0


@dataclass(frozen=True)
class Conversion:
    """What of a conversion the findings vary; the defaults are the base of every comparison."""

    pattern: str = "block_clean"
    token_shift: bool = False
    half_life_ratio: float | None = None  # None: uniform noise
    block_length: int = BLOCK_LENGTH
    steps: int = STEPS
    learning_rate: float = LEARNING_RATE
    lora_rank: int | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """A folder's name, of all that differs from the base."""
        base = type(self)()
        parts = [
            f"{key}-{value}" for key, value in vars(self).items() if value != getattr(base, key)
        ]
        return "_".join(parts) or "base"

    def recipe(self, parent: Path, data: Path, output: Path) -> Recipe:
        """The whole recipe: the command's defaults, but for what is said here."""
        varied = dict(vars(self))
        ratio = varied.pop("half_life_ratio")
        if ratio is None:
            varied["noise"] = "uniform"
        else:
            varied |= {"noise": "position", "half_life_ratio": ratio}
        fixed = {
            "model": str(parent),
            "data": str(data),
            "output": output,
            "growth": (),
            # One scale of the adapters, alpha / rank, whatever their rank.
            "lora_alpha": LORA_SCALE * (self.lora_rank or 1),
            "row_length": ROW_LENGTH,
            "batch_size": BATCH,
            "min_learning_rate_ratio": 0.05,
            "warmup_steps": min(20, self.steps // 5),
            "bf16": False,
            "save_steps": 200,
            "log_steps": 50,
            "dtype": "float32",
        }
        return Recipe(**(recipe_defaults() | fixed | varied))


def run_conversion(conversion: Conversion, parent: Path, data: Path, output: Path) -> None:
    """Convert, or go on from the last checkpoint; nothing where the export is whole."""
    if not (output / "config.json").exists():
        convert(conversion.recipe(parent, data, output))
