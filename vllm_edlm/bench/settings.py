"""What all tables of a run share, and how they start engines."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_edlm.bench.engine import Engine
from vllm_edlm.bench.environment import Environment
from vllm_edlm.bench.reference import Reference
from vllm_edlm.bench.roofline import Rates
from vllm_edlm.bench.shapes import TINY, Shape, write_config

REPOSITORY = Path(__file__).resolve().parents[2]
TINY_MATH = REPOSITORY / "examples/checkpoints/tiny-math"
TINY_MATH_AR = REPOSITORY / "runs/tiny-math/ar"
# The largest block length of any table; requests ask for shorter ones.
BLOCK_LENGTH = 32
MAX_MODEL_LEN = 4608
MAX_REQUESTS = 64


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Attributes:
        environment: of every measured process.
        work: folder for files that nobody needs afterwards.
        rates: the machine's own, measured in that environment.
        quick: a tiny shape and few cells, to see that a table can be made.
        rounds: how often every figure is measured.
        tiny_math_ar: the AR model that tiny-math was converted from.
    """

    environment: Environment
    work: Path
    rates: Rates
    quick: bool = False
    rounds: int = 2
    tiny_math_ar: Path = TINY_MATH_AR

    @property
    def shape(self) -> Shape:
        """The shape of models with random weights."""
        return TINY if self.quick else Shape()

    def start(self, shape: Shape, block_length: int | None, **engine_args: Any) -> Engine:
        """Start vLLM with random weights, without prefix caching.

        Args:
            block_length: of the diffusion model; None: vLLM's own AR model of the same shape.
            engine_args: vLLM's, besides the usual ones here or in their place.
        """
        usual = {
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": MAX_MODEL_LEN,
            "kv_cache_memory_bytes": 2**26 if self.quick else 2**30,
        }
        return self.serve(self._config(shape, block_length), **(usual | engine_args))

    def serve(self, model: Path, **engine_args: Any) -> Engine:
        """Start vLLM with a checkpoint, without prefix caching."""
        usual = {
            "max_num_seqs": MAX_REQUESTS,
            "enable_prefix_caching": False,
            "enforce_eager": self.quick,
        }
        return Engine(self.environment, vllm_server, model, **(usual | engine_args))

    def reference(self, shape: Shape) -> Engine:
        """Start the plain transformers loop with random weights."""
        return Engine(self.environment, Reference.random, self._config(shape, BLOCK_LENGTH))

    def _config(self, shape: Shape, block_length: int | None) -> Path:
        kind = "ar" if block_length is None else f"diffusion-{block_length}"
        return write_config(shape, self.work / f"{kind}-{shape.vocabulary}", block_length)


def vllm_server(model: Path, **engine_args: Any) -> Any:
    """A `VllmServer`; vLLM is imported in the child alone."""
    from vllm_edlm.bench.vllm_server import VllmServer

    return VllmServer(model, **engine_args)
