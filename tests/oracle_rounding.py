"""Where rounding decides: the oracle's answers with other rounding errors in its logits.

An engine adds in another order than the oracle, so its logits differ in their last digits. Once in
a while a confidence meets its threshold that closely, or a token its rival. Only there may an
engine's answer be another one, and then one of these.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from oracle import OracleResult
from oracle_model import OracleModel
from torch import Tensor

# Standard deviation: what fp32 sums of the checkpoints' sizes differ by.
ERROR = 1e-5
TRIES = 20


@dataclass(frozen=True)
class RoundedModel:
    """A model whose every logit has an error of its own, fixed by a seed."""

    model: OracleModel
    errors: torch.Generator

    @classmethod
    def seeded(cls, model: OracleModel, seed: int) -> "RoundedModel":
        return cls(model, torch.Generator().manual_seed(seed))

    def logits(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Logits [T, V] of the model, each a little off."""
        exact = self.model.logits(token_ids, mask)
        return exact + ERROR * torch.randn(exact.shape, generator=self.errors)


Decode = Callable[[OracleModel | RoundedModel], OracleResult]
"""One request, answered by the oracle with the given model."""


def answers(decode: Decode, model: OracleModel) -> Iterator[OracleResult]:
    """The oracle's own answer, then those with other rounding errors, most often all the same."""
    yield decode(model)
    for seed in range(TRIES):
        yield decode(RoundedModel.seeded(model, seed))


def assert_possible(
    check: Callable[[OracleResult], None], decode: Decode, model: OracleModel
) -> None:
    """`check` must accept the oracle's own answer, or one of those with other rounding errors.

    Raises:
        AssertionError: as `check` said of the oracle's own answer.
    """
    possible = answers(decode, model)
    try:
        check(next(possible))
    except AssertionError:
        if not any(_accepts(check, answer) for answer in possible):
            raise


def _accepts(check: Callable[[OracleResult], None], answer: OracleResult) -> bool:
    try:
        check(answer)
    except AssertionError:
        return False
    return True
