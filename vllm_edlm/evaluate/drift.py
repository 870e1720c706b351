"""How far a conversion moved the weights: |dW| against the AR parent, layer by layer.

The paper compares attention patterns and block lengths by it (arXiv 2512.14067, weight changes
of attention and FFN layers): the less a conversion has to change, the more ability it keeps.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

from torch import Tensor

from vllm_edlm.bench.report import Plot, Row, Table
from vllm_edlm.evaluate.weights import Weights

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PARTS = ("attention", "FFN", "norms", "embeddings", "head")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


@dataclass
class Drift:
    """Sums over the weights of one part of the model.

    Attributes:
        layer: None for what belongs to no layer.
        part: one of `PARTS`.
        count: weights.
        absolute: sum of |dW|.
        squares: sum of dW^2.
        before: sum of W^2 of the AR parent.
    """

    layer: int | None
    part: str
    count: int = 0
    absolute: float = 0.0
    squares: float = 0.0
    before: float = 0.0

    def add(self, before: Tensor, after: Tensor) -> None:
        """Count a tensor of any shape, as it was and as it is."""
        before = before.double()
        change = after.double() - before
        self.count += change.numel()
        self.absolute += change.abs().sum().item()
        self.squares += change.square().sum().item()
        self.before += before.square().sum().item()

    @property
    def mean_change(self) -> float:
        """Mean of |dW|."""
        return self.absolute / self.count

    @property
    def relative(self) -> float | None:
        """Frobenius norm of dW over that of W; None where W is zero."""
        return sqrt(self.squares / self.before) if self.before else None


def weight_drift(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[Drift]:
    """Compare two sets of weights of the same shape, by transformers' names.

    Rows that a conversion added to the vocabulary have nothing to be compared with and are left
    out. A head that the AR parent shares with its embeddings is compared with these.

    Returns:
        One entry for each layer and part, layers in order, then embeddings, final norm and head.

    Raises:
        ValueError: a tensor that the other model lacks or has in another shape.
    """
    parts: dict[tuple[int | None, str], Drift] = {}
    for name, first, second in _pairs(before, after):
        key = layer_of(name), part_of(name)
        parts.setdefault(key, Drift(*key)).add(first, second)
    return sorted(
        parts.values(),
        key=lambda drift: (drift.layer is None, drift.layer or 0, PARTS.index(drift.part)),
    )


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to."""
    match = _LAYER.match(name)
    return int(match.group(1)) if match else None


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to, one of `PARTS`.

    Raises:
        ValueError: a tensor of no known part.
    """
    if "norm" in name:
        return "norms"
    places = {".self_attn.": "attention", ".mlp.": "FFN", EMBEDDINGS: "embeddings", HEAD: "head"}
    for place, part in places.items():
        if place in name:
            return part
    raise ValueError(f"tensor {name} belongs to no known part of a decoder")


def _pairs(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name in sorted({*before, *after}):
        if name == HEAD and (name not in before or name not in after):
            first, second = (w.get(name, w[EMBEDDINGS]) for w in (before, after))
        else:
            _check_present(name, before, "AR parent")
            _check_present(name, after, "converted model")
            first, second = before[name], after[name]
        yield name, *_common_rows(name, first, second)


def _check_present(name: str, weights: Mapping[str, Tensor], model: str) -> None:
    if name not in weights:
        raise ValueError(f"the {model} has no tensor {name}: not two models of one shape")


def _common_rows(name: str, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors, over the vocabulary that they share."""
    if name in (EMBEDDINGS, HEAD):
        rows = min(len(first), len(second))
        first, second = first[:rows], second[:rows]
    if first.shape != second.shape:
        raise ValueError(
            f"tensor {name} has the shape {list(first.shape)} in the AR parent and "
            f"{list(second.shape)} in the converted model"
        )
    return first, second


def drift_table(model: Path, ar: Path) -> Table:
    """The table and plot of a converted model against its AR parent, folders both.

    Raises:
        ValueError: a folder without weights, or models that do not fit each other.
    """
    parent, converted = Weights(ar), Weights(model)
    drifts = weight_drift(parent, converted)
    return Table(
        name="drift",
        title="Weight drift from the AR parent, layer by layer",
        rows=[_row(drift) for drift in drifts],
        notes=[
            "Mean |dW|: mean absolute change of a weight. Relative: Frobenius norm of the change "
            "over that of the AR parent's weights.",
            f"Weights as stored: {', '.join(parent.dtypes)} of the AR parent, "
            f"{', '.join(converted.dtypes)} of the converted model. Changes below a "
            "dtype's precision do not show: export with --dtype float32 to see small ones.",
            *_averages(drifts),
        ],
        plot=Plot(x="layer", y="mean |dW|", series=("part",)),
    )


def _row(drift: Drift) -> Row:
    return {
        "layer": drift.layer,
        "part": drift.part,
        "weights": drift.count,
        "mean |dW|": drift.mean_change,
        "relative": drift.relative,
    }


def _averages(drifts: list[Drift]) -> Iterator[str]:
    for part in ("attention", "FFN"):
        changes = [drift.mean_change for drift in drifts if drift.part == part]
        if changes:
            yield f"Average mean |dW| of a layer, {part}: {sum(changes) / len(changes):.3g}."
